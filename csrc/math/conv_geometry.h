// Output sizes of a convolution, in int64.
#pragma once

#include <cstdint>

namespace resnet_fast {

// Number of output positions along one axis; zero or less when the kernel does not fit.
// stride is positive, so truncation towards zero is guarded by the sign test.
constexpr int64_t conv_output_size(int64_t input, int64_t kernel, int64_t stride, int64_t padding,
                                   int64_t dilation) {
  const int64_t span = input + 2 * padding - dilation * (kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

}  // namespace resnet_fast
