// What the drivers of elementwise kernels choose by: dtype, width of an access, width of an index.
#pragma once

#include "driver.h"

#include "../../csrc/cuda/grid.h"

namespace cuda_on_host {

template <typename T, int LANES, typename INDEX>
struct Access {
  using Type = T;
  using Index = INDEX;
  static constexpr int kLanes = LANES;
};

template <typename T, typename F>
void with_access(const Case& it, const F& f) {
  const bool wide = it.integer("index") == 64;
  if (it.word("access") == "vector")
    wide ? f(Access<T, resnet_fast::kLanes<T>, uint64_t>{})
         : f(Access<T, resnet_fast::kLanes<T>, uint32_t>{});
  else
    wide ? f(Access<T, 1, uint64_t>{}) : f(Access<T, 1, uint32_t>{});
}

// Calls f(Access<..>) for the case's dtype, access and index.
template <typename F>
void with_element(const Case& it, const F& f) {
  const std::string dtype = it.word("dtype");
  if (dtype == "float32")
    with_access<float>(it, f);
  else if (dtype == "float16")
    with_access<resnet_fast::fp16>(it, f);
  else if (dtype == "bfloat16")
    with_access<resnet_fast::bf16>(it, f);
  else if (dtype == "float64")
    with_access<double>(it, f);
  else
    fail("case", "dtype %s", dtype.c_str());
}

}  // namespace cuda_on_host
