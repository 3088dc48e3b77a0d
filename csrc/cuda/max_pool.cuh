// Device code of max_pool and its backward.
#pragma once

#include "max_pool.h"
#include "vector.cuh"

namespace resnet_fast {

// The maximum of some of a window's taps, taken in their order: the first of equal ones, and the
// last NaN, as in torch. Maxima of consecutive parts combine to that of the whole. It starts as
// minus infinity at the first tap there is, which no part without a pixel, or without a greater
// one, can win from.
template <typename T, int LANES>
struct PoolMaximum {
  Accumulator<T> value[LANES];
  int tap[LANES];

  __device__ explicit PoolMaximum(int first = 0) {
#pragma unroll
    for (int j = 0; j < LANES; ++j) {
      value[j] = -INFINITY;
      tap[j] = first;
    }
  }
  __device__ void take(int j, Accumulator<T> v, int t) {
    const bool wins = v > value[j] || v != v;
    value[j] = wins ? v : value[j];
    tap[j] = wins ? t : tap[j];
  }
  __device__ void take(const Vector<T, LANES>& v, int t) {
#pragma unroll
    for (int j = 0; j < LANES; ++j) take(j, to_accumulator(v.lane[j]), t);
  }
  // Of a row of the window, whose first tap is `t`.
  __device__ void take(const PoolMaximum& row, int t) {
#pragma unroll
    for (int j = 0; j < LANES; ++j) take(j, row.value[j], t + row.tap[j]);
  }
};

// What a thread owns: pooled column `column` of rows [first, end), LANES channels from `channel`
// on.
struct PoolPlace {
  int64_t image;
  int first, end, column, channel;

  __device__ PoolPlace(const PoolShape& s, unsigned lanes) {
    const unsigned vectors = s.channels / lanes, columns = s.columns, strips = s.strips();
    unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    channel = static_cast<int>(thread % vectors * lanes);
    thread /= vectors;
    column = static_cast<int>(thread % columns);
    thread /= columns;
    first = static_cast<int>(thread % strips) * s.strip;
    end = first + s.strip < s.rows ? first + s.strip : s.rows;
    image = thread / strips;
  }
};

//   y[n, p, q, c] = max x[n, 2p-1 .. 2p+1, 2q-1 .. 2q+1, c],   taps outside x left out
//
// A thread walks down a strip of pooled rows with one column and 16 bytes of channels, so that a
// warp's loads are whole lines. A row 2p+1 belongs to two windows: its maximum is kept. Columns
// that neighbours share come from the first-level cache.
template <typename T, int LANES>
__global__ void __launch_bounds__(kThreads)
    max_pool_kernel(const T* __restrict__ x, T* __restrict__ y, PoolShape s) {
  const PoolPlace at(s, LANES);
  if (at.image >= s.images) return;
  const int64_t pitch = static_cast<int64_t>(s.width) * s.channels;
  const T* pixel =
      x + at.image * s.height * pitch + 2 * int64_t{at.column} * s.channels + at.channel;
  T* out = y + (at.image * s.rows * s.columns + at.column) * s.channels + at.channel;
  const bool left = at.column > 0, right = 2 * at.column + 1 < s.width;

  const auto row = [&](int h) {
    PoolMaximum<T, LANES> found;
    if (h < 0 || h >= s.height) return found;
    Vector<T, LANES> v[3];
    const T* from = pixel + h * pitch;
    if (left) v[0] = load_vector<LANES>(from - s.channels);
    v[1] = load_vector<LANES>(from);
    if (right) v[2] = load_vector<LANES>(from + s.channels);
    if (left) found.take(v[0], 0);
    found.take(v[1], 1);
    if (right) found.take(v[2], 2);
    return found;
  };
  PoolMaximum<T, LANES> above = row(2 * at.first - 1);
  for (int p = at.first; p < at.end; ++p) {
    PoolMaximum<T, LANES> best = above;
    best.take(row(2 * p), 3);
    above = row(2 * p + 1);
    best.take(above, 6);
    Vector<T, LANES> value;
#pragma unroll
    for (int j = 0; j < LANES; ++j) value.lane[j] = to_storage<T>(best.value[j]);
    store_vector(out + static_cast<int64_t>(p) * s.columns * s.channels, value);
  }
}

//   grad_x[n, h, w, c] = sum of grad_y[n, p, q, c] over the windows whose maximum is at (h, w)
//
// Each pixel gathers from the at most four windows that hold it, whose maxima are found again in x:
// no index is stored, which would be 64 bits for each of y, and nothing is added in an order of
// chance. A thread owns what max_pool_kernel's does, of grad_x: pixels 2q and 2q+1 of the rows
// 2p-1 and 2p, below which row p of windows is known. It needs the windows q and q+1 of the rows
// p-1 and p (o: a pixel that it owns):
//
//   column     2q-1   2q   2q+1  2q+2  2q+3
//   window q   |             |
//          q+1               |           |
//   row 2p-1          o      o              of windows p-1 and p
//   row 2p            o      o              of window p
//   row 2p+1                                of windows p and p+1
//
// The sum is fp32 (fp64 for fp64), in the order of the windows, and rounded once.
template <typename T, int LANES>
__global__ void __launch_bounds__(kThreads)
    max_pool_backward_kernel(const T* __restrict__ grad_y, const T* __restrict__ x,
                             T* __restrict__ grad_x, PoolShape s) {
  using Maximum = PoolMaximum<T, LANES>;
  struct Windows {
    Maximum part[2];  // of q and q + 1
  };
  struct Gradients {
    Vector<T, LANES> part[2];
    int tap[2][LANES];  // that they go to, -1 for a window that is none

    // Adds to the sums of a pixel that is tap `t` of window q + i.
    __device__ void give(Accumulator<T> (&sum)[LANES], int i, int t) const {
#pragma unroll
      for (int j = 0; j < LANES; ++j) {
        if (tap[i][j] == t) sum[j] += to_accumulator(part[i].lane[j]);
      }
    }
  };
  const PoolPlace at(s, LANES);
  if (at.image >= s.images) return;
  const int64_t pitch = static_cast<int64_t>(s.width) * s.channels;
  const int64_t corner =
      at.image * s.height * pitch + 2 * int64_t{at.column} * s.channels + at.channel;
  const T* gradients =
      grad_y + (at.image * s.rows * s.columns + at.column) * s.channels + at.channel;
  // Columns 2q - 1 to 2q + 3.
  bool there[5];
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    there[i] = 2 * at.column + i >= 1 && 2 * at.column + i - 1 < s.width;
  }

  const auto row = [&](int h) {
    Windows found;
    if (h < 0 || h >= s.height) return found;
    Vector<T, LANES> v[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      if (there[i]) v[i] = load_vector<LANES>(x + corner + h * pitch + (i - 1) * s.channels);
    }
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      if (there[i] && i < 3) found.part[0].take(v[i], i);
      if (there[i] && i > 1) found.part[1].take(v[i], i - 2);
    }
    return found;
  };
  // Row p of windows, below its first row of pixels, of which the last becomes the next one's
  // first.
  const auto windows = [&](int p, Windows& above) {
    Gradients found;
    const Windows middle = row(2 * p), below = row(2 * p + 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Maximum best((p > 0 ? 0 : 3) + (at.column + i > 0 ? 0 : 1));
      best.take(above.part[i], 0);
      best.take(middle.part[i], 3);
      best.take(below.part[i], 6);
      const bool exists = p >= 0 && p < s.rows && at.column + i < s.columns;
      if (exists) {
        found.part[i] =
            load_vector<LANES>(gradients + (static_cast<int64_t>(p) * s.columns + i) * s.channels);
      }
#pragma unroll
      for (int j = 0; j < LANES; ++j) found.tap[i][j] = exists ? best.tap[j] : -1;
    }
    above = below;
    return found;
  };
  const auto store = [&](int h, int right, const Accumulator<T>(&sum)[LANES]) {
    if (!there[1 + right]) return;
    Vector<T, LANES> value;
#pragma unroll
    for (int j = 0; j < LANES; ++j) value.lane[j] = to_storage<T>(sum[j]);
    store_vector(grad_x + corner + h * pitch + right * s.channels, value);
  };

  Windows above = row(2 * at.first - 3);
  Gradients before = windows(at.first - 1, above);
  // Below the last windows there may be a row, which is theirs alone.
  const int end = at.end == s.rows ? at.end + 1 : at.end;
  for (int p = at.first; p < end; ++p) {
    const Gradients now = windows(p, above);
    if (2 * p - 1 >= 0 && 2 * p - 1 < s.height) {
      Accumulator<T> sum[2][LANES] = {};
      before.give(sum[0], 0, 7);
      now.give(sum[0], 0, 1);
      store(2 * p - 1, 0, sum[0]);
      before.give(sum[1], 0, 8);
      before.give(sum[1], 1, 6);
      now.give(sum[1], 0, 2);
      now.give(sum[1], 1, 0);
      store(2 * p - 1, 1, sum[1]);
    }
    if (2 * p < s.height) {
      Accumulator<T> sum[2][LANES] = {};
      now.give(sum[0], 0, 4);
      store(2 * p, 0, sum[0]);
      now.give(sum[1], 0, 5);
      now.give(sum[1], 1, 3);
      store(2 * p, 1, sum[1]);
    }
    before = now;
  }
}

}  // namespace resnet_fast
