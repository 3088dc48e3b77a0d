// Runs a kernel of layer_instructions.cuh.
#include "driver.h"

#include "layer_instructions.cuh"

int main() {
  using namespace resnet_fast;
  cuda_on_host::Case it;
  const std::string kernel = it.word("kernel");
  const uint32_t* in = it.input<uint32_t>("in");
  uint32_t* out = it.output<uint32_t>("out", it.integer("words"));
  if (kernel == "load") {
    const auto bytes = static_cast<uint32_t>(it.integer("bytes"));
    cuda_on_host::launch(1, kWarp, bytes, load, in, it.input<uint32_t>("data"), bytes / 4, out);
  } else if (kernel == "fp16") {
    cuda_on_host::launch(1, kWarp, 0, multiply<fp16>, in, out);
  } else if (kernel == "bf16") {
    cuda_on_host::launch(1, kWarp, 0, multiply<bf16>, in, out);
  } else if (kernel == "tf32") {
    cuda_on_host::launch(1, kWarp, 0, multiply<float>, in, out);
  } else if (kernel == "round") {
    cuda_on_host::launch(1, kWarp, 0, round, in, out);
  } else if (kernel == "look") {
    cuda_on_host::launch(2, 1, 1004, look, 251, out);
  } else if (kernel == "narrow") {
    cuda_on_host::launch(1, kWarp, 0, narrow, in, out);
  } else if (kernel == "larger") {
    cuda_on_host::launch(1, kWarp, 0, larger, in, out);
  } else if (kernel == "synchronise") {
    cuda_on_host::launch(1, 64, 64 * 4, synchronise, in, out);
  } else if (kernel == "exchange") {
    cuda_on_host::launch(1, kWarp, 0, exchange, in, out);
  } else if (kernel == "copy") {
    cuda_on_host::launch(1, kWarp, kWarp * 64, copy, in, out);
  } else {
    *out = 0;
    if (kernel == "add")
      cuda_on_host::launch(3, 70, 0, add, out);
    else
      cuda_on_host::launch(dim3(2, 1, 2), dim3(5, 3, 4), 0, visit, out);
  }
  return it.finish();
}
