"""``residual_chain``: a residual block's tail and the next block's first convolution in one op."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast.errors import ArgumentError
from resnet_fast.ops import _checks, _several, _work, activation
from resnet_fast.ops.conv_bn_act import reference as _convolution


class Shapes(NamedTuple):
    """Shapes of the block's output and of the next convolution's, None where there is none."""

    y: list[int]
    h: list[int] | None


def _pointwise(
    suffix: str,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    channels: int,
    x: Tensor,
    taps: int = 1,
) -> int:
    """Check one convolution's tensors; its output channels, or ``channels`` where it is absent."""
    if weight is None:
        for name, vector in (("scale", scale), ("shift", shift)):
            if vector is not None:
                raise ArgumentError(name + suffix, f"None without weight{suffix}", "a tensor")
        return channels
    name = f"weight{suffix}"
    _checks.like(name, weight, x)
    found = list(weight.shape)
    if weight.dim() != 4 or found[1:] != [channels, taps, taps] or found[0] < 1:
        raise ArgumentError(name, f"shape [K, {channels}, {taps}, {taps}]", f"{found}")
    _checks.per_channel("scale" + suffix, scale, found[0], x)
    _checks.per_channel("shift" + suffix, shift, found[0], x)
    return found[0]


def check(
    x: Tensor,
    residual: Tensor,
    weight2: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    weight3: Tensor | None = None,
    scale3: Tensor | None = None,
    shift3: Tensor | None = None,
    weight_d: Tensor | None = None,
    scale_d: Tensor | None = None,
    shift_d: Tensor | None = None,
    weight_n: Tensor | None = None,
    scale_n: Tensor | None = None,
    shift_n: Tensor | None = None,
    stride: int = 1,
    stride_d: int = 1,
    act: str = "relu",
) -> Shapes:
    """Raise a typed error for arguments that :func:`residual_chain` does not accept."""
    _checks.activations("x", x, ranks=(4,))
    _checks.like("residual", residual, x)
    activation.check(act)
    if residual.dim() != 4:
        raise ArgumentError("residual", "rank 4", f"rank {residual.dim()}")
    if weight2 is None and weight3 is None:
        raise ArgumentError("weight3", "a tensor where there is no weight2", "None")
    if weight3 is None and weight_n is not None:
        raise ArgumentError("weight_n", "None without weight3", "a tensor")
    for name, step, weight in (("stride", stride, weight2), ("stride_d", stride_d, weight_d)):
        _checks.integers(name, step, 1, 1)
        if weight is None and step != 1:
            raise ArgumentError(name, "1 without its convolution", step)
        if step > 2:
            raise ArgumentError(name, "1 or 2", step)
    images, channels, height, width = x.shape
    if height < 1 or width < 1:
        raise ArgumentError("x", "at least one pixel", f"shape {list(x.shape)}")
    mid = _pointwise("2", weight2, scale2, shift2, channels, x, 3)
    outputs = _pointwise("3", weight3, scale3, shift3, mid, x)
    _pointwise("_d", weight_d, scale_d, shift_d, residual.shape[1], x)
    if weight_d is not None and weight_d.shape[0] != outputs:
        raise ArgumentError("weight_d", f"{outputs} filters", f"{weight_d.shape[0]}")
    following = _pointwise("_n", weight_n, scale_n, shift_n, outputs, x)
    pixels = [(n - 1) // stride + 1 for n in (height, width)]
    if weight_d is None:
        _checks.same_shape("residual", residual, [images, outputs, *pixels], x)
    else:
        found = [residual.shape[0], *((n - 1) // stride_d + 1 for n in residual.shape[2:])]
        if found != [images, *pixels]:
            raise ArgumentError(
                "residual",
                f"{images} images of {pixels[0]} x {pixels[1]} pixels at stride_d {stride_d}",
                f"shape {list(residual.shape)}",
            )
    return Shapes(
        [images, outputs, *pixels], None if weight_n is None else [images, following, *pixels]
    )


def residual_chain(
    x: Tensor,
    residual: Tensor,
    weight2: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    weight3: Tensor | None = None,
    scale3: Tensor | None = None,
    shift3: Tensor | None = None,
    weight_d: Tensor | None = None,
    scale_d: Tensor | None = None,
    shift_d: Tensor | None = None,
    weight_n: Tensor | None = None,
    scale_n: Tensor | None = None,
    shift_n: Tensor | None = None,
    stride: int = 1,
    stride_d: int = 1,
    act: str = "relu",
) -> tuple[Tensor, Tensor]:
    """Finish a residual block, and start the next, without its activations leaving the chip.

    With ``bn2(t) = t · scale2 + shift2``, and its like for the other three,

    ``h2 = act(bn2(conv3x3(x, weight2)))``, ``y = act(bn3(conv1x1(h2, weight3)) + shortcut)``,
    ``h = act(bn_n(conv1x1(y, weight_n)))``

    where ``shortcut`` is ``residual``, or ``bn_d(conv1x1(residual, weight_d))``: the tail of a
    bottleneck (He et al. 2015, "Deep Residual Learning for Image Recognition", figure 5 right)
    whose first convolution gave ``x``, and the first convolution of the block behind it. Without
    ``weight2``, ``x`` is ``h2``. Without ``weight3``, ``y = act(bn2(conv3x3(x, weight2)) +
    shortcut)``: the tail of figure 5 left.

    On CUDA this is one kernel: ``h2`` and the projection are never stored, and ``y`` is multiplied
    as it is stored. Sums, scales, shifts and the shortcut are fp32 (fp64 for fp64); ``h2``, ``y``
    and ``h`` are each rounded once, the projection is not. Elsewhere, and where gradients are
    recorded, it is the layers one by one, and the gradients are theirs.

    Args:
        x: [N, C, H, W]; fp32, fp16, bf16 or fp64. N may be 0.
        residual: [N, K, P, Q], or with ``weight_d`` [N, C', H', W'] with ``P = (H' - 1) //
            stride_d + 1``; the dtype of ``x``, as all weights.
        weight2: [M, C, 3, 3], padding 1; M = C without it.
        weight3: [K, M, 1, 1]; K = M without it.
        weight_d: [K, C', 1, 1], the projection.
        weight_n: [M', K, 1, 1], the next block's first convolution.
        scale2, shift2, scale3, shift3, scale_d, shift_d, scale_n, shift_n: one number a filter,
            fp32 (fp64 beside fp64); 1 and 0 if absent.
        stride: of the 3x3 convolution, 1 or 2; ``P = (H - 1) // stride + 1``.
        stride_d: of the projection, 1 or 2.
        act: one of ``resnet_fast.ops.activation.ACTIVATIONS``.

    Returns:
        ``y`` [N, K, P, Q] and ``h`` [N, M', P, Q], channels-last, the dtype of ``x``; ``h`` is
        empty, of shape [0], without ``weight_n``.

    Raises:
        ArgumentError: a rank, size, value or device that does not fit; it names the argument.
        DTypeError: an unsupported dtype, or dtypes that do not go together.
        LibraryError: the native library is not loaded, or Triton fails on the device of ``x``.
    """
    arguments: tuple[Any, ...] = (
        *(x, residual, weight2, scale2, shift2, weight3, scale3, shift3),
        *(weight_d, scale_d, shift_d, weight_n, scale_n, shift_n, stride, stride_d, act),
    )
    check(*arguments)
    if not _REGISTERED:
        _checks.require_op("residual_chain")
    return torch.ops.resnet_fast.residual_chain.default(*arguments)


def reference(
    x: Tensor,
    residual: Tensor,
    weight2: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    weight3: Tensor | None = None,
    scale3: Tensor | None = None,
    shift3: Tensor | None = None,
    weight_d: Tensor | None = None,
    scale_d: Tensor | None = None,
    shift_d: Tensor | None = None,
    weight_n: Tensor | None = None,
    scale_n: Tensor | None = None,
    shift_n: Tensor | None = None,
    stride: int = 1,
    stride_d: int = 1,
    act: str = "relu",
) -> tuple[Tensor, Tensor]:
    """:func:`residual_chain` in plain PyTorch: one op after another, each rounding to its dtype."""
    if weight_d is not None:
        residual = _convolution(residual, weight_d, scale_d, shift_d, stride=stride_d)
    if weight3 is None:
        assert weight2 is not None
        y = _convolution(x, weight2, scale2, shift2, residual, stride, 1, act=act)
        return y, x.new_empty(0)
    if weight2 is not None:
        x = _convolution(x, weight2, scale2, shift2, None, stride, 1, act=act)
    y = _convolution(x, weight3, scale3, shift3, residual, act=act)
    if weight_n is None:
        return y, x.new_empty(0)
    return y, _convolution(y, weight_n, scale_n, shift_n, act=act)


def work(
    x: Tensor,
    residual: Tensor,
    weight2: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    weight3: Tensor | None = None,
    scale3: Tensor | None = None,
    shift3: Tensor | None = None,
    weight_d: Tensor | None = None,
    scale_d: Tensor | None = None,
    shift_d: Tensor | None = None,
    weight_n: Tensor | None = None,
    scale_n: Tensor | None = None,
    shift_n: Tensor | None = None,
    stride: int = 1,
    stride_d: int = 1,
    act: str = "relu",
) -> _work.Work:
    """What :func:`residual_chain` moves and computes; see :mod:`resnet_fast.ops._work`."""
    arguments: tuple[Any, ...] = (
        *(x, residual, weight2, scale2, shift2, weight3, scale3, shift3),
        *(weight_d, scale_d, shift_d, weight_n, scale_n, shift_n, stride, stride_d, act),
    )
    shapes = check(*arguments)
    images, _, *pixels = shapes.y
    read, flops = _work.nbytes(x), 0
    for weight in (weight2, weight3, weight_d, weight_n):
        if weight is not None:
            flops += _work.product_flops(weight, [images, weight.shape[0], *pixels])
    if weight2 is not None:
        read = _work.window(x, (3, 3), [stride] * 2, (1, 1), (1, 1))
    if weight_d is None:
        read += _work.nbytes(residual)
    else:
        read += _work.window(residual, (1, 1), [stride_d] * 2, (0, 0), (1, 1))
    parameters = _work.nbytes(*arguments[2:14])
    outputs = math.prod(shapes.y) + (0 if shapes.h is None else math.prod(shapes.h))
    return _work.Work(read + parameters, outputs * x.element_size(), flops, parameters)


def _layers(
    x: Tensor,
    residual: Tensor,
    weight2: Tensor | None,
    scale2: Tensor | None,
    shift2: Tensor | None,
    weight3: Tensor | None,
    scale3: Tensor | None,
    shift3: Tensor | None,
    weight_d: Tensor | None,
    scale_d: Tensor | None,
    shift_d: Tensor | None,
    weight_n: Tensor | None,
    scale_n: Tensor | None,
    shift_n: Tensor | None,
    stride: int,
    stride_d: int,
    act: str,
) -> tuple[Tensor, Tensor]:
    """The chain as differentiable ops of this package, one a convolution."""

    def convolve(
        x: Tensor,
        weight: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        act: str,
        residual: Tensor | None = None,
        stride: int = 1,
        padding: int = 0,
    ) -> Tensor:
        return torch.ops.resnet_fast.conv_bn_act.default(
            x, weight, scale, shift, residual, [stride] * 2, [padding] * 2, [1, 1], 1, act
        )

    x = x.contiguous(memory_format=torch.channels_last)
    residual = residual.contiguous(memory_format=torch.channels_last)
    if weight_d is not None:
        residual = convolve(residual, weight_d, scale_d, shift_d, "none", None, stride_d)
    if weight3 is None:
        y = convolve(x, weight2, scale2, shift2, act, residual, stride, 1)
    else:
        if weight2 is not None:
            x = convolve(x, weight2, scale2, shift2, act, None, stride, 1)
        y = convolve(x, weight3, scale3, shift3, act, residual)
    y = y.contiguous(memory_format=torch.channels_last)
    if weight_n is None:
        return y, x.new_empty(0)
    h = convolve(y, weight_n, scale_n, shift_n, act)
    return y, h.contiguous(memory_format=torch.channels_last)


def _fake(
    x: Tensor,
    residual: Tensor,
    weight2: Tensor | None,
    scale2: Tensor | None,
    shift2: Tensor | None,
    weight3: Tensor | None,
    scale3: Tensor | None,
    shift3: Tensor | None,
    weight_d: Tensor | None,
    scale_d: Tensor | None,
    shift_d: Tensor | None,
    weight_n: Tensor | None,
    scale_n: Tensor | None,
    shift_n: Tensor | None,
    stride: int,
    stride_d: int,
    act: str,
) -> tuple[Tensor, Tensor]:
    arguments: tuple[Any, ...] = (
        *(x, residual, weight2, scale2, shift2, weight3, scale3, shift3),
        *(weight_d, scale_d, shift_d, weight_n, scale_n, shift_n, stride, stride_d, act),
    )
    shapes = check(*arguments)

    def empty(shape: list[int]) -> Tensor:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    return empty(shapes.y), x.new_empty(0) if shapes.h is None else empty(shapes.h)


def runs(x: Tensor) -> bool:
    """Whether a CUDA tensor like ``x`` has a kernel of the chain, and not its layers."""
    return _REGISTERED and _several.has_kernel("residual_chain", x)


_REGISTERED = _several.implement("residual_chain", _layers, _fake, "launch_residual_chain")
