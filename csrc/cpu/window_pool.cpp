#include "window_pool.h"

#include <limits>

#include "lanes.h"
#include "team.h"

namespace resnet_fast::cpu {
namespace {

constexpr int64_t kLanes = 16;  // values taken at a time: one AVX-512 vector of fp32
typedef float Vec __attribute__((vector_size(64)));

// f(c, load, store) for the channels in steps of kLanes; load(from, vector) and store(vector, to)
// move what there is of a step.
template <typename F>
RF_INLINE inline void each_step(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    f(
        c, [](const auto* from, Vec* to) RF_INLINE { load_lanes(from, to); },
        [](const Vec& from, auto* to) RF_INLINE { store_lanes(from, to); });
  }
  if (c < channels) {
    const int64_t rest = channels - c;
    f(
        c, [rest](const auto* from, Vec* to) RF_INLINE { load_some_lanes(from, rest, to); },
        [rest](const Vec& from, auto* to) RF_INLINE { store_some_lanes(from, rest, to); });
  }
}

// The part [lo, hi) of the taps along one axis that lies inside the image.
struct Inside {
  int64_t lo, hi;
  Inside(int64_t start, int64_t taps, int64_t dilation, int64_t size)
      : lo(start < 0 ? (-start + dilation - 1) / dilation : 0),
        hi(start < size ? std::min(taps, (size - start + dilation - 1) / dilation) : 0) {}
};

template <typename T>
RF_INLINE inline void max_row(const Geometry& g, const T* image, int64_t oh, T* y) {
  const int64_t channels = g.channels;
  const int64_t h0 = oh * g.stride[1] - g.padding[1];
  const Inside rows(h0, g.kernel[1], g.dilation[1], g.in[1]);
  for (int64_t ow = 0; ow < g.out[2]; ++ow, y += channels) {
    const int64_t w0 = ow * g.stride[2] - g.padding[2];
    const Inside columns(w0, g.kernel[2], g.dilation[2], g.in[2]);
    each_step(channels, [&](int64_t c, auto load, auto store) RF_INLINE {
      Vec most = Vec{} - std::numeric_limits<float>::infinity(), nan = {};
      for (int64_t i = rows.lo; i < rows.hi; ++i) {
        const T* line = image + (h0 + i * g.dilation[1]) * g.in[2] * channels + c;
        for (int64_t j = columns.lo; j < columns.hi; ++j) {
          Vec v;
          load(line + (w0 + j * g.dilation[2]) * channels, &v);
          most = most < v ? v : most;  // not where v is NaN
          nan = v == v ? nan : v;
        }
      }
      most = nan == nan ? most : nan;
      store(most, y + c);
    });
  }
}

// The same of bytes, a tap at a time over all channels: nothing is NaN, and a vector holds 64.
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

}  // namespace

template <typename T>
void max_pool(const Geometry& g, const T* x, T* y) {
  const int64_t image = g.in[1] * g.in[2] * g.channels, row = g.out[2] * g.channels;
  run_on_isa([&](auto isa) {
    constexpr Isa kIsa = decltype(isa)::value;
    parallel_on<kIsa>(g.batch * g.out[1], [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t at = begin; at < end; ++at) {
        max_row(g, x + at / g.out[1] * image, at % g.out[1], y + at * row);
      }
    });
  });
}

template <typename T>
void mean_pool(int64_t batch, int64_t pixels, int64_t channels, const T* x, T* y) {
  constexpr int64_t kPiece = 8 * kLanes;  // channels a task takes: whole lines of memory
  constexpr int64_t kChain = 8;           // pixels added one after the other (tile.h)
  const int64_t pieces = (channels + kPiece - 1) / kPiece;
  const float count = static_cast<float>(pixels);
  run_on_isa([&](auto isa) {
    parallel_on<decltype(isa)::value>(batch * pieces, [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t c0 = at % pieces * kPiece;
        const T* from = x + at / pieces * pixels * channels + c0;
        T* to = y + at / pieces * channels + c0;
        each_step(std::min(kPiece, channels - c0), [&](int64_t c, auto load, auto store) RF_INLINE {
          Vec sum = {};
          for (int64_t first = 0; first < pixels; first += kChain) {
            Vec part = {};
            for (int64_t p = first; p < std::min(pixels, first + kChain); ++p) {
              Vec v;
              load(from + p * channels + c, &v);
              part += v;
            }
            sum += part;
          }
          sum /= Vec{} + count;
          store(sum, to + c);
        });
      }
    });
  });
}

template <typename T>
void gate_channels(int64_t batch, int64_t pixels, int64_t channels, const T* x, const T* gate,
                   T* y) {
  run_on_isa([&](auto isa) {
    parallel_on<decltype(isa)::value>(batch * pixels, [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t at = begin; at < end; ++at) {
        const T *from = x + at * channels, *by = gate + at / pixels * channels;
        T* to = y + at * channels;
        each_step(channels, [&](int64_t c, auto load, auto store) RF_INLINE {
          Vec v, factor;
          load(from + c, &v);
          load(by + c, &factor);
          v *= factor;
          store(v, to + c);
        });
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
template void mean_pool(int64_t batch, int64_t pixels, int64_t channels, const float* x, float* y);
template void mean_pool(int64_t batch, int64_t pixels, int64_t channels, const bf16* x, bf16* y);
template void gate_channels(int64_t batch, int64_t pixels, int64_t channels, const float* x,
                            const float* gate, float* y);
template void gate_channels(int64_t batch, int64_t pixels, int64_t channels, const bf16* x,
                            const bf16* gate, bf16* y);
template void pad_channels(const Geometry& g, const float* x, float* y);
template void pad_channels(const Geometry& g, const bf16* x, bf16* y);

}  // namespace resnet_fast::cpu
