// The direct convolution of few channels: windows read in place, out of a padded band.
//
// A stem's windows overlap: gathered as rows of a matrix (direct.h), 7x7 windows at stride 2 are
// twelve copies of the image, a quarter of the layer's time. In a copy with its padding written
// out, a line of a window is a run of memory, and the next window starts stride * C further on:
//
//      band: lines of (padding, image line, padding)         rows of the product, read in place
//     +--------------------------------------------+
//     | [ run of window 0 ]                        |         row 0 = its runs, one a line
//     |       [ run of window 1 ]                  |   ==>   row 1 = the same, stride * C on
//     |             [ run of window 2 ]            |         ...
//     +--------------------------------------------+
//
// A task copies the lines that a few lines of output need, and multiplies them with all filters.
#pragma once

#include "direct.h"

namespace resnet_fast::cpu {

// Whether the windows are worth reading this way.
inline bool reads_bands(const Geometry& g) {
  return g.groups == 1 && g.in[0] == 1 && g.kernel[0] == 1 && g.padding[0] == 0 && g.taps() > 1 &&
         g.dilation[2] == 1 && g.channels < kBandChannels && g.depth() <= Panel<float>::kDepth;
}

// The same for a kernel of one panel: with more channels, too, as gathering the windows of 64 costs
// a 3x3 convolution of bytes a third of its time. Where lines are shorter than tiles, tiles of
// several lines win.
template <typename K>
bool reads_bands(const Geometry& g) {
  const int64_t tiles = (g.out[2] + K::kRows - 1) / K::kRows;
  const bool fills_tiles = 5 * g.out[2] >= 4 * tiles * K::kRows;
  return reads_bands(g) ||
         (g.groups == 1 && g.in[0] == 1 && g.kernel[0] == 1 && g.padding[0] == 0 && g.taps() > 1 &&
          g.dilation[2] == 1 && g.channels % K::kPair == 0 && fills_tiles);
}

template <typename K>
int64_t band_tasks(const Geometry& g) {
  return g.batch * ((g.out[1] + K::kBandRows - 1) / K::kBandRows);
}

// Line `h` of an image, from `padding` columns before it on, as `length` values.
// From a planar image it is put together channel by channel: the one pass that the copy is anyway.
// A pixel takes `wide` values there, the ones beyond its channels zero.
template <typename T>
RF_INLINE inline void padded_line(const Geometry& g, const T* image, bool planar, int64_t h,
                                  int64_t wide, int64_t length, T outside, T* to) {
  if (h < 0 || h >= g.in[1]) return std::fill_n(to, length, outside), void();
  const int64_t channels = g.channels, width = g.in[2], step = planar ? 1 : g.x_step();
  const int64_t before = std::min(length, g.padding[2] * wide);
  // `length` ends with a whole window: with a whole pixel.
  const int64_t pixels = std::min((length - before) / wide, width), inside = pixels * wide;
  std::fill_n(to, before, outside);
  std::fill_n(to + before + inside, length - before - inside, outside);
  to += before;
  if (!planar && wide == channels) {
    const T* from = image + h * width * step;
    if (step == channels) return std::memcpy(to, from, size_t(inside) * sizeof(T)), void();
    for (int64_t w = 0; w < pixels; ++w) {
      std::memcpy(to + w * wide, from + w * step, size_t(channels) * sizeof(T));
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const T* from = image + (planar ? (c * g.in[1] + h) * width : h * width * step + c);
    for (int64_t w = 0; w < pixels; ++w) to[w * wide + c] = from[w * step];
  }
  for (int64_t c = channels; c < wide; ++c) {
    for (int64_t w = 0; w < pixels; ++w) to[w * wide + c] = T{};
  }
}

template <typename K>
RF_INLINE inline void direct_bands(const Geometry& g, const DirectOperands<typename K::T>& o,
                                   int64_t begin, int64_t end) {
  using T = typename K::T;
  constexpr int64_t NR = K::kBlock, kBandRows = K::kBandRows;
  constexpr int kRows = K::kRows;
  thread_local Scratch band_memory;
  const int64_t bands = (g.out[1] + kBandRows - 1) / kBandRows;
  const int64_t wide = band_channels<K>(g.channels), depth = g.taps() * wide;
  const bool packed_apart = band_depth<K>(g.channels, g.taps()) > 0;
  const int64_t size = group_packed_size<K>(g.filters, g.channels, g.taps());
  const auto* packed = static_cast<const typename K::Packed*>(o.packed) + (packed_apart ? size : 0);
  const int64_t step = g.stride[2] * wide, run = g.kernel[2] * wide;
  const int64_t length = (g.out[2] - 1) * step + run;
  const int64_t lines = (kBandRows - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1;
  T* band = band_memory.get<T>(lines * length);
  alignas(64) typename SumOf<T>::type sums[kRows * NR];
  const Clamp clamp = o.clamp();
  const int64_t pieces = (g.out[2] + kRows - 1) / kRows;
  const Cut piece_cut(g.out[2], pieces);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / bands, h0 = task % bands * kBandRows;
    const int64_t h1 = std::min(g.out[1], h0 + kBandRows);
    const T* image = o.x + n * g.in[1] * g.in[2] * g.x_step();
    const int64_t used = (h1 - h0 - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1;
    for (int64_t line = 0; line < used; ++line) {
      const int64_t h = h0 * g.stride[1] - g.padding[1] + line;
      padded_line(g, image, o.planar, h, wide, length, o.outside(), band + line * length);
    }
    for (int64_t k0 = 0; k0 < g.filters; k0 += NR) {
      const int64_t columns = std::min(NR, g.filters - k0);
      const bool half = columns <= NR / 2;
      const bool whole = K::kFinishes && columns == (half ? NR / 2 : NR) && clamp.is_clamp;
      TileOut<T> out{};
      out.sums = sums;
      out.sums_stride = NR;
      out.chain = K::kChain;
      out.last = whole;
      out.scale = o.scale + k0;
      out.shift = o.shift + k0;
      out.y_stride = g.y_step();
      out.low = clamp.low;
      out.high = clamp.high;
      out.residual_scale = o.grid.residual;
      for (int64_t h = h0; h < h1; ++h) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t w = piece_cut.at(piece), rows = piece_cut.at(piece + 1) - w;
          const int64_t at = ((n * g.out[1] + h) * g.out[2] + w) * g.y_step() + k0;
          const T* from = band + (h - h0) * g.stride[1] * length + w * step;
          out.y = o.y + at;
          out.residual = o.residual == nullptr ? nullptr : o.residual + at;
          K::multiply(rows, {from, step, run, g.dilation[1] * length}, packed + k0 * depth, depth,
                      out, half);
          if (!whole) {
            finish_rows<K::kFinishes ? NR : 0>(o, g.y_step(), rows, columns, sums, NR, k0, at);
          }
        }
      }
    }
  }
}

}  // namespace resnet_fast::cpu
