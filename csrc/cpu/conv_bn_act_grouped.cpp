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

// What has to be looked at where a tile is loaded: nothing, whether a column lies inside the image,
// or that and how many lanes there are.
enum class Edge { none, columns, lanes };

// One vector of x: where a window's column lies outside the image, zeros.
template <Edge kEdge, typename T, typename Vec>
RF_INLINE inline void load_column(const Geometry& g, const TileAt<T>& at, const T* from, int64_t w,
                                  Vec* x) {
  if constexpr (kEdge == Edge::none) {
    load_lanes(from, x);
  } else {
    const T* start = w >= 0 && w < g.in[2] ? from : at.zeros;
    if constexpr (kEdge == Edge::columns) {
      load_lanes(start, x);
    } else {
      load_some_lanes(start, at.channels, x);
    }
  }
}

template <typename Vec>
using IndexOf = typename Integers<sizeof(Vec)>::Word;

// The permutation that spreads the first channel of each group over its lanes.
template <typename Vec>
RF_INLINE inline IndexOf<Vec> first_channels(int64_t per_group) {
  constexpr int64_t kCount = sizeof(Vec) / sizeof(float);
  uint32_t firsts[kCount];
  for (int64_t i = 0; i < kCount; ++i) {
    firsts[i] = per_group > kCount ? 0u : uint32_t(i / per_group * per_group);
  }
  IndexOf<Vec> index;
  std::memcpy(&index, firsts, sizeof(index));
  return index;
}

// acc = the sums of a tile's windows. Where the width of the kernel kWidth and the stride kStride
// are known, and columns are neighbours, each is loaded, and permuted, once for all windows that it
// is part of. A line's weights, the sums and a column are 13 registers for a width of 5.
template <Edge kEdge, bool kDepthwise, int kWidth, int kStride, typename T, typename Vec>
RF_INLINE inline void sum_windows(const Geometry& g, const TileAt<T>& at, const IndexOf<Vec>& first,
                                  const float* packed, Vec (&acc)[kPixels]) {
  using Index = IndexOf<Vec>;
  constexpr int kCount = sizeof(Vec) / sizeof(float);
  const int64_t per_group = kDepthwise ? 1 : g.group_channels();
  const int64_t vectors = kDepthwise ? 1 : at.vectors, a_vector = per_group / vectors;
  for (int p = 0; p < kPixels; ++p) acc[p] = Vec{};
  const int64_t width = kWidth > 0 ? kWidth : g.kernel[2];
  for (int64_t i = 0; i < g.kernel[1]; ++i, packed += width * per_group * kCount) {
    const int64_t h = at.h + i * g.dilation[1];
    if (h < 0 || h >= g.in[1]) continue;
    const T* line = at.image + (h * g.in[2] + at.w) * g.channels;
    if constexpr (kWidth > 0) {
      constexpr int kColumns = (kPixels - 1) * kStride + kWidth;
      for (int64_t v = 0; v < vectors; ++v) {
        const float* factors = packed + v * kCount * kCount;
        Index index = first;
        for (int64_t c = 0; c < a_vector; ++c, index += 1, factors += kCount) {
          Vec factor[kWidth];
#pragma GCC unroll 8
          for (int j = 0; j < kWidth; ++j) {
            std::memcpy(&factor[j], factors + j * per_group * kCount, sizeof(Vec));
          }
#pragma GCC unroll 32
          for (int q = 0; q < kColumns; ++q) {
            Vec x;
            load_column<kEdge>(g, at, line + v * kCount + q * g.channels, at.w + q, &x);
            if constexpr (!kDepthwise) x = Vec(__builtin_shuffle(x, index));
#pragma GCC unroll 8
            for (int j = 0; j < kWidth; ++j) {
              const int ahead = q - j;
              if (ahead < 0 || ahead % kStride != 0 || ahead / kStride >= kPixels) continue;
              acc[ahead / kStride] += x * factor[j];
            }
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
          load_column<kEdge>(g, at, line + v * kCount + column * g.channels, at.w + column, &x[p]);
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

// finish_tile's detour, of part of a vector or an activation that is no clamp: compiled once for an
// instruction set, and called.
template <Isa I, typename T>
void finish_values(const DirectOperands<T>& o, int64_t filters, int64_t c, int64_t channels,
                   int64_t count, const T* residual, T* y, const float* sums) {
  constexpr int64_t kCount = kLanes<I>;
  run_on<I>([&](auto) RF_INLINE {
    with_act(o.act, [&](auto tag) RF_INLINE {
      const auto finish = [&](auto length) RF_INLINE {
        for (int64_t p = 0; p < count; ++p) {
          finish_row(tag, length, sums + p * kCount, o.scale + c, o.shift + c,
                     residual == nullptr ? nullptr : residual + p * filters, y + p * filters);
        }
      };
      if (channels == kCount) return finish(std::integral_constant<int64_t, kCount>{});
      finish(channels);
    });
  });
}

// y of one tile from its sums; `c` is the block's first channel, y and residual start there.
template <Isa I, typename T, typename Vec>
RF_INLINE inline void finish_tile(const DirectOperands<T>& o, const Clamp& clamp, int64_t filters,
                                  int64_t c, int64_t channels, int64_t count, const T* residual,
                                  T* y, const Vec (&acc)[kPixels]) {
  if (!clamp.is_clamp || channels < kLanes<I>) {
    float sums[kPixels * kLanes<I>];
    std::memcpy(sums, &acc, sizeof(sums));
    return finish_values<I>(o, filters, c, channels, count, residual, y, sums);
  }
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
}

// How the work is cut: lines of an image, and channels where there are few of them.
struct GroupedCut {
  int64_t lines, bands, chunks;

  // A chunk is of whole lines of the cache.
  GroupedCut(const Geometry& g, int64_t threads) {
    lines = g.batch * g.out[1] >= threads * 4 * kLines ? kLines : 1;
    bands = (g.out[1] + lines - 1) / lines;
    const int64_t wanted = (threads * 4 * kLines + g.batch * bands - 1) / (g.batch * bands);
    chunks = std::clamp<int64_t>(wanted, 1, (g.channels + 63) / 64);
  }
};

template <bool kDepthwise, int kWidth, int kStride, Isa I, typename T>
RF_INLINE inline void grouped_tasks(const Geometry& g, const DirectOperands<T>& o,
                                    const GroupedCut& cut, int64_t begin, int64_t end) {
  using Vec = typename Tile<I>::Vec;
  constexpr int64_t kCount = kLanes<I>;
  // Vectors that share a line of the cache are computed one after the other.
  constexpr int64_t kLine = std::max<int64_t>(kCount, 64 / sizeof(T));
  const Clamp clamp = clamp_of(o.act);
  const int64_t block_size = g.taps() * g.group_channels() * kCount;
  const int64_t tiles = (g.out[2] + kPixels - 1) / kPixels;
  const Cut tile_cut(g.out[2], tiles), channel_cut((g.channels + kLine - 1) / kLine, cut.chunks);
  const int64_t reach = (kPixels - 1) * g.stride[2] + (g.kernel[2] - 1) * g.dilation[2];
  const T zeros[kCount] = {};
  const auto first = first_channels<Vec>(g.group_channels());
  const auto tile_at = [&](int64_t n, int64_t h, int64_t tile, int64_t c) RF_INLINE {
    TileAt<T> at{};
    const int64_t group = c / g.group_channels() * g.group_channels();
    at.image = o.x + n * g.in[1] * g.in[2] * g.channels + group;
    at.vectors = std::max<int64_t>(1, g.group_channels() / kCount);
    at.channels = std::min(kCount, g.channels - c);
    at.zeros = zeros;
    at.h = h * g.stride[1] - g.padding[1];
    const int64_t w = tile_cut.at(tile);
    at.count = tile_cut.at(tile + 1) - w;
    at.w = w * g.stride[2] - g.padding[2];
    const bool inside = at.w >= 0 && at.count == kPixels && at.w + reach < g.in[2];
    const float* packed = static_cast<const float*>(o.packed) + c / kCount * block_size;
    Vec acc[kPixels];
    if (at.channels < kCount) {
      sum_windows<Edge::lanes, kDepthwise, 0, 0>(g, at, first, packed, acc);
    } else if (inside) {
      sum_windows<Edge::none, kDepthwise, kWidth, kStride>(g, at, first, packed, acc);
    } else {
      sum_windows<Edge::columns, kDepthwise, kWidth, kStride>(g, at, first, packed, acc);
    }
    const int64_t out = ((n * g.out[1] + h) * g.out[2] + w) * g.filters + c;
    finish_tile<I>(o, clamp, g.filters, c, at.channels, at.count,
                   o.residual == nullptr ? nullptr : o.residual + out, o.y + out, acc);
  };
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / cut.chunks / cut.bands;
    const int64_t h0 = task / cut.chunks % cut.bands * cut.lines;
    const int64_t h1 = std::min(g.out[1], h0 + cut.lines);
    const int64_t c0 = channel_cut.at(task % cut.chunks) * kLine;
    const int64_t c1 = std::min(g.channels, channel_cut.at(task % cut.chunks + 1) * kLine);
    for (int64_t line = c0; line < c1; line += kLine) {
      for (int64_t h = h0; h < h1; ++h) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          for (int64_t c = line; c < std::min(c1, line + kLine); c += kCount) {
            tile_at(n, h, tile, c);
          }
        }
      }
    }
  }
}

// f(depthwise, width, stride) with what is known of the window at compile time: the usual ones.
template <Isa I, typename F>
void with_window(const Geometry& g, const F& f) {
  using std::bool_constant, std::integral_constant;
  const auto with = [&](auto depthwise) {
    if constexpr (I != Isa::baseline) {
      const int64_t width = g.dilation[2] == 1 ? g.kernel[2] : 0, stride = g.stride[2];
      const auto is = [&](int64_t w, int64_t s) { return width == w && stride == s; };
      if (is(3, 1)) return f(depthwise, integral_constant<int, 3>{}, integral_constant<int, 1>{});
      if (is(3, 2)) return f(depthwise, integral_constant<int, 3>{}, integral_constant<int, 2>{});
      if (is(5, 1)) return f(depthwise, integral_constant<int, 5>{}, integral_constant<int, 1>{});
      if (is(5, 2)) return f(depthwise, integral_constant<int, 5>{}, integral_constant<int, 2>{});
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
  const GroupedCut cut(g, worker_count());
  run_on_isa([&](auto isa) {
    constexpr Isa kIsa = decltype(isa)::value;
    with_window<kIsa>(g, [&](auto depthwise, auto width, auto stride) {
      parallel_on<kIsa>(g.batch * cut.bands * cut.chunks,
                        [&](int64_t begin, int64_t end) RF_INLINE {
                          grouped_tasks<depthwise, width, stride, kIsa>(g, o, cut, begin, end);
                        });
    });
  });
}

template void pack_grouped(const float*, int64_t, int64_t, int64_t, float*);
template void pack_grouped(const bf16*, int64_t, int64_t, int64_t, float*);
template void grouped(const Geometry& g, const DirectOperands<float>& o);
template void grouped(const Geometry& g, const DirectOperands<bf16>& o);

}  // namespace resnet_fast::cpu
