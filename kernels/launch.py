"""What the launchers share: output layout, device context, guards."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

# Triton decides at decoration time whether kernels are interpreted, hence once, here.
INTERPRET = bool(triton.knobs.runtime.interpret)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# What Triton raises where a kernel cannot be built or does not fit a device: its own errors, which
# are no RuntimeErrors, and those of the compilers that it calls.
FAILURES = (triton.errors.TritonError, subprocess.SubprocessError, OSError)

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_INT32_MAX = 2**31 - 1

Wrap = Callable[[Any], Any]


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up. Triton's own costs a launcher 7 us a call, its compiler's wrapper
    of constants included."""
    return (a + b - 1) // b


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, 1 or more."""
    return 1 << max(0, n - 1).bit_length()


def direct(kernel: Any) -> Any:
    """Default of the launchers' `wrap_triton`: launch the kernel itself, without tracing."""
    return kernel


def output_format(x: torch.Tensor) -> torch.memory_format:
    """Memory format of an op's output: channels-last only where x is so and not also contiguous."""
    fmt = _CHANNELS_LAST.get(x.ndim)
    if fmt is None or x.is_contiguous() or not x.is_contiguous(memory_format=fmt):
        return torch.contiguous_format
    return fmt


def check_tensor(name: str, t: torch.Tensor, like: torch.Tensor) -> None:
    """Memory-safety guard: same device and dtype as x."""
    if t.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {t.device}")
    if t.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype}, got {t.dtype}")


def check_input(x: torch.Tensor) -> None:
    """Memory-safety guard: a dtype the kernels have, on a device they run on."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x: the Triton kernels take float16, bfloat16 or float32, got {x.dtype}")
    if x.device.type == "cpu" and not INTERPRET:
        raise ValueError("x: the Triton kernels need a GPU tensor, got one on cpu")


def check_shape(name: str, t: torch.Tensor, shape: Sequence[int]) -> None:
    """Memory-safety guard: exact shape."""
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}")


def channel_vector(name: str, t: torch.Tensor | None, k: int, x: torch.Tensor) -> torch.Tensor:
    """A per-channel fp32 vector; x stands in for an absent one (never read)."""
    if t is None:
        return x
    check_shape(name, t, (k,))
    if t.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device}, got one on {t.device}")
    return t.to(torch.float32).contiguous()


def needs_int64(*tensors: torch.Tensor, reach: int = 0) -> bool:
    """Whether an element offset into one of the tensors, tile overhang included, can pass 2^31.

    `reach` is how far beyond a tensor's ends offsets are formed that masks keep from being read. A
    symbolic size answers yes: asking would guard on it, and the graph serves every batch.
    """
    slack = 1 << 20
    for t in tensors:
        span = reach + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        if isinstance(span, torch.SymInt) or span > _INT32_MAX - slack:
            return True
    return False


def hint(size: int) -> int:
    """A size for heuristics: the traced example's where it is symbolic, without a guard."""
    if not isinstance(size, torch.SymInt):
        return size
    example = size.node.hint
    return int(example) if example is not None else 1 << 15


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; make it x's. Fake tensors have none to enter."""
    if type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_cuda:
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
