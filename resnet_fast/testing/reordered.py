"""The framework's own ops asked the same question with every axis read backwards.

The greatest error over a small tensor is a matter of luck. A convolution of the reversed image with
the reversed kernel, input channels reversed as well, is the reversed result, and the statistics of
a reversed batch are those of the batch: the same ops in the same dtype, with every sum from its
other end. Nothing is rounded that the framework does not round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fast import ops
from resnet_fast.ops import _checks


def _pixels(x: Tensor) -> list[int]:
    """Every axis but the channels: what a sum over a channel runs over."""
    return _checks.but_channels(x)


def _reverse(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flip(_pixels(x))


def _per_dim(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)


def conv_bn_act(**arguments: Any) -> Tensor:
    """``conv_bn_act`` of the reversed image and kernel, reversed."""
    x, weight = arguments["x"], arguments["weight"]
    spatial = x.dim() - 2
    geometry = [_per_dim(arguments[key], spatial) for key in ("stride", "padding", "dilation")]
    groups = arguments["groups"]
    pads: list[int] = []
    # Rows at the end that no window reaches would come first: they are cut off with the padding.
    for size, r, s, p, d in zip(x.shape[2:], weight.shape[2:], *geometry, strict=True):
        unread = (size + 2 * p - d * (r - 1) - 1) % s
        pads = [p, p - unread, *pads]
    padded = torch.nn.functional.pad(x, pads).unflatten(1, (groups, -1))
    reversed_x = padded.flip([0, *range(2, padded.dim())]).flatten(1, 2)
    changed = {
        "x": reversed_x,
        "weight": weight.flip(list(range(1, weight.dim()))),
        "residual": _reverse(arguments["residual"]),
        "padding": 0,
    }
    y = ops.module("conv_bn_act").reference(**arguments | changed)
    return y.flip(_pixels(y))


def bn_act(**arguments: Any) -> Tensor:
    """``bn_act`` of the reversed batch, reversed."""
    changed = {key: _reverse(arguments[key]) for key in ("x", "residual")}
    y = ops.module("bn_act").reference(**arguments | changed)
    return y.flip(_pixels(y))


def add_act(**arguments: Any) -> Tensor:
    """``add_act`` has one sum of two terms, hence one order."""
    return ops.module("add_act").reference(**arguments)


def bn_act_train(**arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``bn_act_train`` of the reversed batch, reversed."""
    changed = {key: _reverse(arguments[key]) for key in ("x", "residual")}
    y, mean, rstd = ops.module("bn_act_train").reference(**arguments | changed)
    return y.flip(_pixels(y)), mean, rstd


REORDERED: dict[str, Callable[..., Any]] = {
    "conv_bn_act": conv_bn_act,
    "bn_act": bn_act,
    "add_act": add_act,
    "bn_act_train": bn_act_train,
}
