// bn_act_train; with a grad_y its backward.
#include "device.h"
#include "elementwise.h"

#include "../../csrc/cuda/bn_act_train_launch.h"

namespace {

using namespace resnet_fast;

template <typename T, int LANES, typename Index>
void run(cuda_on_host::Case& it, const ChannelShape& shape) {
  using C = Accumulator<T>;
  cuda_on_host::Device device{it};
  const Act act = static_cast<Act>(it.integer("act"));
  const T* grad_y = it.input<T>("grad_y");
  const Normalisation<T> of{it.input<T>("x"),
                            it.input<T>("residual"),
                            it.input<C>("mean"),
                            it.input<C>("rstd"),
                            it.input<C>("weight"),
                            it.input<C>("bias"),
                            act};
  if (grad_y) {
    BackwardOutputs<T> out{it.output<T>("grad_x", shape.numel()),
                           it.output<C>("grad_weight", shape.channels),
                           it.output<C>("grad_bias", shape.channels), nullptr};
    if (of.residual) out.grad_z = it.output<T>("grad_z", shape.numel());
    run_bn_act_train_backward<T, LANES, Index>(device, shape, of, grad_y, out);
  } else {
    const ForwardOutputs<T> out{it.output<T>("y", shape.numel()),
                                it.output<C>("mean", shape.channels),
                                it.output<C>("rstd", shape.channels)};
    run_bn_act_train<T, LANES, Index>(device, shape, of, out, it.number("eps"));
  }
}

}  // namespace

int main() {
  cuda_on_host::Case it;
  const ChannelShape shape{it.integer("batch"), it.integer("channels"), it.integer("plane"),
                           it.word("layout") == "channels_last"};
  cuda_on_host::with_element(it, [&](auto access) {
    using A = decltype(access);
    // As the launcher chooses, where pointers are aligned.
    if (shape.fits_vectors(A::kLanes))
      run<typename A::Type, A::kLanes, typename A::Index>(it, shape);
    else
      run<typename A::Type, 1, typename A::Index>(it, shape);
  });
  return it.finish();
}
