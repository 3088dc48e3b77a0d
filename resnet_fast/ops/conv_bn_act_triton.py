"""``conv_bn_act`` by the Triton kernels of ``kernels/conv_bn_act.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fast.ops._pack import Call
from resnet_fast.ops._triton import AVAILABLE, implement, launched, register, room

register(
    "_conv_bn_act_triton",
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, int[] stride, "
    "int[] padding, int[] dilation, int groups, str act) -> Tensor",
    "conv_bn_act",
    "launch_conv_bn_act",
    ("conv_kernel", "gemm_kernel", "sum_kernel"),
)
implement("conv_bn_act", "conv_bn_act", "launch_conv_bn_act", "torch.nn.functional.conv2d")


def variant(
    dtype: torch.dtype, out_shape: Sequence[int], weight_shape: Sequence[int], groups: int
) -> str:
    """The config and the splits that a launch with this output [N, K, P...] and weight takes."""
    if not AVAILABLE:
        return ""
    config, splits = room("conv_bn_act").choose(
        dtype,
        out_shape[0] * math.prod(out_shape[2:]),
        weight_shape[1],
        weight_shape[0] // groups,
        groups,
        weight_shape[-1],
        math.prod(weight_shape[2:]),
    )
    return f"{config.name}/{splits}"


def prepare(
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Call:
    """The op with its parameters bound: call it with input and residual, without gradients.

    What dispatcher and launcher cost the host is paid once a kind of input. Under a
    ``TorchDispatchMode``, which would not see the launch, the op itself is called.
    """
    geometry = (stride, padding, dilation, groups, act)
    launch = room("conv_bn_act").prepare_conv_bn_act(weight.detach(), scale, shift, *geometry)

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        if torch._C._len_torch_dispatch_stack():
            op = torch.ops.resnet_fast._conv_bn_act_triton.default
            return op(x, weight, scale, shift, residual, *geometry)
        return launched(launch, x, residual)

    return call
