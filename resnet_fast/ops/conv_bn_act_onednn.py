"""``conv_bn_act`` by the framework's fused oneDNN convolution with packed weights (CPU).

The scale is folded into the weights in fp32 and rounded once to the weights' dtype, the shift
becomes the bias, the residual and ReLU are post-ops, so the output is written once. The packed
weights are a cache (:mod:`resnet_fast.ops._pack`), which is why this registration takes the
batch-norm tensors themselves and not a scale computed from them: a graph that calls it always
starts from the parameters.

oneDNN's fused ReLU returns 0 for NaN, where ``torch.relu`` returns NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import activation
from resnet_fast.ops._pack import Call, cached, fold, like_convolution

# torch's names for the post-ops that follow a convolution: (attribute, scalars, algorithm).
_UNARY: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "gelu": ("gelu", [], "none"),
    "leaky_relu": ("leaky_relu", [0.01], ""),
    "sigmoid": ("sigmoid", [], ""),
}


def available(dtype: torch.dtype) -> bool:
    """Whether this build and processor run oneDNN convolutions in ``dtype``."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype is torch.float32:
        return True
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def has_fp16() -> bool:
    """Whether oneDNN, and with it the framework's convolution, computes in fp16 here."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _pack(
    x_shape: torch.Size,
    dtype: torch.dtype,
    weight: Tensor,
    bias: Tensor | None,
    bn: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float],
    geometry: tuple[list[int], list[int], list[int], int],
) -> tuple[Tensor, Tensor | None]:
    scale, shift = fold(bias, *bn)
    w = weight.detach().float()
    if scale is not None:
        w = w * scale.view(-1, *[1] * (w.dim() - 1))
    w = w.to(dtype)
    layout = torch.channels_last if w.dim() == 4 else torch.channels_last_3d
    stride, padding, dilation, groups = geometry
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        w.contiguous(memory_format=layout), padding, stride, dilation, groups, [1, *x_shape[1:]]
    )
    return packed, None if shift is None else shift.detach().to(dtype)


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Call:
    """:func:`run` for inputs like ``x``, the weights packed: call it with input and residual."""
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    packed, shift = cached(
        ("onednn", eps, x.dtype, x.shape[1:], *stride, *padding, *dilation, groups),
        (weight, bias, bn_weight, bn_bias, mean, var),
        lambda: _pack(
            x.shape,
            x.dtype,
            weight,
            bias,
            (bn_weight, bn_bias, mean, var, eps),
            (stride, padding, dilation, groups),
        ),
    )
    geometry = (padding, stride, dilation, groups)
    # Behind an add, torch's fused convolution knows ReLU alone.
    relu = "relu" if act == "relu" else None

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=layout)
        if residual is None:
            attribute, scalars, algorithm = _UNARY[act]
            return torch.ops.mkldnn._convolution_pointwise(
                x, packed, shift, *geometry, attribute, scalars, algorithm
            )
        residual = residual.contiguous(memory_format=layout)
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, packed, shift, *geometry, "add", 1.0, relu, [], ""
        )
        return y if act in ("none", "relu") else activation.value(act, y)

    return call


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    """``act(BN(conv(x, weight) + bias) + residual)`` with running statistics.

    Shapes as :func:`resnet_fast.ops.conv_bn_act`, two or three spatial dimensions; ``x`` fp32 or
    bf16, parameters in any floating dtype. The output is channels-last.
    """
    parameters = (weight, bias, bn_weight, bn_bias, mean, var, eps)
    return prepare(x, *parameters, stride, padding, dilation, groups, act)(x, residual)


torch.library.custom_op("resnet_fast::_conv_bn_act_onednn", run, mutates_args=()).register_fake(
    like_convolution
)
