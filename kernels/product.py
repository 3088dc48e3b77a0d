"""The matrix product that every convolution kernel is made of."""

from __future__ import annotations

import triton
import triton.language as tl


# acc + a @ b in fp32; fp32 operands go to the tensor cores as tf32 only where that is allowed.
@triton.jit
def dot(a, b, acc, ALLOW_TF32: tl.constexpr, INTERPRET: tl.constexpr):
    if INTERPRET:
        # The interpreter multiplies bf16 operands as the integers that hold their bits.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if ALLOW_TF32:
        acc = tl.dot(a, b, acc, input_precision="tf32")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc
