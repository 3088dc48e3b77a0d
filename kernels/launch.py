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

# Addresses in multiples of this many bytes are what Triton specialises a kernel for.
_ALIGNMENT = 16

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


# Kinds of arguments that a prepared call remembers: the oldest make room.
_KINDS = 16


def keep_few(known: dict[Any, Any], kind: Any, launch: Any) -> None:
    """Enter what was decided for ``kind``, and let the oldest entry go beyond ``_KINDS``."""
    known[kind] = launch
    if len(known) > _KINDS:
        known.pop(next(iter(known)), None)


class Repeatable:
    """A launch of one kernel, to be repeated with other tensors of the same kind.

    Triton's launch binds and specialises each argument anew: 20 to 40 us of the host's time for a
    convolution's forty, more than the kernel takes on the device. What it ends in is a compiled
    kernel, which takes the same arguments as they are in 3 us. Repeated calls go there, as long as
    they keep to what the kernel was specialised for: dtypes, sizes and strides, which are the
    caller's to keep, and addresses in multiples of 16, which are asked.

    Args:
        kernel: the jitted kernel. Its parameters are tensors, then ``sizes``, then constants.
        grid: programs along one or two dimensions.
        flags: the constants by name, and Triton's options.
    """

    __slots__ = ("_rest", "_run", "flags", "grid", "kernel", "sizes")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], sizes: tuple[int, ...], flags: dict[str, Any]
    ) -> None:
        self.kernel, self.grid, self.sizes, self.flags = kernel, grid, sizes, flags
        self._run: Callable[..., Any] | None = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: torch.Tensor, wrap_triton: Wrap = direct) -> None:
        """Launch on the current device and its current stream."""
        if wrap_triton is not direct:
            wrap_triton(self.kernel)[self.grid](*tensors, *self.sizes, **self.flags)
            return
        aligned = not any(t.data_ptr() % _ALIGNMENT for t in tensors)
        if aligned and self._run is not None and not self.kernel.pre_run_hooks:
            self._run(*tensors, *self._rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self.sizes, **self.flags)
        if aligned and isinstance(compiled, triton.compiler.CompiledKernel):
            constants = self.kernel.arg_names[len(tensors) + len(self.sizes) :]
            self._rest = (*self.sizes, *(self.flags[name] for name in constants))
            self._run = compiled[(*self.grid, 1, 1)[:3]]


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
