// max_pool; with a grad_y its backward.
#include "driver.h"

#include "../../csrc/cuda/max_pool.cuh"

namespace {

using namespace resnet_fast;

template <typename T, int LANES>
void run(cuda_on_host::Case& it) {
  const auto integer = [&](const char* name) { return static_cast<int>(it.integer(name)); };
  PoolShape shape(it.integer("images"), integer("channels"), integer("height"), integer("width"));
  shape.choose_strip(LANES, it.integer("wanted"));
  const int64_t pooled = shape.images * shape.rows * shape.columns * shape.channels;
  const dim3 grid(static_cast<unsigned>((shape.threads(LANES) - 1) / kThreads + 1));
  const T* x = it.input<T>("x");
  if (const T* grad_y = it.input<T>("grad_y")) {
    T* grad_x = it.output<T>("y", shape.images * shape.height * shape.width * shape.channels);
    cuda_on_host::launch(grid, kThreads, 0, max_pool_backward_kernel<T, LANES>, grad_y, x, grad_x,
                         shape);
  } else {
    cuda_on_host::launch(grid, kThreads, 0, max_pool_kernel<T, LANES>, x, it.output<T>("y", pooled),
                         shape);
  }
}

template <typename T>
void run(cuda_on_host::Case& it) {
  it.integer("vector") != 0 ? run<T, kLanes<T>>(it) : run<T, 1>(it);
}

}  // namespace

int main() {
  cuda_on_host::Case it;
  const std::string dtype = it.word("dtype");
  if (dtype == "float16") run<fp16>(it);
  if (dtype == "bfloat16") run<bf16>(it);
  if (dtype == "float32") run<float>(it);
  if (dtype == "float64") run<double>(it);
  return it.finish();
}
