// bn_act: the affine epilogue alone, on contiguous and channels-last memory.
#include "affine.h"

namespace resnet_fast::cpu {
namespace {

Tensor bn_act(const Tensor& x, const OptTensor& scale, const OptTensor& shift,
              const OptTensor& residual, const std::string& act_name) {
  const Act act = parse_act(act_name);
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  check_input("x", x);
  STD_TORCH_CHECK(x.dim() >= 2, "x: expected at least 2 dimensions");
  if (scale) check_channel_vector("scale", *scale, x, x.size(1));
  if (shift) check_channel_vector("shift", *shift, x, x.size(1));
  if (residual) check_matches("residual", *residual, x);

  const MemoryFormat format = output_format(x);
  Tensor y = empty_output(x);
  if (x.numel() == 0) return y;
  const Tensor dense = as_format(x, format);
  const OptTensor added = residual ? OptTensor(as_format(*residual, format)) : std::nullopt;
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    const auto a = channel_values<A>(scale, x.size(1), A(1));
    const auto b = channel_values<A>(shift, x.size(1), A(-0.0));  // keeps -0
    affine_act<T>(channel_view(x, format), data_of<T>(dense), a.data(), b.data(), data_of<T>(added),
                  mutable_data_of<T>(y), act);
  });
  return y;
}

}  // namespace
}  // namespace resnet_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("bn_act", TORCH_BOX(&resnet_fast::cpu::bn_act));
}
