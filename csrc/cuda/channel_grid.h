// Launch geometry of the reductions over a channel: plain integer arithmetic, shared with the
// tests.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "grid.h"

namespace resnet_fast {

inline int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Adjacent columns that a block of the channels-last reduction takes: a warp's 512 bytes.
inline constexpr int64_t kTile = 32;

// Channels-last memory is a matrix of vectors: `columns` are after how many vectors the channels
// repeat. Where the lanes divide the channels, a row is a pixel; else it is several, and holds
// `copies` values of each channel. A block has tile * rows threads, `rows` a power of two.
struct ColumnGrid {
  int64_t columns, copies;
  int64_t tile, rows;
  int64_t tiles, splits;  // the grid

  int64_t threads() const { return tile * rows; }
  int64_t partials() const { return splits * copies; }  // of each channel
};

// `unroll` vectors are loaded at a time. A block takes two such steps at least: a partial of 16
// bytes is written and read for each channel of a block.
inline ColumnGrid column_grid(int64_t numel, int64_t channels, int64_t lanes, int64_t unroll,
                              int64_t resident) {
  ColumnGrid g{};
  g.columns = channel_period(channels, lanes);
  g.copies = g.columns * lanes / channels;
  g.tiles = divide_up(g.columns, kTile);
  g.tile = divide_up(g.columns, g.tiles);
  g.rows = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(kThreads / g.tile)));
  const int64_t depth = divide_up(numel / lanes, g.columns);
  const int64_t needed = divide_up(depth, 2 * g.rows * unroll);
  g.splits = std::clamp<int64_t>(resident / g.tiles, 1, needed);
  return g;
}

// A channel's values in channels-first memory are `batch` planes, each of which touches at most
// `vectors` vectors, the first and the last perhaps shared with its neighbours.
struct PlaneGrid {
  int64_t vectors;
  int64_t threads, splits;  // the grid is channels * splits
};

// More blocks than are resident, so that those of the last wave, of one size, leave little idle.
inline constexpr int64_t kWaves = 4;

inline PlaneGrid plane_grid(int64_t batch, int64_t channels, int64_t plane, int64_t lanes,
                            int64_t unroll, int64_t resident) {
  PlaneGrid g{};
  // Planes start at multiples of what their size has in common with a vector.
  g.vectors = divide_up(plane + lanes - std::gcd(plane, lanes), lanes);
  const int64_t steps = divide_up(batch * g.vectors, unroll);
  const int64_t wanted = std::min<int64_t>(steps, kThreads);
  g.threads = std::max<int64_t>(std::bit_ceil(static_cast<uint64_t>(wanted)), 32);
  const int64_t needed = divide_up(steps, g.threads);
  g.splits = std::clamp<int64_t>(divide_up(kWaves * resident, channels), 1, needed);
  return g;
}

// Threads that share the partial sums of a channel in the finishing kernel, a power of two.
inline int64_t finish_rows(int64_t partials) {
  return static_cast<int64_t>(
      std::bit_floor(static_cast<uint64_t>(std::min<int64_t>(partials, 32))));
}

// Shared memory of combine_rows: the sums of a thread, and its count.
inline size_t combine_bytes(int64_t threads, size_t sums, size_t count) {
  return static_cast<size_t>(threads) * (sums + count);
}

}  // namespace resnet_fast
