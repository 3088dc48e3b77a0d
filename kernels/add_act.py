"""act(x + residual) and its backward: one pass over flat memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activation import activate, activate_backward, activation_code
from .launch import (
    Wrap,
    cdiv,
    check_input,
    check_shape,
    check_tensor,
    device_of,
    direct,
    hint,
    needs_int64,
    output_format,
)

# (BLOCK, num_warps). 8 elements a thread are one 16-byte access of fp16 and two of fp32; the
# small block keeps more CTAs than SMs on tensors below about 256 K elements.
CONFIGS = ((1024, 4), (256, 1))


def choose_config(numel: int) -> tuple[int, int]:
    """Heuristic (BLOCK, num_warps)."""
    return CONFIGS[0] if numel >= 1 << 18 else CONFIGS[1]


# y[i] = act(x[i] + residual[i]), i over memory; a program owns BLOCK elements. fp32 inside, the
# store rounds once.
@triton.jit
def add_act_kernel(
    x_ptr, residual_ptr, y_ptr, numel, ACT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    ok = i < numel
    v = tl.load(x_ptr + i, mask=ok, other=0.0).to(tl.float32)
    v += tl.load(residual_ptr + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, activate(v, ACT).to(y_ptr.dtype.element_ty), mask=ok)


# grad[i] = grad_y[i] * act'(x[i] + residual[i]): the gradient of both x and residual. The sum is
# recomputed: reading x and residual costs what reading a saved sum would save in writing it.
@triton.jit
def add_act_backward_kernel(
    grad_y_ptr,
    x_ptr,
    residual_ptr,
    grad_ptr,
    numel,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    ok = i < numel
    v = tl.load(x_ptr + i, mask=ok, other=0.0).to(tl.float32)
    v += tl.load(residual_ptr + i, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(grad_y_ptr + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(grad_ptr + i, activate_backward(g, v, ACT).to(grad_ptr.dtype.element_ty), mask=ok)


def launch_add_act(
    x: torch.Tensor,
    residual: torch.Tensor,
    act: str,
    *,
    config: tuple[int, int] | None = None,
    wide: bool | None = None,
    wrap_triton: Wrap = direct,
) -> torch.Tensor:
    """act(x + residual) in x's dtype, any shape; channels-last where x is, else contiguous."""
    check_input(x)
    check_tensor("residual", residual, x)
    check_shape("residual", residual, x.shape)
    code = activation_code(act)
    fmt = output_format(x)
    x = x.contiguous(memory_format=fmt)
    residual = residual.contiguous(memory_format=fmt)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=fmt)
    numel = x.numel()
    if numel == 0:
        return y
    block, num_warps = config or choose_config(hint(numel))
    with device_of(x):
        wrap_triton(add_act_kernel)[(cdiv(numel, block),)](
            x,
            residual,
            y,
            numel,
            ACT=code,
            WIDE=needs_int64(x) if wide is None else wide,
            BLOCK=block,
            num_warps=num_warps,
        )
    return y


def launch_add_act_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    act: str,
    *,
    config: tuple[int, int] | None = None,
    wide: bool | None = None,
    wrap_triton: Wrap = direct,
) -> torch.Tensor:
    """grad_y * act'(x + residual) in x's dtype and memory format."""
    check_input(x)
    for name, t in (("grad_y", grad_y), ("residual", residual)):
        check_tensor(name, t, x)
        check_shape(name, t, x.shape)
    code = activation_code(act)
    fmt = output_format(x)
    x = x.contiguous(memory_format=fmt)
    residual = residual.contiguous(memory_format=fmt)
    grad_y = grad_y.contiguous(memory_format=fmt)
    grad = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=fmt)
    numel = x.numel()
    if numel == 0:
        return grad
    block, num_warps = config or choose_config(hint(numel))
    with device_of(x):
        wrap_triton(add_act_backward_kernel)[(cdiv(numel, block),)](
            grad_y,
            x,
            residual,
            grad,
            numel,
            ACT=code,
            WIDE=needs_int64(x) if wide is None else wide,
            BLOCK=block,
            num_warps=num_warps,
        )
    return grad
