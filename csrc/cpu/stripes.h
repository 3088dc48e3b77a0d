// An inverted residual (Sandler et al. 2018, "MobileNetV2") a few lines at a time: the pointwise
// convolution that widens, the depthwise one, and the pointwise one that narrows.
//
// The widest values of a network lie between them: 4.8 MB at 112x112 in MobileNetV2, 96 channels of
// fp32, which layer by layer go out to the third-level cache or to memory and come back. Here a
// thread owns a stripe of an image and goes down it band by band; what is wide never leaves its
// second-level cache:
//
//   x ==1x1==> lines of wide values ==depthwise==> lines of them ==1x1==> y
//              (the last ones serve the next band, too)
//
// Each output is computed from the same products in the same order as layer by layer.
#pragma once

#include <numeric>

#include "direct.h"
#include "team.h"

namespace resnet_fast::cpu {

// Of wide values: in a band, half of the smallest second-level cache; and for each thread in all,
// from where on stripes pay. Measured on 2 Zen 4 cores at 1 MiB each: MobileNetV2 takes 61 ms for
// 16 images where layer by layer it takes 80, at one image the first block 0.43 instead of 0.56 ms;
// blocks whose wide values fit gain nothing.
constexpr int64_t kBandBytes = 256 << 10, kLeastBytes = 1 << 20;

template <typename T>
struct StripeLayer {
  Geometry g;
  DirectOperands<T> o;
};

// A pointwise convolution that can start or end a stripe.
inline bool is_pointwise(const Geometry& g) {
  constexpr std::array<int64_t, 3> ones = {1, 1, 1};
  return g.groups == 1 && g.kernel == ones && g.stride == ones &&
         g.padding == std::array<int64_t, 3>{};
}

inline bool is_depthwise(const Geometry& g) {
  return g.groups > 1 && g.groups == g.channels && g.groups == g.filters && g.in[0] == 1;
}

// How the images are cut: into stripes, as few as keep the threads equally busy, and a stripe into
// bands of so many lines of output, for which `span` lines of wide values are read at a time.
struct StripeCut {
  int64_t stripes, band, span, step;

  StripeCut(const Geometry& depthwise, int64_t line_bytes, int64_t threads) {
    span = (depthwise.kernel[1] - 1) * depthwise.dilation[1] + 1;
    step = depthwise.stride[1];
    stripes = threads / std::gcd(threads, std::max<int64_t>(depthwise.batch, 1));
    const int64_t held = std::max(span, kBandBytes / line_bytes);
    band = (held - span) / step + 1;
  }
};

// Whether it pays: where the wide values are more than the second-level caches hold, and the lines
// that two stripes compute both are few.
template <typename T>
bool runs_in_stripes(const Geometry& wide, const Geometry& depthwise, int64_t threads) {
  if (!is_pointwise(wide) || !is_depthwise(depthwise)) return false;
  const int64_t line_bytes = wide.out[2] * wide.filters * int64_t(sizeof(T));
  const StripeCut cut(depthwise, line_bytes, threads);
  const int64_t twice = std::max<int64_t>(cut.span - cut.step, 0);
  return cut.span > 1 && depthwise.padding[1] < cut.span &&
         wide.batch * wide.out[1] * line_bytes > threads * kLeastBytes &&
         cut.span * line_bytes <= kBandBytes && depthwise.in[1] >= 8 * twice * cut.stripes;
}

// `narrow` may be null. The operands' x of the last two and y of the first two are not used.
template <typename T>
void run_stripes(const StripeLayer<T>& wide, const StripeLayer<T>& depthwise,
                 const StripeLayer<T>* narrow);

}  // namespace resnet_fast::cpu
