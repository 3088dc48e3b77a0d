// bn_act, channels last or in planes.
#include "elementwise.h"

#include "../../csrc/cuda/bn_act.cuh"

int main() {
  using namespace resnet_fast;
  cuda_on_host::Case it;
  const int64_t numel = it.integer("numel");
  const int64_t channels = it.integer("channels"), plane = it.integer("plane");
  const int64_t resident = it.integer("resident");
  const Act act = static_cast<Act>(it.integer("act"));
  const bool channels_last = it.word("layout") == "channels_last";
  cuda_on_host::with_element(it, [&](auto access) {
    using A = decltype(access);
    using T = typename A::Type;
    using Index = typename A::Index;
    using C = Accumulator<T>;
    const T* x = it.input<T>("x");
    const T* residual = it.input<T>("residual");
    const C* scale = it.input<C>("scale");
    const C* shift = it.input<C>("shift");
    T* y = it.output<T>("y", numel);
    const auto count = static_cast<Index>(numel), width = static_cast<Index>(channels);
    if (channels_last) {
      const int64_t period = channel_period(channels, A::kLanes);
      const int64_t blocks = grid_for(numel / A::kLanes, resident, period);
      const auto kernel = residual ? bn_act_channels_last_kernel<T, A::kLanes, true, Index>
                                   : bn_act_channels_last_kernel<T, A::kLanes, false, Index>;
      cuda_on_host::launch(static_cast<unsigned>(blocks), kThreads, 0, kernel, x, residual, scale,
                           shift, y, count, width, channels % A::kLanes == 0, act);
    } else {
      const int64_t blocks = grid_for(numel / A::kLanes, resident);
      const auto kernel = residual ? bn_act_planes_kernel<T, A::kLanes, true, Index>
                                   : bn_act_planes_kernel<T, A::kLanes, false, Index>;
      cuda_on_host::launch(static_cast<unsigned>(blocks), kThreads, 0, kernel, x, residual, scale,
                           shift, y, count, width, static_cast<Index>(plane),
                           plane_step<Index>(blocks * kThreads * A::kLanes, plane, channels), act);
    }
  });
  return it.finish();
}
