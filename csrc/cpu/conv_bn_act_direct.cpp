// conv_bn_act for dense kernels over weights packed once, fp32: the windows of a chunk of output
// pixels as rows of a matrix, times the weights as its columns.
//
//             depth = taps * C                    weights, by panel: [K/NR][kDepth][NR]
//          +---------------------+               +----+----+----+
//   chunk  | panel: kDepth       |     kDepth    | B0 | B1 | .. |   NR = 2 vectors of filters
//   of     | columns at a time,  |       x       |    |    |    |
//   pixels | gathered or x       |               +----+----+----+
//          +---------------------+  ==> register tiles of up to kRows pixels x NR filters
//
// A task owns a chunk of pixels and a strip of filters. The last panel's tiles leave the registers
// through scale, shift, residual and clamp straight to y (channels-last, [pixel][K]); before it the
// partial sums wait in the second-level cache. Where a pixel's window is one run of memory (1x1 at
// stride 1) x itself is the panel.
#include "gather.h"
#include "pool.h"
#include "tile.h"

namespace resnet_fast::cpu {
namespace {

constexpr int64_t kDepth = 256;                // panel columns: a weight block of 32 KiB
constexpr int64_t kPanelStride = kDepth + 16;  // rows apart by an odd number of cache lines
constexpr int64_t kChain = 64;                 // columns added one after the other (tile.h)
constexpr int64_t kChunk = 98;                 // pixels: 7 register tiles of 14
constexpr int64_t kStrip = 256;                // filters: the chunk's sums and panel fit 256 KiB

template <Isa I>
constexpr int64_t kFilterBlock = 2 * Tile<I>::kBytes / 4;

struct Operands {
  const float* x;
  const float* packed;
  const float* scale;
  const float* shift;
  const float* residual;
  float* y;
  Act act;
};

struct Cut {
  int64_t chunks, strips, blocks;

  Cut(const Geometry& g, int64_t nr, int64_t threads) {
    blocks = (g.filters + nr - 1) / nr;
    chunks = (g.pixels() + kChunk - 1) / kChunk;
    if (chunks > threads) chunks = (chunks + threads - 1) / threads * threads;
    const int64_t wanted = (threads + chunks - 1) / chunks;
    strips = std::clamp(wanted, (g.filters + kStrip - 1) / kStrip, blocks);
  }
};

template <Isa I>
RF_INLINE inline void tasks(const Geometry& g, const Operands& o, const Cut& cut, int64_t begin,
                            int64_t end) {
  constexpr int64_t NR = kFilterBlock<I>;
  constexpr int kRows = Tile<I>::kRows;
  thread_local Scratch panel_memory, sums_memory;
  const int64_t depth = g.depth(), pixels = g.pixels();
  const Clamp clamp = clamp_of(o.act);
  // Rows a multiple of 2 KiB apart would share two cache sets.
  const bool in_place = g.taps() == 1 && g.pixels() == g.batch * g.in[0] * g.in[1] * g.in[2] &&
                        g.padding == std::array<int64_t, 3>{} && depth <= kDepth;
  float* gathered = in_place ? nullptr : panel_memory.get<float>(kChunk * kPanelStride);
  const int64_t row_stride = in_place ? g.channels : kPanelStride;
  const int64_t most_blocks = (cut.blocks + cut.strips - 1) / cut.strips;
  const int64_t sums_stride = most_blocks * NR;
  float* sums = sums_memory.get<float>(kChunk * sums_stride);
  Window windows[kChunk], ahead[kChunk];
  // The windows of a few channels overlap so much that the hardware foresees them.
  const bool worth_prefetching = g.channels >= 32;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task / cut.strips, strip = task % cut.strips;
    const int64_t pixel = cut_at(pixels, cut.chunks, chunk);
    const int64_t count = cut_at(pixels, cut.chunks, chunk + 1) - pixel;
    const int64_t first_block = cut_at(cut.blocks, cut.strips, strip);
    const int64_t last_block = cut_at(cut.blocks, cut.strips, strip + 1);
    const int64_t pieces = (count + kRows - 1) / kRows;
    for (int64_t i = 0; i < count; ++i) windows[i] = window_of(g, pixel + i);
    int64_t count_ahead = 0;
    if (task + 1 < end) {
      const int64_t next = (task + 1) / cut.strips;
      const int64_t first = cut_at(pixels, cut.chunks, next);
      count_ahead = cut_at(pixels, cut.chunks, next + 1) - first;
      for (int64_t i = 0; i < count_ahead; ++i) ahead[i] = window_of(g, first + i);
    }
    for (int64_t d0 = 0; d0 < depth; d0 += kDepth) {
      const int64_t d1 = std::min(depth, d0 + kDepth);
      const float* panel = o.x + pixel * g.channels;
      if (!in_place) {
        panel = gathered;
        const Runs runs(g, 0, g.channels, d0, d1);
        for (int64_t i = 0; i < count; ++i) {
          gather_row(g, o.x, windows[i], runs, gathered + i * kPanelStride);
        }
      }
      // The next panel, of this chunk or the next, is on its way while this one is multiplied.
      const bool same = d1 < depth;
      const int64_t due = !worth_prefetching ? 0 : same ? count : count_ahead;
      const int64_t p0 = same ? d1 : 0;
      const Runs runs_ahead(g, 0, g.channels, p0, std::min(depth, p0 + kDepth));
      TileOut out{};
      out.sums_stride = sums_stride;
      out.chain = kChain;
      out.accumulate = d0 > 0;
      out.y_stride = g.filters;
      out.low = clamp.low;
      out.high = clamp.high;
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t k0 = block * NR;
        const bool whole = k0 + NR <= g.filters && clamp.is_clamp;
        out.last = d1 == depth && whole;
        out.scale = o.scale + k0;
        out.shift = o.shift + k0;
        const float* packed = o.packed + (d0 * cut.blocks + block * (d1 - d0)) * NR;
        const int64_t blocks = last_block - first_block, done = block - first_block;
        for (int64_t i = cut_at(due, blocks, done); i < cut_at(due, blocks, done + 1); ++i) {
          prefetch_row(g, o.x, same ? windows[i] : ahead[i], runs_ahead);
        }
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t row = cut_at(count, pieces, piece);
          const int64_t rows = cut_at(count, pieces, piece + 1) - row;
          const int64_t at = (pixel + row) * g.filters + k0;
          out.sums = sums + row * sums_stride + (block - first_block) * NR;
          out.y = o.y + at;
          out.residual = o.residual == nullptr ? nullptr : o.residual + at;
          kMultiplyRows<I>[rows - 1](panel + row* row_stride, row_stride, packed, d1 - d0, out);
          if (d1 == depth && !whole) {
            with_act(o.act, [&](auto tag) RF_INLINE {
              for (int64_t i = 0; i < rows; ++i) {
                const int64_t y_at = at + i * g.filters;
                finish_row(tag, std::min(NR, g.filters - k0), out.sums + i * sums_stride, out.scale,
                           out.shift, o.residual == nullptr ? nullptr : o.residual + y_at,
                           o.y + y_at);
              }
            });
          }
        }
      }
    }
  }
}

int64_t filter_block_size() {
  int64_t size = 0;
  run_on_isa([&](auto isa) { size = kFilterBlock<decltype(isa)::value>; });
  return size;
}

int64_t packed_size(int64_t filters, int64_t depth) {
  const int64_t nr = filter_block_size();
  return (filters + nr - 1) / nr * nr * depth;
}

// Weights [K][C][taps], rows of the product in the order [taps][C], cut into panels of kDepth rows:
// [panel][K/NR][row][NR], so that the blocks of a panel follow each other in memory. Zeros beyond
// the last filter.
Tensor direct_weight(const Tensor& weight) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Float,
                  "weight: expected a float32 CPU tensor");
  STD_TORCH_CHECK(weight.dim() >= 3 && weight.dim() <= 5, "weight: expected 3 to 5 dimensions");
  const int64_t filters = weight.size(0), channels = weight.size(1);
  int64_t taps = 1;
  for (int64_t d = 2; d < weight.dim(); ++d) taps *= weight.size(d);
  const Tensor dense = as_format(weight, MemoryFormat::Contiguous);
  const int64_t depth = taps * channels, nr = filter_block_size();
  const Tensor packed = empty_packed(packed_size(filters, depth), weight);
  const float* from = data_of<float>(dense);
  float* to = mutable_data_of<float>(packed);
  const int64_t blocks = (filters + nr - 1) / nr;
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t row = tap * channels + c, d0 = row / kDepth * kDepth;
          const int64_t rows = std::min(kDepth, depth - d0);
          float* line = to + (d0 * blocks + block * rows + row - d0) * nr;
          for (int64_t j = 0; j < nr; ++j) {
            const int64_t k = block * nr + j;
            line[j] = k < filters ? from[(k * channels + c) * taps + tap] : 0.0f;
          }
        }
      }
    }
  });
  return packed;
}

Tensor direct_conv(const Tensor& x, const Tensor& packed, const Tensor& weight,
                   const OptTensor& scale, const OptTensor& shift, const OptTensor& residual,
                   IntList stride, IntList padding, IntList dilation, const std::string& act_name) {
  const Act act = parse_act(act_name);
  const Geometry g = checked_geometry(x, weight, stride, padding, dilation, 1);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x: expected float32");
  STD_TORCH_CHECK(x.dim() == 4 || x.dim() == 5, "x: expected rank 4 or 5");
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Float &&
                      packed.is_contiguous() && packed.numel() == packed_size(g.filters, g.depth()),
                  "packed: expected what _direct_weight returns for this weight");
  if (scale) check_channel_vector("scale", *scale, x, g.filters);
  if (shift) check_channel_vector("shift", *shift, x, g.filters);
  std::vector<int64_t> shape = {g.batch, g.filters};
  for (int64_t axis = 5 - x.dim(); axis < 3; ++axis) shape.push_back(g.out[axis]);
  const Tensor y = empty_channels_last(shape, x);
  if (residual) check_matches("residual", *residual, y);
  if (y.numel() == 0) return y;

  const Tensor dense = channels_last_memory(x);
  const Tensor added = residual ? channels_last_memory(*residual) : Tensor();
  const auto a = channel_values<float>(scale, g.filters, 1.0f);
  const auto b = channel_values<float>(shift, g.filters, 0.0f);
  const Operands o{data_of<float>(dense),
                   data_of<float>(packed),
                   a.data(),
                   b.data(),
                   residual ? data_of<float>(added) : nullptr,
                   mutable_data_of<float>(y),
                   act};
  run_on_isa([&](auto isa) {
    constexpr Isa kIsa = decltype(isa)::value;
    const Cut cut(g, kFilterBlock<kIsa>, thread_count());
    parallel_on<kIsa>(cut.chunks * cut.strips, [&](int64_t begin, int64_t end) RF_INLINE {
      tasks<kIsa>(g, o, cut, begin, end);
    });
  });
  return y;
}

}  // namespace
}  // namespace resnet_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("_direct_weight", TORCH_BOX(&resnet_fast::cpu::direct_weight));
  m.impl("_direct_conv", TORCH_BOX(&resnet_fast::cpu::direct_conv));
}
