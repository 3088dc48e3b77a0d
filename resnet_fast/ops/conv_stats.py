"""``conv_stats``: a convolution and the batch statistics of its output, for training.

With :func:`resnet_fast.ops.norm_act` behind it this is a convolution under batch norm: the pass
that reads the convolution's output only to measure it is not made. With a batch norm in front,
whose output only this convolution reads, that output need not be stored: a bottleneck of a ResNet
is three ``conv_stats`` and one ``norm_act``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fast.errors import ArgumentError
from resnet_fast.ops import _checks, _work, conv_bn_act_cuda
from resnet_fast.ops.conv_bn_act import Geometry
from resnet_fast.ops.conv_bn_act import check as _check_conv
from resnet_fast.ops.norm_act import check as _check_norm
from resnet_fast.ops.norm_act import layers as _normalise

_CONV = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}


def check(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    bn_eps: float = 1e-5,
    act: str = "none",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
) -> Geometry:
    """Raise a typed error for arguments that :func:`conv_stats` does not accept."""
    geometry = _check_conv(x, weight, None, None, None, stride, padding, dilation, groups, act)
    if (mean is None) != (rstd is None):
        raise ArgumentError("rstd", "mean and rstd both, or neither", "one of them")
    if mean is not None and rstd is not None:
        _check_norm(x, mean, rstd, bn_weight, bn_bias, None, bn_eps, act)
    elif bn_weight is not None or bn_bias is not None or act != "none":
        raise ArgumentError("mean", "the statistics of x beside bn_weight, bn_bias or act", "None")
    if not isinstance(eps, (int, float)) or not eps >= 0 or eps == float("inf"):
        raise ArgumentError("eps", "a finite number, 0 or more", repr(eps))
    if math.prod(geometry.shape) < 2 * geometry.shape[1]:
        raise ArgumentError("x", "more than one output per channel", f"{geometry.shape}")
    return geometry


def conv_stats(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    bn_eps: float = 1e-5,
    act: str = "none",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve, and measure each channel of the result; optionally normalise what is convolved.

    ``z = conv(act((x - mean) · rstd · bn_weight + bn_bias), weight)``, without mean ``conv(x,
    weight)``; ``mean_z`` and ``rstd_z = 1 / sqrt(var(z) + eps)`` over all dimensions but the
    channels, ``var`` the biased one, of ``z`` as it is rounded (Ioffe and Szegedy 2015, "Batch
    Normalization", algorithm 1).

    On CUDA one tensor-core kernel, where the native library is loaded, for fp16 and bf16, and fp32
    where torch allows TF32: the statistics come from its epilogue, the batch norm in front is
    applied as operands are loaded. Elsewhere the layers one by one.

    Args:
        x: [N, C, H...], one to three spatial dimensions; fp32, fp16, bf16 or fp64.
        weight: [K, C / groups, R...], the dtype of ``x``.
        mean, rstd: [C], fp32 (fp64 beside fp64), the statistics of ``x`` itself, through which the
            gradient flows; together, or neither.
        bn_weight, bn_bias: [C], fp32 (fp64 beside fp64); 1 and 0 if absent.
        bn_eps: what ``rstd`` was computed with.
        act: applied to the normalised ``x``; one of ``resnet_fast.ops.activation.ACTIVATIONS``.
        stride, padding, dilation, groups: as :func:`resnet_fast.ops.conv_bn_act`; padding is with
            zeros, of the activated ``x``.
        eps: added to the variance of ``z``.

    Returns:
        ``z`` [N, K, P...] of the dtype of ``x``, channels-last if ``x`` is, else contiguous;
        ``mean_z`` and ``rstd_z`` [K] in fp32 (fp64 for fp64), not differentiable: what follows by
        them passes its gradient to ``z`` (``norm_act``, or another ``conv_stats``).

    Raises:
        ArgumentError, DTypeError: an argument that does not fit; it is named.
        LibraryError: the native library is not loaded.
    """
    norm = (mean, rstd, bn_weight, bn_bias, bn_eps, act)
    geometry = check(x, weight, *norm, stride, padding, dilation, groups, eps)
    if not _REGISTERED:
        _checks.require_op("conv_stats")
    return torch.ops.resnet_fast.conv_stats.default(
        x, weight, *norm, geometry.stride, geometry.padding, geometry.dilation, groups, eps
    )


def layers(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    bn_eps: float = 1e-5,
    act: str = "none",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`conv_stats` one layer after another: the specification."""
    if mean is not None and rstd is not None:
        x = _normalise(x, mean, rstd, bn_weight, bn_bias, None, bn_eps, act)
    layout = _checks.channels_last(x) or torch.contiguous_format
    z = _CONV[x.dim()](x, weight, None, stride, padding, dilation, groups)
    z = z.contiguous(memory_format=layout)
    wide = z.to(_checks.parameter_dtype(z.dtype))
    var, mean_z = torch.var_mean(wide, _checks.but_channels(z), correction=0)
    return z, mean_z, torch.rsqrt(var + eps)


reference = layers

# As csrc/cuda/conv_stats_launch.h has them: bytes of a moment, pixels that one of each filter is of
# (layers too small to fill a GPU have tiles of 64, and twice as many), and how many a kernel joins.
_MOMENT, _PIXELS, _JOINED = 16, 128, 64


def work(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    bn_eps: float = 1e-5,
    act: str = "none",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
) -> list[_work.Work]:
    """What :func:`conv_stats` moves and computes; see :mod:`resnet_fast.ops._work`.

    The convolution writes z and the partial moments of its tiles; each further kernel reads some of
    these and joins them, the last one to the statistics.
    """
    norm = (mean, rstd, bn_weight, bn_bias, bn_eps, act)
    geometry = check(x, weight, *norm, stride, padding, dilation, groups, eps)
    parameters = _work.nbytes(weight, mean, rstd, bn_weight, bn_bias)
    seen = _work.window(x, weight.shape[2:], geometry.stride, geometry.padding, geometry.dilation)
    filters, size = geometry.shape[1], math.prod(geometry.shape)
    count = -(-size // filters // _PIXELS)
    flops = _work.product_flops(weight, geometry.shape)
    z = size * x.element_size() + _MOMENT * filters * count
    kernels = [_work.Work(seen + parameters, z, flops, parameters)]
    while count > _JOINED:
        joined = -(-count // _JOINED)
        kernels.append(_work.Work(_MOMENT * filters * count, _MOMENT * filters * joined))
        count = joined
    kernels.append(_work.Work(_MOMENT * filters * count, 2 * 4 * filters))
    return kernels


def has_kernel(x: Tensor, weight: Tensor, normalises: bool) -> bool:
    """Whether the CUDA library's kernel runs for these tensors, a batch norm in front or none."""
    if not _CUDA or x.device.type != "cuda" or not takes(x, weight, normalises):
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def takes(x: Tensor, weight: Tensor, normalises: bool) -> bool:
    """Whether the kernel is one for tensors of these shapes and dtypes, wherever they are."""
    if x.dim() != 4 or x.dtype is torch.float64:
        return False
    if max(weight.shape[2:]) > conv_bn_act_cuda.MAX_FILTER or x.shape[0] == 0:
        return False
    if x.dtype is torch.float32 and not _checks.tf32_allowed():
        return False
    # A batch norm in front is applied to 16 bytes of channels at a time.
    return not normalises or weight.shape[1] * x.element_size() % 16 == 0


def _on_cuda(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    bn_eps: float,
    act: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = (mean, rstd, bn_weight, bn_bias)
    geometry = (stride, padding, dilation, groups)
    if not has_kernel(x, weight, mean is not None):
        return layers(x, weight, *norm, bn_eps, act, *geometry, eps)
    return torch.ops.resnet_fast._conv_stats_cuda(x, weight, *norm, act, *geometry, eps, "")


def _fake(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    bn_eps: float,
    act: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = (mean, rstd, bn_weight, bn_bias, bn_eps, act)
    geometry = check(x, weight, *norm, stride, padding, dilation, groups, eps)
    statistics = [
        torch.empty([geometry.shape[1]], dtype=_checks.parameter_dtype(x.dtype), device=x.device)
        for _ in range(2)
    ]
    return _checks.empty_output(x, geometry.shape), statistics[0], statistics[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, mean, rstd, bn_weight, bn_bias, bn_eps, act = inputs[:8]
    ctx.mark_non_differentiable(output[1], output[2])
    # Theirs would be filled with zeros, in a kernel each.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, rstd, bn_weight, bn_bias)
    ctx.bn_eps, ctx.act = bn_eps, act
    ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs[8:12]


def _backward(
    ctx: Any, grad_z: Tensor | None, grad_mean: Tensor | None, grad_rstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_z is None:
        return (None,) * 13
    x, weight, mean, rstd, bn_weight, bn_bias = ctx.saved_tensors
    need_x, need_weight, _, _, need_bn_weight, need_bn_bias = ctx.needs_input_grad[:6]
    normalises = mean is not None
    # What was multiplied is computed again rather than kept.
    operand = x
    if normalises:
        norm = (mean, rstd, bn_weight, bn_bias, None, ctx.bn_eps, ctx.act)
        operand = torch.ops.resnet_fast.norm_act(x, *norm)
    need_operand = need_x or (normalises and (need_bn_weight or need_bn_bias))
    grad_operand, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_z,
        operand,
        weight,
        None,
        ctx.stride,
        ctx.padding,
        ctx.dilation,
        False,
        [0] * len(ctx.stride),
        ctx.groups,
        [need_operand, need_weight, False],
    )
    grad_x, grad_bn_weight, grad_bn_bias = grad_operand, None, None
    if normalises and need_operand:
        if torch.is_grad_enabled():  # create_graph: the backward op has no derivative of its own
            leaves = [t for t in (x, bn_weight, bn_bias) if t is not None]
            wanted = [t for t in leaves if t.requires_grad]
            grads = torch.autograd.grad(operand, wanted, grad_operand, create_graph=True)
            found = {id(t): grad for t, grad in zip(wanted, grads, strict=True)}
            grad_x, grad_bn_weight, grad_bn_bias = (
                None if t is None else found.get(id(t)) for t in (x, bn_weight, bn_bias)
            )
        else:
            grad_x, grad_bn_weight, grad_bn_bias, _ = (
                torch.ops.resnet_fast._bn_act_train_backward.default(
                    grad_operand, x, bn_weight, bn_bias, None, mean, rstd, ctx.act
                )
            )
    return (
        grad_x if need_x else None,
        grad_weight,
        None,
        None,
        grad_bn_weight if need_bn_weight else None,
        grad_bn_bias if need_bn_bias else None,
        *[None] * 7,
    )


_CUDA = _checks.has_op("_conv_stats_cuda") and not _checks.lacks_cuda("_conv_stats_cuda")
_REGISTERED = _checks.has_op("conv_stats")
if _REGISTERED:
    torch.library.register_fake("resnet_fast::conv_stats", _fake)
    torch.library.register_autograd(
        "resnet_fast::conv_stats", _backward, setup_context=_setup_context
    )
    torch.library.impl("resnet_fast::conv_stats", "CPU", layers)
    torch.library.impl("resnet_fast::conv_stats", "CUDA", _on_cuda)
