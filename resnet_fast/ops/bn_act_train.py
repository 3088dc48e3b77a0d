"""``bn_act_train``: training batch norm, residual add and activation, with its backward op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fast.errors import ArgumentError
from resnet_fast.ops import _checks, _work, activation


def check(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "none",
) -> None:
    """Raise a typed error for arguments that :func:`bn_act_train` does not accept."""
    _checks.activations("x", x, least=2)
    activation.check(act)
    # `not >=` refuses NaN as well.
    if not isinstance(eps, (int, float)) or not eps >= 0 or eps == float("inf"):
        raise ArgumentError("eps", "a finite number, 0 or more", repr(eps))
    _checks.per_channel("weight", weight, x.shape[1], x)
    _checks.per_channel("bias", bias, x.shape[1], x)
    _checks.same_shape("residual", residual, x.shape, x)
    values = x.shape[0]
    for size in x.shape[2:]:
        values = values * size
    if x.shape[1] < 1:
        raise ArgumentError("x", "one channel or more", f"shape {list(x.shape)}")
    if values < 2:
        raise ArgumentError("x", "more than one value per channel", f"shape {list(x.shape)}")


def bn_act_train(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each channel by the batch's statistics, add a residual and apply an activation.

    ``y = act((x - mean) · rstd · weight + bias + residual)`` with ``rstd = 1 / sqrt(var + eps)``

    Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1; the statistics are over all
    dimensions but the channels, and ``var`` is the biased one. Computed in fp32 (fp64 for fp64) and
    rounded once. Running statistics are the caller's: ``mean`` is theirs as it is, and their
    unbiased variance is ``(1 / rstd² - eps) · m / (m - 1)`` for m values a channel.

    Args:
        x: [N, C, ...], rank 2 or more, at least two values a channel; fp32, fp16, bf16 or fp64.
        weight: [C], gamma, fp32 (fp64 beside fp64); 1 if absent.
        bias: [C], beta, fp32 (fp64 beside fp64); 0 if absent.
        residual: the shape and dtype of ``x``; 0 if absent.
        eps: added to the variance.
        act: one of ``resnet_fast.ops.activation.ACTIVATIONS``.

    Returns:
        ``y`` of the shape and dtype of ``x``, channels-last if ``x`` is, else contiguous; ``mean``
        and ``rstd`` of shape [C] in fp32 (fp64 for fp64). Gradients flow from ``y`` to the four
        tensors, through the statistics, each in its own dtype; ``mean`` and ``rstd`` themselves are
        marked as not differentiable.

    Raises:
        ArgumentError: a rank, size, value or device that does not fit; it names the argument.
        DTypeError: an unsupported dtype, or dtypes that do not go together.
        LibraryError: the native library is not loaded, or ``x`` is on a CUDA device and the CUDA
            library is not.
    """
    check(x, weight, bias, residual, eps, act)
    if not _REGISTERED:
        _checks.require_op("bn_act_train")
    return torch.ops.resnet_fast.bn_act_train.default(x, weight, bias, residual, eps, act)


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`bn_act_train` in plain PyTorch: one op after another, each rounding to ``x.dtype``."""
    z = torch.nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    if residual is not None:
        z = z + residual
    wide = x.detach().to(_checks.parameter_dtype(x.dtype))
    var, mean = torch.var_mean(wide, _checks.but_channels(x), correction=0)
    return activation.value(act, z), mean, torch.rsqrt(var + eps)


def work(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "none",
) -> list[_work.Work]:
    """What :func:`bn_act_train` moves on CUDA, pass by pass (csrc/cuda/bn_act_train.cuh).

    One pass measures, a small kernel joins its partial sums, one pass normalises. The partial sums,
    whose number is the device's and no shape's, are left out: a few kilobytes a block.
    """
    statistics = 2 * _work.nbytes(_statistic(x))
    parameters = statistics + _work.nbytes(weight, bias)
    return [
        _work.Work(_work.nbytes(x), 0),
        _work.Work(0, statistics),
        _work.Work(_work.nbytes(x, residual) + parameters, _work.nbytes(x), 0, parameters),
    ]


def work_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: str,
) -> list[_work.Work]:
    """The same for the backward: one pass for the sums, a small kernel, one for the gradients.

    Both passes read the gradient, x and the residual, which the activation's slope depends on.
    ``grad_z`` is the residual's gradient, and written where there is one.
    """
    parameters = _work.nbytes(mean, rstd, weight, bias)
    seen = _work.nbytes(grad_y, x, None if act == "none" else residual) + parameters
    sums = _work.nbytes(mean, rstd)
    return [
        _work.Work(seen, 0, 0, parameters),
        _work.Work(0, 2 * sums),
        _work.Work(seen + sums, _work.nbytes(x, residual), 0, parameters),
    ]


def _statistic(x: Tensor) -> Tensor:
    return torch.empty([x.shape[1]], dtype=_checks.parameter_dtype(x.dtype), device=x.device)


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check(x, weight, bias, residual, eps, act)
    return _checks.empty_output(x, x.shape), _statistic(x), _statistic(x)


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(x, weight, bias, residual, 0.0, act)
    _checks.same_shape("grad_y", grad_y, x.shape, x)
    _checks.per_channel("mean", mean, x.shape[1], x)
    _checks.per_channel("rstd", rstd, x.shape[1], x)
    grad_x = _checks.empty_output(x, x.shape)
    # The residual's gradient; nothing is written for one that is not there.
    grad_z = x.new_empty([0]) if residual is None else _checks.empty_output(x, x.shape)
    return grad_x, _statistic(x), _statistic(x), grad_z


def keep_for_backward(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    act: str,
) -> None:
    """Keep what :func:`gradients` needs."""
    # The residual and the bias enter the derivative through the activation alone.
    linear = act == "none"
    ctx.save_for_backward(
        x, weight, None if linear else bias, None if linear else residual, mean, rstd
    )
    ctx.eps, ctx.act = eps, act


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, eps, act = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    # Theirs would be filled with zeros, in a kernel each.
    ctx.set_materialize_grads(False)
    keep_for_backward(ctx, x, weight, bias, residual, mean, rstd, eps, act)


def _differentiable_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward op in plain PyTorch, from ``x`` alone, for derivatives of the derivatives."""
    dims, wide = _checks.but_channels(x), _checks.parameter_dtype(x.dtype)
    var, mean = torch.var_mean(x.to(wide), dims, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    normal = (x.to(wide) - mean) * rstd
    z = _checks.affine(normal, weight, bias)
    if residual is not None:
        z = z + residual
    grad_z = activation.grad(act, grad_y.to(wide), z)
    grad_normal = _checks.affine(grad_z, weight, None)
    along = grad_normal.mean(dims, keepdim=True)
    across = (grad_normal * normal).mean(dims, keepdim=True)
    grad_x = rstd * (grad_normal - along - normal * across)
    return (
        grad_x.to(x.dtype),
        (grad_z * normal).sum(dims),
        grad_z.sum(dims),
        grad_z.to(x.dtype),
    )


def gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x, weight, bias and residual, by what :func:`keep_for_backward` has kept."""
    if torch.is_grad_enabled():  # create_graph: the backward op has no derivative of its own
        x, weight, bias, residual = ctx.saved_tensors[:4]
        return _differentiable_backward(grad_y, x, weight, bias, residual, ctx.eps, ctx.act)
    grad_x, grad_weight, grad_bias, grad_z = torch.ops.resnet_fast._bn_act_train_backward.default(
        grad_y, *ctx.saved_tensors, ctx.act
    )
    # Without an activation the residual is not kept, and its gradient is the one that arrives.
    return grad_x, grad_weight, grad_bias, grad_y if ctx.act == "none" else grad_z


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_mean: Tensor | None, grad_rstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 6
    needed = zip(gradients(ctx, grad_y), ctx.needs_input_grad[:4], strict=True)
    return *(grad if need else None for grad, need in needed), None, None


_REGISTERED = _checks.has_op("bn_act_train") and _checks.has_op("_bn_act_train_backward")
if _REGISTERED:
    torch.library.register_fake("resnet_fast::bn_act_train", _fake)
    torch.library.register_fake("resnet_fast::_bn_act_train_backward", _fake_backward)
    torch.library.register_autograd(
        "resnet_fast::bn_act_train", _backward, setup_context=_setup_context
    )
    for _op in ("bn_act_train", "_bn_act_train_backward"):
        _checks.refuse_cuda(_op, f"{_checks.why_no_kernel()}. Use torch.nn.functional.batch_norm")
