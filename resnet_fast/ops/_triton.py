"""Registration of a Triton launcher as an op that torch.compile sees through."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import triton_op, wrap_triton

from resnet_fast import kernels  # type: ignore[attr-defined]  # it lies in kernels/

AVAILABLE, REASON = kernels.available()


class _Traceable:
    """The launcher as a callable without source text.

    `triton_op` searches a function's source for kernels and imports Inductor for that, which
    takes 1.6 s; it skips what has no source, and `register` names the kernels itself.
    """

    def __init__(self, launch: Callable[..., torch.Tensor]) -> None:
        self._launch = launch

    def __call__(self, *args: Any) -> torch.Tensor:
        return self._launch(*args, wrap_triton=wrap_triton)


def register(name: str, schema: str, module: str, launch: str, jitted: Sequence[str]) -> None:
    """Define resnet_fast::<name> from a launcher of kernels/<module>.py, if Triton is there.

    `jitted` names the kernels that the launcher may call: torch.compile's cache keys a graph that
    holds this op by their sources.
    """
    if not AVAILABLE:
        return
    rooms = importlib.import_module(f"{kernels.__name__}.{module}")
    qualified = f"resnet_fast::{name}"
    triton_op(qualified, _Traceable(getattr(rooms, launch)), mutates_args={}, schema=schema)
    try:
        from torch._library.triton import triton_ops_to_kernels
    except ImportError:
        return
    triton_ops_to_kernels[qualified] = [getattr(rooms, kernel) for kernel in jitted]
