// Device code of stem_pool.
#pragma once

#include "ptx.cuh"
#include "stem_pool.h"
#include "stem_pool_window.cuh"
#include "vector.cuh"

namespace resnet_fast {

// A lane's words of its warp's filters, by way of shared memory: each is read once a block.
template <typename T, int C>
__device__ inline void load_weights(typename Stem<T, C>::Weights& w, unsigned char* memory,
                                    const StemArguments<T>& a, int first, int slice) {
  using S = Stem<T, C>;
  constexpr int kWords = 4 * S::kUnits;  // of a row of a filter
  constexpr int kWarpSize = static_cast<int>(kWarp);
  uint32_t* words = reinterpret_cast<uint32_t*>(memory);
  const int filters = a.tiling.filters;
  for (int i = static_cast<int>(threadIdx.x); i < kWords * 7 * filters; i += kStemThreads) {
    const int at = i % kWords, k = i / kWords % filters, r = i / kWords / filters;
    uint32_t word = 0;
#pragma unroll
    for (int half = 0; half < S::kElements; ++half) {
      const int element = at * S::kElements + half;
      const int s = element / C - 1, c = element % C;
      if (s >= 0 && first + k < a.shape.filters) {
        const T value =
            a.weight[(first + k) * a.w_filter + r * a.w_row + s * a.w_column + c * a.w_channel];
        word |= bits_of(value) << 16 * half;
      }
    }
    if constexpr (sizeof(T) == 4) word = round_to_tf32(word);
    const int unit = (k / S::kFilters * 7 + r) * S::kUnits + at / 4;
    const int column = k % S::kFilters / 8, lane = k % 8 * 4 + at % 4;
    words[(unit * S::kColumns + column) * kWarpSize + lane] = word;
  }
  sync_block();
  const int lane = static_cast<int>(threadIdx.x % kWarp);
#pragma unroll
  for (int i = 0; i < S::kWeights; ++i) {
    w[i / S::kColumns / S::kUnits][i / S::kColumns % S::kUnits][i % S::kColumns] =
        words[(slice * S::kWeights + i) * kWarpSize + lane];
  }
}

// sum += what two rows of the image give a row of the convolution, where the first of them meets
// the filter's row ROW. With ROW -1 only the second meets one, row 0.
template <int ROW, typename T, int C>
__device__ inline void add_rows(typename Stem<T, C>::Sums& sum,
                                const typename Stem<T, C>::Pixels& x,
                                const typename Stem<T, C>::Weights& w) {
  constexpr int kUnits = Stem<T, C>::kUnits;
#pragma unroll
  for (int unit = ROW < 0 ? kUnits : 0; unit < 2 * kUnits; unit += 2) {
    const int next = unit + 1;
    const bool whole = next < 2 * kUnits;  // the last product of an odd row is half empty
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

// sum = act(sum * scale + shift), `affine` being scale and shift by filter.
template <typename T, int C>
__device__ inline void finish(typename Stem<T, C>::Sums& sum, const float* affine, Act act) {
  constexpr int kColumns = Stem<T, C>::kColumns;
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const auto v = load_vector<4>(affine + 16 * column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[column][i] = fmaf(sum[column][i], v.lane[i % 2 * 2], v.lane[i % 2 * 2 + 1]);
    }
  }
  with_act(act, [&](auto tag) {
#pragma unroll
    for (int i = 0; i < 4 * kColumns; ++i) {
      sum[i / 4][i % 4] = activate<decltype(tag)::value>(sum[i / 4][i % 4]);
    }
  });
}

// What a warp stores at a time: 8 pooled columns from `column` on, those at or behind `stored`, of
// its filters from `filter` on, in row `row`.
struct StemOutput {
  unsigned image;
  int row, column, stored, filter;
};

// Staged in shared memory, from which each lane takes 16 adjacent bytes: some filters of a pixel,
// or some pixels of a filter.
template <typename T, int C>
__device__ inline void store_pooled(const StemArguments<T>& a, const StemOutput& out,
                                    const float (&pooled)[Stem<T, C>::kColumns][2],
                                    unsigned char* staging) {
  constexpr int kVector = kLanes<T>, kSize = static_cast<int>(sizeof(T));
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int g = lane / 4, t = lane % 4;
  sync_warp();
#pragma unroll
  for (int i = 0; i < 2 * Stem<T, C>::kColumns; ++i) {
    const int k = i / 2 * 8 + 2 * t + i % 2;
    const int at = a.channels_last ? g * kStemStagingRow + k * kSize : (k * kStemPairs + g) * kSize;
    *reinterpret_cast<T*>(staging + at) = to_storage<T>(pooled[i / 2][i % 2]);
  }
  sync_warp();
  constexpr int kLine = Stem<T, C>::kFilters * kSize;  // bytes of a pixel
  if (lane >= kStemPairs * kLine / kVectorBytes) return;
  const int parts = a.channels_last ? kLine / kVectorBytes : kStemPairs / kVector;
  const int line = lane / parts, part = lane % parts;
  const int at =
      a.channels_last ? line * kStemStagingRow + part * kVectorBytes : lane * kVectorBytes;
  const auto value = load_vector<kVector>(reinterpret_cast<const T*>(staging + at));

  const StemShape& shape = a.shape;
  const int64_t image = out.image;
  const int q = out.column + (a.channels_last ? line : part * kVector);
  const int k = out.filter + (a.channels_last ? part * kVector : line);
  T* to = a.y;
  bool there;
  int begin, end;  // of the vector's elements
  if (a.channels_last) {
    const int64_t pixel = (image * shape.pooled_rows + out.row) * shape.pooled_columns + q;
    to += pixel * shape.filters + k;
    there = q >= out.stored && q < shape.pooled_columns;
    begin = 0;
    end = shape.filters - k;
  } else {
    const int64_t row = (image * shape.filters + k) * shape.pooled_rows + out.row;
    to += row * shape.pooled_columns + q;
    there = k < shape.filters;
    begin = out.stored - q;
    end = shape.pooled_columns - q;
  }
  if (!there) return;
  if (begin <= 0 && end >= kVector && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
    store_vector(to, value);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i >= begin && i < end) to[i] = value.lane[i];
  }
}

//   y[n, k, p, q] = max over 3 x 3 of act(conv[2p-1 .. 2p+1, 2q-1 .. 2q+1] * scale[k] + shift[k])
//
// A block owns a strip of pooled rows, some columns and up to 64 filters. It loads its window of
// the image into shared memory once, as [row][pixel][channel] in the products' type. The
// convolution's map stays in registers; only pooled values are stored.
//
// The window is the products' left operand as it is: what a row of the filter meets is adjacent
// words, of which a lane reads its own, and windows overlap where they lie. k runs over the rows of
// the filter and 8 pixels of C channels. Windows begin every two pixels, so that they begin at a
// whole word for any C if they begin one pixel before the filter (C = 3, 16 bits):
//
//   pixel    2q-4    2q-3    2q-2    2q-1     2q     2q+1    2q+2    2q+3     q: conv column
//   element  -  -  - 0  1  2 0  1  2 0  1  2 0  1  2 0  1  2 0  1  2 0  1  2
//   unit    |0                      |1                      |2                t: a word of a unit
//
// That pixel's weights are zero, but zero times infinity is NaN, so it is masked, always in unit 0.
// This makes 11 products m16n8k16 for 147 values of k, which would fill 9.2. Channels padded to
// four would make 14.
//
// A warp keeps the weights of 32 filters (16 in fp32) in registers, 28 C words a lane, and walks
// down the image. Two rows of it meet four rows of the convolution, whose sums are in registers
// too, so that a word is read once for all rows of the filter (read: filter rows by conv row):
//
//   image rows      2i-2, 2i-1    2i, 2i+1    2i+2, 2i+3
//   conv row i-1       3, 4         5, 6                     then finished, and pooled
//            i         1, 2         3, 4         5, 6
//            i+1       -, 0         1, 2         3, 4
//            i+2                    -, 0         1, 2
//
// The 16 rows of a product are columns 2j and 2j+1 of the convolution for 8 pooled columns j. So
// pooling is a maximum of a lane's own sums, of those it kept from the row above, and of lane - 4's
// column 2j-1, which for the first j of a tile has waited in shared memory since the tile before.
// Scale, shift, activation and maximum are fp32, and the result is rounded once: rounding is
// monotone, so this is the maximum of rounded values.
//
// Computed twice are a strip's first row, 15 rows for 14 at the strip of 7 of a 224 x 224 image,
// and a pooled column wherever an image is cut into columns.
//
// Banks: a lane reads words 2 C g + t in 16 bits, in fp32 4 C g + t, with g, t = lane / 4, lane
// % 4. Eight groups of four words fall on the 32 banks once in C = 1 and 2, and C = 1 and 3 in
// fp32, else twice (four times in fp32's C = 4); an access of C = 3 serves 3.7 products. Everything
// else is 16 bytes a lane and does not meet, but for uint8, 8 as it comes: the image, scale and
// shift, and the outputs, which are staged in rows of 80 bytes.
template <typename T, int C>
__global__ void __launch_bounds__(kStemThreads, kStemBlocks)
    stem_pool_kernel(const StemArguments<T> a) {
  using S = Stem<T, C>;
  using Sums = typename S::Sums;
  constexpr int kSums = 4 * S::kColumns;
  const StemShape& shape = a.shape;
  const StemTiling& tiling = a.tiling;
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int g = lane / 4, t = lane % 4;
  // across is a power of two: no division keeps registers.
  const int slice = warp & (tiling.across - 1), strip = warp >> tiling.across / 2;
  const int block_filter = static_cast<int>(blockIdx.y) * tiling.filters;
  unsigned char* window = shared_memory();
  float* affine = reinterpret_cast<float*>(window + a.grid.affine);
  float* edges = reinterpret_cast<float*>(window + a.grid.edges);

  for (int i = static_cast<int>(threadIdx.x); i < tiling.filters; i += kStemThreads) {
    const int k = block_filter + i;
    const bool there = k < shape.filters;
    affine[2 * i] = a.scale && there ? a.scale[k] : 1.0f;
    affine[2 * i + 1] = a.shift && there ? a.shift[k] : -0.0f;
  }
  typename S::Weights w;
  load_weights<T, C>(w, window, a, block_filter, slice);
  uint32_t mask = ~0u;  // of word t of unit 0
  if (sizeof(T) == 4) {
    mask = t < C ? 0 : mask;
  } else {
    mask = (2 * t < C ? 0 : 0xffffu) | (2 * t + 1 < C ? 0 : 0xffff0000u);
  }

  const unsigned blocks = static_cast<unsigned>(a.grid.blocks);
  const unsigned per_image = static_cast<unsigned>(a.grid.strips * a.grid.spans);
  for (unsigned block = blockIdx.x; block < blocks; block += gridDim.x) {
    const unsigned n = block / per_image;
    const int within = static_cast<int>(block % per_image);
    const StemSpan span = stem_span(within % a.grid.spans, tiling.tiles);
    const int block_row = within / a.grid.spans * tiling.rows();
    // From a whole chunk on, which may be half a chunk early.
    const int early = span.first % 2 ? 0 : kStemChunk / 2;
    const int y0 = 4 * block_row - 6, x0 = 4 * span.first - 4 - early;
    sync_block();
    if (a.raw) {
      load_window<uint8_t, T, C>(window, a, n, y0, x0);
    } else {
      load_window<T, T, C>(window, a, n, y0, x0);
    }
    sync_block();

    // The warp's pooled rows, and the rows of the convolution that it computes for them.
    const int top = block_row + strip * tiling.strip;
    const int bottom =
        top + tiling.strip < shape.pooled_rows ? top + tiling.strip : shape.pooled_rows;
    const int first = top > 0 ? 2 * top - 1 : 0;
    const int last = 2 * bottom - 1 < shape.rows ? 2 * bottom - 1 : shape.rows - 1;
    const auto computed = [&](int row) { return row >= first && row <= last; };

    for (int tile = 0; tile < tiling.tiles; ++tile) {
      const int column = span.first + kStemPairs * tile;
      if (column >= shape.pooled_columns) break;
      // Of row 0 of the image, which may lie before the window.
      const int pixels =
          (early + 4 * (kStemPairs * tile + g)) * S::kPixel + 4 * t - y0 * a.grid.pitch;

      // Rows 2i and 2i + 1 of the image, s0 to s3 being the sums of rows i - 1 to i + 2.
      const auto multiply = [&](int i, Sums& s0, Sums& s1, Sums& s2, Sums& s3) {
        typename S::Pixels x;
#pragma unroll
        for (int j = 0; j < 4 * S::kUnits; ++j) {
          const int row = j / 2 / S::kUnits, unit = j / 2 % S::kUnits, odd = j % 2;
          const uint32_t word = *reinterpret_cast<const uint32_t*>(
              window + (pixels + (2 * i + row) * a.grid.pitch + 2 * odd * S::kPixel + 16 * unit));
          x[row][unit][odd] = unit == 0 ? word & mask : word;
        }
        if (computed(i - 1)) add_rows<5, T, C>(s0, x, w);
        if (computed(i)) add_rows<3, T, C>(s1, x, w);
        if (computed(i + 1)) add_rows<1, T, C>(s2, x, w);
#pragma unroll
        for (int j = 0; j < kSums; ++j) s3[j / 4][j % 4] = 0.0f;
        if (computed(i + 2)) add_rows<-1, T, C>(s3, x, w);
      };

      // The maximum of what has been finished of pooled row p, which is stored below row 2p + 1.
      Sums best;
      const auto pool = [&](int p, Sums& s0, Sums& s1, Sums& s2, Sums& s3) {
        multiply(2 * p + 1, s0, s1, s2, s3);
        if (p >= top) {
          finish<T, C>(s0, affine + 2 * (slice * S::kFilters + 2 * t), a.act);
#pragma unroll
          for (int j = 0; j < kSums; ++j) {
            best[j / 4][j % 4] = max_or_nan(best[j / 4][j % 4], s0[j / 4][j % 4]);
          }
        }
        multiply(2 * p + 2, s1, s2, s3, s0);
        if (computed(2 * p + 1)) {
          finish<T, C>(s1, affine + 2 * (slice * S::kFilters + 2 * t), a.act);
        } else {
#pragma unroll
          for (int j = 0; j < kSums; ++j) s1[j / 4][j % 4] = -INFINITY;
        }
        if (p >= top) {
          float pooled[S::kColumns][2];
          float* edge = edges + ((warp * tiling.strip + p - top) * 4 + t) * 2 * S::kColumns;
#pragma unroll
          for (int j = 0; j < 2 * S::kColumns; ++j) {
            const int k = j / 2, i = j % 2;
            const float even = max_or_nan(best[k][i], s1[k][i]);
            float odd = max_or_nan(best[k][i + 2], s1[k][i + 2]);
            odd = 2 * (column + g) + 1 < shape.columns ? odd : -INFINITY;
            float before = shuffle(odd, (lane + 28) % kWarp);
            if (g == 0) {
              const float following = before;
              before = tile == 0 ? -INFINITY : edge[j];
              edge[j] = following;
            }
            pooled[k][i] = max_or_nan(max_or_nan(even, odd), before);
          }
          const StemOutput out{n, p, column, span.stored, block_filter + slice * S::kFilters};
          store_pooled<T, C>(a, out, pooled, window + a.grid.staging + warp * kStemStaging);
        }
#pragma unroll
        for (int j = 0; j < kSums; ++j) best[j / 4][j % 4] = s1[j / 4][j % 4];
      };

      // Behind a pooled row the sums have moved on by two, so that two rows bring them back.
      Sums s0, s1, s2, s3;
      for (int p = top - 2; p < bottom; p += 2) {
        pool(p, s0, s1, s2, s3);
        if (p + 1 < bottom) pool(p + 1, s2, s3, s0, s1);
      }
    }
  }
}

}  // namespace resnet_fast
