"""``conv_bn_act`` by the CUDA library's own convolution (``csrc/cuda/conv_bn_act.cuh``).

An implicit matrix product on tensor cores (fp16, bf16, and fp32 as TF32), and for narrow groups a
kernel that multiplies in fp32. Two spatial dimensions; x in channels-last, else it is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fast import _library
from resnet_fast.ops import _checks
from resnet_fast.ops import conv_bn_act as contract

# Tiles of the tensor-core kernel, pixels x filters x stages, and the kernel for narrow groups.
HALF_TILES = ("128x128x3", "128x64x3", "128x64x4", "64x64x4", "128x32x4", "grouped")
FLOAT_TILES = ("128x64x3", "64x64x4", "128x32x4", "grouped")

# A filter's rows and columns are bits of one word each.
MAX_FILTER = 32

AVAILABLE = _checks.has_op("_conv_bn_act_cuda") and not _checks.lacks_cuda("_conv_bn_act_cuda")


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    tile: str,
    splits: int,
) -> Tensor:
    geometry = contract.check(
        x, weight, scale, shift, residual, stride, padding, dilation, groups, act
    )
    return _checks.empty_output(x, geometry.shape)


def variant(
    dtype: torch.dtype,
    out_shape: Sequence[int],
    weight_shape: Sequence[int],
    groups: int,
    tile: str = "",
) -> str:
    """The kernel that a call with this output [N, K, P, Q] and weight takes: tile, parts, copies.

    ``tile`` as the op takes it. Tensors are taken as aligned, as torch allocates them.
    """
    native = _library.native()
    if native is None:
        return ""
    pixels = out_shape[0] * math.prod(out_shape[2:])
    return str(native.conv_variant(dtype.itemsize, pixels, list(weight_shape), groups, tile))


if _checks.has_op("_conv_bn_act_cuda"):
    torch.library.register_fake("resnet_fast::_conv_bn_act_cuda", _fake)
