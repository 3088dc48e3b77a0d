// What a warp does together, atomics, and the conversions that are instructions.
#pragma once

#include <cmath>
#include <type_traits>

#include "../../csrc/math/round.h"
#include "shared.h"

namespace cuda_on_host {

// ldmatrix .x4. The word i of a matrix's row r is read by lane 4 r + i, whoever named the row.
inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  struct Operands {
    uint32_t* to;
    uint32_t row;
  } mine{to, shared.offset(row, 16, "a row of ldmatrix")};
  schedule.meet("ldmatrix", mine, [](const auto& lanes) {
    const unsigned first = schedule.present - schedule.lane();
    for (unsigned matrix = 0; matrix < 4; ++matrix)
      for (unsigned r = 0; r < 8; ++r)
        for (unsigned i = 0; i < 4; ++i) {
          const uint32_t offset = lanes[8 * matrix + r]->row + 4 * i;
          lanes[4 * r + i]->to[matrix] = shared.word(offset, first + 4 * r + i);
        }
  });
}

template <typename T>
float element(uint32_t word, unsigned half) {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<float>(word & ~0x1fffu);
  else
    return resnet_fast::widen(T{static_cast<uint16_t>(word >> 16 * half)});
}

// sum[16 x 8] += a[16 x depth] b[depth x 8]. A product of two elements has at most 22 bits, so it
// is exact in fp32 unless it leaves fp32's range; it is added to the sum, k ascending, each sum
// rounded to nearest. The hardware adds several at once and truncates: its last bits differ. The
// sanitizers are kept out of what takes most of a test's time.
[[gnu::no_sanitize("address", "undefined", "thread")]] inline void multiply(
    float (&sum)[16][8], const float (&a)[16][16], const float (&b)[16][8], unsigned depth) {
  for (unsigned row = 0; row < 16; ++row)
    for (unsigned k = 0; k < depth; ++k)
      for (unsigned column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
}

template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr unsigned kPerWord = 4 / sizeof(T);
  struct Operands {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
  } mine{sum, a, {b0, b1}};
  constexpr const char* kName = std::is_same_v<T, resnet_fast::fp16>   ? "mma of fp16"
                                : std::is_same_v<T, resnet_fast::bf16> ? "mma of bf16"
                                                                       : "mma of TF32";
  schedule.meet(kName, mine, [](const auto& lanes) {
    float a[16][16], b[16][8], sum[16][8];
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      const Operands& it = *lanes[lane];
      const unsigned group = lane / 4, t = lane % 4;
      for (unsigned half = 0; half < kPerWord; ++half) {
        const unsigned k = t * kPerWord + half, far = k + 4 * kPerWord;
        a[group][k] = element<T>(it.a[0], half);
        a[group + 8][k] = element<T>(it.a[1], half);
        a[group][far] = element<T>(it.a[2], half);
        a[group + 8][far] = element<T>(it.a[3], half);
        b[k][group] = element<T>(it.b[0], half);
        b[far][group] = element<T>(it.b[1], half);
      }
      for (unsigned i = 0; i < 4; ++i) sum[group + i / 2 * 8][2 * t + i % 2] = it.sum[i];
    }
    multiply(sum, a, b, 8 * kPerWord);
    for (unsigned lane = 0; lane < kLanes; ++lane)
      for (unsigned i = 0; i < 4; ++i)
        lanes[lane]->sum[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
}

// cvt.rna.tf32, as ptxas writes it out for sm_80 and sm_90a: half a unit is added to finite
// numbers, then the fraction is cut. A NaN whose payload lies below it becomes infinite.
inline uint32_t round_to_tf32(uint32_t bits) {
  const bool finite = (bits & 0x7fffffffu) < 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & ~0x1fffu;
}

// cvt.rn.bf16, whose only NaN has all bits set.
inline uint16_t round_to_bf16(float value) {
  return std::isnan(value) ? 0x7fff : resnet_fast::Narrow<resnet_fast::bf16>::from(value).bits;
}

template <typename T>
T exchange(const char* name, T value, unsigned source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  struct Operands {
    T value, result;
    unsigned source;
  } mine{value, value, source};
  schedule.meet(name, mine, [](const auto& lanes) {
    for (const auto lane : lanes)
      if (lane->source < kLanes) lane->result = lanes[lane->source]->value;
  });
  return mine.result;
}
template <typename T>
T shuffle_xor(T value, unsigned mask) {
  return exchange(sizeof(T) == 4 ? "shuffle_xor" : "shuffle_xor of 8 bytes", value,
                  schedule.lane() ^ mask % kLanes);
}
template <typename T>
T shuffle_down(T value, unsigned delta) {
  return exchange(sizeof(T) == 4 ? "shuffle_down" : "shuffle_down of 8 bytes", value,
                  schedule.lane() + delta % kLanes);
}
template <typename T>
T shuffle(T value, unsigned lane) {
  return exchange(sizeof(T) == 4 ? "shuffle" : "shuffle of 8 bytes", value, lane % kLanes);
}

inline void sync_warp() { schedule.sync_warp(); }
inline void sync_block() { schedule.sync_block(); }

[[gnu::no_sanitize("thread")]] inline unsigned atomic_add(unsigned* address, unsigned value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(*address) != 0)
    fail("misaligned", "atomic_add at %p", static_cast<void*>(address));
  schedule.yield();
  handovers.atomic(address);
  const unsigned before = *address;
  *address = before + value;
  return before;
}
inline void fence_device() { handovers.fence(); }

}  // namespace cuda_on_host
