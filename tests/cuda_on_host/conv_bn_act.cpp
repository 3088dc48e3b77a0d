// conv_bn_act on tensor cores, and its narrowly grouped form, launched as the launcher does.
//
// words: dtype, tile ("grouped" or one of kConvTiles), act; ints: the fields of ConvShape, copy,
// parts; tensors: x, weight, scale, shift, residual; output: y.
#include "cuda.h"

#include "conv_shape.h"

#include "../../csrc/cuda/conv_tiles.cuh"
#include "../../csrc/cuda/grid.h"

namespace {

using namespace resnet_fast;
using cuda_on_host::Case;

template <typename T>
int run(Case& c) {
  const ConvShape s = cuda_on_host::read_conv_shape(c);
  const int64_t pixels = int64_t{s.batch} * s.out_height * s.out_width;
  const int64_t numel = pixels * s.filters;
  const T* x = c.input<T>("x");
  const T* weight = c.input<T>("weight");
  const bool whole = c.integer("wide") != 0;
  ConvEpilogue<T> epilogue{c.input<float>("scale"),
                           c.input<float>("shift"),
                           c.input<T>("residual"),
                           c.output<T>("y", numel),
                           static_cast<Act>(c.integer("act")),
                           whole && s.filters / s.groups % kLanes<T> == 0};
  const std::string tile = c.word("tile");
  if (tile == kGroupedTile) {
    if (!is_narrow_group(sizeof(T), s)) return 2;
    const int64_t runs = (s.out_width + kGroupedRun - 1) / kGroupedRun;
    const int64_t rows = int64_t{s.batch} * s.out_height * runs;
    const dim3 grid(static_cast<unsigned>((rows + kGroupedRows<T> - 1) / kGroupedRows<T>),
                    static_cast<unsigned>((s.channels + kGroupedChannels - 1) / kGroupedChannels));
    const auto shared = grouped_shared_bytes(int64_t{s.kernel_h} * s.kernel_w, s.group_channels);
    const bool known = with_grouped_kernel<T>(s.group_channels, [&](auto kernel) {
      cuda_on_host::launch(grid, kThreads, shared, decltype(kernel)::kKernel, s, x, weight,
                           epilogue);
    });
    return known ? c.finish() : 2;
  }

  const int64_t stages = conv_stages(sizeof(T), s);
  int64_t parts = c.integer("parts");
  const int64_t stages_a_part = (stages + parts - 1) / parts;
  parts = (stages + stages_a_part - 1) / stages_a_part;
  float* partial = parts > 1 ? c.scratch<float>("partial", parts * numel) : nullptr;
  const int index = find_conv_tile(tile);
  if (index < 0) return 2;
  const dim3 grid(static_cast<unsigned>(conv_blocks(index, s)), 1, static_cast<unsigned>(parts));
  const bool known =
      with_conv_kernel<T>(index, static_cast<int>(c.integer("copy")), [&](auto kernel) {
        using Tile = typename decltype(kernel)::TileType;
        cuda_on_host::launch(grid, Tile::kTileThreads, Tile::kSharedBytes,
                             decltype(kernel)::kKernel, s, x, weight, epilogue, partial,
                             static_cast<int>(stages_a_part));
      });
  if (!known) return 2;
  if (parts > 1) {
    const int64_t blocks = grid_for((numel + kLanes<T> - 1) / kLanes<T>, 2);
    cuda_on_host::launch(static_cast<unsigned>(blocks), kThreads, 0, conv_sum_kernel<T>,
                         static_cast<const float*>(partial), static_cast<int>(parts), numel,
                         s.filters, epilogue);
  }
  return c.finish();
}

}  // namespace

int main() {
  Case c;
  const std::string dtype = c.word("dtype");
  if (dtype == "float16") return run<fp16>(c);
  if (dtype == "bfloat16") return run<bf16>(c);
  return dtype == "float32" ? run<float>(c) : 2;
}
