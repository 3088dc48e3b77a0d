// Conversions, 16-byte accesses and activations of a whole vector.
//
// No torch and no CUDA runtime here: the kernels that include this file are also compiled for the
// host by the tests, where tests/cuda_on_host/cuda.h supplies __global__ and threadIdx.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#include "../math/activation.h"
#include "../math/round.h"
#include "ptx.cuh"

namespace resnet_fast {

inline constexpr int kThreads = 256;
inline constexpr int kVectorBytes = 16;

// Elements in a 16-byte access. fp64 stays scalar: it serves gradient checks, not throughput.
template <typename T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <>
inline constexpr int kLanes<double> = 1;

template <typename T, int LANES>
struct alignas(sizeof(T) * LANES) Vector {
  static_assert((LANES & (LANES - 1)) == 0, "a vector access needs a power of two");
  static_assert(sizeof(T) * LANES <= kVectorBytes, "16 bytes is the widest access before sm_100");
  T lane[LANES];
};

// The address must be a multiple of sizeof(T) * LANES: the launchers check base pointers, and the
// kernels step by whole vectors only.
template <int LANES, typename T>
__device__ inline Vector<T, LANES> load_vector(const T* address) {
  return *reinterpret_cast<const Vector<T, LANES>*>(address);
}
template <int LANES, typename T>
__device__ inline void store_vector(T* address, const Vector<T, LANES>& value) {
  *reinterpret_cast<Vector<T, LANES>*>(address) = value;
}

// Storage to accumulator and back, the one rounding of an element. The portable forms of
// csrc/math/round.h give the same values; the device has fp16 instructions for both directions and,
// from sm_80 on, one for rounding to bf16.
template <typename T>
__device__ inline Accumulator<T> to_accumulator(T value) {
  return widen(value);
}
template <typename T>
__device__ inline T to_storage(Accumulator<T> value) {
  return Narrow<T>::from(value);
}
#if defined(__CUDA_ARCH__)
template <>
__device__ inline float to_accumulator<fp16>(fp16 value) {
  return __half2float(__ushort_as_half(value.bits));
}
template <>
__device__ inline fp16 to_storage<fp16>(float value) {
  return fp16{__half_as_ushort(__float2half_rn(value))};
}
#if __CUDA_ARCH__ >= 800
template <>
__device__ inline bf16 to_storage<bf16>(float value) {
  return bf16{round_to_bf16(value)};
}
#endif
#endif

// The switch over activations stands outside the loop over lanes: one uniform branch a vector
// serves all eight, where a template parameter would multiply the kernels by eight.
template <typename C, int LANES>
__device__ inline void activate_lanes(Act act, C (&value)[LANES]) {
  with_act(act, [&](auto tag) {
#pragma unroll
    for (int j = 0; j < LANES; ++j) value[j] = activate<decltype(tag)::value>(value[j]);
  });
}

// Replaces each pre-activation by the activation's slope there.
template <typename C, int LANES>
__device__ inline void differentiate_lanes(Act act, C (&value)[LANES]) {
  with_act(act, [&](auto tag) {
#pragma unroll
    for (int j = 0; j < LANES; ++j) value[j] = activate_grad<decltype(tag)::value>(value[j]);
  });
}

}  // namespace resnet_fast
