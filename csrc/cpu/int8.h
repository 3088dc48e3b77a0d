// The convolution of 8-bit operands: activations as u8 with a scale and a zero point for the whole
// tensor, weights as s8 with a scale a filter, sums exact in 32 bits.
//
//     real x = s_x (x - z_x),   real w[k] = s_w[k] w[k]
//     sum over the window of (x - z_x) w = sum of x w  -  z_x sum of w
//
// What lies outside the image holds z_x, so the second term is the same for every pixel, and
// belongs to the shift, as all the scales belong to the filter's scale
// (resnet_fast/ops/conv_bn_act_int8.py; the arithmetic is that of Jacob et al. 2018). The result is
// put on y's grid in the epilogue, and memory never sees more than 8 bits a value.
#pragma once

#include "direct.h"

namespace resnet_fast::cpu {

// The depth beyond which 32 bits might not hold a sum: 255 * 128 a product.
constexpr int64_t kInt8Depth = (int64_t(1) << 31) / (255 * 128);

// Bytes of a packed weight: `filters` of all groups together, `channels` of one.
int64_t int8_packed_size(int64_t filters, int64_t channels, int64_t height, int64_t width,
                         int64_t groups);
inline int64_t int8_packed_size(const Geometry& g) {
  return int8_packed_size(g.filters, g.group_channels(), g.kernel[1], g.kernel[2], g.groups);
}

// Where the activation is a clamp, scale and shift are on y's grid (requantize_row).
void run_int8(const Geometry& g, const DirectOperands<uint8_t>& o);

// Narrow groups, the depthwise convolution among them (conv_bn_act_int8_grouped.cpp).
bool is_int8_narrow(int64_t filters, int64_t channels, int64_t groups);
int64_t int8_narrow_packed_size(int64_t filters, int64_t channels, int64_t height, int64_t width);
void pack_int8_narrow(const int8_t* from, int64_t filters, int64_t channels, int64_t height,
                      int64_t width, int8_t* to);
void int8_narrow(const Geometry& g, const DirectOperands<uint8_t>& o);

// The same for CPUs with AVX512_VNNI (conv_bn_act_int8_grouped_avx512vnni.cpp): where groups are
// narrow, a task's lines of x with their padding written out (band.h) and the channels of whole
// groups at a time.
int64_t int8_depthwise_vnni_size(int64_t filters, int64_t height, int64_t width);
void pack_int8_depthwise_vnni(const int8_t* from, int64_t filters, int64_t height, int64_t width,
                              int8_t* to);
void int8_depthwise_vnni(const Geometry& g, const DirectOperands<uint8_t>& o);
void pack_int8_quads_vnni(const int8_t* from, int64_t filters, int64_t channels, int64_t taps,
                          int8_t* to);
void int8_quads_vnni(const Geometry& g, const DirectOperands<uint8_t>& o);

// The product for CPUs with AVX512_VNNI (conv_bn_act_int8_avx512vnni.cpp).
bool has_int8_vnni();
int64_t int8_vnni_packed_size(int64_t filters, int64_t channels, int64_t taps, int64_t groups);
void pack_int8_vnni(const int8_t* from, int64_t filters, int64_t channels, int64_t taps,
                    int64_t groups, int8_t* to);
void int8_vnni(const Geometry& g, const DirectOperands<uint8_t>& o);

}  // namespace resnet_fast::cpu
