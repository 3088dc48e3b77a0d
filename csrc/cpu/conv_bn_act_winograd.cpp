// conv_bn_act for 3x3 kernels at stride 1 by Winograd's F(m x m, 3 x 3), m = 2 or 4, in fp32, of
// tensors in fp32 or bf16: what is read is widened, and the result rounded once.
//
// The output is cut into tiles of m x m; each reads an overlapping tile of n x n, n = m + 2.
// y = Aᵀ[ Σ_c U_c ⊙ (Bᵀ d_c B) ]A turns the 9 C multiplications of an output value into n² / m² C:
// 2.25 C for m = 4, 4 C for m = 2. The n² elements of a tile are n² matrix products over C:
//
//    x (channels-last)          V [n²][tiles][C]     U [K/NR][n²][C][NR]     sums [n²][tiles][NR]
//   +----+                      +--------------+     +-----------+          +-----------+
//   | d  | --- Bᵀ d B --------> | one plane an | ==> | one plane | = n² ==> | one plane | -- Aᵀ s
//   A,
//   +----+  lanes over C        | element      |  x  | an element|          | an element|  scale,
//   ...
//                               +--------------+     +-----------+          +-----------+  --> y
//
// A thread transforms a block of tiles, whose V stays in its second-level cache, and passes over
// all of U; where tiles are few, or U is larger than the caches, V is shared and the threads divide
// U instead, so that each weight is read once. The epilogue works on a tile while its sums are hot.
#include "../math/winograd.h"
#include "lanes.h"
#include "pool.h"
#include "tile.h"
#include "winograd.h"

namespace resnet_fast::cpu {
namespace {

struct Plane {
  int64_t batch, channels, filters;
  int64_t in_h, in_w, out_h, out_w, pad_h, pad_w;
  int64_t x_step, y_step;  // values from one pixel to the next
  int64_t tiles_h, tiles_w;

  int64_t tiles() const { return batch * tiles_h * tiles_w; }
};

// Tiles a block holds at most: V and the sums of a block then fit a 1 MiB second-level cache for
// up to 128 channels, and each weight read serves 28 tiles.
constexpr int64_t kBlockTiles = 28;
// Beyond this, U passes once and V is shared (bytes).
constexpr int64_t kWeightBytes = 16 << 20;

constexpr int64_t kDepth = 128;  // channels at a time: their panel of U fits the first-level cache

// Channels added one after the other (tile.h): the transforms add to the error of the sums, which
// therefore has to be below a direct convolution's. Of F(4x4)'s limit, the worst of 24 draws takes
// 0.57 at 64 channels and 0.61 at 128; in one chain it took 1.18 and 1.07.
int64_t chain_of(int64_t channels) { return channels <= 64 ? 16 : 32; }

template <Isa I>
constexpr int64_t kFilterBlock = 2 * Tile<I>::kBytes / 4;

// Distance between the n² planes of V or of the sums: off multiples of the page, or the n² streams
// of a tile's transform would fall on the same cache sets.
inline int64_t plane_stride(int64_t elements) { return (elements + 15) / 16 * 16 + 16; }
inline int64_t row_stride(int64_t channels) { return (channels + 15) / 16 * 16 + 16; }

// V of `count` tiles from tile `first`, for channels [c0, c1).
template <int M, Isa I, typename T>
RF_INLINE inline void transform_input(const Plane& g, const T* x, const T* zeros, int64_t first,
                                      int64_t count, int64_t c0, int64_t c1, float* v,
                                      int64_t v_plane) {
  using W = Winograd<M>;
  constexpr int N = W::kTile, kLanes = Tile<I>::kBytes / 4;
  typedef float Vec __attribute__((vector_size(Tile<I>::kBytes)));
  const int64_t v_row = row_stride(g.channels);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t tile = first + t;
    const int64_t w0 = tile % g.tiles_w * M - g.pad_w;
    const int64_t h0 = tile / g.tiles_w % g.tiles_h * M - g.pad_h;
    const T* image = x + tile / (g.tiles_w * g.tiles_h) * g.in_h * g.in_w * g.x_step;
    const T* from[N][N];
    for (int i = 0; i < N; ++i) {
      for (int j = 0; j < N; ++j) {
        const int64_t h = h0 + i, w = w0 + j;
        const bool inside = h >= 0 && h < g.in_h && w >= 0 && w < g.in_w;
        from[i][j] = inside ? image + (h * g.in_w + w) * g.x_step : zeros;
      }
    }
    float* to = v + t * v_row;
    const auto transform = [&](int64_t c, auto load) RF_INLINE {
      Vec half[N][N];
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j) {
        Vec d[N], column[N];
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) load(&d[i], from[i][j] + c);
        W::input(d, column);
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) half[i][j] = column[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i) {
        Vec line[N];
        W::input(half[i], line);
#pragma GCC unroll 6
        for (int j = 0; j < N; ++j) {
          std::memcpy(to + (i * N + j) * v_plane + c, &line[j], sizeof(Vec));
        }
      }
    };
    int64_t c = c0;
    for (; c + kLanes <= c1; c += kLanes) {
      transform(c, [](Vec* d, const T* p) RF_INLINE { load_lanes(p, d); });
    }
    if (c < c1) {
      const int64_t rest = c1 - c;
      transform(c, [rest](Vec* d, const T* p) RF_INLINE { load_some_lanes(p, rest, d); });
    }
  }
}

template <typename T>
using Epilogue = WinogradOperands<T>;

// The sums of one tile by the definition of convolution. The transforms subtract inputs from each
// other, so that an infinity becomes NaN, and a huge value may overflow, in outputs whose own
// window is finite; a tile with such a sum is computed again.
template <int M, int64_t NR, typename T>
void repair(const Plane& g, const Epilogue<T>& e, int64_t image, int64_t h0, int64_t w0, int64_t k0,
            int64_t columns, float (&patch)[M][M][NR]) {
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < M; ++j) {
      for (int64_t k = 0; k < columns; ++k) {
        float sum = 0;
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t h = h0 + i - g.pad_h + tap / 3, w = w0 + j - g.pad_w + tap % 3;
          if (h < 0 || h >= g.in_h || w < 0 || w >= g.in_w) continue;
          const T* from = e.x + ((image * g.in_h + h) * g.in_w + w) * g.x_step;
          const T* filter = e.weight + (k0 + k) * e.weight_step[0] + tap / 3 * e.weight_step[2] +
                            tap % 3 * e.weight_step[3];
          for (int64_t c = 0; c < g.channels; ++c) {
            sum += widen(from[c]) * widen(filter[c * e.weight_step[1]]);
          }
        }
        patch[i][j][k] = sum;
      }
    }
  }
}

// y of `count` tiles from tile `first`, for `columns` filters from filter k0. Sums leave the
// registers finished; a part of a filter block, or an activation that is no clamp, takes a detour
// through `patch`.
template <int M, Isa I, typename T>
RF_INLINE inline void transform_output(const Plane& g, const Epilogue<T>& e, const float* sums,
                                       int64_t s_plane, int64_t first, int64_t count, int64_t k0,
                                       int64_t columns) {
  using W = Winograd<M>;
  constexpr int N = W::kTile, kLanes = Tile<I>::kBytes / 4;
  constexpr int64_t NR = kFilterBlock<I>;
  typedef float Vec __attribute__((vector_size(Tile<I>::kBytes)));
  alignas(64) float patch[M][M][NR];
  const Clamp clamp = clamp_of(e.act);
  const bool in_registers = clamp.is_clamp && columns == NR;
  const auto y_at = [&](int64_t image, int64_t h, int64_t w)
                        RF_INLINE { return ((image * g.out_h + h) * g.out_w + w) * g.y_step + k0; };
  for (int64_t t = 0; t < count; ++t) {
    const int64_t tile = first + t;
    const int64_t w0 = tile % g.tiles_w * M;
    const int64_t h0 = tile / g.tiles_w % g.tiles_h * M;
    const int64_t image = tile / (g.tiles_w * g.tiles_h);
    const int64_t rows = std::min<int64_t>(M, g.out_h - h0);
    const int64_t width = std::min<int64_t>(M, g.out_w - w0);
    Vec total = {};  // infinite or NaN once a sum is
    for (int64_t at = 0; at < NR; at += kLanes) {
      const float* s = sums + t * NR + at;
      Vec half[M][N];
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j) {
        Vec p[N], column[M];
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) std::memcpy(&p[i], s + (i * N + j) * s_plane, sizeof(Vec));
        W::output(p, column);
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) half[i][j] = column[i];
      }
      const Vec low = Vec{} + clamp.low, high = Vec{} + clamp.high;
      Vec scale = {}, shift = {};
      if (in_registers) {
        std::memcpy(&scale, e.scale + k0 + at, sizeof(Vec));
        std::memcpy(&shift, e.shift + k0 + at, sizeof(Vec));
      }
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i) {
        Vec line[M];
        W::output(half[i], line);
#pragma GCC unroll 6
        for (int j = 0; j < M; ++j) {
          total += line[j];
          if (!in_registers) {
            std::memcpy(&patch[i][j][at], &line[j], sizeof(Vec));
          } else if (i < rows && j < width) {
            const int64_t out = y_at(image, h0 + i, w0 + j) + at;
            Vec z = line[j] * scale + shift;
            if (e.residual != nullptr) {
              Vec r;
              load_lanes(e.residual + out, &r);
              z += r;
            }
            // NaN fails both comparisons and stays.
            z = z < low ? low : z;
            z = z > high ? high : z;
            store_lanes(z, e.y + out);
          }
        }
      }
    }
    total *= 0.0f;
    float lanes[kLanes];
    std::memcpy(lanes, &total, sizeof(Vec));
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    const bool finite = lanes[0] == 0;
    if (!finite) repair<M, NR>(g, e, image, h0, w0, k0, columns, patch);
    if (in_registers && finite) continue;
    with_act(e.act, [&](auto tag) RF_INLINE {
      const auto finish = [&](auto length) RF_INLINE {
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < width; ++j) {
            const int64_t out = y_at(image, h0 + i, w0 + j);
            finish_row(tag, length, patch[i][j], e.scale + k0, e.shift + k0,
                       e.residual == nullptr ? nullptr : e.residual + out, e.y + out);
          }
        }
      };
      if (columns == NR) return finish(std::integral_constant<int64_t, NR>{});
      finish(columns);
    });
  }
}

// The n² products of `count` tiles with filter block `kb`, and what follows them.
template <int M, Isa I, typename T>
RF_INLINE inline void filter_block(const Plane& g, const Epilogue<T>& e, const float* v,
                                   int64_t v_plane, const float* packed, int64_t first,
                                   int64_t count, int64_t kb, float* sums) {
  constexpr int kElements = Winograd<M>::kTile * Winograd<M>::kTile;
  constexpr int64_t NR = kFilterBlock<I>;
  constexpr int kRows = Tile<I>::kRows;
  const int64_t v_row = row_stride(g.channels);
  const int64_t s_plane = plane_stride(count * NR);
  const int64_t pieces = (count + kRows - 1) / kRows;
  const Cut piece_cut(count, pieces);
  const int64_t chain = chain_of(g.channels);
  const float* u = packed + kb * kElements * g.channels * NR;
  for (int element = 0; element < kElements; ++element) {
    for (int64_t c = 0; c < g.channels; c += kDepth) {
      const int64_t depth = std::min(kDepth, g.channels - c);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t row = piece_cut.at(piece), rows = piece_cut.at(piece + 1) - row;
        TileOut<float> out{};
        out.sums = sums + element * s_plane + row * NR;
        out.sums_stride = NR;
        out.chain = chain;
        out.accumulate = c > 0;
        const float* from = v + element * v_plane + row * v_row + c;
        kMultiplyRows<I>[rows - 1]({from, v_row, depth, 0}, u, depth, out);
      }
      u += depth * NR;
    }
  }
  const int64_t k0 = kb * NR;
  transform_output<M, I>(g, e, sums, s_plane, first, count, k0, std::min(NR, g.filters - k0));
}

template <int M, Isa I, typename T>
void convolve(const Plane& g, const Epilogue<T>& e) {
  const T* const x = e.x;
  const float* const packed = e.packed;
  constexpr int kElements = Winograd<M>::kTile * Winograd<M>::kTile;
  constexpr int64_t NR = kFilterBlock<I>;
  const int64_t tiles = g.tiles(), v_row = row_stride(g.channels);
  const int64_t filter_blocks = (g.filters + NR - 1) / NR;
  const int64_t threads = worker_count();
  const int64_t weight_bytes = filter_blocks * kElements * g.channels * NR * 4;
  const std::vector<T> zeros(g.channels, T{});

  thread_local Scratch v_memory, sums_memory;
  if (tiles >= threads * 16 && weight_bytes <= kWeightBytes) {
    int64_t blocks = (tiles + kBlockTiles - 1) / kBlockTiles;
    blocks = (blocks + threads - 1) / threads * threads;
    parallel_on<I>(blocks, [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = cut_at(tiles, blocks, block);
        const int64_t count = cut_at(tiles, blocks, block + 1) - first;
        if (count == 0) continue;
        const int64_t v_plane = plane_stride(count * v_row);
        float* v = v_memory.get<float>(kElements * v_plane);
        float* sums = sums_memory.get<float>(kElements * plane_stride(count * NR));
        transform_input<M, I>(g, x, zeros.data(), first, count, 0, g.channels, v, v_plane);
        for (int64_t kb = 0; kb < filter_blocks; ++kb) {
          filter_block<M, I>(g, e, v, v_plane, packed, first, count, kb, sums);
        }
      }
    });
    return;
  }
  // V is shared: all of the tiles, or as many as keep it near 8 MiB.
  const int64_t span = std::clamp<int64_t>((8 << 20) / (kElements * v_row * 4), 64, 4096);
  for (int64_t first = 0; first < tiles; first += span) {
    const int64_t count = std::min(span, tiles - first);
    const int64_t v_plane = plane_stride(count * v_row);
    float* v = v_memory.get<float>(kElements * v_plane);
    // Channels in pieces, so that few tiles still give each thread a part.
    const int64_t pieces = std::min<int64_t>((g.channels + 63) / 64, threads);
    const int64_t width = ((g.channels + pieces - 1) / pieces + 15) / 16 * 16;
    parallel_on<I>(count * pieces, [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t tile = task % count, c0 = task / count * width;
        const int64_t c1 = std::min(g.channels, c0 + width);
        transform_input<M, I>(g, x, zeros.data(), first + tile, 1, c0, c1, v + tile * v_row,
                              v_plane);
      }
    });
    const int64_t wanted = (threads + filter_blocks - 1) / filter_blocks;
    const int64_t blocks =
        std::clamp<int64_t>(wanted, (count + kBlockTiles - 1) / kBlockTiles, count);
    parallel_on<I>(filter_blocks * blocks, [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t kb = task / blocks, block = task % blocks;
        const int64_t row = cut_at(count, blocks, block);
        const int64_t rows = cut_at(count, blocks, block + 1) - row;
        float* sums = sums_memory.get<float>(kElements * plane_stride(rows * NR));
        filter_block<M, I>(g, e, v + row * v_row, v_plane, packed, first + row, rows, kb, sums);
      }
    });
  }
}

// U = G g Gᵀ in fp64, rounded once, as [K/NR][n²][C][NR]; zeros beyond the last filter.
template <int M, typename T>
void pack(const T* weight, int64_t filters, int64_t channels, int64_t nr, float* packed) {
  using W = Winograd<M>;
  constexpr int N = W::kTile;
  const int64_t blocks = (filters + nr - 1) / nr;
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t kb = begin; kb < end; ++kb) {
      float* block = packed + kb * N * N * channels * nr;
      for (int64_t j = 0; j < nr; ++j) {
        const int64_t k = kb * nr + j;
        for (int64_t c = 0; c < channels; ++c) {
          double half[N][3] = {};
          if (k < filters) {
            const T* g = weight + (k * channels + c) * 9;
            for (int i = 0; i < N; ++i) {
              for (int s = 0; s < 3; ++s) {
                for (int r = 0; r < 3; ++r) half[i][s] += W::kG[i][r] * double(widen(g[r * 3 + s]));
              }
            }
          }
          for (int i = 0; i < N; ++i) {
            for (int l = 0; l < N; ++l) {
              double u = 0;
              for (int s = 0; s < 3; ++s) u += half[i][s] * W::kG[l][s];
              block[((i * N + l) * channels + c) * nr + j] = static_cast<float>(u);
            }
          }
        }
      }
    }
  });
}

int64_t filter_block_size() {
  int64_t size = 0;
  run_on_isa([&](auto isa) { size = kFilterBlock<decltype(isa)::value>; });
  return size;
}

bool is_taken(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16;
}

// Calls f with the tag of a dtype that is_taken.
template <typename F>
void with_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::BFloat16) return f(TypeTag<bf16>{});
  f(TypeTag<float>{});
}

Tensor winograd_weight(const Tensor& weight, int64_t m) {
  STD_TORCH_CHECK(m == 2 || m == 4, "m: expected 2 or 4");
  STD_TORCH_CHECK(weight.is_cpu() && is_taken(weight.scalar_type()),
                  "weight: expected a float32 or bfloat16 CPU tensor");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                  "weight: expected shape [K, C, 3, 3]");
  const int64_t filters = weight.size(0), channels = weight.size(1);
  const Tensor dense = as_format(weight, MemoryFormat::Contiguous);
  const Tensor packed =
      empty_packed(winograd_packed_size(filters, channels, m), ScalarType::Float, weight);
  auto* const to = mutable_data_of<float>(packed);
  with_type(weight.scalar_type(), [&](auto tag) {
    const auto* const from = data_of<typename decltype(tag)::type>(dense);
    if (m == 2) {
      pack<2>(from, filters, channels, filter_block_size(), to);
    } else {
      pack<4>(from, filters, channels, filter_block_size(), to);
    }
  });
  return packed;
}

Tensor winograd_conv(const Tensor& x, const Tensor& packed, const Tensor& weight, int64_t m,
                     const OptTensor& scale, const OptTensor& shift, const OptTensor& residual,
                     IntList padding, const std::string& act_name) {
  const Act act = parse_act(act_name);
  STD_TORCH_CHECK(m == 2 || m == 4, "m: expected 2 or 4");
  STD_TORCH_CHECK(x.is_cpu() && is_taken(x.scalar_type()) && x.dim() == 4,
                  "x: expected a float32 or bfloat16 CPU tensor of rank 4");
  check_input("x", x);
  STD_TORCH_CHECK(padding.size() == 2, "padding: expected two values");
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == x.scalar_type() && weight.dim() == 4 &&
                      weight.size(1) == x.size(1) && weight.size(2) == 3 && weight.size(3) == 3,
                  "weight: expected a CPU tensor of shape [K, C, 3, 3] and the dtype of x");
  const std::array<int64_t, 2> one = {1, 1};
  const IntList ones(one.data(), one.size());
  const Geometry g = checked_geometry(x, weight, ones, padding, ones, 1);
  const int64_t filters = g.filters;
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Float &&
                      packed.is_contiguous() &&
                      packed.numel() == winograd_packed_size(filters, g.channels, m),
                  "packed: expected what _winograd_weight returns for this weight");
  if (scale) check_channel_vector("scale", *scale, x, filters);
  if (shift) check_channel_vector("shift", *shift, x, filters);
  const Tensor y = empty_channels_last({g.batch, filters, g.out[1], g.out[2]}, x);
  if (residual) check_matches("residual", *residual, y);
  if (y.numel() == 0) return y;

  const Tensor dense = as_format(x, MemoryFormat::ChannelsLast);
  const Tensor added = residual ? as_format(*residual, MemoryFormat::ChannelsLast) : Tensor();
  const auto a = channel_values<float>(scale, filters, 1.0f);
  const auto b = channel_values<float>(shift, filters, 0.0f);
  with_type(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    winograd(g, m,
             WinogradOperands<T>{
                 data_of<T>(dense),
                 data_of<float>(packed),
                 data_of<T>(weight),
                 {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
                 a.data(),
                 b.data(),
                 residual ? data_of<T>(added) : nullptr,
                 mutable_data_of<T>(y),
                 act});
  });
  return y;
}

}  // namespace

int64_t winograd_packed_size(int64_t filters, int64_t channels, int64_t m) {
  const int64_t nr = filter_block_size();
  return (filters + nr - 1) / nr * nr * channels * (m + 2) * (m + 2);
}

template <typename T>
void winograd(const Geometry& g, int64_t m, const WinogradOperands<T>& o) {
  Plane plane{g.batch,      g.channels,   g.filters,  g.in[1],    g.in[2], g.out[1], g.out[2],
              g.padding[1], g.padding[2], g.x_step(), g.y_step(), 0,       0};
  plane.tiles_h = (g.out[1] + m - 1) / m;
  plane.tiles_w = (g.out[2] + m - 1) / m;
  run_on_isa([&](auto isa) {
    constexpr Isa kIsa = decltype(isa)::value;
    if (m == 2) {
      convolve<2, kIsa>(plane, o);
    } else {
      convolve<4, kIsa>(plane, o);
    }
  });
}

template void winograd(const Geometry& g, int64_t m, const WinogradOperands<float>& o);
template void winograd(const Geometry& g, int64_t m, const WinogradOperands<bf16>& o);

}  // namespace resnet_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("_winograd_weight", TORCH_BOX(&resnet_fast::cpu::winograd_weight));
  m.impl("_winograd_conv", TORCH_BOX(&resnet_fast::cpu::winograd_conv));
}
