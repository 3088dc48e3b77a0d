// CUDA on the host: enough of the language and of the machine to run the kernels of csrc/cuda as
// they are. Include it before them.
//
// The threads of a block are fibers, scheduled in the order asked for (schedule.h). A warp's
// instructions and the barriers wait for all their threads; cp.async lands as late as the rules
// allow (shared.h); matrices, shuffles and atomics are in instructions.h. What a kernel may not do
// ends the process with a line on stderr and kExitCode:
//
//   divergence    lanes of a warp at different instructions of the warp, or one has exited
//   barrier       a thread exits where others wait for it
//   deadlock      everybody waits
//   race          two threads touch the same shared memory, one writes, no barrier between them
//   out of range  misaligned  copies
//
// Limits. Blocks run one after the other, so a kernel whose blocks wait for each other hangs, and
// what they race for in global memory shows only in the order. Barriers are the whole memory model.
// Plain C++ accesses are watched by AddressSanitizer alone, where the build has it: they take no
// part in the search for races, except that the order of the threads and the poison of copies under
// way change what they read. A sum of mma is rounded as described in instructions.h.
#pragma once

#include "instructions.h"
#include "language.h"
#include "races.h"
#include "schedule.h"
#include "shared.h"

namespace cuda_on_host {

// Not in launch(), which is compiled once for each kernel.
[[gnu::noinline]] inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes,
                                       void (*kernel)(void*), void* arguments) {
  if (block.count() == 0 || block.count() > 1024 || grid.count() == 0)
    fail("launch", "a grid %s of blocks %s", text(grid), text(block));
  gridDim = grid;
  blockDim = block;
  shared.resize(shared_bytes);
  handovers.start_launch();
  for (const uint64_t b : schedule.permutation(grid.count())) {
    blockIdx = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                    static_cast<unsigned>(b / grid.x / grid.y));
    shared.fill();
    handovers.start_block();
    schedule.run_block(kernel, arguments);
  }
}

// The kernel's <<<grid, block, shared_bytes>>>.
template <typename... Parameters, typename... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...),
            Arguments... arguments) {
  auto body = [&] { kernel(arguments...); };
  run_grid(
      grid, block, shared_bytes, [](void* it) { (*static_cast<decltype(body)*>(it))(); }, &body);
}

}  // namespace cuda_on_host
