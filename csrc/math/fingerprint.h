// A change detector for weights, not a checksum: whole up to 16 KiB, beyond that 128 evenly spaced
// words with the first and the last.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace resnet_fast {

constexpr uint64_t kWholeBytes = 16 * 1024;
constexpr uint64_t kSamples = 128;

// splitmix64's finaliser: every input bit reaches every output bit.
inline uint64_t mix_bits(uint64_t h) {
  h ^= h >> 30;
  h *= 0xBF58476D1CE4E5B9ull;
  h ^= h >> 27;
  h *= 0x94D049BB133111EBull;
  return h ^ (h >> 31);
}

inline uint64_t word_at(const unsigned char* bytes, uint64_t offset, uint64_t length) {
  uint64_t word = 0;
  std::memcpy(&word, bytes + offset, length);
  return word;
}

inline uint64_t sample_at(uint64_t length, uint64_t i) {
  const uint64_t last = length - 8;
  // Split so that the product cannot overflow for any length.
  return last / (kSamples - 1) * i + last % (kSamples - 1) * i / (kSamples - 1);
}

// Weights that were packed are read nowhere else: every sample is a miss of all caches. They are
// under way together instead of one after the other.
inline void prefetch_fingerprint(const unsigned char* bytes, uint64_t length) {
  if (length <= kWholeBytes) {
    for (uint64_t at = 0; at < length; at += 64) __builtin_prefetch(bytes + at);
  } else {
    for (uint64_t i = 0; i < kSamples; ++i) __builtin_prefetch(bytes + sample_at(length, i));
  }
}

inline uint64_t fingerprint(const unsigned char* bytes, uint64_t length) {
  // Four chains side by side: a single one would wait for each multiplication.
  uint64_t h[4] = {0x9E3779B97F4A7C15ull, 0xC2B2AE3D27D4EB4Full, 0x165667B19E3779F9ull,
                   0x27D4EB2F165667C5ull};
  const auto add = [&](uint64_t lane, uint64_t word) {
    const uint64_t v = (h[lane] ^ word) * 0x9FB21C651E98DF25ull;
    h[lane] = v ^ (v >> 29);
  };
  if (length <= kWholeBytes) {
    uint64_t at = 0;
    for (; at + 32 <= length; at += 32) {
      for (uint64_t lane = 0; lane < 4; ++lane) add(lane, word_at(bytes, at + 8 * lane, 8));
    }
    for (; at < length; at += 8) add(0, word_at(bytes, at, std::min<uint64_t>(8, length - at)));
  } else {
    for (uint64_t i = 0; i < kSamples; ++i) add(i % 4, word_at(bytes, sample_at(length, i), 8));
  }
  const uint64_t chains =
      mix_bits(h[0] + 3 * mix_bits(h[1] + 5 * mix_bits(h[2] + 7 * mix_bits(h[3]))));
  return mix_bits(length ^ chains);
}

}  // namespace resnet_fast
