// Device code of bn_act_train and its backward: what the frames of channels.cuh compute.
//
//   z = (x - mean[c]) * scale[c] + bias[c] + residual      scale = rstd * weight      y = act(z)
//
// Two passes over memory each way; each tensor of x's size that is named is moved once:
//
//   forward    MomentsOf      reads x                      writes partial sums
//              Normalise      reads x, residual            writes y
//   backward   GradientSums   reads x, residual, grad_y    writes partial sums
//              GradientMap    reads x, residual, grad_y    writes grad_x, grad_z
//
// Partial sums are 16 bytes a channel and block. An absent residual is not read, and its gradient
// grad_z not written; nor is a residual read that the slope does not depend on (no activation). The
// backward computes z again, bit by bit the forward's, and with it the forward's own mask: the mask
// of a y that was kept would cost as many bytes with a residual, and more without.
//
// x - mean comes first in z: x * scale + (bias - mean * scale) would round twice at the size of
// mean * scale, which may be a thousand times that of z.
#pragma once

#include "moments.cuh"

namespace resnet_fast {

enum Parameter : int { kMean, kScale, kBias, kAlong, kAcross };

// The vectors of one place; those of absent tensors are not read.
template <typename T, int LANES>
struct LoadedVectors {
  Vector<T, LANES> x, residual, grad_y;
};

// What the forward knows when the statistics are there, and the backward to begin with.
template <typename T>
struct Normalisation {
  using C = Accumulator<T>;
  const T* x;
  const T* residual;  // may be null
  const C *mean, *rstd;
  const C *weight, *bias;  // may be null
  Act act;

  template <int K, int PARAMETERS, typename Index>
  __device__ void load_parameters(Channels<C, PARAMETERS, K>& to, Index channel, Index channels,
                                  bool vector) const {
    C weights[K];
    load_channels(to.value[kMean], mean, C(0), channel, channels, vector);
    load_channels(to.value[kScale], rstd, C(1), channel, channels, vector);
    load_channels(weights, weight, C(1), channel, channels, vector);
    load_channels(to.value[kBias], bias, C(0), channel, channels, vector);
#pragma unroll
    for (int k = 0; k < K; ++k) to.value[kScale][k] *= weights[k];
  }

  template <int LANES, typename Index>
  __device__ void load_inputs(LoadedVectors<T, LANES>& to, Index vector) const {
    to.x = load_vector<LANES>(x + vector * LANES);
    if (residual) to.residual = load_vector<LANES>(residual + vector * LANES);
  }

  // K is LANES, or 1 where all lanes are of one channel.
  template <int LANES, int PARAMETERS, int K>
  __device__ void before_act(const LoadedVectors<T, LANES>& in,
                             const Channels<C, PARAMETERS, K>& of, C (&centred)[LANES],
                             C (&z)[LANES]) const {
#pragma unroll
    for (int j = 0; j < LANES; ++j) {
      constexpr auto at = [](int lane) { return K == 1 ? 0 : lane; };
      centred[j] = to_accumulator(in.x.lane[j]) - of.value[kMean][at(j)];
      z[j] = affine(centred[j], of.value[kScale][at(j)], of.value[kBias][at(j)]);
    }
    if (residual) {
#pragma unroll
      for (int j = 0; j < LANES; ++j) z[j] += to_accumulator(in.residual.lane[j]);
    }
  }
};

// y = act(z), rounded once.
template <typename T>
struct Normalise {
  using C = Accumulator<T>;
  static constexpr int kParameters = 3, kBlocks = 4;
  Normalisation<T> of;
  T* y;

  template <int K, typename Index>
  __device__ Channels<C, kParameters, K> channels(Index channel, Index channels,
                                                  bool vector) const {
    Channels<C, kParameters, K> loaded;
    of.load_parameters(loaded, channel, channels, vector);
    return loaded;
  }

  template <int LANES, typename Index>
  __device__ void apply(Index vector, const Channels<C, kParameters, LANES>& parameters) const {
    LoadedVectors<T, LANES> in{};
    of.load_inputs(in, vector);
    C centred[LANES], z[LANES];
    of.before_act(in, parameters, centred, z);
    activate_lanes(of.act, z);
    Vector<T, LANES> out;
#pragma unroll
    for (int j = 0; j < LANES; ++j) out.lane[j] = to_storage<T>(z[j]);
    store_vector(y + vector * LANES, out);
  }
};

// sum(grad_z) and sum(grad_z * (x - mean)) of each channel, grad_z = grad_y * act'(z).
template <typename T>
struct GradientSums {
  using C = Accumulator<T>;
  static constexpr int kSums = 2, kParameters = 3;
  template <int LANES>
  static constexpr int kRowsAtOnce = LANES == 1 ? 4 : 2;
  template <int LANES>
  static constexpr int kVectorsAtOnce = LANES == 1 ? 4 : 2;
  static constexpr int kRowBlocks = 2, kPlaneBlocks = 3;
  template <int LANES>
  using Loaded = LoadedVectors<T, LANES>;
  Normalisation<T> of;
  const T* grad_y;

  template <int K, typename Index>
  __device__ Channels<C, kParameters, K> channels(Index channel, Index channels,
                                                  bool vector) const {
    Channels<C, kParameters, K> loaded;
    of.load_parameters(loaded, channel, channels, vector);
    return loaded;
  }

  template <int LANES, typename Index>
  __device__ Loaded<LANES> load(Index vector) const {
    Loaded<LANES> in{};
    of.load_inputs(in, vector);
    in.grad_y = load_vector<LANES>(grad_y + vector * LANES);
    return in;
  }

  // grad_z, and x - mean.
  template <int LANES, int PARAMETERS, int K>
  __device__ void evaluate(const Loaded<LANES>& in, const Channels<C, PARAMETERS, K>& parameters,
                           C (&centred)[LANES], C (&grad)[LANES]) const {
    of.before_act(in, parameters, centred, grad);
    differentiate_lanes(of.act, grad);
#pragma unroll
    for (int j = 0; j < LANES; ++j) grad[j] = chain(to_accumulator(in.grad_y.lane[j]), grad[j]);
  }

  template <int LANES, int U, typename Index, typename P>
  __device__ void add_rows(Gathered<C, kSums, LANES, Index>& own, const P& parameters,
                           const Loaded<LANES> (&in)[U], int filled) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u < filled) {
        C centred[LANES], grad[LANES];
        evaluate(in[u], parameters, centred, grad);
#pragma unroll
        for (int j = 0; j < LANES; ++j) {
          own.sum[0][j] += grad[j];
          own.sum[1][j] = affine(grad[j], centred[j], own.sum[1][j]);
        }
      }
    }
  }

  template <int LANES, int U, typename Index, typename P>
  __device__ void add_lanes(Gathered<C, kSums, 1, Index>& own, const P& parameters,
                            const Loaded<LANES> (&in)[U], const int (&begin)[U],
                            const int (&end)[U]) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      C centred[LANES], grad[LANES];
      evaluate(in[u], parameters, centred, grad);
      C sum = 0, along = 0;
#pragma unroll
      for (int j = 0; j < LANES; ++j) {
        if (j >= begin[u] && j < end[u]) {
          sum += grad[j];
          along = affine(grad[j], centred[j], along);
        }
      }
      own.sum[0][0] += sum;
      own.sum[1][0] += along;
    }
  }

  template <int K, typename Index>
  __device__ static void close(Gathered<C, kSums, K, Index>&) {}

  template <int K, typename Index>
  __device__ static void combine(Gathered<C, kSums, K, Index>& own,
                                 const Gathered<C, kSums, K, Index>& other) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      own.sum[0][k] += other.sum[0][k];
      own.sum[1][k] += other.sum[1][k];
    }
  }
};

//   grad_x = scale * (grad_z - along - (x - mean) * across)
//
// with `along` the mean of grad_z and `across` rstd times that of grad_z * xhat, both by channel
// from FinishGradients. grad_z is the residual's gradient, and not written where there is none.
template <typename T>
struct GradientMap {
  using C = Accumulator<T>;
  static constexpr int kParameters = 5, kBlocks = 3;
  GradientSums<T> sums;
  const C *along, *across;
  T* grad_x;
  T* grad_z;  // may be null

  template <int K, typename Index>
  __device__ Channels<C, kParameters, K> channels(Index channel, Index channels,
                                                  bool vector) const {
    Channels<C, kParameters, K> loaded;
    sums.of.load_parameters(loaded, channel, channels, vector);
    load_channels(loaded.value[kAlong], along, C(0), channel, channels, vector);
    load_channels(loaded.value[kAcross], across, C(0), channel, channels, vector);
    return loaded;
  }

  template <int LANES, typename Index>
  __device__ void apply(Index vector, const Channels<C, kParameters, LANES>& of) const {
    const auto in = sums.template load<LANES>(vector);
    C centred[LANES], grad[LANES];
    sums.evaluate(in, of, centred, grad);
    Vector<T, LANES> to_x, to_z;
#pragma unroll
    for (int j = 0; j < LANES; ++j) {
      to_z.lane[j] = to_storage<T>(grad[j]);
      const C rest = affine(-centred[j], of.value[kAcross][j], grad[j] - of.value[kAlong][j]);
      to_x.lane[j] = to_storage<T>(of.value[kScale][j] * rest);
    }
    store_vector(grad_x + vector * LANES, to_x);
    if (grad_z) store_vector(grad_z + vector * LANES, to_z);
  }
};

// grad_bias, grad_weight, and for GradientMap their means: rstd makes xhat of x - mean.
template <typename C>
struct FinishGradients : AddPartials {
  double values;
  const C* rstd_of;
  C *grad_weight, *grad_bias;
  C *along, *across;

  template <typename Sums>
  __device__ static void add(Sums& own, const Partial<C>& partial, const Partial<C>&) {
    own.sum[0][0] += static_cast<double>(partial.sum[0]);
    own.sum[1][0] += static_cast<double>(partial.sum[1]);
  }

  template <typename Sums>
  __device__ void store(unsigned channel, const Sums& own, const Partial<C>&) const {
    const double rstd = static_cast<double>(rstd_of[channel]);
    const double weight = own.sum[1][0] * rstd;
    grad_bias[channel] = static_cast<C>(own.sum[0][0]);
    grad_weight[channel] = static_cast<C>(weight);
    along[channel] = static_cast<C>(own.sum[0][0] / values);
    across[channel] = static_cast<C>(weight * rstd / values);
  }
};

}  // namespace resnet_fast
