// The elementwise frame of bn_act, add_act and bn_act_train: memory as [outer][channel][inner].
#pragma once

#include <algorithm>

#include "../stable.h"
#include "isa.h"

namespace resnet_fast::cpu {

// Elements a task takes at least; below it the thread pool costs more than the work.
inline constexpr int64_t kGrain = 32768;

// inner > 1: contiguous, a channel's values lie in runs of `inner`; inner == 1: rows of channels.
struct ChannelView {
  int64_t channels;
  int64_t inner;
  int64_t numel;
};

inline ChannelView channel_view(const Tensor& x, MemoryFormat format) {
  const int64_t channels = x.size(1);
  int64_t inner = 1;
  if (format == MemoryFormat::Contiguous) {
    for (int64_t d = 2; d < x.dim(); ++d) inner *= x.size(d);
  }
  return {channels, inner, x.numel()};
}

// Calls run(first element, first channel, length, channel step 0 or 1) for the runs of [begin,
// end).
template <typename F>
[[gnu::always_inline]] inline void for_each_run(const ChannelView& view, int64_t begin, int64_t end,
                                                const F& run) {
  while (begin < end) {
    if (view.inner == 1) {
      const int64_t channel = begin % view.channels;
      const int64_t length = std::min(end - begin, view.channels - channel);
      run(begin, channel, length, std::integral_constant<int, 1>{});
      begin += length;
    } else {
      const int64_t plane = begin / view.inner;
      const int64_t length = std::min(end - begin, (plane + 1) * view.inner - begin);
      run(begin, plane % view.channels, length, std::integral_constant<int, 0>{});
      begin += length;
    }
  }
}

}  // namespace resnet_fast::cpu
