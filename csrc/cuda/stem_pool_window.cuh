// stem_pool's image on its way into shared memory: copied, normalised, in the products' type.
#pragma once

#include <type_traits>

#include "ptx.cuh"
#include "stem_pool.h"
#include "vector.cuh"

namespace resnet_fast {

// What follows from the products' type and the channels of the image.
template <typename T, int C>
struct Stem {
  static constexpr int kElements = 4 / static_cast<int>(sizeof(T));  // of a word
  static constexpr int kPixel = C * static_cast<int>(sizeof(T));     // bytes
  static constexpr int kChunk = kStemChunk * kPixel;
  // A row of the filter is 8 pixels long, of which it has no first: so every window begins at a
  // whole word. In units of 16 bytes, of which a product takes two.
  static constexpr int kUnits = kStemChunk * kPixel / 16;
  static constexpr int kFilters = stem_filters(C, sizeof(T));
  static constexpr int kColumns = kFilters / 8;
  static constexpr int kWeights = 7 * kUnits * kColumns;  // words of a lane
  static_assert(kChunk % 16 == 0 && C <= 4, "the pixel that is none of the filter's is one unit");

  using Sums = float[kColumns][4];
  using Pixels = uint32_t[2][kUnits][2];
  using Weights = uint32_t[7][kUnits][kColumns];
};

template <typename T>
__device__ inline uint32_t bits_of(T value) {
  if constexpr (sizeof(T) == 4) {
    return detail::as_bits(value);
  } else {
    return value.bits;
  }
}

// Element `index` of words that hold elements of X.
template <typename X>
__device__ inline float element_of(const uint32_t* word, int index) {
  if constexpr (sizeof(X) == 4) {
    return detail::as_float(word[index]);
  } else if constexpr (sizeof(X) == 2) {
    return to_accumulator(X{static_cast<uint16_t>(word[index / 2] >> 16 * (index % 2))});
  } else {
    return static_cast<float>(word[index / 4] >> 8 * (index % 4) & 0xff);
  }
}

// The bits of an operand of the products.
template <typename T>
__device__ inline uint32_t operand(float value) {
  const uint32_t bits = bits_of(to_storage<T>(value));
  return sizeof(T) == 4 ? round_to_tf32(bits) : bits;
}

// The part of an image that a block reads, X its elements, on the way into shared memory.
template <typename X, typename T, int C>
struct Window {
  static constexpr int kSize = static_cast<int>(sizeof(X));
  static constexpr int kVector = kSize == 1 ? 8 : 16;  // bytes of a copy
  static constexpr int kLanes = kVector / kSize;
  static constexpr int kParts = kStemChunk * C / kLanes;

  const StemArguments<T>& a;
  const X* image;
  unsigned char* window;
  int y0, x0;  // of its first pixel, even where that is outside the image

  __device__ bool inside(int row, int column) const {
    return row >= 0 && row < a.shape.height && column >= 0 && column < a.shape.width;
  }

  // Chunks as they are, each to the beginning of its place, all of them under way together: pixel
  // by pixel, or plane by plane. Zeros outside the image.
  __device__ void copy() const {
    const bool planar = a.access == StemAccess::planes;
    const int width = a.tiling.chunks(), count = width * a.tiling.window_rows();
    for (int chunk = static_cast<int>(threadIdx.x); chunk < count; chunk += kStemThreads) {
      const int row = y0 + chunk / width, column = x0 + chunk % width * kStemChunk;
      const bool there = inside(row, column);
      const X* from = there ? image + row * a.x_row + column * a.x_column : image;
      const SharedAddress to = shared_address(window) + chunk * Stem<T, C>::kChunk;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        constexpr int kPlane = kStemChunk / kLanes;  // parts of a plane
        const int64_t offset =
            planar ? part / kPlane * a.x_channel + part % kPlane * kLanes : int64_t{part * kLanes};
        copy_async<kVector>(to + part * kVector, there ? from + offset : from, there);
      }
    }
    commit_copies();
    wait_copies<0>();
  }

  // What the thread has copied, normalised in its place.
  template <bool PLANAR>
  __device__ void convert(const float (&scale)[C], const float (&shift)[C]) const {
    constexpr int kElements = Stem<T, C>::kElements, kWords = kStemChunk * C / kElements;
    const int width = a.tiling.chunks(), count = width * a.tiling.window_rows();
    for (int chunk = static_cast<int>(threadIdx.x); chunk < count; chunk += kStemThreads) {
      uint32_t* place = reinterpret_cast<uint32_t*>(window + chunk * Stem<T, C>::kChunk);
      uint32_t word[kWords] = {};
      // Padding is zero behind the normalisation, not before it.
      if (inside(y0 + chunk / width, x0 + chunk % width * kStemChunk)) {
        uint32_t raw[kParts * kVector / 4];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const auto vector = load_vector<kVector / 4>(place + part * kVector / 4);
#pragma unroll
          for (int i = 0; i < kVector / 4; ++i) raw[part * kVector / 4 + i] = vector.lane[i];
        }
#pragma unroll
        for (int i = 0; i < kStemChunk * C; ++i) {
          const float x = element_of<X>(raw, PLANAR ? i % C * kStemChunk + i / C : i);
          word[i / kElements] |= operand<T>(fmaf(x, scale[i % C], shift[i % C]))
                                 << 16 * (i % kElements);
        }
      }
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        store_vector(place + i,
                     Vector<uint32_t, 4>{{word[i], word[i + 1], word[i + 2], word[i + 3]}});
      }
    }
  }

  // For rows that no vector divides: one element at a time, several under way in each thread.
  __device__ void read(const float (&scale)[C], const float (&shift)[C]) const {
    constexpr int kAhead = 8;
    using Operand = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    const int width = a.tiling.chunks() * kStemChunk;
    const int count = width * a.tiling.window_rows() * C;
    for (int first = static_cast<int>(threadIdx.x); first < count; first += kAhead * kStemThreads) {
      uint32_t value[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int element = first + i * kStemThreads;
        const int row = y0 + element / C / width, column = x0 + element / C % width;
        const int c = element % C;
        value[i] = 0;
        if (element < count && inside(row, column)) {
          const X x = image[row * a.x_row + column * a.x_column + c * a.x_channel];
          float s = scale[0], b = shift[0];
#pragma unroll
          for (int j = 1; j < C; ++j) {
            s = c == j ? scale[j] : s;
            b = c == j ? shift[j] : b;
          }
          float wide;
          if constexpr (kSize == 1) {
            wide = static_cast<float>(x);
          } else {
            wide = to_accumulator(x);
          }
          value[i] = operand<T>(fmaf(wide, s, b));
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int element = first + i * kStemThreads;
        if (element < count) {
          reinterpret_cast<Operand*>(window)[element] = static_cast<Operand>(value[i]);
        }
      }
    }
  }

  __device__ void load() const {
    float scale[C], shift[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      scale[c] = a.input_scale ? a.input_scale[c] : 1.0f;
      shift[c] = a.input_shift ? a.input_shift[c] : -0.0f;
    }
    if (a.access == StemAccess::elements) return read(scale, shift);
    copy();
    const bool as_is = std::is_same_v<X, T> && sizeof(T) == 2 && !a.input_scale && !a.input_shift;
    if (a.access == StemAccess::planes) {
      convert<true>(scale, shift);
    } else if (!as_is) {
      convert<false>(scale, shift);
    }
  }
};

template <typename X, typename T, int C>
__device__ inline void load_window(unsigned char* window, const StemArguments<T>& a, int64_t n,
                                   int y0, int x0) {
  const X* image = static_cast<const X*>(a.x) + n * a.x_image;
  Window<X, T, C>{a, image, window, y0, x0}.load();
}

}  // namespace resnet_fast
