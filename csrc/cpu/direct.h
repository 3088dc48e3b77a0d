// The direct convolution for any element type and register tile: the windows of a chunk of output
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
//
// A kernel is a type with T, kBlock (NR), kRows, kPair (columns that one step consumes), kDepth (of
// a panel), kBandRows (lines of output that a task of band.h makes), kChain, kFinishes (whether a
// tile can leave the registers finished), Packed (what a weight is kept as) and multiply(count,
// rows, packed, depth, out, half of the block).
#pragma once

#include <atomic>
#include <bit>
#include <utility>

#include "gather.h"
#include "pixels.h"
#include "tile.h"

namespace resnet_fast::cpu {

template <typename T>
struct Panel {
  static constexpr int64_t kDepth = 1024 / sizeof(T);  // a weight block of 32 KiB
};

constexpr int64_t kChunk = 98;             // pixels: 7 register tiles of 14
constexpr int64_t kStrip = 256;            // filters: the chunk's sums and panel fit 256 KiB
constexpr int64_t kKeptBytes = 512 << 10;  // of a chunk's panels; half of a second-level cache
constexpr int64_t kShortChain = 16;  // products (tile.h), where an output is one pixel an image

// How 8-bit operands stand for real numbers (int8.h).
struct Requantize {
  uint8_t zero;                  // what x holds for 0
  float residual, inverse, out;  // factors of the residual and of the activation's value; y's zero
};

template <typename T>
struct DirectOperands {
  const T* x;
  const void* packed;  // what direct_packed says
  const float* scale;
  const float* shift;
  const T* residual;
  T* y;
  Act act;
  bool planar = false;             // x is contiguous NCHW; only where reads_bands(g) (band.h)
  Requantize grid = {0, 1, 1, 0};  // 8-bit operands' alone
  Affine before = {};              // of x, as it is read; only where takes_affine(g)

  // What a window reads outside the image.
  T outside() const {
    if constexpr (std::is_same_v<T, uint8_t>) {
      return grid.zero;
    } else {
      return T{};
    }
  }

  Clamp clamp() const {
    Clamp c = clamp_of(act);
    if constexpr (std::is_same_v<T, uint8_t>) {  // on y's grid, and to what 8 bits hold
      c.low = std::clamp(c.low * grid.inverse + grid.out, 0.0f, 255.0f);
      c.high = std::clamp(c.high * grid.inverse + grid.out, 0.0f, 255.0f);
    }
    return c;
  }
};

// Whether the kernel of a geometry can apply a norm to its input as it reads it: once a value,
// which a window of several taps would do for each of them.
inline bool takes_affine(const Geometry& g) { return g.taps() == 1 && g.groups == 1; }

// The depth of packed weights: zeros fill the last step.
template <typename K>
int64_t padded_depth(int64_t depth) {
  return (depth + K::kPair - 1) / K::kPair * K::kPair;
}

constexpr int64_t kBandChannels = 16;  // below this, windows are read out of a band (band.h)

// Channels as a band holds them: a step's columns never belong to two pixels.
template <typename K>
int64_t band_channels(int64_t channels) {
  return padded_depth<K>(channels);
}

// The depth of weights packed once more for bands, behind the others; 0 where they serve as they
// are.
template <typename K>
int64_t band_depth(int64_t channels, int64_t taps) {
  const int64_t wide = band_channels<K>(channels);
  return channels < kBandChannels && wide != channels && taps > 1 ? taps * wide : 0;
}

// Of a group's filters, over a group's channels.
template <typename K>
int64_t group_packed_size(int64_t filters, int64_t channels, int64_t taps) {
  return (filters + K::kBlock - 1) / K::kBlock * K::kBlock * padded_depth<K>(taps * channels);
}

// `filters` of all groups together, `channels` of one.
template <typename K>
int64_t direct_packed_size(int64_t filters, int64_t channels, int64_t taps, int64_t groups) {
  const int64_t size = groups * group_packed_size<K>(filters / groups, channels, taps);
  const int64_t blocks = (filters + K::kBlock - 1) / K::kBlock;
  return groups > 1 ? size : size + blocks * K::kBlock * band_depth<K>(channels, taps);
}

// How the work on a group is cut: pixels in chunks, filters in strips of whole blocks.
struct DirectCut {
  int64_t chunks, strips, blocks;
  int64_t call = next_call();  // a number of its own

  static int64_t next_call() {
    static std::atomic<int64_t> last{0};
    return last.fetch_add(1, std::memory_order_relaxed) + 1;
  }

  DirectCut(const Geometry& g, int64_t nr, int64_t threads) {
    const int64_t filters = g.group_filters();
    blocks = (filters + nr - 1) / nr;
    chunks = (g.pixels() + kChunk - 1) / kChunk;
    if (chunks > threads) chunks = (chunks + threads - 1) / threads * threads;
    const int64_t wanted = g.groups > 1 ? 1 : (threads + chunks - 1) / chunks;
    strips = std::clamp(wanted, (filters + kStrip - 1) / kStrip, blocks);
  }
};

// y = what act(sum * scale + shift + residual) is on y's grid, for one pixel's filters: the nearest
// of 0 to 255, ties to even. Where the activation is a clamp, scale and shift are on that grid too.
template <typename ActT>
RF_INLINE inline void requantize_row(ActT, int64_t length, const int32_t* __restrict sums,
                                     const float* __restrict scale, const float* __restrict shift,
                                     const uint8_t* __restrict residual, const Requantize& grid,
                                     const Clamp& clamp, uint8_t* __restrict y) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  constexpr Act kAct = ActT::value;
  constexpr bool kClamps = kAct == Act::none || kAct == Act::relu || kAct == Act::relu6;
  // Copies: a byte that is written might be part of anything that is referred to.
  const float low = kClamps ? clamp.low : 0.0f, high = kClamps ? clamp.high : 255.0f;
  const float inverse = grid.inverse, out = grid.out, factor = grid.residual;
  const auto value = [=](int64_t k, float added) RF_INLINE {
    float v = float(sums[k]) * scale[k] + shift[k] + added;
    if constexpr (!kClamps) v = activate<kAct>(v) * inverse + out;
    v = v < low ? low : v;
    v = v > high ? high : v;
    return static_cast<uint8_t>(std::bit_cast<uint32_t>(v + kRound));
  };
  if (residual != nullptr) {
    for (int64_t k = 0; k < length; ++k) y[k] = value(k, float(residual[k]) * factor);
  } else {
    for (int64_t k = 0; k < length; ++k) y[k] = value(k, 0.0f);
  }
}

// The epilogue outside the registers: of `rows` sums of `columns` filters from filter k0, for y
// from element `at`, a pixel every `step`. kWhole columns, the usual number, are code without a
// loop around it.
template <int64_t kWhole = 0, typename T>
RF_INLINE inline void finish_rows(const DirectOperands<T>& o, int64_t step, int64_t rows,
                                  int64_t columns, const typename SumOf<T>::type* sums,
                                  int64_t sums_stride, int64_t k0, int64_t at) {
  with_act(o.act, [&](auto tag) RF_INLINE {
    const auto finish = [&](auto length) RF_INLINE {
      for (int64_t i = 0, to = at; i < rows; ++i, to += step) {
        const T* const residual = o.residual == nullptr ? nullptr : o.residual + to;
        if constexpr (std::is_same_v<T, uint8_t>) {
          requantize_row(tag, length, sums + i * sums_stride, o.scale + k0, o.shift + k0, residual,
                         o.grid, o.clamp(), o.y + to);
        } else {
          finish_row(tag, length, sums + i * sums_stride, o.scale + k0, o.shift + k0, residual,
                     o.y + to);
        }
      }
    };
    if (kWhole > 0 && columns == kWhole) return finish(std::integral_constant<int64_t, kWhole>{});
    finish(columns);
  });
}

template <typename K>
RF_INLINE inline void direct_tasks(const Geometry& g, const DirectOperands<typename K::T>& o,
                                   const DirectCut& cut, int64_t begin, int64_t end) {
  using T = typename K::T;
  constexpr int64_t NR = K::kBlock, kDepth = K::kDepth, kLine = 64 / sizeof(T);
  constexpr int kRows = K::kRows;
  thread_local Scratch panel_memory, sums_memory;
  thread_local std::pair<int64_t, int64_t> kept;  // the call and the chunk whose panels there are
  const int64_t depth = g.depth(), padded = padded_depth<K>(depth), pixels = g.pixels();
  const Clamp clamp = o.clamp();
  // A classifier's sums are the network's result, and so few that short chains cost nothing.
  const int64_t chain = pixels == g.batch ? std::min<int64_t>(K::kChain, kShortChain) : K::kChain;
  // Several panels are read in place where the rows of a tile do not share so few sets of the cache
  // that they put each other out: it has 4 KiB in a way.
  const int64_t step = g.x_step();
  const bool spread = step * int64_t(sizeof(T)) % (K::kBlockStays ? 1024 : 4096) != 0;
  const bool near = depth <= kDepth && (g.x_pitch == 0 || step <= kDepth);
  const bool in_place = g.taps() == 1 && g.pixels() == g.batch * g.in[0] * g.in[1] * g.in[2] &&
                        g.padding == std::array<int64_t, 3>{} && depth == padded &&
                        (near || spread) && o.before.scale == nullptr;
  // Rows of the panel are an odd number of cache lines apart.
  const int64_t panel_stride = ((std::min(padded, kDepth) + kLine - 1) / kLine | 1) * kLine;
  // All panels of a chunk, for its next strip of filters, where they fit; else one at a time.
  const int64_t panel_size = kChunk * panel_stride, panels = (padded + kDepth - 1) / kDepth;
  const bool keeps = cut.strips > 1 && panels * panel_size * int64_t(sizeof(T)) <= kKeptBytes;
  T* const gathered =
      in_place ? nullptr : panel_memory.get<T>(keeps ? panels * panel_size : panel_size);
  const int64_t row_stride = in_place ? step : panel_stride;
  const int64_t width = g.group_channels(), filters = g.group_filters();
  const auto* const all_packed = static_cast<const typename K::Packed*>(o.packed);
  const int64_t group_size = group_packed_size<K>(filters, width, g.taps());
  const int64_t group_tasks = cut.chunks * cut.strips;
  const int64_t most_blocks = (cut.blocks + cut.strips - 1) / cut.strips;
  const int64_t sums_stride = most_blocks * NR;
  auto* const sums = sums_memory.get<typename SumOf<T>::type>(kChunk * sums_stride);
  Window windows[kChunk], ahead[kChunk];
  // The windows of a few channels overlap so much that the hardware foresees them.
  const bool worth_prefetching = g.channels >= 32;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / group_tasks;
    const int64_t chunk = task % group_tasks / cut.strips, strip = task % cut.strips;
    const int64_t pixel = cut_at(pixels, cut.chunks, chunk);
    const int64_t count = cut_at(pixels, cut.chunks, chunk + 1) - pixel;
    const int64_t first_block = cut_at(cut.blocks, cut.strips, strip);
    const int64_t last_block = cut_at(cut.blocks, cut.strips, strip + 1);
    const int64_t pieces = (count + kRows - 1) / kRows;
    const Cut piece_cut(count, pieces);
    windows_of(g, pixel, count, windows);
    const std::pair gathers(cut.call, task / cut.strips);
    const bool is_kept = keeps && kept == gathers;
    if (!in_place) kept = gathers;
    int64_t count_ahead = 0;
    if (task + 1 < end && !(keeps && (task + 1) / cut.strips == gathers.second)) {
      const int64_t next = (task + 1) % group_tasks / cut.strips;
      const int64_t first = cut_at(pixels, cut.chunks, next);
      count_ahead = cut_at(pixels, cut.chunks, next + 1) - first;
      windows_of(g, first, count_ahead, ahead);
    }
    for (int64_t d0 = 0; d0 < depth; d0 += kDepth) {
      const int64_t d1 = std::min(depth, d0 + kDepth);
      const int64_t columns = std::min(padded - d0, kDepth);
      const T* panel = o.x + pixel * step + group * width + d0;
      if (!in_place) {
        T* const to = gathered + (keeps ? d0 / kDepth * panel_size : 0);
        panel = to;
        const Runs runs(g, group * width, width, d0, d1);
        for (int64_t i = 0; i < count && !is_kept; ++i) {
          T* row = to + i * panel_stride;
          if constexpr (!std::is_same_v<T, uint8_t>) {
            if (o.before.scale != nullptr) {
              gather_affine(g, o.x, windows[i], runs, o.before, row);
              std::fill(row + (d1 - d0), row + columns, T{});
              continue;
            }
          }
          gather_row(g, o.x, windows[i], runs, row, o.outside());
          std::fill(row + (d1 - d0), row + columns, T{});
        }
      }
      // The next panel, of this chunk or the next, is on its way while this one is multiplied.
      const bool same = d1 < depth;
      const int64_t wanted = !same ? count_ahead : is_kept ? 0 : count;
      const int64_t due = worth_prefetching ? wanted : 0;
      const int64_t p0 = same ? d1 : 0;
      const int64_t group_ahead = same ? group : (task + 1) / group_tasks;
      const Runs runs_ahead(g, group_ahead * width, width, p0, std::min(depth, p0 + kDepth));
      TileOut<T> out{};
      out.sums_stride = sums_stride;
      out.chain = chain;
      out.accumulate = d0 > 0;
      out.y_stride = g.y_step();
      out.low = clamp.low;
      out.high = clamp.high;
      out.residual_scale = o.grid.residual;
      const auto bring = [&](int64_t begin_row, int64_t end_row) RF_INLINE {
        for (int64_t i = begin_row; i < end_row; ++i) {
          prefetch_row(g, o.x, same ? windows[i] : ahead[i], runs_ahead);
        }
      };
      const auto multiply = [&](int64_t piece, int64_t block) RF_INLINE {
        const int64_t row = piece_cut.at(piece), rows = piece_cut.at(piece + 1) - row;
        const int64_t k0 = group * filters + block * NR;
        const int64_t columns_left = std::min(NR, filters - block * NR);
        const bool half = columns_left <= NR / 2;  // the second vector would be of zeros
        const bool whole = K::kFinishes && columns_left == (half ? NR / 2 : NR) && clamp.is_clamp;
        const int64_t at = (pixel + row) * g.y_step() + k0;
        const typename K::Packed* packed =
            all_packed + group * group_size + (d0 * cut.blocks + block * columns) * NR;
        out.last = d1 == depth && whole;
        out.scale = o.scale + k0;
        out.shift = o.shift + k0;
        out.sums = sums + row * sums_stride + (block - first_block) * NR;
        out.y = o.y + at;
        out.residual = o.residual == nullptr ? nullptr : o.residual + at;
        K::multiply(rows, {panel + row * row_stride, row_stride, columns, 0}, packed, columns, out,
                    half);
        if (d1 == depth && !whole) {
          finish_rows<K::kFinishes ? NR : 0>(o, g.y_step(), rows, columns_left, out.sums,
                                             sums_stride, k0, at);
        }
      };
      if constexpr (K::kBlockStays) {
        // A few filters of all pixels, then the next filters: their weights stay in the first-level
        // cache.
        const int64_t blocks = last_block - first_block;
        for (int64_t b = 0; b < blocks; ++b) {
          bring(cut_at(due, blocks, b), cut_at(due, blocks, b + 1));
          for (int64_t piece = 0; piece < pieces; ++piece) multiply(piece, first_block + b);
        }
      } else {
        // All filters of a few pixels, then the next pixels: y is written line by line.
        for (int64_t piece = 0; piece < pieces; ++piece) {
          bring(cut_at(due, pieces, piece), cut_at(due, pieces, piece + 1));
          for (int64_t block = first_block; block < last_block; ++block) multiply(piece, block);
        }
      }
    }
  }
}

// Weights [K][C][taps], rows of the product in the order [taps][C], cut into panels of kDepth rows:
// [panel][K/NR][row / kPair][NR][kPair], so that the blocks of a panel follow each other in memory.
// Zeros beyond the last filter and the last row, and for channels from `channels` to `wide`.
template <typename K>
void pack_rows(const typename K::Packed* from, int64_t filters, int64_t channels, int64_t wide,
               int64_t taps, typename K::Packed* to) {
  constexpr int64_t NR = K::kBlock, kPair = K::kPair, kDepth = K::kDepth;
  const int64_t depth = taps * wide, padded = padded_depth<K>(depth);
  const int64_t blocks = (filters + NR - 1) / NR;
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t row = 0; row < padded; ++row) {
        const int64_t d0 = row / kDepth * kDepth, tap = row / wide, c = row % wide;
        const int64_t rows = std::min(kDepth, padded - d0);
        auto* line = to + (d0 * blocks + block * rows + (row - d0) / kPair * kPair) * NR;
        for (int64_t j = 0; j < NR; ++j) {
          const int64_t k = block * NR + j;
          const bool inside = k < filters && row < depth && c < channels;
          line[j * kPair + row % kPair] =
              inside ? from[(k * channels + c) * taps + tap] : typename K::Packed{};
        }
      }
    }
  });
}

template <typename K>
void pack_direct(const typename K::Packed* from, int64_t filters, int64_t channels, int64_t taps,
                 int64_t groups, typename K::Packed* to) {
  const int64_t each = filters / groups, size = group_packed_size<K>(each, channels, taps);
  for (int64_t group = 0; group < groups; ++group) {
    pack_rows<K>(from + group * each * channels * taps, each, channels, channels, taps,
                 to + group * size);
  }
  if (groups == 1 && band_depth<K>(channels, taps) > 0) {
    pack_rows<K>(from, filters, channels, band_channels<K>(channels), taps, to + size);
  }
}

// How _direct_weight packs a weight: for narrow groups (grouped.h) or for the product above.
struct DirectPacked {
  bool narrow;
  ScalarType dtype;
  int64_t size;
};
DirectPacked direct_packed(ScalarType dtype, int64_t filters, int64_t channels, int64_t taps,
                           int64_t groups);

// Whichever kernel direct_packed names.
template <typename T>
void run_direct(const Geometry& g, const DirectOperands<T>& o);

// The fp32 kernel (conv_bn_act_direct.cpp).
int64_t direct_fp32_packed_size(int64_t filters, int64_t channels, int64_t taps, int64_t groups);
void direct(const Geometry& g, const DirectOperands<float>& o);

// The bf16 kernel, for CPUs with AVX512_BF16 (conv_bn_act_direct_avx512bf16.cpp).
bool has_direct_bf16();
int64_t direct_bf16_packed_size(int64_t filters, int64_t channels, int64_t taps, int64_t groups);
void pack_direct_bf16(const bf16* from, int64_t filters, int64_t channels, int64_t taps,
                      int64_t groups, bf16* to);
void direct(const Geometry& g, const DirectOperands<bf16>& o);

}  // namespace resnet_fast::cpu
