"""The matrix product that every convolution kernel is made of."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


# To 10 bits of fraction, ties away from zero. Tensor cores read no more of an fp32 operand and cut
# off the rest, which is up to twice as far from it and always towards zero: sums drift.
@triton.jit
def _round_to_tf32(x):
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


# acc + a @ b in fp32; fp32 operands go to the tensor cores as tf32 only where that is allowed.
@triton.jit
def dot(a, b, acc, ALLOW_TF32: tl.constexpr, INTERPRET: tl.constexpr):
    if INTERPRET:
        # The interpreter multiplies bf16 operands as the integers that hold their bits.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if ALLOW_TF32:
        if a.dtype == tl.float32 and not INTERPRET:
            a = _round_to_tf32(a)
            b = _round_to_tf32(b)
        acc = tl.dot(a, b, acc, input_precision="tf32")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


def allow_tf32_of_convolutions() -> bool:
    """Whether torch's flags let convolutions of fp32 tensors multiply in tf32."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        # torch refuses the old flag once the per-operator one was set.
        cudnn: Any = torch.backends.cudnn
        return bool(cudnn.conv.fp32_precision == "tf32")
