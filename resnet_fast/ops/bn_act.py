"""``bn_act``: per-channel affine, residual add and activation, without the convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fast.ops import _checks, _work, activation


def check(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
) -> None:
    """Raise a typed error for arguments that :func:`bn_act` does not accept."""
    _checks.activations("x", x, least=2)
    activation.check(act)
    _checks.per_channel("scale", scale, x.shape[1], x)
    _checks.per_channel("shift", shift, x.shape[1], x)
    _checks.same_shape("residual", residual, x.shape, x)


def bn_act(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """Scale and shift each channel, add a residual and apply an activation.

    ``y = act(x · scale + shift + residual)``

    With ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - mean · scale`` this is batch
    normalisation in inference (Ioffe and Szegedy 2015, "Batch Normalization", algorithm 2) followed
    by an activation, as pre-activation networks have it (He et al. 2016, "Identity Mappings in Deep
    Residual Networks"). Computed in fp32 (fp64 for fp64) and rounded once.

    Args:
        x: [N, C, ...], rank 2 or more; fp32, fp16, bf16 or fp64. N may be 0.
        scale: [C], fp32 (fp64 beside fp64); 1 if absent.
        shift: [C], fp32 (fp64 beside fp64); 0 if absent.
        residual: the shape and dtype of ``x``; 0 if absent.
        act: one of ``resnet_fast.ops.activation.ACTIVATIONS``.

    Returns:
        The shape and dtype of ``x``, channels-last if ``x`` is, else contiguous. Gradients flow to
        the four tensors, each in its own dtype, per-channel sums in fp32.

    Raises:
        ArgumentError: a rank, size, value or device that does not fit; it names the argument.
        DTypeError: an unsupported dtype, or dtypes that do not go together.
        LibraryError: the native library is not loaded, or has no kernel for the device of ``x``
            and Triton, which would have one for CUDA, is not installed.
    """
    check(x, scale, shift, residual, act)
    if not _REGISTERED:
        _checks.require_op("bn_act")
    return torch.ops.resnet_fast.bn_act.default(x, scale, shift, residual, act)


def reference(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """:func:`bn_act` in plain PyTorch: one op after another, each rounding to ``x.dtype``."""
    z = _checks.affine(x, scale, shift).to(x.dtype)
    if residual is not None:
        z = z + residual
    return activation.value(act, z)


def work(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
) -> _work.Work:
    """What :func:`bn_act` moves; see :mod:`resnet_fast.ops._work`."""
    parameters = _work.nbytes(scale, shift)
    read = _work.nbytes(x, residual) + parameters
    return _work.Work(read, _work.nbytes(x), parameters=parameters)


def _fake(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
) -> Tensor:
    check(x, scale, shift, residual, act)
    return _checks.empty_output(x, x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift, residual, act = inputs
    from_output = act in activation.FROM_OUTPUT
    needs_x = not from_output or ctx.needs_input_grad[1]
    ctx.save_for_backward(
        x if needs_x else None,
        scale,
        None if from_output else shift,
        None if from_output else residual,
        output if from_output and act != "none" else None,
    )
    ctx.act = act
    ctx.dtype = x.dtype


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, residual, y = ctx.saved_tensors
    need_x, need_scale, need_shift, need_residual = ctx.needs_input_grad[:4]
    wide = _checks.parameter_dtype(ctx.dtype)
    grad_z = grad_y.to(wide)
    if ctx.act not in activation.FROM_OUTPUT:
        z = _checks.affine(x.to(wide), scale, shift)
        if residual is not None:
            z = z + residual
        grad_z = activation.grad(ctx.act, grad_z, z)
    elif y is not None:
        grad_z = activation.grad_from_output(ctx.act, grad_z, y.to(wide))

    grad_x = grad_scale = grad_shift = grad_residual = None
    if need_x:
        grad_x = _checks.affine(grad_z, scale, None).to(ctx.dtype)
    if need_scale:
        grad_scale = (grad_z * x).sum(_checks.but_channels(grad_z))
    if need_shift:
        grad_shift = grad_z.sum(_checks.but_channels(grad_z))
    if need_residual:
        grad_residual = grad_z.to(ctx.dtype)
    return grad_x, grad_scale, grad_shift, grad_residual, None


_REGISTERED = _checks.has_op("bn_act")
if _REGISTERED:
    torch.library.register_fake("resnet_fast::bn_act", _fake)
    torch.library.register_autograd("resnet_fast::bn_act", _backward, setup_context=_setup_context)
