// conv_bn_act: y = act(conv(x, weight) * scale[k] + shift[k] + residual), for any geometry.
//
// Memory is channels-last: x is [pixel in][C], y is [pixel out][K]. A task owns one group (or a
// bundle of small ones), a strip of up to kStrip output channels and a chunk of output pixels:
//
//            depth = taps * C/groups              strip of K
//          +------------------------+           +----+----+----+
//   chunk  | panel (gathered x,     |   depth   | B0 | B1 | .. |  B: weights packed [depth][NR]
//   of     |  kPanel columns a time)|           |    |    |    |
//   pixels +------------------------+           +----+----+----+
//
// and multiplies them in register tiles of MR pixels x NR channels. 16-bit inputs are widened while
// they are gathered and packed; sums stay in fp32 (fp64 for fp64) until the epilogue rounds once.
#include "gather.h"
#include "tile.h"

namespace resnet_fast::cpu {
namespace {

constexpr int64_t kPanel = 256;             // columns of x gathered at a time
constexpr int64_t kBundlePanel = 512;       // the same where several small groups share the gather
constexpr int64_t kPanelStride = 512 + 16;  // rows apart by an odd number of cache lines
constexpr int64_t kStrip = 128;             // output channels a gathered panel serves
constexpr int64_t kChunk = 98;              // output pixels a task takes at most

// Rows of the register tile for what is left of a chunk.
template <Isa I>
constexpr int kShortRows = I == Isa::avx512 ? 7
                           : I == Isa::avx2 ? 3
                                            : 2;
constexpr int64_t kMaxRows = 14;
constexpr int64_t kPixelRows = kChunk + kMaxRows;  // a last tile may overhang

// Packs `filters` filters from weights [K][C/groups][taps] (or [K][taps][C/groups]) as
// [depth][NR], zeros beyond the last filter.
template <typename T, typename A>
RF_INLINE inline void pack_weights(const Geometry& g, const T* weight, bool channels_last,
                                   int64_t filters, int64_t nr, A* packed) {
  const int64_t cg = g.group_channels(), taps = g.taps(), depth = g.depth();
  const int64_t c_step = channels_last ? 1 : taps;
  const int64_t tap_step = channels_last ? cg : 1;
  constexpr int64_t kBlock = 16;  // depth rows whose packed lines stay in the first-level cache
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t c0 = 0; c0 < cg; c0 += kBlock) {
      const int64_t c1 = std::min(cg, c0 + kBlock);
      for (int64_t j = 0; j < filters; ++j) {
        const T* from = weight + j * depth + tap * tap_step;
        A* to = packed + tap * cg * nr + j;
        for (int64_t c = c0; c < c1; ++c) to[c * nr] = widen(from[c * c_step]);
      }
      for (int64_t c = c0; c < c1 && filters < nr; ++c) {
        std::fill(packed + (tap * cg + c) * nr + filters, packed + (tap * cg + c + 1) * nr, A(0));
      }
    }
  }
}

// The columns of a panel that one product reads: `count` segments of `length`, `stride` apart.
struct Segments {
  int64_t count, length, stride;
};

// sums[MR][NV * lanes] (+)= panel[MR][segments] * packed[segments][NV * lanes]
template <typename A, int kBytes, int MR, int NV>
RF_INLINE inline void multiply(const A* panel, const A* packed, Segments seg, A* sums,
                               int64_t sums_stride, bool accumulate) {
  typedef A Vec __attribute__((vector_size(kBytes)));
  constexpr int kLanes = kBytes / int(sizeof(A));
  Vec acc[MR][NV];
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < NV; ++v) {
      if (accumulate) {
        std::memcpy(&acc[i][v], sums + i * sums_stride + v * kLanes, kBytes);
      } else {
        acc[i][v] = Vec{};
      }
    }
  }
  for (int64_t segment = 0; segment < seg.count; ++segment) {
    for (int64_t k = 0; k < seg.length; ++k) {
      Vec b[NV];
      for (int v = 0; v < NV; ++v) std::memcpy(&b[v], packed + v * kLanes, kBytes);
      packed += NV * kLanes;
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const A a = panel[i * kPanelStride + k];
        for (int v = 0; v < NV; ++v) acc[i][v] += a * b[v];
      }
    }
    panel += seg.stride;
  }
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < NV; ++v) {
      std::memcpy(sums + i * sums_stride + v * kLanes, &acc[i][v], kBytes);
    }
  }
}

// y[i][j] = act(sums[i][j] * scale[j] + shift[j] + residual[i][j]); rows of y are y_stride apart.
template <typename T, typename A, typename ActT>
RF_INLINE inline void finish(ActT, int64_t rows, int64_t columns, const A* sums,
                             int64_t sums_stride, const A* scale, const A* shift, const T* residual,
                             T* y, int64_t y_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const A* __restrict s = sums + i * sums_stride;
    T* __restrict out = y + i * y_stride;
    if (residual != nullptr) {
      const T* __restrict r = residual + i * y_stride;
      for (int64_t j = 0; j < columns; ++j) {
        out[j] = Narrow<T>::from(activate<ActT::value>(s[j] * scale[j] + shift[j] + widen(r[j])));
      }
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        out[j] = Narrow<T>::from(activate<ActT::value>(s[j] * scale[j] + shift[j]));
      }
    }
  }
}

template <typename T>
struct Operands {
  const T* x;
  const T* weight;
  bool weight_channels_last;
  const Accumulator<T>* scale;
  const Accumulator<T>* shift;
  const T* residual;
  T* y;
  Act act;
};

// How the work is cut: groups in bundles, the filters of a group in strips, the pixels in chunks.
// Small groups share a gather; a bundle's taps and channels then fit one panel row.
struct Cut {
  int64_t nr, bundle, bundles, strips, chunks;

  Cut(const Geometry& g, int64_t lanes) {
    const int64_t kg = g.group_filters();
    nr = kg > lanes ? 2 * lanes : lanes;
    const int64_t padded = (kg + nr - 1) / nr * nr;
    strips = (kg + kStrip - 1) / kStrip;
    bundle = std::max<int64_t>(1, std::min({g.groups, kStrip / padded, kBundlePanel / g.depth()}));
    bundles = (g.groups + bundle - 1) / bundle;
    chunks = (g.pixels() + kChunk - 1) / kChunk;
  }
};

template <typename T, Isa I>
RF_INLINE inline void conv_tasks(const Geometry& g, const Operands<T>& o, const Cut& cut,
                                 int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  using Regs = Tile<I>;
  constexpr int MR = Regs::kRows, kShort = kShortRows<I>;
  const int64_t cg = g.group_channels(), kg = g.group_filters(), nr = cut.nr;
  const int64_t depth = g.depth(), pixels = g.pixels();
  const bool paired = nr * int64_t(sizeof(A)) > Regs::kBytes;

  thread_local Scratch panel_memory, sums_memory, packed_memory;
  A* panel = panel_memory.get<A>(kPixelRows * kPanelStride);
  A* sums = sums_memory.get<A>(kPixelRows * kStrip);
  A* packed = packed_memory.get<A>(depth * kStrip);
  Window windows[kChunk];

  int64_t packed_for = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % cut.chunks;
    const int64_t strip = task / cut.chunks % cut.strips;
    const int64_t group = task / (cut.chunks * cut.strips) * cut.bundle;
    const int64_t bundled = std::min(cut.bundle, g.groups - group);
    const int64_t width = bundled * cg;
    const int64_t k0 = strip * kStrip;  // within the group
    const int64_t columns = std::min(kStrip, kg - k0);
    const int64_t blocks_a_group = (columns + nr - 1) / nr;
    const int64_t blocks = bundled * blocks_a_group;
    if (packed_for != task / cut.chunks) {
      packed_for = task / cut.chunks;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t j = b % blocks_a_group * nr;
        const int64_t first = (group + b / blocks_a_group) * kg + k0 + j;
        pack_weights(g, o.weight + first * depth, o.weight_channels_last, std::min(nr, columns - j),
                     nr, packed + b * nr * depth);
      }
    }
    const int64_t pixel = chunk * kChunk;
    const int64_t rows = std::min(kChunk, pixels - pixel);
    for (int64_t i = 0; i < rows; ++i) windows[i] = window_of(g, pixel + i);

    const int64_t panel_columns = bundled > 1 ? g.taps() * width : kPanel;
    for (int64_t d0 = 0; d0 < g.taps() * width; d0 += panel_columns) {
      const int64_t d1 = std::min(g.taps() * width, d0 + panel_columns);
      const Runs runs(g, group * cg, width, d0, d1);
      for (int64_t i = 0; i < rows; ++i) {
        gather_row(g, o.x, windows[i], runs, panel + i * kPanelStride);
      }
      const Segments seg = bundled > 1 ? Segments{g.taps(), cg, width} : Segments{1, d1 - d0, 0};
      const bool more = d0 > 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const A* weights = packed + b * nr * depth + d0 * nr;
        for (int64_t i = 0; i < rows;) {
          const A* a = panel + i * kPanelStride + b / blocks_a_group * cg;
          A* s = sums + i * kStrip + b * nr;
          const bool full = rows - i > kShort;
          if (full && paired) {
            multiply<A, Regs::kBytes, MR, 2>(a, weights, seg, s, kStrip, more);
          } else if (full) {
            multiply<A, Regs::kBytes, MR, 1>(a, weights, seg, s, kStrip, more);
          } else if (paired) {
            multiply<A, Regs::kBytes, kShort, 2>(a, weights, seg, s, kStrip, more);
          } else {
            multiply<A, Regs::kBytes, kShort, 1>(a, weights, seg, s, kStrip, more);
          }
          i += full ? MR : kShort;
        }
      }
    }
    with_act(o.act, [&](auto tag) RF_INLINE {
      for (int64_t b = 0; b < bundled; ++b) {
        const int64_t channel = (group + b) * kg + k0;
        const int64_t first = pixel * g.filters + channel;
        finish(tag, rows, columns, sums + b * blocks_a_group * nr, kStrip, o.scale + channel,
               o.shift + channel, o.residual ? o.residual + first : nullptr, o.y + first,
               g.filters);
      }
    });
  }
}

template <typename T>
void conv(const Geometry& g, const Operands<T>& o) {
  run_on_isa([&](auto isa) {
    constexpr Isa kIsa = decltype(isa)::value;
    const Cut cut(g, Tile<kIsa>::kBytes / int64_t(sizeof(Accumulator<T>)));
    parallel_for(0, cut.bundles * cut.strips * cut.chunks, 1, [&](int64_t begin, int64_t end) {
      run_on_isa([&](auto same) RF_INLINE {
        if constexpr (decltype(same)::value == kIsa) conv_tasks<T, kIsa>(g, o, cut, begin, end);
      });
    });
  });
}

// One filter a channel: no product to tile, so lanes run over the channels. weight: [taps][C].
template <typename T>
void depthwise(const Geometry& g, const Operands<T>& o, const Accumulator<T>* weight) {
  using A = Accumulator<T>;
  constexpr int64_t kBlock = 64;
  const int64_t grain = std::max<int64_t>(1, 16384 / (g.channels * g.taps()));
  parallel_for(0, g.pixels(), grain, [&](int64_t begin, int64_t end) {
    run_on_isa([&](auto) RF_INLINE {
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const Window win = window_of(g, pixel);
        for (int64_t c0 = 0; c0 < g.channels; c0 += kBlock) {
          const int64_t width = std::min(kBlock, g.channels - c0);
          A acc[kBlock] = {};
          int64_t tap = 0;
          for (int64_t kd = 0; kd < g.kernel[0]; ++kd) {
            const int64_t d = win.d + kd * g.dilation[0];
            for (int64_t kh = 0; kh < g.kernel[1]; ++kh) {
              const int64_t h = win.h + kh * g.dilation[1];
              for (int64_t kw = 0; kw < g.kernel[2]; ++kw, ++tap) {
                const int64_t w = win.w + kw * g.dilation[2];
                if (d < 0 || d >= g.in[0] || h < 0 || h >= g.in[1] || w < 0 || w >= g.in[2]) {
                  continue;
                }
                const T* __restrict from =
                    o.x + win.image + ((d * g.in[1] + h) * g.in[2] + w) * g.channels + c0;
                const A* __restrict factor = weight + tap * g.channels + c0;
                if (width == kBlock) {
                  for (int64_t c = 0; c < kBlock; ++c) acc[c] += widen(from[c]) * factor[c];
                } else {
                  for (int64_t c = 0; c < width; ++c) acc[c] += widen(from[c]) * factor[c];
                }
              }
            }
          }
          const int64_t first = pixel * g.filters + c0;
          with_act(o.act, [&](auto tag) RF_INLINE {
            finish(tag, 1, width, acc, kBlock, o.scale + c0, o.shift + c0,
                   o.residual ? o.residual + first : nullptr, o.y + first, g.filters);
          });
        }
      }
    });
  });
}

Tensor conv_bn_act(const Tensor& x, const Tensor& weight, const OptTensor& scale,
                   const OptTensor& shift, const OptTensor& residual, IntList stride,
                   IntList padding, IntList dilation, int64_t groups, const std::string& act_name) {
  const Act act = parse_act(act_name);
  const Geometry g = checked_geometry(x, weight, stride, padding, dilation, groups);
  const int64_t rank = x.dim();
  if (scale) check_channel_vector("scale", *scale, x, g.filters);
  if (shift) check_channel_vector("shift", *shift, x, g.filters);

  std::vector<int64_t> shape = {g.batch, g.filters};
  for (int64_t axis = 5 - rank; axis < 3; ++axis) shape.push_back(g.out[axis]);
  const MemoryFormat format = output_format(x);
  Tensor y = empty(shape, x.scalar_type(), x, format);
  if (residual) check_matches("residual", *residual, y);
  if (y.numel() == 0) return y;

  const Tensor dense = channels_last_memory(x);
  const bool weight_channels_last = is_channels_last(weight) && !weight.is_contiguous();
  const Tensor filters = as_format(
      weight, weight_channels_last ? channels_last_format(rank) : MemoryFormat::Contiguous);
  const OptTensor added = residual ? OptTensor(channels_last_memory(*residual)) : std::nullopt;
  // One channel or one pixel: both formats are the same memory.
  const bool direct = format != MemoryFormat::Contiguous || g.filters == 1 || g.pixels() == g.batch;
  std::vector<int64_t> staged_shape = shape;
  if (rank == 3) staged_shape.insert(staged_shape.begin() + 2, 1);
  const Tensor staged =
      direct ? y
             : empty(staged_shape, x.scalar_type(), x,
                     channels_last_format(static_cast<int64_t>(staged_shape.size())));

  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    const auto a = channel_values<A>(scale, g.filters, A(1));
    const auto b = channel_values<A>(shift, g.filters, A(0));
    const Operands<T> o{
        data_of<T>(dense), data_of<T>(filters), weight_channels_last,       a.data(),
        b.data(),          data_of<T>(added),   mutable_data_of<T>(staged), act};
    if (g.group_channels() == 1 && g.group_filters() == 1) {
      std::vector<A> by_tap(static_cast<size_t>(g.taps() * g.channels));
      for (int64_t c = 0; c < g.channels; ++c) {
        for (int64_t t = 0; t < g.taps(); ++t) {
          by_tap[t * g.channels + c] = widen(o.weight[c * g.taps() + t]);
        }
      }
      depthwise<T>(g, o, by_tap.data());
    } else {
      conv<T>(g, o);
    }
  });
  if (!direct) {
    const Tensor as_y = rank == 3 ? torch::stable::squeeze(staged, 2) : staged;
    torch::stable::copy_(y, as_y);
  }
  return y;
}

}  // namespace
}  // namespace resnet_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("conv_bn_act", TORCH_BOX(&resnet_fast::cpu::conv_bn_act));
}
