// conv_stats on CUDA: guards, allocation, launch, registration.
#include "conv_stats_launch.h"

#include "conv_launch.cuh"
#include "current_stream.cuh"

namespace resnet_fast {
namespace {

// Deterministic always, as bn_act_train is.
std::tuple<Tensor, Tensor, Tensor> conv_stats_cuda(
    const Tensor& x, const Tensor& weight, OptTensor mean, OptTensor rstd, OptTensor bn_weight,
    OptTensor bn_bias, std::string act, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, int64_t groups, double eps, std::string tile) {
  check_cuda("x", x);
  check_input("weight", weight);
  STD_TORCH_CHECK(same_device(weight, x) && weight.scalar_type() == x.scalar_type(),
                  "weight: expected the device and the dtype of x");
  const ConvShape shape = conv_shape(x, weight, stride, padding, dilation, groups);
  const int64_t pixels = int64_t{shape.batch} * shape.out_height * shape.out_width;
  STD_TORCH_CHECK(pixels > 1, "x: expected more than one output per channel");
  STD_TORCH_CHECK(mean.has_value() == rstd.has_value(), "rstd: expected beside mean, or neither");
  const bool normalises = mean.has_value();
  STD_TORCH_CHECK(normalises || (!bn_weight && !bn_bias),
                  "mean: expected beside bn_weight and bn_bias");
  for (OptTensor* vector : {&mean, &rstd, &bn_weight, &bn_bias}) {
    if (!*vector) continue;
    check_channel_vector("mean, rstd, bn_weight, bn_bias", **vector, x, shape.channels);
    *vector = as_format(**vector, MemoryFormat::Contiguous);
    // The kernel reads 16 bytes of them at a time.
    STD_TORCH_CHECK(aligned(data_of<float>(*vector)),
                    "mean, rstd, bn_weight, bn_bias: expected storage aligned to 16 bytes");
  }
  const Act code = parse_act(act);
  const DeviceGuard guard(x.get_device_index());
  const MemoryFormat format = output_format(x);
  const Tensor z = empty({shape.batch, shape.filters, shape.out_height, shape.out_width},
                         x.scalar_type(), x, MemoryFormat::ChannelsLast);
  const Tensor mean_z = empty({shape.filters}, ScalarType::Float, x);
  const Tensor rstd_z = empty({shape.filters}, ScalarType::Float, x);
  const Tensor dense_x = as_format(x, MemoryFormat::ChannelsLast);
  const Tensor dense_weight = as_format(weight, MemoryFormat::ChannelsLast);
  const ConvPrologue prologue{data_of<float>(mean), data_of<float>(rstd), data_of<float>(bn_weight),
                              data_of<float>(bn_bias), code};
  CurrentStream device(x);
  dispatch_product_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int bytes = static_cast<int>(sizeof(T));
    const T* const x_data = data_of<T>(dense_x);
    const T* const weight_data = data_of<T>(dense_weight);
    T* const z_data = mutable_data_of<T>(z);
    const int copy = copy_bytes(bytes, shape, x_data, weight_data);
    const int index = tile.empty() ? choose_stats_tile(bytes, shape, copy) : find_conv_tile(tile);
    STD_TORCH_CHECK(index >= 0, "tile: unknown tile '", tile, "'");
    const StatsOutputs<T> out{z_data, mutable_data_of<float>(mean_z),
                              mutable_data_of<float>(rstd_z),
                              aligned(z_data) && shape.filters / shape.groups % kLanes<T> == 0};
    const bool known = normalises ? run_conv_stats<T, true>(device, shape, x_data, weight_data,
                                                            prologue, out, index, copy, eps)
                                  : run_conv_stats<T, false>(device, shape, x_data, weight_data,
                                                             prologue, out, index, copy, eps);
    STD_TORCH_CHECK(known, "tile: ", std::string(kConvTiles[index].name),
                    " has no kernel for these channels");
  });
  return {as_format(z, format), mean_z, rstd_z};
}

}  // namespace
}  // namespace resnet_fast

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) {
  m.impl("_conv_stats_cuda", TORCH_BOX(&resnet_fast::conv_stats_cuda));
}
