// The statistics of each channel: the first pass of bn_act_train's forward.
#pragma once

#include "channels.cuh"

namespace resnet_fast {

// Mean and sum of squared deviations of each channel, in one pass. A thread adds up x - origin and
// its square, from an origin of its own near its first values. With sums s and q of n values,
//
//   mean = origin + s / n      spread = q - s^2 / n
//
// where the difference keeps its digits as long as the origin is within a few deviations of the
// mean: it is the middle one of three rows, or the average of a few vectors of a plane, so that an
// outlier, as in a corner that has seen padding, does not take it far. With d = mean_b - mean_a two
// sets are joined by
//
//   mean = mean_a + d n_b / n      spread = spread_a + spread_b + d^2 n_a n_b / n
//
// (Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance"). A mean is a sum of
// two numbers, the second what rounding took from the first: a mean of a thousand deviations would
// be rounded at a size at which d is lost. NaN and infinities make their own channel NaN, no other.
template <typename T>
struct MomentsOf {
  using C = Accumulator<T>;
  static constexpr int kSums = 3;
  template <int LANES>
  static constexpr int kRowsAtOnce = 4;
  template <int LANES>
  static constexpr int kVectorsAtOnce = LANES == 8 ? 2 : 4;
  static constexpr int kRowBlocks = 2, kPlaneBlocks = 4;
  template <int LANES>
  using Loaded = Vector<T, LANES>;
  const T* x;

  struct None {};
  template <int K, typename Index>
  __device__ None channels(Index, Index, bool) const {
    return {};
  }

  template <int LANES, typename Index>
  __device__ Loaded<LANES> load(Index vector) const {
    return load_vector<LANES>(x + vector * LANES);
  }

  template <int LANES, int U, typename Index>
  __device__ void add_rows(Gathered<C, kSums, LANES, Index>& own, const None&,
                           const Loaded<LANES> (&in)[U], int filled) const {
    if (own.count == 0) {
#pragma unroll
      for (int j = 0; j < LANES; ++j) {
        // By constant indices, or the rows would lie in local memory.
        const auto row = [&](int u) {
          return to_accumulator(u < filled ? in[u].lane[j] : in[0].lane[j]);
        };
        own.sum[kOrigin][j] = middle(row(0), row(1), row(2));
      }
    }
    own.count += filled;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u < filled) {
#pragma unroll
        for (int j = 0; j < LANES; ++j) {
          const C away = to_accumulator(in[u].lane[j]) - own.sum[kOrigin][j];
          own.sum[kSum][j] += away;
          own.sum[kSquares][j] = affine(away, away, own.sum[kSquares][j]);
        }
      }
    }
  }

  template <int LANES, int U, typename Index>
  __device__ void add_lanes(Gathered<C, kSums, 1, Index>& own, const None&,
                            const Loaded<LANES> (&in)[U], const int (&begin)[U],
                            const int (&end)[U]) const {
    int added = 0;
#pragma unroll
    for (int u = 0; u < U; ++u) added += end[u] - begin[u];
    if (own.count == 0 && added > 0) {
      C first = 0, away = 0;
#pragma unroll
      for (int u = U - 1; u >= 0; --u) {
#pragma unroll
        for (int j = LANES - 1; j >= 0; --j) {
          if (j >= begin[u] && j < end[u]) first = to_accumulator(in[u].lane[j]);
        }
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int j = 0; j < LANES; ++j) {
          if (j >= begin[u] && j < end[u]) away += to_accumulator(in[u].lane[j]) - first;
        }
      }
      own.sum[kOrigin][0] = affine(away, C(1) / static_cast<C>(added), first);
    }
    own.count += added;
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int j = 0; j < LANES; ++j) {
        const bool mine = j >= begin[u] && j < end[u];
        const C away = mine ? to_accumulator(in[u].lane[j]) - own.sum[kOrigin][0] : C(0);
        own.sum[kSum][0] += away;
        own.sum[kSquares][0] = affine(away, away, own.sum[kSquares][0]);
      }
    }
  }

  // From origin, sum and squares to mean, its rest and spread.
  template <int K, typename Index>
  __device__ static void close(Gathered<C, kSums, K, Index>& own) {
    const C share = own.count == 0 ? C(0) : C(1) / static_cast<C>(own.count);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const C sum = own.sum[kSum][k], away = sum * share;
      own.sum[kRest][k] = 0;
      move(own.sum[kMean][k], own.sum[kRest][k], away);
      own.sum[kSpread][k] = affine(-sum, away, own.sum[kSquares][k]);
    }
  }

  template <int K, typename Index>
  __device__ static void combine(Gathered<C, kSums, K, Index>& own,
                                 const Gathered<C, kSums, K, Index>& other) {
    const Index count = own.count + other.count;
    const C share = count == 0 ? C(0) : static_cast<C>(other.count) / static_cast<C>(count);
    const C weight = static_cast<C>(own.count) * share;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const C between =
          (other.sum[kMean][k] - own.sum[kMean][k]) + (other.sum[kRest][k] - own.sum[kRest][k]);
      move(own.sum[kMean][k], own.sum[kRest][k], between * share);
      own.sum[kSpread][k] += affine(between * weight, between, other.sum[kSpread][k]);
    }
    own.count = count;
  }

 private:
  enum { kOrigin, kSum, kSquares };
  enum { kMean, kRest, kSpread };

  __device__ static C middle(C a, C b, C c) {
    const C low = a < b ? a : b, high = a < b ? b : a;
    return c < low ? low : high < c ? high : c;
  }

  // mean + rest + by, exactly but for the rounding of rest + by (Knuth's TwoSum).
  __device__ static void move(C& mean, C& rest, C by) {
    by += rest;
    const C moved = mean + by;
    const C taken = moved - mean;
    rest = (mean - (moved - taken)) + (by - taken);
    mean = moved;
  }
};

// mean, and rstd = 1 / sqrt(spread / M + eps). Around any number a the partials' means m and
// spreads s give, n being their counts,
//
//   S = sum(n (m - a))     Q = sum(s + n (m - a)^2)     mean = a + S / M     spread = Q - S^2 / M
//
// without a division a partial. a is the first partial's mean: its distance, too, is bounded by the
// deviation.
template <typename C>
struct FinishMoments : AddPartials {
  double values, eps;
  C *mean, *rstd;

  template <typename Sums>
  __device__ static void add(Sums& own, const Partial<C>& partial, const Partial<C>& first) {
    const double count = static_cast<double>(partial.count);
    const double away = (static_cast<double>(partial.sum[0]) - static_cast<double>(first.sum[0])) +
                        (static_cast<double>(partial.sum[1]) - static_cast<double>(first.sum[1]));
    own.sum[0][0] += count * away;
    own.sum[1][0] += static_cast<double>(partial.sum[2]) + count * away * away;
  }

  template <typename Sums>
  __device__ void store(unsigned channel, const Sums& own, const Partial<C>& first) const {
    const double away = own.sum[0][0] / values;
    const double variance = own.sum[1][0] / values - away * away;
    mean[channel] = static_cast<C>(static_cast<double>(first.sum[0]) +
                                   (static_cast<double>(first.sum[1]) + away));
    rstd[channel] = static_cast<C>(1.0 / sqrt(variance + eps));
  }
};

}  // namespace resnet_fast
