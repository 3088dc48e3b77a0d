// Launches and workspaces of a launcher: the Device of the *_launch.h headers.
#pragma once

#include "launch.cuh"

namespace resnet_fast {

// Launches on the tensor's current stream. Workspaces come from torch's allocator, whose memory
// belongs to that stream: nothing waits for the kernels, and a capture records all there is.
class CurrentStream {
 public:
  explicit CurrentStream(const Tensor& x)
      : like_(x), stream_(static_cast<cudaStream_t>(current_cuda_stream(x))) {}

  template <auto KERNEL>
  int64_t resident() const {
    return resident_blocks<KERNEL>(like_);
  }
  // Keeps the type of `shared_bytes`: the build reads constants from allow_shared_memory.
  template <auto KERNEL, typename Bytes, typename... Args>
  void launch(dim3 grid, dim3 block, Bytes shared_bytes, Args... args) const {
    allow_shared_memory<KERNEL>(like_.get_device_index(), shared_bytes);
    KERNEL<<<grid, block, shared_bytes, stream_>>>(args...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  void* workspace(int64_t bytes) {
    held_.push_back(empty({bytes}, ScalarType::Byte, like_));
    return held_.back().mutable_data_ptr();
  }

 private:
  const Tensor& like_;
  cudaStream_t stream_;
  std::vector<Tensor> held_;
};

}  // namespace resnet_fast
