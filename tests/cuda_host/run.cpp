// Runs one CUDA kernel's device code on the host: inputs from stdin, the output to stdout.
//
//   run KERNEL DTYPE vector|scalar 32|64 ACT NUMEL CHANNELS PLANE RESIDENT RESIDUAL SCALE SHIFT
//
// The inputs are buffers of exactly their size, so AddressSanitizer sees any read outside; the
// output starts as NaN between two guards.
#include "shim.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/add_act.cuh"
#include "../../csrc/cuda/bn_act.cuh"
#include "../../csrc/cuda/grid.h"

namespace {

using namespace resnet_fast;

constexpr size_t kGuard = 64;

struct Arguments {
  std::string kernel;
  Act act;
  int64_t numel, channels, plane, resident;
  bool residual, scale, shift;
};

struct Free {
  void operator()(void* data) const { std::free(data); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> input(bool present, int64_t count) {
  if (!present) return {};
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  // aligned_alloc may round its size up and hide an overrun; malloc is 16-byte aligned.
  Buffer<T> data(static_cast<T*>(std::malloc(bytes)));
  if (std::fread(data.get(), 1, bytes, stdin) != bytes) std::exit(2);
  return data;
}

template <typename T, int LANES, typename Index>
int run(const Arguments& a) {
  using C = Accumulator<T>;
  const bool backward = a.kernel == "add_act_backward";
  const Buffer<T> grad_y_buffer = input<T>(backward, a.numel);
  const T* grad_y = grad_y_buffer.get();
  const Buffer<T> x_buffer = input<T>(true, a.numel);
  const T* x = x_buffer.get();
  const Buffer<T> residual_buffer = input<T>(a.residual, a.numel);
  const T* residual = residual_buffer.get();
  const Buffer<C> scale_buffer = input<C>(a.scale, a.channels);
  const C* scale = scale_buffer.get();
  const Buffer<C> shift_buffer = input<C>(a.shift, a.channels);
  const C* shift = shift_buffer.get();
  const size_t bytes = static_cast<size_t>(a.numel) * sizeof(T);
  const Buffer<unsigned char> raw(static_cast<unsigned char*>(std::malloc(bytes + 2 * kGuard)));
  std::memset(raw.get(), 0xff, bytes + 2 * kGuard);
  T* y = reinterpret_cast<T*>(raw.get() + kGuard);

  const int64_t vectors = a.numel / LANES;
  const auto numel = static_cast<Index>(a.numel);
  const auto channels = static_cast<Index>(a.channels);
  const auto plane = static_cast<Index>(a.plane);
  if (backward) {
    launch(grid_for(vectors, a.resident), kThreads, add_act_backward_kernel<T, LANES, Index>,
           grad_y, x, residual, y, numel, a.act);
  } else if (a.kernel == "add_act") {
    launch(grid_for(vectors, a.resident), kThreads, add_act_kernel<T, LANES, Index>, x, residual, y,
           numel, a.act);
  } else if (a.kernel == "bn_act_channels_last") {
    const auto kernel = a.residual ? bn_act_channels_last_kernel<T, LANES, true, Index>
                                   : bn_act_channels_last_kernel<T, LANES, false, Index>;
    launch(grid_for(vectors, a.resident, channel_period(a.channels, LANES)), kThreads, kernel, x,
           residual, scale, shift, y, numel, channels, a.channels % LANES == 0, a.act);
  } else if (a.kernel == "bn_act_planes") {
    const auto kernel = a.residual ? bn_act_planes_kernel<T, LANES, true, Index>
                                   : bn_act_planes_kernel<T, LANES, false, Index>;
    const int64_t grid = grid_for(vectors, a.resident);
    launch(grid, kThreads, kernel, x, residual, scale, shift, y, numel, channels, plane,
           plane_step<Index>(grid * kThreads * LANES, a.plane, a.channels), a.act);
  } else {
    return 2;
  }

  for (size_t i = 0; i < kGuard; ++i)
    if (raw[i] != 0xff || raw[kGuard + bytes + i] != 0xff) return 3;
  return std::fwrite(y, 1, bytes, stdout) == bytes ? 0 : 2;
}

template <typename T>
int run(const Arguments& a, bool vector, bool wide) {
  if (vector) return wide ? run<T, kLanes<T>, uint64_t>(a) : run<T, kLanes<T>, uint32_t>(a);
  return wide ? run<T, 1, uint64_t>(a) : run<T, 1, uint32_t>(a);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 13) return 2;
  const Arguments a{argv[1],
                    static_cast<Act>(std::atoi(argv[5])),
                    std::atoll(argv[6]),
                    std::atoll(argv[7]),
                    std::atoll(argv[8]),
                    std::atoll(argv[9]),
                    argv[10][0] == '1',
                    argv[11][0] == '1',
                    argv[12][0] == '1'};
  const std::string dtype = argv[2];
  const bool vector = std::string(argv[3]) == "vector", wide = std::string(argv[4]) == "64";
  if (dtype == "float32") return run<float>(a, vector, wide);
  if (dtype == "float16") return run<fp16>(a, vector, wide);
  if (dtype == "bfloat16") return run<bf16>(a, vector, wide);
  if (dtype == "float64") return run<double>(a, vector, wide);
  return 2;
}
