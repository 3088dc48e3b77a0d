"""What the framework's own ops move in a training step, beside :mod:`framework_work`.

As CUDA runs them in channels-last: what is ``native_batch_norm`` on the meta device is cuDNN's
there, or torch's own, which make the same passes. Sums over blocks are split as the device likes,
and their parts are left out; where cuDNN's persistent kernels keep a part of a small tensor on chip
between their passes, they move less than is counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fast.ops._checks import channels_last
from resnet_fast.ops._work import Work, nbytes, product_flops, total, window
from resnet_fast.plan.framework_work import Counted


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
    """Measures in one pass, which also moves the running statistics on; normalises in another."""
    if not training:
        return None
    y, *statistics = out
    affine, running, measured = nbytes(weight, bias), nbytes(mean, var), nbytes(*statistics)
    return total(
        [
            Work(nbytes(x) + running, measured + running, 0, running),
            Work(nbytes(x) + measured + affine, nbytes(y), 0, affine),
        ]
    )


def _batch_norm_backward(
    out: Sequence[Tensor | None],
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    training: bool,
    eps: float,
    mask: Sequence[bool],
) -> Counted:
    """Sums grad and grad · x in one pass over both; grad_x needs both again, and the sums."""
    if not training:
        return None
    grad_x, *grads = out
    measured, parameters = nbytes(mean, rstd), nbytes(weight)
    works = [Work(nbytes(grad, x) + measured, nbytes(*grads))]
    if mask[0]:
        seen = nbytes(grad, x, *grads) + measured + parameters
        works.append(Work(seen, nbytes(grad_x), 0, parameters))
    return total(works)


def _convolution_backward(
    out: Sequence[Tensor | None],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> Counted:
    """A product a gradient that is asked for: dgrad of grad and weight, wgrad of grad and x.

    wgrad reads of x what the forward read; dgrad writes all of grad_x, zeros where a stride passed
    over it. The bias's gradient is a sum of its own.
    """
    if transposed:
        return None
    grad_x, grad_weight, grad_bias = out
    flops = product_flops(weight, grad.shape)
    works = []
    if mask[0]:
        parameters = nbytes(weight)
        works.append(Work(nbytes(grad) + parameters, nbytes(grad_x), flops, parameters))
    if mask[1]:
        seen = window(x, weight.shape[2:], stride, padding, dilation)
        works.append(Work(nbytes(grad) + seen, nbytes(grad_weight), flops))
    if mask[2]:
        works.append(Work(nbytes(grad), nbytes(grad_bias)))
    return total(works)


def _pointwise(y: Tensor, *values: Any, **_: Any) -> Counted:
    """Reads each tensor as it is stored: of one that was expanded, what it was expanded from."""
    return 1, Work(sum(_stored(value) for value in values if isinstance(value, Tensor)), nbytes(y))


def _stored(x: Tensor) -> int:
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


def _copy(y: Tensor, to: Tensor, source: Tensor, *_: Any) -> Counted:
    return 1, Work(_stored(source), nbytes(y))


def _max_pool_backward(
    y: Tensor,
    grad: Tensor,
    x: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Counted:
    """grad_x is filled with zeros, then written whole from the gradient and the int64 indices."""
    return 2, Work(nbytes(grad, indices), 2 * nbytes(y))


def _slice_backward(y: Tensor, grad: Tensor, *_: Any) -> Counted:
    """grad_x is filled with zeros, then the gradient copied to where the slice was."""
    return 2, Work(nbytes(grad), nbytes(y, grad))


def _average_pool_backward(y: Tensor, grad: Tensor, x: Tensor) -> Counted:
    """Spreads the gradient; x is there for its shape."""
    return 1, Work(nbytes(grad), nbytes(y))


def _log_softmax_backward(y: Tensor, grad: Tensor, output: Tensor, *_: Any) -> Counted:
    return 1, Work(nbytes(grad, output), nbytes(y))


def _log_softmax(y: Tensor, x: Tensor, *_: Any) -> Counted:
    return 1, Work(nbytes(x), nbytes(y))


def _nll_loss(out: Sequence[Tensor], x: Tensor, target: Tensor, *_: Any) -> Counted:
    """Reads of each image the one figure of its class."""
    return 1, Work(nbytes(target) + target.numel() * x.element_size(), nbytes(*out))


def _nll_loss_backward(y: Tensor, grad: Tensor, x: Tensor, target: Tensor, *_: Any) -> Counted:
    """Fills with zeros, then writes each image's class."""
    written = nbytes(y) + target.numel() * y.element_size()
    return 2, Work(nbytes(grad, target), written)


def _sum(y: Tensor, x: Tensor, *_: Any, **__: Any) -> Counted:
    return 1, Work(_stored(x), nbytes(y))


def _filled(y: Tensor, *_: Any, **__: Any) -> Counted:
    return 1, Work(0, nbytes(y))


def _foreach(out: Sequence[Tensor] | None, first: Sequence[Tensor], *rest: Any) -> Counted:
    """Lists of small tensors in one launch: reads all of them, writes as many as the first has."""
    read = nbytes(*first, *(t for value in rest if isinstance(value, list) for t in value
                            if isinstance(t, Tensor)))  # fmt: skip
    return 1, Work(read, nbytes(*first))


WORK: dict[str, Callable[..., Counted]] = {
    "aten::_adaptive_avg_pool2d_backward": _average_pool_backward,
    "aten::_foreach_add_": _foreach,
    "aten::_foreach_clamp_min_": _foreach,
    "aten::_foreach_lerp_": _foreach,
    "aten::_foreach_mul_": _foreach,
    "aten::_foreach_pow": _foreach,
    "aten::_foreach_sub_": _foreach,
    "aten::_log_softmax": _log_softmax,
    "aten::_log_softmax_backward_data": _log_softmax_backward,
    "aten::clamp_": _pointwise,
    "aten::convolution_backward": _convolution_backward,
    "aten::copy_": _copy,
    "aten::div": _pointwise,
    "aten::max_pool2d_with_indices_backward": _max_pool_backward,
    "aten::mul_": _pointwise,
    "aten::new_zeros": _filled,
    "aten::native_batch_norm": _batch_norm,
    "aten::native_batch_norm_backward": _batch_norm_backward,
    "aten::nll_loss_backward": _nll_loss_backward,
    "aten::nll_loss_forward": _nll_loss,
    "aten::ones_like": _filled,
    "aten::pow": _pointwise,
    "aten::slice_backward": _slice_backward,
    "aten::sub_": _pointwise,
    "aten::sum": _sum,
    "aten::threshold_backward": _pointwise,
}


def on_meta(overload: torch._ops.OpOverload, args: tuple[Any, ...]) -> Any:
    """The gradients of a convolution as cuDNN allocates them; NotImplemented for other ops."""
    if overload._schema.name != "aten::convolution_backward":
        return NotImplemented
    _, x, weight = args[:3]
    layout = channels_last(x) or channels_last(weight)
    found = overload(*args)
    if layout is None:
        return found
    return *(None if g is None else g.contiguous(memory_format=layout) for g in found[:2]), found[2]
