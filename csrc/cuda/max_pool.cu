// max_pool and its backward on CUDA: guards, allocation, launch, registration.
#include "launch.cuh"
#include "max_pool.cuh"

namespace resnet_fast {
namespace {

PoolShape pool_shape(const Tensor& x) {
  check_cuda("x", x);
  STD_TORCH_CHECK(x.dim() == 4, "x: expected [N, C, H, W]");
  for (int d = 1; d < 4; ++d) {
    STD_TORCH_CHECK(x.size(d) >= 1 && x.size(d) < (1 << 30),
                    "x: expected 1 to 2^30 - 1 channels, "
                    "rows and columns");
  }
  const bool last = output_format(x) == MemoryFormat::ChannelsLast;
  const int channels = last ? static_cast<int>(x.size(1)) : 1;
  return PoolShape(last ? x.size(0) : x.size(0) * x.size(1), channels, static_cast<int>(x.size(2)),
                   static_cast<int>(x.size(3)));
}

template <auto KERNEL, typename... Pointers>
void launch(const Tensor& x, PoolShape shape, int lanes, Pointers... pointers) {
  shape.choose_strip(lanes, resident_blocks<KERNEL>(x) * kThreads);
  const int64_t blocks = (shape.threads(lanes) - 1) / kThreads + 1;
  // The kernels count threads in 32 bits.
  STD_TORCH_CHECK(blocks <= UINT32_MAX / kThreads, "x: too large for one launch");
  const dim3 grid(static_cast<unsigned>(blocks));
  const auto stream = static_cast<cudaStream_t>(current_cuda_stream(x));
  KERNEL<<<grid, kThreads, 0, stream>>>(pointers..., shape);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor max_pool_cuda(const Tensor& x) {
  const PoolShape shape = pool_shape(x);
  const DeviceGuard guard(x.get_device_index());
  const MemoryFormat format = output_format(x);
  const Tensor y =
      empty({x.size(0), x.size(1), shape.rows, shape.columns}, x.scalar_type(), x, format);
  if (shape.images == 0) return y;
  const Tensor dense = as_format(x, format);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* from = data_of<T>(dense);
    T* to = mutable_data_of<T>(y);
    if (shape.channels % kLanes<T> == 0 && aligned(from, to)) {
      launch<max_pool_kernel<T, kLanes<T>>>(x, shape, kLanes<T>, from, to);
    } else {
      launch<max_pool_kernel<T, 1>>(x, shape, 1, from, to);
    }
  });
  return y;
}

Tensor max_pool_backward_cuda(const Tensor& grad_y, const Tensor& x) {
  const PoolShape shape = pool_shape(x);
  check_input("grad_y", grad_y);
  STD_TORCH_CHECK(same_device(grad_y, x) && grad_y.scalar_type() == x.scalar_type(),
                  "grad_y: expected the device and dtype of x");
  STD_TORCH_CHECK(grad_y.dim() == 4 && grad_y.size(0) == x.size(0) && grad_y.size(1) == x.size(1) &&
                      grad_y.size(2) == shape.rows && grad_y.size(3) == shape.columns,
                  "grad_y: expected the shape of the pooled x");
  const DeviceGuard guard(x.get_device_index());
  const MemoryFormat format = output_format(x);
  const Tensor grad_x = empty_output(x);
  if (shape.images == 0) return grad_x;
  const Tensor dense_grad_y = as_format(grad_y, format), dense_x = as_format(x, format);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* gradients = data_of<T>(dense_grad_y);
    const T* values = data_of<T>(dense_x);
    T* to = mutable_data_of<T>(grad_x);
    if (shape.channels % kLanes<T> == 0 && aligned(gradients, values, to)) {
      launch<max_pool_backward_kernel<T, kLanes<T>>>(x, shape, kLanes<T>, gradients, values, to);
    } else {
      launch<max_pool_backward_kernel<T, 1>>(x, shape, 1, gradients, values, to);
    }
  });
  return grad_x;
}

}  // namespace
}  // namespace resnet_fast

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) {
  m.impl("_max_pool", TORCH_BOX(&resnet_fast::max_pool_cuda));
  m.impl("_max_pool_backward", TORCH_BOX(&resnet_fast::max_pool_backward_cuda));
}
