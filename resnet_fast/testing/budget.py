"""The error budget: what a result may differ from the truth by. The one definition of the standard.

``error(ours) <= 2 · (error(framework) + one rounding)``, for each tensor.

*Truth* is the reference run in fp64 on the numbers that the dtype under test holds.

*Error* is the greatest absolute difference.

*One rounding* is half an epsilon of the dtype at the greatest magnitude of the truth.

*The framework's error* is that of its own ops in the dtype under test, on the same device, at the
batch that runs, in the memory format in which it is larger. The framework may be asked in either
format, sums in another order in each, and calls both right (:func:`in_formats`). The batch belongs
to the question: at few values a call torch's CPU convolution leaves oneDNN for im2col and a
blocked matrix product, whose sums are several times more exact, and a site that replaces the one
is not judged by the other. Plan-time verification may use fewer images than run, as long as
the framework runs the same algorithm on them (``plan/verify.py``).

The greatest error over a small tensor is a matter of luck. Tests of single ops therefore also ask
the framework with every axis read backwards: its own ops still, and the same sums from the other
end (``testing/reordered.py``).

*In fp64* the truth is no wider than what it judges. The framework's fp32 error, scaled by the
ratio of the epsilons, stands for its fp64 error, and the limit is doubled, since the truth may
stray as far as the result may.

*A gradient through a deep network* has no continuous error: a pre-activation within rounding of a
ReLU's kink is masked or not, and one flip moves gradients by more than all roundings together. Each
run, ours and the framework's, is therefore held against the truth on the branch that it took: the
fp64 network with that run's ReLU masks and pooling maxima (``testing/branch.py``). Among hundreds
of tensors some framework error is small by luck: nineteen in twenty have to be within the budget of
their own tensor, and every one within that of the framework's greatest error in any gradient of the
step, relative to each tensor's size. In fp64 such a step is compared for its formulas, all tensors
by the latter.

Whoever changes the criterion raises :data:`REVISION`, so that kept verdicts are made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

#: Of the criterion; part of the key of every kept verdict.
REVISION = 2

_T = TypeVar("_T")
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


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


def limit_in_fp64(framework_error: float, ref64: Tensor) -> float:
    """The budget of an fp64 result, given the error of the framework's fp32 one."""
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return 2 * ratio * limit(framework_error, torch.float32, ref64)


def within_budget(actual: Tensor, framework: Tensor | Sequence[Tensor], ref64: Tensor) -> Verdict:
    """Judge ``actual`` against the truth ``ref64``, given the framework's own results.

    Of several results of the framework the one with the larger finite error is the standard. An
    fp64 ``actual`` beside fp32 results is judged by the rule for fp64.
    """
    answers = [framework] if isinstance(framework, Tensor) else list(framework)
    errors = [e for e in (error(answer, ref64) for answer in answers) if math.isfinite(e)]
    found = max(errors, default=math.inf)
    given = {answer.dtype for answer in answers}
    if actual.dtype is torch.float64 and given == {torch.float32}:
        allowed = limit_in_fp64(found, ref64)
    else:
        allowed = limit(found, actual.dtype, ref64)
    strayed = error(actual, ref64)
    return Verdict(strayed <= allowed, strayed, allowed)


def expect_within_budget(
    actual: Tensor, framework: Tensor | Sequence[Tensor], ref64: Tensor
) -> None:
    """Raise ``AssertionError`` with both figures unless :func:`within_budget`."""
    verdict = within_budget(actual, framework, ref64)
    assert verdict.ok, f"error {verdict.error:.3e} beyond {verdict.limit:.3e}"


def in_formats(f: Callable[..., _T], *arguments: Any) -> list[_T]:
    """``f(*arguments)`` with its tensors in contiguous and in channels-last memory.

    Copies are handed over, for ``f`` may write to them. Tensors of a rank that has no channels-last
    format are copied as they are, and arguments of no other rank give one result.
    """
    results = []
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    both = any(t.dim() in _CHANNELS_LAST for t in tensors)
    for channels_last in (False, True) if both else (False,):
        results.append(f(*(_in_format(value, channels_last) for value in arguments)))
    return results


def _in_format(value: Any, channels_last: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dim() not in _CHANNELS_LAST:
        return value.clone()
    return value.clone(
        memory_format=_CHANNELS_LAST[value.dim()] if channels_last else torch.contiguous_format
    )
