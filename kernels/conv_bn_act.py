"""act(conv(x, weight) * scale + shift + residual): implicit GEMM over pixels and channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .activation import activate, activation_code
from .launch import (
    INTERPRET,
    Repeatable,
    Wrap,
    cdiv,
    channel_vector,
    check_input,
    check_shape,
    check_tensor,
    device_of,
    direct,
    hint,
    keep_few,
    needs_int64,
    output_format,
)
from .product import allow_tf32_of_convolutions, dot

# Above this many taps the loops over t, r and s stay loops: unrolled, a 31x31 filter would
# take minutes to compile. 49 keeps the 7x7 stem and every 3x3x3 unrolled. fp32 without tf32 has no
# matrix instruction to feed, its products are unrolled FMAs already: seven of them spill 6 KB.
MAX_STATIC_TAPS = 49


# The epilogue of a BLOCK_M x BLOCK_N tile, in fp32; the store is the only rounding.
@triton.jit
def _finish(
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
def _part(CG, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr):
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
def _tap(
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
    begin, end = _part(CG, SPLITS, BLOCK_C)
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
def _packed_row(
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


class Config(NamedTuple):
    """Tile of output pixels x output channels x input channels, and how it is run."""

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    packed: bool = False

    @property
    def name(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_c}"
        return f"{tile}w{self.num_warps}s{self.num_stages}{'p' if self.packed else ''}"


# BLOCK_M >= 64 in every config: wgmma and tcgen05 have no smaller tile. The larger tiles step by 32
# channels: by 64, the unrolled 3x3 spills 40 and 56 bytes a thread on sm_80. Shared memory is at
# most stages * (M + N) * C * 2 bytes.
HALF_CONFIGS = (
    Config(128, 128, 32, 8, 4),  # 64 KB: most reuse of both operands
    Config(128, 64, 32, 4, 4),  # 48 KB: K <= 64 fills it, so no column of the tile idles
    Config(64, 64, 64, 4, 4),  # 64 KB: small images and batch 1, where CTAs are short
)
# Without tf32 the product is made of FMAs and the operands live in registers: small tiles only
# (a third stage, or 32 channels, spills in 3x3 filters on sm_80 and sm_90).
FLOAT_CONFIGS = (
    Config(64, 64, 16, 4, 2),  # 16 KB
    Config(128, 64, 16, 8, 2),  # 24 KB: many pixels
)
# s and c share the reduction where S * C / groups <= 64: the C = 3 stem reduces over 7 rows of 32
# instead of 49 taps of 16; a depthwise filter over R rows of 16. The block is the power of two. The
# packed index defeats vector loads: more than 16 elements of x a thread spill in the unrolled rows
# on sm_80, and with 64-bit offsets 16 of them do in rows of 32 (208 bytes), hence 8 there.
PACKED_CONFIGS = (
    Config(128, 64, 16, 4, 2, packed=True),
    Config(64, 64, 32, 8, 2, packed=True),
    Config(64, 64, 64, 8, 2, packed=True),
)
PACKED_FLOAT_CONFIGS = (
    Config(64, 32, 16, 4, 2, packed=True),
    Config(64, 32, 32, 8, 2, packed=True),
)


def packed_configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """The packed configs of a dtype, narrowest first; fp32 has no registers for a row of 64."""
    return PACKED_FLOAT_CONFIGS if dtype == torch.float32 else PACKED_CONFIGS


def configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """Every config of a dtype, packed ones included."""
    return (FLOAT_CONFIGS if dtype == torch.float32 else HALF_CONFIGS) + packed_configs(dtype)


def choose_config(
    dtype: torch.dtype, pixels: int, channels: int, outputs: int, row: int, taps: int
) -> Config:
    """Heuristic config: channels and outputs per group, row = S, taps = T * R * S.

    The tile shrinks until there are about as many CTAs as an A100 or H100 has SMs (108, 132).
    """
    if taps > 1:
        for config in packed_configs(dtype):
            if row * channels <= config.block_c:
                return config
    if dtype == torch.float32:
        return FLOAT_CONFIGS[1] if pixels >= 128 * 128 else FLOAT_CONFIGS[0]
    large, tall, small = HALF_CONFIGS

    def tiles(config: Config) -> int:
        return cdiv(pixels, config.block_m) * cdiv(outputs, config.block_n)

    if outputs > 64 and tiles(large) >= 108:
        return large
    return tall if tiles(tall) >= 108 else small


# Multiprocessors that a launch should reach: an H100 has 132, an A100 108.
_PROGRAMS = 132
# Steps of the reduction that a part must be worth: its sums cross memory in fp32, written and read.
_LEAST_STEPS = 4


# Pixels x channels of a program that sums parts: 2 KB of each part.
_SUM_TILE = (8, 64)
_NO_EPILOGUE = {"HAS_SCALE": False, "HAS_SHIFT": False, "HAS_RESIDUAL": False, "ACT": 0}


def choose_splits(tiles: int, steps: int, taps: int) -> int:
    """Parts of the reduction over the channels: 1, or a power of two where tiles alone are few.

    `steps` counts blocks of channels, each of which is worth `taps` products. 7x7 maps of one image
    are one tile of 64 pixels: a layer of 512 filters fills 8 multiprocessors of 132.
    """
    splits = 1
    while (
        2 * splits * tiles <= _PROGRAMS
        and 2 * splits <= steps
        and steps * taps >= 2 * splits * _LEAST_STEPS
    ):
        splits *= 2
    return splits


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
                    acc = _packed_row(
                        acc, x_rows, w_cols, rows_ok, k_ok, iz, iy, ix, t, r, D, H, W, CG,
                        stride_xc, stride_xd, stride_xh, stride_xw,
                        stride_wc, stride_wt, stride_wr, stride_ws,
                        S, DIL_D, DIL_H, DIL_W, ALLOW_TF32, INTERPRET, WIDE, BLOCK_C,
                    )  # fmt: skip
        else:
            for t in range(T):
                for r in range(R):
                    acc = _packed_row(
                        acc, x_rows, w_cols, rows_ok, k_ok, iz, iy, ix, t, r, D, H, W, CG,
                        stride_xc, stride_xd, stride_xh, stride_xw,
                        stride_wc, stride_wt, stride_wr, stride_ws,
                        S, DIL_D, DIL_H, DIL_W, ALLOW_TF32, INTERPRET, WIDE, BLOCK_C,
                    )  # fmt: skip
    elif STATIC:
        for t in tl.static_range(T):
            for r in tl.static_range(R):
                for s in tl.static_range(S):
                    acc = _tap(
                        acc, x_rows, w_cols, rows_ok, k_ok, iz, iy, ix, t, r, s, D, H, W, CG,
                        stride_xc, stride_xd, stride_xh, stride_xw,
                        stride_wc, stride_wt, stride_wr, stride_ws,
                        DIL_D, DIL_H, DIL_W, ALLOW_TF32, INTERPRET, WIDE, SPLITS, BLOCK_C,
                    )  # fmt: skip
    else:
        for t in range(T):
            for r in range(R):
                for s in range(S):
                    acc = _tap(
                        acc, x_rows, w_cols, rows_ok, k_ok, iz, iy, ix, t, r, s, D, H, W, CG,
                        stride_xc, stride_xd, stride_xh, stride_xw,
                        stride_wc, stride_wt, stride_wr, stride_ws,
                        DIL_D, DIL_H, DIL_W, ALLOW_TF32, INTERPRET, WIDE, SPLITS, BLOCK_C,
                    )  # fmt: skip

    y_rows = n * stride_yn + o * stride_yo + p * stride_yp + q * stride_yq
    if SPLITS > 1:
        # Parts lie one after the other, each [pixels, filters].
        y_ptr += tl.program_id(1).to(tl.int64) * M * stride_yq
    _finish(
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
    begin, end = _part(CG, SPLITS, BLOCK_C)
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
    _finish(
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
    _finish(
        acc, scale_ptr, shift_ptr, residual_ptr, y_ptr, y_rows, rows_ok, k, k_ok, stride_yk,
        HAS_SCALE, HAS_SHIFT, HAS_RESIDUAL, ACT,
    )  # fmt: skip


def choose(
    dtype: torch.dtype, pixels: int, channels: int, outputs: int, groups: int, row: int, taps: int
) -> tuple[Config, int]:
    """Config and splits of a launch: pixels of the whole batch, the rest as `choose_config`."""
    config = choose_config(dtype, pixels, channels, outputs, row, taps)
    # In fp32 the tile's operands fill the registers, and an unrolled 3x3 in parts spills.
    if config.packed or dtype == torch.float32:
        return config, 1
    tiles = cdiv(pixels, config.block_m) * cdiv(outputs, config.block_n) * groups
    return config, choose_splits(tiles, cdiv(channels, config.block_c), taps)


def _volume(t: torch.Tensor) -> torch.Tensor:
    """Views [N, C, *spatial] as [N, C, D, H, W] without a copy."""
    while t.ndim < 5:
        t = t.unsqueeze(2)
    return t


def _pixel_stride(t: torch.Tensor) -> int:
    """Stride between neighbouring pixels; a dimension of size 1 may carry any stride."""
    for size, step in zip(reversed(t.shape[2:]), reversed(t.stride()[2:]), strict=True):
        if size > 1:
            return step
    return 1


def _triple(name: str, value: Sequence[int], dims: int, neutral: int, least: int) -> list[int]:
    if len(value) != dims or any(v < least for v in value):
        raise ValueError(f"{name}: expected {dims} integers >= {least}, got {list(value)}")
    return [neutral] * (3 - dims) + list(value)


class Launch(NamedTuple):
    """All of a call that sizes, strides and dtypes decide: what is left are the addresses.

    Where the reduction is computed in parts, [splits, pixels, outputs], ``sums`` adds them up.
    """

    shape: tuple[int, ...]
    fmt: torch.memory_format
    product: Repeatable
    parts: tuple[int, int, int]
    sums: Repeatable | None


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """x itself, or where it is in neither layout a channels-last copy: tiles read that best."""
    if x.ndim <= 3 or x.is_contiguous() or output_format(x) != torch.contiguous_format:
        return x
    fmt = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=fmt)


def _decide(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    fmt: torch.memory_format,
    present: tuple[bool, bool, bool],
    geometry: tuple[list[int], list[int], list[int]],
    groups: int,
    code: int,
    config: Config | None,
    wide: bool | None,
    allow_tf32: bool | None,
    splits: int | None,
) -> Launch:
    """The launch for checked arguments; `present` says whether scale, shift and residual are."""
    strides, pads, dils = geometry
    k_total, cg = weight.shape[:2]
    x5, w5, y5 = _volume(x), _volume(weight), _volume(y)
    size_in, size_out, taps = x5.shape[2:], y5.shape[2:], w5.shape[2:]
    kg = k_total // groups
    pixels = size_out[0] * size_out[1] * size_out[2]
    m = x.shape[0] * pixels
    n_taps = taps[0] * taps[1] * taps[2]
    sx, sw = x5.stride(), w5.stride()
    # How far padding and taps lead out of x, in elements; a dimension that repeats one element
    # (stride 0) still counts pixels.
    reach = sum(
        (p + d * (f - 1)) * (step + 1)
        for p, d, f, step in zip(pads, dils, taps, sx[2:], strict=True)
    )
    if wide is None:
        wide = needs_int64(x, weight, y, reach=reach)
    chosen, parts = choose(x.dtype, hint(m), cg, kg, groups, taps[2], n_taps)
    if splits is None:
        # A symbolic batch serves many images, whose tiles are many; so do tensors beyond 2^31.
        splits = parts if config is None and type(m) is int and not wide else 1
    config = chosen if config is None else config
    if config.packed and taps[2] * cg > config.block_c:
        raise ValueError(f"config: {config.name} packs {config.block_c}, got {taps[2] * cg}")
    tf32 = x.dtype == torch.float32 and (
        allow_tf32_of_convolutions() if allow_tf32 is None else allow_tf32
    )
    tiles = cdiv(m, config.block_m) * cdiv(kg, config.block_n) * groups
    if config.packed and splits > 1:
        raise ValueError(f"splits: expected 1 with {config.name}, got {splits}")
    sy, pixel_step = y5.stride(), _pixel_stride(y5)
    if splits > 1:
        line = size_out[2] * k_total
        sy = (pixels * k_total, 1, size_out[1] * line, line, k_total)
        pixel_step = k_total
    epilogue = {
        "HAS_SCALE": present[0],
        "HAS_SHIFT": present[1],
        "HAS_RESIDUAL": present[2],
        "ACT": code,
    }
    flags = {
        **(epilogue if splits == 1 else _NO_EPILOGUE),
        "ALLOW_TF32": tf32,
        "INTERPRET": INTERPRET,
        "WIDE": wide,
        "SPLITS": splits,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    pointwise = n_taps == 1 and strides == [1, 1, 1] and pads == [0, 0, 0]
    if pointwise and not config.packed:
        # Both layouts leave the pixels of an image evenly spaced along the last dimension.
        kernel = gemm_kernel
        sizes = (
            m, pixels, cg, kg,
            sx[0], sx[1], _pixel_stride(x5), sw[0], sw[1], sy[0], sy[1], pixel_step,
        )  # fmt: skip
    else:
        kernel = conv_kernel
        sizes = (m, *size_in, *size_out, cg, kg, *sx, *sw, *sy)
        for axis, *values in zip("DHW", strides, pads, dils, strict=True):
            flags |= zip((f"STRIDE_{axis}", f"PAD_{axis}", f"DIL_{axis}"), values, strict=True)
        flags |= zip("TRS", taps, strict=True)
        flags["PACKED"] = config.packed
        flags["STATIC"] = n_taps <= MAX_STATIC_TAPS and (tf32 or x.dtype != torch.float32)
    sums = None
    if splits > 1:
        rows, columns = _SUM_TILE
        sums = Repeatable(
            sum_kernel,
            (cdiv(m, rows) * cdiv(k_total, columns),),
            (m, pixels, k_total, y5.stride(0), y5.stride(1), _pixel_stride(y5)),
            {**epilogue, "SPLITS": splits, "BLOCK_M": rows, "BLOCK_N": columns},
        )
    product = Repeatable(kernel, (tiles, splits), sizes, flags)
    return Launch(tuple(y.shape), fmt, product, (splits, m, k_total), sums)


def _fire(
    launch: Launch,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor,
    y: torch.Tensor,
    wrap_triton: Wrap = direct,
) -> None:
    """Launch the kernels; an absent tensor is stood in for by any other."""
    after = (scale, shift, residual)
    with device_of(x):
        if launch.sums is None:
            launch.product(x, weight, *after, y, wrap_triton=wrap_triton)
        else:
            out = torch.empty(launch.parts, dtype=torch.float32, device=x.device)
            launch.product(x, weight, *after, out, wrap_triton=wrap_triton)
            launch.sums(out, *after, y, wrap_triton=wrap_triton)


def launch_conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    *,
    config: Config | None = None,
    wide: bool | None = None,
    allow_tf32: bool | None = None,
    splits: int | None = None,
    wrap_triton: Wrap = direct,
    keep: Callable[[Launch], None] | None = None,
) -> torch.Tensor:
    """act(conv(x, weight) * scale + shift + residual) in x's dtype, accumulated in fp32.

    x is [N, C, *spatial] with one to three spatial dimensions and any strides; weight is
    [K, C / groups, *filter] with any strides. `config` overrides the heuristic, `wide` the
    choice of 64-bit offsets, `allow_tf32` torch.backends.cudnn.allow_tf32, `splits` the parts that
    the reduction over the channels is computed in; `keep` is given the launch. Raises ValueError
    or TypeError rather than read out of bounds.
    """
    check_input(x)
    check_tensor("weight", weight, x)
    dims = x.ndim - 2
    if dims not in (1, 2, 3) or weight.ndim != x.ndim:
        raise ValueError(
            "weight: expected x and weight of the same rank, 3 to 5, "
            f"got ranks {x.ndim} and {weight.ndim}"
        )
    strides = _triple("stride", stride, dims, 1, 1)
    pads = _triple("padding", padding, dims, 0, 0)
    dils = _triple("dilation", dilation, dims, 1, 1)
    # A symbolic size is not asked: that would guard on it.
    if any(type(v) is int and v >= 1 << 31 for v in (*x.shape[2:], *pads)):
        raise ValueError(f"x: expected dimensions and padding below 2^31, got {tuple(x.shape)}")
    k_total, cg = weight.shape[:2]
    if groups < 1 or x.shape[1] != cg * groups or k_total % groups:
        raise ValueError(
            f"groups: expected a divisor of the channels with weight of {x.shape[1]} / groups "
            f"inputs, got groups {groups} and weight {tuple(weight.shape)}"
        )
    code = activation_code(act)

    fmt = output_format(x)
    x = _laid_out(x)
    taps = weight.shape[2:]
    size_out = [
        (i + 2 * p - d * (f - 1) - 1) // s + 1
        for i, f, s, p, d in zip(
            x.shape[2:], taps, strides[-dims:], pads[-dims:], dils[-dims:], strict=True
        )
    ]
    if any(v < 1 for v in size_out) or any(f < 1 for f in taps):
        raise ValueError(
            f"weight: expected a filter no larger than the padded input, got {tuple(weight.shape)} "
            f"on {tuple(x.shape)}"
        )
    shape = (x.shape[0], k_total, *size_out)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=fmt)
    if residual is not None:
        check_tensor("residual", residual, x)
        check_shape("residual", residual, y.shape)
        residual = residual.contiguous(memory_format=fmt)
    vectors = (
        channel_vector("scale", scale, k_total, x),
        channel_vector("shift", shift, k_total, x),
    )
    if y.numel() == 0:
        return y
    present = (scale is not None, shift is not None, residual is not None)
    geometry = (strides, pads, dils)
    launch = _decide(
        x, weight, y, fmt, present, geometry, groups, code, config, wide, allow_tf32, splits
    )
    _fire(launch, x, weight, *vectors, x if residual is None else residual, y, wrap_triton)
    if keep is not None:
        keep(launch)
    return y


def prepare_conv_bn_act(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """:func:`launch_conv_bn_act` with all but input and residual bound.

    Checks, sizes, strides and the choice of a tile cost the host more than a small convolution
    costs the device. They depend on the kind of the arguments alone: the first call of a kind pays
    for them, those that follow allocate the output and launch.
    """
    scale, shift = (None if t is None else t.to(torch.float32).contiguous() for t in (scale, shift))
    known: dict[Any, Launch] = {}

    def call(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        kind = (x.shape, x.stride(), x.dtype, x.device, residual is None)
        if x.dtype == torch.float32:
            kind = (*kind, allow_tf32_of_convolutions())
        launch = known.get(kind)
        if launch is None:
            return launch_conv_bn_act(
                *(x, weight, scale, shift, residual, stride, padding, dilation, groups, act),
                keep=lambda launch: keep_few(known, kind, launch),
            )
        x = _laid_out(x)
        y = torch.empty(launch.shape, dtype=x.dtype, device=x.device, memory_format=launch.fmt)
        if residual is None:
            residual = x
        else:
            check_tensor("residual", residual, x)
            check_shape("residual", residual, launch.shape)
            residual = residual.contiguous(memory_format=launch.fmt)
        vectors = (x if scale is None else scale, x if shift is None else shift)
        _fire(launch, x, weight, *vectors, residual, y)
        return y

    return call
