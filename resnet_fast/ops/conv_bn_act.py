"""``conv_bn_act``: convolution, per-channel affine, residual add and activation in one op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast.errors import ArgumentError
from resnet_fast.ops import _checks, _work, activation


class Geometry(NamedTuple):
    """A checked convolution: one entry a spatial dimension, and the shape of the output."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    shape: list[int]


def check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "none",
) -> Geometry:
    """Raise a typed error for arguments that :func:`conv_bn_act` does not accept."""
    _checks.activations("x", x, ranks=(3, 4, 5))
    _checks.like("weight", weight, x)
    activation.check(act)
    if weight.dim() != x.dim():
        raise ArgumentError("weight", f"rank {x.dim()}, as x", f"rank {weight.dim()}")
    spatial = x.dim() - 2
    stride = _checks.integers("stride", stride, spatial, 1)
    padding = _checks.integers("padding", padding, spatial, 0)
    dilation = _checks.integers("dilation", dilation, spatial, 1)
    _checks.integers("groups", groups, 1, 1)

    channels, outputs = x.shape[1], weight.shape[0]
    for dim in range(weight.dim()):
        if weight.shape[dim] < 1:
            raise ArgumentError("weight", "no empty dimension", f"shape {list(weight.shape)}")
    if channels % groups != 0:
        raise ArgumentError("groups", f"a divisor of the {channels} channels of x", groups)
    if outputs % groups != 0:
        raise ArgumentError("groups", f"a divisor of the {outputs} channels of weight", groups)
    if weight.shape[1] * groups != channels:
        raise ArgumentError(
            "weight",
            f"{channels // groups} input channels ({channels} of x in {groups} groups)",
            f"{weight.shape[1]}",
        )

    shape = [x.shape[0], outputs]
    for dim in range(spatial):
        padded = x.shape[2 + dim] + 2 * padding[dim]
        extent = dilation[dim] * (weight.shape[2 + dim] - 1) + 1
        if extent > padded:
            raise ArgumentError(
                "weight",
                f"a dilated kernel within the padded input, {padded}, in spatial dimension {dim}",
                f"{extent}",
            )
        shape.append((padded - extent) // stride[dim] + 1)

    _checks.per_channel("scale", scale, outputs, x)
    _checks.per_channel("shift", shift, outputs, x)
    _checks.same_shape("residual", residual, shape, x)
    return Geometry(stride, padding, dilation, shape)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "none",
) -> Tensor:
    """Convolve, scale and shift each channel, add a residual and apply an activation.

    ``y = act(conv(x, weight) · scale + shift + residual)``

    With ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - mean · scale`` this is a residual
    unit's convolution with batch normalisation in inference (He et al. 2015, "Deep Residual
    Learning for Image Recognition", eq. 1; Ioffe and Szegedy 2015, "Batch Normalization",
    algorithm 2). The weight stays unfolded: sums, scale, shift and residual are fp32 (fp64 for
    fp64) and the result is rounded once.

    Args:
        x: [N, C, H...], one to three spatial dimensions; fp32, fp16, bf16 or fp64. N may be 0.
        weight: [K, C / groups, R...], the dtype of ``x``.
        scale: [K], fp32 (fp64 beside fp64); 1 if absent.
        shift: [K], fp32 (fp64 beside fp64); 0 if absent.
        residual: [N, K, P...], the dtype of ``x``; 0 if absent.
        stride, padding, dilation: an integer, or one a spatial dimension. Padding is with zeros.
        groups: divides C and K.
        act: one of ``resnet_fast.ops.activation.ACTIVATIONS``.

    Returns:
        [N, K, P...] with ``P = (H + 2·padding - dilation·(R - 1) - 1) // stride + 1``, the dtype of
        ``x``, channels-last if ``x`` is, else contiguous. Gradients flow to the five tensors, each
        in its own dtype, per-channel sums in fp32; activations whose derivative does not follow
        from ``y`` (silu, hardswish, gelu) and the gradient of ``scale`` repeat the convolution.

    Raises:
        ArgumentError: a rank, size, value or device that does not fit; it names the argument.
        DTypeError: an unsupported dtype, or dtypes that do not go together.
        LibraryError: the native library is not loaded, or has no kernel for the device of ``x``
            and Triton, which would have one for CUDA, is not installed.
    """
    geometry = check(x, weight, scale, shift, residual, stride, padding, dilation, groups, act)
    if not _REGISTERED:
        _checks.require_op("conv_bn_act")
    return torch.ops.resnet_fast.conv_bn_act.default(
        x,
        weight,
        scale,
        shift,
        residual,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        groups,
        act,
    )


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "none",
) -> Tensor:
    """:func:`conv_bn_act` in plain PyTorch: one op after another, each rounding to ``x.dtype``."""
    conv = {
        3: torch.nn.functional.conv1d,
        4: torch.nn.functional.conv2d,
        5: torch.nn.functional.conv3d,
    }[x.dim()]
    z = conv(x, weight, None, stride, padding, dilation, groups)
    z = _checks.affine(z, scale, shift).to(x.dtype)
    if residual is not None:
        z = z + residual
    return activation.value(act, z)


def work(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "none",
) -> _work.Work:
    """What :func:`conv_bn_act` moves and computes; see :mod:`resnet_fast.ops._work`."""
    geometry = check(x, weight, scale, shift, residual, stride, padding, dilation, groups, act)
    parameters = _work.nbytes(weight, scale, shift)
    seen = _work.window(x, weight.shape[2:], geometry.stride, geometry.padding, geometry.dilation)
    return _work.Work(
        seen + _work.nbytes(residual) + parameters,
        math.prod(geometry.shape) * x.element_size(),
        _work.product_flops(weight, geometry.shape),
        parameters,
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
) -> Tensor:
    geometry = check(x, weight, scale, shift, residual, stride, padding, dilation, groups, act)
    return _checks.empty_output(x, geometry.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, shift, residual, stride, padding, dilation, groups, act = inputs
    from_output = act in activation.FROM_OUTPUT
    ctx.save_for_backward(
        x,
        weight,
        scale,
        None if from_output else shift,
        None if from_output else residual,
        output if from_output and act != "none" else None,
    )
    ctx.geometry = (stride, padding, dilation, False, [0] * len(stride), groups)
    ctx.act = act
    # Gradients of shift and residual need their presence, not their values.
    ctx.present = (scale is not None, shift is not None, residual is not None)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, shift, residual, y = ctx.saved_tensors
    need_x, need_weight, need_scale, need_shift, need_residual = ctx.needs_input_grad[:5]
    wide = _checks.parameter_dtype(x.dtype)
    grad_z = grad_y.to(wide)

    from_output = ctx.act in activation.FROM_OUTPUT
    need_scale = need_scale and ctx.present[0]
    product = None
    if need_scale or not from_output:
        product = torch.ops.aten.convolution(x, weight, None, *ctx.geometry).to(wide)
    if not from_output:
        assert product is not None
        z = _checks.affine(product, scale, shift)
        if residual is not None:
            z = z + residual
        grad_z = activation.grad(ctx.act, grad_z, z)
    elif y is not None:
        grad_z = activation.grad_from_output(ctx.act, grad_z, y.to(wide))

    grad_x = grad_weight = grad_scale = grad_shift = grad_residual = None
    if need_scale:
        assert product is not None
        grad_scale = (grad_z * product).sum(_checks.but_channels(grad_z))
    if need_shift and ctx.present[1]:
        grad_shift = grad_z.sum(_checks.but_channels(grad_z))
    if need_residual and ctx.present[2]:
        grad_residual = grad_z.to(x.dtype)
    if need_x or need_weight:
        grad_product = _checks.affine(grad_z, scale, None).to(x.dtype)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_product, x, weight, None, *ctx.geometry, [need_x, need_weight, False]
        )
    return (
        grad_x,
        grad_weight,
        grad_scale,
        grad_shift,
        grad_residual,
        None,
        None,
        None,
        None,
        None,
    )


_REGISTERED = _checks.has_op("conv_bn_act")
if _REGISTERED:
    torch.library.register_fake("resnet_fast::conv_bn_act", _fake)
    torch.library.register_autograd(
        "resnet_fast::conv_bn_act", _backward, setup_context=_setup_context
    )
