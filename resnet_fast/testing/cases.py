"""Cases by op: small enough to test quickly, odd enough to find a wrong edge.

``CASES[op]`` lists them and ``make`` builds the arguments of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvCase:
    """Arguments of ``conv_bn_act`` by shape."""

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    act: str = "none"
    scale: bool = True
    shift: bool = True
    residual: bool = False

    op = "conv_bn_act"


@dataclass(frozen=True)
class BnActCase:
    """Arguments of ``bn_act`` by shape."""

    name: str
    x: tuple[int, ...]
    act: str = "none"
    scale: bool = True
    shift: bool = True
    residual: bool = False

    op = "bn_act"


@dataclass(frozen=True)
class AddActCase:
    """Arguments of ``add_act`` by shape."""

    name: str
    x: tuple[int, ...]
    act: str = "none"

    op = "add_act"


@dataclass(frozen=True)
class BnActTrainCase:
    """Arguments of ``bn_act_train`` by shape."""

    name: str
    x: tuple[int, ...]
    act: str = "none"
    weight: bool = True
    bias: bool = True
    residual: bool = False
    eps: float = 1e-5

    op = "bn_act_train"


Case = ConvCase | BnActCase | AddActCase | BnActTrainCase

_ODD = (2, 5, 7, 7)

CASES: dict[str, list[Case]] = {
    "conv_bn_act": [
        ConvCase("stem", (1, 3, 17, 17), (16, 3, 7, 7), 2, 3, act="relu"),
        ConvCase("3x3_odd", (2, 17, 7, 7), (19, 17, 3, 3), 1, 1, act="relu", residual=True),
        ConvCase("3x3_stride2", (2, 16, 9, 7), (24, 16, 3, 3), 2, 1, act="relu6"),
        ConvCase("3x3_dilation2", (1, 8, 9, 9), (8, 8, 3, 3), 1, 2, 2, act="silu"),
        ConvCase("1x1", (2, 32, 7, 7), (37, 32, 1, 1), act="relu", residual=True),
        ConvCase("1x1_stride2", (2, 33, 7, 7), (16, 33, 1, 1), 2),
        ConvCase("groups", (2, 24, 7, 7), (12, 6, 3, 3), 1, 1, groups=4, act="gelu"),
        ConvCase("depthwise", (2, 20, 7, 7), (20, 1, 3, 3), 1, 1, groups=20, act="hardswish"),
        ConvCase("depthwise_doubling", (1, 5, 8, 6), (10, 1, 3, 3), 2, 1, groups=5, act="relu"),
        ConvCase("bias_only", (2, 9, 5, 5), (11, 9, 3, 3), 1, 1, scale=False, act="leaky_relu"),
        ConvCase("scale_only", (2, 9, 5, 5), (11, 9, 3, 3), 1, 1, shift=False, act="sigmoid"),
        ConvCase("bare", (1, 4, 5, 5), (4, 4, 3, 3), 1, 1, scale=False, shift=False),
        ConvCase(
            "bare_residual",
            (2, 6, 5, 5),
            (6, 6, 3, 3),
            1,
            1,
            scale=False,
            shift=False,
            residual=True,
            act="silu",
        ),
        ConvCase("asymmetric", (2, 7, 8, 11), (9, 7, 3, 5), (2, 1), (0, 2), (1, 2), act="relu"),
        ConvCase("one_pixel", (3, 16, 1, 1), (16, 16, 3, 3), 1, 1, act="relu", residual=True),
        ConvCase("one_channel", (2, 1, 6, 5), (8, 1, 3, 3), 1, 1, act="relu"),
        ConvCase("one_output", (2, 6, 6, 5), (1, 6, 3, 3), 1, 1, act="relu", residual=True),
        ConvCase("padding_beyond_kernel", (1, 4, 3, 3), (5, 4, 2, 2), 1, 3, act="relu"),
        ConvCase("1d", (2, 6, 13), (8, 6, 3), 2, 1, act="relu", residual=True),
        ConvCase("1d_dilated_groups", (2, 6, 13), (9, 2, 3), 1, 2, 2, groups=3, act="hardswish"),
        ConvCase("3d", (2, 5, 3, 5, 4), (7, 5, 3, 3, 3), 1, 1, act="relu", residual=True),
        ConvCase("3d_stride", (1, 4, 4, 5, 5), (6, 4, 1, 3, 3), (1, 2, 2), (0, 1, 1), act="gelu"),
        ConvCase("empty_batch", (0, 6, 7, 7), (8, 6, 3, 3), 1, 1, act="relu", residual=True),
        ConvCase("empty_batch_1d", (0, 6, 7), (8, 6, 3), 1, 1, act="silu"),
    ],
    "bn_act": [
        BnActCase("relu", _ODD, "relu"),
        BnActCase("relu_residual", (2, 19, 7, 7), "relu", residual=True),
        BnActCase("none", _ODD),
        BnActCase("relu6", _ODD, "relu6"),
        BnActCase("silu_residual", _ODD, "silu", residual=True),
        BnActCase("hardswish", _ODD, "hardswish"),
        BnActCase("gelu", _ODD, "gelu"),
        BnActCase("leaky_relu", _ODD, "leaky_relu"),
        BnActCase("sigmoid", _ODD, "sigmoid", residual=True),
        BnActCase("scale_only", _ODD, "relu", shift=False),
        BnActCase("shift_only", _ODD, "relu", scale=False),
        BnActCase("bare", _ODD, "hardswish", scale=False, shift=False),
        BnActCase("wide", (1, 67, 3, 5), "relu"),
        BnActCase("one_channel", (2, 1, 5, 3), "relu"),
        BnActCase("one_pixel", (3, 21, 1, 1), "relu", residual=True),
        BnActCase("2d", (5, 13), "relu", residual=True),
        BnActCase("1d", (2, 5, 11), "silu"),
        BnActCase("3d", (2, 6, 3, 5, 4), "relu", residual=True),
        BnActCase("empty_batch", (0, 6, 7, 7), "relu", residual=True),
        BnActCase("empty_image", (2, 6, 0, 7), "relu"),
    ],
    "add_act": [
        AddActCase("relu", _ODD, "relu"),
        AddActCase("none", _ODD),
        AddActCase("relu6", _ODD, "relu6"),
        AddActCase("silu", _ODD, "silu"),
        AddActCase("hardswish", _ODD, "hardswish"),
        AddActCase("gelu", _ODD, "gelu"),
        AddActCase("leaky_relu", _ODD, "leaky_relu"),
        AddActCase("sigmoid", _ODD, "sigmoid"),
        AddActCase("wide", (1, 67, 3, 5), "relu"),
        AddActCase("scalar", (), "relu"),
        AddActCase("vector", (37,), "relu"),
        AddActCase("2d", (5, 13), "relu"),
        AddActCase("1d", (2, 5, 11), "relu"),
        AddActCase("3d", (2, 6, 3, 5, 4), "relu"),
        AddActCase("empty_batch", (0, 6, 7, 7), "relu"),
    ],
    "bn_act_train": [
        BnActTrainCase("relu", (4, 5, 7, 7), "relu"),
        BnActTrainCase("relu_residual", (3, 19, 7, 7), "relu", residual=True),
        BnActTrainCase("none", (4, 5, 7, 7)),
        BnActTrainCase("relu6", (4, 5, 7, 7), "relu6"),
        BnActTrainCase("silu_residual", (4, 5, 7, 7), "silu", residual=True),
        BnActTrainCase("hardswish", (4, 5, 7, 7), "hardswish", eps=1e-3),
        BnActTrainCase("gelu", (4, 5, 7, 7), "gelu"),
        BnActTrainCase("leaky_relu", (4, 5, 7, 7), "leaky_relu"),
        BnActTrainCase("sigmoid", (4, 5, 7, 7), "sigmoid", residual=True),
        BnActTrainCase("weight_only", (4, 5, 7, 7), "relu", bias=False),
        BnActTrainCase("bias_only", (4, 5, 7, 7), "relu", weight=False),
        BnActTrainCase("bare", (4, 5, 7, 7), "silu", weight=False, bias=False),
        BnActTrainCase("wide", (2, 67, 3, 5), "relu"),
        BnActTrainCase("one_channel", (2, 1, 5, 3), "relu"),
        BnActTrainCase("one_pixel", (9, 21, 1, 1), "relu", residual=True),
        BnActTrainCase("2d", (9, 13), "relu", residual=True),
        BnActTrainCase("1d", (3, 5, 11), "silu"),
        BnActTrainCase("3d", (2, 6, 3, 5, 4), "relu", residual=True),
    ],
}


def case(op: str, name: str) -> Case:
    """The case of ``op`` called ``name``."""
    return next(entry for entry in CASES[op] if entry.name == name)


def output_shape(entry: ConvCase) -> list[int]:
    """The shape of the convolution's result."""
    spatial = len(entry.x) - 2

    def each(value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * spatial if isinstance(value, int) else value

    shape = [entry.x[0], entry.weight[0]]
    geometry = zip(
        entry.x[2:],
        entry.weight[2:],
        each(entry.stride),
        each(entry.padding),
        each(entry.dilation),
        strict=True,
    )
    for size, kernel, stride, padding, dilation in geometry:
        shape.append((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    return shape


def to_memory_format(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``tensor`` in ``memory_format``; channels-last means the one of the tensor's rank, if any."""
    if memory_format in (torch.channels_last, torch.channels_last_3d):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        memory_format = formats.get(tensor.dim(), torch.contiguous_format)
    return tensor.contiguous(memory_format=memory_format)


class _Draw:
    """Random tensors of one seed: the same values for every dtype and memory format."""

    def __init__(
        self, dtype: torch.dtype, device: str, memory_format: torch.memory_format, seed: int
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.device = device
        self.memory_format = memory_format

    def normal(self, shape: tuple[int, ...] | list[int], deviation: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * deviation
        return to_memory_format(values.to(self.device, self.dtype), self.memory_format)

    def _parameter(self, values: Tensor) -> Tensor:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return values.to(self.device, dtype)

    def _uniform(self, channels: int, low: float, high: float) -> Tensor:
        unit = torch.rand(channels, generator=self.generator, dtype=torch.float64)
        return unit * (high - low) + low

    def gamma_beta(self, channels: int) -> tuple[Tensor, Tensor]:
        """Affine parameters away from 1 and 0, a quarter of gamma negative."""
        gamma = self._uniform(channels, 0.5, 3.0)
        sign = torch.where(self._uniform(channels, 0.0, 1.0) < 0.25, -1.0, 1.0)
        beta = self._uniform(channels, -2.0, 2.0)
        return self._parameter(gamma * sign), self._parameter(beta)

    def scale_shift(self, channels: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of a batch norm with mean ≠ 0, variance ≠ 1 and random gamma and beta."""
        gamma, beta = (values.double() for values in self.gamma_beta(channels))
        mean = self._uniform(channels, -0.5, 0.5).to(self.device)
        var = self._uniform(channels, 0.5, 1.5).to(self.device)
        scale = gamma / torch.sqrt(var + 1e-5)
        return self._parameter(scale), self._parameter(beta - mean * scale)


def make(
    entry: Case,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
    seed: int = 0,
) -> dict[str, Any]:
    """The keyword arguments of ``entry`` for the op's public function, in the schema's order."""
    draw = _Draw(dtype, device, memory_format, seed)
    if isinstance(entry, ConvCase):
        x = draw.normal(entry.x)
        weight = draw.normal(entry.weight, 1 / math.sqrt(math.prod(entry.weight[1:])))
        scale, shift = draw.scale_shift(entry.weight[0])
        residual = draw.normal(output_shape(entry))
        return {
            "x": x,
            "weight": weight,
            "scale": scale if entry.scale else None,
            "shift": shift if entry.shift else None,
            "residual": residual if entry.residual else None,
            "stride": entry.stride,
            "padding": entry.padding,
            "dilation": entry.dilation,
            "groups": entry.groups,
            "act": entry.act,
        }
    if isinstance(entry, BnActCase):
        x = draw.normal(entry.x)
        scale, shift = draw.scale_shift(entry.x[1])
        residual = draw.normal(entry.x)
        return {
            "x": x,
            "scale": scale if entry.scale else None,
            "shift": shift if entry.shift else None,
            "residual": residual if entry.residual else None,
            "act": entry.act,
        }
    if isinstance(entry, AddActCase):
        return {
            "x": draw.normal(entry.x, 2.0),
            "residual": draw.normal(entry.x, 2.0),
            "act": entry.act,
        }
    # A mean far from 0 beside the deviation finds a variance that cancels.
    x = draw.normal(entry.x, 2.0) + 1.0
    weight, bias = draw.gamma_beta(entry.x[1])
    residual = draw.normal(entry.x)
    return {
        "x": x,
        "weight": weight if entry.weight else None,
        "bias": bias if entry.bias else None,
        "residual": residual if entry.residual else None,
        "eps": entry.eps,
        "act": entry.act,
    }
