"""The references evaluated in another order.

The greatest error over a small tensor is a matter of luck: the same formula with its sums in
another order is as much the framework's own, and shows how far rounding alone reaches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fast.ops import _checks, activation


def _per_dim(value: int | Sequence[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    act: str,
) -> Tensor:
    """``conv_bn_act`` as a sum over the kernel's taps."""
    spatial = x.dim() - 2
    stride, padding, dilation = (_per_dim(v, spatial) for v in (stride, padding, dilation))
    kernel = weight.shape[2:]
    shape = [
        (size + 2 * p - d * (r - 1) - 1) // s + 1
        for size, p, d, r, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    pads = [pad for p in reversed(padding) for pad in (p, p)]
    padded = torch.nn.functional.pad(x, pads).unflatten(1, (groups, -1))
    grouped = weight.unflatten(0, (groups, -1))
    total = None
    for tap in itertools.product(*(range(r) for r in kernel)):
        window = padded
        for dim, (r, d, s, p) in enumerate(zip(tap, dilation, stride, shape, strict=True)):
            along = slice(r * d, r * d + (p - 1) * s + 1, s)
            window = window[(*[slice(None)] * (3 + dim), along)]
        product = torch.einsum("ngc...,gkc->ngk...", window, grouped[(..., *tap)])
        total = product if total is None else total + product
    assert total is not None
    return bn_act(total.flatten(1, 2), scale, shift, residual, act)


def bn_act(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, act: str
) -> Tensor:
    """``bn_act`` with the residual and the shift added first."""
    scaled = _checks.affine(x, scale, None)
    offset = residual
    if shift is not None:
        vector = _checks.along_channels(shift, x)
        offset = vector if offset is None else offset + vector
    return activation.value(act, scaled if offset is None else scaled + offset)


def add_act(x: Tensor, residual: Tensor, act: str) -> Tensor:
    """``add_act`` has one sum of two terms, hence one order."""
    return activation.value(act, x + residual)


def bn_act_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``bn_act_train`` with two-pass statistics, summed from the last value to the first."""
    dims = _checks.but_channels(x)
    mean = x.flip(dims).mean(dims)
    centred = x - _checks.along_channels(mean, x)
    rstd = (centred.square().flip(dims).mean(dims) + eps) ** -0.5
    scale = rstd if weight is None else rstd * weight
    return bn_act(centred, scale, bias, residual, act), mean.detach(), rstd.detach()


REORDERED: dict[str, Callable[..., Any]] = {
    "conv_bn_act": conv_bn_act,
    "bn_act": bn_act,
    "add_act": add_act,
    "bn_act_train": bn_act_train,
}
