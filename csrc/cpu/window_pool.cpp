#include "window_pool.h"

#include <limits>

#include "team.h"

namespace resnet_fast::cpu {
namespace {

constexpr int64_t kLanes = 16;  // floats taken at a time: one AVX-512 vector
typedef float Vec __attribute__((vector_size(64)));

// f(c, copy) for the channels in steps of kLanes; copy(to, from) moves what there is of a step.
template <typename F>
RF_INLINE inline void each_step(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    f(c, [](void* to, const void* from) RF_INLINE { std::memcpy(to, from, sizeof(Vec)); });
  }
  if (c < channels) {
    const size_t rest = static_cast<size_t>(channels - c) * sizeof(float);
    f(c, [rest](void* to, const void* from) RF_INLINE { std::memcpy(to, from, rest); });
  }
}

// The part [lo, hi) of the taps along one axis that lies inside the image.
struct Inside {
  int64_t lo, hi;
  Inside(int64_t start, int64_t taps, int64_t dilation, int64_t size)
      : lo(start < 0 ? (-start + dilation - 1) / dilation : 0),
        hi(start < size ? std::min(taps, (size - start + dilation - 1) / dilation) : 0) {}
};

template <Isa I>
RF_INLINE inline void max_row(const Geometry& g, const float* image, int64_t oh, float* y) {
  const int64_t channels = g.channels;
  const int64_t h0 = oh * g.stride[1] - g.padding[1];
  const Inside rows(h0, g.kernel[1], g.dilation[1], g.in[1]);
  for (int64_t ow = 0; ow < g.out[2]; ++ow, y += channels) {
    const int64_t w0 = ow * g.stride[2] - g.padding[2];
    const Inside columns(w0, g.kernel[2], g.dilation[2], g.in[2]);
    each_step(channels, [&](int64_t c, auto copy) RF_INLINE {
      Vec most = Vec{} - std::numeric_limits<float>::infinity(), nan = {};
      for (int64_t i = rows.lo; i < rows.hi; ++i) {
        const float* line = image + (h0 + i * g.dilation[1]) * g.in[2] * channels + c;
        for (int64_t j = columns.lo; j < columns.hi; ++j) {
          Vec v = {};
          copy(&v, line + (w0 + j * g.dilation[2]) * channels);
          most = most < v ? v : most;  // not where v is NaN
          nan = v == v ? nan : v;
        }
      }
      most = nan == nan ? most : nan;
      copy(y + c, &most);
    });
  }
}

}  // namespace

void max_pool(const Geometry& g, const float* x, float* y) {
  const int64_t image = g.in[1] * g.in[2] * g.channels, row = g.out[2] * g.channels;
  run_on_isa([&](auto isa) {
    constexpr Isa kIsa = decltype(isa)::value;
    parallel_on<kIsa>(g.batch * g.out[1], [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t at = begin; at < end; ++at) {
        max_row<kIsa>(g, x + at / g.out[1] * image, at % g.out[1], y + at * row);
      }
    });
  });
}

void mean_pool(int64_t batch, int64_t pixels, int64_t channels, const float* x, float* y) {
  constexpr int64_t kPiece = 8 * kLanes;  // channels a task takes: whole lines of memory
  constexpr int64_t kChain = 8;           // pixels added one after the other (tile.h)
  const int64_t pieces = (channels + kPiece - 1) / kPiece;
  const float count = static_cast<float>(pixels);
  run_on_isa([&](auto isa) {
    parallel_on<decltype(isa)::value>(batch * pieces, [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t c0 = at % pieces * kPiece;
        const float* from = x + at / pieces * pixels * channels + c0;
        float* to = y + at / pieces * channels + c0;
        each_step(std::min(kPiece, channels - c0), [&](int64_t c, auto copy) RF_INLINE {
          Vec sum = {};
          for (int64_t first = 0; first < pixels; first += kChain) {
            Vec part = {};
            for (int64_t p = first; p < std::min(pixels, first + kChain); ++p) {
              Vec v = {};
              copy(&v, from + p * channels + c);
              part += v;
            }
            sum += part;
          }
          sum /= Vec{} + count;
          copy(to + c, &sum);
        });
      }
    });
  });
}

void pad_channels(const Geometry& g, const float* x, float* y) {
  run_on_isa([&](auto isa) {
    parallel_on<decltype(isa)::value>(g.pixels(), [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const Window at = window_of(g, pixel);
        const float* from = x + at.image + (at.h * g.in[2] + at.w) * g.channels;
        float* to = y + pixel * g.filters;
        std::copy_n(from, g.channels, to);
        std::fill_n(to + g.channels, g.filters - g.channels, 0.0f);
      }
    });
  });
}

}  // namespace resnet_fast::cpu
