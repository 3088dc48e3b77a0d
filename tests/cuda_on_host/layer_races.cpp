// Accesses, barriers, fences and atomics by a script, for the tests of the search for races.
//
// int32 tensor steps [launches][blocks][64 threads][count] of 16 kind + byte, kinds as below;
// ints: launches, blocks, count.
#include "driver.h"

#include "../../csrc/cuda/ptx.cuh"

namespace {

using namespace resnet_fast;

constexpr unsigned kThreads = 64;
constexpr int kBytes = 16;
enum Kind {
  nothing,
  read_shared,
  write_shared,
  read_global,
  write_global,
  warp,
  block,
  fence,
  add
};

__global__ void perform(const int32_t* steps, int count, unsigned char* global, unsigned* counters,
                        unsigned char* sink) {
  const int32_t* mine = steps + (blockIdx.x * kThreads + threadIdx.x) * count;
  for (int i = 0; i < count; ++i) {
    const int at = mine[i] % kBytes;
    switch (mine[i] / kBytes) {
      case read_shared:
        sink[threadIdx.x] = shared_memory()[at];
        break;
      case write_shared:
        shared_memory()[at] = 1;
        break;
      case read_global:
        sink[threadIdx.x] = global[at];
        break;
      case write_global:
        global[at] = 1;
        break;
      case warp:
        sync_warp();
        break;
      case block:
        sync_block();
        break;
      case fence:
        fence_device();
        break;
      case add:
        atomic_add(counters + at, 1);
        break;
    }
  }
}

}  // namespace

int main() {
  cuda_on_host::Case it;
  const auto launches = it.integer("launches"), blocks = it.integer("blocks");
  const auto count = static_cast<int>(it.integer("count"));
  const int32_t* steps = it.input<int32_t>("steps");
  unsigned char* global = it.scratch<unsigned char>("global", kBytes);
  unsigned* counters = it.scratch<unsigned>("counters", kBytes);
  unsigned char sink[kThreads];
  for (int64_t launch = 0; launch < launches; ++launch)
    cuda_on_host::launch(static_cast<unsigned>(blocks), kThreads, kBytes, perform,
                         steps + launch * blocks * kThreads * count, count, global, counters,
                         static_cast<unsigned char*>(sink));
  return it.finish();
}
