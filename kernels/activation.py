"""Activations on fp32 values inside a kernel, and their derivatives."""

from __future__ import annotations

import triton
import triton.language as tl

# The position is the code that kernels receive; the order is csrc/math/activation.h's.
ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish", "gelu", "leaky_relu", "sigmoid")


def activation_code(act: str) -> int:
    """Integer code of an activation name; ValueError for an unknown one."""
    try:
        return ACTIVATIONS.index(act)
    except ValueError:
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {act!r}") from None


# Comparisons are written so that NaN falls through to the branch that returns it, as in torch.
@triton.jit
def activate(v, ACT: tl.constexpr):
    if ACT == 1:
        v = tl.where(v < 0.0, 0.0, v)
    elif ACT == 2:
        v = tl.where(v < 0.0, 0.0, tl.where(v > 6.0, 6.0, v))
    elif ACT == 3:
        v = v / (1.0 + tl.exp(-v))
    elif ACT == 4:
        u = v + 3.0
        v = v * tl.where(u < 0.0, 0.0, tl.where(u > 6.0, 6.0, u)) / 6.0
    elif ACT == 5:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == 6:
        v = tl.where(v < 0.0, 0.01 * v, v)
    elif ACT == 7:
        v = 1.0 / (1.0 + tl.exp(-v))
    else:
        tl.static_assert(ACT == 0, "unknown activation code")
    return v


# grad * act'(v); at a kink the side is torch's.
@triton.jit
def activate_backward(grad, v, ACT: tl.constexpr):
    if ACT == 1:
        grad = tl.where(v <= 0.0, 0.0, grad)
    elif ACT == 2:
        grad = tl.where((v <= 0.0) | (v >= 6.0), 0.0, grad)
    elif ACT == 3:
        s = 1.0 / (1.0 + tl.exp(-v))
        grad = grad * s * (1.0 + v * (1.0 - s))
    elif ACT == 4:
        inner = tl.where(v < 3.0, grad * (v / 3.0 + 0.5), grad)
        grad = tl.where(v <= -3.0, 0.0, inner)
    elif ACT == 5:
        cdf = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
        pdf = 0.3989422804014327 * tl.exp(-0.5 * v * v)
        grad = grad * (cdf + v * pdf)
    elif ACT == 6:
        grad = tl.where(v > 0.0, grad, 0.01 * grad)
    elif ACT == 7:
        s = 1.0 / (1.0 + tl.exp(-v))
        grad = grad * s * (1.0 - s)
    else:
        tl.static_assert(ACT == 0, "unknown activation code")
    return grad
