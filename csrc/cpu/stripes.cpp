#include "stripes.h"

#include "tile.h"

namespace resnet_fast::cpu {
namespace {

// `layer` for `lines` lines of one image, from x to y.
template <typename T>
void run_lines(const StripeLayer<T>& layer, int64_t in, int64_t padding, int64_t out, const T* x,
               const T* residual, T* y) {
  StripeLayer<T> l = layer;
  l.g.batch = 1;
  l.g.in[1] = in;
  l.g.padding[1] = padding;
  l.g.out[1] = out;
  l.o.x = x;
  l.o.residual = residual;
  l.o.y = y;
  run_direct(l.g, l.o);
}

}  // namespace

template <typename T>
void run_stripes(const StripeLayer<T>& wide, const StripeLayer<T>& depthwise,
                 const StripeLayer<T>* narrow) {
  const Geometry &a = wide.g, &b = depthwise.g;
  const int64_t height = a.out[1], line = a.out[2] * a.filters;
  const int64_t x_line = a.in[2] * a.x_step(), middle_line = b.out[2] * b.filters;
  const Geometry& last = narrow != nullptr ? narrow->g : b;
  const DirectOperands<T>& to = narrow != nullptr ? narrow->o : depthwise.o;
  const int64_t y_line = last.out[2] * last.y_step();
  const StripeCut cut(b, line * int64_t(sizeof(T)), worker_count());
  const int64_t held = (cut.band - 1) * cut.step + cut.span;
  run_on_isa([&](auto isa) {
    parallel_on<decltype(isa)::value>(b.batch * cut.stripes, [&](int64_t begin, int64_t end) {
      thread_local Scratch wide_memory, middle_memory;
      const Solo solo;
      T* const lines = wide_memory.get<T>(held * line);
      T* const middle = narrow != nullptr ? middle_memory.get<T>(cut.band * middle_line) : nullptr;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / cut.stripes, stripe = task % cut.stripes;
        const int64_t h_end = cut_at(b.out[1], cut.stripes, stripe + 1);
        int64_t have0 = 0, have1 = 0;  // the lines of wide values that there are
        for (int64_t h = cut_at(b.out[1], cut.stripes, stripe); h < h_end; h += cut.band) {
          const int64_t count = std::min(cut.band, h_end - h);
          const int64_t top = h * cut.step - b.padding[1];
          const int64_t need0 = std::max<int64_t>(top, 0);
          const int64_t need1 = std::min(height, top + (count - 1) * cut.step + cut.span);
          const int64_t kept = std::clamp<int64_t>(have1 - need0, 0, need1 - need0);
          if (kept > 0) {
            std::memmove(lines, lines + (need0 - have0) * line, size_t(kept * line) * sizeof(T));
          }
          const int64_t first = need0 + kept, fresh = need1 - first;
          if (fresh > 0) {
            run_lines<T>(wide, fresh, 0, fresh, wide.o.x + (n * height + first) * x_line, nullptr,
                         lines + kept * line);
          }
          have0 = need0;
          have1 = need1;
          const int64_t out = (n * b.out[1] + h) * y_line;
          run_lines<T>(depthwise, need1 - need0, need0 - top, count, lines, nullptr,
                       narrow != nullptr ? middle : to.y + out);
          if (narrow != nullptr) {
            run_lines<T>(*narrow, count, 0, count, middle,
                         to.residual == nullptr ? nullptr : to.residual + out, to.y + out);
          }
        }
      }
    });
  });
}

template void run_stripes(const StripeLayer<float>&, const StripeLayer<float>&,
                          const StripeLayer<float>*);
template void run_stripes(const StripeLayer<bf16>&, const StripeLayer<bf16>&,
                          const StripeLayer<bf16>*);

}  // namespace resnet_fast::cpu
