// The product of direct.h for a linear layer of bytes: rows are in memory as they are multiplied,
// and the sums become fp32.
#pragma once

#include "int8.h"

namespace resnet_fast::cpu {

struct LinearOperands {
  int64_t rows, depth, filters;
  const uint8_t* x;  // [rows][depth]
  const int8_t* packed;
  const float *scale, *shift;
  float* y;  // [rows][filters]
};

// Blocks of filters from `begin` on: each weight is read once for up to kRows rows.
template <typename K>
RF_INLINE inline void linear_tasks(const LinearOperands& o, int64_t begin, int64_t end) {
  constexpr int64_t NR = K::kBlock;
  const int64_t blocks = (o.filters + NR - 1) / NR;
  alignas(64) int32_t sums[K::kRows * NR];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t k0 = block * NR, columns = std::min(NR, o.filters - k0);
    for (int64_t first = 0; first < o.rows; first += K::kRows) {
      const int64_t rows = std::min<int64_t>(K::kRows, o.rows - first);
      TileOut<uint8_t> out{};
      out.sums = sums;
      out.sums_stride = NR;
      out.chain = K::kChain;
      for (int64_t d0 = 0; d0 < o.depth; d0 += K::kDepth) {
        const int64_t depth = std::min(K::kDepth, o.depth - d0);
        out.accumulate = d0 > 0;
        K::multiply(rows, {o.x + first * o.depth + d0, o.depth, depth, 0},
                    o.packed + (d0 * blocks + block * depth) * NR, depth, out, false);
      }
      for (int64_t i = 0; i < rows; ++i) {
        float* __restrict y = o.y + (first + i) * o.filters + k0;
        for (int64_t k = 0; k < columns; ++k) {
          y[k] = float(sums[i * NR + k]) * o.scale[k0 + k] + o.shift[k0 + k];
        }
      }
    }
  }
}

void run_int8_linear(const LinearOperands& o);
void int8_linear_vnni(const LinearOperands& o);  // conv_bn_act_int8_avx512vnni.cpp

}  // namespace resnet_fast::cpu
