// Vectors of fp32 from and to memory that holds fp32, bf16 or bytes, for any vector width and
// instruction set.
#pragma once

#include <cstring>

#include "../math/round.h"
#include "isa.h"

namespace resnet_fast::cpu {

// The integers beside a vector of fp32 of so many bytes. Written out, because GCC 12 confuses
// vector types whose size depends on a template's parameter.
template <size_t kBytes>
struct Integers;
template <>
struct Integers<16> {
  typedef uint32_t Word __attribute__((vector_size(16)));
  typedef uint16_t Half __attribute__((vector_size(8)));
  typedef uint8_t Byte __attribute__((vector_size(4)));
};
template <>
struct Integers<32> {
  typedef uint32_t Word __attribute__((vector_size(32)));
  typedef uint16_t Half __attribute__((vector_size(16)));
  typedef uint8_t Byte __attribute__((vector_size(8)));
};
template <>
struct Integers<64> {
  typedef uint32_t Word __attribute__((vector_size(64)));
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint8_t Byte __attribute__((vector_size(16)));
};

template <typename Vec>
RF_INLINE inline void load_lanes(const float* from, Vec* to) {
  std::memcpy(to, from, sizeof(Vec));
}

template <typename Vec>
RF_INLINE inline void store_lanes(const Vec& from, float* to) {
  std::memcpy(to, &from, sizeof(Vec));
}

template <typename Vec>
RF_INLINE inline void load_lanes(const bf16* from, Vec* to) {
  using Word = typename Integers<sizeof(Vec)>::Word;
  using Half = typename Integers<sizeof(Vec)>::Half;
  Half half;
  std::memcpy(&half, from, sizeof(half));
  *to = reinterpret_cast<Vec>(__builtin_convertvector(half, Word) << 16);
}

// Rounds to nearest even, as Narrow<bf16> does.
template <typename Vec>
RF_INLINE inline void store_lanes(const Vec& from, bf16* to) {
  using Word = typename Integers<sizeof(Vec)>::Word;
  using Half = typename Integers<sizeof(Vec)>::Half;
  const Word bits = reinterpret_cast<Word>(from);
  const Word rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Word word = from == from ? rounded : Word{} + 0x7FC0u;
  const Half half = __builtin_convertvector(word, Half);
  std::memcpy(to, &half, sizeof(half));
}

template <typename Vec>
RF_INLINE inline void load_lanes(const uint8_t* from, Vec* to) {
  typename Integers<sizeof(Vec)>::Byte bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  *to = __builtin_convertvector(bytes, Vec);
}

// Of values that are bytes already.
template <typename Vec>
RF_INLINE inline void store_lanes(const Vec& from, uint8_t* to) {
  using Word = typename Integers<sizeof(Vec)>::Word;
  using Byte = typename Integers<sizeof(Vec)>::Byte;
  const Byte bytes = __builtin_convertvector(__builtin_convertvector(from, Word), Byte);
  std::memcpy(to, &bytes, sizeof(bytes));
}

// The first `count` lanes, fewer than a vector has; zeros for the others.
template <typename T, typename Vec>
RF_INLINE inline void load_some_lanes(const T* from, int64_t count, Vec* to) {
  T values[sizeof(Vec) / sizeof(float)] = {};
  std::memcpy(values, from, static_cast<size_t>(count) * sizeof(T));
  load_lanes(values, to);
}

template <typename T, typename Vec>
RF_INLINE inline void store_some_lanes(const Vec& from, int64_t count, T* to) {
  T values[sizeof(Vec) / sizeof(float)];
  store_lanes(from, values);
  std::memcpy(to, values, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace resnet_fast::cpu
