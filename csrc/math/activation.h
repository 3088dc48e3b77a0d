// The activation table: forward and derivative of a pre-activation, for host and device.
// The order is the integer code; resnet_fast/ops/activation.py lists the same names.
#pragma once

#include <cmath>

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
RESNET_FAST_HD float exp_(float v) { return ::expf(v); }
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
    return v / (T(1) + detail::exp_(-v));
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
