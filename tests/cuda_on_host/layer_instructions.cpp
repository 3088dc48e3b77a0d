// Runs a kernel of layer_instructions.cuh on the host.
#include "driver.h"

#include "layer_instructions.cuh"

int main() {
  cuda_on_host::Case it;
  const int64_t words = it.integer("words");
  uint32_t* out = it.output<uint32_t>("out", words);
  std::fill_n(out, words, 0);
  const bool known = resnet_fast::select(
      it.word("kernel"), [](auto... launch) { cuda_on_host::launch(launch...); },
      it.input<uint32_t>("in"), it.input<uint32_t>("data"),
      static_cast<uint32_t>(it.integer("bytes")), out);
  return known ? it.finish() : 2;
}
