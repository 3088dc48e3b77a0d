// Device code of bn_act, for channels-last and for channels-first tensors.
#pragma once

#include "vector.cuh"

namespace resnet_fast {

// An absent scale or shift leaves every bit of x alone: x * 1 + (-0) keeps even the sign of zero.
template <typename C>
__device__ inline C scale_at(const C* __restrict__ scale, int64_t channel) {
  return scale ? scale[channel] : C(1);
}
template <typename C>
__device__ inline C shift_at(const C* __restrict__ shift, int64_t channel) {
  return shift ? shift[channel] : C(-0.0);
}

__device__ inline float affine(float x, float scale, float shift) { return fmaf(x, scale, shift); }
__device__ inline double affine(double x, double scale, double shift) {
  return fma(x, scale, shift);
}

//   y[i, c] = act(x[i, c] * scale[c] + shift[c] + residual[i, c]),   c fastest in memory
//
// A pixel's channels are adjacent, so the tensor is a line of numel elements whose channel is the
// index modulo C. A thread owns vectors t, t + S, t + 2S, ... of LANES elements (16 bytes). The
// launcher makes S * LANES a multiple of C, or starts so many threads that none takes a second
// step: either way a thread meets the same LANES channels each time, and keeps their scale and
// shift in registers (C = 24, fp16, 8 lanes, S = 6):
//
//   channel   0       8       16      0       8       16      0       8
//   pixel 0  |thread 0|thread 1|thread 2|                  pixel 2 |thread 0|thread 1|...
//   pixel 1                             |thread 3|thread 4|thread 5|
//
// C need not be a multiple of LANES: a vector may then span two pixels, its lanes still meet fixed
// channels, and loads stay 16 bytes wide. They are that wide so that a warp moves 512 bytes in an
// instruction; the kernel does nothing but move memory. fp32 arithmetic (fp64 for fp64), rounded
// once at the store.
template <typename T, int LANES, bool RESIDUAL, typename Index>
__global__ void __launch_bounds__(kThreads)
    bn_act_channels_last_kernel(const T* __restrict__ x, const T* __restrict__ residual,
                                const Accumulator<T>* __restrict__ scale,
                                const Accumulator<T>* __restrict__ shift, T* __restrict__ y,
                                Index numel, Index channels, bool vector_parameters, Act act) {
  using C = Accumulator<T>;
  constexpr int kPart = LANES < kLanes<C> ? LANES : kLanes<C>;
  const Index vectors = numel / LANES;
  const Index first = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index step = static_cast<Index>(gridDim.x) * blockDim.x;

  if (first < vectors) {
    C lane_scale[LANES], lane_shift[LANES];
    Index channel = first * LANES % channels;
    if (vector_parameters) {
      // C is a multiple of LANES here, so the LANES channels are adjacent and aligned.
#pragma unroll
      for (int part = 0; part < LANES; part += kPart) {
        Vector<C, kPart> s, b;
        if (scale) s = load_vector<kPart>(scale + channel + part);
        if (shift) b = load_vector<kPart>(shift + channel + part);
#pragma unroll
        for (int j = 0; j < kPart; ++j) {
          lane_scale[part + j] = scale ? s.lane[j] : C(1);
          lane_shift[part + j] = shift ? b.lane[j] : C(-0.0);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < LANES; ++j) {
        lane_scale[j] = scale_at(scale, channel);
        lane_shift[j] = shift_at(shift, channel);
        if (++channel == channels) channel = 0;
      }
    }
    for (Index vector = first; vector < vectors; vector += step) {
      const auto in = load_vector<LANES>(x + vector * LANES);
      Vector<T, LANES> add;
      if constexpr (RESIDUAL) add = load_vector<LANES>(residual + vector * LANES);
      C value[LANES];
#pragma unroll
      for (int j = 0; j < LANES; ++j) {
        value[j] = affine(to_accumulator(in.lane[j]), lane_scale[j], lane_shift[j]);
        if constexpr (RESIDUAL) value[j] += to_accumulator(add.lane[j]);
      }
      activate_lanes(act, value);
      Vector<T, LANES> out;
#pragma unroll
      for (int j = 0; j < LANES; ++j) out.lane[j] = to_storage<T>(value[j]);
      store_vector(y + vector * LANES, out);
    }
  }

  const Index done = vectors * LANES;
  if (first < numel - done) {
    const Index i = done + first;
    const Index channel = i % channels;
    C value[1] = {affine(to_accumulator(x[i]), scale_at(scale, channel), shift_at(shift, channel))};
    if constexpr (RESIDUAL) value[0] += to_accumulator(residual[i]);
    activate_lanes(act, value);
    y[i] = to_storage<T>(value[0]);
  }
}

// How far S threads * LANES elements advance in (channel, offset within the plane).
template <typename Index>
struct PlaneStep {
  Index channel;
  Index offset;
};

template <typename Index>
inline PlaneStep<Index> plane_step(int64_t elements, int64_t plane, int64_t channels) {
  return {static_cast<Index>(elements / plane % channels), static_cast<Index>(elements % plane)};
}

//   y[n, c, i] = act(x[n, c, i] * scale[c] + shift[c] + residual[n, c, i]),   i fastest in memory
//
// The tensor is again a line, of planes of P Q elements, one channel each. A thread owns vectors
// t, t + S, t + 2S, ... of LANES elements (16 bytes), whatever the plane's size; a vector that
// straddles planes takes a scale and shift for each lane (7x7 planes of 49, fp16, 8 lanes):
//
//   element   0        8            40       48       56          98
//   thread   |0       |1       |... |5       |6       |7     |... |12
//   plane    |0                              :|1                  :|2        (thread 6: 1 + 7)
//
// Peeling each plane to an aligned start would move 9 of those 49 elements one by one in most
// planes; straddling keeps every load but the tensor's tail 16 bytes wide. The position is divided
// out once, then advanced by the constant step with a carry: no division in the loop.
// fp32 arithmetic (fp64 for fp64), rounded once at the store.
template <typename T, int LANES, bool RESIDUAL, typename Index>
__global__ void __launch_bounds__(kThreads)
    bn_act_planes_kernel(const T* __restrict__ x, const T* __restrict__ residual,
                         const Accumulator<T>* __restrict__ scale,
                         const Accumulator<T>* __restrict__ shift, T* __restrict__ y, Index numel,
                         Index channels, Index plane, PlaneStep<Index> advance, Act act) {
  using C = Accumulator<T>;
  const Index vectors = numel / LANES;
  const Index first = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index step = static_cast<Index>(gridDim.x) * blockDim.x;

  Index offset = first * LANES;
  Index channel = offset / plane;
  offset -= channel * plane;
  channel %= channels;
  for (Index vector = first; vector < vectors; vector += step) {
    const auto in = load_vector<LANES>(x + vector * LANES);
    Vector<T, LANES> add;
    if constexpr (RESIDUAL) add = load_vector<LANES>(residual + vector * LANES);
    C value[LANES];
    if (plane - offset >= static_cast<Index>(LANES)) {
      const C s = scale_at(scale, channel), b = shift_at(shift, channel);
#pragma unroll
      for (int j = 0; j < LANES; ++j) value[j] = affine(to_accumulator(in.lane[j]), s, b);
    } else {
      Index lane_channel = channel, lane_offset = offset;
#pragma unroll
      for (int j = 0; j < LANES; ++j) {
        value[j] = affine(to_accumulator(in.lane[j]), scale_at(scale, lane_channel),
                          shift_at(shift, lane_channel));
        if (++lane_offset == plane) {
          lane_offset = 0;
          if (++lane_channel == channels) lane_channel = 0;
        }
      }
    }
    if constexpr (RESIDUAL) {
#pragma unroll
      for (int j = 0; j < LANES; ++j) value[j] += to_accumulator(add.lane[j]);
    }
    activate_lanes(act, value);
    Vector<T, LANES> out;
#pragma unroll
    for (int j = 0; j < LANES; ++j) out.lane[j] = to_storage<T>(value[j]);
    store_vector(y + vector * LANES, out);

    offset += advance.offset;
    channel += advance.channel;
    if (offset >= plane) {
      offset -= plane;
      ++channel;
    }
    if (channel >= channels) channel -= channels;
  }

  const Index done = vectors * LANES;
  if (first < numel - done) {
    const Index i = done + first;
    const Index tail_channel = i / plane % channels;
    C value[1] = {
        affine(to_accumulator(x[i]), scale_at(scale, tail_channel), shift_at(shift, tail_channel))};
    if constexpr (RESIDUAL) value[0] += to_accumulator(residual[i]);
    activate_lanes(act, value);
    y[i] = to_storage<T>(value[0]);
  }
}

}  // namespace resnet_fast
