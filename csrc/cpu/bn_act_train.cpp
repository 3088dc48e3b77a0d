// bn_act_train: y = act((x - mean[c]) * rstd[c] * weight[c] + bias[c] + residual) by the batch's
// own statistics, and its backward, which recomputes the pre-activation z instead of keeping it:
//
//   grad_z = grad_y * act'(z)
//   grad_bias = sum(grad_z)      grad_weight = sum(grad_z * xhat)      xhat = (x - mean) * rstd
//   grad_x = weight * rstd * (grad_z - grad_bias / M - xhat * grad_weight / M)
//
// grad_z is the residual's gradient; without a residual it is empty.
//
// Sums are fp64 over blocks of a fixed size that are added in order, so that the result does not
// depend on the number of threads; the variance is a second pass around the mean.
#include <cmath>

#include "pointwise.h"

namespace resnet_fast::cpu {
namespace {

constexpr int64_t kRows = 128;  // rows of a channels-last block
constexpr int kLanes = 8;       // independent partial sums within a run

// The two sums a pass produces, by channel.
struct Sums {
  std::vector<double> first, second;
};

// Calls add(element, channel, &first, &second) for every element, in a fixed order by channel.
template <typename F>
Sums channel_sums(const ChannelView& view, const F& add) {
  const int64_t channels = view.channels;
  Sums total{std::vector<double>(channels), std::vector<double>(channels)};
  if (view.inner == 1) {
    const int64_t rows = view.numel / channels;
    const int64_t blocks = (rows + kRows - 1) / kRows;
    std::vector<double> partial(static_cast<size_t>(blocks * channels * 2));
    parallel_for(0, blocks, std::max<int64_t>(1, kGrain / (kRows * channels)),
                 [&](int64_t begin, int64_t end) {
                   run_on_avx2([&](auto) RF_INLINE {
                     for (int64_t block = begin; block < end; ++block) {
                       double* __restrict first = partial.data() + block * channels * 2;
                       double* __restrict second = first + channels;
                       const int64_t last = std::min(rows, (block + 1) * kRows);
                       for (int64_t row = block * kRows; row < last; ++row) {
                         for (int64_t c = 0; c < channels; ++c) {
                           add(row * channels + c, c, first[c], second[c]);
                         }
                       }
                     }
                   });
                 });
    for (int64_t block = 0; block < blocks; ++block) {
      const double* first = partial.data() + block * channels * 2;
      for (int64_t c = 0; c < channels; ++c) {
        total.first[c] += first[c];
        total.second[c] += first[channels + c];
      }
    }
    return total;
  }
  const int64_t images = view.numel / (channels * view.inner);
  const int64_t grain = std::max<int64_t>(1, kGrain / (images * view.inner));
  parallel_for(0, channels, grain, [&](int64_t begin, int64_t end) {
    run_on_avx2([&](auto) RF_INLINE {
      for (int64_t c = begin; c < end; ++c) {
        double first[kLanes] = {}, second[kLanes] = {};
        for (int64_t n = 0; n < images; ++n) {
          const int64_t base = (n * channels + c) * view.inner;
          int64_t i = 0;
          for (; i + kLanes <= view.inner; i += kLanes) {
            for (int lane = 0; lane < kLanes; ++lane) {
              add(base + i + lane, c, first[lane], second[lane]);
            }
          }
          for (; i < view.inner; ++i) add(base + i, c, first[0], second[0]);
        }
        for (int lane = 0; lane < kLanes; ++lane) {
          total.first[c] += first[lane];
          total.second[c] += second[lane];
        }
      }
    });
  });
  return total;
}

template <typename T>
struct Arguments {
  using A = Accumulator<T>;
  const T* x;
  const T* residual;  // may be null
  const A* mean;
  const A* rstd;
  const A* weight;
  const A* bias;

  // xhat and the pre-activation of one element.
  RF_INLINE A normal(int64_t i, int64_t c) const { return (widen(x[i]) - mean[c]) * rstd[c]; }
  RF_INLINE A before_act(int64_t i, int64_t c) const {
    const A z = normal(i, c) * weight[c] + bias[c];
    return residual != nullptr ? z + widen(residual[i]) : z;
  }
};

void check_arguments(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                     const OptTensor& residual) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  check_input("x", x);
  STD_TORCH_CHECK(x.dim() >= 2, "x: expected at least 2 dimensions");
  STD_TORCH_CHECK(x.size(1) > 0 && x.numel() / x.size(1) > 1,
                  "x: expected more than one value a channel");
  if (weight) check_channel_vector("weight", *weight, x, x.size(1));
  if (bias) check_channel_vector("bias", *bias, x, x.size(1));
  if (residual) check_matches("residual", *residual, x);
}

std::tuple<Tensor, Tensor, Tensor> bn_act_train(const Tensor& x, const OptTensor& weight,
                                                const OptTensor& bias, const OptTensor& residual,
                                                double eps, const std::string& act_name) {
  const Act act = parse_act(act_name);
  check_arguments(x, weight, bias, residual);
  const MemoryFormat format = output_format(x);
  const int64_t channels = x.size(1);
  Tensor y = empty_output(x);
  Tensor mean = empty({channels}, stat_dtype(x.scalar_type()), x);
  Tensor rstd = empty({channels}, stat_dtype(x.scalar_type()), x);
  const Tensor dense = as_format(x, format);
  const OptTensor added = residual ? OptTensor(as_format(*residual, format)) : std::nullopt;
  const ChannelView view = channel_view(x, format);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    const T* values = data_of<T>(dense);
    const double count = static_cast<double>(view.numel / channels);
    std::vector<double> centre =
        channel_sums(view, [=](int64_t i, int64_t, double& first, double&) RF_INLINE {
          first += widen(values[i]);
        }).first;
    for (double& c : centre) c /= count;
    const double* around = centre.data();
    const Sums spread =
        channel_sums(view, [=](int64_t i, int64_t c, double& first, double&) RF_INLINE {
          const double d = widen(values[i]) - around[c];
          first += d * d;
        });
    A* out_mean = mutable_data_of<A>(mean);
    A* out_rstd = mutable_data_of<A>(rstd);
    for (int64_t c = 0; c < channels; ++c) {
      out_mean[c] = static_cast<A>(centre[c]);
      out_rstd[c] = static_cast<A>(1.0 / std::sqrt(spread.first[c] / count + eps));
    }
    const auto gamma = channel_values<A>(weight, channels, A(1));
    const auto beta = channel_values<A>(bias, channels, A(0));
    const Arguments<T> in{values, data_of<T>(added), out_mean, out_rstd, gamma.data(), beta.data()};
    T* out = mutable_data_of<T>(y);
    parallel_for(0, view.numel, kGrain, [&](int64_t begin, int64_t end) {
      run_on_avx2([&](auto) RF_INLINE {
        with_act(act, [&](auto code) RF_INLINE {
          for_each_run(view, begin, end,
                       [&](int64_t at, int64_t channel, int64_t length, auto step) RF_INLINE {
                         constexpr int kStep = decltype(step)::value;
                         const Arguments<T> local = in;
                         T* __restrict to = out;
                         for (int64_t i = 0; i < length; ++i) {
                           to[at + i] = Narrow<T>::from(activate<decltype(code)::value>(
                               local.before_act(at + i, channel + i * kStep)));
                         }
                       });
        });
      });
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_train_backward(
    const Tensor& grad_y, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
    const OptTensor& residual, const Tensor& mean, const Tensor& rstd,
    const std::string& act_name) {
  const Act act = parse_act(act_name);
  check_arguments(x, weight, bias, residual);
  const int64_t channels = x.size(1);
  check_matches("grad_y", grad_y, x);
  check_channel_vector("mean", mean, x, channels);
  check_channel_vector("rstd", rstd, x, channels);
  const MemoryFormat format = output_format(x);
  Tensor grad_x = empty_output(x);
  Tensor grad_z = residual ? empty_output(x) : empty({0}, x.scalar_type(), x);
  Tensor grad_weight = empty({channels}, stat_dtype(x.scalar_type()), x);
  Tensor grad_bias = empty({channels}, stat_dtype(x.scalar_type()), x);
  const Tensor dense = as_format(x, format);
  const Tensor upstream = as_format(grad_y, format);
  const OptTensor added = residual ? OptTensor(as_format(*residual, format)) : std::nullopt;
  const ChannelView view = channel_view(x, format);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    const auto centre = channel_values<A>(mean, channels, A(0));
    const auto scale = channel_values<A>(rstd, channels, A(1));
    const auto gamma = channel_values<A>(weight, channels, A(1));
    const auto beta = channel_values<A>(bias, channels, A(0));
    const Arguments<T> in{data_of<T>(dense), data_of<T>(added), centre.data(),
                          scale.data(),      gamma.data(),      beta.data()};
    const T* above = data_of<T>(upstream);
    T* out_x = mutable_data_of<T>(grad_x);
    T* out_z = residual ? mutable_data_of<T>(grad_z) : nullptr;
    const double count = static_cast<double>(view.numel / channels);
    std::vector<A> shift(channels), slope(channels), gain(channels);
    with_act(act, [&](auto code) {
      constexpr Act kAct = decltype(code)::value;
      const Sums sums =
          channel_sums(view, [=](int64_t i, int64_t c, double& first, double& second) RF_INLINE {
            const double g = chain(widen(above[i]), activate_grad<kAct>(in.before_act(i, c)));
            first += g;
            second += g * double(in.normal(i, c));
          });
      A* out_weight = mutable_data_of<A>(grad_weight);
      A* out_bias = mutable_data_of<A>(grad_bias);
      for (int64_t c = 0; c < channels; ++c) {
        out_bias[c] = static_cast<A>(sums.first[c]);
        out_weight[c] = static_cast<A>(sums.second[c]);
        shift[c] = static_cast<A>(sums.first[c] / count);
        slope[c] = static_cast<A>(sums.second[c] / count);
        gain[c] = gamma[c] * scale[c];
      }
      parallel_for(0, view.numel, kGrain, [&](int64_t begin, int64_t end) {
        run_on_avx2([&](auto) RF_INLINE {
          for_each_run(
              view, begin, end,
              [&](int64_t at, int64_t channel, int64_t length, auto step) RF_INLINE {
                constexpr int kStep = decltype(step)::value;
                const Arguments<T> local = in;
                const T* __restrict up = above;
                T* __restrict to_x = out_x;
                T* __restrict to_z = out_z;
                const auto each = [&](auto keeps_z) RF_INLINE {
                  for (int64_t i = at; i < at + length; ++i) {
                    const int64_t c = channel + (i - at) * kStep;
                    const A g = chain(widen(up[i]), activate_grad<kAct>(local.before_act(i, c)));
                    if constexpr (decltype(keeps_z)::value) to_z[i] = Narrow<T>::from(g);
                    to_x[i] =
                        Narrow<T>::from(gain[c] * (g - shift[c] - local.normal(i, c) * slope[c]));
                  }
                };
                to_z != nullptr ? each(std::true_type{}) : each(std::false_type{});
              });
        });
      });
    });
  });
  return {grad_x, grad_weight, grad_bias, grad_z};
}

}  // namespace
}  // namespace resnet_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("bn_act_train", TORCH_BOX(&resnet_fast::cpu::bn_act_train));
  m.impl("_bn_act_train_backward", TORCH_BOX(&resnet_fast::cpu::bn_act_train_backward));
}
