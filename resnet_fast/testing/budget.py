"""The error budget: what a result may differ from the truth by.

``error(ours) <= 2 · (error(framework) + one rounding)``, for each tensor, where the truth is the
reference run in fp64, the framework's error is that of its own ops in the dtype under test, an
error is the greatest absolute difference, and one rounding is half an epsilon of the dtype at the
greatest magnitude of the truth.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """Whether a result is within budget, its error and the limit."""

    ok: bool
    error: float
    limit: float


def error(actual: Tensor, ref64: Tensor) -> float:
    """The greatest absolute difference; infinite if shapes, NaNs or infinities differ."""
    if actual.shape != ref64.shape:
        return math.inf
    if actual.numel() == 0:
        return 0.0
    a = actual.detach().to(ref64.device, torch.float64)
    b = ref64.detach().to(torch.float64)
    special = ~torch.isfinite(b)
    if not torch.equal(special, ~torch.isfinite(a)):
        return math.inf
    if not torch.equal(a[special].nan_to_num(), b[special].nan_to_num()):
        return math.inf
    if not torch.equal(a.isnan(), b.isnan()):
        return math.inf
    difference = (a - b).abs().masked_fill_(special, 0.0)
    return difference.max().item()


def rounding(dtype: torch.dtype, ref64: Tensor) -> float:
    """Half an epsilon of ``dtype`` at the greatest finite magnitude of the truth."""
    if ref64.numel() == 0:
        return 0.0
    finite = ref64.detach().to(torch.float64).abs()
    finite = finite.masked_fill(~torch.isfinite(finite), 0.0)
    return torch.finfo(dtype).eps / 2 * finite.max().item()


def limit(framework_error: float, dtype: torch.dtype, ref64: Tensor) -> float:
    """The budget of a result of ``dtype``, given the error of the framework's own."""
    if not math.isfinite(framework_error):
        # A framework that overflows where the truth is finite sets no standard: one rounding does.
        framework_error = 0.0
    return 2 * (framework_error + rounding(dtype, ref64))


def within_budget(actual: Tensor, framework: Tensor, ref64: Tensor) -> Verdict:
    """Judge ``actual`` against the truth ``ref64``, given the framework's own result."""
    allowed = limit(error(framework, ref64), actual.dtype, ref64)
    found = error(actual, ref64)
    return Verdict(found <= allowed, found, allowed)
