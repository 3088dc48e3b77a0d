// Memory for outputs that the next layers and the next forward use again.
//
// malloc returns large blocks to the system and takes them anew, zeroed page by page, at every
// layer: measured at a quarter of a ResNet-50 forward at batch 16. The pool keeps them instead.
#pragma once

#include <cstddef>
#include <vector>

#include "../stable.h"

namespace resnet_fast::cpu {

// An uninitialised CPU tensor in channels-last memory (rank 4 or 5), of the dtype of `like`:
// float32, 16 or 8 bits. From `kPooledBytes` on its memory comes from the pool, and goes back when
// the last tensor over it dies.
Tensor empty_channels_last(const std::vector<int64_t>& shape, const Tensor& like);

// The same for `count` values of packed weights, which outlive every output: large pages spare the
// product a walk of the page table every 4 KiB.
Tensor empty_packed(int64_t count, ScalarType dtype, const Tensor& device_of);

// The same for `count` values of what a whole call keeps, which it gives back as it ends.
Tensor empty_arena(int64_t count, ScalarType dtype, const Tensor& device_of);

// Gives the unused blocks back to the system, and what malloc has free; returns the blocks' bytes.
int64_t release_pools();

}  // namespace resnet_fast::cpu
