// The activation table: forward and derivative of a pre-activation, for host and device.
// The order is the integer code; resnet_fast/ops/activation.py lists the same names.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define RESNET_FAST_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define RESNET_FAST_HD [[gnu::always_inline]] inline
#else
#define RESNET_FAST_HD inline
#endif

namespace resnet_fast {

enum class Act : int { none, relu, relu6, silu, hardswish, gelu, leaky_relu, sigmoid };

inline constexpr int kActCount = 8;
inline constexpr const char* kActNames[kActCount] = {"none",      "relu", "relu6",      "silu",
                                                     "hardswish", "gelu", "leaky_relu", "sigmoid"};
inline constexpr double kLeakySlope = 0.01;

namespace detail {
#if defined(__CUDA_ARCH__)
RESNET_FAST_HD float exp_(float v) { return ::expf(v); }
RESNET_FAST_HD float silu_(float v) { return v / (1.0f + exp_(-v)); }
#else
// e^v without a call, so that a loop over it becomes vector code: 2^n e^r with n = round(v / ln 2),
// |r| <= ln(2) / 2, and e^r by the polynomial of Cephes' expf (Moshier 1984). The error stays below
// 1.1 units in the last place. 2^n is multiplied in halves, so that it reaches infinity and the
// subnormals; NaN passes.
RESNET_FAST_HD float exp_(float v) {
  v = v < -104.0f ? -104.0f : v;
  v = v > 89.0f ? 89.0f : v;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const float shifted = v * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const auto exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  const int32_t half = exponent >> 1, rest = exponent - half;
  return p * std::bit_cast<float>((half + 127) << 23) * std::bit_cast<float>((rest + 127) << 23);
}
// v / (1 + h²), h = e^(-v/2): half the exponent leaves room for 2^n to be added to that of the
// polynomial, and the square reaches infinity by itself. As integers, positive floats are clamped
// to 174 and negative ones to -176, where h² is 0 or infinite beside 1; NaN passes, as it is still
// in v. e^(-r/2), |r| <= ln 2, is the polynomial of degree 6 that begins 1 - r/2 with the smallest
// relative error, 0.03 * 2^-23; silu's stays below 1.9 * 2^-23 where silu exceeds 1e-36.
RESNET_FAST_HD float silu_(float v) {
  const int32_t low = std::min(std::bit_cast<int32_t>(v), std::bit_cast<int32_t>(174.0f));
  const auto high = std::min(uint32_t(low), std::bit_cast<uint32_t>(-176.0f));
  const float c = std::bit_cast<float>(high);
  constexpr float kRound = 12582912.0f;  // as above
  const float shifted = c * -0.72134752044448170f + kRound;
  const float n = shifted - kRound;
  const float r = (c + n * 1.38671875f) - n * 4.24388880e-4f;
  float p = 2.15852851e-5f;
  p = p * r - 2.61522626e-4f;
  p = p * r + 2.60427431e-3f;
  p = p * r - 2.08331514e-2f;
  p = p * r + 1.24999985e-1f;
  p = p * r - 0.5f;
  p = p * r + 1.0f;
  const uint32_t power = std::bit_cast<uint32_t>(shifted) << 23;
  const float h = std::bit_cast<float>(std::bit_cast<uint32_t>(p) + power);
  return v / (h * h + 1.0f);
}
#endif
RESNET_FAST_HD double silu_(double v) { return v / (1.0 + ::exp(-v)); }
RESNET_FAST_HD double exp_(double v) { return ::exp(v); }
RESNET_FAST_HD float erf_(float v) { return ::erff(v); }
RESNET_FAST_HD double erf_(double v) { return ::erf(v); }
RESNET_FAST_HD float abs_(float v) { return ::fabsf(v); }
RESNET_FAST_HD double abs_(double v) { return ::fabs(v); }

// exp of a value that is never positive, so that neither branch of the logistic can overflow.
template <typename T>
RESNET_FAST_HD T logistic(T v) {
  const T e = exp_(-abs_(v));
  return (v < T(0) ? e : T(1)) / (T(1) + e);
}
}  // namespace detail

// T is float or double. Comparisons are written so that NaN passes through, as in PyTorch.
template <Act A, typename T>
RESNET_FAST_HD T activate(T v) {
  if constexpr (A == Act::relu) {
    return v < T(0) ? T(0) : v;
  } else if constexpr (A == Act::relu6) {
    return v < T(0) ? T(0) : (v > T(6) ? T(6) : v);
  } else if constexpr (A == Act::silu) {
    return detail::silu_(v);
  } else if constexpr (A == Act::hardswish) {
    const T gate = v + T(3) < T(0) ? T(0) : (v + T(3) > T(6) ? T(6) : v + T(3));
    return v * gate * T(1.0 / 6.0);
  } else if constexpr (A == Act::gelu) {
    return v * T(0.5) * (T(1) + detail::erf_(v * T(0.70710678118654752440)));
  } else if constexpr (A == Act::leaky_relu) {
    return v > T(0) ? v : v * T(kLeakySlope);
  } else if constexpr (A == Act::sigmoid) {
    return detail::logistic(v);
  } else {
    return v;
  }
}

// d act(v) / dv, with PyTorch's choice at the kinks.
template <Act A, typename T>
RESNET_FAST_HD T activate_grad(T v) {
  if constexpr (A == Act::relu) {
    return v <= T(0) ? T(0) : T(1);
  } else if constexpr (A == Act::relu6) {
    return v <= T(0) || v >= T(6) ? T(0) : T(1);
  } else if constexpr (A == Act::silu) {
    const T s = detail::logistic(v);
    return s * (T(1) + v * (T(1) - s));
  } else if constexpr (A == Act::hardswish) {
    return v <= T(-3) ? T(0) : (v < T(3) ? v * T(1.0 / 3.0) + T(0.5) : T(1));
  } else if constexpr (A == Act::gelu) {
    const T cdf = T(0.5) * (T(1) + detail::erf_(v * T(0.70710678118654752440)));
    return cdf + v * T(0.39894228040143267794) * detail::exp_(v * v * T(-0.5));
  } else if constexpr (A == Act::leaky_relu) {
    return v > T(0) ? T(1) : T(kLeakySlope);
  } else if constexpr (A == Act::sigmoid) {
    const T s = detail::logistic(v);
    return s * (T(1) - s);
  } else {
    return T(1);
  }
}

// grad * act'(v). A unit that the activation has shut off stops the gradient, infinite or NaN
// included, as the framework's masks do; a plain product would turn inf * 0 into NaN.
template <typename T>
RESNET_FAST_HD T chain(T grad, T slope) {
  return slope == T(0) ? T(0) : grad * slope;
}

template <Act A>
struct ActTag {
  static constexpr Act value = A;
};

// Host: calls f(ActTag<A>{}) for a runtime code.
template <typename F>
RESNET_FAST_HD void with_act(Act act, const F& f) {
  switch (act) {
    case Act::none:
      return f(ActTag<Act::none>{});
    case Act::relu:
      return f(ActTag<Act::relu>{});
    case Act::relu6:
      return f(ActTag<Act::relu6>{});
    case Act::silu:
      return f(ActTag<Act::silu>{});
    case Act::hardswish:
      return f(ActTag<Act::hardswish>{});
    case Act::gelu:
      return f(ActTag<Act::gelu>{});
    case Act::leaky_relu:
      return f(ActTag<Act::leaky_relu>{});
    case Act::sigmoid:
      return f(ActTag<Act::sigmoid>{});
  }
}

}  // namespace resnet_fast
