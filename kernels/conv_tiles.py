"""The convolution's tiles, and which of them a launch takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .launch import cdiv


class Config(NamedTuple):
    """Tile of output pixels x output channels x input channels, and how it is run."""

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    packed: bool = False

    @property
    def name(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_c}"
        return f"{tile}w{self.num_warps}s{self.num_stages}{'p' if self.packed else ''}"


# BLOCK_M >= 64 in every config: wgmma and tcgen05 have no smaller tile. The larger tiles step by 32
# channels: by 64, the unrolled 3x3 spills 40 and 56 bytes a thread on sm_80. Shared memory is at
# most stages * (M + N) * C * 2 bytes.
HALF_CONFIGS = (
    Config(128, 128, 32, 8, 4),  # 64 KB: most reuse of both operands
    Config(128, 64, 32, 4, 4),  # 48 KB: K <= 64 fills it, so no column of the tile idles
    Config(64, 64, 64, 4, 4),  # 64 KB: small images and batch 1, where CTAs are short
)
# Without tf32 the product is made of FMAs and the operands live in registers: small tiles only
# (a third stage, or 32 channels, spills in 3x3 filters on sm_80 and sm_90).
FLOAT_CONFIGS = (
    Config(64, 64, 16, 4, 2),  # 16 KB
    Config(128, 64, 16, 8, 2),  # 24 KB: many pixels
)
# s and c share the reduction where S * C / groups <= 64: the C = 3 stem reduces over 7 rows of 32
# instead of 49 taps of 16; a depthwise filter over R rows of 16. The block is the power of two. The
# packed index defeats vector loads: more than 16 elements of x a thread spill in the unrolled rows
# on sm_80, and with 64-bit offsets 16 of them do in rows of 32 (208 bytes), hence 8 there.
PACKED_CONFIGS = (
    Config(128, 64, 16, 4, 2, packed=True),
    Config(64, 64, 32, 8, 2, packed=True),
    Config(64, 64, 64, 8, 2, packed=True),
)
PACKED_FLOAT_CONFIGS = (
    Config(64, 32, 16, 4, 2, packed=True),
    Config(64, 32, 32, 8, 2, packed=True),
)


def packed_configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """The packed configs of a dtype, narrowest first; fp32 has no registers for a row of 64."""
    return PACKED_FLOAT_CONFIGS if dtype == torch.float32 else PACKED_CONFIGS


def configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """Every config of a dtype, packed ones included."""
    return (FLOAT_CONFIGS if dtype == torch.float32 else HALF_CONFIGS) + packed_configs(dtype)


def choose_config(
    dtype: torch.dtype, pixels: int, channels: int, outputs: int, row: int, taps: int
) -> Config:
    """Heuristic config: channels and outputs per group, row = S, taps = T * R * S.

    The tile shrinks until there are about as many CTAs as an A100 or H100 has SMs (108, 132).
    """
    if taps > 1:
        for config in packed_configs(dtype):
            if row * channels <= config.block_c:
                return config
    if dtype == torch.float32:
        return FLOAT_CONFIGS[1] if pixels >= 128 * 128 else FLOAT_CONFIGS[0]
    large, tall, small = HALF_CONFIGS

    def tiles(config: Config) -> int:
        return cdiv(pixels, config.block_m) * cdiv(outputs, config.block_n)

    if outputs > 64 and tiles(large) >= 108:
        return large
    return tall if tiles(tall) >= 108 else small


# Multiprocessors that a launch should reach: an H100 has 132, an A100 108.
_PROGRAMS = 132
# Steps of the reduction that a part must be worth: its sums cross memory in fp32, written and read.
_LEAST_STEPS = 4


def choose_splits(tiles: int, steps: int, taps: int) -> int:
    """Parts of the reduction over the channels: 1, or a power of two where tiles alone are few.

    `steps` counts blocks of channels, each of which is worth `taps` products. 7x7 maps of one image
    are one tile of 64 pixels: a layer of 512 filters fills 8 multiprocessors of 132.
    """
    splits = 1
    while (
        2 * splits * tiles <= _PROGRAMS
        and 2 * splits <= steps
        and steps * taps >= 2 * splits * _LEAST_STEPS
    ):
        splits *= 2
    return splits


def choose(
    dtype: torch.dtype, pixels: int, channels: int, outputs: int, groups: int, row: int, taps: int
) -> tuple[Config, int]:
    """Config and splits of a launch: pixels of the whole batch, the rest as `choose_config`."""
    config = choose_config(dtype, pixels, channels, outputs, row, taps)
    # In fp32 the tile's operands fill the registers, and an unrolled 3x3 in parts spills.
    if config.packed or dtype == torch.float32:
        return config, 1
    tiles = cdiv(pixels, config.block_m) * cdiv(outputs, config.block_n) * groups
    return config, choose_splits(tiles, cdiv(channels, config.block_c), taps)
