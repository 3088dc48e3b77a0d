"""``conv_bn_act`` by this package's register-tiled product (CPU, fp32, bf16).

The weights are packed once by strips of filters and kept (:mod:`resnet_fast.ops._pack`), which is
why this registration takes the batch-norm tensors themselves: a graph that calls it always starts
from the parameters. Weights stay unfolded; scale, shift, residual and activation are applied while
the sums are in registers, and the output is written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _library
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


def available(dtype: torch.dtype) -> bool:
    """Whether the product runs in ``dtype`` here: bf16 wants AVX512_BF16."""
    if not _checks.has_op("_direct_conv"):
        return False
    if dtype is not torch.bfloat16:
        return dtype is torch.float32
    native = _library.native()
    return (
        native is not None
        and native.current_isa() == "avx512"
        and native.cpu_features().get("avx512bf16", False)
    )


def prepare(
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
    """:func:`run` for inputs like ``x``, the weights packed: call it with input and residual."""
    weight = weight_like(x, weight)
    packed, scale, shift = cached(
        ("direct", eps, groups),
        (weight, bias, bn_weight, bn_bias, mean, var),
        lambda: (
            torch.ops.resnet_fast._direct_weight(weight.detach(), groups),
            *fold(bias, bn_weight, bn_bias, mean, var, eps),
        ),
    )
    return PackedCall(
        torch.ops.resnet_fast._direct_conv.default,
        (packed, weight, scale, shift),
        (stride, padding, dilation, groups, act),
        Layer("direct", packed, weight, scale, shift),
    )


def run(
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
    """``act(BN(conv(x, weight) + bias) + residual)`` with running statistics.

    Shapes as :func:`resnet_fast.ops.conv_bn_act` with two spatial dimensions, or three and one
    group; ``x`` fp32 or bf16, weight of its dtype, sums and epilogue fp32. The output is
    channels-last.
    """
    parameters = (weight, bias, bn_weight, bn_bias, mean, var, eps)
    return prepare(x, *parameters, stride, padding, dilation, groups, act)(x, residual)


if _checks.has_op("_direct_conv"):
    torch.library.custom_op("resnet_fast::_conv_bn_act_direct", run, mutates_args=()).register_fake(
        like_convolution
    )
