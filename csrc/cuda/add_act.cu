// add_act and its backward on CUDA: guards, allocation, launch, registration.
#include "add_act.cuh"
#include "launch.cuh"

namespace resnet_fast {
namespace {

Tensor add_act_cuda(const Tensor& x, const Tensor& residual, std::string act) {
  check_cuda("x", x);
  check_matches("residual", residual, x);
  const Act code = parse_act(act);
  const DeviceGuard guard(x.get_device_index());
  const Tensor y = empty_output(x);
  const int64_t numel = x.numel();
  if (numel == 0) return y;

  // One dense layout for all three, so that the kernel needs no strides; copies only when a
  // tensor is not in it already.
  const MemoryFormat format = output_format(x);
  const Tensor dense_x = as_format(x, format);
  const Tensor dense_residual = as_format(residual, format);
  const auto stream = static_cast<cudaStream_t>(current_cuda_stream(x));
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* x_data = data_of<T>(dense_x);
    const T* residual_data = data_of<T>(dense_residual);
    T* y_data = mutable_data_of<T>(y);
    dispatch_access<T>(aligned(x_data, residual_data, y_data), numel, [&](auto lanes, auto index) {
      constexpr int kWidth = decltype(lanes)::value;
      using Index = typename decltype(index)::type;
      constexpr auto kKernel = add_act_kernel<T, kWidth, Index>;
      const int64_t blocks = grid_for(numel / kWidth, resident_blocks<kKernel>(x));
      kKernel<<<grid_dim(blocks), kThreads, 0, stream>>>(x_data, residual_data, y_data,
                                                         static_cast<Index>(numel), code);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return y;
}

Tensor add_act_backward_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& residual,
                             std::string act) {
  check_cuda("x", x);
  check_matches("grad_y", grad_y, x);
  check_matches("residual", residual, x);
  const Act code = parse_act(act);
  const DeviceGuard guard(x.get_device_index());
  const Tensor grad = empty_output(x);
  const int64_t numel = x.numel();
  if (numel == 0) return grad;

  const MemoryFormat format = output_format(x);
  const Tensor dense_grad_y = as_format(grad_y, format);
  const Tensor dense_x = as_format(x, format);
  const Tensor dense_residual = as_format(residual, format);
  const auto stream = static_cast<cudaStream_t>(current_cuda_stream(x));
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* grad_y_data = data_of<T>(dense_grad_y);
    const T* x_data = data_of<T>(dense_x);
    const T* residual_data = data_of<T>(dense_residual);
    T* grad_data = mutable_data_of<T>(grad);
    const bool vector = aligned(grad_y_data, x_data, residual_data, grad_data);
    dispatch_access<T>(vector, numel, [&](auto lanes, auto index) {
      constexpr int kWidth = decltype(lanes)::value;
      using Index = typename decltype(index)::type;
      constexpr auto kKernel = add_act_backward_kernel<T, kWidth, Index>;
      const int64_t blocks = grid_for(numel / kWidth, resident_blocks<kKernel>(x));
      kKernel<<<grid_dim(blocks), kThreads, 0, stream>>>(
          grad_y_data, x_data, residual_data, grad_data, static_cast<Index>(numel), code);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return grad;
}

}  // namespace
}  // namespace resnet_fast

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) {
  m.impl("add_act", TORCH_BOX(&resnet_fast::add_act_cuda));
  m.impl("_add_act_backward", TORCH_BOX(&resnet_fast::add_act_backward_cuda));
}
