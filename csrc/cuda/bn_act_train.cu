// bn_act_train, its backward, and norm_act, its second half, on CUDA: guards, allocation, launch,
// registration.
#include "bn_act_train_launch.h"
#include "current_stream.cuh"

namespace resnet_fast {
namespace {

void check_arguments(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                     const OptTensor& residual) {
  check_cuda("x", x);
  STD_TORCH_CHECK(x.dim() >= 2, "x: expected at least 2 dimensions");
  STD_TORCH_CHECK(x.size(1) > 0 && x.numel() / x.size(1) > 1,
                  "x: expected more than one value a channel");
  STD_TORCH_CHECK(fits_32_bits(x.size(1)), "x: expected fewer than 2^31 channels");
  if (weight) check_channel_vector("weight", *weight, x, x.size(1));
  if (bias) check_channel_vector("bias", *bias, x, x.size(1));
  if (residual) check_matches("residual", *residual, x);
}

ChannelShape channel_shape(const Tensor& x, MemoryFormat format) {
  const int64_t plane = x.numel() / x.size(0) / x.size(1);
  // With one element a plane, channels are the fastest dimension of a contiguous tensor too.
  const bool channels_last = format != MemoryFormat::Contiguous || plane == 1;
  return {x.size(0), x.size(1), plane, channels_last};
}

// The tensors in one dense layout, which the kernels' pointers point into; no copy where a tensor
// is in it already.
struct Inputs {
  Tensor x;
  OptTensor residual, weight, bias;

  Inputs(const Tensor& x_, const OptTensor& weight_, const OptTensor& bias_,
         const OptTensor& residual_, MemoryFormat format)
      : x(as_format(x_, format)) {
    constexpr auto kVector = MemoryFormat::Contiguous;
    if (residual_) residual = as_format(*residual_, format);
    if (weight_) weight = as_format(*weight_, kVector);
    if (bias_) bias = as_format(*bias_, kVector);
  }

  template <typename T>
  Normalisation<T> pointers(const Tensor& mean, const Tensor& rstd, Act act) const {
    using C = Accumulator<T>;
    return {data_of<T>(x),
            data_of<T>(residual),
            data_of<C>(mean),
            data_of<C>(rstd),
            data_of<C>(weight),
            data_of<C>(bias),
            act};
  }
};

// Deterministic always, so torch.use_deterministic_algorithms has nothing to refuse: the order of
// every sum is that of the launch, which the shape and the device determine.
std::tuple<Tensor, Tensor, Tensor> bn_act_train_cuda(const Tensor& x, OptTensor weight,
                                                     OptTensor bias, OptTensor residual, double eps,
                                                     std::string act) {
  const Act code = parse_act(act);
  check_arguments(x, weight, bias, residual);
  const DeviceGuard guard(x.get_device_index());
  const MemoryFormat format = output_format(x);
  const Tensor y = empty_output(x);
  const Tensor mean = empty({x.size(1)}, stat_dtype(x.scalar_type()), x);
  const Tensor rstd = empty({x.size(1)}, stat_dtype(x.scalar_type()), x);
  const Inputs in(x, weight, bias, residual, format);
  const ChannelShape shape = channel_shape(x, format);
  CurrentStream device(x);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Accumulator<T>;
    const auto of = in.pointers<T>(mean, rstd, code);
    const ForwardOutputs<T> out{mutable_data_of<T>(y), mutable_data_of<C>(mean),
                                mutable_data_of<C>(rstd)};
    const bool vector = shape.fits_vectors(kLanes<T>) && aligned(of.x, of.residual, out.y);
    dispatch_access<T>(vector, shape.numel(), [&](auto lanes, auto index) {
      using Index = typename decltype(index)::type;
      run_bn_act_train<T, decltype(lanes)::value, Index>(device, shape, of, out, eps);
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_train_backward_cuda(
    const Tensor& grad_y, const Tensor& x, OptTensor weight, OptTensor bias, OptTensor residual,
    const Tensor& mean, const Tensor& rstd, std::string act) {
  const Act code = parse_act(act);
  check_arguments(x, weight, bias, residual);
  check_matches("grad_y", grad_y, x);
  check_channel_vector("mean", mean, x, x.size(1));
  check_channel_vector("rstd", rstd, x, x.size(1));
  const DeviceGuard guard(x.get_device_index());
  const MemoryFormat format = output_format(x);
  const Tensor grad_x = empty_output(x);
  const Tensor grad_z = residual ? empty_output(x) : empty({0}, x.scalar_type(), x);
  const Tensor grad_weight = empty({x.size(1)}, stat_dtype(x.scalar_type()), x);
  const Tensor grad_bias = empty({x.size(1)}, stat_dtype(x.scalar_type()), x);
  const Inputs in(x, weight, bias, residual, format);
  const Tensor dense_grad_y = as_format(grad_y, format);
  const Tensor dense_mean = as_format(mean, MemoryFormat::Contiguous);
  const Tensor dense_rstd = as_format(rstd, MemoryFormat::Contiguous);
  const ChannelShape shape = channel_shape(x, format);
  CurrentStream device(x);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Accumulator<T>;
    const auto of = in.pointers<T>(dense_mean, dense_rstd, code);
    const T* upstream = data_of<T>(dense_grad_y);
    const BackwardOutputs<T> out{mutable_data_of<T>(grad_x), mutable_data_of<C>(grad_weight),
                                 mutable_data_of<C>(grad_bias),
                                 residual ? mutable_data_of<T>(grad_z) : nullptr};
    const bool vector = shape.fits_vectors(kLanes<T>) &&
                        aligned(of.x, of.residual, upstream, out.grad_x, out.grad_z);
    dispatch_access<T>(vector, shape.numel(), [&](auto lanes, auto index) {
      using Index = typename decltype(index)::type;
      run_bn_act_train_backward<T, decltype(lanes)::value, Index>(device, shape, of, upstream, out);
    });
  });
  return {grad_x, grad_weight, grad_bias, grad_z};
}

Tensor norm_act_cuda(const Tensor& x, const Tensor& mean, const Tensor& rstd, OptTensor weight,
                     OptTensor bias, OptTensor residual, double /*eps*/, std::string act) {
  const Act code = parse_act(act);
  check_arguments(x, weight, bias, residual);
  check_channel_vector("mean", mean, x, x.size(1));
  check_channel_vector("rstd", rstd, x, x.size(1));
  const DeviceGuard guard(x.get_device_index());
  const MemoryFormat format = output_format(x);
  const Tensor y = empty_output(x);
  const Inputs in(x, weight, bias, residual, format);
  const Tensor dense_mean = as_format(mean, MemoryFormat::Contiguous);
  const Tensor dense_rstd = as_format(rstd, MemoryFormat::Contiguous);
  const ChannelShape shape = channel_shape(x, format);
  CurrentStream device(x);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto of = in.pointers<T>(dense_mean, dense_rstd, code);
    T* out = mutable_data_of<T>(y);
    const bool vector = shape.fits_vectors(kLanes<T>) && aligned(of.x, of.residual, out);
    dispatch_access<T>(vector, shape.numel(), [&](auto lanes, auto index) {
      using Index = typename decltype(index)::type;
      run_norm_act<T, decltype(lanes)::value, Index>(device, shape, of, out);
    });
  });
  return y;
}

}  // namespace
}  // namespace resnet_fast

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) {
  m.impl("bn_act_train", TORCH_BOX(&resnet_fast::bn_act_train_cuda));
  m.impl("norm_act", TORCH_BOX(&resnet_fast::norm_act_cuda));
  m.impl("_bn_act_train_backward", TORCH_BOX(&resnet_fast::bn_act_train_backward_cuda));
}
