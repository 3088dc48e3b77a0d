// The sizes of a two-dimensional convolution, as its device code takes them.
#pragma once

namespace resnet_fast {

// x is [batch, height, width, channels], the weight [filters, kernel_h, kernel_w, group_channels],
// y [batch, out_height, out_width, filters].
struct ConvShape {
  int batch, height, width, channels;
  int out_height, out_width, filters;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int groups, group_channels;
};

}  // namespace resnet_fast
