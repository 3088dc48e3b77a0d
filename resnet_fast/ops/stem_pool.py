"""``stem_pool``: the stem of a residual network, from raw image to pooled map, in one op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_fast.errors import ArgumentError, DTypeError
from resnet_fast.ops import _checks, _several, _work, activation

MAX_CHANNELS = 4


def check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    act: str = "none",
) -> list[int]:
    """Raise a typed error for arguments that :func:`stem_pool` does not accept; y's shape."""
    _checks.tensor("x", x)
    if x.dtype is not torch.uint8:
        _checks.activations("x", x)
    if x.dim() != 4 or not 1 <= x.shape[1] <= MAX_CHANNELS:
        raise ArgumentError("x", f"shape [N, 1 to {MAX_CHANNELS}, H, W]", f"{list(x.shape)}")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ArgumentError("x", "no empty row or column", f"shape {list(x.shape)}")
    _checks.activations("weight", weight)
    if weight.device != x.device:
        raise ArgumentError("weight", f"a tensor on {x.device}, as x", f"one on {weight.device}")
    channels = x.shape[1]
    if weight.dim() != 4 or weight.shape[0] < 1 or list(weight.shape[1:]) != [channels, 7, 7]:
        raise ArgumentError("weight", f"shape [K, {channels}, 7, 7]", f"{list(weight.shape)}")
    _vector("scale", scale, weight.shape[0], weight)
    _vector("shift", shift, weight.shape[0], weight)
    _vector("input_scale", input_scale, channels, weight)
    _vector("input_shift", input_shift, channels, weight)
    activation.check(act)
    return [x.shape[0], weight.shape[0], (x.shape[2] + 3) // 4, (x.shape[3] + 3) // 4]


def _vector(argument: str, value: Tensor | None, size: int, weight: Tensor) -> None:
    """As ``_checks.per_channel``, whose messages speak of x: here the weight decides."""
    if value is None:
        return
    _checks.tensor(argument, value)
    wanted = _checks.parameter_dtype(weight.dtype)
    if value.dtype != wanted:
        raise DTypeError(argument, f"{wanted} beside a weight of {weight.dtype}", value.dtype)
    if value.device != weight.device:
        raise ArgumentError(
            argument, f"a tensor on {weight.device}, as x", f"one on {value.device}"
        )
    if value.dim() != 1 or value.shape[0] != size:
        raise ArgumentError(argument, f"shape [{size}]", f"{list(value.shape)}")


def stem_pool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """Convolve 7x7 with stride 2, scale and shift, apply an activation and max-pool 3x3, stride 2.

    ``y = max_pool(act(conv(x·input_scale + input_shift, weight) · scale + shift))``

    The first two layers of a residual network (He et al. 2015, "Deep Residual Learning for Image
    Recognition", table 1), convolution padded by 3 and pooling by 1, with batch normalisation as
    ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - mean · scale``. On CUDA this is one
    kernel, and the convolution's map, four times the size of ``y``, is not stored: Triton's, and
    where that is not installed the CUDA library's, which networks choose between by measurement.

    The image may come raw. It is normalised in fp32 (fp64 beside an fp64 weight) and rounded to the
    weight's dtype, in which the products are. The convolution pads with zeros what was normalised:
    as if normalised first. Pooling is over the taps within the map, and NaN wins, as in torch.

    Args:
        x: [N, C, H, W], C from 1 to 4, any strides; fp32, fp16, bf16, fp64 or uint8. N may be 0.
        weight: [K, C, 7, 7]; fp32, fp16, bf16 or fp64. Its dtype is that of the products and ``y``.
        scale: [K], fp32 (fp64 beside an fp64 weight); 1 if absent.
        shift: [K], fp32 (fp64 beside an fp64 weight); 0 if absent.
        input_scale: [C], fp32 (fp64 beside an fp64 weight); 1 if absent. For images of 0 to 255
            with the usual mean and deviation, ``1 / (255·std)``.
        input_shift: [C], fp32 (fp64 beside an fp64 weight); 0 if absent. Likewise ``-mean / std``.
        act: one of ``resnet_fast.ops.activation.ACTIVATIONS``.

    Returns:
        [N, K, (H + 3) // 4, (W + 3) // 4] in the dtype of ``weight``, channels-last if ``x`` is and
        is not contiguous as well, else contiguous. Gradients are those of the layers, which run one
        by one wherever gradients are recorded, as they do on the CPU and in fp64.

    Raises:
        ArgumentError: a rank, size, value or device that does not fit; it names the argument.
        DTypeError: an unsupported dtype, or dtypes that do not go together.
        LibraryError: the native library is not loaded, or Triton fails on the device of ``x``.
    """
    check(x, weight, scale, shift, input_scale, input_shift, act)
    if not _REGISTERED:
        _checks.require_op("stem_pool")
    return torch.ops.resnet_fast.stem_pool.default(
        x, weight, scale, shift, input_scale, input_shift, act
    )


def _operand(
    x: Tensor, weight: Tensor, input_scale: Tensor | None, input_shift: Tensor | None
) -> Tensor:
    """What the convolution multiplies: ``x`` normalised, in the weight's dtype."""
    if input_scale is not None or input_shift is not None:
        x = x.to(_checks.parameter_dtype(weight.dtype))
        x = _checks.affine(x, input_scale, input_shift)
    return x.to(weight.dtype)


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """:func:`stem_pool` in plain PyTorch: one layer after another, each rounding."""
    z = _operand(x, weight, input_scale, input_shift)
    z = torch.nn.functional.conv2d(z, weight, None, stride=2, padding=3)
    z = activation.value(act, _checks.affine(z, scale, shift).to(weight.dtype))
    return torch.nn.functional.max_pool2d(z, kernel_size=3, stride=2, padding=1)


def work(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    act: str = "none",
) -> _work.Work:
    """What :func:`stem_pool` moves and computes; see :mod:`resnet_fast.ops._work`."""
    shape = check(x, weight, scale, shift, input_scale, input_shift, act)
    map_ = [x.shape[0], weight.shape[0], *((n + 1) // 2 for n in x.shape[2:])]
    parameters = _work.nbytes(weight, scale, shift, input_scale, input_shift)
    return _work.Work(
        _work.window(x, (7, 7), (2, 2), (3, 3), (1, 1)) + parameters,
        math.prod(shape) * weight.element_size(),
        _work.product_flops(weight, map_),
        parameters,
    )


def _layers(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    act: str,
) -> Tensor:
    check(x, weight, scale, shift, input_scale, input_shift, act)
    memory_format = _checks.channels_last(x) or torch.contiguous_format
    operand = _operand(x, weight, input_scale, input_shift)
    z = torch.ops.resnet_fast.conv_bn_act(
        operand, weight, scale, shift, None, [2, 2], [3, 3], [1, 1], 1, act
    )
    y = torch.nn.functional.max_pool2d(z, kernel_size=3, stride=2, padding=1)
    return y.contiguous(memory_format=memory_format)


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    act: str,
) -> Tensor:
    shape = check(x, weight, scale, shift, input_scale, input_shift, act)
    memory_format = _checks.channels_last(x) or torch.contiguous_format
    return torch.empty(shape, dtype=weight.dtype, device=x.device, memory_format=memory_format)


def runs(x: Tensor) -> bool:
    """Whether a CUDA tensor like ``x`` has a Triton kernel of the stem, and not its layers."""
    return _REGISTERED and _several.has_kernel("stem_pool", x)


_REGISTERED = _several.implement("stem_pool", _layers, _fake, "launch_stem_pool")
