// What is done pixel by pixel: a batch norm with the activation behind it, by itself or on the way
// into a convolution, and the copies that put channels side by side. Channels-last, fp32 or bf16
// (T).
#pragma once

#include "gather.h"
#include "tile.h"

namespace resnet_fast::cpu {

// clamp(x * scale + shift), one factor and one summand a channel; none where scale is null.
struct Affine {
  const float* scale = nullptr;
  const float* shift = nullptr;
  float low = 0, high = 0;
};

// `count` channels from `channel` on: computed in fp32 and rounded once, wherever it is done.
template <typename T>
RF_INLINE inline void affine_run(const Affine& a, int64_t channel, int64_t count,
                                 const T* __restrict x, T* __restrict y) {
  const float* __restrict scale = a.scale + channel;
  const float* __restrict shift = a.shift + channel;
  const float low = a.low, high = a.high;  // a float that is written might be one of these
  for (int64_t c = 0; c < count; ++c) {
    float v = widen(x[c]) * scale[c] + shift[c];
    // NaN fails both comparisons and stays.
    v = v < low ? low : v;
    v = v > high ? high : v;
    y[c] = Narrow<T>::from(v);
  }
}

// A convolution of one tap and one group whose input is affine: the row as gather_row has it, with
// the zeros of the padding as they are.
template <typename T>
RF_INLINE inline void gather_affine(const Geometry& g, const T* x, const Window& win,
                                    const Runs& runs, const Affine& a, T* row) {
  walk_row(
      g, win, runs,
      [&](int64_t column, int64_t element, int64_t length)
          RF_INLINE { affine_run(a, runs.begin + column, length, x + element, row + column); },
      [&](int64_t column, int64_t length) RF_INLINE { std::fill_n(row + column, length, T{}); });
}

// y = act(x * scale + shift) for g.pixels() pixels of g.channels channels, g.x_step() and
// g.y_step() apart.
template <typename T>
void affine_pixels(const Geometry& g, const T* x, const float* scale, const float* shift, Act act,
                   T* y);

// y = x, of the same pixels.
template <typename T>
void copy_pixels(const Geometry& g, const T* x, T* y);

}  // namespace resnet_fast::cpu
