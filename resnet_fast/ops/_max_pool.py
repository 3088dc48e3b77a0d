"""Max-pooling 3x3 with stride 2 and padding 1, whose backward finds the maxima again.

The second layer of a residual network. The framework's stores the place of each maximum, 64 bits
beside the 16 of a value, and reads it again; the kernels of csrc/cuda/max_pool.cuh read ``x``
instead, and add up each pixel's gradient in one order. On the CPU the framework's own run.

``resnet_fast::_max_pool(x) -> y``, differentiable, and ``_max_pool_backward(grad_y, x) -> grad_x``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fast.errors import ArgumentError
from resnet_fast.ops import _checks

WINDOW = ([3, 3], [2, 2], [1, 1])


def check(x: Tensor) -> list[int]:
    """Raise a typed error for an ``x`` that is not [N, C, H, W] with pixels; y's shape."""
    _checks.activations("x", x, ranks=(4,))
    if min(x.shape[1:]) < 1:
        raise ArgumentError("x", "no empty dimension but the batch", f"shape {list(x.shape)}")
    return [*x.shape[:2], *((n + 1) // 2 for n in x.shape[2:])]


def reference(x: Tensor) -> Tensor:
    """``_max_pool`` in plain PyTorch. NaN wins; of equal values the first gets the gradient."""
    return torch.nn.functional.max_pool2d(x, *WINDOW)


def _value(x: Tensor) -> Tensor:
    check(x)
    layout = _checks.channels_last(x) or torch.contiguous_format
    return reference(x).contiguous(memory_format=layout)


def _gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    """By the framework, and differentiable in ``grad_y``."""
    places = torch.nn.functional.max_pool2d(x, *WINDOW, return_indices=True)[1]
    return torch.ops.aten.max_pool2d_with_indices_backward(
        grad_y, x, *WINDOW, [1, 1], False, places
    )


def _fake(x: Tensor) -> Tensor:
    return _checks.empty_output(x, check(x))


def _fake_backward(grad_y: Tensor, x: Tensor) -> Tensor:
    _checks.same_shape("grad_y", grad_y, check(x), x)
    return _checks.empty_output(x, x.shape)


def _backward_on_cpu(grad_y: Tensor, x: Tensor) -> Tensor:
    _checks.same_shape("grad_y", grad_y, check(x), x)
    layout = _checks.channels_last(x) or torch.contiguous_format
    return _gradient(grad_y, x).contiguous(memory_format=layout)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        # create_graph: the backward op has no derivative of its own, the framework's has.
        return _gradient(grad_y, x)
    return torch.ops.resnet_fast._max_pool_backward.default(grad_y, x)


if _checks.has_op("_max_pool") and _checks.has_op("_max_pool_backward"):
    torch.library.impl("resnet_fast::_max_pool", "CPU", _value)
    torch.library.impl("resnet_fast::_max_pool_backward", "CPU", _backward_on_cpu)
    torch.library.register_fake("resnet_fast::_max_pool", _fake)
    torch.library.register_fake("resnet_fast::_max_pool_backward", _fake_backward)
    torch.library.register_autograd(
        "resnet_fast::_max_pool", _backward, setup_context=_setup_context
    )
