// 16-bit floating-point storage and its conversions, round to nearest even, free of branches so
// that loops over them vectorise. The fp16 pair scales by powers of two, so that the fp32 adder
// does the rounding and the subnormals.
#pragma once

#include <cstdint>
#include <cstring>

#include "activation.h"

namespace resnet_fast {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

namespace detail {
RESNET_FAST_HD float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
RESNET_FAST_HD uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
}  // namespace detail

RESNET_FAST_HD float widen(float v) { return v; }
RESNET_FAST_HD double widen(double v) { return v; }
RESNET_FAST_HD float widen(bf16 v) { return detail::as_float(uint32_t(v.bits) << 16); }
RESNET_FAST_HD float widen(fp16 v) {
  const uint32_t w = uint32_t(v.bits) << 16;
  const uint32_t sign = w & 0x80000000u;
  const uint32_t twice = w + w;
  const float normal = detail::as_float((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = detail::as_float((twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude =
      twice < (1u << 27) ? detail::as_bits(subnormal) : detail::as_bits(normal);
  return detail::as_float(sign | magnitude);
}

template <typename T>
struct Narrow;
template <>
struct Narrow<float> {
  RESNET_FAST_HD static float from(float v) { return v; }
};
template <>
struct Narrow<double> {
  RESNET_FAST_HD static double from(double v) { return v; }
};
template <>
struct Narrow<bf16> {
  RESNET_FAST_HD static bf16 from(float v) {
    const uint32_t w = detail::as_bits(v);
    const uint32_t rounded = (w + 0x7FFFu + ((w >> 16) & 1u)) >> 16;
    const bool nan = (w & 0x7FFFFFFFu) > 0x7F800000u;
    return bf16{static_cast<uint16_t>(nan ? 0x7FC0u : rounded)};
  }
};
template <>
struct Narrow<fp16> {
  RESNET_FAST_HD static fp16 from(float v) {
    const uint32_t w = detail::as_bits(v);
    const uint32_t twice = w + w;
    const uint32_t raw_bias = twice & 0xFF000000u;
    const uint32_t bias = raw_bias < 0x71000000u ? 0x71000000u : raw_bias;
    const float magnitude = detail::as_float(w & 0x7FFFFFFFu);
    const float base =
        detail::as_float((bias >> 1) + 0x07800000u) + (magnitude * 0x1.0p+112f) * 0x1.0p-110f;
    const uint32_t bits = detail::as_bits(base);
    const uint32_t finite = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
    return fp16{
        static_cast<uint16_t>(((w >> 16) & 0x8000u) | (twice > 0xFF000000u ? 0x7E00u : finite))};
  }
};

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
// fp32, or fp64 for fp64 storage.
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

}  // namespace resnet_fast
