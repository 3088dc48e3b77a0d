// The C++ kernel of stem_pool on CUDA: guards, allocation, launch, registration.
#include "launch.cuh"
#include "stem_pool.cuh"

namespace resnet_fast {
namespace {

constexpr int64_t kMaxSize = 1 << 28;  // rows, columns and filters count in 32 bits

int attribute(cudaDeviceAttr name, const Tensor& t) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, t.get_device_index()));
  return value;
}

template <typename T, int C>
void launch(const Tensor& x, const StemArguments<T>& a, const StemDevice& device) {
  STD_TORCH_CHECK(a.grid.blocks <= INT32_MAX && a.grid.slices <= UINT16_MAX,
                  "tensor too large for one launch");
  constexpr auto kKernel = stem_pool_kernel<T, C>;
  allow_shared_memory<kKernel>(x.get_device_index(), device.shared_of_block);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared));
  const int64_t resident = (device.resident(a.grid.shared) - 1) / a.grid.slices + 1;
  const dim3 grid(static_cast<unsigned>(a.grid.blocks < resident ? a.grid.blocks : resident),
                  static_cast<unsigned>(a.grid.slices));
  const auto stream = static_cast<cudaStream_t>(current_cuda_stream(x));
  kKernel<<<grid, kStemThreads, static_cast<size_t>(a.grid.shared), stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void launch(const Tensor& x, const StemArguments<T>& a, const StemDevice& device) {
  switch (x.size(1)) {
    case 1:
      return launch<T, 1>(x, a, device);
    case 2:
      return launch<T, 2>(x, a, device);
    case 3:
      return launch<T, 3>(x, a, device);
    default:
      return launch<T, 4>(x, a, device);
  }
}

Tensor stem_pool_cuda(const Tensor& x, const Tensor& weight, OptTensor scale, OptTensor shift,
                      OptTensor input_scale, OptTensor input_shift, std::string act) {
  check_cuda("weight", weight);
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(dtype != ScalarType::Double, "weight: float64 has no kernel");
  STD_TORCH_CHECK(x.is_cuda() && same_device(x, weight), "x: expected the device of weight");
  STD_TORCH_CHECK(x.layout() == torch::headeronly::Layout::Strided, "x: expected a dense tensor");
  const bool raw = x.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(raw || x.scalar_type() == dtype, "x: expected uint8 or the dtype of weight");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) >= 1 && x.size(1) <= 4,
                  "x: expected [N, 1 to 4, H, W]");
  const int64_t channels = x.size(1), filters = weight.dim() == 4 ? weight.size(0) : 0;
  for (const int64_t size : {x.size(2), x.size(3), filters}) {
    STD_TORCH_CHECK(size >= 1 && size < kMaxSize,
                    "x, weight: expected 1 to 2^28 - 1 rows, columns "
                    "and filters");
  }
  STD_TORCH_CHECK(weight.size(1) == channels && weight.size(2) == 7 && weight.size(3) == 7,
                  "weight: expected [K, C, 7, 7] for an x of C channels");
  for (auto& [name, vector, size] :
       {std::tuple<const char*, OptTensor&, int64_t>{"scale", scale, filters},
        {"shift", shift, filters},
        {"input_scale", input_scale, channels},
        {"input_shift", input_shift, channels}}) {
    if (!vector) continue;
    check_channel_vector(name, *vector, weight, size);
    vector = as_format(*vector, MemoryFormat::Contiguous);
  }
  const Act code = parse_act(act);
  const DeviceGuard guard(x.get_device_index());
  const StemShape shape(x.size(0), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
                        static_cast<int>(filters));
  const MemoryFormat format = output_format(x);
  const Tensor y =
      empty({shape.batch, filters, shape.pooled_rows, shape.pooled_columns}, dtype, x, format);
  if (shape.batch == 0) return y;

  const StemDevice device{attribute(cudaDevAttrMultiProcessorCount, x),
                          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, x),
                          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, x)};
  const auto run = [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int count = static_cast<int>(channels);
    const StemTiling tiling = choose_stem_tiling(shape, count, sizeof(T), device);
    StemArguments<T> a{.x = x.const_data_ptr(),
                       .weight = data_of<T>(weight),
                       .scale = data_of<float>(scale),
                       .shift = data_of<float>(shift),
                       .input_scale = data_of<float>(input_scale),
                       .input_shift = data_of<float>(input_shift),
                       .y = mutable_data_of<T>(y),
                       .x_image = x.stride(0),
                       .x_channel = x.stride(1),
                       .x_row = x.stride(2),
                       .x_column = x.stride(3),
                       .w_filter = weight.stride(0),
                       .w_channel = weight.stride(1),
                       .w_row = weight.stride(2),
                       .w_column = weight.stride(3),
                       .shape = shape,
                       .tiling = tiling,
                       .grid = StemGrid(shape, tiling, count, sizeof(T)),
                       .raw = raw,
                       .access = StemAccess::elements,
                       .channels_last = format == MemoryFormat::ChannelsLast,
                       .act = code};
    a.access = stem_access(a, count);
    launch(x, a, device);
  };
  if (dtype == ScalarType::Half) {
    run(TypeTag<fp16>{});
  } else if (dtype == ScalarType::BFloat16) {
    run(TypeTag<bf16>{});
  } else {
    run(TypeTag<float>{});
  }
  return y;
}

}  // namespace
}  // namespace resnet_fast

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) {
  m.impl("_stem_pool_cuda", TORCH_BOX(&resnet_fast::stem_pool_cuda));
}
