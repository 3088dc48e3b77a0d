// The Winograd kernels' entry (conv_bn_act_winograd.cpp).
#pragma once

#include "gather.h"

namespace resnet_fast::cpu {

template <typename T>
struct WinogradOperands {
  const T* x;           // channels-last
  const float* packed;  // what pack_winograd wrote
  const T* weight;      // with the strides of its four dimensions, for what overflows
  int64_t weight_step[4];
  const float* scale;
  const float* shift;
  const T* residual;  // may be null; not y
  T* y;
  Act act;
};

// Values in the packed weights of F(m x m, 3 x 3).
int64_t winograd_packed_size(int64_t filters, int64_t channels, int64_t m);

// m = 2 or 4; g is a 3x3 convolution of two dimensions, stride, dilation and groups of 1. T is
// float or bf16.
template <typename T>
void winograd(const Geometry& g, int64_t m, const WinogradOperands<T>& o);

}  // namespace resnet_fast::cpu
