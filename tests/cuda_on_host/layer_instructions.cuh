// One instruction of ptx.cuh a kernel, of which the tests know the results: a warp with its
// operands in `in`, a row for each lane, and its results in `out`, which begins as zeros.
#pragma once

#include <bit>
#include <string>

#include "../../csrc/cuda/ptx.cuh"

namespace resnet_fast {
// in: the address of a row, in bytes. `data` fills the shared memory.
__global__ void load(const uint32_t* in, const uint32_t* data, uint32_t words, uint32_t* out) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  for (unsigned i = threadIdx.x; i < words; i += kWarp) shared[i] = data[i];
  sync_warp();
  uint32_t to[4];
  load_matrices(to, shared_address(shared_memory()) + in[threadIdx.x]);
  for (unsigned i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = to[i];
}

// in: a[4], b[2], sum[4].
template <typename T>
__global__ void multiply(const uint32_t* in, uint32_t* out) {
  const uint32_t* mine = in + threadIdx.x * 10;
  const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]};
  float sum[4];
  for (unsigned i = 0; i < 4; ++i) sum[i] = std::bit_cast<float>(mine[6 + i]);
  multiply_add<T>(sum, a, mine[4], mine[5]);
  for (unsigned i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = std::bit_cast<uint32_t>(sum[i]);
}

__global__ void round(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = round_to_tf32(in[threadIdx.x]);
}

__global__ void narrow(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = round_to_bf16(std::bit_cast<float>(in[threadIdx.x]));
}

// in: a value and, for shuffle(), a lane. out: xor 5, down 3, down 40, the lane's, and the two
// halves of a double from lane ^ 16.
__global__ void exchange(const uint32_t* in, uint32_t* out) {
  const uint32_t value = in[threadIdx.x * 2], lane = in[threadIdx.x * 2 + 1];
  uint32_t* to = out + threadIdx.x * 6;
  to[0] = shuffle_xor(value, 5);
  to[1] = std::bit_cast<uint32_t>(shuffle_down(std::bit_cast<float>(value), 3));
  to[2] = shuffle_down(value, 40);
  to[3] = static_cast<uint32_t>(shuffle(static_cast<int>(value), lane));
  const double both = std::bit_cast<double>(uint64_t{value} << 32 | threadIdx.x);
  const auto other = std::bit_cast<uint64_t>(shuffle_xor(both, 16));
  to[4] = static_cast<uint32_t>(other >> 32);
  to[5] = static_cast<uint32_t>(other);
}

// Two groups, of words 0 .. 6 (16, 8 and 4 bytes) and of words 8 .. 14, each the thread's own; the
// second without its 8 bytes. out: the 16 words after a wait for the first group, after one for
// both, and what an uncommitted copy of word 0 to word 7 has brought.
__global__ void copy(const uint32_t* in, uint32_t* out) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory()) + threadIdx.x * 16;
  const uint32_t* from = in + threadIdx.x * 16;
  uint32_t* to = out + threadIdx.x * 33;
  const SharedAddress base = shared_address(shared);
  for (unsigned i = 0; i < 16; ++i) shared[i] = 7;
  for (unsigned group = 0; group < 2; ++group) {
    copy_async<16>(base + group * 32, from + group * 8, true);
    copy_async<8>(base + group * 32 + 16, group ? nullptr : from + 4, group == 0);
    copy_async<4>(base + group * 32 + 24, from + group * 8 + 6, true);
    commit_copies();
  }
  copy_async<4>(base + 28, from, true);
  wait_copies<1>();
  for (unsigned i = 0; i < 16; ++i) to[i] = shared[i];
  wait_copies<0>();
  for (unsigned i = 0; i < 16; ++i) to[16 + i] = shared[i];
  commit_copies();
  wait_copies<0>();
  to[32] = shared[7];
}

// in: two numbers a lane; out: their maximum.
__global__ void larger(const uint32_t* in, uint32_t* out) {
  const uint32_t* pair = in + 2 * threadIdx.x;
  out[threadIdx.x] =
      detail::as_bits(max_or_nan(detail::as_float(pair[0]), detail::as_float(pair[1])));
}

// Of each of two blocks, out: the 32-bit address of the shared memory, its pointer's, the last word
// before the block has written it.
__global__ void look(uint32_t words, uint32_t* out) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* to = out + blockIdx.x * 3;
  to[0] = shared_address(shared);
  to[1] = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(shared));
  to[2] = shared[words - 1];
  shared[words - 1] = 0;
}

// Every thread of the grid adds its own number; out: the sum, then what each has met.
__global__ void add(uint32_t* out) {
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  out[1 + thread] = atomic_add(out, thread);
}

// out: the threads' numbers by their indices, in the order in which they came, twice each.
__global__ void visit(uint32_t* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  for (unsigned i = 0; i < 2; ++i)
    out[1 + atomic_add(out, 1)] = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
}

// The sum over 64 threads of what each gives its neighbour, through global memory.
__global__ void synchronise(const uint32_t* in, uint32_t* out) {
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  shared[threadIdx.x] = in[threadIdx.x];
  sync_block();
  out[1 + threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
  fence_device();
  sync_block();
  if (threadIdx.x != 0) return;
  out[0] = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) out[0] += out[1 + i];
}

// Calls launch(grid, block, shared bytes, kernel, arguments...) for the kernel of that name; `data`
// of `bytes` bytes is load's. False if there is none.
template <typename Launch>
bool select(const std::string& kernel, const Launch& launch, const uint32_t* in,
            const uint32_t* data, uint32_t bytes, uint32_t* out) {
  if (kernel == "load")
    launch(1, kWarp, bytes, load, in, data, bytes / 4, out);
  else if (kernel == "fp16")
    launch(1, kWarp, 0, multiply<fp16>, in, out);
  else if (kernel == "bf16")
    launch(1, kWarp, 0, multiply<bf16>, in, out);
  else if (kernel == "tf32")
    launch(1, kWarp, 0, multiply<float>, in, out);
  else if (kernel == "round")
    launch(1, kWarp, 0, round, in, out);
  else if (kernel == "narrow")
    launch(1, kWarp, 0, narrow, in, out);
  else if (kernel == "larger")
    launch(1, kWarp, 0, larger, in, out);
  else if (kernel == "exchange")
    launch(1, kWarp, 0, exchange, in, out);
  else if (kernel == "copy")
    launch(1, kWarp, kWarp * 64, copy, in, out);
  else if (kernel == "look")
    launch(2, 1, 1004, look, 251, out);
  else if (kernel == "add")
    launch(3, 70, 0, add, out);
  else if (kernel == "visit")
    launch(dim3(2, 3, 2), dim3(5, 3, 4), 0, visit, out);
  else if (kernel == "synchronise")
    launch(1, 64, 64 * 4, synchronise, in, out);
  else
    return false;
  return true;
}

}  // namespace resnet_fast
