// Runs a kernel of layer_instructions.cuh on a device, which has to agree with the host:
//
//   program KERNEL WORDS BYTES    `data` of BYTES bytes, then `in`, from stdin; `out` to stdout
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "layer_instructions.cuh"

namespace {

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

uint32_t* on_device(const std::vector<unsigned char>& bytes) {
  void* data = nullptr;
  check(cudaMalloc(&data, bytes.size() + 1));
  check(cudaMemcpy(data, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  return static_cast<uint32_t*>(data);
}

struct Launch {
  template <typename... Parameters, typename... Arguments>
  void operator()(dim3 grid, dim3 block, size_t shared, void (*kernel)(Parameters...),
                  Arguments... arguments) const {
    kernel<<<grid, block, shared>>>(arguments...);
    check(cudaGetLastError());
    check(cudaDeviceSynchronize());
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const size_t words = std::strtoull(argv[2], nullptr, 10);
  std::vector<unsigned char> data(std::strtoull(argv[3], nullptr, 10)), in, out(words * 4, 0);
  if (std::fread(data.data(), 1, data.size(), stdin) != data.size()) return 2;
  for (int byte; (byte = std::getchar()) != EOF;) in.push_back(static_cast<unsigned char>(byte));
  uint32_t* results = on_device(out);
  if (!resnet_fast::select(argv[1], Launch{}, on_device(in), on_device(data),
                           static_cast<uint32_t>(data.size()), results))
    return 2;
  check(cudaMemcpy(out.data(), results, out.size(), cudaMemcpyDeviceToHost));
  return std::fwrite(out.data(), 1, out.size(), stdout) == out.size() ? 0 : 2;
}
