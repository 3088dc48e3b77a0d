"""``add_act``: residual add and activation, with its backward op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fast.ops import _checks, _work, activation


def check(x: Tensor, residual: Tensor, act: str = "none") -> None:
    """Raise a typed error for arguments that :func:`add_act` does not accept."""
    _checks.activations("x", x)
    _checks.tensor("residual", residual)
    activation.check(act)
    _checks.same_shape("residual", residual, x.shape, x)


def add_act(x: Tensor, residual: Tensor, act: str = "none") -> Tensor:
    """Add a residual and apply an activation.

    ``y = act(x + residual)``

    The end of a residual unit (He et al. 2015, "Deep Residual Learning for Image Recognition",
    eq. 1 and figure 2). The sum is fp32 (fp64 for fp64) and the result is rounded once.

    Args:
        x: any shape; fp32, fp16, bf16 or fp64. May be empty.
        residual: the shape and dtype of ``x``. It does not broadcast.
        act: one of ``resnet_fast.ops.activation.ACTIVATIONS``.

    Returns:
        The shape and dtype of ``x``, channels-last if ``x`` is, else contiguous. Gradients flow to
        both tensors: they are equal, and computed once by ``resnet_fast::_add_act_backward``.

    Raises:
        ArgumentError: a shape, value or device that does not fit; it names the argument.
        DTypeError: an unsupported dtype, or dtypes that do not go together.
        LibraryError: the native library is not loaded, or has no kernel for the device of ``x``
            and Triton, which would have one for CUDA, is not installed.
    """
    check(x, residual, act)
    if not _REGISTERED:
        _checks.require_op("add_act")
    return torch.ops.resnet_fast.add_act.default(x, residual, act)


def reference(x: Tensor, residual: Tensor, act: str = "none") -> Tensor:
    """:func:`add_act` in plain PyTorch: one op after another, each rounding to ``x.dtype``."""
    return activation.value(act, x + residual)


def work(x: Tensor, residual: Tensor, act: str = "none") -> _work.Work:
    """What :func:`add_act` moves; see :mod:`resnet_fast.ops._work`."""
    return _work.Work(_work.nbytes(x, residual), _work.nbytes(x))


def work_backward(grad_y: Tensor, x: Tensor, residual: Tensor, act: str) -> _work.Work:
    """What the backward moves: the sum is computed again."""
    return _work.Work(_work.nbytes(grad_y, x, residual), _work.nbytes(x))


def _fake(x: Tensor, residual: Tensor, act: str) -> Tensor:
    check(x, residual, act)
    return _checks.empty_output(x, x.shape)


def _fake_backward(grad_y: Tensor, x: Tensor, residual: Tensor, act: str) -> Tensor:
    check(x, residual, act)
    _checks.same_shape("grad_y", grad_y, x.shape, x)
    return _checks.empty_output(x, x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, act = inputs
    if act != "none":
        ctx.save_for_backward(x, residual)
    ctx.act = act


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.act == "none":
        grad_z = grad_y
    elif torch.is_grad_enabled():
        # create_graph: the backward op has no derivative of its own, its formula has.
        x, residual = ctx.saved_tensors
        wide = _checks.parameter_dtype(x.dtype)
        z = x.to(wide) + residual.to(wide)
        grad_z = activation.grad(ctx.act, grad_y.to(wide), z).to(x.dtype)
    else:
        x, residual = ctx.saved_tensors
        grad_z = torch.ops.resnet_fast._add_act_backward.default(grad_y, x, residual, ctx.act)
    need_x, need_residual = ctx.needs_input_grad[:2]
    return grad_z if need_x else None, grad_z if need_residual else None, None


_REGISTERED = _checks.has_op("add_act") and _checks.has_op("_add_act_backward")
if _REGISTERED:
    torch.library.register_fake("resnet_fast::add_act", _fake)
    torch.library.register_fake("resnet_fast::_add_act_backward", _fake_backward)
    torch.library.register_autograd("resnet_fast::add_act", _backward, setup_context=_setup_context)
