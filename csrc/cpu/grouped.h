// The convolution of narrow groups, the depthwise one among them (conv_bn_act_grouped.cpp).
#pragma once

#include "gather.h"

namespace resnet_fast::cpu {

template <typename T>
struct GroupedOperands {
  const T* x;           // channels-last
  const float* packed;  // what pack_grouped wrote
  const float* scale;
  const float* shift;
  const T* residual;  // may be null
  T* y;
  Act act;
};

// Whether groups of so many channels and filters are for this kernel: as many of both, whole groups
// in a vector or whole vectors in a group.
bool is_narrow(ScalarType dtype, int64_t group_channels, int64_t group_filters);

int64_t grouped_packed_size(int64_t filters, int64_t group_channels, int64_t taps);

// Weights [K][C / groups][taps], T float or bf16.
template <typename T>
void pack_grouped(const T* from, int64_t filters, int64_t group_channels, int64_t taps, float* to);

// g has two dimensions and narrow groups.
template <typename T>
void grouped(const Geometry& g, const GroupedOperands<T>& o);

}  // namespace resnet_fast::cpu
