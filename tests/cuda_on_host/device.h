// What csrc/cuda/*_launch.h call a Device: launches run at once; every workspace is guarded, and
// NaN before the kernels fill it.
#pragma once

#include "driver.h"

namespace cuda_on_host {

struct Device {
  Case& it;

  template <auto KERNEL>
  int64_t resident() const {
    return it.integer("resident");
  }
  template <auto KERNEL, typename... Args>
  void launch(dim3 grid, dim3 block, size_t shared_bytes, Args... args) const {
    cuda_on_host::launch(grid, block, shared_bytes, KERNEL, args...);
  }
  void* workspace(int64_t bytes) { return it.scratch<unsigned char>("workspace", bytes); }
};

}  // namespace cuda_on_host
