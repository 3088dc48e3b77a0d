"""``conv_bn_act`` on 8-bit operands (CPU).

A :class:`Grid` says how a tensor of uint8 stands for real numbers. Weights are int8, symmetric,
with a scale a filter; sums are exact in 32 bits, and scale, shift, residual and activation are
applied in fp32 before the result is put on its own grid (Jacob et al. 2018, "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 2). Nothing
here is a candidate of a plan: 8 bits are used where they were asked for, and nowhere else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fast.ops import _checks, activation
from resnet_fast.ops._pack import Layer, PackedCall, cached, fold

#: Activations that are a clamp: their scale and shift are on the output's grid already.
_CLAMPS = ("none", "relu", "relu6")

#: Products that a sum of 32 bits holds (``csrc/cpu/int8.h``).
MAX_DEPTH = 2**31 // (255 * 128)


class Grid(NamedTuple):
    """What a tensor of uint8 stands for: ``scale * (q - zero)``."""

    scale: float
    zero: int

    @classmethod
    def over(cls, low: float, high: float) -> Grid:
        """The grid from ``low`` to ``high``, widened to hold 0 exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255
        if scale < torch.finfo(torch.float32).tiny:
            return cls(1.0, 0)
        return cls(scale, round(-low / scale))


class Affine(NamedTuple):
    """What an 8-bit convolution takes beside its input: see :func:`derive`."""

    packed: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: float
    inverse: float


class Int8Layer(Layer):
    """A :class:`Layer` over bytes: its constants have the grids as a fifth tensor."""

    grids: Tensor

    def constants(self) -> list[Tensor]:
        """Packed weight, weight, scale, shift, grids."""
        assert self.scale is not None and self.shift is not None
        return [self.packed, self.weight, self.scale, self.shift, self.grids]


def available() -> bool:
    """Whether the CPU library has the 8-bit ops."""
    return _checks.has_op("_int8_conv")


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """``x`` (fp32, N C H W) as uint8 on ``grid``, channels-last, ties to even; NaN becomes the
    lowest value."""
    return torch.ops.resnet_fast._int8_quantize(x, 1 / grid.scale, grid.zero)


def dequantize(q: Tensor, grid: Grid) -> Tensor:
    """What ``q`` (uint8, N C H W) on ``grid`` stands for, in fp32, channels-last."""
    return torch.ops.resnet_fast._int8_dequantize(q, grid.scale, grid.zero)


def mean(q: Tensor, grid: Grid) -> Tensor:
    """The mean over each image of what ``q`` (uint8, N C H W) stands for: fp32, N C 1 1."""
    return torch.ops.resnet_fast._int8_mean(q, grid.scale, grid.zero)


class Linear(NamedTuple):
    """What an 8-bit linear layer takes beside its input; the result is fp32."""

    packed: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor


def linear_constants(weight: Tensor, bias: Tensor | None, x: Grid, x_mean: Tensor) -> Linear:
    """``weight`` (K C) and ``bias`` for an input on ``x``, kept for as long as they stay so.

    ``x_mean`` is the mean of each feature, as :func:`derive` takes it.
    """

    def build() -> Linear:
        wide = weight.detach()[:, :, None, None]
        made = derive(
            wide, bias, None, None, None, None, 0.0, 1, "none", x, None, Grid(1.0, 0), x_mean
        )
        return Linear(made.packed, made.weight, made.scale, made.shift)

    return cached(("int8 linear", x), (weight, bias, x_mean), build)


def linear(x: Tensor, grid: Grid, constants: Linear) -> Tensor:
    """The layer for ``x`` (fp32, N C), which is put on ``grid``: fp32, N K."""
    q = quantize(x[:, :, None, None], grid)[:, :, 0, 0]
    return torch.ops.resnet_fast._int8_linear(q, *constants)


def linear_deviation(x: Tensor, grid: Grid, constants: Linear) -> float:
    """How far :func:`linear` is from fp64 at ``x``, in units of what rounding allows."""
    q = quantize(x[:, :, None, None], grid)[:, :, 0, 0].double()
    product = q @ constants.weight[:, :, 0, 0].double().T * constants.scale.double()
    shift = constants.shift.double()
    error = (linear(x, grid, constants).double() - product - shift).abs()
    allowed = 4 * torch.finfo(torch.float32).eps * (product.abs() + shift.abs())
    return float((error / allowed.clamp(min=1e-30)).max()) if error.numel() else 0.0


def fits_linear(features: int) -> bool:
    """Whether an 8-bit linear layer takes so many features: whole fours, and 32-bit sums."""
    return features % 4 == 0 and features <= MAX_DEPTH


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values in -127 to 127 (K C/g R S) and the scale of each filter (K, fp64)."""
    wide = weight.detach().double()
    scale = wide.abs().amax((1, 2, 3)) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (wide / scale.view(-1, 1, 1, 1)).round().to(torch.int8), scale


def derive(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    groups: int,
    act: str,
    x: Grid,
    residual: Grid | None,
    y: Grid,
    x_mean: Tensor | None,
) -> Affine:
    """What the op multiplies and adds so that ``y``'s grid holds ``act(BN(conv) + residual)``.

    Args:
        weight, bias, bn_weight, bn_bias, mean, var, eps: of the convolution and its norm.
        groups: of the convolution.
        act: the activation.
        x, residual, y: the grids.
        x_mean: the mean of each channel of the real input, or None. What rounding the weights
            shifts the output by at such an input is taken off the shift (Nagel et al. 2019,
            "Data-Free Quantization Through Weight Equalization and Bias Correction").
    """
    scale, shift = fold(bias, bn_weight, bn_bias, mean, var, eps, torch.float64)
    filters = weight.shape[0]
    scale = torch.ones(filters, dtype=torch.float64) if scale is None else scale
    shift = torch.zeros(filters, dtype=torch.float64) if shift is None else shift
    q, w_scale = quantize_weight(weight)
    if x_mean is not None:
        error = (q.double() * w_scale.view(-1, 1, 1, 1) - weight.detach().double()).sum((2, 3))
        means = x_mean.double().view(groups, -1).repeat_interleave(filters // groups, 0)
        shift = shift - scale * (error * means).sum(1)
    factor = scale * w_scale * x.scale
    offset = shift - factor * x.zero * q.double().sum((1, 2, 3))
    added = 0.0
    if residual is not None:
        added = residual.scale
        offset = offset - residual.scale * residual.zero
    inverse = 1 / y.scale
    if act in _CLAMPS:
        factor, offset, added = factor * inverse, offset * inverse + y.zero, added * inverse
    packed = torch.ops.resnet_fast._int8_weight(q, groups)
    return Affine(packed, q, factor.float(), offset.float(), added, inverse)


def prepare(
    tensors: tuple[
        Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
    ],
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
    x: Grid,
    residual: Grid | None,
    y: Grid,
    x_mean: Tensor | None,
) -> PackedCall:
    """The call of an 8-bit convolution, weights packed: call it with input and residual (uint8).

    Args:
        tensors: weight, bias, bn_weight, bn_bias, mean, var, fp32.
        eps: of the norm.
        stride, padding, dilation, groups, act: as :func:`resnet_fast.ops.conv_bn_act` takes them.
        x, residual, y, x_mean: as :func:`derive` takes them.
    """
    made = cached(
        ("int8", eps, groups, act, x, residual, y),
        (*tensors, x_mean),
        lambda: derive(*tensors, eps, groups, act, x, residual, y, x_mean),
    )
    layer = Int8Layer("direct", made.packed, made.weight, made.scale, made.shift)
    layer.grids = torch.tensor([x.zero, made.residual, made.inverse, y.zero], dtype=torch.float32)
    return PackedCall(
        torch.ops.resnet_fast._int8_conv.default,
        (made.packed, made.weight, made.scale, made.shift),
        (
            *(stride, padding, dilation, groups, act),
            *(x.zero, made.residual, made.inverse, y.zero),
        ),
        layer,
    )


def deviation(call: PackedCall, x: Tensor, residual: Tensor | None, y: Tensor) -> float:
    """How far ``y`` is from what ``call`` should give, in units of what rounding allows.

    The reference is computed in fp64 from the bytes and the constants themselves; a value is
    allowed half a step of the grid, and what fp32 rounds in the epilogue. Up to 1 is right.
    """
    stride, padding, dilation, groups, act, zero, factor, inverse, out_zero = call.after
    _, weight, scale, shift = call.before
    wide = F.conv2d(x.double() - zero, weight.double(), None, stride, padding, dilation, groups)
    # The op's sums are over x itself: what lies outside the image holds `zero`.
    wide += (zero * weight.double().sum((1, 2, 3))).view(1, -1, 1, 1)
    product = wide * scale.double().view(1, -1, 1, 1)
    value = product + shift.double().view(1, -1, 1, 1)
    size = product.abs() + shift.double().abs().view(1, -1, 1, 1)
    if residual is not None:
        value = value + residual.double() * factor
        size = size + residual.double() * factor
    if act in _CLAMPS:
        low, high = 0 if act == "none" else out_zero, 255.0
        if act == "relu6":
            high = min(255.0, out_zero + 6 * inverse)
        value = value.clamp(max(0, low), high)
    else:
        value = (activation.value(act, value) * inverse + out_zero).clamp(0, 255)
        size = size * inverse + out_zero
    allowed = 0.5 + 8 * torch.finfo(torch.float32).eps * (size + 255)
    return float(((y.double() - value).abs() / allowed).max()) if y.numel() else 0.0


if available():

    @torch.library.register_fake("resnet_fast::_int8_conv")
    def _fake(
        x: Tensor,
        packed: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        act: str,
        zero: int,
        residual_scale: float,
        inverse: float,
        out_zero: int,
    ) -> Tensor:
        out = [
            (n + 2 * p - d * (r - 1) - 1) // s + 1
            for n, p, d, r, s in zip(
                x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
            )
        ]
        return x.new_empty((x.shape[0], weight.shape[0], *out)).to(
            memory_format=torch.channels_last
        )

    @torch.library.register_fake("resnet_fast::_int8_dequantize")
    def _fake_dequantize(x: Tensor, scale: float, zero: int) -> Tensor:
        return x.new_empty(x.shape, dtype=torch.float32).to(memory_format=torch.channels_last)

    @torch.library.register_fake("resnet_fast::_int8_mean")
    def _fake_mean(x: Tensor, scale: float, zero: int) -> Tensor:
        return x.new_empty((*x.shape[:2], 1, 1), dtype=torch.float32)

    @torch.library.register_fake("resnet_fast::_int8_linear")
    def _fake_linear(
        x: Tensor, packed: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
    ) -> Tensor:
        return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)

    @torch.library.register_fake("resnet_fast::_int8_quantize")
    def _fake_quantize(x: Tensor, inverse: float, zero: int) -> Tensor:
        return x.new_empty(x.shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
