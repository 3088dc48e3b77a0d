"""The residual chain's device code: the products of a tile, and the two kernels made of them."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .product import dot


# acc[pixels, filters] += conv3x3 of x at output pixels (n, p, q): padding 1, x [N, H, W, C] and
# w [filter, r, s, C] dense. Rows are counted in 64 bits: a batch of 1024 passes 2^31 elements.
@triton.jit
def _conv3x3(
    acc,
    x_ptr,
    w_ptr,
    n,
    p,
    q,
    rows_ok,
    k,
    k_ok,
    H,
    W,
    C,
    STRIDE: tl.constexpr,
    LOOP: tl.constexpr,
    ALLOW_TF32: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    iy = p * STRIDE - 1
    ix = q * STRIDE - 1
    # Padded pixels make these offsets negative; the mask of each tap keeps them from being read.
    x_rows = x_ptr + ((n.to(tl.int64) * H + iy) * W + ix) * C
    w_cols = w_ptr + k.to(tl.int64) * (9 * C)
    if LOOP:
        # One device loop, so that the loads of a step run under the products of those before it.
        blocks = tl.cdiv(C, BLOCK_C)
        for i in range(9 * blocks):
            acc = _tap(
                acc, x_rows, w_cols, rows_ok, k_ok, iy, ix, i // blocks, i % blocks * BLOCK_C,
                H, W, C, ALLOW_TF32, INTERPRET, BLOCK_C,
            )  # fmt: skip
    else:
        for tap in tl.static_range(9):
            for c0 in range(0, C, BLOCK_C):
                acc = _tap(
                    acc, x_rows, w_cols, rows_ok, k_ok, iy, ix, tap, c0,
                    H, W, C, ALLOW_TF32, INTERPRET, BLOCK_C,
                )  # fmt: skip
    return acc


@triton.jit
def _tap(
    acc,
    x_rows,
    w_cols,
    rows_ok,
    k_ok,
    iy,
    ix,
    tap,
    c0,
    H,
    W,
    C,
    ALLOW_TF32: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r = tap // 3
    s = tap % 3
    y = iy + r
    x = ix + s
    ok = rows_ok & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    c = c0 + tl.arange(0, BLOCK_C)
    c_ok = c < C
    a = tl.load(
        (x_rows + (r * W + s) * C)[:, None] + c[None, :],
        mask=ok[:, None] & c_ok[None, :],
        other=0.0,
    )
    b = tl.load(
        w_cols[None, :] + (tap * C + c)[:, None], mask=c_ok[:, None] & k_ok[None, :], other=0.0
    )
    return dot(a, b, acc, ALLOW_TF32, INTERPRET)


# x[rows, :] @ w[k, :] over channels in memory; rows and columns point at their first channel.
@triton.jit
def _product(
    x_rows,
    w_cols,
    rows_ok,
    k_ok,
    C,
    ALLOW_TF32: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        c_ok = c < C
        a = tl.load(x_rows[:, None] + c[None, :], mask=rows_ok[:, None] & c_ok[None, :], other=0.0)
        b = tl.load(w_cols[None, :] + c[:, None], mask=c_ok[:, None] & k_ok[None, :], other=0.0)
        acc = dot(a, b, acc, ALLOW_TF32, INTERPRET)
    return acc


@triton.jit
def _affine(acc, scale_ptr, shift_ptr, k, k_ok):
    scale = tl.load(scale_ptr + k, mask=k_ok, other=0.0)
    shift = tl.load(shift_ptr + k, mask=k_ok, other=0.0)
    return acc * scale[None, :] + shift[None, :]


# What is added before the activation: the identity, or the projection of the block's input.
@triton.jit
def _shortcut(
    m,
    n,
    p,
    q,
    rows_ok,
    k,
    k_ok,
    residual_ptr,
    wd_ptr,
    scale_d_ptr,
    shift_d_ptr,
    K,
    HD,
    WD,
    CD,
    STRIDE_D: tl.constexpr,
    HAS_PROJECTION: tl.constexpr,
    ALLOW_TF32: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if HAS_PROJECTION:
        rows = residual_ptr + ((n.to(tl.int64) * HD + p * STRIDE_D) * WD + q * STRIDE_D) * CD
        cols = wd_ptr + k.to(tl.int64) * CD
        acc = _product(
            rows, cols, rows_ok, k_ok, CD, ALLOW_TF32, INTERPRET, BLOCK_M, BLOCK_N, BLOCK_C
        )
        acc = _affine(acc, scale_d_ptr, shift_d_ptr, k, k_ok)
    else:
        rows = residual_ptr + m.to(tl.int64) * K
        acc = tl.load(
            rows[:, None] + k[None, :], mask=rows_ok[:, None] & k_ok[None, :], other=0.0
        ).to(tl.float32)
    return acc


# A program owns BLOCK_M output pixels and walks their K channels in slices of BLOCK_N, as flash
# attention walks keys: two chained products, the second accumulating over the slices.
#
#             MID               slice of K                NEXT
#          +-------+           +-----+                 +--------+
#   pixels |  h2   |  @ W3 ->  |  y  | (stored)  @ Wn  |   h    |  += per slice, stored at the end
#          +-------+           +-----+                 +--------+
#
# Without a next convolution the slices are independent, and SLICES of them make a program of the
# grid's second axis. h2 is rounded to the operand's type, as a layer's output would be; y is
# rounded once and multiplied as stored; sums, scales, shifts and the shortcut are fp32.
@triton.jit
def chain_kernel(
    x_ptr,
    w2_ptr,
    scale2_ptr,
    shift2_ptr,
    w3_ptr,
    scale3_ptr,
    shift3_ptr,
    residual_ptr,
    wd_ptr,
    scale_d_ptr,
    shift_d_ptr,
    wn_ptr,
    scale_n_ptr,
    shift_n_ptr,
    y_ptr,
    h_ptr,
    M,
    H,
    W,
    P,
    Q,
    C,
    MID,
    K,
    HD,
    WD,
    CD,
    NEXT,
    STRIDE: tl.constexpr,
    STRIDE_D: tl.constexpr,
    HAS_CONV2: tl.constexpr,
    HAS_PROJECTION: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    HELD: tl.constexpr,
    LOOP: tl.constexpr,
    ACT: tl.constexpr,
    ALLOW_TF32: tl.constexpr,
    INTERPRET: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_MID: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_NEXT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tl.static_assert(HELD or not HAS_CONV2, "what conv2 gives is nowhere else")
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = m < M
    line = m // Q
    n = line // P
    p = line % P
    q = m % Q
    mid = tl.arange(0, BLOCK_MID)
    mid_ok = mid < MID
    x_rows = x_ptr + m.to(tl.int64) * MID
    dtype = y_ptr.dtype.element_ty

    if HAS_CONV2:
        acc2 = tl.zeros((BLOCK_M, BLOCK_MID), dtype=tl.float32)
        acc2 = _conv3x3(
            acc2, x_ptr, w2_ptr, n, p, q, rows_ok, mid, mid_ok, H, W, C,
            STRIDE, LOOP, ALLOW_TF32, INTERPRET, BLOCK_C,
        )  # fmt: skip
        h2 = activate(_affine(acc2, scale2_ptr, shift2_ptr, mid, mid_ok), ACT)
        if not EVEN_MID:
            # Inf times the zeros beyond the last filter is NaN, which zeros of W3 would not undo.
            h2 = tl.where(mid_ok[None, :], h2, 0.0)
        h2 = h2.to(dtype)
    elif HELD:
        h2 = tl.load(
            x_rows[:, None] + mid[None, :], mask=rows_ok[:, None] & mid_ok[None, :], other=0.0
        )

    j = tl.arange(0, BLOCK_NEXT)
    j_ok = j < NEXT
    if HAS_NEXT:
        acc_n = tl.zeros((BLOCK_M, BLOCK_NEXT), dtype=tl.float32)
        first = 0
        last = K
    else:
        first = tl.program_id(1) * (SLICES * BLOCK_N)
        last = tl.minimum(first + SLICES * BLOCK_N, K)

    for k0 in range(first, last, BLOCK_N):
        k = k0 + tl.arange(0, BLOCK_N)
        k_ok = k < K
        w3_cols = w3_ptr + k.to(tl.int64) * MID
        if HELD:
            w3 = tl.load(
                w3_cols[None, :] + mid[:, None], mask=mid_ok[:, None] & k_ok[None, :], other=0.0
            )
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            acc = dot(h2, w3, acc, ALLOW_TF32, INTERPRET)
        else:
            acc = _product(
                x_rows, w3_cols, rows_ok, k_ok, MID,
                ALLOW_TF32, INTERPRET, BLOCK_M, BLOCK_N, BLOCK_C,
            )  # fmt: skip
        acc = _affine(acc, scale3_ptr, shift3_ptr, k, k_ok)
        acc += _shortcut(
            m, n, p, q, rows_ok, k, k_ok, residual_ptr, wd_ptr, scale_d_ptr, shift_d_ptr,
            K, HD, WD, CD, STRIDE_D, HAS_PROJECTION, ALLOW_TF32, INTERPRET,
            BLOCK_M, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        acc = activate(acc, ACT)
        if not EVEN_K:
            acc = tl.where(k_ok[None, :], acc, 0.0)
        y = acc.to(dtype)
        y_rows = y_ptr + m.to(tl.int64) * K
        tl.store(y_rows[:, None] + k[None, :], y, mask=rows_ok[:, None] & k_ok[None, :])
        if HAS_NEXT:
            wn = tl.load(
                wn_ptr + (j.to(tl.int64) * K)[None, :] + k[:, None],
                mask=k_ok[:, None] & j_ok[None, :],
                other=0.0,
            )
            acc_n = dot(y, wn, acc_n, ALLOW_TF32, INTERPRET)

    if HAS_NEXT:
        h = activate(_affine(acc_n, scale_n_ptr, shift_n_ptr, j, j_ok), ACT)
        h_rows = h_ptr + m.to(tl.int64) * NEXT
        tl.store(h_rows[:, None] + j[None, :], h.to(dtype), mask=rows_ok[:, None] & j_ok[None, :])


# The same idea for two 3x3 convolutions (figure 5 left), whose next layer needs neighbours:
# y = act(conv3x3(x) * scale2 + shift2 + shortcut). A program owns BLOCK_M pixels x BLOCK_N
# channels; programs that share pixels are neighbours.
@triton.jit
def basic_kernel(
    x_ptr,
    w2_ptr,
    scale2_ptr,
    shift2_ptr,
    residual_ptr,
    wd_ptr,
    scale_d_ptr,
    shift_d_ptr,
    y_ptr,
    M,
    H,
    W,
    P,
    Q,
    C,
    K,
    HD,
    WD,
    CD,
    STRIDE: tl.constexpr,
    STRIDE_D: tl.constexpr,
    HAS_PROJECTION: tl.constexpr,
    LOOP: tl.constexpr,
    ACT: tl.constexpr,
    ALLOW_TF32: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_N)
    m = tl.program_id(0) // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_ok = m < M
    k_ok = k < K
    line = m // Q
    n = line // P
    p = line % P
    q = m % Q
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = _conv3x3(
        acc, x_ptr, w2_ptr, n, p, q, rows_ok, k, k_ok, H, W, C,
        STRIDE, LOOP, ALLOW_TF32, INTERPRET, BLOCK_C,
    )  # fmt: skip
    acc = _affine(acc, scale2_ptr, shift2_ptr, k, k_ok)
    acc += _shortcut(
        m, n, p, q, rows_ok, k, k_ok, residual_ptr, wd_ptr, scale_d_ptr, shift_d_ptr,
        K, HD, WD, CD, STRIDE_D, HAS_PROJECTION, ALLOW_TF32, INTERPRET,
        BLOCK_M, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    y_rows = y_ptr + m.to(tl.int64) * K
    tl.store(
        y_rows[:, None] + k[None, :],
        activate(acc, ACT).to(y_ptr.dtype.element_ty),
        mask=rows_ok[:, None] & k_ok[None, :],
    )
