// CUDA's words for the host, and how an error of a kernel is told.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr uint64_t count() const { return uint64_t{x} * y * z; }
  unsigned x, y, z;
};

// Set at each switch to another thread.
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_on_host {

inline constexpr int kExitCode = 4;
inline constexpr unsigned kLanes = 32;

// Whether a kernel is running: an error then names its thread.
inline bool in_kernel = false;

[[noreturn, gnu::format(printf, 2, 3)]] inline void fail(const char* kind, const char* format,
                                                         ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "cuda_on_host: %s: ", kind);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (in_kernel)
    std::fprintf(stderr, " [block (%u, %u, %u), thread (%u, %u, %u)]", blockIdx.x, blockIdx.y,
                 blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  std::fprintf(stderr, "\n");
  std::_Exit(kExitCode);
}

}  // namespace cuda_on_host
