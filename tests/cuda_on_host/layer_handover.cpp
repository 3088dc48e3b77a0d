// The last of a grid's blocks adds what all have left in global memory, with a choice of bugs.
#include <string_view>

#include "driver.h"

#include "../../csrc/cuda/ptx.cuh"

namespace {

using namespace resnet_fast;

constexpr unsigned kThreads = 64;

// y[t] = sum over b of x[b][t]
__global__ void total(const float* x, float* partial, unsigned* ticket, float* y, const char* bug) {
  const auto is = [&](const char* name) { return std::string_view(bug) == name; };
  const unsigned at = blockIdx.x * kThreads + threadIdx.x;
  partial[is("two_blocks_in_one_place") ? threadIdx.x : at] = x[at];
  if (!is("no_fence_before")) fence_device();
  if (!is("no_barrier_before")) sync_block();
  auto* last = reinterpret_cast<bool*>(shared_memory());
  if (threadIdx.x == 0) *last = atomic_add(ticket, 1) == gridDim.x - 1;
  if (!is("no_barrier_after")) sync_block();
  if (!*last) return;
  if (!is("no_fence_after")) fence_device();
  float sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block)
    sum += partial[block * kThreads + threadIdx.x];
  y[threadIdx.x] = sum;
}

}  // namespace

int main() {
  cuda_on_host::Case it;
  const auto blocks = static_cast<unsigned>(it.integer("blocks"));
  const std::string bug = it.word("bug");
  float* partial = it.scratch<float>("partial", int64_t{blocks} * kThreads);
  unsigned* ticket = it.scratch<unsigned>("ticket", 1);
  *ticket = 0;
  cuda_on_host::launch(blocks, kThreads, 16, total, it.input<float>("x"), partial, ticket,
                       it.output<float>("y", kThreads), bug.c_str());
  return it.finish();
}
