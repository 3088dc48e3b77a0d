"""``stem_pool`` by the CUDA library's own kernel (``csrc/cuda/stem_pool.cuh``).

Products on tensor cores, of fp16, bf16, and fp32 as TF32; images of uint8 or of the weight's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fast.ops import _checks, _several
from resnet_fast.ops._checks import tf32_allowed
from resnet_fast.ops.stem_pool import _fake, _operand

AVAILABLE = _checks.has_op("_stem_pool_cuda") and not _checks.lacks_cuda("_stem_pool_cuda")


def runs(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes CUDA tensors like these: no fp64, and fp32 where TF32 is allowed."""
    if not AVAILABLE or torch.float64 in (x.dtype, weight.dtype):
        return False
    return weight.dtype is not torch.float32 or tf32_allowed()


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    act: str,
) -> Any:
    """The op by the kernel, or ``NotImplemented`` where it does not run.

    An image of another floating dtype is normalised, and rounded to the weight's, by itself.
    """
    if not runs(x, weight):
        return NotImplemented
    if x.dtype not in (weight.dtype, torch.uint8):
        x, input_scale, input_shift = _operand(x, weight, input_scale, input_shift), None, None
    return torch.ops.resnet_fast._stem_pool_cuda(
        x, weight, scale, shift, input_scale, input_shift, act
    )


if _checks.has_op("_stem_pool_cuda"):
    torch.library.register_fake("resnet_fast::_stem_pool_cuda", _fake)
_several.without_triton("stem_pool", run)
