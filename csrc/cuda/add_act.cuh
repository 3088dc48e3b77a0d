// Device code of add_act and its backward.
#pragma once

#include "vector.cuh"

namespace resnet_fast {

//   y[i] = act(x[i] + residual[i])
//
// The three tensors share one dense layout, so the kernel sees a line of numel elements, cut into
// vectors of LANES = 16 bytes. A thread owns vectors t, t + S, t + 2S, ... of the S threads
// launched (fp16, 8 lanes):
//
//   element   0        8        16                  8S       8S+8              numel
//             |thread 0|thread 1|...|thread S-1     |thread 0|thread 1|... |tail|
//
// The tail of fewer than LANES elements goes one to a thread. A warp's loads are 32 adjacent
// 16-byte accesses: 512 bytes in one instruction, the widest there is, so that few instructions
// keep enough bytes in flight for a kernel that only moves memory. Sum and activation are fp32
// (fp64 for fp64) and rounded once at the store.
template <typename T, int LANES, typename Index>
__global__ void __launch_bounds__(kThreads)
    add_act_kernel(const T* __restrict__ x, const T* __restrict__ residual, T* __restrict__ y,
                   Index numel, Act act) {
  const Index vectors = numel / LANES;
  const Index first = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index step = static_cast<Index>(gridDim.x) * blockDim.x;
  for (Index vector = first; vector < vectors; vector += step) {
    const auto a = load_vector<LANES>(x + vector * LANES);
    const auto b = load_vector<LANES>(residual + vector * LANES);
    Accumulator<T> sum[LANES];
#pragma unroll
    for (int j = 0; j < LANES; ++j) sum[j] = to_accumulator(a.lane[j]) + to_accumulator(b.lane[j]);
    activate_lanes(act, sum);
    Vector<T, LANES> out;
#pragma unroll
    for (int j = 0; j < LANES; ++j) out.lane[j] = to_storage<T>(sum[j]);
    store_vector(y + vector * LANES, out);
  }
  const Index done = vectors * LANES;
  if (first < numel - done) {
    const Index i = done + first;
    Accumulator<T> sum[1] = {to_accumulator(x[i]) + to_accumulator(residual[i])};
    activate_lanes(act, sum);
    y[i] = to_storage<T>(sum[0]);
  }
}

//   grad[i] = grad_y[i] * act'(x[i] + residual[i])
//
// One gradient serves x and residual. Ownership and access width as in add_act_kernel; the sum is
// recomputed, which costs one read less than saving it would cost a write and a read.
template <typename T, int LANES, typename Index>
__global__ void __launch_bounds__(kThreads)
    add_act_backward_kernel(const T* __restrict__ grad_y, const T* __restrict__ x,
                            const T* __restrict__ residual, T* __restrict__ grad, Index numel,
                            Act act) {
  const Index vectors = numel / LANES;
  const Index first = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index step = static_cast<Index>(gridDim.x) * blockDim.x;
  for (Index vector = first; vector < vectors; vector += step) {
    const auto g = load_vector<LANES>(grad_y + vector * LANES);
    const auto a = load_vector<LANES>(x + vector * LANES);
    const auto b = load_vector<LANES>(residual + vector * LANES);
    Accumulator<T> slope[LANES];
#pragma unroll
    for (int j = 0; j < LANES; ++j)
      slope[j] = to_accumulator(a.lane[j]) + to_accumulator(b.lane[j]);
    differentiate_lanes(act, slope);
    Vector<T, LANES> out;
#pragma unroll
    for (int j = 0; j < LANES; ++j)
      out.lane[j] = to_storage<T>(chain(to_accumulator(g.lane[j]), slope[j]));
    store_vector(grad + vector * LANES, out);
  }
  const Index done = vectors * LANES;
  if (first < numel - done) {
    const Index i = done + first;
    Accumulator<T> slope[1] = {to_accumulator(x[i]) + to_accumulator(residual[i])};
    differentiate_lanes(act, slope);
    grad[i] = to_storage<T>(chain(to_accumulator(grad_y[i]), slope[0]));
  }
}

}  // namespace resnet_fast
