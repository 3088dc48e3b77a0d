// Which kernel a convolution takes where nobody says: plain arithmetic, shared by the launcher, the
// plan and the tests.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "../math/conv_shape.h"

namespace resnet_fast {

// The tiles of conv_bn_act_kernel: pixels x filters x stages. `float32` tells whether it is
// compiled for TF32, too, whose operands take twice the registers.
struct ConvTileName {
  std::string_view name;
  int m, n;
  bool float32;
};
inline constexpr ConvTileName kConvTiles[] = {{"128x128x3", 128, 128, false},
                                              {"128x64x3", 128, 64, true},
                                              {"128x64x4", 128, 64, false},
                                              {"64x64x4", 64, 64, true},
                                              {"128x32x4", 128, 32, true}};

constexpr int find_conv_tile(std::string_view name) {
  int index = 0;
  for (const ConvTileName& tile : kConvTiles) {
    if (name == tile.name) return index;
    ++index;
  }
  return -1;
}
inline constexpr int kLargeTile = find_conv_tile("128x128x3");
inline constexpr int kTallTile = find_conv_tile("128x64x3");
inline constexpr int kSmallTile = find_conv_tile("64x64x4");
inline constexpr int kNarrowTile = find_conv_tile("128x32x4");

// The kernel for narrow groups (conv_bn_act_grouped.cuh), by its name beside those of the tiles,
// and the taps x channels whose weights fit in 48 KB of shared memory, which a launch has without
// asking.
inline constexpr std::string_view kGroupedTile = "grouped";
inline constexpr int64_t kGroupedWeights = 48 * 1024 / (4 * 32);

inline bool is_narrow_group(int element_bytes, const ConvShape& s) {
  const int lanes = 16 / element_bytes;
  return s.groups > 1 && s.filters == s.groups * s.group_channels &&
         lanes % s.group_channels == 0 && s.filters % lanes == 0 &&
         int64_t{s.kernel_h} * s.kernel_w * s.group_channels <= kGroupedWeights;
}

// Bytes of one copy along k: the largest that divides a group's channels, 0 for single elements.
inline int conv_copy_bytes(int element_bytes, const ConvShape& s) {
  for (int bytes : {16, 4})
    if (int64_t{s.group_channels} * element_bytes % bytes == 0) return bytes;
  return 0;
}

// Stages of 128 bytes that k takes.
inline int64_t conv_stages(int element_bytes, const ConvShape& s) {
  const int64_t bytes = int64_t{s.kernel_h} * s.kernel_w * s.group_channels * element_bytes;
  return (bytes + 127) / 128;
}

inline int64_t conv_blocks(int tile, const ConvShape& s) {
  const ConvTileName& t = kConvTiles[tile];
  const int64_t pixels = int64_t{s.batch} * s.out_height * s.out_width;
  const int64_t filters = s.filters / s.groups;
  return (pixels + t.m - 1) / t.m * ((filters + t.n - 1) / t.n) * s.groups;
}

// Multiprocessors that a launch should reach: an H100 has 132, an A100 108. A constant, so that a
// convolution gives the same bits on every device.
inline constexpr int64_t kConvBlocks = 132;
// Stages that a part of k must be worth: its sums cross memory in fp32, written and read.
inline constexpr int64_t kLeastStages = 4;

// The largest tile that still fills the device. Copies narrower than 16 bytes have one tile.
inline int choose_conv_tile(int element_bytes, const ConvShape& s, int copy) {
  const int filters = s.filters / s.groups;
  if (copy != 16) return kTallTile;
  if (filters <= 32) return kNarrowTile;
  if (element_bytes == 2 && filters > 64 && conv_blocks(kLargeTile, s) >= kConvBlocks)
    return kLargeTile;
  return conv_blocks(kTallTile, s) >= kConvBlocks ? kTallTile : kSmallTile;
}

// The same for conv_stats_kernel, which has neither the narrow tile nor parts of k.
inline int choose_stats_tile(int element_bytes, const ConvShape& s, int copy) {
  const int tile = choose_conv_tile(element_bytes, s, copy);
  return tile == kNarrowTile ? kTallTile : tile;
}

// Parts of k: 1, or the power of two that fills the device where the tiles alone are few.
inline int choose_conv_parts(int element_bytes, const ConvShape& s, int tile) {
  const int64_t blocks = conv_blocks(tile, s), stages = conv_stages(element_bytes, s);
  int parts = 1;
  while (2 * parts * blocks <= kConvBlocks && stages >= 2 * parts * kLeastStages) parts *= 2;
  return parts;
}

// Whether the tile has a kernel for copies of `copy` bytes.
inline bool has_conv_kernel(int element_bytes, int tile, int copy) {
  return tile >= 0 && (element_bytes == 2 || kConvTiles[tile].float32) &&
         (copy == 16 || tile == kTallTile);
}

// What a call over aligned tensors runs, for people and as a key: "128x64x3/2/16" for a tile, parts
// of k and bytes of a copy, or "grouped"; empty where there is no such kernel. `tile` as the op
// takes it.
inline std::string conv_variant(int element_bytes, const ConvShape& s, std::string_view tile) {
  if (tile.empty() && is_narrow_group(element_bytes, s)) tile = kGroupedTile;
  if (tile == kGroupedTile)
    return std::string(is_narrow_group(element_bytes, s) ? kGroupedTile : "");
  const int copy = conv_copy_bytes(element_bytes, s);
  const int index = tile.empty() ? choose_conv_tile(element_bytes, s, copy) : find_conv_tile(tile);
  if (!has_conv_kernel(element_bytes, index, copy)) return "";
  return std::string(kConvTiles[index].name) + "/" +
         std::to_string(choose_conv_parts(element_bytes, s, index)) + "/" + std::to_string(copy);
}

}  // namespace resnet_fast
