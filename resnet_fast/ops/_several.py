"""Registration of ops that stand for several layers: one kernel on CUDA, the layers elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fast.ops import _checks
from resnet_fast.ops._triton import AVAILABLE, launched, room


def has_kernel(op: str, *arguments: Any) -> bool:
    """Whether kernels/<op>.py is there and takes the dtypes of the arguments, the first a tensor.

    No kernel takes fp64. What else a module refuses, its ``runs`` says.
    """
    wide = any(isinstance(v, Tensor) and v.dtype is torch.float64 for v in arguments)
    if wide or not AVAILABLE:
        return False
    runs = getattr(room(op), "runs", None)
    return runs is None or bool(runs(arguments[0]))


def prepare(op: str, x: Tensor, *parameters: Any) -> Callable[..., Any]:
    """``resnet_fast::op`` for inputs like ``x``: call it with what comes before ``parameters``.

    What dispatcher and launcher cost the host is paid once a kind of input. Where there is no
    Triton kernel, while gradients are recorded, and under a ``TorchDispatchMode``, which would not
    see the launch, the op itself is called.
    """
    overload = getattr(torch.ops.resnet_fast, op).default
    launch: Callable[..., Any] | None = None
    if x.device.type == "cuda" and has_kernel(op, x):
        launch = getattr(room(op), f"prepare_{op}")(*parameters)

    def call(*inputs: Tensor) -> Any:
        if launch is None or torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
            return overload(*inputs, *parameters)
        return launched(launch, *inputs)

    return call


# What may run an op on CUDA where Triton does not; it may return NotImplemented, for the layers.
_without_triton: dict[str, Callable[..., Any]] = {}


def without_triton(op: str, run: Callable[..., Any]) -> None:
    """Let ``run`` be asked before the layers are, on CUDA where there is no kernel of Triton's."""
    _without_triton[op] = run


def implement(op: str, layers: Callable[..., Any], fake: Callable[..., Any], launch: str) -> bool:
    """Give ``resnet_fast::op`` its kernels; False where the native library does not define it.

    Args:
        op: its name, and the module of ``kernels/`` that holds the Triton launcher.
        layers: the op as differentiable ops of single layers. It runs on every device but CUDA, in
            fp64, and wherever gradients are recorded: these are then the layers' own.
        fake: shapes and strides of the outputs.
        launch: the launcher's name.
    """
    if not _checks.has_op(op):
        return False
    name = f"resnet_fast::{op}"
    overload = getattr(torch.ops.resnet_fast, op).default

    def differentiable(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in arguments
        ):
            return layers(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    def cuda(*arguments: Any) -> Any:
        if has_kernel(op, *arguments):
            return launched(getattr(room(op), launch), *arguments)
        run = _without_triton.get(op)
        result = NotImplemented if run is None else run(*arguments)
        return layers(*arguments) if result is NotImplemented else result

    torch.library.register_fake(name, fake)
    torch.library.impl(name, "CPU", layers)
    torch.library.impl(name, "CUDA", cuda)
    torch.library.impl(name, "Autograd", differentiable)
    return True
