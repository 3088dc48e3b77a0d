// The PTX that the kernels use, one function an instruction. No kernel takes shuffle_down,
// atomic_add and fence_device yet; the tests' layer has them, for counters between blocks.
//
// Each has a device body, the instruction, and a host body, its documented meaning, which the tests
// supply (tests/cuda_on_host). Nothing else in csrc/cuda contains assembly, warp-level intrinsics
// or a __shared__ variable, so every kernel runs under the tests as it is.
//
// Sections are those of the PTX ISA manual, 9.0.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "../math/activation.h"
#include "../math/round.h"

namespace resnet_fast {

inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory: the kernels have no other. Aligned to 128 bytes, the period of
// the 32 banks.
__device__ inline unsigned char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char resnet_fast_shared_memory[];
  return resnet_fast_shared_memory;
#else
  return cuda_on_host::shared_memory();
#endif
}

// A 32-bit address in the shared window, which ldmatrix and cp.async take.
using SharedAddress = uint32_t;

__device__ inline SharedAddress shared_address(const void* pointer) {
#if defined(__CUDACC__)
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
#else
  return cuda_on_host::shared_address(pointer);
#endif
}

// 9.7.9.25.3.1 cp.async: copies BYTES (4, 8 or 16) from global to shared memory in the background;
// both addresses are multiples of BYTES. Without `valid` it reads nothing and writes zeros. Sixteen
// bytes pass by L1 (.cg), fewer cannot.
template <int BYTES>
__device__ inline void copy_async(SharedAddress to, const void* from, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
#if defined(__CUDACC__)
  const int source = valid ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(source)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES),
                 "r"(source)
                 : "memory");
  }
#else
  cuda_on_host::copy_async(to, from, BYTES, valid);
#endif
}

// 9.7.9.25.3.2 cp.async.commit_group: the thread's copies since the last one form a group.
__device__ inline void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  cuda_on_host::commit_copies();
#endif
}

// 9.7.9.25.3.3 cp.async.wait_group: waits until at most PENDING of the thread's groups are under
// way. What other threads copied needs a barrier behind it.
template <int PENDING>
__device__ inline void wait_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
  cuda_on_host::wait_copies(PENDING);
#endif
}

// 9.7.14.5.15 ldmatrix .x4: four 8x8 matrices of 16-bit elements. Lane l names the l % 8-th row, 16
// bytes at a multiple of 16, of matrix l / 8, and receives from matrix i, in to[i], elements 2 *
// (l % 4) and the one after it of row l / 4. The same words are 8x4 matrices of 32-bit elements:
// element l % 4 of row l / 4.
__device__ inline void load_matrices(uint32_t (&to)[4], SharedAddress row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
#else
  cuda_on_host::load_matrices(to, row);
#endif
}

// 9.7.14.5.14 mma, .8 m16n8k16 for fp16 and bf16, .7 m16n8k8 for TF32 (T = float, whose low 13
// bits the instruction ignores): sum[16 x 8] += a[16 x k] b[k x 8] in fp32, over 32 bytes of k.
// With g = lane / 4 and t = lane % 4, in words of 4 bytes along k:
//
//   a[0] (g, t)   a[1] (g + 8, t)   a[2] (g, t + 4)   a[3] (g + 8, t + 4)
//   b[0] (t, g)   b[1] (t + 4, g)
//   sum[0], sum[1] (g, 2t), (g, 2t + 1)   sum[2], sum[3] (g + 8, 2t), (g + 8, 2t + 1)
//
// so a row of `a`, and a column of `b` kept as a row, are what load_matrices reads.
template <typename T>
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
#if defined(__CUDACC__)
#define RESNET_FAST_MMA(shape, type)                                                  \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, fp16>) {
    RESNET_FAST_MMA("m16n8k16", "f16");
  } else if constexpr (std::is_same_v<T, bf16>) {
    RESNET_FAST_MMA("m16n8k16", "bf16");
  } else {
    static_assert(std::is_same_v<T, float>);
    RESNET_FAST_MMA("m16n8k8", "tf32");
  }
#undef RESNET_FAST_MMA
#else
  cuda_on_host::multiply_add<T>(sum, a, b0, b1);
#endif
}

// 9.7.9.21 cvt.rna.tf32.f32: fp32 rounded to TF32's 10 bits of fraction, ties away from zero. The
// other 13 are cut, so that a NaN of none but those becomes infinite; the framework's NaN does not.
__device__ inline uint32_t round_to_tf32(uint32_t bits) {
#if defined(__CUDACC__)
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
#else
  return cuda_on_host::round_to_tf32(bits);
#endif
}

// 9.7.9.21 cvt.rn.bf16.f32: fp32 rounded to bf16, ties to even.
__device__ inline uint16_t round_to_bf16(float value) {
#if defined(__CUDACC__)
  uint16_t rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
  return rounded;
#else
  return cuda_on_host::round_to_bf16(value);
#endif
}

// 9.7.3.12 max.NaN.f32: the larger of two numbers, NaN where either is one.
__device__ inline float max_or_nan(float a, float b) {
#if defined(__CUDACC__)
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a > b || a != a ? a : b;
#endif
}

// The value of lane `lane ^ mask`, in a warp whose lanes all call it.
template <typename T>
__device__ inline T shuffle_xor(T value, unsigned mask) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(kAllLanes, value, mask);
#else
  return cuda_on_host::shuffle_xor(value, mask);
#endif
}
// The value of lane `lane + delta`, its own where there is none; delta counts modulo 32.
template <typename T>
__device__ inline T shuffle_down(T value, unsigned delta) {
#if defined(__CUDACC__)
  return __shfl_down_sync(kAllLanes, value, delta);
#else
  return cuda_on_host::shuffle_down(value, delta);
#endif
}
// The value of lane `lane`.
template <typename T>
__device__ inline T shuffle(T value, unsigned lane) {
#if defined(__CUDACC__)
  return __shfl_sync(kAllLanes, value, lane);
#else
  return cuda_on_host::shuffle(value, lane);
#endif
}

// Barriers: of the warp, of the block. Each orders its threads' accesses to memory.
__device__ inline void sync_warp() {
#if defined(__CUDACC__)
  __syncwarp();
#else
  cuda_on_host::sync_warp();
#endif
}
__device__ inline void sync_block() {
#if defined(__CUDACC__)
  __syncthreads();
#else
  cuda_on_host::sync_block();
#endif
}

// Atomic addition; its result is the value before. Integers only: the order of a floating-point sum
// would be another in each run.
__device__ inline unsigned atomic_add(unsigned* address, unsigned value) {
#if defined(__CUDACC__)
  return atomicAdd(address, value);
#else
  return cuda_on_host::atomic_add(address, value);
#endif
}

// Orders the thread's writes to global memory before its later ones, for every thread of the
// device.
__device__ inline void fence_device() {
#if defined(__CUDACC__)
  __threadfence();
#else
  cuda_on_host::fence_device();
#endif
}

}  // namespace resnet_fast
