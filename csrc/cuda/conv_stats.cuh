// Device code of conv_stats: a convolution that measures its own output for the batch norm behind
// it, and can apply the batch norm before it while it loads.
#pragma once

#include "bn_act_train.cuh"
#include "implicit_gemm.cuh"

namespace resnet_fast {

// The batch norm and activation in front of a convolution, by channel of x; `mean` is null where
// there is none.
struct ConvPrologue {
  const float *mean, *rstd;
  const float *weight, *bias;  // may be null: 1 and 0
  Act act;
};

namespace conv {

// A Loader whose pixels pass through registers, where they are normalised and activated:
//
//   operand = act((x - mean[c]) * scale[c] + bias[c]),  scale = rstd * weight
//
// by the arithmetic of Normalise (bn_act_train.cuh) and rounded once, so that the products are bit
// for bit those of a stored tensor. What lies outside the image is zero behind the activation, as
// in a stored tensor, and not act(bias - mean * scale). A stage's loads start before the products
// of another and are used behind them, so that nothing waits for memory; filters come by cp.async.
template <typename T, typename Tile>
class NormalisingLoader {
  static constexpr int kWidth = kLanes<T>;
  static constexpr int kUnits = Tile::kRowBytes / 16;
  static constexpr int kStep = Tile::kTileThreads / kUnits;
  static constexpr int kTurns = Tile::kM / kStep;
  static constexpr int kRowElements = Tile::kRowBytes / static_cast<int>(sizeof(T));
  static_assert(Tile::kCopy == 16 && Tile::kM % kStep == 0 && Tile::kN % kStep == 0);
  static_assert(kTurns <= 32, "a turn is a bit of a word");

 public:
  __device__ NormalisingLoader(const ConvShape& shape, const T* x, const T* weight,
                               const Pixel* pixels, const Place<T, Tile>& place,
                               const ConvPrologue& prologue)
      : shape_(shape), prologue_(prologue), x_(x), pixels_(pixels) {
    unit_ = static_cast<int>(threadIdx.x) % kUnits;
    row_ = static_cast<int>(threadIdx.x) / kUnits;
    filters_ = place.group_filters - place.first_n;
    first_channel_ = place.group * shape.group_channels;
    k_ = place.first_stage * kRowElements + unit_ * kWidth;
    depth_ = shape.kernel_h * shape.kernel_w * shape.group_channels;
    weight_ = weight + (int64_t{place.group} * place.group_filters + place.first_n) * depth_;
    const int tap = k_ / shape.group_channels;
    tap_ = Tap{k_ % shape.group_channels, tap / shape.kernel_w, tap % shape.kernel_w};
  }

  // Starts the loads of the next stage, in the order of k, into buffer `stage`.
  __device__ void begin(int stage) {
    const int base = stage * Tile::kStageBytes;
    const int64_t offset = tap_.offset(shape_);
    inside_ = 0;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const Pixel pixel = pixels_[row_ + turn * kStep];
      if (tap_.inside(shape_, pixel)) {
        inside_ |= 1u << turn;
        held_[turn] = load_vector<kWidth>(x_ + pixel.origin + offset);
      }
    }
    for (int row = row_; row < Tile::kN; row += kStep) {
      const bool inside = row < filters_ && k_ < depth_;
      copy_async<16>(shared_address(shared_memory() + base + swizzled(Tile::kM + row, unit_)),
                     inside ? weight_ + int64_t{row} * depth_ + k_ : weight_, inside);
    }
    if (inside_ != 0) {
      const int channel = first_channel_ + tap_.channel;
      float weights[kWidth];
      load_channels(mean_, prologue_.mean, 0.0f, channel, shape_.channels, true);
      load_channels(scale_, prologue_.rstd, 1.0f, channel, shape_.channels, true);
      load_channels(weights, prologue_.weight, 1.0f, channel, shape_.channels, true);
      load_channels(bias_, prologue_.bias, 0.0f, channel, shape_.channels, true);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) scale_[e] *= weights[e];
    }
    k_ += kRowElements;
    tap_.advance(shape_, kRowElements);
  }

  // Normalises and stores them.
  __device__ void end(int stage) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      Vector<T, kWidth> operand{};
      if ((inside_ >> turn & 1u) != 0) {
        float value[kWidth];
#pragma unroll
        for (int e = 0; e < kWidth; ++e)
          value[e] = affine(to_accumulator(held_[turn].lane[e]) - mean_[e], scale_[e], bias_[e]);
        activate_lanes(prologue_.act, value);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) operand.lane[e] = to_storage<T>(value[e]);
      }
      const int row = row_ + turn * kStep;
      store_vector(
          reinterpret_cast<T*>(shared_memory() + stage * Tile::kStageBytes + swizzled(row, unit_)),
          operand);
    }
  }

 private:
  const ConvShape& shape_;
  const ConvPrologue& prologue_;
  const T* x_;
  const T* weight_;  // of the tile's first filter
  const Pixel* pixels_;
  int filters_, first_channel_, unit_, row_, k_, depth_;
  Tap tap_;
  unsigned inside_;
  Vector<T, kWidth> held_[kTurns];
  float mean_[kWidth], scale_[kWidth], bias_[kWidth];
};

// Sums of one filter's z over some pixels, around a pivot near their mean:
//
//   sum = sum of z - pivot      squares = sum of (z - pivot)^2
//
// The differences are of the size of the data's spread, whatever its mean, and pivot + sum / count
// is a mean of twice fp32's digits: one of a thousand deviations costs none.
struct alignas(16) Moments {
  float pivot, sum, squares;
  int count;
};

// sum + rest becomes sum + rest + value: `rest` keeps what the addition rounds away (Knuth 1969,
// "The Art of Computer Programming" 2, 4.2.2, theorem B).
__device__ inline void add_exactly(float& sum, float& rest, float value) {
  const float total = sum + value;
  const float added = total - sum;
  rest += (sum - (total - added)) + (value - added);
  sum = total;
}

// The same for the K filters of a lane.
template <int K>
struct LaneMoments {
  float pivot[K], sum[K], rest[K], squares[K];
  int count;

  // Takes for pivots the means of a warp's first `filled` pixels, which lanes of `chunks` share.
  template <typename T, int TURNS>
  __device__ void centre(const Vector<T, K> (&values)[TURNS], int filled, unsigned chunks) {
    int pixels = filled;
    for (unsigned mask = chunks; mask < kWarp; mask *= 2) pixels += shuffle_xor(pixels, mask);
#pragma unroll
    for (int e = 0; e < K; ++e) {
      float total = 0;
#pragma unroll
      for (int turn = 0; turn < TURNS; ++turn)
        if (turn < filled) total += to_accumulator(values[turn].lane[e]);
      for (unsigned mask = chunks; mask < kWarp; mask *= 2) total += shuffle_xor(total, mask);
      pivot[e] = pixels > 0 ? total / static_cast<float>(pixels) : 0.0f;
    }
  }

  __device__ void add(int e, float value) {
    float away = value;
    add_exactly(away, rest[e], -pivot[e]);
    add_exactly(sum[e], rest[e], away);
    squares[e] = fmaf(away, away, squares[e]);
  }

  // Adds other pixels' sums, around another pivot.
  __device__ void join(const LaneMoments& other) {
    if (other.count == 0) return;
    count += other.count;
    const float n = static_cast<float>(other.count);
#pragma unroll
    for (int e = 0; e < K; ++e) {
      const float away = other.pivot[e] - pivot[e], moved = n * away;
      squares[e] += fmaf(away, fmaf(2.0f, other.sum[e], moved), other.squares[e]);
      add_exactly(sum[e], rest[e], moved);
      rest[e] += fmaf(n, away, -moved);
      add_exactly(sum[e], rest[e], other.sum[e]);
      rest[e] += other.rest[e];
    }
  }

  // Of filter e, around the mean as fp32 holds it.
  __device__ Moments moments(int e) const {
    const float n = static_cast<float>(count);
    const float mean = pivot[e] + sum[e] / n, away = mean - pivot[e];
    const float left = fmaf(-n, away, sum[e]) + rest[e];
    return {mean, left, squares[e] - away * fmaf(n, away, 2.0f * left), count};
  }
};

// The moments of a tile's filters, from those that its lanes have gathered in their rows: lanes of
// the same filters, which have one pivot, join by shuffles, then warps through shared memory, each
// in a fixed order.
template <typename T, typename Tile>
__device__ inline void store_moments(const Lanes<T, Tile>& lanes, LaneMoments<kLanes<T>>& own,
                                     Moments* to, int present) {
  using Of = Lanes<T, Tile>;
#pragma unroll
  for (unsigned mask = Of::kChunks; mask < kWarp; mask *= 2) {
#pragma unroll
    for (int e = 0; e < Of::kWidth; ++e) {
      const float rest = shuffle_xor(own.rest[e], mask);
      add_exactly(own.sum[e], own.rest[e], shuffle_xor(own.sum[e], mask));
      own.rest[e] += rest;
      own.squares[e] += shuffle_xor(own.squares[e], mask);
    }
    own.count += shuffle_xor(own.count, mask);
  }
  // The strips are read: every warp is behind them.
  sync_block();
  auto* const kept = reinterpret_cast<LaneMoments<Of::kWidth>*>(shared_memory());
  const bool speaks = lanes.lane < Of::kChunks;
  if (speaks) kept[lanes.warp * Of::kChunks + lanes.lane] = own;
  sync_block();
  if (!speaks || lanes.warp >= Tile::kWarpsN) return;
  for (int warp = lanes.warp + Tile::kWarpsN; warp < Tile::kWarpsM * Tile::kWarpsN;
       warp += Tile::kWarpsN)
    own.join(kept[warp * Of::kChunks + lanes.lane]);
#pragma unroll
  for (int e = 0; e < Of::kWidth; ++e)
    if (e < present) to[e] = own.moments(e);
}

}  // namespace conv

//   z[m, n] = sum_k act(bn(x))[pixel m under tap k, channel k] * weight[n, k]
//   moments[tile][n] of z[m, n] over the tile's m
//
// The product is implicit_gemm.cuh's. z is rounded once, and the moments are those of the rounded
// values, which is what the next pass reads: the pass over z that would measure them is not made.
// NORMALISE applies the batch norm in front (NormalisingLoader): its output is not stored.
template <typename T, typename Tile, bool NORMALISE>
__global__ void __launch_bounds__(Tile::kTileThreads, 1)
    conv_stats_kernel(ConvShape shape, const T* __restrict__ x, const T* __restrict__ weight,
                      ConvPrologue prologue, T* __restrict__ z, conv::Moments* __restrict__ moments,
                      bool wide) {
  const conv::Place<T, Tile> place(shape, INT32_MAX);
  const conv::Pixel* const table =
      conv::locate_tile<Tile>(shape, place.first_m, place.pixels, place.group);
  float sum[Tile::kWarpM / 16][Tile::kWarpN / 8][4] = {};
  if constexpr (NORMALISE) {
    conv::NormalisingLoader<T, Tile> loader(shape, x, weight, table, place, prologue);
    conv::accumulate<T, Tile>(loader, place.stages, sum);
  } else {
    conv::Loader<T, Tile> loader(shape, x, weight, table, place);
    conv::accumulate<T, Tile>(loader, place.stages, sum);
  }

  using Lanes = conv::Lanes<T, Tile>;
  constexpr int kWidth = Lanes::kWidth;
  const Lanes lanes;
  const int n = place.first_n + lanes.n();
  const int present = place.group_filters - n < kWidth ? place.group_filters - n : kWidth;
  const int channel = place.group * place.group_filters + n;
  conv::LaneMoments<kWidth> own{};
  lanes.for_each_strip(sum, [&](int strip, auto& values) {
    Vector<T, kWidth> rounded[Lanes::kTurns];
    int filled = 0;  // pixels ascend with the turns
#pragma unroll
    for (int turn = 0; turn < Lanes::kTurns; ++turn) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) rounded[turn].lane[e] = to_storage<T>(values[turn][e]);
      if (place.first_m + lanes.m(strip, turn) < place.pixels) filled = turn + 1;
    }
    if (strip == 0) own.centre(rounded, filled, Lanes::kChunks);
#pragma unroll
    for (int turn = 0; turn < Lanes::kTurns; ++turn) {
      if (turn >= filled) continue;
      const int64_t m = place.first_m + lanes.m(strip, turn);
      ++own.count;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) own.add(e, to_accumulator(rounded[turn].lane[e]));
      const int64_t at = m * shape.filters + channel;
      if (wide && present == kWidth) {
        store_vector(z + at, rounded[turn]);
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e)
          if (e < present) z[at + e] = rounded[turn].lane[e];
      }
    }
  });
  const int64_t tile = place.first_m / Tile::kM;
  conv::store_moments<T, Tile>(lanes, own, moments + tile * shape.filters + channel, present);
}

// Moments that one block of fold_moments_kernel joins: a layer has them for each 64 or 128 pixels,
// 12,544 times for the stem of 128 images, too many for the two blocks that 64 channels are.
inline constexpr unsigned kFolded = 64;

// Joins the moments of each channel, kFolded at a time, in fp64. The last fold, of one row of
// blocks, gives instead
//
//   mean = pivot + sum / M      rstd = 1 / sqrt(squares / M - (sum / M)^2 + eps)
//
// 32 channels a block, so that a warp reads adjacent moments; thread (row, channel) takes every
// rows-th, and the rows join in the fixed order of combine_rows.
struct AddMoments {
  template <typename Sums>
  __device__ static void combine(Sums& own, const Sums& other) {
    own.first[0] += other.first[0];
    own.second[0] += other.second[0];
    own.count += other.count;
  }
};

template <bool LAST>
__global__ void __launch_bounds__(kThreads)
    fold_moments_kernel(const conv::Moments* __restrict__ moments, unsigned count,
                        unsigned channels, conv::Moments* __restrict__ to, double eps,
                        float* __restrict__ mean, float* __restrict__ rstd) {
  const unsigned row = threadIdx.x / kWarp, rows = blockDim.x / kWarp;
  const unsigned channel = blockIdx.x * kWarp + threadIdx.x % kWarp;
  const unsigned begin = blockIdx.y * kFolded;
  const unsigned end = begin + kFolded < count ? begin + kFolded : count;
  Gathered<double, 1, int64_t> own{};
  double pivot = 0;
  if (channel < channels) {
    pivot = static_cast<double>(moments[static_cast<size_t>(begin) * channels + channel].pivot);
    for (unsigned i = begin + row; i < end; i += rows) {
      const conv::Moments one = moments[static_cast<size_t>(i) * channels + channel];
      const double away = static_cast<double>(one.pivot) - pivot, n = one.count;
      own.first[0] += n * away + static_cast<double>(one.sum);
      own.second[0] +=
          (n * away + 2.0 * static_cast<double>(one.sum)) * away + static_cast<double>(one.squares);
      own.count += one.count;
    }
  }
  combine_rows<AddMoments>(own, row, rows);
  if (row != 0 || channel >= channels) return;
  if constexpr (LAST) {
    const double n = static_cast<double>(own.count), away = own.first[0] / n;
    mean[channel] = static_cast<float>(pivot + away);
    rstd[channel] = static_cast<float>(1.0 / sqrt(own.second[0] / n - away * away + eps));
  } else {
    const double n = static_cast<double>(own.count);
    const float near = static_cast<float>(pivot + own.first[0] / n);
    const double away = static_cast<double>(near) - pivot, left = own.first[0] - n * away;
    to[static_cast<size_t>(blockIdx.y) * channels + channel] = {
        near, static_cast<float>(left),
        static_cast<float>(own.second[0] - away * (n * away + 2.0 * left)),
        static_cast<int>(own.count)};
  }
}

}  // namespace resnet_fast
