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
  } mine{to, shared.offset(row, 16, "ldmatrix's row")};
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

inline float widen_bits(uint32_t word, unsigned half, resnet_fast::fp16) {
  return resnet_fast::widen(resnet_fast::fp16{static_cast<uint16_t>(word >> 16 * half)});
}
inline float widen_bits(uint32_t word, unsigned half, resnet_fast::bf16) {
  return resnet_fast::widen(resnet_fast::bf16{static_cast<uint16_t>(word >> 16 * half)});
}
inline float widen_bits(uint32_t word, unsigned, float) {
  return std::bit_cast<float>(word & ~0x1fffu);
}

// mma. Products are exact; they are added to the sum one by one, k ascending, each sum rounded to
// fp32. The hardware aligns and truncates instead, and adds several at once: results differ in the
// last bits.
template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr unsigned kPerWord = 4 / sizeof(T);
  constexpr unsigned kDepth = 8 * kPerWord;
  struct Operands {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
  } mine{sum, a, {b0, b1}};
  constexpr const char* kName = std::is_same_v<T, resnet_fast::fp16>   ? "mma of fp16"
                                : std::is_same_v<T, resnet_fast::bf16> ? "mma of bf16"
                                                                       : "mma of TF32";
  schedule.meet(kName, mine, [](const auto& lanes) {
    float a[16][kDepth], b[8][kDepth];
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      const unsigned group = lane / 4, t = lane % 4;
      for (unsigned half = 0; half < kPerWord; ++half) {
        const unsigned k = t * kPerWord + half, far = k + 4 * kPerWord;
        a[group][k] = widen_bits(lanes[lane]->a[0], half, T{});
        a[group + 8][k] = widen_bits(lanes[lane]->a[1], half, T{});
        a[group][far] = widen_bits(lanes[lane]->a[2], half, T{});
        a[group + 8][far] = widen_bits(lanes[lane]->a[3], half, T{});
        b[group][k] = widen_bits(lanes[lane]->b[0], half, T{});
        b[group][far] = widen_bits(lanes[lane]->b[1], half, T{});
      }
    }
    for (unsigned lane = 0; lane < kLanes; ++lane)
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float total = lanes[lane]->sum[i];
        for (unsigned k = 0; k < kDepth; ++k) total = std::fma(a[row][k], b[column][k], total);
        lanes[lane]->sum[i] = total;
      }
  });
}

// cvt.rna.tf32: half a unit is added to the magnitude, then the fraction is cut.
inline uint32_t round_to_tf32(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (bits + 0x1000u) & ~0x1fffu;
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
                  schedule.lane() ^ mask);
}
template <typename T>
T shuffle_down(T value, unsigned delta) {
  return exchange(sizeof(T) == 4 ? "shuffle_down" : "shuffle_down of 8 bytes", value,
                  schedule.lane() + delta);
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
