// The tasks of 8-bit convolutions whose lanes are neighbouring channels: some lines of output each,
// for which the lines of x are copied with their padding written out (band.h), so that every window
// is read in the same way.
#pragma once

#include "band.h"
#include "int8.h"

namespace resnet_fast::cpu {

constexpr int64_t kInt8Lines = 4;

inline int64_t int8_band_tasks(const Geometry& g) {
  return g.batch * ((g.out[1] + kInt8Lines - 1) / kInt8Lines);
}

// What a kernel reads of a task: `at` is the window of output (h, 0), a line of it `line` values
// long, neighbouring windows `step` apart.
struct Int8Band {
  const uint8_t* at;
  int64_t line, step;
};

// f(band, n, h) for each line of output of the tasks. `extra` columns beyond the last window may be
// read; they hold anything.
template <typename F>
RF_INLINE inline void each_int8_line(const Geometry& g, const DirectOperands<uint8_t>& o,
                                     int64_t begin, int64_t end, int64_t extra, const F& f) {
  thread_local Scratch memory;
  const int64_t channels = g.channels, step = g.stride[2] * channels;
  const int64_t windows =
      (g.out[2] - 1) * step + ((g.kernel[2] - 1) * g.dilation[2] + 1) * channels;
  const int64_t length = windows + extra * channels;
  const int64_t bands = (g.out[1] + kInt8Lines - 1) / kInt8Lines;
  const int64_t lines = (kInt8Lines - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1;
  auto* const band = memory.get<uint8_t>(lines * length + 64);  // a vector may begin at the last
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / bands, h0 = task % bands * kInt8Lines;
    const int64_t h1 = std::min(g.out[1], h0 + kInt8Lines);
    const uint8_t* image = o.x + n * g.in[1] * g.in[2] * channels;
    const int64_t used = (h1 - h0 - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1;
    for (int64_t line = 0; line < used; ++line) {
      const int64_t h = h0 * g.stride[1] - g.padding[1] + line;
      padded_line(g, image, false, h, channels, windows, o.outside(), band + line * length);
    }
    for (int64_t h = h0; h < h1; ++h) {
      f(Int8Band{band + (h - h0) * g.stride[1] * length, g.dilation[1] * length, step}, n, h);
    }
  }
}

}  // namespace resnet_fast::cpu
