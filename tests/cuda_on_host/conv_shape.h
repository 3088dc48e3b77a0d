// A convolution's sizes from a case.
#pragma once

#include "driver.h"

#include "../../csrc/math/conv_shape.h"

namespace cuda_on_host {

inline resnet_fast::ConvShape read_conv_shape(const Case& c) {
  const auto at = [&](const char* name) { return static_cast<int>(c.integer(name)); };
  resnet_fast::ConvShape s{};
  s.batch = at("batch"), s.height = at("height"), s.width = at("width");
  s.channels = at("channels"), s.filters = at("filters");
  s.out_height = at("out_height"), s.out_width = at("out_width");
  s.kernel_h = at("kernel_h"), s.kernel_w = at("kernel_w");
  s.stride_h = at("stride_h"), s.stride_w = at("stride_w");
  s.pad_h = at("pad_h"), s.pad_w = at("pad_w");
  s.dilation_h = at("dilation_h"), s.dilation_w = at("dilation_w");
  s.groups = at("groups"), s.group_channels = s.channels / s.groups;
  return s;
}

}  // namespace cuda_on_host
