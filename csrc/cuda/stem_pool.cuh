// Device code of stem_pool.
#pragma once

#include <cstring>

#include "ptx.cuh"
#include "stem_pool.h"
#include "vector.cuh"

namespace resnet_fast {

// What follows from the products' type and the image's channels. Along the filter's row, k runs over
// 8 pixels and their channels, the first pixel being none of the filter's: from there on every
// window begins at an even element, where a word can be read.
template <typename T, int C>
struct Stem {
  static constexpr int kElements = 4 / static_cast<int>(sizeof(T));  // of a word
  static constexpr int kPixel = C * static_cast<int>(sizeof(T));     // bytes
  static constexpr int kChunk = kStemChunk * kPixel;
  static constexpr int kUnits = kChunk / 16;  // 16 bytes, half of a product's k
  static constexpr int kColumns = stem_columns(sizeof(T));
  static constexpr int kFilters = 8 * kColumns;
  static constexpr int kRow = 7 * kUnits * kColumns;  // words that a lane holds of the filters

  using Sums = float[kColumns][4];
  using Pixels = uint32_t[2][kUnits][2];
  using Filters = uint32_t[7][kUnits][kColumns];
};

// sum += the part of a row of the convolution that two rows of the image make, of which the first
// meets the filter's row ROW; with ROW -1 the second alone meets one, its first.
template <int ROW, typename T, int C>
__device__ inline void add_rows(typename Stem<T, C>::Sums& sum,
                                const typename Stem<T, C>::Pixels& x,
                                const typename Stem<T, C>::Filters& w) {
  constexpr int kUnits = Stem<T, C>::kUnits;
#pragma unroll
  for (int unit = ROW < 0 ? kUnits : 0; unit < 2 * kUnits; unit += 2) {
    const int next = unit + 1;
    const bool whole = next < 2 * kUnits;
    const int row = unit / kUnits, at = unit % kUnits;
    const int next_row = whole ? next / kUnits : 0, next_at = whole ? next % kUnits : 0;
    const uint32_t a[4] = {x[row][at][0], x[row][at][1], whole ? x[next_row][next_at][0] : 0,
                           whole ? x[next_row][next_at][1] : 0};
#pragma unroll
    for (int column = 0; column < Stem<T, C>::kColumns; ++column) {
      multiply_add<T>(sum[column], a, w[ROW + row][at][column],
                      whole ? w[ROW + next_row][next_at][column] : 0);
    }
  }
}

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
struct StemWindow {
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

  // Chunks as they are, each to the beginning of its place, all of them under way together: pixel by
  // pixel, or plane by plane. Zeros outside the image.
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
        const int64_t offset = planar ? part / kPlane * a.x_channel + part % kPlane * kLanes
                                      : int64_t{part * kLanes};
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
      // Padding is zero behind the normalisation, not before it.
      if (!inside(y0 + chunk / width, x0 + chunk % width * kStemChunk)) continue;
      uint32_t* place = reinterpret_cast<uint32_t*>(window + chunk * Stem<T, C>::kChunk);
      uint32_t raw[kParts * kVector / 4], word[kWords] = {};
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
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        store_vector(place + i, Vector<uint32_t, 4>{{word[i], word[i + 1], word[i + 2], word[i + 3]}});
      }
    }
  }

  // For rows that no vector divides: one element at a time, several under way in each thread.
  __device__ void read(const float (&scale)[C], const float (&shift)[C]) const {
    constexpr int kAhead = 8;
    using Operand = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    const int width = a.tiling.chunks() * kStemChunk;
    const int count = width * a.tiling.window_rows() * C;
    for (int first = static_cast<int>(threadIdx.x); first < count;
         first += kAhead * kStemThreads) {
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

// A lane's words of its warp's filters, by way of shared memory, in which they are read once.
template <typename T, int C>
__device__ inline void load_filters(typename Stem<T, C>::Filters& w, unsigned char* memory,
                                    const StemArguments<T>& a, int first, int slice) {
  using S = Stem<T, C>;
  uint32_t* words = reinterpret_cast<uint32_t*>(memory);
  constexpr int kWords = 4 * S::kUnits;  // of a row of a filter
  const int filters = a.tiling.filters(sizeof(T));
  for (int i = static_cast<int>(threadIdx.x); i < kWords * 7 * filters; i += kStemThreads) {
    const int at = i % kWords, k = i / kWords % filters, r = i / kWords / filters;
    uint32_t word = 0;
#pragma unroll
    for (int half = 0; half < S::kElements; ++half) {
      const int element = at * S::kElements + half;
      const int s = element / C - 1, c = element % C;
      if (s >= 0 && first + k < a.shape.filters) {
        const T value = a.weight[(first + k) * a.w_filter + r * a.w_row + s * a.w_column +
                                 c * a.w_channel];
        word |= bits_of(value) << 16 * half;
      }
    }
    if constexpr (sizeof(T) == 4) word = round_to_tf32(word);
    const int column = k % S::kFilters / 8, lane = k % 8 * 4 + at % 4;
    const int place = ((k / S::kFilters * 7 + r) * S::kUnits + at / 4) * S::kColumns + column;
    words[place * static_cast<int>(kWarp) + lane] = word;
  }
  sync_block();
  const int lane = static_cast<int>(threadIdx.x % kWarp);
#pragma unroll
  for (int i = 0; i < S::kRow; ++i) {
    w[i / S::kColumns / S::kUnits][i / S::kColumns % S::kUnits][i % S::kColumns] =
        words[(slice * S::kRow + i) * static_cast<int>(kWarp) + lane];
  }
}

template <typename T, int C>
__global__ void __launch_bounds__(kStemThreads, 2) stem_pool_kernel(const StemArguments<T> a) {
  using S = Stem<T, C>;
  using Sums = typename S::Sums;
  constexpr int kColumns = S::kColumns;
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int g = lane / 4, t = lane % 4;
  const StemShape& shape = a.shape;
  const StemTiling& tiling = a.tiling;
  const int slice = warp & (tiling.across - 1);
  const int block_filter = static_cast<int>(blockIdx.y) * tiling.filters(sizeof(T));
  unsigned char* window = shared_memory();
  float* affine = reinterpret_cast<float*>(window + a.memory.affine);
  unsigned char* staging = window + a.memory.staging + warp * kStemStaging;

  for (int i = static_cast<int>(threadIdx.x); i < tiling.filters(sizeof(T)); i += kStemThreads) {
    const int k = block_filter + i;
    const bool there = k < shape.filters;
    affine[2 * i] = a.scale && there ? a.scale[k] : 1.0f;
    affine[2 * i + 1] = a.shift && there ? a.shift[k] : -0.0f;
  }
  typename S::Filters w;
  load_filters<T, C>(w, window, a, block_filter, slice);

  // Word t of a window's first unit, as far as it is the filter's.
  const uint32_t mask =
      sizeof(T) == 4 ? (t >= C ? ~0u : 0)
                     : (2 * t >= C ? 0xffffu : 0) | (2 * t + 1 >= C ? 0xffff0000u : 0);
  for (unsigned block = blockIdx.x; block < a.blocks; block += gridDim.x) {
    const int64_t n = block / (a.strips * a.spans);
    const int within = static_cast<int>(block % (a.strips * a.spans));
    const StemSpan span = stem_span(within % static_cast<int>(a.spans), tiling.tiles);
    const int block_row = within / static_cast<int>(a.spans) * tiling.rows();
    const int y0 = 4 * block_row - 6;
    // -4 and not -8 from the first column's window where that is a multiple of a chunk.
    const int lead = span.first % 2 ? 0 : 4;
    const int x0 = 4 * span.first - 4 - lead;
    sync_block();
    if (a.raw) {
      StemWindow<uint8_t, T, C>{a, static_cast<const uint8_t*>(a.x) + n * a.x_image, window, y0, x0}.load();
    } else {
      StemWindow<T, T, C>{a, static_cast<const T*>(a.x) + n * a.x_image, window, y0, x0}.load();
    }
    sync_block();

    const int top = block_row + (warp >> tiling.across / 2) * tiling.strip;
    const int bottom = top + tiling.strip < shape.pooled_rows ? top + tiling.strip
                                                              : shape.pooled_rows;
    const int first = 2 * top > 0 ? 2 * top - 1 : 0;
    const int last = 2 * bottom - 1 < shape.rows ? 2 * bottom - 1 : shape.rows - 1;
    for (int tile = 0; tile < tiling.tiles; ++tile) {
      const int pair = span.first + kStemPairs * tile;
      if (pair >= shape.pooled_columns) break;
      const unsigned char* column =
          window + (lead + 4 * (kStemPairs * tile + g)) * S::kPixel + 4 * t;

      // s0 to s3 are the sums of rows i - 1 to i + 2.
      const auto multiply = [&](int i, Sums& s0, Sums& s1, Sums& s2, Sums& s3) {
        typename S::Pixels x;
#pragma unroll
        for (int j = 0; j < 4 * S::kUnits; ++j) {
          const int row = j / 2 / S::kUnits, unit = j / 2 % S::kUnits, right = j % 2;
          const uint32_t word = *reinterpret_cast<const uint32_t*>(
              column + (2 * i - y0 + row) * a.memory.pitch + 2 * right * S::kPixel + 16 * unit);
          x[row][unit][right] = unit == 0 ? word & mask : word;
        }
        if (i - 1 >= first && i - 1 <= last) add_rows<5, T, C>(s0, x, w);
        if (i >= first && i <= last) add_rows<3, T, C>(s1, x, w);
        if (i + 1 >= first && i + 1 <= last) add_rows<1, T, C>(s2, x, w);
#pragma unroll
        for (int j = 0; j < 4 * kColumns; ++j) s3[j / 4][j % 4] = 0.0f;
        if (i + 2 >= first && i + 2 <= last) add_rows<-1, T, C>(s3, x, w);
      };
      const auto activate_sums = [&](Sums& sum) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const auto v =
              load_vector<4>(affine + 2 * (slice * S::kFilters + 8 * j + 2 * t));
          sum[j][0] = fmaf(sum[j][0], v.lane[0], v.lane[1]);
          sum[j][1] = fmaf(sum[j][1], v.lane[2], v.lane[3]);
          sum[j][2] = fmaf(sum[j][2], v.lane[0], v.lane[1]);
          sum[j][3] = fmaf(sum[j][3], v.lane[2], v.lane[3]);
        }
        with_act(a.act, [&](auto tag) {
#pragma unroll
          for (int j = 0; j < 4 * kColumns; ++j) {
            sum[j / 4][j % 4] = activate<decltype(tag)::value>(sum[j / 4][j % 4]);
          }
        });
      };

      Sums best;
      // Row p of y: conv rows 2p (s0) and 2p + 1 (s1) are finished.
      const auto pool = [&](int p, Sums& s0, Sums& s1, Sums& s2, Sums& s3) {
        multiply(2 * p + 1, s0, s1, s2, s3);
        if (p >= top) {
          activate_sums(s0);
#pragma unroll
          for (int j = 0; j < 4 * kColumns; ++j) {
            best[j / 4][j % 4] = max_or_nan(best[j / 4][j % 4], s0[j / 4][j % 4]);
          }
        }
        multiply(2 * p + 2, s1, s2, s3, s0);
        if (2 * p + 1 >= first && 2 * p + 1 <= last) {
          activate_sums(s1);
        } else {
#pragma unroll
          for (int j = 0; j < 4 * kColumns; ++j) s1[j / 4][j % 4] = -INFINITY;
        }
        if (p >= top) {
          float pooled[kColumns][2];
          float* edge = reinterpret_cast<float*>(window + a.memory.edges) +
                        ((warp * tiling.strip + p - top) * 4 + t) * 2 * kColumns;
#pragma unroll
          for (int j = 0; j < 2 * kColumns; ++j) {
            const int c = j / 2, half = j % 2;
            const float left = max_or_nan(best[c][half], s1[c][half]);
            float right = max_or_nan(best[c][2 + half], s1[c][2 + half]);
            right = 2 * (pair + g) + 1 < shape.columns ? right : -INFINITY;
            float before = shuffle(right, (lane + 28) % kWarp);
            if (g == 0) {
              const float following = before;
              before = tile == 0 ? -INFINITY : edge[j];
              edge[j] = following;
            }
            pooled[c][half] = max_or_nan(max_or_nan(left, right), before);
          }
          // Staged, so that each lane stores 16 adjacent bytes: of a pixel's filters, or of a
          // filter's pixels.
          sync_warp();
#pragma unroll
          for (int j = 0; j < 2 * kColumns; ++j) {
            const int k = j / 2 * 8 + 2 * t + j % 2;
            const int at = a.channels_last ? g * kStemStagingRow + k * static_cast<int>(sizeof(T))
                                           : (k * kStemPairs + g) * static_cast<int>(sizeof(T));
            *reinterpret_cast<T*>(staging + at) = to_storage<T>(pooled[j / 2][j % 2]);
          }
          sync_warp();
          constexpr int kVector = kLanes<T>;
          const int parts = a.channels_last ? 4 : kStemPairs / kVector;
          const int line = lane / parts, part = lane % parts * kVector;
          const auto value = load_vector<kVector>(reinterpret_cast<const T*>(
              staging + (a.channels_last ? line * kStemStagingRow + part * sizeof(T)
                                         : lane * kVectorBytes)));
          const int j = pair + (a.channels_last ? line : part);
          const int k = block_filter + slice * S::kFilters + (a.channels_last ? part : line);
          // How much of the vector is in y.
          const int begin = a.channels_last ? 0 : span.stored - j;
          const int end = a.channels_last ? shape.filters - k : shape.pooled_columns - j;
          const bool there = a.channels_last ? j >= span.stored && j < shape.pooled_columns
                                             : k < shape.filters;
          const int64_t place =
              a.channels_last
                  ? ((n * shape.pooled_rows + p) * shape.pooled_columns + j) * shape.filters + k
                  : ((n * shape.filters + k) * shape.pooled_rows + p) * shape.pooled_columns + j;
          T* to = a.y + place;
          if (there && begin <= 0 && end >= kVector &&
              reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
            store_vector(to, value);
          } else if (there) {
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
              if (e >= begin && e < end) to[e] = value.lane[e];
            }
          }
        }
#pragma unroll
        for (int j = 0; j < 4 * kColumns; ++j) best[j / 4][j % 4] = s1[j / 4][j % 4];
      };

      Sums s0, s1, s2, s3;
      for (int p = top - 2; p < bottom; p += 2) {
        pool(p, s0, s1, s2, s3);
        if (p + 1 < bottom) pool(p + 1, s2, s3, s0, s1);
      }
    }
  }
}

}  // namespace resnet_fast
