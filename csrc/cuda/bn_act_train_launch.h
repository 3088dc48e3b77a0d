// The launches of bn_act_train and its backward, in order: for the launcher, and for the tests on
// the host. A Device says how many blocks of a kernel are resident, launches one, and gives memory
// that lasts until the last of them has run.
#pragma once

#include "bn_act_train.cuh"
#include "channel_grid.h"

namespace resnet_fast {

// A dense tensor [batch][channels][plane], or [batch * plane][channels] where channels_last.
struct ChannelShape {
  int64_t batch, channels, plane;
  bool channels_last;

  int64_t numel() const { return batch * channels * plane; }
  int64_t values() const { return batch * plane; }  // of a channel
  // Vectors of `lanes` then leave no tail, and none has more than two channels (channels.cuh).
  bool fits_vectors(int64_t lanes) const {
    return numel() % lanes == 0 && (channels_last || plane >= lanes);
  }
  // Whether the parameters of a vector's channels are a vector themselves.
  template <typename... Pointers>
  bool has_vector_parameters(int64_t lanes, Pointers... parameters) const {
    return channels_last && channels % lanes == 0 && aligned(parameters...);
  }
};

inline dim3 dimensions(int64_t x, int64_t y = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

// The partials of `reduce`, then `finish`.
template <typename T, int LANES, typename Index, typename Device, typename Reduce, typename Finish>
void reduce_channels(Device& device, const ChannelShape& shape, const Reduce& reduce,
                     const Finish& finish, bool vector_parameters) {
  using C = Accumulator<T>;
  const auto channels = static_cast<Index>(shape.channels);
  Partial<C>* partials = nullptr;
  int64_t count = 0;
  const auto allocate = [&](int64_t partials_a_channel) {
    count = partials_a_channel;
    const int64_t bytes = count * shape.channels * static_cast<int64_t>(sizeof(Partial<C>));
    partials = static_cast<Partial<C>*>(device.workspace(bytes));
  };
  if (shape.channels_last) {
    constexpr auto kKernel = channels_last_sums_kernel<T, LANES, Index, Reduce>;
    const ColumnGrid grid =
        column_grid(shape.numel(), shape.channels, LANES, Reduce::template kRowsAtOnce<LANES>,
                    device.template resident<kKernel>());
    allocate(grid.partials());
    device.template launch<kKernel>(
        dimensions(grid.tiles, grid.splits), dimensions(grid.threads()),
        combine_bytes(grid.threads(), Reduce::kSums * LANES * sizeof(C), sizeof(Index)), reduce,
        partials, static_cast<Index>(shape.numel() / LANES), static_cast<Index>(grid.columns),
        channels, vector_parameters, static_cast<unsigned>(grid.rows));
  } else {
    constexpr auto kKernel = planes_sums_kernel<T, LANES, Index, Reduce>;
    const PlaneGrid grid =
        plane_grid(shape.batch, shape.channels, shape.plane, LANES,
                   Reduce::template kVectorsAtOnce<LANES>, device.template resident<kKernel>());
    allocate(grid.splits);
    device.template launch<kKernel>(
        dimensions(shape.channels * grid.splits), dimensions(grid.threads),
        combine_bytes(grid.threads, Reduce::kSums * sizeof(C), sizeof(Index)), reduce, partials,
        static_cast<Index>(shape.batch), channels, static_cast<Index>(shape.plane),
        static_cast<Index>(grid.vectors));
  }
  const int64_t threads = kWarp * finish_rows(count);
  device.template launch<finish_kernel<C, Finish>>(
      dimensions(divide_up(shape.channels, kWarp)), dimensions(threads),
      combine_bytes(threads, 2 * sizeof(double), sizeof(unsigned)), finish, partials,
      static_cast<unsigned>(count), static_cast<unsigned>(shape.channels));
}

template <typename T, int LANES, typename Index, typename Device, typename Map>
void map_channels(Device& device, const ChannelShape& shape, const Map& map,
                  bool vector_parameters) {
  const int64_t vectors = shape.numel() / LANES;
  const auto channels = static_cast<Index>(shape.channels);
  if (shape.channels_last) {
    constexpr auto kKernel = channels_last_map_kernel<T, LANES, Index, Map>;
    const int64_t blocks = grid_for(vectors, device.template resident<kKernel>(),
                                    channel_period(shape.channels, LANES));
    device.template launch<kKernel>(dimensions(blocks), dimensions(kThreads), 0, map,
                                    static_cast<Index>(vectors), channels, vector_parameters);
  } else {
    constexpr auto kKernel = planes_map_kernel<T, LANES, Index, Map>;
    const int64_t blocks = grid_for(vectors, device.template resident<kKernel>());
    const auto plane = static_cast<Index>(shape.plane);
    const auto advance = plane_step<Index>(blocks * kThreads * LANES, shape.plane, shape.channels);
    device.template launch<kKernel>(dimensions(blocks), dimensions(kThreads), 0, map,
                                    static_cast<Index>(vectors), channels, plane, advance);
  }
}

// norm_act: the pass behind the statistics.
template <typename T, int LANES, typename Index, typename Device>
void run_norm_act(Device& device, const ChannelShape& shape, const Normalisation<T>& of, T* y) {
  const bool vector = shape.has_vector_parameters(LANES, of.mean, of.rstd, of.weight, of.bias);
  map_channels<T, LANES, Index>(device, shape, Normalise<T>{of, y}, vector);
}

template <typename T>
struct ForwardOutputs {
  T* y;
  Accumulator<T>*mean, *rstd;
};

// `of.mean` and `of.rstd` are the outputs', which the last kernel reads.
template <typename T, int LANES, typename Index, typename Device>
void run_bn_act_train(Device& device, const ChannelShape& shape, Normalisation<T> of,
                      const ForwardOutputs<T>& out, double eps) {
  using C = Accumulator<T>;
  const FinishMoments<C> finish{{}, static_cast<double>(shape.values()), eps, out.mean, out.rstd};
  reduce_channels<T, LANES, Index>(device, shape, MomentsOf<T>{of.x}, finish, false);
  of.mean = out.mean;
  of.rstd = out.rstd;
  run_norm_act<T, LANES, Index>(device, shape, of, out.y);
}

template <typename T>
struct BackwardOutputs {
  T* grad_x;
  Accumulator<T>*grad_weight, *grad_bias;
  T* grad_z;  // null where there is no residual
};

template <typename T, int LANES, typename Index, typename Device>
void run_bn_act_train_backward(Device& device, const ChannelShape& shape, Normalisation<T> of,
                               const T* grad_y, const BackwardOutputs<T>& out) {
  using C = Accumulator<T>;
  // A residual that is only added does not show in the activation's slope.
  if (of.act == Act::none) of.residual = nullptr;
  const int64_t bytes = 2 * shape.channels * static_cast<int64_t>(sizeof(C));
  C* const along = static_cast<C*>(device.workspace(bytes));
  C* const across = along + shape.channels;
  const bool vector =
      shape.has_vector_parameters(LANES, of.mean, of.rstd, of.weight, of.bias, along, across);
  const GradientSums<T> sums{of, grad_y};
  const FinishGradients<C> finish{
      {},    static_cast<double>(shape.values()), of.rstd, out.grad_weight, out.grad_bias, along,
      across};
  reduce_channels<T, LANES, Index>(device, shape, sums, finish, vector);
  const GradientMap<T> map{sums, along, across, out.grad_x, out.grad_z};
  map_channels<T, LANES, Index>(device, shape, map, vector);
}

}  // namespace resnet_fast
