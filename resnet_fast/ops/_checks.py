"""Checks and layouts that the ops share: of shapes, dtypes and devices, never of data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fast import _library
from resnet_fast.errors import ArgumentError, DTypeError, LibraryError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Geometry beyond this cannot describe a tensor and would overflow products of int64.
_LIMIT = 2**31


def has_op(name: str) -> bool:
    """Whether the native library has defined ``resnet_fast::name``."""
    return hasattr(torch.ops.resnet_fast, name)


def require_op(name: str) -> None:
    """Raise ``LibraryError`` that says why ``resnet_fast::name`` is missing and what to do."""
    _library.require_cpu()
    raise LibraryError(f"the loaded native library does not define resnet_fast::{name}; rebuild it")


def lacks_cuda(op: str) -> bool:
    """Whether ``resnet_fast::op`` is defined and no library has registered a CUDA kernel for it."""
    name = f"resnet_fast::{op}"
    return has_op(op) and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def why_no_kernel() -> str:
    """Why the CUDA library gives an op no kernel, for :func:`refuse_cuda`."""
    native = _library.status()["cuda"]
    return "the CUDA library has none" if native.loaded else f"its library: {native.reason}"


def refuse_cuda(op: str, reason: str) -> None:
    """Let ``resnet_fast::op`` raise ``LibraryError`` on CUDA tensors if nothing else runs there."""

    def refuse(*arguments: object) -> None:
        raise LibraryError(f"resnet_fast::{op} has no CUDA kernel: {reason}")

    if lacks_cuda(op):
        torch.library.impl(f"resnet_fast::{op}", "CUDA", refuse)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(shape: Sequence[int]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def tf32_allowed() -> bool:
    """Whether torch's flags let convolutions of fp32 tensors multiply in TF32."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # the newer settings are in use, and differ by operation
        return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scale, shift and statistics beside activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensor(argument: str, value: object) -> None:
    """``value`` must be a strided tensor."""
    if not isinstance(value, Tensor):
        raise ArgumentError(argument, "a tensor", type(value).__name__)
    if value.layout != torch.strided:
        raise ArgumentError(argument, "a strided tensor", str(value.layout))


def activations(
    argument: str, x: Tensor, ranks: Sequence[int] | None = None, least: int = 0
) -> None:
    """``x`` must be a strided tensor of a supported dtype and rank."""
    tensor(argument, x)
    if x.dtype not in DTYPES:
        expected = "one of " + ", ".join(_name(dtype) for dtype in DTYPES)
        raise DTypeError(argument, expected, _name(x.dtype))
    if ranks is not None and x.dim() not in ranks:
        expected = "rank " + ", ".join(str(rank) for rank in ranks)
        raise ArgumentError(argument, expected, f"rank {x.dim()} {_sizes(x.shape)}")
    if x.dim() < least:
        raise ArgumentError(argument, f"rank {least} or more", f"rank {x.dim()} {_sizes(x.shape)}")


def like(argument: str, value: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> None:
    """``value`` must be a strided tensor on the device of ``x`` and of its dtype (or ``dtype``)."""
    tensor(argument, value)
    wanted = x.dtype if dtype is None else dtype
    if value.dtype != wanted:
        raise DTypeError(
            argument, f"{_name(wanted)} beside x of {_name(x.dtype)}", _name(value.dtype)
        )
    if value.device != x.device:
        raise ArgumentError(argument, f"a tensor on {x.device}, as x", f"one on {value.device}")


def per_channel(argument: str, value: Tensor | None, channels: int, x: Tensor) -> None:
    """``value``, if given, must hold one fp32 number a channel (fp64 beside fp64)."""
    if value is None:
        return
    like(argument, value, x, parameter_dtype(x.dtype))
    if value.dim() != 1 or value.shape[0] != channels:
        raise ArgumentError(argument, f"shape [{channels}]", _sizes(value.shape))


def same_shape(argument: str, value: Tensor | None, shape: Sequence[int], x: Tensor) -> None:
    """``value``, if given, must have ``shape`` and the dtype and device of ``x``."""
    if value is None:
        return
    like(argument, value, x)
    if value.dim() != len(shape) or any(a != b for a, b in zip(value.shape, shape, strict=True)):
        raise ArgumentError(argument, f"shape {_sizes(shape)}", _sizes(value.shape))


def integers(argument: str, value: int | Sequence[int], count: int, least: int) -> list[int]:
    """``value`` as ``count`` integers, each at least ``least``; one integer stands for all."""
    entries = [value] * count if isinstance(value, int) else value
    expected = f"an integer or {count} of them, each {least} or more and below 2**31"
    if not isinstance(entries, (list, tuple)) or len(entries) != count:
        raise ArgumentError(argument, expected, repr(value))
    for entry in entries:
        if not isinstance(entry, int) or entry < least or entry >= _LIMIT:
            raise ArgumentError(argument, expected, repr(value))
    return list(entries)


def channels_last(x: Tensor) -> torch.memory_format | None:
    """The channels-last format of ``x`` if it has one that is not also the contiguous one."""
    if x.dim() == 4:
        memory_format = torch.channels_last
    elif x.dim() == 5:
        memory_format = torch.channels_last_3d
    else:
        return None
    if x.is_contiguous() or not x.is_contiguous(memory_format=memory_format):
        return None
    return memory_format


def empty_output(x: Tensor, shape: Sequence[int]) -> Tensor:
    """What the launchers allocate: channels-last if ``x`` is, else contiguous."""
    memory_format = channels_last(x) or torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def along_channels(vector: Tensor, x: Tensor) -> Tensor:
    """``vector`` of shape [C] viewed so that it broadcasts against ``x`` of shape [N, C, ...]."""
    return vector.view([1, -1] + [1] * (x.dim() - 2))


def but_channels(x: Tensor) -> list[int]:
    """Every dimension of ``x`` except the channels."""
    return [dim for dim in range(x.dim()) if dim != 1]


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``x·scale + shift`` per channel, in the widest dtype of the three."""
    if scale is not None:
        x = x * along_channels(scale, x)
    if shift is not None:
        x = x + along_channels(shift, x)
    return x
