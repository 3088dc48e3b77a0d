// bn_act on CUDA: guards, allocation, launch, registration.
#include "bn_act.cuh"
#include "launch.cuh"

namespace resnet_fast {
namespace {

template <typename T>
struct BnActArguments {
  const Tensor& tensor;
  const T* x;
  const T* residual;
  const Accumulator<T>* scale;
  const Accumulator<T>* shift;
  T* y;
  int64_t numel, channels, plane;
  Act act;
  cudaStream_t stream;
};

template <typename T, bool RESIDUAL>
void launch_channels_last(const BnActArguments<T>& a) {
  dispatch_access<T>(aligned(a.x, a.residual, a.y), a.numel, [&](auto lanes, auto index) {
    constexpr int kWidth = decltype(lanes)::value;
    using Index = typename decltype(index)::type;
    constexpr auto kKernel = bn_act_channels_last_kernel<T, kWidth, RESIDUAL, Index>;
    const int64_t blocks = grid_for(a.numel / kWidth, resident_blocks<kKernel>(a.tensor),
                                    channel_period(a.channels, kWidth));
    const bool vector_parameters = a.channels % kWidth == 0 && aligned(a.scale, a.shift);
    kKernel<<<grid_dim(blocks), kThreads, 0, a.stream>>>(
        a.x, a.residual, a.scale, a.shift, a.y, static_cast<Index>(a.numel),
        static_cast<Index>(a.channels), vector_parameters, a.act);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

template <typename T, bool RESIDUAL>
void launch_planes(const BnActArguments<T>& a) {
  dispatch_access<T>(aligned(a.x, a.residual, a.y), a.numel, [&](auto lanes, auto index) {
    constexpr int kWidth = decltype(lanes)::value;
    using Index = typename decltype(index)::type;
    constexpr auto kKernel = bn_act_planes_kernel<T, kWidth, RESIDUAL, Index>;
    const int64_t blocks = grid_for(a.numel / kWidth, resident_blocks<kKernel>(a.tensor));
    const auto advance = plane_step<Index>(blocks * kThreads * kWidth, a.plane, a.channels);
    kKernel<<<grid_dim(blocks), kThreads, 0, a.stream>>>(
        a.x, a.residual, a.scale, a.shift, a.y, static_cast<Index>(a.numel),
        static_cast<Index>(a.channels), static_cast<Index>(a.plane), advance, a.act);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

Tensor bn_act_cuda(const Tensor& x, OptTensor scale, OptTensor shift, OptTensor residual,
                   std::string act) {
  check_cuda("x", x);
  STD_TORCH_CHECK(x.dim() >= 2, "x: expected a batch and a channel dimension");
  const int64_t channels = x.size(1);
  if (scale) check_channel_vector("scale", *scale, x, channels);
  if (shift) check_channel_vector("shift", *shift, x, channels);
  if (residual) check_matches("residual", *residual, x);
  const Act code = parse_act(act);
  const DeviceGuard guard(x.get_device_index());
  const Tensor y = empty_output(x);
  const int64_t numel = x.numel();
  if (numel == 0) return y;

  const MemoryFormat format = output_format(x);
  const Tensor dense_x = as_format(x, format);
  if (residual) residual = as_format(*residual, format);
  if (scale) scale = as_format(*scale, MemoryFormat::Contiguous);
  if (shift) shift = as_format(*shift, MemoryFormat::Contiguous);
  const int64_t plane = numel / x.size(0) / channels;
  // With one element a plane, channels are the fastest dimension of a contiguous tensor too.
  const bool channels_fastest = format != MemoryFormat::Contiguous || plane == 1;
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const BnActArguments<T> arguments{x,
                                      data_of<T>(dense_x),
                                      data_of<T>(residual),
                                      data_of<Accumulator<T>>(scale),
                                      data_of<Accumulator<T>>(shift),
                                      mutable_data_of<T>(y),
                                      numel,
                                      channels,
                                      plane,
                                      code,
                                      static_cast<cudaStream_t>(current_cuda_stream(x))};
    if (channels_fastest) {
      residual ? launch_channels_last<T, true>(arguments)
               : launch_channels_last<T, false>(arguments);
    } else {
      residual ? launch_planes<T, true>(arguments) : launch_planes<T, false>(arguments);
    }
  });
  return y;
}

}  // namespace
}  // namespace resnet_fast

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) {
  m.impl("bn_act", TORCH_BOX(&resnet_fast::bn_act_cuda));
}
