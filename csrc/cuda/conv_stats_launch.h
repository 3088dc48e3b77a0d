// The launches of conv_stats, in order: for the launcher, and for the tests on the host. A Device
// is as in bn_act_train_launch.h.
#pragma once

#include "bn_act_train_launch.h"
#include "conv_choice.h"
#include "conv_stats.cuh"

namespace resnet_fast {

template <typename T, typename Tile, bool NORMALISE>
struct StatsKernel {
  using TileType = Tile;
  static constexpr auto kKernel = conv_stats_kernel<T, Tile, NORMALISE>;
  static_assert(Tile::kSharedBytes <= 99 * 1024);
};

// Calls f(StatsKernel<...>{}) for tile `tile` of kConvTiles; false where there is no such kernel.
// A batch norm in front needs 16-byte loads, and for the largest tile twice the warps, whose
// registers hold the pixels under way.
template <typename T, bool NORMALISE, typename F>
bool with_stats_kernel(int tile, int copy, const F& f) {
  if (copy != 16) {
    if constexpr (!NORMALISE) {
      if (tile != kTallTile) return false;
      if constexpr (sizeof(T) == 2) {
        if (copy == 0) return f(StatsKernel<T, ConvTile<128, 64, 2, 2, 3, 0>, false>{}), true;
      }
      return f(StatsKernel<T, ConvTile<128, 64, 2, 2, 3, 4>, false>{}), true;
    }
    return false;
  }
  if (tile == kTallTile)
    return f(StatsKernel<T, ConvTile<128, 64, 2, 2, 3, 16>, NORMALISE>{}), true;
  if (tile == kSmallTile)
    return f(StatsKernel<T, ConvTile<64, 64, 2, 2, 4, 16>, NORMALISE>{}), true;
  if constexpr (sizeof(T) == 2) {
    constexpr int kWarpsM = NORMALISE ? 4 : 2;
    if (tile == kLargeTile)
      return f(StatsKernel<T, ConvTile<128, 128, kWarpsM, 2, 3, 16>, NORMALISE>{}), true;
  }
  return false;
}

template <typename T>
struct StatsOutputs {
  T* z;
  float *mean, *rstd;
  bool wide;  // z is aligned, and a group's filters are whole vectors
};

// z, and by its partials mean and rstd; false where tile and copy have no kernel.
template <typename T, bool NORMALISE, typename Device>
bool run_conv_stats(Device& device, const ConvShape& s, const T* x, const T* weight,
                    const ConvPrologue& prologue, const StatsOutputs<T>& out, int tile, int copy,
                    double eps) {
  const int64_t pixels = int64_t{s.batch} * s.out_height * s.out_width;
  const auto channels = static_cast<unsigned>(s.filters);
  int64_t count = divide_up(pixels, kConvTiles[tile].m);
  const auto allocate = [&](int64_t rows) {
    const int64_t bytes = rows * s.filters * static_cast<int64_t>(sizeof(conv::Moments));
    return static_cast<conv::Moments*>(device.workspace(bytes));
  };
  conv::Moments* moments = allocate(count);
  const bool known = with_stats_kernel<T, NORMALISE>(tile, copy, [&](auto kernel) {
    using Tile = typename decltype(kernel)::TileType;
    device.template launch<decltype(kernel)::kKernel>(
        dimensions(conv_blocks(tile, s)), dimensions(Tile::kTileThreads), Tile::kSharedBytes, s, x,
        weight, prologue, out.z, moments, out.wide);
  });
  if (!known) return false;
  const int64_t columns = divide_up(s.filters, kWarp);
  const size_t shared = combine_bytes(kThreads, 1, sizeof(double), sizeof(int64_t));
  const auto fold = [&]<bool LAST>(int64_t rows, conv::Moments* to) {
    device.template launch<fold_moments_kernel<LAST>>(
        dimensions(columns, rows), dimensions(kThreads), shared,
        static_cast<const conv::Moments*>(moments), static_cast<unsigned>(count), channels, to, eps,
        out.mean, out.rstd);
  };
  while (count > int64_t{kFolded}) {
    const int64_t rows = divide_up(count, kFolded);
    conv::Moments* const to = allocate(rows);
    fold.template operator()<false>(rows, to);
    moments = to;
    count = rows;
  }
  fold.template operator()<true>(1, nullptr);
  return true;
}

}  // namespace resnet_fast
