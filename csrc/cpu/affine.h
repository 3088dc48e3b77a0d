// y = act(x * scale[c] + shift[c] + residual), rounded once; the kernel of bn_act and add_act.
#pragma once

#include "pointwise.h"

namespace resnet_fast::cpu {

// scale and shift hold one accumulator-type value a channel; residual may be null.
template <typename T>
void affine_act(const ChannelView& view, const T* x, const Accumulator<T>* scale,
                const Accumulator<T>* shift, const T* residual, T* y, Act act) {
  using A = Accumulator<T>;
  parallel_for(0, view.numel, kGrain, [&](int64_t begin, int64_t end) {
    run_on_avx2([&](auto) RF_INLINE {
      with_act(act, [&](auto tag) RF_INLINE {
        constexpr Act kAct = decltype(tag)::value;
        for_each_run(view, begin, end,
                     [&](int64_t at, int64_t channel, int64_t length, auto step) RF_INLINE {
                       constexpr int kStep = decltype(step)::value;
                       const T* __restrict px = x + at;
                       const A* __restrict ps = scale + channel;
                       const A* __restrict pb = shift + channel;
                       T* __restrict py = y + at;
                       if (residual != nullptr) {
                         const T* __restrict pr = residual + at;
                         for (int64_t i = 0; i < length; ++i) {
                           const A v = widen(px[i]) * ps[i * kStep] + pb[i * kStep] + widen(pr[i]);
                           py[i] = Narrow<T>::from(activate<kAct>(v));
                         }
                       } else {
                         for (int64_t i = 0; i < length; ++i) {
                           const A v = widen(px[i]) * ps[i * kStep] + pb[i * kStep];
                           py[i] = Narrow<T>::from(activate<kAct>(v));
                         }
                       }
                     });
      });
    });
  });
}

}  // namespace resnet_fast::cpu
