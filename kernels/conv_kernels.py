"""The convolution's device code: any filter by its taps, 1x1 as a product, and sums of parts."""

from __future__ import annotations

import triton
import triton.language as tl

from .conv_taps import finish, packed_row, part, tap
from .product import dot


# y[m, k] = finish(sum over t, r, s, c of x[pixel(m) + tap(t, r, s), c] * w[k, c, t, r, s]).
# A program owns BLOCK_M output pixels (n, o, p, q flattened) x BLOCK_N output channels of one
# group; programs that share pixels are neighbours, so x comes from L2 and w stays there.
#
#            k tile
#          +-------+      pid -> group, then pixel tile, then channel tile (innermost)
#   pixels | acc   |      loops: t, r, s (static) > c in steps of BLOCK_C
#          +-------+
#
# The taps are unrolled and only c is a device loop: one flattened r*s*c loop was miscompiled on
# Hopper with 8 warps (https://github.com/pytorch/pytorch/issues/173068).
@triton.jit
def conv_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    M,
    D,
    H,
    W,
    O,  # noqa: E741
    P,
    Q,
    CG,
    KG,
    stride_xn,
    stride_xc,
    stride_xd,
    stride_xh,
    stride_xw,
    stride_wk,
    stride_wc,
    stride_wt,
    stride_wr,
    stride_ws,
    stride_yn,
    stride_yk,
    stride_yo,
    stride_yp,
    stride_yq,
    T: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_D: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    ALLOW_TF32: tl.constexpr,
    INTERPRET: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    PACKED: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_k = tl.cdiv(KG, BLOCK_N)
    pid_k = pid % tiles_k
    pid = pid // tiles_k
    if WIDE:
        M = tl.cast(M, tl.int64)
    tiles_m = tl.cdiv(M, BLOCK_M).to(tl.int32)
    pid_m = pid % tiles_m
    group = pid // tiles_m
    if WIDE:
        pid_m = pid_m.to(tl.int64)
        group = group.to(tl.int64)

    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = m < M
    # One quotient after the other: the product of the sizes may pass 2^31.
    line = m // Q
    plane = line // P
    n = plane // O
    q = m % Q
    p = line % P
    o = plane % O
    iz = o * STRIDE_D - PAD_D
    iy = p * STRIDE_H - PAD_H
    ix = q * STRIDE_W - PAD_W
    k_in_group = pid_k * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ok = k_in_group < KG
    k = group * KG + k_in_group

    # Padded pixels make these offsets negative; the mask of each tap keeps them from being read.
    x_rows = x_ptr + (
        n * stride_xn + iz * stride_xd + iy * stride_xh + ix * stride_xw + group * CG * stride_xc
    )
    w_cols = w_ptr + k * stride_wk
    if WIDE:
        # Offsets take 64 bits, coordinates do not: sizes and padding are below 2^31, and one that
        # wraps is negative, as masked as where it came from. 64-bit ones spill in the packed rows.
        iz = iz.to(tl.int32)
        iy = iy.to(tl.int32)
        ix = ix.to(tl.int32)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if PACKED:
        if STATIC:
            for t in tl.static_range(T):
                for r in tl.static_range(R):
                    acc = packed_row(
                        acc, x_rows, w_cols, rows_ok, k_ok, iz, iy, ix, t, r, D, H, W, CG,
                        stride_xc, stride_xd, stride_xh, stride_xw,
                        stride_wc, stride_wt, stride_wr, stride_ws,
                        S, DIL_D, DIL_H, DIL_W, ALLOW_TF32, INTERPRET, WIDE, BLOCK_C,
                    )  # fmt: skip
        else:
            for t in range(T):
                for r in range(R):
                    acc = packed_row(
                        acc, x_rows, w_cols, rows_ok, k_ok, iz, iy, ix, t, r, D, H, W, CG,
                        stride_xc, stride_xd, stride_xh, stride_xw,
                        stride_wc, stride_wt, stride_wr, stride_ws,
                        S, DIL_D, DIL_H, DIL_W, ALLOW_TF32, INTERPRET, WIDE, BLOCK_C,
                    )  # fmt: skip
    elif STATIC:
        for t in tl.static_range(T):
            for r in tl.static_range(R):
                for s in tl.static_range(S):
                    acc = tap(
                        acc, x_rows, w_cols, rows_ok, k_ok, iz, iy, ix, t, r, s, D, H, W, CG,
                        stride_xc, stride_xd, stride_xh, stride_xw,
                        stride_wc, stride_wt, stride_wr, stride_ws,
                        DIL_D, DIL_H, DIL_W, ALLOW_TF32, INTERPRET, WIDE, SPLITS, BLOCK_C,
                    )  # fmt: skip
    else:
        for t in range(T):
            for r in range(R):
                for s in range(S):
                    acc = tap(
                        acc, x_rows, w_cols, rows_ok, k_ok, iz, iy, ix, t, r, s, D, H, W, CG,
                        stride_xc, stride_xd, stride_xh, stride_xw,
                        stride_wc, stride_wt, stride_wr, stride_ws,
                        DIL_D, DIL_H, DIL_W, ALLOW_TF32, INTERPRET, WIDE, SPLITS, BLOCK_C,
                    )  # fmt: skip

    y_rows = n * stride_yn + o * stride_yo + p * stride_yp + q * stride_yq
    if SPLITS > 1:
        # Parts lie one after the other, each [pixels, filters].
        y_ptr += tl.program_id(1).to(tl.int64) * M * stride_yq
    finish(
        acc, scale_ptr, shift_ptr, residual_ptr, y_ptr, y_rows, rows_ok, k, k_ok, stride_yk,
        HAS_SCALE, HAS_SHIFT, HAS_RESIDUAL, ACT,
    )  # fmt: skip


# The 1x1, stride-1, unpadded convolution as a plain GEMM: y[m, k] = finish(x[m, :] @ w[k, :]).
# Pixel m lies at n * stride_xn + p * stride_xp with (n, p) = divmod(m, PIXELS): the batch and
# the pixels of an image each have one stride in channels-last and in NCHW alike.
@triton.jit
def gemm_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    M,
    PIXELS,
    CG,
    KG,
    stride_xn,
    stride_xc,
    stride_xp,
    stride_wk,
    stride_wc,
    stride_yn,
    stride_yk,
    stride_yp,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    ALLOW_TF32: tl.constexpr,
    INTERPRET: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_k = tl.cdiv(KG, BLOCK_N)
    pid_k = pid % tiles_k
    pid = pid // tiles_k
    if WIDE:
        M = tl.cast(M, tl.int64)
    tiles_m = tl.cdiv(M, BLOCK_M).to(tl.int32)
    pid_m = pid % tiles_m
    group = pid // tiles_m
    if WIDE:
        pid_m = pid_m.to(tl.int64)
        group = group.to(tl.int64)

    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = m < M
    n = m // PIXELS
    p = m % PIXELS
    k_in_group = pid_k * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ok = k_in_group < KG
    k = group * KG + k_in_group
    x_rows = x_ptr + (n * stride_xn + p * stride_xp + group * CG * stride_xc)
    w_cols = w_ptr + k * stride_wk

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    begin, end = part(CG, SPLITS, BLOCK_C)
    for c0 in range(begin, end, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        c_ok = c < CG
        if WIDE:
            c = c.to(tl.int64)
        a = tl.load(
            x_rows[:, None] + (c * stride_xc)[None, :],
            mask=rows_ok[:, None] & c_ok[None, :],
            other=0.0,
        )
        b = tl.load(
            w_cols[None, :] + (c * stride_wc)[:, None],
            mask=c_ok[:, None] & k_ok[None, :],
            other=0.0,
        )
        acc = dot(a, b, acc, ALLOW_TF32, INTERPRET)

    y_rows = n * stride_yn + p * stride_yp
    if SPLITS > 1:
        y_ptr += tl.program_id(1).to(tl.int64) * M * stride_yp
    finish(
        acc, scale_ptr, shift_ptr, residual_ptr, y_ptr, y_rows, rows_ok, k, k_ok, stride_yk,
        HAS_SCALE, HAS_SHIFT, HAS_RESIDUAL, ACT,
    )  # fmt: skip


# Sums the parts of a split reduction, first to last, and finishes: one order, hence one result.
@triton.jit
def sum_kernel(
    part_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    M,
    PIXELS,
    K,
    stride_yn,
    stride_yk,
    stride_yp,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_N)
    m = tl.program_id(0) // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_ok = m < M
    k_ok = k < K
    mask = rows_ok[:, None] & k_ok[None, :]
    rows = m.to(tl.int64)
    parts = part_ptr + (rows * K)[:, None] + k[None, :]
    acc = tl.load(parts, mask=mask, other=0.0)
    for _ in range(1, SPLITS):
        parts += tl.cast(M, tl.int64) * K
        acc += tl.load(parts, mask=mask, other=0.0)
    y_rows = rows // PIXELS * stride_yn + rows % PIXELS * stride_yp
    finish(
        acc, scale_ptr, shift_ptr, residual_ptr, y_ptr, y_rows, rows_ok, k, k_ok, stride_yk,
        HAS_SCALE, HAS_SHIFT, HAS_RESIDUAL, ACT,
    )  # fmt: skip
