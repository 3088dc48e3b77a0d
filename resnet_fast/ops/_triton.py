"""Registration of a Triton launcher: as an op that torch.compile sees through, and on CUDA."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.library import triton_op, wrap_triton

from resnet_fast import kernels  # type: ignore[attr-defined]  # it lies in kernels/
from resnet_fast.errors import DTypeError, LibraryError
from resnet_fast.ops import _checks

AVAILABLE, REASON = kernels.available()


def room(name: str) -> Any:
    """The module of kernels/ called ``name``."""
    return importlib.import_module(f"{kernels.__name__}.{name}")


def launched(launch: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the launcher returns; where Triton itself fails, ``LibraryError``, as callers expect."""
    try:
        return launch(*args, **options)
    except room("launch").FAILURES as failure:
        raise LibraryError(f"{launch.__name__}: Triton cannot run here: {failure}") from failure


class _Traceable:
    """The launcher as a callable without source text.

    `triton_op` searches a function's source for kernels and imports Inductor for that, which
    takes 1.6 s; it skips what has no source, and `register` names the kernels itself.
    """

    def __init__(self, launch: Callable[..., torch.Tensor]) -> None:
        self._launch = launch

    def __call__(self, *args: Any) -> torch.Tensor:
        return launched(self._launch, *args, wrap_triton=wrap_triton)


@contextmanager
def _given(schema: str) -> Iterator[None]:
    """Makes `triton_op` take `schema`; a no-op once torch 2.14 is the oldest torch.

    Before 2.14 it accepts the argument, yet infers a schema from the function, which fails for
    an object and would say SymInt where the op's contract says int
    (https://github.com/pytorch/pytorch/pull/188722).
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14):
        yield
        return
    from torch._library import triton as inner

    inferred = inner.infer_schema
    inner.infer_schema = lambda *args, **kwargs: schema
    try:
        yield
    finally:
        inner.infer_schema = inferred


def register(name: str, schema: str, module: str, launch: str, jitted: Sequence[str]) -> None:
    """Define resnet_fast::<name> from a launcher of kernels/<module>.py, if Triton is there.

    `jitted` names the kernels that the launcher may call: torch.compile's cache keys a graph that
    holds this op by their sources.
    """
    if not AVAILABLE:
        return
    rooms = room(module)
    qualified = f"resnet_fast::{name}"
    with _given(schema):
        triton_op(qualified, _Traceable(getattr(rooms, launch)), mutates_args={}, schema=schema)
    try:
        from torch._library.triton import triton_ops_to_kernels
    except ImportError:
        return
    triton_ops_to_kernels[qualified] = [getattr(rooms, kernel) for kernel in jitted]


def implement(op: str, module: str, launch: str, instead: str) -> None:
    """Make a launcher the CUDA kernel of ``resnet_fast::op`` where the CUDA library has none.

    Without Triton the op raises ``LibraryError``, for fp64 ``DTypeError``; both name ``instead``.
    """
    if not AVAILABLE:
        _checks.refuse_cuda(op, f"{_checks.why_no_kernel()}; Triton: {REASON}. Use {instead}")
    if not _checks.lacks_cuda(op):
        return
    launcher = getattr(room(module), launch)

    def run(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if x.dtype is torch.float64:
            expected = f"float32, float16 or bfloat16 in the Triton kernel of {op}, else {instead}"
            raise DTypeError("x", expected, "float64")
        return launched(launcher, x, *arguments)

    torch.library.impl(f"resnet_fast::{op}", "CUDA", run)
