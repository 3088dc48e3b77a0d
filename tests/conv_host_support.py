"""Convolutions on the host: their shapes, as the CUDA drivers take them, and their tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fast.ops.conv_bn_act_cuda import FLOAT_TILES, HALF_TILES

TF32 = torch.float32
DTYPES = (torch.float16, torch.bfloat16, TF32)
GEMM = "csrc/cuda/implicit_gemm.cuh"


@dataclass(frozen=True)
class Conv:
    """A convolution: x is [batch, channels, height, width], a filter [r, s]."""

    batch: int
    channels: int
    size: tuple[int, int]
    filters: int
    filter: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def out(self, axis: int) -> int:
        span = self.size[axis] + 2 * self.padding[axis]
        return (span - self.dilation[axis] * (self.filter[axis] - 1) - 1) // self.stride[axis] + 1

    def copy(self, dtype: torch.dtype) -> int:
        """Bytes of the widest copy that divides a group's channels; 0 for single elements."""
        row = self.channels // self.groups * dtype.itemsize
        return next((width for width in (16, 4) if row % width == 0), 0)

    def values(self) -> dict[str, int]:
        pairs = {
            "kernel": self.filter,
            "stride": self.stride,
            "pad": self.padding,
            "dilation": self.dilation,
        }
        return {
            "batch": self.batch,
            "channels": self.channels,
            "filters": self.filters,
            "height": self.size[0],
            "width": self.size[1],
            "out_height": self.out(0),
            "out_width": self.out(1),
            "groups": self.groups,
            **{
                f"{name}_{axis}": pair[i]
                for name, pair in pairs.items()
                for i, axis in enumerate("hw")
            },
        }


def conv(x: Tensor, weight: Tensor, shape: Conv) -> Tensor:
    return F.conv2d(x, weight, None, shape.stride, shape.padding, shape.dilation, shape.groups)


def draw_operands(shape: Conv, dtype: torch.dtype) -> tuple[Tensor, Tensor, torch.Generator]:
    """x and a weight that keeps its variance, and what drew them."""
    generator = torch.Generator().manual_seed(shape.batch * 1000 + shape.channels)
    channels = shape.channels // shape.groups
    depth = channels * shape.filter[0] * shape.filter[1]
    x = torch.randn(shape.batch, shape.channels, *shape.size, generator=generator)
    weight = torch.randn(shape.filters, channels, *shape.filter, generator=generator) / depth**0.5
    if dtype == TF32:
        x, weight = to_tf32(x), to_tf32(weight)
    return x.to(dtype), weight.to(dtype), generator


def to_tf32(x: Tensor) -> Tensor:
    """Values that TF32 holds exactly, so that fp32 is the standard of its sums."""
    return (x.view(torch.int32) & -8192).view(torch.float32)


def nhwc(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.permute(0, 2, 3, 1).contiguous()


def tiles(dtype: torch.dtype) -> tuple[str, ...]:
    names = FLOAT_TILES if dtype == TF32 else HALF_TILES
    return tuple(name for name in names if name != "grouped")


# A filter as large as the image; 7x7 maps; widths that divide nothing; both strides; dilation;
# fewer and more pixels, filters and channels than a tile; k that ends inside a stage.
SHAPES = (
    Conv(1, 64, (7, 7), 64),
    Conv(2, 24, (9, 5), 72, (3, 3), padding=(1, 1)),
    Conv(1, 40, (11, 13), 136, (3, 3), stride=(2, 2), padding=(1, 1)),
    Conv(3, 16, (7, 7), 8, (3, 3), padding=(2, 2), dilation=(2, 2)),
    Conv(1, 8, (6, 5), 130, (6, 5)),
    Conv(2, 96, (5, 9), 40, (1, 1), stride=(2, 1)),
    Conv(1, 64, (10, 4), 64, (1, 3), padding=(0, 1), groups=4),
    Conv(1, 32, (5, 6), 16, (2, 2), padding=(1, 0), stride=(1, 3), groups=2),
)

# Channels that no wide copy divides.
NARROW = (
    Conv(2, 3, (15, 17), 64, (7, 7), stride=(2, 2), padding=(3, 3)),
    Conv(1, 6, (6, 7), 70, (3, 3), padding=(1, 1)),
    Conv(1, 10, (5, 5), 20, (1, 1), groups=2),
)
