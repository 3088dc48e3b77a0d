"""What products in TF32 give: the standard of fp32 kernels on tensor cores.

The framework runs a convolution in TF32 where its library has a kernel for it, which small and odd
shapes have not: there its own result is fp32's, and says nothing of what torch's flags allow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def rounded(x: Tensor) -> Tensor:
    """fp32 ``x`` rounded to 10 bits of fraction, ties away; infinities and NaN as they are."""
    bits = (x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF
    return torch.where(x.isfinite(), bits.view(torch.float32), x)


class Products(TorchFunctionMode):
    """Within the block, convolutions of fp64 tensors multiply what TF32 holds of their operands.

    Everything else stays exact, the convolutions' sums too: what is off is off by TF32 alone.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Round the operands of a convolution, leave all else."""
        if func in (F.conv1d, F.conv2d, F.conv3d):
            x, weight, *rest = args
            args = (rounded(x.float()).double(), rounded(weight.float()).double(), *rest)
        return func(*args, **(kwargs or {}))
