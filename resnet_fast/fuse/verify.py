"""Site-by-site comparison of an accelerated model with the original on example inputs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from resnet_fast.errors import AccelerateError
from resnet_fast.fuse.capture import mode, untouched_rng
from resnet_fast.fuse.program import Program, run_site, run_unfused
from resnet_fast.fuse.steps import SiteTarget
from resnet_fast.testing.budget import Verdict, in_formats, within_budget


@dataclass
class Outcome:
    """What a comparison ruled out, by path of the convolution."""

    #: Sites that left the budget: what was found there.
    rejected: dict[str, str] = field(default_factory=dict)
    #: Sites whose residual has to stay a separate add: the reason code.
    without_add: dict[str, str] = field(default_factory=dict)
    #: Why nothing may stay fused, or empty.
    model: str = ""


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from a tensor, a sequence or a mapping."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def compare(
    original: nn.Module, accelerated: nn.Module, programs: list[Program], example_inputs: Any
) -> Outcome:
    """Run both in eval on ``example_inputs`` and judge each site, then the whole.

    Each site is computed twice from the same activation, fused and by its modules, and judged
    against fp64 by the error budget. What it hands on is the modules' result: the outputs of the
    two models must then be equal, or within the budget where the framework itself does not
    repeat its numbers. Modes, buffers and random states are left as they were.

    Raises:
        AccelerateError: if the original itself fails on ``example_inputs``.
    """
    outcome = Outcome()

    def observe(target: SiteTarget, conv: Any, bn: Any, act: Any, x: Any, residual: Any) -> Any:
        plain = run_unfused(target, conv, bn, act, _own(x), residual)
        if residual is not None and getattr(residual, "shape", None) != plain.shape:
            outcome.without_add[target.path] = "ADD_BROADCAST"
            return plain
        try:
            verdict = _judge(target, conv, bn, x, residual)
        except Exception as error:  # a site that raises is a site that must not be used
            outcome.rejected[target.path] = f"{type(error).__name__}: {error}"
            return plain
        if not verdict.ok:
            outcome.rejected[target.path] = (
                f"error {verdict.error:.3g} beyond the limit {verdict.limit:.3g}"
            )
        return plain

    with contextlib.ExitStack() as stack:
        for context in (untouched_rng(), torch.no_grad(), _kept_buffers(original)):
            stack.enter_context(context)
        with mode(original, False), mode(accelerated, False):
            state = torch.get_rng_state()
            try:
                expected = _run(original, example_inputs)
            except Exception as error:
                raise AccelerateError(
                    f"the model itself fails on example_inputs: {type(error).__name__}: {error}"
                ) from error
            torch.set_rng_state(state)
            for program in programs:
                program.observe = observe
            try:
                actual = _run(accelerated, example_inputs)
            except Exception as error:
                outcome.model = f"{type(error).__name__}: {error}"
                return outcome
            finally:
                for program in programs:
                    program.observe = None
            if not _same(actual, expected):
                torch.set_rng_state(state)
                outcome.model = _beyond_budget(original, actual, expected, example_inputs)
    return outcome


def _judge(target: SiteTarget, conv: Any, bn: Any, x: Tensor, residual: Tensor | None) -> Verdict:
    fused = run_site(target, conv, bn, None, x, residual)
    conv64 = copy.deepcopy(conv).double()
    bn64 = None if bn is None else copy.deepcopy(bn).double()
    other = None if residual is None else residual.double()
    truth = run_unfused(target, conv64, bn64, None, x.double(), other)
    frameworks = in_formats(partial(run_unfused, target, conv, bn, None), x, residual)
    return within_budget(fused, frameworks, truth)


def _own(value: Any) -> Any:
    return value.clone(memory_format=torch.preserve_format) if isinstance(value, Tensor) else value


def _run(model: nn.Module, example_inputs: Any, dtype: torch.dtype | None = None) -> Any:
    def prepare(value: Any) -> Any:
        value = _own(value)  # a model may write to its input
        if dtype is not None and isinstance(value, Tensor) and value.is_floating_point():
            value = value.to(dtype)
        return value

    args, kwargs = pytree.tree_map(prepare, call_arguments(example_inputs))
    return model(*args, **kwargs)


def _in_formats(model: nn.Module, example_inputs: Any) -> list[list[Any]]:
    """The leaves of the model's output, with example inputs in either memory format."""
    leaves, spec = pytree.tree_flatten(example_inputs)

    def run(*leaves: Any) -> list[Any]:
        return pytree.tree_leaves(_run(model, pytree.tree_unflatten(list(leaves), spec)))

    return in_formats(run, *leaves)


def _same(actual: Any, expected: Any) -> bool:
    ours, spec = pytree.tree_flatten(actual)
    theirs, other = pytree.tree_flatten(expected)
    if spec != other:
        return False
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
                return False
            if not torch.equal(a.nan_to_num(), b.nan_to_num()) or not torch.equal(
                a.isnan(), b.isnan()
            ):
                return False
        elif isinstance(a, Tensor) != isinstance(b, Tensor):
            return False
    return True


def _beyond_budget(original: nn.Module, actual: Any, expected: Any, example_inputs: Any) -> str:
    """What sets the two outputs apart, or an empty string where the budget covers it."""
    ours, spec = pytree.tree_flatten(actual)
    theirs, other = pytree.tree_flatten(expected)
    if spec != other:
        return "the output has another structure"
    try:
        truth = pytree.tree_leaves(
            _run(copy.deepcopy(original).double(), example_inputs, torch.float64)
        )
        # `expected` is the framework's answer in the format that was given.
        others = _in_formats(original, example_inputs)
    except Exception as error:
        return f"the outputs differ, and no fp64 reference runs: {type(error).__name__}: {error}"
    for i, (a, b, reference) in enumerate(zip(ours, theirs, truth, strict=True)):
        if not isinstance(a, Tensor):
            continue
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return "the output is of another kind"
        if not a.is_floating_point():
            return "an integer output differs"
        verdict = within_budget(a, [b, *(other[i] for other in others)], reference)
        if not verdict.ok:
            return f"output error {verdict.error:.3g} beyond the limit {verdict.limit:.3g}"
    return ""


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, version, value in kept:
            if buffer._version != version:
                buffer.copy_(value)
