// add_act; with a grad_y its backward.
#include "elementwise.h"

#include "../../csrc/cuda/add_act.cuh"

int main() {
  using namespace resnet_fast;
  cuda_on_host::Case it;
  const int64_t numel = it.integer("numel");
  const Act act = static_cast<Act>(it.integer("act"));
  cuda_on_host::with_element(it, [&](auto access) {
    using A = decltype(access);
    using T = typename A::Type;
    using Index = typename A::Index;
    const T* grad_y = it.input<T>("grad_y");
    const T* x = it.input<T>("x");
    const T* residual = it.input<T>("residual");
    T* y = it.output<T>("y", numel);
    const int64_t blocks = grid_for(numel / A::kLanes, it.integer("resident"));
    const dim3 grid(static_cast<unsigned>(blocks));
    if (grad_y)
      cuda_on_host::launch(grid, kThreads, 0, add_act_backward_kernel<T, A::kLanes, Index>, grad_y,
                           x, residual, y, static_cast<Index>(numel), act);
    else
      cuda_on_host::launch(grid, kThreads, 0, add_act_kernel<T, A::kLanes, Index>, x, residual, y,
                           static_cast<Index>(numel), act);
  });
  return it.finish();
}
