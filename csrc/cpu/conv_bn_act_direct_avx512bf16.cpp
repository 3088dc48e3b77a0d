// The direct convolution in bf16 by VDPBF16PS: each of 16 fp32 sums takes two products of bf16
// pairs at once, so that a pass over the depth is half as long as in fp32.
//
// Weights come as [depth / 2][NR][2], so that one vector holds the pairs of 16 filters; a pair of a
// row of x is broadcast to all of them. Sums, scale, shift, residual and activation are fp32, and
// the result is rounded once. 14 rows x 2 vectors of sums, 2 of weights and the pair use 31 of the
// 32 registers.
#include "band.h"
#include "direct.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

// GCC 12 takes the intrinsics' own undefined operands for ours: gcc.gnu.org/PR105593.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace resnet_fast::cpu {
namespace {

#define RF_TARGET_AVX512BF16 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2")))

constexpr int kMaxRows = 14, kPacked = 2, kLanes = 16;

RF_TARGET_AVX512BF16 inline __m512 widen16(const bf16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Of the packed vectors the first kVectors count.
template <int MR, int kVectors>
RF_TARGET_AVX512BF16 void multiply_rows_bf16(const RowsOf<bf16>& rows, const bf16* packed,
                                             int64_t depth, const TileOut<bf16>& out) {
  __m512 acc[MR][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = _mm512_setzero_ps();
  }
  if (out.last) {
    for (int i = 0; i < MR; ++i) {
      if (out.residual != nullptr) __builtin_prefetch(out.residual + i * out.y_stride);
      __builtin_prefetch(out.y + i * out.y_stride, 1);
    }
  }
  const bf16* from = rows.at;
  for (int64_t left = depth; left > 0; left -= rows.run, from += rows.jump) {
    const int64_t count = std::min(left, rows.run);
    for (int64_t k = 0; k < count; k += 2) {
      __m512bh b[kVectors];
      for (int v = 0; v < kVectors; ++v) std::memcpy(&b[v], packed + 2 * v * kLanes, sizeof(b[v]));
      for (int v = 0; v < kVectors; ++v) {
        __builtin_prefetch(reinterpret_cast<const char*>(packed) + kAhead + 64 * v);
      }
      packed += 2 * kPacked * kLanes;
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        int32_t pair;
        std::memcpy(&pair, from + i * rows.stride + k, sizeof(pair));
        const __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        for (int v = 0; v < kVectors; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], b[v], a);
      }
    }
  }
  if (out.accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        const float* before = out.sums + i * out.sums_stride + v * kLanes;
        acc[i][v] = _mm512_add_ps(acc[i][v], _mm512_loadu_ps(before));
      }
    }
  }
  if (!out.last) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        _mm512_storeu_ps(out.sums + i * out.sums_stride + v * kLanes, acc[i][v]);
      }
    }
    return;
  }
  const __m512 low = _mm512_set1_ps(out.low), high = _mm512_set1_ps(out.high);
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const __m512 scale = _mm512_loadu_ps(out.scale + v * kLanes);
    const __m512 shift = _mm512_loadu_ps(out.shift + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const int64_t at = i * out.y_stride + v * kLanes;
      __m512 z = _mm512_fmadd_ps(acc[i][v], scale, shift);
      if (out.residual != nullptr) z = _mm512_add_ps(z, widen16(out.residual + at));
      // min and max return their second operand where one is NaN: NaN stays.
      z = _mm512_min_ps(high, _mm512_max_ps(low, z));
      const __m256bh narrow = _mm512_cvtneps_pbh(z);
      std::memcpy(out.y + at, &narrow, sizeof(narrow));
    }
  }
}

using MultiplyRowsBf16 = void (*)(const RowsOf<bf16>& rows, const bf16* packed, int64_t depth,
                                  const TileOut<bf16>& out);

template <int kVectors>
constexpr auto kMultiplyRowsBf16 = []<int... R>(std::integer_sequence<int, R...>) {
  return std::array<MultiplyRowsBf16, sizeof...(R)>{&multiply_rows_bf16<R + 1, kVectors>...};
}(std::make_integer_sequence<int, kMaxRows>{});

struct DirectBf16 {
  using T = bf16;
  using Packed = bf16;
  static constexpr bool kFinishes = true, kBlockStays = false;
  static constexpr int64_t kBlock = kPacked * kLanes, kPair = 2;
  // One panel: windows of any depth can be read out of a band.
  static constexpr int64_t kDepth = int64_t(1) << 20, kBandRows = 7;
  static constexpr int kRows = kMaxRows;
  // A result is rounded to 8 bits: one chain's error is far below.
  static constexpr int64_t kChain = std::numeric_limits<int64_t>::max();

  static void multiply(int64_t count, const RowsOf<bf16>& rows, const bf16* packed, int64_t depth,
                       const TileOut<bf16>& out, bool half) {
    const auto& table = half ? kMultiplyRowsBf16<1> : kMultiplyRowsBf16<2>;
    table[count - 1](rows, packed, depth, out);
  }
};

}  // namespace

bool has_direct_bf16() {
  static const bool has = [] {
    __builtin_cpu_init();
    return current_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16") != 0;
  }();
  return has;
}

int64_t direct_bf16_packed_size(int64_t filters, int64_t channels, int64_t taps, int64_t groups) {
  return direct_packed_size<DirectBf16>(filters, channels, taps, groups);
}

void pack_direct_bf16(const bf16* from, int64_t filters, int64_t channels, int64_t taps,
                      int64_t groups, bf16* to) {
  pack_direct<DirectBf16>(from, filters, channels, taps, groups, to);
}

void direct(const Geometry& g, const DirectOperands<bf16>& o) {
  if (reads_bands<DirectBf16>(g)) {
    return parallel_on<Isa::avx512>(band_tasks<DirectBf16>(g),
                                    [&](int64_t begin, int64_t end)
                                        RF_INLINE { direct_bands<DirectBf16>(g, o, begin, end); });
  }
  const DirectCut cut(g, DirectBf16::kBlock, worker_count());
  parallel_on<Isa::avx512>(g.groups * cut.chunks * cut.strips,
                           [&](int64_t begin, int64_t end)
                               RF_INLINE { direct_tasks<DirectBf16>(g, o, cut, begin, end); });
}

}  // namespace resnet_fast::cpu

#else

namespace resnet_fast::cpu {

bool has_direct_bf16() { return false; }
int64_t direct_bf16_packed_size(int64_t, int64_t, int64_t, int64_t) { return 0; }
void pack_direct_bf16(const bf16*, int64_t, int64_t, int64_t, int64_t, bf16*) {}
void direct(const Geometry&, const DirectOperands<bf16>&) {}

}  // namespace resnet_fast::cpu

#endif
