// The 8-bit convolution by VPDPBUSD: each of 16 sums takes four products of u8 and s8 at once, so
// that a pass over the depth is a quarter as long as in fp32. The instruction does not saturate:
// sums are exact.
//
// Weights come as [depth / 4][NR][4], so that one vector holds four rows of 16 filters; four
// columns of a row of x are broadcast to all of them. 14 rows x 2 vectors of sums, 2 of weights and
// the broadcast use 31 of the 32 registers.
#include "band.h"
#include "int8_linear.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

// GCC 12 takes the intrinsics' own undefined operands for ours: gcc.gnu.org/PR105593.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace resnet_fast::cpu {
namespace {

#define RF_TARGET_AVX512VNNI \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi,bmi2")))

constexpr int kMaxRows = 14, kPacked = 2, kLanes = 16;

RF_TARGET_AVX512VNNI inline __m512 widen16(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

// Of the packed vectors the first kVectors count.
template <int MR, int kVectors>
RF_TARGET_AVX512VNNI void multiply_rows_int8(const RowsOf<uint8_t>& rows, const int8_t* packed,
                                             int64_t depth, const TileOut<uint8_t>& out) {
  __m512i acc[MR][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = _mm512_setzero_si512();
  }
  if (out.last) {
    for (int i = 0; i < MR; ++i) {
      if (out.residual != nullptr) __builtin_prefetch(out.residual + i * out.y_stride);
      __builtin_prefetch(out.y + i * out.y_stride, 1);
    }
  }
  const uint8_t* from = rows.at;
  for (int64_t left = depth; left > 0; left -= rows.run, from += rows.jump) {
    const int64_t count = std::min(left, rows.run);
    for (int64_t k = 0; k < count; k += 4) {
      __m512i b[kVectors];
      for (int v = 0; v < kVectors; ++v) b[v] = _mm512_loadu_si512(packed + 4 * v * kLanes);
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(packed + kAhead + 64 * v);
      packed += 4 * kPacked * kLanes;
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        int32_t four;
        std::memcpy(&four, from + i * rows.stride + k, sizeof(four));
        const __m512i a = _mm512_set1_epi32(four);
        for (int v = 0; v < kVectors; ++v) acc[i][v] = _mm512_dpbusd_epi32(acc[i][v], a, b[v]);
      }
    }
  }
  if (out.accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        const int32_t* before = out.sums + i * out.sums_stride + v * kLanes;
        acc[i][v] = _mm512_add_epi32(acc[i][v], _mm512_loadu_si512(before));
      }
    }
  }
  if (!out.last) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        _mm512_storeu_si512(out.sums + i * out.sums_stride + v * kLanes, acc[i][v]);
      }
    }
    return;
  }
  // The bounds lie between 0 and 255, so that the conversion to bytes has nothing to saturate.
  const __m512 low = _mm512_set1_ps(out.low), high = _mm512_set1_ps(out.high);
  const __m512 residual_scale = _mm512_set1_ps(out.residual_scale);
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const __m512 scale = _mm512_loadu_ps(out.scale + v * kLanes);
    const __m512 shift = _mm512_loadu_ps(out.shift + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const int64_t at = i * out.y_stride + v * kLanes;
      __m512 z = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][v]), scale, shift);
      if (out.residual != nullptr) {
        z = _mm512_fmadd_ps(widen16(out.residual + at), residual_scale, z);
      }
      z = _mm512_min_ps(high, _mm512_max_ps(low, z));
      const __m128i narrow = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(z));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out.y + at), narrow);
    }
  }
}

using MultiplyRowsInt8 = void (*)(const RowsOf<uint8_t>& rows, const int8_t* packed, int64_t depth,
                                  const TileOut<uint8_t>& out);

template <int kVectors>
constexpr auto kMultiplyRowsInt8 = []<int... R>(std::integer_sequence<int, R...>) {
  return std::array<MultiplyRowsInt8, sizeof...(R)>{&multiply_rows_int8<R + 1, kVectors>...};
}(std::make_integer_sequence<int, kMaxRows>{});

struct DirectVnni {
  using T = uint8_t;
  using Packed = int8_t;
  static constexpr bool kFinishes = true, kBlockStays = false;
  static constexpr int64_t kBlock = kPacked * kLanes, kPair = 4;
  // A filter's weights are few bytes: one panel, and windows of any depth can be read out of a
  // band.
  static constexpr int64_t kDepth = int64_t(1) << 20, kBandRows = 7;
  static constexpr int kRows = kMaxRows;
  static constexpr int64_t kChain = std::numeric_limits<int64_t>::max();  // sums are exact

  static void multiply(int64_t count, const RowsOf<uint8_t>& rows, const int8_t* packed,
                       int64_t depth, const TileOut<uint8_t>& out, bool half) {
    const auto& table = half ? kMultiplyRowsInt8<1> : kMultiplyRowsInt8<2>;
    table[count - 1](rows, packed, depth, out);
  }
};

}  // namespace

bool has_int8_vnni() {
  static const bool has = [] {
    __builtin_cpu_init();
    return current_isa() == Isa::avx512 && !is_plain_avx512() &&
           __builtin_cpu_supports("avx512vnni") != 0;
  }();
  return has;
}

int64_t int8_vnni_packed_size(int64_t filters, int64_t channels, int64_t taps, int64_t groups) {
  return direct_packed_size<DirectVnni>(filters, channels, taps, groups);
}

void pack_int8_vnni(const int8_t* from, int64_t filters, int64_t channels, int64_t taps,
                    int64_t groups, int8_t* to) {
  pack_direct<DirectVnni>(from, filters, channels, taps, groups, to);
}

void int8_vnni(const Geometry& g, const DirectOperands<uint8_t>& o) {
  if (reads_bands<DirectVnni>(g)) {
    return parallel_on<Isa::avx512>(band_tasks<DirectVnni>(g),
                                    [&](int64_t begin, int64_t end)
                                        RF_INLINE { direct_bands<DirectVnni>(g, o, begin, end); });
  }
  const DirectCut cut(g, DirectVnni::kBlock, worker_count());
  parallel_on<Isa::avx512>(g.groups * cut.chunks * cut.strips,
                           [&](int64_t begin, int64_t end)
                               RF_INLINE { direct_tasks<DirectVnni>(g, o, cut, begin, end); });
}

void int8_linear_vnni(const LinearOperands& o) {
  const int64_t blocks = (o.filters + DirectVnni::kBlock - 1) / DirectVnni::kBlock;
  parallel_on<Isa::avx512>(blocks, [&](int64_t begin, int64_t end)
                                       RF_INLINE { linear_tasks<DirectVnni>(o, begin, end); });
}

}  // namespace resnet_fast::cpu

#else

namespace resnet_fast::cpu {

bool has_int8_vnni() { return false; }
int64_t int8_vnni_packed_size(int64_t, int64_t, int64_t, int64_t) { return 0; }
void pack_int8_vnni(const int8_t*, int64_t, int64_t, int64_t, int64_t, int8_t*) {}
void int8_vnni(const Geometry&, const DirectOperands<uint8_t>&) {}
void int8_linear_vnni(const LinearOperands&) {}

}  // namespace resnet_fast::cpu

#endif
