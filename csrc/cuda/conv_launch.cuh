// What the launchers of convolutions share: sizes from tensors, the width of copies, dtypes.
#pragma once

#include "../math/conv_geometry.h"
#include "conv_choice.h"
#include "launch.cuh"

namespace resnet_fast {

inline int as_int(const char* name, int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= INT32_MAX, name, ": expected sizes below 2^31");
  return static_cast<int>(value);
}

inline ConvShape conv_shape(const Tensor& x, const Tensor& weight,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4,
                  "x: expected two spatial dimensions, and as many in weight");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride: expected two integers, in padding and dilation as well");
  for (int axis = 0; axis < 2; ++axis) {
    STD_TORCH_CHECK(stride[axis] > 0 && padding[axis] >= 0 && dilation[axis] > 0,
                    "stride: expected positive integers, in padding no negative ones");
    STD_TORCH_CHECK(weight.size(2 + axis) >= 1 && weight.size(2 + axis) <= 32,
                    "weight: expected a filter of at most 32 rows and columns");
  }
  STD_TORCH_CHECK(groups > 0 && weight.size(1) > 0 && weight.size(1) * groups == x.size(1) &&
                      weight.size(0) % groups == 0,
                  "weight: expected channels and filters that fit x and groups");
  ConvShape s{};
  s.batch = as_int("x", x.size(0));
  s.channels = as_int("x", x.size(1));
  s.height = as_int("x", x.size(2));
  s.width = as_int("x", x.size(3));
  s.filters = as_int("weight", weight.size(0));
  s.group_channels = as_int("weight", weight.size(1));
  s.kernel_h = as_int("weight", weight.size(2));
  s.kernel_w = as_int("weight", weight.size(3));
  s.stride_h = as_int("stride", stride[0]);
  s.stride_w = as_int("stride", stride[1]);
  s.pad_h = as_int("padding", padding[0]);
  s.pad_w = as_int("padding", padding[1]);
  s.dilation_h = as_int("dilation", dilation[0]);
  s.dilation_w = as_int("dilation", dilation[1]);
  s.groups = as_int("groups", groups);
  s.out_height =
      as_int("x", conv_output_size(x.size(2), weight.size(2), stride[0], padding[0], dilation[0]));
  s.out_width =
      as_int("x", conv_output_size(x.size(3), weight.size(3), stride[1], padding[1], dilation[1]));
  STD_TORCH_CHECK(s.out_height > 0 && s.out_width > 0,
                  "weight: expected a filter within the padded input");
  // Positions along an axis and k stay within int; offsets are 64 bits wide.
  as_int("padding", x.size(2) + 2 * padding[0] + stride[0]);
  as_int("padding", x.size(3) + 2 * padding[1] + stride[1]);
  as_int("x", x.size(2) * x.size(3));
  as_int("x", int64_t{s.out_height} * s.out_width);
  as_int("weight", weight.size(1) * weight.size(2) * weight.size(3) + 128);
  return s;
}

// Bytes of a copy along k: a view that starts inside a storage takes narrower ones.
inline int copy_bytes(int element_bytes, const ConvShape& shape, const void* x,
                      const void* weight) {
  const auto whole = [&](uintptr_t bytes) {
    return (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(weight)) % bytes == 0;
  };
  const int widest = conv_copy_bytes(element_bytes, shape);
  for (int bytes : {16, 4})
    if (bytes <= widest && whole(bytes)) return bytes;
  return 0;
}

// The dtypes that multiply on tensor cores; fp32 does as TF32.
template <typename F>
void dispatch_product_dtype(ScalarType dtype, const F& f) {
  STD_TORCH_CHECK(dtype != ScalarType::Double,
                  "x: expected float16, bfloat16 or float32, whose products run as TF32");
  if (dtype == ScalarType::Half) {
    f(TypeTag<fp16>{});
  } else if (dtype == ScalarType::BFloat16) {
    f(TypeTag<bf16>{});
  } else {
    f(TypeTag<float>{});
  }
}

}  // namespace resnet_fast
