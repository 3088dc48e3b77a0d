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
//   race          two threads touch the same memory, one writes, nothing orders them (races.h)
//   copies        a thread exits and has not waited for all of its cp.async
//   out of range  misaligned  launch
//
// A program is built in one of two ways (tests/host_support.py). With sanitizers: plain accesses
// outside of a tensor or of the shared memory are caught, and the search for races sees what passes
// through ptx.cuh. Traced: the search sees plain accesses too, in shared memory, outputs and
// scratch (trace.h).
//
// Limits. Blocks run one after the other: a kernel whose blocks wait for each other never ends.
// Barriers, and fences around atomics, are the whole memory model; atomics themselves take no part
// in the search for races. Lanes that meet at one instruction in two places of the program pass.
// The sums of mma are rounded as instructions.h says, the hardware's differ in the last bits.
#pragma once

#include "instructions.h"
#include "language.h"
#include "races.h"
#include "schedule.h"
#include "shared.h"

namespace cuda_on_host {

// Of a block on sm_90; of a grid in y and z.
inline constexpr uint64_t kMostThreads = 1024;
inline constexpr size_t kMostShared = size_t{227} << 10;
inline constexpr unsigned kMostBlocks = 65535;

// Not in launch(), which is compiled once for each kernel.
[[gnu::noinline]] inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes,
                                       void (*kernel)(void*), void* arguments) {
  if (block.count() == 0 || block.count() > kMostThreads || grid.count() == 0 ||
      grid.y > kMostBlocks || grid.z > kMostBlocks || shared_bytes > kMostShared)
    fail("launch", "a grid %s of blocks %s with %zu bytes", text(grid), text(block), shared_bytes);
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
