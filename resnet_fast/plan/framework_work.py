"""What the framework's own ops move and compute on a GPU, as :mod:`resnet_fast.ops._work` counts.

Of torch 2.11 to 2.15, in inference. An op that is not here has no entry, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fast.ops._checks import channels_last
from resnet_fast.ops._work import Work, nbytes, product_flops, window

# Launches, and the work of them all; None where the call is none that inference makes.
Counted = tuple[int, Work] | None


def _convolution(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Counted:
    if transposed:
        return None
    work = _fused(y, x, weight, stride, padding, dilation)
    if bias is None:
        return 1, work
    # cuDNN's convolution, then the bias in place: a pass of its own over the output.
    read, written = work.read + nbytes(y, bias), work.written + nbytes(y)
    return 2, Work(read, written, work.flops, work.parameters + nbytes(bias))


def _fused(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Work:
    parameters = nbytes(weight, bias)
    read = window(x, weight.shape[2:], stride, padding, dilation) + nbytes(residual) + parameters
    return Work(read, nbytes(y), product_flops(weight, y.shape), parameters)


def _convolution_relu(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Counted:
    return 1, _fused(y, x, weight, stride, padding, dilation, bias)


def _convolution_add_relu(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    alpha: float | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Counted:
    return 1, _fused(y, x, weight, stride, padding, dilation, bias, residual)


def _batch_norm(
    out: Sequence[Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    *_: float,
) -> Counted:
    if training:
        return None
    parameters = nbytes(weight, bias, mean, var)
    return 1, Work(nbytes(x) + parameters, nbytes(out[0]), parameters=parameters)


def _batch_norm_inference(
    out: Sequence[Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *_: float,
) -> Counted:
    return _batch_norm(out, x, weight, bias, mean, var, False)


def _pointwise(y: Tensor, *tensors: Any, **_: Any) -> Counted:
    return 1, Work(nbytes(*(t for t in tensors if isinstance(t, Tensor))), nbytes(y))


def _max_pool(
    out: Sequence[Tensor],
    x: Tensor,
    size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Counted:
    if ceil_mode:
        return None
    # On CUDA max_pool2d has no form without indices: it computes both and drops the int64 ones,
    # which have been written by then.
    return 1, Work(window(x, size, stride or size, padding, dilation), nbytes(*out))


def _reduction(y: Tensor, x: Tensor, *_: Any, **__: Any) -> Counted:
    return 1, Work(nbytes(x), nbytes(y))


def _addmm(y: Tensor, bias: Tensor, x: Tensor, weight: Tensor, **_: Any) -> Counted:
    launches, (read, written, flops, parameters) = _mm(y, x, weight) or (0, Work(0, 0))
    return launches, Work(read + nbytes(bias), written, flops, parameters + nbytes(bias))


def _mm(y: Tensor, x: Tensor, weight: Tensor) -> Counted:
    flops = 2 * y.numel() * x.shape[1]
    return 1, Work(nbytes(x, weight), nbytes(y), flops, nbytes(weight))


def _padded(y: Tensor, x: Tensor, *_: Any) -> Counted:
    # The output is filled, then the input copied into its middle.
    return 2, Work(nbytes(x), nbytes(y, x))


def _filled(y: Tensor, *_: Any, **__: Any) -> Counted:
    return 1, Work(0, nbytes(y))


WORK: dict[str, Callable[..., Counted]] = {
    "aten::_adaptive_avg_pool2d": _reduction,
    "aten::_native_batch_norm_legit_no_training": _batch_norm_inference,
    "aten::_to_copy": _pointwise,
    "aten::add": _pointwise,
    "aten::add_": _pointwise,
    "aten::addmm": _addmm,
    "aten::clone": _pointwise,
    "aten::constant_pad_nd": _padded,
    "aten::convolution": _convolution,
    "aten::cudnn_convolution_add_relu": _convolution_add_relu,
    "aten::cudnn_convolution_relu": _convolution_relu,
    "aten::full": _filled,
    "aten::max_pool2d_with_indices": _max_pool,
    "aten::mean": _reduction,
    "aten::mm": _mm,
    "aten::mul": _pointwise,
    "aten::native_batch_norm": _batch_norm,
    "aten::relu": _pointwise,
    "aten::relu_": _pointwise,
    "aten::zeros": _filled,
}
_NO_KERNEL = frozenset(
    f"aten::{name}"
    for name in (
        "_unsafe_view",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
    )
)


def launches_nothing(overload: torch._ops.OpOverload) -> bool:
    """Whether ``overload`` allocates, or gives another view of the same memory."""
    schema = overload._schema
    if schema.name in _NO_KERNEL or torch.Tag.inplace_view in overload.tags:
        return True
    aliases = [result.alias_info for result in schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def on_meta(overload: torch._ops.OpOverload, args: tuple[Any, ...]) -> Any:
    """The result of a convolution as cuDNN allocates it; NotImplemented for other ops.

    The meta kernel's is contiguous whatever the input is, and cuDNN's fused ops have none.
    """
    if overload._schema.name == "aten::convolution":
        x, weight, *rest = args
    elif overload._schema.name == "aten::cudnn_convolution_relu":
        x, weight, *rest = _unfused(*args)
    elif overload._schema.name == "aten::cudnn_convolution_add_relu":
        x, weight, _, _, *rest = args
        x, weight, *rest = _unfused(x, weight, *rest)
    else:
        return NotImplemented
    y = torch.ops.aten.convolution.default(x, weight, *rest)
    layout = channels_last(x) or channels_last(weight)
    return y if layout is None else y.contiguous(memory_format=layout)


def _unfused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Any, ...]:
    """The arguments of ``aten::convolution``."""
    return x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups


def arithmetic(overload: torch._ops.OpOverload, dtype: torch.dtype) -> str:
    """What the products of ``overload`` are computed in: TF32 where torch's flags say so."""
    if dtype is torch.float32:
        product = overload._schema.name in ("aten::addmm", "aten::mm")
        backend: Any = torch.backends.cuda.matmul if product else torch.backends.cudnn
        return "tf32" if _allows_tf32(backend, product) else "fp32"
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "fp32")


def _allows_tf32(backend: Any, product: bool) -> bool:
    try:
        return bool(backend.allow_tf32)
    except RuntimeError:
        # torch refuses the old flag once the per-operator one was set.
        setting = backend if product else backend.conv
        return bool(setting.fp32_precision == "tf32")
