// The 8-bit convolution of narrow groups by VPDPBUSD, which adds four products of bytes to each of
// 16 sums. Which four depends on the groups.
//
// Depthwise: four neighbouring columns of a line. Their bytes, 64 channels each, are interleaved
// once, and serve every window that lies within them, with weights shifted by the window's offset
// and zeros elsewhere (3 taps at stride 1):
//
//     columns   a b c d  ->  abcd abcd ... (channel by channel)    window 0:  w0 w1 w2  0
//                                                                  window 1:   0 w0 w1 w2
//
// Groups of 4, 8 or 16: four channels of a group, spread over the lanes of its filters by one
// permutation, as in fp32 (conv_bn_act_grouped.cpp).
#include "int8_band.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

// GCC 12 takes the intrinsics' own undefined operands for ours: gcc.gnu.org/PR105593.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace resnet_fast::cpu {
namespace {

#define RF_TARGET_AVX512VNNI \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi,bmi2")))

constexpr int64_t kBlock = 64;  // channels of a depthwise block: a vector of bytes
constexpr int kQuarters = 4;    // vectors of sums that it has
constexpr int kMostWindows = 4;
constexpr int64_t kLanes = 16;

// Columns come in fours; as many windows as lie within those of one share them.
int64_t fours_of(int64_t width) { return (width + 3) / 4; }
int64_t offsets_of(int64_t width) { return 4 * fours_of(width) - width + 1; }

// Scale and shift of a block in the order of its sums: quarter v has channels 16 i + 4 v + (0..3).
struct BlockScale {
  __m512 scale[kQuarters], shift[kQuarters];
};

RF_TARGET_AVX512VNNI BlockScale block_scale(const float* scale, const float* shift, int64_t count) {
  alignas(64) float values[2][kBlock] = {};
  std::copy_n(scale, count, values[0]);
  std::copy_n(shift, count, values[1]);
  BlockScale block;
  for (int v = 0; v < kQuarters; ++v) {
    alignas(64) float ordered[2][kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 2; ++i) ordered[i][lane] = values[i][lane / 4 * 16 + v * 4 + lane % 4];
    }
    block.scale[v] = _mm512_load_ps(ordered[0]);
    block.shift[v] = _mm512_load_ps(ordered[1]);
  }
  return block;
}

// Adds the products of kWindows windows, `offset` columns apart, over one line's four columns.
template <int kWindows>
RF_TARGET_AVX512VNNI inline void add_columns(const uint8_t* from, int64_t column, __mmask64 mask,
                                             const int8_t* packed, int64_t offset,
                                             __m512i (&acc)[kWindows][kQuarters]) {
  const __m512i c0 = _mm512_maskz_loadu_epi8(mask, from);
  const __m512i c1 = _mm512_maskz_loadu_epi8(mask, from + column);
  const __m512i c2 = _mm512_maskz_loadu_epi8(mask, from + 2 * column);
  const __m512i c3 = _mm512_maskz_loadu_epi8(mask, from + 3 * column);
  const __m512i low01 = _mm512_unpacklo_epi8(c0, c1), high01 = _mm512_unpackhi_epi8(c0, c1);
  const __m512i low23 = _mm512_unpacklo_epi8(c2, c3), high23 = _mm512_unpackhi_epi8(c2, c3);
  const __m512i x[kQuarters] = {
      _mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
      _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
#pragma GCC unroll 4
  for (int p = 0; p < kWindows; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kQuarters; ++v) {
      const int8_t* w = packed + p * offset + v * 64;
      acc[p][v] = _mm512_dpbusd_epi32(acc[p][v], x[v], _mm512_loadu_si512(w));
    }
  }
}

// kWindows neighbouring outputs of a block of channels.
template <int kWindows>
RF_TARGET_AVX512VNNI void depthwise_tile(const Geometry& g, const Int8Band& band,
                                         const uint8_t* from, const int8_t* packed,
                                         const BlockScale& block, const Clamp& clamp,
                                         int64_t channels, uint8_t* y, int32_t* sums) {
  const int64_t fours = fours_of(g.kernel[2]), offsets = offsets_of(g.kernel[2]);
  const int64_t column = g.dilation[2] * g.channels;
  const __mmask64 mask = channels >= kBlock ? ~__mmask64(0) : (__mmask64(1) << channels) - 1;
  __m512i acc[kWindows][kQuarters];
#pragma GCC unroll 4
  for (int p = 0; p < kWindows; ++p) {
    for (int v = 0; v < kQuarters; ++v) acc[p][v] = _mm512_setzero_si512();
  }
  for (int64_t i = 0; i < g.kernel[1]; ++i) {
    for (int64_t q = 0; q < fours; ++q) {
      add_columns<kWindows>(from + i * band.line + 4 * q * column, column, mask,
                            packed + (i * fours + q) * offsets * 4 * kBlock,
                            g.stride[2] * 4 * kBlock, acc);
    }
  }
  if (sums != nullptr) {  // another activation, or a residual: finished outside
    for (int p = 0; p < kWindows; ++p) {
      alignas(64) int32_t values[kBlock];
#pragma GCC unroll 4
      for (int v = 0; v < kQuarters; ++v) {
        const __m512i a = acc[p][v];
        auto* const to = reinterpret_cast<__m128i*>(values + 4 * v);
        _mm_store_si128(to, _mm512_castsi512_si128(a));
        _mm_store_si128(to + 4, _mm512_extracti32x4_epi32(a, 1));
        _mm_store_si128(to + 8, _mm512_extracti32x4_epi32(a, 2));
        _mm_store_si128(to + 12, _mm512_extracti32x4_epi32(a, 3));
      }
      std::copy_n(values, std::min(kBlock, channels), sums + p * g.channels);
    }
    return;
  }
  const __m512 low = _mm512_set1_ps(clamp.low), high = _mm512_set1_ps(clamp.high);
#pragma GCC unroll 4
  for (int p = 0; p < kWindows; ++p) {
    __m512i z[kQuarters];
#pragma GCC unroll 4
    for (int v = 0; v < kQuarters; ++v) {
      const __m512 real =
          _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[p][v]), block.scale[v], block.shift[v]);
      z[v] = _mm512_cvtps_epi32(_mm512_min_ps(high, _mm512_max_ps(low, real)));
    }
    const __m512i bytes =
        _mm512_packus_epi16(_mm512_packs_epi32(z[0], z[1]), _mm512_packs_epi32(z[2], z[3]));
    _mm512_mask_storeu_epi8(y + p * g.channels, mask, bytes);
  }
}

using DepthwiseTile = void (*)(const Geometry&, const Int8Band&, const uint8_t*, const int8_t*,
                               const BlockScale&, const Clamp&, int64_t, uint8_t*, int32_t*);
constexpr DepthwiseTile kDepthwiseTiles[kMostWindows] = {&depthwise_tile<1>, &depthwise_tile<2>,
                                                         &depthwise_tile<3>, &depthwise_tile<4>};

void depthwise_line(const Geometry& g, const DirectOperands<uint8_t>& o, const Int8Band& band,
                    const Clamp& clamp, int64_t windows, int64_t at, int32_t* sums) {
  const int64_t block_size = g.kernel[1] * fours_of(g.kernel[2]) * offsets_of(g.kernel[2]) * 4;
  for (int64_t c = 0; c < g.channels; c += kBlock) {
    const int64_t channels = std::min(kBlock, g.channels - c);
    const BlockScale block = block_scale(o.scale + c, o.shift + c, channels);
    const int8_t* packed = static_cast<const int8_t*>(o.packed) + c * block_size;
    for (int64_t w = 0; w < g.out[2]; w += windows) {
      const int64_t count = std::min(windows, g.out[2] - w);
      kDepthwiseTiles[count - 1](g, band, band.at + w * band.step + c, packed, block, clamp,
                                 channels, o.y + at + w * g.channels + c,
                                 sums == nullptr ? nullptr : sums + w * g.channels + c);
    }
  }
}

// kPixels neighbouring outputs of 16 filters: whole groups, of `quads` times four channels.
template <int kPixels>
RF_TARGET_AVX512VNNI void quads_tile(const Geometry& g, const Int8Band& band, const uint8_t* from,
                                     const int8_t* packed, const int32_t* firsts, int64_t quads,
                                     int32_t* sums) {
  const __m512i one = _mm512_set1_epi32(1);
  __m512i acc[kPixels];
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) acc[p] = _mm512_setzero_si512();
  for (int64_t i = 0; i < g.kernel[1]; ++i) {
    for (int64_t j = 0; j < g.kernel[2]; ++j) {
      const uint8_t* at = from + i * band.line + j * g.dilation[2] * g.channels;
      __m512i x[kPixels];
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p) {
        const auto* bytes = reinterpret_cast<const __m128i*>(at + p * band.step);
        x[p] = _mm512_castsi128_si512(_mm_loadu_si128(bytes));
      }
      __m512i index = _mm512_load_si512(firsts);
      for (int64_t q = 0; q < quads; ++q, packed += 64) {
        const __m512i w = _mm512_loadu_si512(packed);
#pragma GCC unroll 8
        for (int p = 0; p < kPixels; ++p) {
          acc[p] = _mm512_dpbusd_epi32(acc[p], _mm512_permutexvar_epi32(index, x[p]), w);
        }
        index = _mm512_add_epi32(index, one);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) _mm512_storeu_si512(sums + p * g.channels, acc[p]);
}

constexpr int64_t kPixels = 7;  // outputs that share a weight: divides the lines of usual images

using QuadsTile = void (*)(const Geometry&, const Int8Band&, const uint8_t*, const int8_t*,
                           const int32_t*, int64_t, int32_t*);
constexpr auto kQuadsTiles = []<int... P>(std::integer_sequence<int, P...>) {
  return std::array<QuadsTile, sizeof...(P)>{&quads_tile<P + 1>...};
}(std::make_integer_sequence<int, kPixels>{});

void quads_line(const Geometry& g, const DirectOperands<uint8_t>& o, const Int8Band& band,
                int32_t* sums) {
  const int64_t channels = g.group_channels(), quads = channels / 4;
  alignas(64) int32_t firsts[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) firsts[lane] = int32_t(lane / channels * quads);
  for (int64_t c = 0; c < g.channels; c += kLanes) {
    const int8_t* packed = static_cast<const int8_t*>(o.packed) + c * channels * g.taps();
    for (int64_t w = 0; w < g.out[2]; w += kPixels) {
      const int64_t count = std::min(kPixels, g.out[2] - w);
      kQuadsTiles[count - 1](g, band, band.at + w * band.step + c, packed, firsts, quads,
                             sums + w * g.channels + c);
    }
  }
}

}  // namespace

int64_t int8_depthwise_vnni_size(int64_t filters, int64_t height, int64_t width) {
  const int64_t blocks = (filters + kBlock - 1) / kBlock;
  return blocks * kBlock * height * fours_of(width) * offsets_of(width) * 4;
}

// [block][line][four][offset][quarter][lane][column of the four].
void pack_int8_depthwise_vnni(const int8_t* from, int64_t filters, int64_t height, int64_t width,
                              int8_t* to) {
  const int64_t fours = fours_of(width), offsets = offsets_of(width);
  for (int64_t c = 0; c < (filters + kBlock - 1) / kBlock * kBlock; c += kBlock) {
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t q = 0; q < fours; ++q) {
        for (int64_t p = 0; p < offsets; ++p) {
          for (int64_t byte = 0; byte < 4 * kBlock; ++byte) {
            const int64_t quarter = byte / 64, lane = byte % 64 / 4, j = 4 * q + byte % 4 - p;
            const int64_t k = c + lane / 4 * 16 + quarter * 4 + lane % 4;
            const bool inside = k < filters && j >= 0 && j < width;
            *to++ = inside ? from[(k * height + i) * width + j] : int8_t(0);
          }
        }
      }
    }
  }
}

void int8_depthwise_vnni(const Geometry& g, const DirectOperands<uint8_t>& o) {
  // Windows that share columns: where their distance is one of whole columns.
  const int64_t shared =
      g.dilation[2] == 1 ? (offsets_of(g.kernel[2]) - 1) / g.stride[2] + 1 : int64_t(1);
  const int64_t windows = std::min<int64_t>(shared, kMostWindows);
  const Clamp clamp = o.clamp();
  const bool in_registers = clamp.is_clamp && o.residual == nullptr;
  const int64_t extra = 4 * fours_of(g.kernel[2]) * g.dilation[2];
  parallel_on<Isa::avx512>(int8_band_tasks(g), [&](int64_t begin, int64_t end) RF_INLINE {
    thread_local Scratch memory;
    int32_t* sums = in_registers ? nullptr : memory.get<int32_t>(g.out[2] * g.channels);
    each_int8_line(g, o, begin, end, extra,
                   [&](const Int8Band& band, int64_t n, int64_t h) RF_INLINE {
                     const int64_t at = (n * g.out[1] + h) * g.out[2] * g.channels;
                     depthwise_line(g, o, band, clamp, windows, at, sums);
                     if (sums != nullptr) {
                       finish_rows(o, g.channels, g.out[2], g.channels, sums, g.channels, 0, at);
                     }
                   });
  });
}

// [16 filters][tap][quad][filter][channel of the quad], from [K][C / groups][taps].
void pack_int8_quads_vnni(const int8_t* from, int64_t filters, int64_t channels, int64_t taps,
                          int8_t* to) {
  for (int64_t c = 0; c < filters; c += kLanes) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t q = 0; q < channels; q += 4) {
        for (int64_t byte = 0; byte < 4 * kLanes; ++byte) {
          *to++ = from[((c + byte / 4) * channels + q + byte % 4) * taps + tap];
        }
      }
    }
  }
}

void int8_quads_vnni(const Geometry& g, const DirectOperands<uint8_t>& o) {
  parallel_on<Isa::avx512>(int8_band_tasks(g), [&](int64_t begin, int64_t end) RF_INLINE {
    thread_local Scratch memory;
    auto* const sums = memory.get<int32_t>(g.out[2] * g.channels);
    each_int8_line(g, o, begin, end, 0, [&](const Int8Band& band, int64_t n, int64_t h) RF_INLINE {
      quads_line(g, o, band, sums);
      const int64_t at = (n * g.out[1] + h) * g.out[2] * g.channels;
      finish_rows(o, g.channels, g.out[2], g.channels, sums, g.channels, 0, at);
    });
  });
}

}  // namespace resnet_fast::cpu

#else

namespace resnet_fast::cpu {

int64_t int8_depthwise_vnni_size(int64_t, int64_t, int64_t) { return 0; }
void pack_int8_depthwise_vnni(const int8_t*, int64_t, int64_t, int64_t, int8_t*) {}
void int8_depthwise_vnni(const Geometry&, const DirectOperands<uint8_t>&) {}
void pack_int8_quads_vnni(const int8_t*, int64_t, int64_t, int64_t, int8_t*) {}
void int8_quads_vnni(const Geometry&, const DirectOperands<uint8_t>&) {}

}  // namespace resnet_fast::cpu

#endif
