// Pooling over windows, the mean over an image, the gates that squeeze-and-excitation makes of
// it and the shortcut without parameters, channels-last, fp32 or bf16 (T), the maximum of bytes as
// well: what a residual network has between its convolutions.
#pragma once

#include "gather.h"

namespace resnet_fast::cpu {

// y = the largest value of each window, as torch's max_pool2d: padding never wins, NaN always does.
// `g` gives batch, channels, in, kernel, out, stride, padding and dilation. Bytes are dense.
template <typename T>
void max_pool(const Geometry& g, const T* x, T* y);

// y = the mean of each window, summed in fp32 and divided by the size of the window, in which
// padding counts; dilation is 1.
template <typename T>
void average_pool(const Geometry& g, const T* x, T* y);

// y[n][c] = the mean of x[n][pixel][c] over all pixels, `step` values apart, summed in fp32.
template <typename T>
void mean_pool(int64_t batch, int64_t pixels, int64_t channels, int64_t step, const T* x, T* y);

// y[n][pixel][c] = x[n][pixel][c] * gate[n][c]; y may be x.
template <typename T>
void gate_channels(int64_t batch, int64_t pixels, int64_t channels, const T* x, const T* gate,
                   T* y);

// y = x at every stride-th pixel, with zeros for the channels beyond its own: a 1x1 window of `g`.
template <typename T>
void pad_channels(const Geometry& g, const T* x, T* y);

}  // namespace resnet_fast::cpu
