// What every launcher needs: device figures, pointer alignment, index width.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "../stable.h"
#include "grid.h"

namespace resnet_fast {

// Blocks that fill the tensor's device once with KERNEL. Host queries only: they neither
// synchronise nor disturb a stream capture. The occupancy is asked once a kernel, for the device
// of the first call: on a mixed machine it may cost others a partial wave, never correctness.
template <auto KERNEL>
int64_t resident_blocks(const Tensor& t) {
  static const int per_multiprocessor = [] {
    int blocks = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, KERNEL, kThreads, 0));
    return blocks;
  }();
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                        t.get_device_index()));
  return int64_t{multiprocessors} * per_multiprocessor;
}

// Grants KERNEL that much dynamic shared memory, once a device; 48 KB need no grant. A number that
// is a std::integral_constant shows in the symbol, from which the build reads what the launches
// take (kernels/cuda_resources.py).
template <auto KERNEL, typename Bytes>
[[gnu::used]] void allow_shared_memory(int device, Bytes bytes) {
  static std::atomic<uint64_t> granted{0};
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (bytes <= 48 * 1024 || (granted.load(std::memory_order_relaxed) & bit) != 0) return;
  STD_CUDA_CHECK(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)));
  granted.fetch_or(bit, std::memory_order_relaxed);
}

inline dim3 grid_dim(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "tensor too large for one launch");
  return dim3(static_cast<unsigned>(blocks));
}

template <typename T>
struct IndexTag {
  using type = T;
};
template <int N>
struct LanesTag {
  static constexpr int value = N;
};

// Calls f(LanesTag<..>, IndexTag<..>): 16-byte accesses where the pointers allow, 32-bit indices
// while numel stays below 2^31.
template <typename T, typename F>
void dispatch_access(bool vector, int64_t numel, const F& f) {
  const auto with_lanes = [&](auto lanes) {
    if (fits_32_bits(numel)) {
      f(lanes, IndexTag<uint32_t>{});
    } else {
      f(lanes, IndexTag<uint64_t>{});
    }
  };
  if (vector) {
    with_lanes(LanesTag<kLanes<T>>{});
  } else {
    with_lanes(LanesTag<1>{});
  }
}

inline void check_cuda(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor");
  check_input(name, t);
}

}  // namespace resnet_fast
