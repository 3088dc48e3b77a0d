#include "window_pool.h"

#include <limits>

#include "lanes.h"
#include "tile.h"

namespace resnet_fast::cpu {
namespace {

// Sixteen values, a line of memory, in vectors that fit the registers: the compiler takes wider
// ones apart value by value where they are compared.
template <typename Vec>
struct Line {
  static constexpr int kParts = 64 / sizeof(Vec);
  static constexpr int64_t kLanes = sizeof(Vec) / sizeof(float);
  Vec part[kParts] = {};

  // f(part of this, part of the other)
  template <typename F>
  RF_INLINE void with(const Line& other, const F& f) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) f(part[i], other.part[i]);
  }
};
constexpr int64_t kLine = 16;

// f(c, load, store) for the channels in steps of a line; load(from, line) and store(line, to) move
// what there is of a step.
template <typename Vec, typename F>
RF_INLINE inline void each_line(int64_t channels, const F& f) {
  constexpr int64_t kLanes = Line<Vec>::kLanes;
  int64_t c = 0;
  for (; c + kLine <= channels; c += kLine) {
    f(
        c,
        [](const auto* from, Line<Vec>* to) RF_INLINE {
          for (int i = 0; i < Line<Vec>::kParts; ++i) {
            load_lanes(from + i * kLanes, &to->part[i]);
          }
        },
        [](const Line<Vec>& from, auto* to) RF_INLINE {
          for (int i = 0; i < Line<Vec>::kParts; ++i) store_lanes(from.part[i], to + i * kLanes);
        });
  }
  if (c < channels) {
    const int64_t rest = channels - c;
    f(
        c,
        [rest](const auto* from, Line<Vec>* to) RF_INLINE {
          std::remove_cvref_t<decltype(*from)> values[kLine] = {};
          std::memcpy(values, from, static_cast<size_t>(rest) * sizeof(*from));
          for (int i = 0; i < Line<Vec>::kParts; ++i) {
            load_lanes(values + i * kLanes, &to->part[i]);
          }
        },
        [rest](const Line<Vec>& from, auto* to) RF_INLINE {
          std::remove_cvref_t<decltype(*to)> values[kLine];
          for (int i = 0; i < Line<Vec>::kParts; ++i) {
            store_lanes(from.part[i], values + i * kLanes);
          }
          std::memcpy(to, values, static_cast<size_t>(rest) * sizeof(*to));
        });
  }
}

// The part [lo, hi) of the taps along one axis that lies inside the image.
struct Inside {
  int64_t lo, hi;
  Inside(int64_t start, int64_t taps, int64_t dilation, int64_t size)
      : lo(start < 0 ? (-start + dilation - 1) / dilation : 0),
        hi(start < size ? std::min(taps, (size - start + dilation - 1) / dilation) : 0) {}
};

template <typename Vec, typename T>
RF_INLINE inline void max_row(const Geometry& g, const T* image, int64_t oh, T* y) {
  const int64_t h0 = oh * g.stride[1] - g.padding[1], step = g.x_step(), out_step = g.y_step();
  const Inside rows(h0, g.kernel[1], g.dilation[1], g.in[1]);
  for (int64_t ow = 0; ow < g.out[2]; ++ow, y += out_step) {
    const int64_t w0 = ow * g.stride[2] - g.padding[2];
    const Inside columns(w0, g.kernel[2], g.dilation[2], g.in[2]);
    each_line<Vec>(g.channels, [&](int64_t c, auto load, auto store) RF_INLINE {
      Line<Vec> most, nan, v;
      most.with(most, [](Vec& m, const Vec&)
                          RF_INLINE { m = Vec{} - std::numeric_limits<float>::infinity(); });
      for (int64_t i = rows.lo; i < rows.hi; ++i) {
        const T* line = image + (h0 + i * g.dilation[1]) * g.in[2] * step + c;
        for (int64_t j = columns.lo; j < columns.hi; ++j) {
          load(line + (w0 + j * g.dilation[2]) * step, &v);
          most.with(v, [](Vec& m, const Vec& x) RF_INLINE { m = m < x ? x : m; });  // not NaN
          nan.with(v, [](Vec& n, const Vec& x) RF_INLINE { n = x == x ? n : x; });
        }
      }
      most.with(nan, [](Vec& m, const Vec& n) RF_INLINE { m = n == n ? m : n; });
      store(most, y + c);
    });
  }
}

// The same of bytes, a tap at a time over all channels: nothing is NaN, and a vector holds 64.
template <typename Vec>
RF_INLINE inline void max_row(const Geometry& g, const uint8_t* image, int64_t oh, uint8_t* y) {
  const int64_t channels = g.channels;
  const int64_t h0 = oh * g.stride[1] - g.padding[1];
  const Inside rows(h0, g.kernel[1], g.dilation[1], g.in[1]);
  for (int64_t ow = 0; ow < g.out[2]; ++ow, y += channels) {
    const int64_t w0 = ow * g.stride[2] - g.padding[2];
    const Inside columns(w0, g.kernel[2], g.dilation[2], g.in[2]);
    uint8_t* __restrict to = y;
    std::fill_n(to, channels, uint8_t(0));
    for (int64_t i = rows.lo; i < rows.hi; ++i) {
      for (int64_t j = columns.lo; j < columns.hi; ++j) {
        const int64_t h = h0 + i * g.dilation[1], w = w0 + j * g.dilation[2];
        const uint8_t* __restrict from = image + (h * g.in[2] + w) * channels;
        for (int64_t c = 0; c < channels; ++c) to[c] = to[c] < from[c] ? from[c] : to[c];
      }
    }
  }
}

// The mean of each window, in the order in which torch adds its taps.
template <typename Vec, typename T>
RF_INLINE inline void average_row(const Geometry& g, const T* image, int64_t oh, T* y) {
  const int64_t h0 = oh * g.stride[1] - g.padding[1], step = g.x_step(), out_step = g.y_step();
  const Inside rows(h0, g.kernel[1], 1, g.in[1]);
  const float count = static_cast<float>(g.taps());
  for (int64_t ow = 0; ow < g.out[2]; ++ow, y += out_step) {
    const int64_t w0 = ow * g.stride[2] - g.padding[2];
    const Inside columns(w0, g.kernel[2], 1, g.in[2]);
    each_line<Vec>(g.channels, [&](int64_t c, auto load, auto store) RF_INLINE {
      Line<Vec> sum, v;
      for (int64_t i = rows.lo; i < rows.hi; ++i) {
        const T* line = image + (h0 + i) * g.in[2] * step + c;
        for (int64_t j = columns.lo; j < columns.hi; ++j) {
          load(line + (w0 + j) * step, &v);
          sum.with(v, [](Vec& a, const Vec& b) RF_INLINE { a += b; });
        }
      }
      sum.with(sum, [count](Vec& a, const Vec&) RF_INLINE { a /= Vec{} + count; });
      store(sum, y + c);
    });
  }
}

// to = the mean of `channels` channels over `pixels` pixels that are `stride` values apart.
template <typename Vec, typename T>
RF_INLINE inline void mean_of(int64_t pixels, int64_t stride, int64_t channels, const T* from,
                              T* to) {
  constexpr int64_t kChain = 8;  // pixels added one after the other (tile.h)
  const float count = static_cast<float>(pixels);
  each_line<Vec>(channels, [&](int64_t c, auto load, auto store) RF_INLINE {
    Line<Vec> sum, v;
    for (int64_t first = 0; first < pixels; first += kChain) {
      Line<Vec> part;
      for (int64_t p = first; p < std::min(pixels, first + kChain); ++p) {
        load(from + p * stride + c, &v);
        part.with(v, [](Vec& a, const Vec& b) RF_INLINE { a += b; });
      }
      sum.with(part, [](Vec& a, const Vec& b) RF_INLINE { a += b; });
    }
    sum.with(sum, [count](Vec& a, const Vec&) RF_INLINE { a /= Vec{} + count; });
    store(sum, to + c);
  });
}

// One pixel of gate_channels.
template <typename Vec, typename T>
RF_INLINE inline void gate_pixel(int64_t channels, const T* from, const T* by, T* to) {
  each_line<Vec>(channels, [&](int64_t c, auto load, auto store) RF_INLINE {
    Line<Vec> v, factor;
    load(from + c, &v);
    load(by + c, &factor);
    v.with(factor, [](Vec& a, const Vec& b) RF_INLINE { a *= b; });
    store(v, to + c);
  });
}

// A task is a line of output.
template <bool kAverages, typename T>
void pool_rows(const Geometry& g, const T* x, T* y) {
  const int64_t image = g.in[1] * g.in[2] * g.x_step(), row = g.out[2] * g.y_step();
  run_on_isa([&](auto isa) {
    constexpr Isa kIsa = decltype(isa)::value;
    parallel_on<kIsa>(g.batch * g.out[1], [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t at = begin; at < end; ++at) {
        const T* const from = x + at / g.out[1] * image;
        if constexpr (kAverages) {
          average_row<typename Tile<kIsa>::Vec>(g, from, at % g.out[1], y + at * row);
        } else {
          max_row<typename Tile<kIsa>::Vec>(g, from, at % g.out[1], y + at * row);
        }
      }
    });
  });
}

}  // namespace

template <typename T>
void max_pool(const Geometry& g, const T* x, T* y) {
  pool_rows<false>(g, x, y);
}

template <typename T>
void average_pool(const Geometry& g, const T* x, T* y) {
  pool_rows<true>(g, x, y);
}

template <typename T>
void mean_pool(int64_t batch, int64_t pixels, int64_t channels, int64_t step, const T* x, T* y) {
  constexpr int64_t kPiece = 8 * kLine;  // channels a task takes
  const int64_t pieces = (channels + kPiece - 1) / kPiece;
  run_on_isa([&](auto isa) {
    constexpr Isa kIsa = decltype(isa)::value;
    parallel_on<kIsa>(batch * pieces, [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t n = at / pieces, c = at % pieces * kPiece;
        mean_of<typename Tile<kIsa>::Vec>(pixels, step, std::min(kPiece, channels - c),
                                          x + n * pixels * step + c, y + n * channels + c);
      }
    });
  });
}

template <typename T>
void gate_channels(int64_t batch, int64_t pixels, int64_t channels, const T* x, const T* gate,
                   T* y) {
  run_on_isa([&](auto isa) {
    constexpr Isa kIsa = decltype(isa)::value;
    parallel_on<kIsa>(batch * pixels, [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t at = begin; at < end; ++at) {
        gate_pixel<typename Tile<kIsa>::Vec>(channels, x + at * channels,
                                             gate + at / pixels * channels, y + at * channels);
      }
    });
  });
}

template <typename T>
void pad_channels(const Geometry& g, const T* x, T* y) {
  run_on_isa([&](auto isa) {
    parallel_on<decltype(isa)::value>(g.pixels(), [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const Window at = window_of(g, pixel);
        const T* from = x + at.image + (at.h * g.in[2] + at.w) * g.channels;
        T* to = y + pixel * g.filters;
        std::copy_n(from, g.channels, to);
        std::fill_n(to + g.channels, g.filters - g.channels, T{});
      }
    });
  });
}

template void max_pool(const Geometry& g, const float* x, float* y);
template void max_pool(const Geometry& g, const bf16* x, bf16* y);
template void max_pool(const Geometry& g, const uint8_t* x, uint8_t* y);
template void average_pool(const Geometry& g, const float* x, float* y);
template void average_pool(const Geometry& g, const bf16* x, bf16* y);
template void mean_pool(int64_t batch, int64_t pixels, int64_t channels, int64_t step,
                        const float* x, float* y);
template void mean_pool(int64_t batch, int64_t pixels, int64_t channels, int64_t step,
                        const bf16* x, bf16* y);
template void gate_channels(int64_t batch, int64_t pixels, int64_t channels, const float* x,
                            const float* gate, float* y);
template void gate_channels(int64_t batch, int64_t pixels, int64_t channels, const bf16* x,
                            const bf16* gate, bf16* y);
template void pad_channels(const Geometry& g, const float* x, float* y);
template void pad_channels(const Geometry& g, const bf16* x, bf16* y);

}  // namespace resnet_fast::cpu
