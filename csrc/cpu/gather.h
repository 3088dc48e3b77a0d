// The geometry of a convolution, and rows of the matrix that its windows form.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "../math/conv_geometry.h"
#include "../stable.h"
#include "isa.h"

namespace resnet_fast::cpu {

struct Geometry {
  int64_t batch, channels, filters, groups;
  std::array<int64_t, 3> in, kernel, out, stride, padding, dilation;  // depth, height, width
  // Values from one pixel to the next, where they are channels of a larger tensor; else 0.
  int64_t x_pitch, y_pitch;

  int64_t x_step() const { return x_pitch > 0 ? x_pitch : channels; }
  int64_t y_step() const { return y_pitch > 0 ? y_pitch : filters; }
  int64_t group_channels() const { return channels / groups; }
  int64_t group_filters() const { return filters / groups; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t depth() const { return taps() * group_channels(); }
  int64_t pixels() const { return batch * out[0] * out[1] * out[2]; }
};

// Where an output pixel's window starts in x; `image` is the first element of its image.
struct Window {
  int64_t image, d, h, w;
};

inline Window window_of(const Geometry& g, int64_t pixel) {
  const int64_t w = pixel % g.out[2];
  const int64_t h = pixel / g.out[2] % g.out[1];
  const int64_t d = pixel / (g.out[2] * g.out[1]) % g.out[0];
  const int64_t n = pixel / (g.out[2] * g.out[1] * g.out[0]);
  return {n * g.in[0] * g.in[1] * g.in[2] * g.x_step(), d * g.stride[0] - g.padding[0],
          h * g.stride[1] - g.padding[1], w * g.stride[2] - g.padding[2]};
}

// The windows of `count` neighbouring pixels. Only the first is found by division, which takes
// longer than a pixel of a small product.
inline void windows_of(const Geometry& g, int64_t pixel, int64_t count, Window* windows) {
  if (count == 0) return;
  Window at = window_of(g, pixel);
  const int64_t image = g.in[0] * g.in[1] * g.in[2] * g.x_step();
  const std::array<int64_t, 3> end = {g.out[0] * g.stride[0] - g.padding[0],
                                      g.out[1] * g.stride[1] - g.padding[1],
                                      g.out[2] * g.stride[2] - g.padding[2]};
  for (int64_t i = 0; i < count; ++i) {
    windows[i] = at;
    at.w += g.stride[2];
    if (at.w < end[2]) continue;
    at.w = -g.padding[2];
    at.h += g.stride[1];
    if (at.h < end[1]) continue;
    at.h = -g.padding[1];
    at.d += g.stride[0];
    if (at.d < end[0]) continue;
    at.d = -g.padding[0];
    at.image += image;
  }
}

template <typename T, typename A>
RF_INLINE inline void widen_copy(const T* __restrict from, A* __restrict to, int64_t count) {
  if constexpr (std::is_same_v<T, A>) {
    // Short runs (three channels) are the rule at a stem, where a call of memcpy costs more than
    // the copy: blocks, the last one overlapping the one before it.
    constexpr int64_t kBlock = 64 / sizeof(T), kSmall = kBlock / 4;
    if (count >= kBlock) {
      for (int64_t i = 0; i + kBlock <= count; i += kBlock) std::memcpy(to + i, from + i, 64);
      std::memcpy(to + count - kBlock, from + count - kBlock, 64);
    } else if (count >= kSmall) {
      for (int64_t i = 0; i + kSmall <= count; i += kSmall) std::memcpy(to + i, from + i, 16);
      std::memcpy(to + count - kSmall, from + count - kSmall, 16);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    }
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
  }
}

// Columns [begin, end) of the rows of the gathered matrix, ordered [kd][kh][kw][c], for `width`
// channels from `channel`, as runs of memory. Without dilation along the width and with all
// channels, the kw taps are one run. What the rows of a panel share is computed once.
struct Runs {
  int64_t channel, width, begin, end;
  int64_t run_length, runs_a_line;
  int64_t from, kd, kh, kw;  // where the first run starts

  Runs(const Geometry& g, int64_t channel_, int64_t width_, int64_t begin_, int64_t end_)
      : channel(channel_), width(width_), begin(begin_), end(end_) {
    const bool merged = width == g.x_step() && (g.dilation[2] == 1 || g.kernel[2] == 1);
    run_length = merged ? g.kernel[2] * width : width;
    runs_a_line = merged ? 1 : g.kernel[2];
    const int64_t first = begin / run_length;
    from = begin - first * run_length;
    kw = first % runs_a_line;
    kh = first / runs_a_line % g.kernel[1];
    kd = first / runs_a_line / g.kernel[1];
  }
};

// One row: copy(column, element of x, length) for each run, zero(column, length) for what of it
// lies outside the image.
template <typename Copy, typename Zero>
RF_INLINE inline void walk_row(const Geometry& g, const Window& win, const Runs& runs,
                               const Copy& copy, const Zero& zero) {
  int64_t from = runs.from, kd = runs.kd, kh = runs.kh, kw = runs.kw;
  for (int64_t at = runs.begin; at < runs.end;) {
    const int64_t to = std::min(runs.run_length, from + (runs.end - at));
    const int64_t d = win.d + kd * g.dilation[0];
    const int64_t h = win.h + kh * g.dilation[1];
    const int64_t w = win.w + kw * g.dilation[2];
    int64_t lo = to, hi = to;  // the part inside the image; the rest is zero
    if (d >= 0 && d < g.in[0] && h >= 0 && h < g.in[1]) {
      lo = std::clamp(-w * runs.width, from, to);
      hi = std::clamp((g.in[2] - w) * runs.width, lo, to);
    }
    const int64_t column = at - runs.begin - from;
    if (lo > from) zero(column + from, lo - from);
    if (hi > lo) {
      const int64_t base =
          win.image + ((d * g.in[1] + h) * g.in[2] + w) * g.x_step() + runs.channel;
      copy(column + lo, base + lo, hi - lo);
    }
    if (to > hi) zero(column + hi, to - hi);
    at += to - from;
    from = 0;
    if (++kw == runs.runs_a_line) {
      kw = 0;
      if (++kh == g.kernel[1]) {
        kh = 0;
        ++kd;
      }
    }
  }
}

template <typename T, typename A>
RF_INLINE inline void gather_row(const Geometry& g, const T* x, const Window& win, const Runs& runs,
                                 A* row, A outside = A{}) {
  walk_row(
      g, win, runs,
      [&](int64_t column, int64_t element, int64_t length)
          RF_INLINE { widen_copy(x + element, row + column, length); },
      [&](int64_t column, int64_t length)
          RF_INLINE { std::fill_n(row + column, length, outside); });
}

// Brings what gather_row will read into the second-level cache.
template <typename T>
RF_INLINE inline void prefetch_row(const Geometry& g, const T* x, const Window& win,
                                   const Runs& runs) {
  walk_row(
      g, win, runs,
      [&](int64_t, int64_t element, int64_t length) RF_INLINE {
        const auto* first = reinterpret_cast<const char*>(x + element);
        const auto* last = reinterpret_cast<const char*>(x + element + length - 1);
        for (const char* line = first; line < last; line += 64) __builtin_prefetch(line, 0, 2);
        __builtin_prefetch(last, 0, 2);
      },
      [](int64_t, int64_t) RF_INLINE {});
}

// The geometry alone: dtypes are the caller's to check.
inline Geometry geometry_of(const Tensor& x, const Tensor& weight, IntList stride, IntList padding,
                            IntList dilation, int64_t groups) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  const int64_t rank = x.dim(), spatial = rank - 2;
  STD_TORCH_CHECK(rank >= 3 && rank <= 5, "x: expected 3 to 5 dimensions");
  STD_TORCH_CHECK(weight.dim() == rank, "weight: expected as many dimensions as x");
  STD_TORCH_CHECK(same_device(weight, x), "weight: expected the device of x");
  Geometry g{};
  g.batch = x.size(0);
  g.channels = x.size(1);
  g.filters = weight.size(0);
  g.groups = groups;
  STD_TORCH_CHECK(g.channels > 0 && g.filters > 0, "x, weight: expected at least one channel");
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0 && g.filters % groups == 0,
                  "groups: expected a positive divisor of the channels of x and weight");
  STD_TORCH_CHECK(weight.size(1) == g.channels / groups,
                  "weight: expected C / groups input channels");
  for (const auto& [name, list] :
       {std::pair{"stride", stride}, {"padding", padding}, {"dilation", dilation}}) {
    STD_TORCH_CHECK(static_cast<int64_t>(list.size()) == spatial, name,
                    ": expected one value a spatial dimension");
  }
  g.in = g.kernel = g.out = g.stride = g.dilation = {1, 1, 1};
  constexpr int64_t kLimit = int64_t(1) << 31;  // keeps every coordinate far from overflow
  for (int64_t d = 0; d < spatial; ++d) {
    const int64_t axis = 3 - spatial + d;
    g.in[axis] = x.size(2 + d);
    g.kernel[axis] = weight.size(2 + d);
    g.stride[axis] = stride[d];
    g.padding[axis] = padding[d];
    g.dilation[axis] = dilation[d];
    STD_TORCH_CHECK(g.stride[axis] > 0 && g.stride[axis] < kLimit, "stride: expected 1 or more");
    STD_TORCH_CHECK(g.padding[axis] >= 0 && g.padding[axis] < kLimit,
                    "padding: expected 0 or more");
    STD_TORCH_CHECK(g.dilation[axis] > 0 && g.dilation[axis] < kLimit,
                    "dilation: expected 1 or more");
    STD_TORCH_CHECK(g.kernel[axis] > 0 && g.kernel[axis] < kLimit, "weight: expected taps");
    g.out[axis] = conv_output_size(g.in[axis], g.kernel[axis], g.stride[axis], g.padding[axis],
                                   g.dilation[axis]);
    STD_TORCH_CHECK(g.out[axis] > 0, "weight: the kernel is larger than the padded input");
  }
  return g;
}

inline Geometry checked_geometry(const Tensor& x, const Tensor& weight, IntList stride,
                                 IntList padding, IntList dilation, int64_t groups) {
  check_input("x", x);
  check_input("weight", weight);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight: expected the dtype of x");
  return geometry_of(x, weight, stride, padding, dilation, groups);
}

// x as dense [N][spatial][C] memory. 1-D tensors pass as height 1.
inline Tensor channels_last_memory(const Tensor& t) {
  if (t.dim() != 3) return as_format(t, channels_last_format(t.dim()));
  const std::array<int64_t, 4> shape = {t.size(0), t.size(1), 1, t.size(2)};
  return as_format(torch::stable::reshape(t, IntList(shape.data(), shape.size())),
                   MemoryFormat::ChannelsLast);
}

}  // namespace resnet_fast::cpu
