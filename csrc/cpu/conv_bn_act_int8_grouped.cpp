// The 8-bit convolution of narrow groups: which kernel takes them, and the depthwise one for CPUs
// without an instruction for products of bytes.
#include "int8_band.h"

namespace resnet_fast::cpu {
namespace {

bool is_depthwise(int64_t filters, int64_t channels, int64_t groups) {
  return groups > 1 && channels == 1 && filters == groups;
}

constexpr int64_t kBlock = 32;  // channels whose sums stay in the first-level cache

// Loops for the compiler to vectorise: lanes are neighbouring channels.
RF_INLINE inline void depthwise_line(const Geometry& g, const Int8Band& band, const int8_t* packed,
                                     int32_t* sums) {
  for (int64_t w = 0; w < g.out[2]; ++w, sums += g.channels) {
    for (int64_t c = 0; c < g.channels; c += kBlock) {
      const int64_t count = std::min(kBlock, g.channels - c);
      int32_t acc[kBlock] = {};
      const int8_t* factor = packed + c;
      for (int64_t i = 0; i < g.kernel[1]; ++i) {
        for (int64_t j = 0; j < g.kernel[2]; ++j, factor += g.channels) {
          const uint8_t* __restrict x =
              band.at + w * band.step + i * band.line + j * g.dilation[2] * g.channels + c;
          if (count == kBlock) {
            for (int64_t k = 0; k < kBlock; ++k) acc[k] += int32_t(x[k]) * int32_t(factor[k]);
          } else {
            for (int64_t k = 0; k < count; ++k) acc[k] += int32_t(x[k]) * int32_t(factor[k]);
          }
        }
      }
      std::copy_n(acc, count, sums + c);
    }
  }
}

void depthwise(const Geometry& g, const DirectOperands<uint8_t>& o) {
  run_on_isa([&](auto isa) {
    parallel_on<decltype(isa)::value>(
        int8_band_tasks(g), [&](int64_t begin, int64_t end) RF_INLINE {
          thread_local Scratch memory;
          auto* const sums = memory.get<int32_t>(g.out[2] * g.channels);
          const auto* const packed = static_cast<const int8_t*>(o.packed);
          each_int8_line(
              g, o, begin, end, 0, [&](const Int8Band& band, int64_t n, int64_t h) RF_INLINE {
                depthwise_line(g, band, packed, sums);
                const int64_t at = (n * g.out[1] + h) * g.out[2] * g.channels;
                finish_rows(o, g.channels, g.out[2], g.channels, sums, g.channels, 0, at);
              });
        });
  });
}

}  // namespace

bool is_int8_narrow(int64_t filters, int64_t channels, int64_t groups) {
  if (is_depthwise(filters, channels, groups)) return true;
  // Whole groups of as many filters as channels, in quads of channels, to a vector of 16 filters.
  const bool fits = channels == 4 || channels == 8 || channels == 16;
  return has_int8_vnni() && groups > 1 && fits && filters == groups * channels && filters % 16 == 0;
}

int64_t int8_narrow_packed_size(int64_t filters, int64_t channels, int64_t height, int64_t width) {
  if (channels > 1) return filters * channels * height * width;
  return has_int8_vnni() ? int8_depthwise_vnni_size(filters, height, width)
                         : filters * height * width;
}

void pack_int8_narrow(const int8_t* from, int64_t filters, int64_t channels, int64_t height,
                      int64_t width, int8_t* to) {
  const int64_t taps = height * width;
  if (channels > 1) return pack_int8_quads_vnni(from, filters, channels, taps, to);
  if (has_int8_vnni()) return pack_int8_depthwise_vnni(from, filters, height, width, to);
  for (int64_t k = 0; k < filters; ++k) {
    for (int64_t tap = 0; tap < taps; ++tap) to[tap * filters + k] = from[k * taps + tap];
  }
}

void int8_narrow(const Geometry& g, const DirectOperands<uint8_t>& o) {
  if (g.group_channels() > 1) return int8_quads_vnni(g, o);
  if (has_int8_vnni()) return int8_depthwise_vnni(g, o);
  depthwise(g, o);
}

}  // namespace resnet_fast::cpu
