"""What a convolution's tile is made of: one tap of the filter, a packed row, and the epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .product import dot


# The epilogue of a BLOCK_M x BLOCK_N tile, in fp32; the store is the only rounding.
@triton.jit
def finish(
    acc,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    rows,
    rows_ok,
    k,
    k_ok,
    stride_yk,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
):
    if HAS_SCALE:
        acc = acc * tl.load(scale_ptr + k, mask=k_ok, other=0.0)[None, :]
    if HAS_SHIFT:
        acc = acc + tl.load(shift_ptr + k, mask=k_ok, other=0.0)[None, :]
    offsets = rows[:, None] + (k * stride_yk)[None, :]
    mask = rows_ok[:, None] & k_ok[None, :]
    if HAS_RESIDUAL:
        acc = acc + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    acc = activate(acc, ACT)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


# The channels of a program's part of the reduction: all of them, or a run of whole blocks.
@triton.jit
def part(CG, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr):
    if SPLITS == 1:
        begin = 0
        end = CG
    else:
        length = tl.cdiv(tl.cdiv(CG, BLOCK_C), SPLITS) * BLOCK_C
        begin = tl.program_id(1) * length
        end = tl.minimum(begin + length, CG)
    return begin, end


# One tap of the filter: acc += x[pixels shifted by the tap, all channels] @ w[tap].
@triton.jit
def tap(
    acc,
    x_rows,
    w_cols,
    rows_ok,
    k_ok,
    iz,
    iy,
    ix,
    t,
    r,
    s,
    D,
    H,
    W,
    CG,
    stride_xc,
    stride_xd,
    stride_xh,
    stride_xw,
    stride_wc,
    stride_wt,
    stride_wr,
    stride_ws,
    DIL_D: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    ALLOW_TF32: tl.constexpr,
    INTERPRET: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    z = iz + t * DIL_D
    y = iy + r * DIL_H
    x = ix + s * DIL_W
    ok = rows_ok & (z >= 0) & (z < D) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    if WIDE:
        # Taps start the products with dilations and strides, which are 32 bits wide.
        t = tl.cast(t, tl.int64)
        r = tl.cast(r, tl.int64)
        s = tl.cast(s, tl.int64)
    x_tap = x_rows + (t * DIL_D * stride_xd + r * DIL_H * stride_xh + s * DIL_W * stride_xw)
    w_tap = w_cols + (t * stride_wt + r * stride_wr + s * stride_ws)
    begin, end = part(CG, SPLITS, BLOCK_C)
    for c0 in range(begin, end, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        c_ok = c < CG
        if WIDE:
            c = c.to(tl.int64)
        a = tl.load(
            x_tap[:, None] + (c * stride_xc)[None, :], mask=ok[:, None] & c_ok[None, :], other=0.0
        )
        b = tl.load(
            w_tap[None, :] + (c * stride_wc)[:, None], mask=c_ok[:, None] & k_ok[None, :], other=0.0
        )
        acc = dot(a, b, acc, ALLOW_TF32, INTERPRET)
    return acc


# One filter row with s and c packed into the reduction: index i stands for (s, c) = divmod(i, CG).
@triton.jit
def packed_row(
    acc,
    x_rows,
    w_cols,
    rows_ok,
    k_ok,
    iz,
    iy,
    ix,
    t,
    r,
    D,
    H,
    W,
    CG,
    stride_xc,
    stride_xd,
    stride_xh,
    stride_xw,
    stride_wc,
    stride_wt,
    stride_wr,
    stride_ws,
    S: tl.constexpr,
    DIL_D: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    ALLOW_TF32: tl.constexpr,
    INTERPRET: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i = tl.arange(0, BLOCK_C)
    i_ok = i < S * CG
    s = i // CG
    c = i % CG
    z = iz + t * DIL_D
    y = iy + r * DIL_H
    x = ix[:, None] + (s * DIL_W)[None, :]
    ok = rows_ok & (z >= 0) & (z < D) & (y >= 0) & (y < H)
    ok = ok[:, None] & i_ok[None, :] & (x >= 0) & (x < W)
    if WIDE:
        t = tl.cast(t, tl.int64)
        r = tl.cast(r, tl.int64)
        s = s.to(tl.int64)
        c = c.to(tl.int64)
    x_tap = x_rows + (t * DIL_D * stride_xd + r * DIL_H * stride_xh)
    w_tap = w_cols + (t * stride_wt + r * stride_wr)
    a = tl.load(
        x_tap[:, None] + (s * DIL_W * stride_xw + c * stride_xc)[None, :], mask=ok, other=0.0
    )
    b = tl.load(
        w_tap[None, :] + (s * stride_ws + c * stride_wc)[:, None],
        mask=i_ok[:, None] & k_ok[None, :],
        other=0.0,
    )
    return dot(a, b, acc, ALLOW_TF32, INTERPRET)
