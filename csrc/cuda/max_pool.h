// Launch geometry of max_pool: plain arithmetic, shared with the host tests.
#pragma once

#include <cstdint>

#include "../math/activation.h"

namespace resnet_fast {

// Of tensors whose channels are adjacent. Contiguous ones are such tensors, of one channel.
struct PoolShape {
  int64_t images;
  int channels, height, width;
  int rows, columns;  // of the pooled map
  int strip;          // pooled rows of a thread

  PoolShape(int64_t images, int channels, int height, int width)
      : images(images),
        channels(channels),
        height(height),
        width(width),
        rows((height - 1) / 2 + 1),
        columns((width - 1) / 2 + 1),
        strip(1) {}

  RESNET_FAST_HD int strips() const { return (rows - 1) / strip + 1; }
  int64_t threads(int lanes) const { return images * strips() * columns * (channels / lanes); }

  // As long a strip, up to 8 rows, as leaves `wanted` threads: each reads a row of windows twice.
  void choose_strip(int lanes, int64_t wanted) {
    strip = 8;
    while (strip > 1 && threads(lanes) < wanted) strip /= 2;
  }
};

}  // namespace resnet_fast
