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
from resnet_fast.errors import DTypeError
from resnet_fast.ops import _checks
from resnet_fast.ops._checks import tf32_allowed
from resnet_fast.ops.conv_bn_act import check

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
    geometry = check(x, weight, scale, shift, residual, stride, padding, dilation, groups, act)
    return _checks.empty_output(x, geometry.shape)


def run(
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
    tile: str = "",
    splits: int = 0,
) -> Tensor:
    """:func:`resnet_fast.ops.conv_bn_act` by one of the kernels, on a CUDA device.

    Args:
        tile: one of ``HALF_TILES`` (of ``FLOAT_TILES`` in fp32); chosen by the shape if empty.
        splits: parts that the reduction is computed in; chosen by the shape if 0.

    Raises:
        DTypeError: fp32 on tensor cores where torch's flags do not allow TF32.
        RuntimeError: a tile that has no kernel for these channels; other arguments as the op says.
    """
    if (
        x.dtype is torch.float32
        and not tf32_allowed()
        and variant(x.dtype, (1, 1, 1, 1), weight.shape, groups, tile) != "grouped"
    ):
        expected = "float16, bfloat16, or float32 where torch.backends.cudnn allows TF32"
        raise DTypeError("x", expected, "float32 without TF32")
    y: Tensor = torch.ops.resnet_fast._conv_bn_act_cuda.default(
        x, weight, scale, shift, residual, stride, padding, dilation, groups, act, tile, splits
    )
    return y


def variant(
    dtype: torch.dtype,
    out_shape: Sequence[int],
    weight_shape: Sequence[int],
    groups: int,
    tile: str = "",
) -> str:
    """The kernel that a call with this output [N, K, P, Q] and weight takes: tile, parts, copies.

    ``tile`` as the op takes it; empty where there is no such kernel. Tensors are taken as aligned,
    as torch allocates them.
    """
    native = _library.native()
    if native is None:
        return ""
    pixels = out_shape[0] * math.prod(out_shape[2:])
    return str(native.conv_variant(dtype.itemsize, pixels, list(weight_shape), groups, tile))


if _checks.has_op("_conv_bn_act_cuda"):
    torch.library.register_fake("resnet_fast::_conv_bn_act_cuda", _fake)
