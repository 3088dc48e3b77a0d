// Launch geometry: plain integer arithmetic, shared with the host tests.
#pragma once

#include <cstdint>
#include <numeric>

#include "vector.cuh"

namespace resnet_fast {

// Blocks for a grid-stride loop over `vectors`. `resident` blocks fill the device once; more would
// only queue. With `period` > 1, either the thread count is a multiple of period or no thread takes
// a second step, so that index modulo period is constant for a thread.
inline int64_t grid_for(int64_t vectors, int64_t resident, int64_t period = 1) {
  const int64_t multiple = period / std::gcd(period, static_cast<int64_t>(kThreads));
  const int64_t wanted = (resident + multiple - 1) / multiple * multiple;
  const int64_t needed = vectors / kThreads + (vectors % kThreads != 0);
  const int64_t blocks = needed < wanted ? needed : wanted;
  return blocks > 0 ? blocks : 1;
}

// Threads after which the channels of LANES adjacent elements repeat, channel fastest.
inline int64_t channel_period(int64_t channels, int64_t lanes) {
  return channels / std::gcd(channels, lanes);
}

// The unsigned indices of a kernel reach numel plus one step, below 2^32 while numel < 2^31.
inline bool fits_32_bits(int64_t numel) { return numel < (int64_t{1} << 31); }

// A view that starts inside a storage may be misaligned; it then takes the scalar kernel.
template <typename... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kVectorBytes == 0) && ...);
}

}  // namespace resnet_fast
