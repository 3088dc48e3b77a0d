#include "pixels.h"

#include "team.h"

namespace resnet_fast::cpu {
namespace {

// f(element of x, element of y) for each pixel.
template <typename F>
void each_pixel(const Geometry& g, const F& f) {
  const int64_t from = g.x_step(), to = g.y_step();
  run_on_isa([&](auto isa) {
    parallel_on<decltype(isa)::value>(g.pixels(), [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t at = begin; at < end; ++at) f(at * from, at * to);
    });
  });
}

}  // namespace

template <typename T>
void affine_pixels(const Geometry& g, const T* x, const float* scale, const float* shift, Act act,
                   T* y) {
  const int64_t channels = g.channels;
  if (const Clamp clamp = clamp_of(act); clamp.is_clamp) {
    const Affine a{scale, shift, clamp.low, clamp.high};
    return each_pixel(g, [&](int64_t from, int64_t to)
                             RF_INLINE { affine_run(a, 0, channels, x + from, y + to); });
  }
  with_act(act, [&](auto tag) {
    each_pixel(g, [&](int64_t from, int64_t to) RF_INLINE {
      const T* __restrict in = x + from;
      T* __restrict out = y + to;
      for (int64_t c = 0; c < channels; ++c) {
        const float v = widen(in[c]) * scale[c] + shift[c];
        out[c] = Narrow<T>::from(activate<decltype(tag)::value>(v));
      }
    });
  });
}

template <typename T>
void copy_pixels(const Geometry& g, const T* x, T* y) {
  const auto bytes = static_cast<size_t>(g.channels) * sizeof(T);
  each_pixel(g, [&](int64_t from, int64_t to) RF_INLINE { std::memcpy(y + to, x + from, bytes); });
}

template void affine_pixels(const Geometry& g, const float* x, const float* scale,
                            const float* shift, Act act, float* y);
template void affine_pixels(const Geometry& g, const bf16* x, const float* scale,
                            const float* shift, Act act, bf16* y);
template void copy_pixels(const Geometry& g, const float* x, float* y);
template void copy_pixels(const Geometry& g, const bf16* x, bf16* y);

}  // namespace resnet_fast::cpu
