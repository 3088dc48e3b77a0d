// conv_stats: words dtype, tile; ints: ConvShape's fields, copy, act of the batch norm in front,
// resident; number eps; tensors x, weight, and for a batch norm in front mean, rstd, gamma, beta;
// outputs z, mean_z, rstd_z.
#include "cuda.h"

#include "conv_shape.h"
#include "device.h"

#include "../../csrc/cuda/conv_stats_launch.h"

namespace {

using namespace resnet_fast;
using cuda_on_host::Case;

template <typename T>
int run(Case& c) {
  const ConvShape s = cuda_on_host::read_conv_shape(c);
  const int64_t numel = int64_t{s.batch} * s.out_height * s.out_width * s.filters;
  const T* x = c.input<T>("x");
  const T* weight = c.input<T>("weight");
  const ConvPrologue prologue{c.input<float>("mean"), c.input<float>("rstd"),
                              c.input<float>("gamma"), c.input<float>("beta"),
                              static_cast<Act>(c.integer("act"))};
  const StatsOutputs<T> out{c.output<T>("z", numel), c.output<float>("mean_z", s.filters),
                            c.output<float>("rstd_z", s.filters),
                            s.filters / s.groups % kLanes<T> == 0};
  const int tile = find_conv_tile(c.word("tile")), copy = static_cast<int>(c.integer("copy"));
  cuda_on_host::Device device{c};
  const double eps = c.number("eps");
  const bool known =
      prologue.mean != nullptr
          ? run_conv_stats<T, true>(device, s, x, weight, prologue, out, tile, copy, eps)
          : run_conv_stats<T, false>(device, s, x, weight, prologue, out, tile, copy, eps);
  return known ? c.finish() : 2;
}

}  // namespace

int main() {
  Case c;
  const std::string dtype = c.word("dtype");
  if (dtype == "float16") return run<fp16>(c);
  if (dtype == "bfloat16") return run<bf16>(c);
  return dtype == "float32" ? run<float>(c) : 2;
}
