// stem_pool: `strip` and `tiles` of its tiling, 0 for the one that is chosen for a device of
// `multiprocessors`; `resident` blocks bound the grid. What the launch was is an output too.
#include "driver.h"

#include "../../csrc/cuda/stem_pool.cuh"

namespace {

using namespace resnet_fast;

template <typename T, int C>
void run(cuda_on_host::Case& it) {
  const auto integer = [&](const char* name) { return static_cast<int>(it.integer(name)); };
  const StemShape shape(it.integer("batch"), integer("height"), integer("width"),
                        integer("filters"));
  StemTiling tiling = choose_stem_tiling(
      shape, C, sizeof(T),
      {integer("multiprocessors"), integer("shared") * 1024, (integer("shared") - 1) * 1024});
  if (integer("strip") > 0) {
    tiling.strip = integer("strip");
    tiling.tiles = integer("tiles");
  }
  const bool raw = it.word("image") == "uint8";
  const unsigned char* x = it.input<unsigned char>("x");
  StemArguments<T> a{
      .x = x + it.integer("x_offset") * (raw ? 1 : sizeof(T)),
      .weight = it.input<T>("weight"),
      .scale = it.input<float>("scale"),
      .shift = it.input<float>("shift"),
      .input_scale = it.input<float>("input_scale"),
      .input_shift = it.input<float>("input_shift"),
      .y =
          it.output<T>("y", shape.batch * shape.filters * shape.pooled_rows * shape.pooled_columns),
      .x_image = it.integer("x_image"),
      .x_channel = it.integer("x_channel"),
      .x_row = it.integer("x_row"),
      .x_column = it.integer("x_column"),
      .w_filter = it.integer("w_filter"),
      .w_channel = it.integer("w_channel"),
      .w_row = it.integer("w_row"),
      .w_column = it.integer("w_column"),
      .shape = shape,
      .tiling = tiling,
      .grid = StemGrid(shape, tiling, C, sizeof(T)),
      .raw = raw,
      .access = StemAccess::elements,
      .channels_last = it.integer("channels_last") != 0,
      .act = static_cast<Act>(it.integer("act")),
  };
  a.access = stem_access(a, C);
  const int launched[] = {tiling.strip,
                          tiling.tiles,
                          tiling.across,
                          a.grid.shared,
                          static_cast<int>(a.access),
                          static_cast<int>(a.grid.blocks)};
  std::memcpy(it.output<int>("launched", std::size(launched)), launched, sizeof(launched));
  const int64_t limit = it.integer("resident");
  const int64_t blocks = a.grid.blocks < limit ? a.grid.blocks : limit;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(a.grid.slices));
  cuda_on_host::launch(grid, kStemThreads, static_cast<size_t>(a.grid.shared),
                       stem_pool_kernel<T, C>, a);
}

template <typename T>
void run(cuda_on_host::Case& it) {
  switch (it.integer("channels")) {
    case 1:
      return run<T, 1>(it);
    case 2:
      return run<T, 2>(it);
    case 3:
      return run<T, 3>(it);
    case 4:
      return run<T, 4>(it);
  }
  cuda_on_host::fail("case", "channels");
}

}  // namespace

int main() {
  cuda_on_host::Case it;
  const std::string dtype = it.word("dtype");
  if (dtype == "float16") run<fp16>(it);
  if (dtype == "bfloat16") run<bf16>(it);
  if (dtype == "float32") run<float>(it);
  return it.finish();
}
