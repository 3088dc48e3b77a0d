// The convolution of groups of few channels with as many filters (ResNeXt's, and the depthwise
// one), fp32 sums of fp32 or bf16.
//
// A product of matrices per group would leave most lanes of a vector idle: a ResNeXt's first groups
// have four filters. Here the lanes are neighbouring channels, of x and of y alike, and a vector
// holds whole groups, or a group fills whole vectors. Channel j of each group is spread over the
// lanes of its group by one permutation, and multiplied with the weights of all of them (groups of
// 4, tap t):
//
//     x at t     a b c d | e f g h | ...      j = 0:   a a a a | e e e e | ...   *  w[t][0]
//                                             j = 1:   b b b b | f f f f | ...   *  w[t][1]
//                                             ...                                += sums
//
// A task owns some lines of an image. A tile of kPixels neighbouring outputs shares each weight
// that is loaded; the weights of a block of lanes stay in the first-level cache for all of the
// lines.
#include "grouped.h"

#include "lanes.h"
#include "tile.h"

namespace resnet_fast::cpu {
namespace {

constexpr int kPixels = 7;  // outputs a tile: divides the lines of the usual images
constexpr int64_t kLines = 4;

template <Isa I>
constexpr int64_t kLanes = Tile<I>::kBytes / 4;

// What a tile needs to know of its place.
template <typename T>
struct TileAt {
  const T* image;    // x, from the group's first channel on
  int64_t h, w;      // where the first window starts
  int64_t count;     // outputs, up to kPixels
  int64_t channels;  // of the block: as many as there are lanes, or what is left
  int64_t vectors;   // of x that a group fills
  const T* zeros;
};

// One vector of x: where a window's column lies outside the image, zeros. kInside: none does, and
// the block is whole.
template <bool kInside, typename T, typename Vec>
RF_INLINE inline void load_column(const Geometry& g, const TileAt<T>& at, const T* from, int64_t w,
                                  Vec* x) {
  if constexpr (kInside) {
    load_lanes(from, x);
  } else {
    const T* start = w >= 0 && w < g.in[2] ? from : at.zeros;
    if (at.channels == int64_t(sizeof(Vec) / sizeof(float))) {
      load_lanes(start, x);
    } else {
      load_some_lanes(start, at.channels, x);
    }
  }
}

// acc = the sums of a tile's windows. Where the width of the kernel kWidth and the stride kStride
// are known, and columns are neighbours, each is loaded, and permuted, once for all windows that it
// is part of.
template <bool kInside, bool kDepthwise, int kWidth, int kStride, typename T, typename Vec>
RF_INLINE inline void sum_windows(const Geometry& g, const TileAt<T>& at, const float* packed,
                                  Vec (&acc)[kPixels]) {
  using Index = typename Integers<sizeof(Vec)>::Word;
  constexpr int kCount = sizeof(Vec) / sizeof(float);
  const int64_t per_group = kDepthwise ? 1 : g.group_channels();
  const int64_t vectors = kDepthwise ? 1 : at.vectors, a_vector = per_group / vectors;
  uint32_t firsts[kCount];
  for (int i = 0; i < kCount; ++i) {
    firsts[i] = vectors > 1 ? 0u : uint32_t(i / per_group * per_group);
  }
  Index first;
  std::memcpy(&first, firsts, sizeof(first));
  for (int p = 0; p < kPixels; ++p) acc[p] = Vec{};
  const int64_t width = kWidth > 0 ? kWidth : g.kernel[2];
  for (int64_t i = 0; i < g.kernel[1]; ++i, packed += width * per_group * kCount) {
    const int64_t h = at.h + i * g.dilation[1];
    if (h < 0 || h >= g.in[1]) continue;
    const T* line = at.image + (h * g.in[2] + at.w) * g.channels;
    if constexpr (kWidth > 0) {
      constexpr int kColumns = (kPixels - 1) * kStride + kWidth;
      for (int64_t v = 0; v < vectors; ++v) {
        Vec x[kColumns];
#pragma GCC unroll 32
        for (int q = 0; q < kColumns; ++q) {
          load_column<kInside>(g, at, line + v * kCount + q * g.channels, at.w + q, &x[q]);
        }
        const float* factors = packed + v * kCount * kCount;
        Index index = first;
        for (int64_t c = 0; c < a_vector; ++c, index += 1, factors += kCount) {
          Vec spread[kColumns];
#pragma GCC unroll 32
          for (int q = 0; q < kColumns; ++q) {
            spread[q] = kDepthwise ? x[q] : Vec(__builtin_shuffle(x[q], index));
          }
#pragma GCC unroll 8
          for (int j = 0; j < kWidth; ++j) {
            Vec factor;
            std::memcpy(&factor, factors + j * per_group * kCount, sizeof(Vec));
#pragma GCC unroll 8
            for (int p = 0; p < kPixels; ++p) acc[p] += spread[p * kStride + j] * factor;
          }
        }
      }
    } else {
      for (int64_t step = 0; step < width * vectors; ++step) {
        const int64_t j = step / vectors, v = step % vectors;
        Vec x[kPixels];
#pragma GCC unroll 8
        for (int p = 0; p < kPixels; ++p) {
          const int64_t column = j * g.dilation[2] + p * g.stride[2];
          load_column<kInside>(g, at, line + v * kCount + column * g.channels, at.w + column,
                               &x[p]);
        }
        const float* factors = packed + step * a_vector * kCount;
        Index index = first;
        for (int64_t c = 0; c < a_vector; ++c, index += 1, factors += kCount) {
          Vec factor;
          std::memcpy(&factor, factors, sizeof(Vec));
#pragma GCC unroll 8
          for (int p = 0; p < kPixels; ++p) {
            acc[p] += (kDepthwise ? x[p] : Vec(__builtin_shuffle(x[p], index))) * factor;
          }
        }
      }
    }
  }
}

// y of one tile from its sums; `c` is the block's first channel, y and residual start there.
template <int kBytes, typename T, typename Vec>
RF_INLINE inline void finish_tile(const DirectOperands<T>& o, const Clamp& clamp, int64_t filters,
                                  int64_t c, int64_t channels, int64_t count, const T* residual,
                                  T* y, const Vec (&acc)[kPixels]) {
  constexpr int64_t kCount = kBytes / 4;
  if (clamp.is_clamp && channels == kCount) {
    Vec scale, shift;
    std::memcpy(&scale, o.scale + c, sizeof(Vec));
    std::memcpy(&shift, o.shift + c, sizeof(Vec));
    const Vec low = Vec{} + clamp.low, high = Vec{} + clamp.high;
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      if (p >= count) break;
      Vec z = acc[p] * scale + shift;
      if (residual != nullptr) {
        Vec r;
        load_lanes(residual + p * filters, &r);
        z += r;
      }
      // NaN fails both comparisons and stays.
      z = z < low ? low : z;
      z = z > high ? high : z;
      store_lanes(z, y + p * filters);
    }
    return;
  }
  float sums[kPixels][kCount];
  std::memcpy(sums, &acc, sizeof(sums));
  with_act(o.act, [&](auto tag) RF_INLINE {
    for (int64_t p = 0; p < count; ++p) {
      finish_row(tag, channels, sums[p], o.scale + c, o.shift + c,
                 residual == nullptr ? nullptr : residual + p * filters, y + p * filters);
    }
  });
}

template <bool kDepthwise, int kWidth, int kStride, Isa I, typename T>
RF_INLINE inline void grouped_tasks(const Geometry& g, const DirectOperands<T>& o, int64_t lines,
                                    int64_t begin, int64_t end) {
  constexpr int kBytes = Tile<I>::kBytes;
  constexpr int64_t kCount = kLanes<I>;
  typedef float Vec __attribute__((vector_size(kBytes)));
  const Clamp clamp = clamp_of(o.act);
  const int64_t bands = (g.out[1] + lines - 1) / lines;
  const int64_t block_size = g.taps() * g.group_channels() * kCount;
  const int64_t tiles = (g.out[2] + kPixels - 1) / kPixels;
  const int64_t reach = (g.kernel[2] - 1) * g.dilation[2];
  const T zeros[kCount] = {};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / bands, h0 = task % bands * lines;
    const int64_t h1 = std::min(g.out[1], h0 + lines);
    for (int64_t c = 0; c < g.channels; c += kCount) {
      TileAt<T> at{};
      const int64_t group = c / g.group_channels() * g.group_channels();
      at.image = o.x + n * g.in[1] * g.in[2] * g.channels + group;
      at.vectors = std::max<int64_t>(1, g.group_channels() / kCount);
      at.channels = std::min(kCount, g.channels - c);
      at.zeros = zeros;
      const float* packed = static_cast<const float*>(o.packed) + c / kCount * block_size;
      for (int64_t h = h0; h < h1; ++h) {
        at.h = h * g.stride[1] - g.padding[1];
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t w = cut_at(g.out[2], tiles, tile);
          at.count = cut_at(g.out[2], tiles, tile + 1) - w;
          at.w = w * g.stride[2] - g.padding[2];
          const bool inside = at.w >= 0 && at.count == kPixels && at.channels == kCount &&
                              at.w + (kPixels - 1) * g.stride[2] + reach < g.in[2];
          Vec acc[kPixels];
          if (inside) {
            sum_windows<true, kDepthwise, kWidth, kStride>(g, at, packed, acc);
          } else {
            sum_windows<false, kDepthwise, kWidth, kStride>(g, at, packed, acc);
          }
          const int64_t out = ((n * g.out[1] + h) * g.out[2] + w) * g.filters + c;
          finish_tile<kBytes>(o, clamp, g.filters, c, at.channels, at.count,
                              o.residual == nullptr ? nullptr : o.residual + out, o.y + out, acc);
        }
      }
    }
  }
}

// f(depthwise, width, stride) with what is known of the window at compile time: the usual ones,
// where the sums of a tile and all of its columns fit the registers.
template <Isa I, typename F>
void with_window(const Geometry& g, const F& f) {
  using std::bool_constant, std::integral_constant;
  const auto with = [&](auto depthwise) {
    if constexpr (I == Isa::avx512) {
      const int64_t width = g.kernel[2], stride = g.stride[2];
      if (g.dilation[2] == 1 && width == 3 && stride == 1) {
        return f(depthwise, integral_constant<int, 3>{}, integral_constant<int, 1>{});
      }
      if (g.dilation[2] == 1 && width == 3 && stride == 2) {
        return f(depthwise, integral_constant<int, 3>{}, integral_constant<int, 2>{});
      }
      if (g.dilation[2] == 1 && width == 5 && stride == 1) {
        return f(depthwise, integral_constant<int, 5>{}, integral_constant<int, 1>{});
      }
    }
    f(depthwise, integral_constant<int, 0>{}, integral_constant<int, 0>{});
  };
  if (g.group_channels() == 1) return with(bool_constant<true>{});
  with(bool_constant<false>{});
}

int64_t lanes() {
  int64_t count = 0;
  run_on_isa([&](auto isa) { count = kLanes<decltype(isa)::value>; });
  return count;
}

}  // namespace

bool is_narrow(ScalarType dtype, int64_t group_channels, int64_t group_filters) {
  // Without AVX2 there is no permutation to do it with.
  if (group_channels != group_filters) return false;
  if (current_isa() == Isa::baseline) return group_channels == 1;
  // More channels are a matrix product of their own, which in bf16 is twice as fast: at 32 channels
  // 0.15 ms against 0.21 (ResNeXt-50's last stage, 2 Zen 4 cores).
  const int64_t most = dtype == ScalarType::BFloat16 ? 16 : 64;
  return lanes() % group_channels == 0 || (group_channels % lanes() == 0 && group_channels <= most);
}

int64_t grouped_packed_size(int64_t filters, int64_t group_channels, int64_t taps) {
  return (filters + lanes() - 1) / lanes() * lanes() * group_channels * taps;
}

// [K / lanes][taps][C / groups][lanes]; zeros beyond the last filter.
template <typename T>
void pack_grouped(const T* from, int64_t filters, int64_t group_channels, int64_t taps, float* to) {
  const int64_t count = lanes(), blocks = (filters + count - 1) / count;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c = 0; c < group_channels; ++c) {
        for (int64_t i = 0; i < count; ++i, ++to) {
          const int64_t k = block * count + i;
          *to = k < filters ? widen(from[(k * group_channels + c) * taps + tap]) : 0.0f;
        }
      }
    }
  }
}

template <typename T>
void grouped(const Geometry& g, const DirectOperands<T>& o) {
  // Few lines a task where there are few, so that each thread gets some.
  const int64_t lines = g.batch * g.out[1] >= worker_count() * 4 * kLines ? kLines : 1;
  run_on_isa([&](auto isa) {
    constexpr Isa kIsa = decltype(isa)::value;
    const int64_t tasks = g.batch * ((g.out[1] + lines - 1) / lines);
    with_window<kIsa>(g, [&](auto depthwise, auto width, auto stride) {
      parallel_on<kIsa>(tasks, [&](int64_t begin, int64_t end) RF_INLINE {
        grouped_tasks<depthwise, width, stride, kIsa>(g, o, lines, begin, end);
      });
    });
  });
}

template void pack_grouped(const float*, int64_t, int64_t, int64_t, float*);
template void pack_grouped(const bf16*, int64_t, int64_t, int64_t, float*);
template void grouped(const Geometry& g, const DirectOperands<float>& o);
template void grouped(const Geometry& g, const DirectOperands<bf16>& o);

}  // namespace resnet_fast::cpu
