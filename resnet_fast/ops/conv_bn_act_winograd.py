"""``conv_bn_act`` for 3×3 kernels at stride 1 by Winograd's minimal filtering (CPU, fp32, bf16).

F(2×2, 3×3) takes 2.25 times fewer multiplications than a direct convolution, F(4×4, 3×3) four
times (Lavin and Gray 2016, arXiv:1509.09308). The transformed weights, computed in fp64 and rounded
once, are a cache (:mod:`resnet_fast.ops._pack`), which is why these registrations take the
batch-norm tensors themselves: a graph that calls one always starts from the parameters. Scale,
shift, residual and activation are applied to the tile while it is in registers.

The transforms subtract inputs from each other; a tile in which that gives an infinity or NaN is
computed again by the definition, so that special values go where a direct convolution puts them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.errors import ArgumentError
from resnet_fast.ops import _checks
from resnet_fast.ops._pack import (
    Call,
    Layer,
    PackedCall,
    cached,
    fold,
    like_convolution,
    weight_like,
)


def _check(weight: Tensor, stride: list[int], dilation: list[int], groups: int) -> None:
    if tuple(weight.shape[2:]) != (3, 3):
        raise ArgumentError("weight", "a 3x3 kernel", f"shape {list(weight.shape)}")
    for name, value, unit in (
        ("stride", list(stride), [1, 1]),
        ("dilation", list(dilation), [1, 1]),
        ("groups", groups, 1),
    ):
        if value != unit:
            raise ArgumentError(name, f"{unit} for Winograd's algorithm", value)


def prepare(
    m: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Call:
    """:func:`run2` or :func:`run4` (``m``), the weights packed: call it with input and residual."""
    _check(weight, stride, dilation, groups)
    weight = weight_like(x, weight)
    packed, scale, shift = cached(
        ("winograd", m, eps),
        (weight, bias, bn_weight, bn_bias, mean, var),
        lambda: (
            torch.ops.resnet_fast._winograd_weight(weight.detach(), m),
            *fold(bias, bn_weight, bn_bias, mean, var, eps),
        ),
    )
    return PackedCall(
        torch.ops.resnet_fast._winograd_conv.default,
        (packed, weight, m, scale, shift),
        (padding, act),
        Layer(f"winograd{m}", packed, weight, scale, shift),
    )


def run2(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    """``act(BN(conv(x, weight) + bias) + residual)`` with running statistics, by F(2×2, 3×3).

    Shapes as :func:`resnet_fast.ops.conv_bn_act` with two spatial dimensions, a 3×3 kernel, stride,
    dilation and groups of 1; ``x`` fp32 or bf16, weight of its dtype, everything between them and
    the result fp32. The output is channels-last.
    """
    parameters = (weight, bias, bn_weight, bn_bias, mean, var, eps)
    return prepare(2, x, *parameters, stride, padding, dilation, groups, act)(x, residual)


def run4(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    """:func:`run2` by F(4×4, 3×3): fewer multiplications, and more rounding error."""
    parameters = (weight, bias, bn_weight, bn_bias, mean, var, eps)
    return prepare(4, x, *parameters, stride, padding, dilation, groups, act)(x, residual)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    _check(weight, stride, dilation, groups)
    parameters = (weight, bias, bn_weight, bn_bias, mean, var, eps)
    return like_convolution(x, *parameters, residual, stride, padding, dilation, groups, act)


if _checks.has_op("_winograd_conv"):
    for _m, _function in ((2, run2), (4, run4)):
        _name = f"resnet_fast::_conv_bn_act_winograd{_m}"
        torch.library.custom_op(_name, _function, mutates_args=()).register_fake(_fake)
