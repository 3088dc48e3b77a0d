"""Activations by name: value and derivative, as PyTorch computes them.

The position of a name in ``ACTIVATIONS`` is the integer code that ``csrc/math/activation.h`` uses.
At a kink the derivative is the one that PyTorch's own backward takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fast.errors import ArgumentError

LEAKY_SLOPE = 0.01

ACTIVATIONS = (
    "none",
    "relu",
    "relu6",
    "silu",
    "hardswish",
    "gelu",
    "leaky_relu",
    "sigmoid",
)

#: Activations whose derivative follows from their value, so that nothing need be recomputed.
FROM_OUTPUT = frozenset({"none", "relu", "relu6", "leaky_relu", "sigmoid"})

#: Points where the derivative jumps. A gradient is compared with another only away from them.
KINKS: dict[str, tuple[float, ...]] = {
    "none": (),
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "silu": (),
    "hardswish": (-3.0, 3.0),
    "gelu": (),
    "leaky_relu": (0.0,),
    "sigmoid": (),
}

_VALUE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": torch.nn.functional.relu,
    "relu6": torch.nn.functional.relu6,
    "silu": torch.nn.functional.silu,
    "hardswish": torch.nn.functional.hardswish,
    "gelu": torch.nn.functional.gelu,
    "leaky_relu": lambda z: torch.nn.functional.leaky_relu(z, LEAKY_SLOPE),
    "sigmoid": torch.sigmoid,
}

_aten = torch.ops.aten


def _silu_grad(grad_y: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _aten.silu_backward(grad_y, z)
    s = torch.sigmoid(z)  # torch's backward of silu has no derivative
    return grad_y * s * (1 + z * (1 - s))


_FROM_INPUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad_y, z: grad_y,
    "relu": lambda grad_y, z: _aten.threshold_backward(grad_y, z, 0),
    "relu6": lambda grad_y, z: _aten.hardtanh_backward(grad_y, z, 0, 6),
    "silu": lambda grad_y, z: _silu_grad(grad_y, z),
    "hardswish": lambda grad_y, z: _aten.hardswish_backward(grad_y, z),
    "gelu": lambda grad_y, z: _aten.gelu_backward(grad_y, z),
    "leaky_relu": lambda grad_y, z: _aten.leaky_relu_backward(grad_y, z, LEAKY_SLOPE, False),
    "sigmoid": lambda grad_y, z: _aten.sigmoid_backward(grad_y, torch.sigmoid(z)),
}

# relu, relu6 and leaky_relu keep the sign and the bounds: the formula on z serves on y as well.
_FROM_VALUE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: _FROM_INPUT[name] for name in ("none", "relu", "relu6", "leaky_relu")},
    "sigmoid": lambda grad_y, y: _aten.sigmoid_backward(grad_y, y),
}


def check(act: object) -> None:
    """Raise ``ArgumentError`` unless ``act`` names an activation."""
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise ArgumentError("act", f"one of {', '.join(ACTIVATIONS)}", repr(act))


def code(act: str) -> int:
    """The integer that native code and Triton kernels know ``act`` by."""
    check(act)
    return ACTIVATIONS.index(act)


def value(act: str, z: Tensor) -> Tensor:
    """``act(z)`` in the dtype of ``z``."""
    return _VALUE[act](z)


def grad(act: str, grad_y: Tensor, z: Tensor) -> Tensor:
    """The gradient of ``z`` where ``y = act(z)``, from ``z``."""
    return _FROM_INPUT[act](grad_y, z)


def grad_from_output(act: str, grad_y: Tensor, y: Tensor) -> Tensor:
    """The gradient of ``z`` where ``y = act(z)``, from ``y``, for ``act`` in ``FROM_OUTPUT``."""
    return _FROM_VALUE[act](grad_y, y)
