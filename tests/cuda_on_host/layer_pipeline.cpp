// A kernel as the real ones are, in which a bug can be chosen: a tile through two stages of copies,
// ldmatrix and mma, and its result through shared memory.
#include <string_view>

#include "driver.h"

#include "../../csrc/cuda/ptx.cuh"

namespace {

using namespace resnet_fast;

// y[rows x 8] = a[rows x depth] b[8 x depth]', a block for 32 rows, a warp for 16. A stage holds 16
// of depth: rows of two 16-byte chunks, 32 of a and 8 of b.
constexpr unsigned kRows = 32, kColumns = 8, kThreads = 64;
constexpr uint32_t kRowBytes = 32, kStageBytes = (kRows + kColumns) * kRowBytes;
constexpr uint32_t kStagingBytes = kRows * kColumns * sizeof(float);
constexpr uint32_t kSharedBytes = 2 * kStageBytes + kStagingBytes;

__device__ uint32_t place(unsigned row, unsigned chunk) {
  return row * kRowBytes + (chunk ^ (row / 4 % 2)) * 16;
}

__global__ void product(const fp16* a, const fp16* b, float* y, unsigned rows, unsigned depth,
                        const char* bug) {
  const auto is = [&](const char* name) { return std::string_view(bug) == name; };
  const unsigned thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const unsigned first_row = blockIdx.x * kRows, steps = (depth + 15) / 16;
  const SharedAddress base = shared_address(shared_memory());
  if (is("an_early_exit") && first_row + thread >= rows) return;

  const auto fetch = [&](unsigned step) {
    const SharedAddress stage = base + step % 2 * kStageBytes;
    for (unsigned i = thread; i < (kRows + kColumns) * 2; i += kThreads) {
      const unsigned row = i / 2, chunk = i % 2, k = step * 16 + chunk * 8;
      const unsigned from_row = row < kRows ? first_row + row : row - kRows;
      const unsigned last = row < kRows ? rows + is("a_row_too_many") : kColumns;
      const fp16* from = (row < kRows ? a : b) + size_t{from_row} * depth + k;
      copy_async<16>(stage + place(row, chunk) + (is("a_misaligned_chunk") ? 8 : 0), from,
                     k < depth && from_row < last);
    }
  };
  fetch(0);
  commit_copies();
  float sum[4] = {};
  for (unsigned step = 0; step < steps; ++step) {
    if (step + 1 < steps || is("copies_past_the_end")) fetch(step + 1);
    commit_copies();
    if (is("late_wait"))
      wait_copies<2>();
    else
      wait_copies<1>();
    if (is("a_warp_goes_ahead") && warp == 1)
      sync_warp();
    else if (is("barriers_of_two_kinds") && lane < 5)
      sync_warp();
    else if (!is("no_barrier_before_reading"))
      sync_block();
    if (is("a_lane_leaves") && lane == 9) return wait_copies<0>();
    const SharedAddress stage = base + step % 2 * kStageBytes;
    const unsigned row = warp * 16 + lane % 16, column = kRows + lane % 8;
    const unsigned chunk = (lane / 16) ^ (is("another_swizzle") ? row / 8 % 2 : 0);
    uint32_t left[4], right[4];
    if (!is("half_a_warp_multiplies") || lane < 16) load_matrices(left, stage + place(row, chunk));
    load_matrices(right, stage + place(column, lane / 8 % 2));
    multiply_add<fp16>(sum, left, right[0], right[1]);
    if (!is("no_barrier_before_overwriting")) sync_block();
  }

  float* staging = reinterpret_cast<float*>(shared_memory() + (is("staging_over_a_stage")
                                                                   ? (steps - 1) % 2 * kStageBytes
                                                                   : 2 * kStageBytes));
  if (is("staging_over_a_stage")) {
    uint32_t again[4];
    load_matrices(again, base + (steps - 1) % 2 * kStageBytes + place(lane, 0));
  }
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = warp * 16 + lane / 4 + i / 2 * 8 + is("staging_behind_the_end");
    staging[row * kColumns + lane % 4 * 2 + i % 2] = sum[i];
  }
  if (!is("no_barrier_after_staging")) sync_block();
  // From the last row, so that a warp stores what the other has computed.
  const unsigned row = kRows - 1 - thread / 2;
  if (first_row + row < rows + is("a_row_too_many_is_stored"))
    for (unsigned i = 0; i < 4; ++i)
      y[(first_row + row) * kColumns + thread % 2 * 4 + i] =
          staging[row * kColumns + thread % 2 * 4 + i];
}

}  // namespace

int main() {
  cuda_on_host::Case it;
  const std::string bug = it.word("bug");
  const auto rows = static_cast<unsigned>(it.integer("rows"));
  const auto depth = static_cast<unsigned>(it.integer("depth"));
  cuda_on_host::launch((rows + kRows - 1) / kRows, bug == "a_lane_short" ? kThreads - 1 : kThreads,
                       kSharedBytes - (bug == "a_short_buffer" ? kStagingBytes + 16 : 0), product,
                       it.input<fp16>("a"), it.input<fp16>("b"),
                       it.output<float>("y", int64_t{rows} * kColumns), rows, depth, bug.c_str());
  return it.finish();
}
