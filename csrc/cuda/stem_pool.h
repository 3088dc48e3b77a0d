// Arguments and launch geometry of stem_pool: plain arithmetic, shared with the host tests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../math/activation.h"

namespace resnet_fast {

inline constexpr int kStemWarps = 4;
inline constexpr int kStemThreads = 32 * kStemWarps;
// Blocks that a multiprocessor holds at once: one loads while the other multiplies.
inline constexpr int kStemBlocks = 2;
// Pooled columns of a warp's product, whose 16 rows are two columns of the convolution for each.
inline constexpr int kStemPairs = 8;
// Filters of a block at most: the usual 64, for which the image is read once.
inline constexpr int kStemFilters = 64;
// Pixels of the image that a thread copies together; windows begin at a multiple of them.
inline constexpr int kStemChunk = 8;
// Outputs are staged in rows of 64 bytes, 16 apart so that eight of them meet different banks.
inline constexpr int kStemStagingRow = 80;
inline constexpr int kStemStaging = kStemPairs * kStemStagingRow;

// How an image is read: by vectors along pixels whose channels are adjacent, by vectors along the
// planes of its channels, or by element.
enum class StemAccess : int { pixels, planes, elements };

// Filters of a warp, whose weights its lanes hold: 28 words a channel of 32 in 16 bits, twice that
// in fp32. Those of four channels would leave too few registers for the sums.
RESNET_FAST_HD constexpr int stem_filters(int channels, int element_size) {
  return element_size == 2 && channels < 4 ? 32 : 16;
}

struct StemShape {
  int64_t batch;
  int height, width, filters;
  int rows, columns;                // of the convolution
  int pooled_rows, pooled_columns;  // of y

  StemShape(int64_t batch, int height, int width, int filters)
      : batch(batch),
        height(height),
        width(width),
        filters(filters),
        rows((height - 1) / 2 + 1),
        columns((width - 1) / 2 + 1),
        pooled_rows((rows - 1) / 2 + 1),
        pooled_columns((columns - 1) / 2 + 1) {}
};

// A block's share. It has `across` warps for slices of `filters`, and 4 / across for strips of
// `strip` pooled rows, one below the other, all of `tiles` times 8 pooled columns.
struct StemTiling {
  int strip, tiles, across, filters;

  RESNET_FAST_HD int rows() const { return kStemWarps / across * strip; }  // pooled rows
  // Of the image: four for each pooled one, and the reach of filter and pooling, from an even one.
  RESNET_FAST_HD int window_rows() const { return 4 * rows() + 8; }
  // Likewise, and up to half a chunk in front of the first column.
  RESNET_FAST_HD int chunks() const { return 4 * tiles + 2; }
};

// The first pooled column of a block, and the first that it stores: its left neighbour's last
// column of the convolution belongs to both, so that all but the first begin one early.
struct StemSpan {
  int first, stored;
};
RESNET_FAST_HD StemSpan stem_span(int index, int tiles) {
  const int first = index * (kStemPairs * tiles - 1);
  return {first, first + (index > 0)};
}
inline int stem_spans(int pooled_columns, int tiles) {
  const int step = kStemPairs * tiles - 1;
  return pooled_columns <= step + 1 ? 1 : (pooled_columns - 2) / step + 1;
}

// What follows from shape and tiling: the grid, and the offsets of a block's shared memory in
// bytes, in which the window takes the place of the filters when these are in registers.
struct StemGrid {
  int strips, spans, slices;  // of a block's rows, columns and filters
  int64_t blocks;             // strips and spans of all images
  int pitch;                  // of the window's rows, in bytes
  int affine, edges, staging, shared;

  StemGrid(const StemShape& shape, const StemTiling& t, int channels, int element_size)
      : strips((shape.pooled_rows - 1) / t.rows() + 1),
        spans(stem_spans(shape.pooled_columns, t.tiles)),
        slices((shape.filters - 1) / t.filters + 1),
        blocks(shape.batch * strips * spans) {
    const int chunk = kStemChunk * channels * element_size;
    pitch = chunk * t.chunks();
    const int window = pitch * t.window_rows(), weights = 7 * chunk * t.filters;
    affine = window > weights ? window : weights;
    edges = affine + 2 * 4 * t.filters;
    // The rightmost column of a tile, for the next one: a warp's filters in fp32, a strip's rows.
    staging = edges + 4 * t.filters / t.across * kStemWarps * t.strip;
    shared = staging + kStemStaging * kStemWarps;
  }
};

struct StemDevice {
  int multiprocessors;
  int shared_of_multiprocessor, shared_of_block;  // bytes at most

  // Shared memory at most of each of so many blocks on a multiprocessor, which keeps 1 KiB a block.
  int limit(int blocks) const {
    const int part = shared_of_multiprocessor / blocks - 1024;
    return part < shared_of_block ? part : shared_of_block;
  }
  // Blocks of `shared` bytes that run at once.
  int64_t resident(int shared) const {
    return int64_t{multiprocessors} * (shared <= limit(kStemBlocks) ? kStemBlocks : 1);
  }
};

// The tiling with the least to do for the block that does most, in products of a warp. Counted from
// the instructions, not measured: a chunk of the window takes a thread as long as 20 products, the
// filters 150, a strip's first and last rows one more row of the convolution.
inline StemTiling choose_stem_tiling(const StemShape& shape, int channels, int element_size,
                                     const StemDevice& device) {
  constexpr int kMaxStrip = 16, kMaxTiles = 16;
  const int filters = stem_filters(channels, element_size);
  int across = 1;
  while (across * filters < shape.filters && across * filters < kStemFilters) across *= 2;
  const int units = channels * element_size / 2;
  const int64_t products = int64_t{filters} / 8 * (3 * units + (units + 1) / 2);
  const int width = (shape.pooled_columns - 1) / kStemPairs + 1;

  StemTiling best{1, 1, across, across * filters};
  // Where the smallest tiling is too large for two blocks, there is one.
  for (int resident = kStemBlocks; resident > 0; --resident) {
    int64_t least = INT64_MAX;
    for (int strip = 1; strip <= kMaxStrip; ++strip) {
      for (int tiles = 1; tiles <= kMaxTiles && tiles <= width; ++tiles) {
        const StemTiling t{strip, tiles, across, across * filters};
        const StemGrid grid(shape, t, channels, element_size);
        if (grid.shared > device.limit(resident)) break;
        const int64_t passes = (grid.blocks * grid.slices - 1) / device.resident(grid.shared) + 1;
        const int64_t window = int64_t{t.chunks()} * t.window_rows() * 20 / kStemThreads;
        const int64_t cost = passes * (tiles * (2 * strip + 2) * products + window) + 150;
        if (cost < least) {
          least = cost;
          best = t;
        }
      }
      if (strip * kStemWarps / across >= shape.pooled_rows) break;
    }
    if (least < INT64_MAX) break;
  }
  return best;
}

// Strides in elements.
template <typename T>
struct StemArguments {
  const void* x;
  const T* weight;
  const float* scale;
  const float* shift;
  const float* input_scale;
  const float* input_shift;
  T* y;
  int64_t x_image, x_channel, x_row, x_column;
  int64_t w_filter, w_channel, w_row, w_column;
  StemShape shape;
  StemTiling tiling;
  StemGrid grid;
  bool raw;  // x is uint8, and not the products' type
  StemAccess access;
  bool channels_last;  // y
  Act act;
};

// The widest access that every chunk of x allows.
template <typename T>
StemAccess stem_access(const StemArguments<T>& a, int channels) {
  const unsigned bytes = a.raw ? 8 : 16;
  const int64_t lanes = a.raw ? 8 : 16 / static_cast<int64_t>(sizeof(T));
  const auto whole = [&](int64_t stride, int64_t extent) {
    return extent == 1 || stride % lanes == 0;
  };
  if (a.shape.width % kStemChunk != 0 || reinterpret_cast<uintptr_t>(a.x) % bytes != 0 ||
      !whole(a.x_image, a.shape.batch) || !whole(a.x_row, a.shape.height)) {
    return StemAccess::elements;
  }
  if (a.x_column == channels && (channels == 1 || a.x_channel == 1)) return StemAccess::pixels;
  const bool planes = a.x_column == 1 && whole(a.x_channel, channels);
  return planes ? StemAccess::planes : StemAccess::elements;
}

}  // namespace resnet_fast
