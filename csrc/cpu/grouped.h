// The convolution of narrow groups, the depthwise one among them (conv_bn_act_grouped.cpp).
#pragma once

#include "direct.h"

namespace resnet_fast::cpu {

// Whether groups of so many channels and filters are for this kernel: as many of both, whole groups
// in a vector or whole vectors in a group.
bool is_narrow(ScalarType dtype, int64_t group_channels, int64_t group_filters);

int64_t grouped_packed_size(int64_t filters, int64_t group_channels, int64_t taps);

// Weights [K][C / groups][taps], T float or bf16.
template <typename T>
void pack_grouped(const T* from, int64_t filters, int64_t group_channels, int64_t taps, float* to);

// g has two dimensions and narrow groups; o.packed is what pack_grouped wrote.
template <typename T>
void grouped(const Geometry& g, const DirectOperands<T>& o);

}  // namespace resnet_fast::cpu
