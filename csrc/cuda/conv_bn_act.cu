// conv_bn_act on tensor cores: guards, allocation, choice of the kernel, launch, registration.
#include "conv_launch.cuh"
#include "conv_tiles.cuh"

namespace resnet_fast {
namespace {

template <typename T>
void launch_conv(const Tensor& x, const ConvShape& shape, const T* weight,
                 const ConvEpilogue<T>& epilogue, int tile, int copy, int64_t parts,
                 cudaStream_t stream) {
  const T* x_data = data_of<T>(x);
  const int64_t pixels = int64_t{shape.batch} * shape.out_height * shape.out_width;
  const int64_t stages = conv_stages(static_cast<int>(sizeof(T)), shape);
  const int64_t stages_a_part = (stages + parts - 1) / parts;
  parts = (stages + stages_a_part - 1) / stages_a_part;  // none is empty
  STD_TORCH_CHECK(parts <= 65535, "splits: expected at most 65535");

  std::optional<Tensor> partial;
  if (parts > 1) partial = empty({parts, pixels, shape.filters}, ScalarType::Float, x);
  float* const sums = partial ? mutable_data_of<float>(*partial) : nullptr;
  dim3 grid = grid_dim(conv_blocks(tile, shape));
  grid.z = static_cast<unsigned>(parts);
  const bool known = with_conv_kernel<T>(tile, copy, [&](auto kernel) {
    using Kernel = decltype(kernel);
    using Tile = typename Kernel::TileType;
    allow_shared_memory<Kernel::kKernel>(x.get_device_index(), Tile::kSharedBytes);
    Kernel::kKernel<<<grid, Tile::kTileThreads, Tile::kSharedBytes, stream>>>(
        shape, x_data, weight, epilogue, sums, static_cast<int>(stages_a_part));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  STD_TORCH_CHECK(known, "tile: ", kConvTiles[tile].name, " has no kernel for these channels");
  if (parts > 1) {
    const int64_t numel = pixels * shape.filters;
    const int64_t resident = resident_blocks<conv_sum_kernel<T>>(x);
    const int64_t sum_blocks = grid_for((numel + kLanes<T> - 1) / kLanes<T>, resident);
    conv_sum_kernel<T><<<grid_dim(sum_blocks), kThreads, 0, stream>>>(
        sums, static_cast<int>(parts), numel, shape.filters, epilogue);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <typename T>
void launch_grouped(const Tensor& x, const ConvShape& shape, const T* weight,
                    const ConvEpilogue<T>& epilogue, cudaStream_t stream) {
  const T* x_data = data_of<T>(x);
  const int64_t runs = (int64_t{shape.out_width} + kGroupedRun - 1) / kGroupedRun;
  const int64_t rows = int64_t{shape.batch} * shape.out_height * runs;
  dim3 grid = grid_dim((rows + kGroupedRows<T> - 1) / kGroupedRows<T>);
  grid.y = static_cast<unsigned>((shape.channels + kGroupedChannels - 1) / kGroupedChannels);
  const int64_t shared =
      grouped_shared_bytes(int64_t{shape.kernel_h} * shape.kernel_w, shape.group_channels);
  const bool known = with_grouped_kernel<T>(shape.group_channels, [&](auto kernel) {
    decltype(kernel)::kKernel<<<grid, kThreads, shared, stream>>>(shape, x_data, weight, epilogue);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  STD_TORCH_CHECK(known, "groups: no kernel for ", shape.group_channels, " channels a group");
}

Tensor conv_bn_act_cuda(const Tensor& x, const Tensor& weight, OptTensor scale, OptTensor shift,
                        OptTensor residual, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                        std::string act, std::string tile, int64_t splits) {
  check_cuda("x", x);
  check_input("weight", weight);
  STD_TORCH_CHECK(same_device(weight, x) && weight.scalar_type() == x.scalar_type(),
                  "weight: expected the device and the dtype of x");
  STD_TORCH_CHECK(splits >= 0, "splits: expected 0, which lets the kernel choose, or more");
  const ConvShape shape = conv_shape(x, weight, stride, padding, dilation, groups);
  const std::vector<int64_t> sizes{shape.batch, shape.filters, shape.out_height, shape.out_width};
  if (scale) check_channel_vector("scale", *scale, x, shape.filters);
  if (shift) check_channel_vector("shift", *shift, x, shape.filters);
  if (residual) {
    check_input("residual", *residual);
    STD_TORCH_CHECK(same_device(*residual, x) && residual->scalar_type() == x.scalar_type() &&
                        shape_of(*residual) == sizes,
                    "residual: expected the device and dtype of x and the shape of the output");
  }
  const Act code = parse_act(act);
  const DeviceGuard guard(x.get_device_index());
  const MemoryFormat format = output_format(x);
  const Tensor y = empty(sizes, x.scalar_type(), x, MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return as_format(y, format);

  const Tensor dense_x = as_format(x, MemoryFormat::ChannelsLast);
  const Tensor dense_weight = as_format(weight, MemoryFormat::ChannelsLast);
  if (residual) residual = as_format(*residual, MemoryFormat::ChannelsLast);
  if (scale) scale = as_format(*scale, MemoryFormat::Contiguous);
  if (shift) shift = as_format(*shift, MemoryFormat::Contiguous);
  const auto stream = static_cast<cudaStream_t>(current_cuda_stream(x));
  dispatch_product_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int bytes = static_cast<int>(sizeof(T));
    const T* const weight_data = data_of<T>(dense_weight);
    // A view that starts inside a storage takes narrower copies.
    int copy = conv_copy_bytes(bytes, shape);
    if (copy == 16 && !aligned(data_of<T>(dense_x), weight_data)) copy = 4;
    const auto narrow = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 4 != 0; };
    if (copy == 4 && (narrow(data_of<T>(dense_x)) || narrow(weight_data))) copy = 0;
    const T* const residual_data = data_of<T>(residual);
    T* const y_data = mutable_data_of<T>(y);
    const bool whole = aligned(y_data, residual_data);
    ConvEpilogue<T> epilogue{
        data_of<float>(scale), data_of<float>(shift), residual_data, y_data, code, whole};
    const bool fits = whole && aligned(data_of<T>(dense_x)) && is_narrow_group(bytes, shape);
    STD_TORCH_CHECK(fits || tile != kGroupedTile,
                    "tile: the grouped kernel takes 1, 2, 4 or 8 channels and filters a group");
    if (fits && (tile.empty() || tile == kGroupedTile)) {
      launch_grouped<T>(dense_x, shape, weight_data, epilogue, stream);
      return;
    }
    const int index = tile.empty() ? choose_conv_tile(bytes, shape, copy) : find_conv_tile(tile);
    STD_TORCH_CHECK(index >= 0, "tile: unknown tile '", tile, "'");
    epilogue.wide = whole && shape.filters / shape.groups % kLanes<T> == 0;
    launch_conv<T>(dense_x, shape, weight_data, epilogue, index, copy,
                   splits == 0 ? choose_conv_parts(bytes, shape, index) : splits, stream);
  });
  return as_format(y, format);
}

}  // namespace
}  // namespace resnet_fast

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) {
  m.impl("_conv_bn_act_cuda", TORCH_BOX(&resnet_fast::conv_bn_act_cuda));
}
