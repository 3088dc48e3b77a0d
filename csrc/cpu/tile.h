// What the matrix-product kernels share: scratch memory, register tiles and the product itself.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>

#include "../stable.h"
#include "isa.h"
#include "lanes.h"
#include "team.h"

namespace resnet_fast::cpu {

// Vector width and register tile by instruction set: kRows * 2 sums, 2 vectors of weights. The type
// is written out, because GCC 12 confuses one whose size depends on a template's parameter.
template <Isa I>
struct Tile;
template <>
struct Tile<Isa::baseline> {
  static constexpr int kBytes = 16, kRows = 4;
  typedef float Vec __attribute__((vector_size(16)));
};
template <>
struct Tile<Isa::avx2> {
  static constexpr int kBytes = 32, kRows = 6;
  typedef float Vec __attribute__((vector_size(32)));
};
template <>
struct Tile<Isa::avx512> {
  static constexpr int kBytes = 64, kRows = 14;
  typedef float Vec __attribute__((vector_size(64)));
};

// Grows only: a task's scratch is reused by the next task and the next call of its thread.
class Scratch {
 public:
  template <typename T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > size_) {
      block_.reset();
      size_ = 0;
      block_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t(64))));
      std::memset(block_.get(), 0, bytes);  // overhanging rows are computed, never stored
      size_ = bytes;
    }
    return reinterpret_cast<T*>(block_.get());
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<std::byte, Free> block_;
  size_t size_ = 0;
};

// Activations that are a clamp to [low, high] can be applied to sums in registers.
struct Clamp {
  bool is_clamp;
  float low, high;
};

inline Clamp clamp_of(Act act) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  if (act == Act::none) return {true, -kInf, kInf};
  if (act == Act::relu) return {true, 0, kInf};
  if (act == Act::relu6) return {true, 0, 6};
  return {false, -kInf, kInf};
}

// y = act(sum * scale + shift + residual) for one pixel's filters.
template <typename ActT, typename T>
RF_INLINE inline void finish_row(ActT, int64_t length, const float* __restrict sums,
                                 const float* __restrict scale, const float* __restrict shift,
                                 const T* __restrict residual, T* __restrict y) {
  if (residual != nullptr) {
    for (int64_t k = 0; k < length; ++k) {
      y[k] = Narrow<T>::from(
          activate<ActT::value>(sums[k] * scale[k] + shift[k] + widen(residual[k])));
    }
  } else {
    for (int64_t k = 0; k < length; ++k) {
      y[k] = Narrow<T>::from(activate<ActT::value>(sums[k] * scale[k] + shift[k]));
    }
  }
}

// Weights are prefetched this many bytes ahead: 32 steps of the product, longer than a miss of the
// second-level cache takes. Blocks that follow each other lie behind each other in memory.
constexpr int kAhead = 4096;

// What a kernel over T sums in.
template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<uint8_t> {
  using type = int32_t;
};

// What becomes of a register tile: kept as partial sums, or finished.
template <typename T>
struct TileOut {
  typename SumOf<T>::type* sums;  // [MR][sums_stride]; read where `accumulate`, overwritten
  int64_t sums_stride;
  int64_t chain;  // products added one after the other, before they are added to the sums
  bool accumulate, last;
  // y = clamp(sum * scale + shift + residual): every activation that is a clamp, in registers.
  const float* scale;
  const float* shift;
  const T* residual;  // may be null
  T* y;
  int64_t y_stride;  // of residual, too
  float low, high;
  float residual_scale;  // of 8-bit residuals alone (int8.h)
};

// Where the rows of a product are: row i starts at `at` + i * `stride`. A row is made of runs of
// `run` columns, whose starts are `jump` apart: the lines of a window that is read in place.
template <typename T>
struct RowsOf {
  const T* at;
  int64_t stride, run, jump;
};
using Rows = RowsOf<float>;

// The epilogue of sums that are in registers.
template <bool kAdds, typename Vec, int MR, int NV>
RF_INLINE inline void finish_sums(const Vec (&acc)[MR][NV], const TileOut<float>& out) {
  constexpr int kLanes = sizeof(Vec) / sizeof(float);
  // Locals: what is stored through y might be any of out's fields, for all that the compiler knows.
  const float* const residual = out.residual;
  float* const y = out.y;
  const int64_t stride = out.y_stride;
  const Vec low = Vec{} + out.low, high = Vec{} + out.high;
  Vec scale[NV], shift[NV];
  // A vector at a time: one copy of all would go through the stack in pieces.
  for (int v = 0; v < NV; ++v) {
    load_lanes(out.scale + v * kLanes, &scale[v]);
    load_lanes(out.shift + v * kLanes, &shift[v]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < NV; ++v) {
      Vec z = acc[i][v] * scale[v] + shift[v];
      if constexpr (kAdds) {
        Vec r;
        load_lanes(residual + i * stride + v * kLanes, &r);
        z += r;
      }
      // NaN fails both comparisons and stays.
      z = z < low ? low : z;
      z = z > high ? high : z;
      store_lanes(z, y + i * stride + v * kLanes);
    }
  }
}

// rows[MR][depth] * packed[depth][2 vectors], of which the first NV count. The sums stay in
// registers; a row's value is broadcast from memory to all lanes.
//
// The rounding error of n products summed one after the other has a variance of n²/2 roundings; in
// chains of L that are summed in turn, of nL/2 + n²/2L. Between chains the sums go through the
// first-level cache, while the next chain is multiplied.
template <int kBytes, int MR, int NV>
RF_INLINE inline void multiply_rows(const Rows& rows, const float* packed, int64_t depth,
                                    const TileOut<float>& out) {
  typedef float Vec __attribute__((vector_size(kBytes)));
  constexpr int kLanes = kBytes / int(sizeof(float)), kPacked = 2, kLine = 64 / int(sizeof(float));
  Vec acc[MR][NV];
  if (out.last) {
    // What the epilogue touches comes from memory while the product runs: the rows are too far
    // apart and too short for the hardware to foresee.
    for (int i = 0; i < MR; ++i) {
      for (int at = 0; at < NV * kLanes; at += kLine) {
        if (out.residual != nullptr) __builtin_prefetch(out.residual + i * out.y_stride + at);
        __builtin_prefetch(out.y + i * out.y_stride + at, 1);
      }
    }
  }
  const float* from = rows.at;
  int64_t left = rows.run, k1 = 0;
  do {
    const int64_t k0 = k1;
    k1 = std::min(depth, k0 + out.chain);
    for (int i = 0; i < MR; ++i) {
      for (int v = 0; v < NV; ++v) acc[i][v] = Vec{};
    }
    for (int64_t k = k0; k < k1;) {
      const int64_t count = std::min(k1 - k, left);
      for (int64_t j = 0; j < count; ++j) {
        Vec b[NV];
        for (int v = 0; v < NV; ++v) std::memcpy(&b[v], packed + v * kLanes, kBytes);
        for (int at = 0; at < NV * kLanes; at += kLine) {
          __builtin_prefetch(packed + kAhead / int(sizeof(float)) + at);
        }
        packed += kPacked * kLanes;
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const float a = from[i * rows.stride + j];
          for (int v = 0; v < NV; ++v) acc[i][v] += a * b[v];
        }
      }
      k += count;
      from += count;
      left -= count;
      if (left == 0) {
        from += rows.jump - rows.run;
        left = rows.run;
      }
    }
    if (out.accumulate || k0 > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        for (int v = 0; v < NV; ++v) {
          Vec before;
          std::memcpy(&before, out.sums + i * out.sums_stride + v * kLanes, kBytes);
          acc[i][v] += before;
        }
      }
    }
    if (!out.last || k1 < depth) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        for (int v = 0; v < NV; ++v) {
          std::memcpy(out.sums + i * out.sums_stride + v * kLanes, &acc[i][v], kBytes);
        }
      }
    }
  } while (k1 < depth);
  if (!out.last) return;
  if (out.residual != nullptr) return finish_sums<true>(acc, out);
  finish_sums<false>(acc, out);
}

using MultiplyRows = void (*)(const Rows& rows, const float* packed, int64_t depth,
                              const TileOut<float>& out);

// multiply_rows for 1 to kRows rows, at index rows - 1; each compiled once for I and called, so
// that the kernels around it stay small.
template <Isa I, int NV = 2>
inline constexpr auto kMultiplyRows = []<int... R>(std::integer_sequence<int, R...>) {
  return std::array<MultiplyRows, sizeof...(R)>{
      [](const Rows& rows, const float* packed, int64_t depth, const TileOut<float>& out) {
        run_on<I>([&](auto) RF_INLINE {
          multiply_rows<Tile<I>::kBytes, R + 1, NV>(rows, packed, depth, out);
        });
      }...};
}(std::make_integer_sequence<int, Tile<I>::kRows>{});

}  // namespace resnet_fast::cpu
