"""``norm_act``: training batch norm by statistics that are known, residual add and activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fast.errors import ArgumentError
from resnet_fast.ops import _checks, _work, activation
from resnet_fast.ops.bn_act_train import _differentiable_backward
from resnet_fast.ops.bn_act_train import check as _check_training


def check(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "none",
) -> None:
    """Raise a typed error for arguments that :func:`norm_act` does not accept."""
    _check_training(x, weight, bias, residual, eps, act)
    for name, value in (("mean", mean), ("rstd", rstd)):
        _checks.tensor(name, value)
        _checks.per_channel(name, value, x.shape[1], x)
        if value.requires_grad:
            raise ArgumentError(name, "a statistic of x, without a gradient of its own", "a leaf")


def norm_act(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "none",
) -> Tensor:
    """:func:`resnet_fast.ops.bn_act_train` where the statistics of ``x`` are known already.

    ``y = act((x - mean) · rstd · weight + bias + residual)``

    ``mean`` and ``rstd = 1 / sqrt(var + eps)`` must be those of ``x`` itself, as
    :func:`resnet_fast.ops.conv_stats` returns them: the gradient flows through them (Ioffe and
    Szegedy 2015, "Batch Normalization", algorithm 1), and other values would make it wrong.

    Args:
        x: [N, C, ...], at least two values a channel; fp32, fp16, bf16 or fp64.
        mean, rstd: [C], fp32 (fp64 beside fp64), without a gradient of their own.
        weight, bias: [C], gamma and beta, fp32 (fp64 beside fp64); 1 and 0 if absent.
        residual: the shape and dtype of ``x``; 0 if absent.
        eps: what ``rstd`` was computed with; derivatives of the derivatives need it.
        act: one of ``resnet_fast.ops.activation.ACTIVATIONS``.

    Returns:
        ``y`` of the shape and dtype of ``x``, channels-last if ``x`` is, else contiguous. Gradients
        flow to x, weight, bias and residual.

    Raises:
        ArgumentError, DTypeError: an argument that does not fit; it is named.
        LibraryError: the native library is not loaded.
    """
    check(x, mean, rstd, weight, bias, residual, eps, act)
    if not _REGISTERED:
        _checks.require_op("norm_act")
    return torch.ops.resnet_fast.norm_act.default(x, mean, rstd, weight, bias, residual, eps, act)


def reference(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "none",
) -> Tensor:
    """:func:`norm_act` in plain PyTorch; rounded behind the batch norm and behind the sum."""
    centred = x.to(mean.dtype) - _checks.along_channels(mean, x)
    z = _checks.affine(centred, rstd if weight is None else rstd * weight, bias).to(x.dtype)
    if residual is not None:
        z = z + residual
    return activation.value(act, z)


def work(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "none",
) -> _work.Work:
    """What :func:`norm_act` moves; see :mod:`resnet_fast.ops._work`."""
    parameters = _work.nbytes(mean, rstd, weight, bias)
    return _work.Work(_work.nbytes(x, residual) + parameters, _work.nbytes(x), 0, parameters)


def layers(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    """In fp32 (fp64 for fp64) and rounded once, as the CUDA kernel does."""
    z = x.to(mean.dtype) - _checks.along_channels(mean, x)
    z = _checks.affine(z, rstd if weight is None else rstd * weight, bias)
    if residual is not None:
        z = z + residual
    layout = _checks.channels_last(x) or torch.contiguous_format
    return activation.value(act, z).to(x.dtype).contiguous(memory_format=layout)


def _fake(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    check(x, mean, rstd, weight, bias, residual, eps, act)
    return _checks.empty_output(x, x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, rstd, weight, bias, residual, eps, act = inputs
    # The residual and the bias enter the derivative through the activation alone.
    linear = act == "none"
    ctx.save_for_backward(
        x, weight, None if linear else bias, None if linear else residual, mean, rstd
    )
    ctx.eps, ctx.act = eps, act


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph: the backward op has no derivative of its own
        x, weight, bias, residual = ctx.saved_tensors[:4]
        grads = _differentiable_backward(grad_y, x, weight, bias, residual, ctx.eps, ctx.act)
    else:
        grads = torch.ops.resnet_fast._bn_act_train_backward.default(
            grad_y, *ctx.saved_tensors, ctx.act
        )
    grad_x, grad_weight, grad_bias, grad_residual = grads
    need = ctx.needs_input_grad
    return (
        grad_x if need[0] else None,
        None,
        None,
        grad_weight if need[3] else None,
        grad_bias if need[4] else None,
        grad_residual if need[5] else None,
        None,
        None,
    )


_REGISTERED = _checks.has_op("norm_act")
if _REGISTERED:
    torch.library.register_fake("resnet_fast::norm_act", _fake)
    torch.library.register_autograd(
        "resnet_fast::norm_act", _backward, setup_context=_setup_context
    )
    torch.library.impl("resnet_fast::norm_act", "CPU", layers)
    if _checks.lacks_cuda("norm_act"):
        torch.library.impl("resnet_fast::norm_act", "CUDA", layers)
