"""What torch's flags say of the arithmetic; free of Triton."""

from __future__ import annotations

from typing import Any

import torch


def allow_tf32_of_convolutions() -> bool:
    """Whether torch's flags let convolutions of fp32 tensors multiply in tf32."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        # torch refuses the old flag once the per-operator one was set.
        cudnn: Any = torch.backends.cudnn
        return bool(cudnn.conv.fp32_precision == "tf32")
