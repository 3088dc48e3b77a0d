"""The residual chain's tiles, and which of them a launch takes."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from .launch import cdiv, next_power_of_2


class Config(NamedTuple):
    """Pixels and output channels a step, input channels a product, and how it is run."""

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    loop: bool = True

    @property
    def name(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_c}"
        return f"{tile}w{self.num_warps}s{self.num_stages}{'' if self.loop else 'u'}"

    @classmethod
    def parse(cls, name: str) -> Config:
        """The config of a name. Raises ValueError for a text that is none."""
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)w(\d+)s(\d+)(u?)", name)
        if found is None:
            raise ValueError(f"config: expected a name such as 128x64x64w8s3, got {name!r}")
        return cls(*map(int, found.groups()[:5]), loop=not found[6])


# No spills on sm_80 and sm_100 in any form that a network has, at 12 to 104 KB of shared memory.
SMALL = Config(64, 32, 64, 8, 2)
# sm_90 alone, each the fastest of those without a spill on an H200 at 128 images
# (docs/residual_chain.md); on sm_80 and sm_100 they spill in one form or another.
NARROW = Config(64, 32, 64, 4, 3)  # conv2 of 64 channels: four programs a multiprocessor
FIRST = Config(64, 64, 64, 4, 3)  # the same with a projection
WIDE = Config(128, 64, 64, 8, 3)  # 128 channels, next too; weights cross from L2 once a program
WIDER = Config(128, 32, 64, 8, 4)  # 256 next: half the slice pays for twice the next channels
HELD = Config(128, 32, 64, 8, 3)  # h2 of 256 channels in 128 KB of shared memory
PROJECTED = Config(64, 64, 64, 8, 3)
# The taps unrolled instead of in one loop, which Triton has miscompiled in a convolution
# (https://github.com/pytorch/pytorch/issues/173068).
UNROLLED = WIDE._replace(loop=False)
TF32 = Config(64, 32, 32, 8, 2)
TF32_NARROW = Config(64, 32, 16, 8, 2)  # sm_100: steps of 32 channels spill 16 bytes

# Bytes of a pixel's h2 held on chip over the slices; a longer one is read again for each slice. One
# in fp32 is held twice, as it is and rounded to TF32.
MAX_HELD = {torch.float16: 1024, torch.bfloat16: 1024, torch.float32: 512}

# Programs that keep 132 multiprocessors busy, two on each.
_PROGRAMS = 264


def configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """Every config of a dtype."""
    if dtype == torch.float32:
        return TF32, TF32_NARROW
    return SMALL, NARROW, FIRST, WIDE, WIDER, HELD, PROJECTED, UNROLLED


def block(channels: int) -> int:
    """The power of two, 16 or more, that covers the channels: a tile's side."""
    return max(16, next_power_of_2(channels))


def choose_config(
    dtype: torch.dtype,
    arch: int,
    mid: int,
    following: int,
    conv2: bool,
    projection: bool,
    whole: bool = True,
) -> Config:
    """Heuristic config for sm_<arch>: mid-channels of h2, and the next convolution's (0: none).

    `whole` says that every count of channels is a multiple of 64.
    """
    if dtype == torch.float32:
        return TF32_NARROW if arch >= 100 else TF32
    # Masks of partial blocks take registers: with them the larger tiles spill up to 900 bytes, and
    # one that did gave wrong sums on an H200 (K = 72, a projection of any width).
    if arch != 90 or not whole:
        return SMALL
    widest = max(block(following), block(mid) if conv2 else 0)
    if following == 0 and not conv2:
        return WIDE
    if projection:
        return FIRST if conv2 and widest <= 64 else PROJECTED
    if widest > 256:
        return SMALL
    if not conv2:
        return HELD
    if mid <= 64 and widest <= 128:
        return NARROW
    return WIDE if widest <= 128 else WIDER


def slices_of(pixels: int, steps: int, config: Config) -> int:
    """Slices of the output channels that one program takes where they are independent."""
    splits = max(1, min(steps, _PROGRAMS // max(1, cdiv(pixels, config.block_m))))
    return min(steps, next_power_of_2(cdiv(steps, splits)))
