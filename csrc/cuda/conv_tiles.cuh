// The instances of conv_bn_act_kernel: kConvTiles as types.
#pragma once

#include "conv_bn_act_grouped.cuh"
#include "conv_choice.h"

namespace resnet_fast {

template <typename T, typename Tile>
struct ConvKernel {
  using Element = T;
  using TileType = Tile;
  static constexpr auto kKernel = conv_bn_act_kernel<T, Tile>;
  // What every device since sm_80 grants a block.
  static_assert(Tile::kSharedBytes <= 99 * 1024);
};

// Calls f(ConvKernel<T, Tile>{}) for tile `tile` of kConvTiles and copies of `copy` bytes; false
// where there is no such kernel.
template <typename T, typename F>
bool with_conv_kernel(int tile, int copy, const F& f) {
  if (copy != 16) {
    if (tile != kTallTile) return false;
    if constexpr (sizeof(T) == 2) {
      if (copy == 0) return f(ConvKernel<T, ConvTile<128, 64, 2, 2, 3, 0>>{}), true;
    }
    return f(ConvKernel<T, ConvTile<128, 64, 2, 2, 3, 4>>{}), true;
  }
  switch (tile) {
    case kTallTile:
      return f(ConvKernel<T, ConvTile<128, 64, 2, 2, 3, 16>>{}), true;
    case kSmallTile:
      return f(ConvKernel<T, ConvTile<64, 64, 2, 2, 4, 16>>{}), true;
    case kNarrowTile:
      return f(ConvKernel<T, ConvTile<128, 32, 4, 1, 4, 16>>{}), true;
    default:
      break;
  }
  if constexpr (sizeof(T) == 2) {
    if (tile == kLargeTile) return f(ConvKernel<T, ConvTile<128, 128, 2, 2, 3, 16>>{}), true;
    if (tile == find_conv_tile("128x64x4"))
      return f(ConvKernel<T, ConvTile<128, 64, 2, 2, 4, 16>>{}), true;
  }
  return false;
}

template <auto KERNEL>
struct GroupedKernel {
  static constexpr auto kKernel = KERNEL;
};

// The same for conv_grouped_kernel: GROUP channels and filters a group.
template <typename T, typename F>
bool with_grouped_kernel(int group, const F& f) {
  if constexpr (kLanes<T> == 8) {
    if (group == 8) return f(GroupedKernel<conv_grouped_kernel<T, 8>>{}), true;
  }
  switch (group) {
    case 1:
      return f(GroupedKernel<conv_grouped_kernel<T, 1>>{}), true;
    case 2:
      return f(GroupedKernel<conv_grouped_kernel<T, 2>>{}), true;
    case 4:
      return f(GroupedKernel<conv_grouped_kernel<T, 4>>{}), true;
    default:
      return false;
  }
}

}  // namespace resnet_fast
