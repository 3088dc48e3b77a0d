// add_act: y = act(x + residual), and the gradient of the sum, which both inputs share.
#include "affine.h"

namespace resnet_fast::cpu {
namespace {

void check_pair(const Tensor& x, const Tensor& residual) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  check_input("x", x);
  check_matches("residual", residual, x);
}

Tensor add_act(const Tensor& x, const Tensor& residual, const std::string& act_name) {
  const Act act = parse_act(act_name);
  check_pair(x, residual);
  const MemoryFormat format = output_format(x);
  Tensor y = empty_output(x);
  if (x.numel() == 0) return y;
  const Tensor dense = as_format(x, format);
  const Tensor added = as_format(residual, format);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    // -0 is the neutral shift: +0 would lose the sign of a sum that is -0.
    const Accumulator<T> one(1), zero(-0.0);
    const ChannelView flat{1, x.numel(), x.numel()};
    affine_act<T>(flat, data_of<T>(dense), &one, &zero, data_of<T>(added), mutable_data_of<T>(y),
                  act);
  });
  return y;
}

// grad = grad_y * act'(x + residual)
template <typename T>
void gradient(int64_t numel, const T* grad_y, const T* x, const T* residual, T* grad, Act act) {
  parallel_for(0, numel, kGrain, [&](int64_t begin, int64_t end) {
    run_on_avx2([&](auto) RF_INLINE {
      with_act(act, [&](auto tag) RF_INLINE {
        constexpr Act kAct = decltype(tag)::value;
        const T* __restrict pg = grad_y;
        const T* __restrict px = x;
        const T* __restrict pr = residual;
        T* __restrict out = grad;
        for (int64_t i = begin; i < end; ++i) {
          out[i] = Narrow<T>::from(
              chain(widen(pg[i]), activate_grad<kAct>(widen(px[i]) + widen(pr[i]))));
        }
      });
    });
  });
}

Tensor add_act_backward(const Tensor& grad_y, const Tensor& x, const Tensor& residual,
                        const std::string& act_name) {
  const Act act = parse_act(act_name);
  check_pair(x, residual);
  check_matches("grad_y", grad_y, x);
  const MemoryFormat format = output_format(x);
  Tensor grad = empty_output(x);
  if (x.numel() == 0) return grad;
  const Tensor dense = as_format(x, format);
  const Tensor added = as_format(residual, format);
  const Tensor upstream = as_format(grad_y, format);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    gradient<T>(x.numel(), data_of<T>(upstream), data_of<T>(dense), data_of<T>(added),
                mutable_data_of<T>(grad), act);
  });
  return grad;
}

}  // namespace
}  // namespace resnet_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("add_act", TORCH_BOX(&resnet_fast::cpu::add_act));
  m.impl("_add_act_backward", TORCH_BOX(&resnet_fast::cpu::add_act_backward));
}
