// Device code of conv_bn_act on tensor cores.
#pragma once

#include "implicit_gemm.cuh"

namespace resnet_fast {

// What follows the convolution: y = act(z * scale + shift + residual); absent parts are null.
// `wide` says that K and the pointers allow 16-byte accesses to y and residual.
template <typename T>
struct ConvEpilogue {
  const float* scale;
  const float* shift;
  const T* residual;
  T* y;
  Act act;
  bool wide;
};

namespace conv {

// LANES channels of one pixel from fp32 sums to y.
template <typename T, int LANES>
__device__ inline void finish(const ConvEpilogue<T>& epilogue, float (&value)[LANES],
                              const float (&scale)[LANES], const float (&shift)[LANES], int64_t at,
                              int present) {
  const bool wide = epilogue.wide && present == LANES;
  Vector<T, LANES> add{};
  if (epilogue.residual != nullptr) {
    if (wide) {
      add = load_vector<LANES>(epilogue.residual + at);
    } else {
#pragma unroll
      for (int e = 0; e < LANES; ++e)
        if (e < present) add.lane[e] = epilogue.residual[at + e];
    }
  }
#pragma unroll
  for (int e = 0; e < LANES; ++e) {
    value[e] = fmaf(value[e], scale[e], shift[e]);
    if (epilogue.residual != nullptr) value[e] += to_accumulator(add.lane[e]);
  }
  activate_lanes(epilogue.act, value);
  Vector<T, LANES> out;
#pragma unroll
  for (int e = 0; e < LANES; ++e) out.lane[e] = to_storage<T>(value[e]);
  if (wide) {
    store_vector(epilogue.y + at, out);
  } else {
#pragma unroll
    for (int e = 0; e < LANES; ++e)
      if (e < present) epilogue.y[at + e] = out.lane[e];
  }
}

// scale and shift of LANES channels. Absent ones leave every bit: z * 1 + (-0).
template <int LANES>
__device__ inline void load_affine(const float* scale, const float* shift, int channel, int present,
                                   float (&scales)[LANES], float (&shifts)[LANES]) {
#pragma unroll
  for (int e = 0; e < LANES; ++e) {
    scales[e] = scale != nullptr && e < present ? scale[channel + e] : 1.0f;
    shifts[e] = shift != nullptr && e < present ? shift[channel + e] : -0.0f;
  }
}

}  // namespace conv

//   y[m, n] = act(z[m, n] * scale[n] + shift[n] + residual[m, n])     z: implicit_gemm.cuh
//
// The sums pass through shared memory (the ring is free by then), 16 pixels of a warp at a time,
// so that y and the residual move in 16-byte accesses; scale, shift, residual and activation are
// fp32, and y is rounded once. With several parts of k each writes its fp32 sums to `partial`
// [parts][pixels][K], and conv_sum_kernel adds them in order. Shared memory holds two blocks of the
// larger tiles: told so, ptxas has no reason to spill for the sake of more.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kTileThreads, 2)
    conv_bn_act_kernel(ConvShape shape, const T* __restrict__ x, const T* __restrict__ weight,
                       ConvEpilogue<T> epilogue, float* __restrict__ partial, int stages_a_part) {
  const conv::Place<T, Tile> place(shape, stages_a_part);
  const conv::Pixel* const table =
      conv::locate_tile<Tile>(shape, place.first_m, place.pixels, place.group);
  conv::Loader<T, Tile> loader(shape, x, weight, table, place);
  float sum[Tile::kWarpM / 16][Tile::kWarpN / 8][4] = {};
  conv::accumulate<T, Tile>(loader, place.stages, sum);

  using Lanes = conv::Lanes<T, Tile>;
  constexpr int kWidth = Lanes::kWidth;
  const Lanes lanes;
  const int n = place.first_n + lanes.n();
  const int present = place.group_filters - n < kWidth ? place.group_filters - n : kWidth;
  const int channel = place.group * place.group_filters + n;
  float scale[kWidth], shift[kWidth];
  conv::load_affine(epilogue.scale, epilogue.shift, channel, present, scale, shift);
  lanes.for_each_strip(sum, [&](int strip, auto& values) {
#pragma unroll
    for (int turn = 0; turn < Lanes::kTurns; ++turn) {
      const int64_t m = place.first_m + lanes.m(strip, turn);
      if (m >= place.pixels || present <= 0) continue;
      const int64_t at = m * shape.filters + channel;
      if (partial == nullptr) {
        conv::finish(epilogue, values[turn], scale, shift, at, present);
      } else {
        float* const to = partial + int64_t{blockIdx.z} * place.pixels * shape.filters + at;
#pragma unroll
        for (int e = 0; e < kWidth; ++e)
          if (e < present) to[e] = values[turn][e];
      }
    }
  });
}

//   y[i] = act(sum_p partial[p, i] * scale[n] + shift[n] + residual[i]),   n = i % K
//
// Adds the parts of k in order, so the result is the same in every run. A thread owns kLanes
// adjacent elements (or the last few), grid-stride.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    conv_sum_kernel(const float* __restrict__ partial, int parts, int64_t numel, int filters,
                    ConvEpilogue<T> epilogue) {
  constexpr int kWidth = kLanes<T>;
  const int64_t step = int64_t{gridDim.x} * blockDim.x * kWidth;
  for (int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth; at < numel;
       at += step) {
    // A vector is `wide` only where filters is a multiple of kWidth: it never spans two pixels.
    const int count = numel - at < kWidth ? static_cast<int>(numel - at) : kWidth;
    float value[kWidth] = {}, scale[kWidth], shift[kWidth];
    int n = static_cast<int>(at % filters);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      scale[e] = epilogue.scale != nullptr ? epilogue.scale[n] : 1.0f;
      shift[e] = epilogue.shift != nullptr ? epilogue.shift[n] : -0.0f;
      if (e < count)
        for (int part = 0; part < parts; ++part)
          value[e] += partial[int64_t{part} * numel + at + e];
      n = n + 1 < filters ? n + 1 : 0;
    }
    conv::finish(epilogue, value, scale, shift, at, count);
  }
}

}  // namespace resnet_fast
