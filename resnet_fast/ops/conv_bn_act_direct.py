"""``conv_bn_act`` for dense kernels by this package's register-tiled product (CPU, fp32).

The weights are packed once by strips of filters and kept (:mod:`resnet_fast.ops._pack`), which is
why this registration takes the batch-norm tensors themselves: a graph that calls it always starts
from the parameters. Weights stay unfolded; scale, shift, residual and activation are applied while
the sums are in registers, and the output is written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import _checks
from resnet_fast.ops._pack import cached, fold, like_convolution


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

    Shapes as :func:`resnet_fast.ops.conv_bn_act` with two or three spatial dimensions and one
    group; fp32 throughout. The output is channels-last.
    """
    packed, scale, shift = cached(
        ("direct", eps),
        (weight, bias, bn_weight, bn_bias, mean, var),
        lambda: (
            torch.ops.resnet_fast._direct_weight(weight.detach()),
            *fold(bias, bn_weight, bn_bias, mean, var, eps),
        ),
    )
    return torch.ops.resnet_fast._direct_conv(
        x, packed, weight, scale, shift, residual, stride, padding, dilation, act
    )


if _checks.has_op("_direct_conv"):
    torch.library.custom_op("resnet_fast::_conv_bn_act_direct", run, mutates_args=()).register_fake(
        like_convolution
    )
