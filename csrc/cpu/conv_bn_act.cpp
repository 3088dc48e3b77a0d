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
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <new>

#include "../math/conv_geometry.h"
#include "../stable.h"
#include "isa.h"

namespace resnet_fast::cpu {
namespace {

struct Geometry {
  int64_t batch, channels, filters, groups;
  std::array<int64_t, 3> in, kernel, out, stride, padding, dilation;  // depth, height, width

  int64_t group_channels() const { return channels / groups; }
  int64_t group_filters() const { return filters / groups; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t depth() const { return taps() * group_channels(); }
  int64_t pixels() const { return batch * out[0] * out[1] * out[2]; }
};

constexpr int64_t kPanel = 256;             // columns of x gathered at a time
constexpr int64_t kBundlePanel = 512;       // the same where several small groups share the gather
constexpr int64_t kPanelStride = 512 + 16;  // rows apart by an odd number of cache lines
constexpr int64_t kStrip = 128;             // output channels a gathered panel serves
constexpr int64_t kChunk = 98;              // output pixels a task takes at most

// Vector width and register tile by instruction set: MR * 2 accumulators, 2 vectors of weights.
template <Isa I>
struct Tile;
template <>
struct Tile<Isa::baseline> {
  static constexpr int kBytes = 16, kRows = 4, kShortRows = 2;
};
template <>
struct Tile<Isa::avx2> {
  static constexpr int kBytes = 32, kRows = 6, kShortRows = 3;
};
template <>
struct Tile<Isa::avx512> {
  static constexpr int kBytes = 64, kRows = 14, kShortRows = 7;
};
constexpr int64_t kMaxRows = 14;
constexpr int64_t kPixelRows = kChunk + kMaxRows;  // a last tile may overhang

// Grows only: a task's scratch is reused by the next task and the next call of its thread.
class Scratch {
 public:
  template <typename T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > size_) {
      block_.reset();
      size_ = 0;
      block_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t(64))));
      std::memset(block_.get(), 0, bytes);  // overhanging rows are computed, never stored
      size_ = bytes;
    }
    return reinterpret_cast<T*>(block_.get());
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<std::byte, Free> block_;
  size_t size_ = 0;
};

// Where an output pixel's window starts in x; `image` is the first element of its image.
struct Window {
  int64_t image, d, h, w;
};

Window window_of(const Geometry& g, int64_t pixel) {
  const int64_t w = pixel % g.out[2];
  const int64_t h = pixel / g.out[2] % g.out[1];
  const int64_t d = pixel / (g.out[2] * g.out[1]) % g.out[0];
  const int64_t n = pixel / (g.out[2] * g.out[1] * g.out[0]);
  return {n * g.in[0] * g.in[1] * g.in[2] * g.channels, d * g.stride[0] - g.padding[0],
          h * g.stride[1] - g.padding[1], w * g.stride[2] - g.padding[2]};
}

template <typename T, typename A>
RF_INLINE inline void widen_copy(const T* __restrict from, A* __restrict to, int64_t count) {
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
  }
}

// Columns [begin, end) of one pixel's row of the gathered matrix, ordered [kd][kh][kw][c], for
// `width` channels from `channel`. Without dilation along the width and with all channels, the kw
// taps are one run of memory.
template <typename T, typename A>
RF_INLINE inline void gather_row(const Geometry& g, const T* x, const Window& win, int64_t channel,
                                 int64_t width, int64_t begin, int64_t end, A* row) {
  const bool merged = width == g.channels && (g.dilation[2] == 1 || g.kernel[2] == 1);
  const int64_t run_length = merged ? g.kernel[2] * width : width;
  const int64_t runs_a_line = merged ? 1 : g.kernel[2];
  const int64_t first_run = begin / run_length;
  int64_t from = begin - first_run * run_length;
  int64_t kw = first_run % runs_a_line;
  int64_t kh = first_run / runs_a_line % g.kernel[1];
  int64_t kd = first_run / runs_a_line / g.kernel[1];
  for (int64_t at = begin; at < end;) {
    const int64_t to = std::min(run_length, from + (end - at));
    const int64_t d = win.d + kd * g.dilation[0];
    const int64_t h = win.h + kh * g.dilation[1];
    const int64_t w = win.w + kw * g.dilation[2];
    int64_t lo = to, hi = to;  // the part inside the image; the rest is zero
    if (d >= 0 && d < g.in[0] && h >= 0 && h < g.in[1]) {
      lo = std::clamp(-w * width, from, to);
      hi = std::clamp((g.in[2] - w) * width, lo, to);
    }
    A* out = row + (at - begin) - from;
    for (int64_t i = from; i < lo; ++i) out[i] = A(0);
    if (hi > lo) {
      const int64_t base = win.image + ((d * g.in[1] + h) * g.in[2] + w) * g.channels + channel;
      widen_copy(x + (base + lo), out + lo, hi - lo);
    }
    for (int64_t i = hi; i < to; ++i) out[i] = A(0);
    at += to - from;
    from = 0;
    if (++kw == runs_a_line) {
      kw = 0;
      if (++kh == g.kernel[1]) {
        kh = 0;
        ++kd;
      }
    }
  }
}

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
  constexpr int MR = Regs::kRows, kShort = Regs::kShortRows;
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
      for (int64_t i = 0; i < rows; ++i) {
        gather_row(g, o.x, windows[i], group * cg, width, d0, d1, panel + i * kPanelStride);
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

Geometry checked_geometry(const Tensor& x, const Tensor& weight, IntList stride, IntList padding,
                          IntList dilation, int64_t groups) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  check_input("x", x);
  check_input("weight", weight);
  const int64_t rank = x.dim(), spatial = rank - 2;
  STD_TORCH_CHECK(rank >= 3 && rank <= 5, "x: expected 3 to 5 dimensions");
  STD_TORCH_CHECK(weight.dim() == rank, "weight: expected as many dimensions as x");
  STD_TORCH_CHECK(same_device(weight, x), "weight: expected the device of x");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight: expected the dtype of x");
  Geometry g{};
  g.batch = x.size(0);
  g.channels = x.size(1);
  g.filters = weight.size(0);
  g.groups = groups;
  STD_TORCH_CHECK(g.channels > 0 && g.filters > 0, "x, weight: expected at least one channel");
  STD_TORCH_CHECK(groups > 0 && g.channels % groups == 0 && g.filters % groups == 0,
                  "groups: expected a positive divisor of the channels of x and weight");
  STD_TORCH_CHECK(weight.size(1) == g.channels / groups,
                  "weight: expected C / groups input channels");
  for (const auto& [name, list] :
       {std::pair{"stride", stride}, {"padding", padding}, {"dilation", dilation}}) {
    STD_TORCH_CHECK(static_cast<int64_t>(list.size()) == spatial, name,
                    ": expected one value a spatial dimension");
  }
  g.in = g.kernel = g.out = g.stride = g.dilation = {1, 1, 1};
  constexpr int64_t kLimit = int64_t(1) << 31;  // keeps every coordinate far from overflow
  for (int64_t d = 0; d < spatial; ++d) {
    const int64_t axis = 3 - spatial + d;
    g.in[axis] = x.size(2 + d);
    g.kernel[axis] = weight.size(2 + d);
    g.stride[axis] = stride[d];
    g.padding[axis] = padding[d];
    g.dilation[axis] = dilation[d];
    STD_TORCH_CHECK(g.stride[axis] > 0 && g.stride[axis] < kLimit, "stride: expected 1 or more");
    STD_TORCH_CHECK(g.padding[axis] >= 0 && g.padding[axis] < kLimit,
                    "padding: expected 0 or more");
    STD_TORCH_CHECK(g.dilation[axis] > 0 && g.dilation[axis] < kLimit,
                    "dilation: expected 1 or more");
    STD_TORCH_CHECK(g.kernel[axis] > 0 && g.kernel[axis] < kLimit, "weight: expected taps");
    g.out[axis] = conv_output_size(g.in[axis], g.kernel[axis], g.stride[axis], g.padding[axis],
                                   g.dilation[axis]);
    STD_TORCH_CHECK(g.out[axis] > 0, "weight: the kernel is larger than the padded input");
  }
  return g;
}

// x as dense [N][spatial][C] memory. 1-D tensors pass as height 1.
Tensor channels_last_memory(const Tensor& t) {
  if (t.dim() != 3) return as_format(t, channels_last_format(t.dim()));
  const std::array<int64_t, 4> shape = {t.size(0), t.size(1), 1, t.size(2)};
  return as_format(torch::stable::reshape(t, IntList(shape.data(), shape.size())),
                   MemoryFormat::ChannelsLast);
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
