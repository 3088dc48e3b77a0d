// The implicit matrix product of a convolution on tensor cores (sm_80 and later), for the kernels
// whose epilogues differ.
//
//   z[m, n] = sum_k x[pixel m under tap k, channel k] * weight[n, k]
//
// x is N H W C, the weight K R S C: m runs over the output's pixels, n over a group's filters, k
// over (r, s, c), so a row of either operand is contiguous along c. A block owns a tile of kM
// pixels x kN filters of one group, and blockIdx.z one of several equal parts of k:
//
//              k ->                         n ->
//        +-----------------+          +------+------+
//      m | 128 B per stage |        m | warp | warp |   kWarpsM x kWarpsN warps, each with
//        |  .  .  .  .  .  |          +------+------+   kWarpM x kWarpN sums in registers,
//        +-----------------+          | warp | warp |   fp32, in the layout of mma.m16n8
//                                     +------+------+
//
// kStages buffers of (kM + kN) rows of 128 bytes of k form a ring: while the tensor cores multiply
// one, cp.async fills the others; a thread copies the same 16 bytes along k of several rows, so one
// decoded tap serves them all. Rows are swizzled, so neither the copies nor ldmatrix meet a bank
// conflict. A tap that falls outside the image, a pixel behind the last and a filter behind the
// group's last are copied as zeros: zero times zero, never a masked Inf.
#pragma once

#include "../math/conv_shape.h"
#include "ptx.cuh"
#include "vector.cuh"

namespace resnet_fast {

// The tile of one block, and how its warps share it. COPY is the bytes of one copy along k, the
// largest of 16, 8 and 4 that divides a group's channels, and 0 where only whole elements do.
template <int M, int N, int WARPS_ALONG_M, int WARPS_ALONG_N, int STAGES_, int COPY_>
struct ConvTile {
  static constexpr int kM = M, kN = N, kStages = STAGES_, kCopy = COPY_;
  static constexpr int kWarpsM = WARPS_ALONG_M, kWarpsN = WARPS_ALONG_N;
  static constexpr int kWarpM = M / kWarpsM, kWarpN = N / kWarpsN;
  static constexpr int kTileThreads = kWarpsM * kWarpsN * static_cast<int>(kWarp);
  static constexpr int kRowBytes = 128;  // of a stage's rows along k: 32 banks, 8 chunks of 16
  static constexpr int kStageBytes = (M + N) * kRowBytes;
  static constexpr int kStripBytes = 16 * (kWarpN + 8) * static_cast<int>(sizeof(float));
  static constexpr int kPixelBytes = M * 16;
  static constexpr std::integral_constant<int, kStages * kStageBytes + kPixelBytes> kSharedBytes{};
  static_assert(M % (16 * kWarpsM) == 0 && N % (16 * kWarpsN) == 0);
  static_assert(kWarpsM * kWarpsN * kStripBytes <= kStages * kStageBytes);
};

namespace conv {

// Where a stage keeps chunk `chunk` (16 bytes) of a row. The exclusive or spreads the same chunk of
// eight adjacent rows, which ldmatrix reads at once, over all banks.
__device__ inline int swizzled(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// One output pixel of the tile: the element of x under the filter's first tap (it may lie outside
// the image) and, bit by bit, which rows and columns of the filter fall inside.
struct alignas(16) Pixel {
  int64_t origin;
  uint32_t rows, columns;
};

__device__ inline Pixel locate(const ConvShape& s, int64_t m, int64_t pixels, int first_channel) {
  Pixel pixel{0, 0, 0};
  if (m >= pixels) return pixel;
  const int plane = s.out_height * s.out_width;
  const int image = static_cast<int>(m / plane), at = static_cast<int>(m % plane);
  const int top = at / s.out_width * s.stride_h - s.pad_h;
  const int left = at % s.out_width * s.stride_w - s.pad_w;
  for (int r = 0; r < s.kernel_h; ++r)
    pixel.rows |= static_cast<uint32_t>(static_cast<unsigned>(top + r * s.dilation_h) <
                                        static_cast<unsigned>(s.height))
                  << r;
  for (int c = 0; c < s.kernel_w; ++c)
    pixel.columns |= static_cast<uint32_t>(static_cast<unsigned>(left + c * s.dilation_w) <
                                           static_cast<unsigned>(s.width))
                     << c;
  pixel.origin = ((int64_t{image} * s.height + top) * s.width + left) * s.channels + first_channel;
  return pixel;
}

// A position along k, which runs over (filter row, filter column, channel of the group).
struct Tap {
  int channel, row, column;

  __device__ void advance(const ConvShape& s, int elements) {
    channel += elements;
    while (channel >= s.group_channels) {
      channel -= s.group_channels;
      if (++column == s.kernel_w) {
        column = 0;
        ++row;
      }
    }
  }
  // row < kernel_h <= 32 is what keeps the shifts defined; behind the last tap all is zero.
  __device__ bool inside(const ConvShape& s, const Pixel& pixel) const {
    return row < s.kernel_h && ((pixel.rows >> row) & (pixel.columns >> column) & 1u) != 0;
  }
  __device__ int64_t offset(const ConvShape& s) const {
    return (int64_t{row} * s.dilation_h * s.width + column * s.dilation_w) * s.channels + channel;
  }
};

// Where a block stands: its tile of pixels and filters, and its part of k.
template <typename T, typename Tile>
struct Place {
  int64_t pixels, first_m;
  int group, group_filters, first_n;  // first_n within the group
  int first_stage, stages;

  __device__ Place(const ConvShape& s, int stages_a_part) {
    constexpr int kRowElements = Tile::kRowBytes / static_cast<int>(sizeof(T));
    pixels = int64_t{s.batch} * s.out_height * s.out_width;
    group_filters = s.filters / s.groups;
    const int tiles = (group_filters + Tile::kN - 1) / Tile::kN;
    // Filters vary fastest: blocks that run at the same time read the same pixels.
    const int column = static_cast<int>(blockIdx.x % (tiles * s.groups));
    first_m = int64_t{blockIdx.x / (tiles * s.groups)} * Tile::kM;
    group = column / tiles;
    first_n = column % tiles * Tile::kN;
    const int depth = s.kernel_h * s.kernel_w * s.group_channels;
    first_stage = static_cast<int>(blockIdx.z) * stages_a_part;
    const int left = (depth + kRowElements - 1) / kRowElements - first_stage;
    stages = left < stages_a_part ? left : stages_a_part;
  }
};

// What one thread copies of every stage: unit `unit` of rows `row`, `row + kStep`, ...
template <typename T, typename Tile>
class Loader {
  static constexpr int kUnitBytes = Tile::kCopy == 0 ? 4 : Tile::kCopy;
  static constexpr int kElements = kUnitBytes / static_cast<int>(sizeof(T));
  static constexpr int kUnits = Tile::kRowBytes / kUnitBytes;
  static constexpr int kStep = Tile::kTileThreads / kUnits;
  static constexpr int kTaps = Tile::kCopy == 0 ? kElements : 1;
  static constexpr int kRowElements = Tile::kRowBytes / static_cast<int>(sizeof(T));
  static_assert(Tile::kTileThreads % kUnits == 0 && Tile::kM % kStep == 0);

 public:
  __device__ Loader(const ConvShape& shape, const T* x, const T* weight, const Pixel* pixels,
                    const Place<T, Tile>& place)
      : shape_(shape), x_(x), pixels_(pixels), filters_(place.group_filters - place.first_n) {
    unit_ = static_cast<int>(threadIdx.x) % kUnits;
    row_ = static_cast<int>(threadIdx.x) / kUnits;
    k_ = place.first_stage * kRowElements + unit_ * kElements;
    depth_ = shape.kernel_h * shape.kernel_w * shape.group_channels;
    weight_ = weight + (int64_t{place.group} * place.group_filters + place.first_n) * depth_;
#pragma unroll
    for (int e = 0; e < kTaps; ++e) {
      const int k = k_ + e;
      const int tap = k / shape.group_channels;
      tap_[e] = Tap{k % shape.group_channels, tap / shape.kernel_w, tap % shape.kernel_w};
    }
  }

  // Starts the copies of the next stage, in the order of k, into buffer `stage`.
  __device__ void begin(int stage) {
    const int base = stage * Tile::kStageBytes;
    const int chunk = unit_ * kUnitBytes / 16, within = unit_ * kUnitBytes % 16;
    int64_t offset[kTaps];
#pragma unroll
    for (int e = 0; e < kTaps; ++e) offset[e] = tap_[e].offset(shape_);
#pragma unroll 4
    for (int row = row_; row < Tile::kM; row += kStep) {
      const Pixel pixel = pixels_[row];
      const int at = base + swizzled(row, chunk) + within;
      if constexpr (Tile::kCopy != 0) {
        const bool inside = tap_[0].inside(shape_, pixel);
        copy_async<kUnitBytes>(shared_address(shared_memory() + at),
                               inside ? x_ + pixel.origin + offset[0] : x_, inside);
      } else {
        Vector<T, kElements> unit{};
#pragma unroll
        for (int e = 0; e < kElements; ++e)
          if (tap_[e].inside(shape_, pixel)) unit.lane[e] = x_[pixel.origin + offset[e]];
        store_vector(reinterpret_cast<T*>(shared_memory() + at), unit);
      }
    }
#pragma unroll 4
    for (int row = row_; row < Tile::kN; row += kStep) {
      const int at = base + swizzled(Tile::kM + row, chunk) + within;
      const T* from = weight_ + int64_t{row} * depth_ + k_;
      if constexpr (Tile::kCopy != 0) {
        const bool inside = row < filters_ && k_ < depth_;
        copy_async<kUnitBytes>(shared_address(shared_memory() + at), inside ? from : weight_,
                               inside);
      } else {
        Vector<T, kElements> unit{};
#pragma unroll
        for (int e = 0; e < kElements; ++e)
          if (row < filters_ && k_ + e < depth_) unit.lane[e] = from[e];
        store_vector(reinterpret_cast<T*>(shared_memory() + at), unit);
      }
    }
    k_ += kRowElements;
#pragma unroll
    for (int e = 0; e < kTaps; ++e) tap_[e].advance(shape_, kRowElements);
  }
  // What is left to do for it behind the products of another stage: nothing.
  __device__ void end(int) {}

 private:
  const ConvShape& shape_;
  const T* x_;
  const T* weight_;  // of the tile's first filter
  const Pixel* pixels_;
  int filters_;  // from the tile's first filter to the group's end
  int unit_, row_, k_, depth_;
  Tap tap_[kTaps];
};

template <typename T>
__device__ inline void round_operands(uint32_t (&words)[4]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = round_to_tf32(words[i]);
  }
}

// The products of one stage: each of its four steps reads 32 bytes of k from every row.
template <typename T, typename Tile>
__device__ inline void multiply_stage(int stage, int warp_m, int warp_n,
                                      float (&sum)[Tile::kWarpM / 16][Tile::kWarpN / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const SharedAddress base = shared_address(shared_memory() + stage * Tile::kStageBytes);
  const int row_a = warp_m * Tile::kWarpM + lane % 16, chunk_a = lane / 16;
  const int row_b = Tile::kM + warp_n * Tile::kWarpN + lane % 8 + lane / 16 * 8;
  const int chunk_b = lane / 8 % 2;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t a[Tile::kWarpM / 16][4];
#pragma unroll
    for (int i = 0; i < Tile::kWarpM / 16; ++i) {
      load_matrices(a[i], base + swizzled(row_a + 16 * i, 2 * step + chunk_a));
      round_operands<T>(a[i]);
    }
#pragma unroll
    for (int j = 0; j < Tile::kWarpN / 16; ++j) {
      uint32_t b[4];
      load_matrices(b, base + swizzled(row_b + 16 * j, 2 * step + chunk_b));
      round_operands<T>(b);
#pragma unroll
      for (int i = 0; i < Tile::kWarpM / 16; ++i) {
        multiply_add<T>(sum[i][2 * j], a[i], b[0], b[1]);
        multiply_add<T>(sum[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// Fills the tile's table of pixels, behind the ring.
template <typename Tile>
__device__ inline const Pixel* locate_tile(const ConvShape& s, int64_t first_m, int64_t pixels,
                                           int group) {
  auto* const table = reinterpret_cast<Pixel*>(shared_memory() + Tile::kStages * Tile::kStageBytes);
  for (int row = static_cast<int>(threadIdx.x); row < Tile::kM; row += Tile::kTileThreads)
    table[row] = locate(s, first_m + row, pixels, group * s.group_channels);
  sync_block();
  return table;
}

// The warp's sums over `stages` stages; the ring is free behind it.
template <typename T, typename Tile, typename Loader>
__device__ inline void accumulate(Loader& loader, int stages,
                                  float (&sum)[Tile::kWarpM / 16][Tile::kWarpN / 8][4]) {
  const int warp = static_cast<int>(threadIdx.x / kWarp);
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    if (stage < stages) {
      loader.begin(stage);
      loader.end(stage);
    }
    commit_copies();
  }
  int reading = 0, writing = Tile::kStages - 1;
  for (int stage = 0; stage < stages; ++stage) {
    // A group a stage, empty ones included: the oldest has landed when kStages - 2 are pending.
    wait_copies<Tile::kStages - 2>();
    // Everybody's copies have landed, and everybody has left the buffer that is filled next.
    sync_block();
    const bool more = stage + Tile::kStages - 1 < stages;
    if (more) loader.begin(writing);
    commit_copies();
    multiply_stage<T, Tile>(reading, warp / Tile::kWarpsN, warp % Tile::kWarpsN, sum);
    if (more) loader.end(writing);
    if (++reading == Tile::kStages) reading = 0;
    if (++writing == Tile::kStages) writing = 0;
  }
  wait_copies<0>();
  sync_block();
}

// How a warp's lanes share its tile once the sums have passed through shared memory: a lane has the
// same kWidth filters in each of its rows.
template <typename T, typename Tile>
struct Lanes {
  static constexpr int kWidth = kLanes<T>;
  static constexpr int kChunks = Tile::kWarpN / kWidth;
  static constexpr int kRows = static_cast<int>(kWarp) / kChunks;  // side by side
  static constexpr int kTurns = 16 / kRows;  // one below the other, of a strip
  static_assert(kChunks * kRows == static_cast<int>(kWarp) && kTurns * kRows == 16);
  int warp, lane;

  __device__ Lanes()
      : warp(static_cast<int>(threadIdx.x / kWarp)), lane(static_cast<int>(threadIdx.x % kWarp)) {}
  // The lane's first filter, within the tile, and its pixel in turn `turn` of strip `strip`.
  __device__ int n() const { return warp % Tile::kWarpsN * Tile::kWarpN + lane % kChunks * kWidth; }
  __device__ int m(int strip, int turn) const {
    return warp / Tile::kWarpsN * Tile::kWarpM + 16 * strip + lane / kChunks + turn * kRows;
  }

  // Hands the sums over, 16 pixels at a time as [16][kWarpN + 8] floats (the 8 keep a fragment's
  // pairs off each other's banks): f(strip, values of the lane's turns).
  template <typename F>
  __device__ void for_each_strip(const float (&sum)[Tile::kWarpM / 16][Tile::kWarpN / 8][4],
                                 const F& f) const {
    constexpr int kPitch = Tile::kWarpN + 8;
    auto* const strip = reinterpret_cast<float*>(shared_memory() + warp * Tile::kStripBytes);
#pragma unroll
    for (int i = 0; i < Tile::kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kWarpN / 8; ++j) {
        float* const at = strip + lane / 4 * kPitch + 8 * j + lane % 4 * 2;
        store_vector(at, Vector<float, 2>{{sum[i][j][0], sum[i][j][1]}});
        store_vector(at + 8 * kPitch, Vector<float, 2>{{sum[i][j][2], sum[i][j][3]}});
      }
      sync_warp();
      float value[kTurns][kWidth];
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const float* const row =
            strip + (lane / kChunks + turn * kRows) * kPitch + lane % kChunks * kWidth;
#pragma unroll
        for (int e = 0; e < kWidth; e += 4) {
          const auto four = load_vector<4>(row + e);
#pragma unroll
          for (int g = 0; g < 4; ++g) value[turn][e + g] = four.lane[g];
        }
      }
      f(i, value);
      sync_warp();
    }
  }
};

}  // namespace conv

}  // namespace resnet_fast
