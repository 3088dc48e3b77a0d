"""A residual block's tail as one kernel: conv2, conv3, the add, and the next block's conv1.

What a bottleneck (He et al. 2015, figure 5 right) computes from h1, the output of its first
convolution, and what the block after it computes first:

    h2 = act(conv3x3(h1) * scale2 + shift2)                  stays on chip
    y  = act(h2 @ W3 * scale3 + shift3 + residual)           stored once
    h  = act(y @ Wn * scale_n + shift_n)                     y comes from registers, not from memory

In planes of one mid-width activation the layers move 16 (conv1 4 + 1, conv2 1 + 1, conv3 1 + 4 and
4), the chain 10: h1 1, residual 4, y 4, h 1. A projection shortcut is one more product, from the
block's own input, instead of four planes written and read back. The 1x1 convolutions need no
neighbours, so nothing is computed twice; conv2 reads the same halo as it does on its own.
"""

from __future__ import annotations

import re
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
    check_input,
    check_shape,
    check_tensor,
    device_of,
    direct,
    hint,
    keep_few,
    next_power_of_2,
)
from .product import allow_tf32_of_convolutions, dot


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


class Config(NamedTuple):
    """Pixels and output channels a step, input channels a product, and how it is run."""

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    loop: bool = True

    @property
    def name(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_c}"
        return f"{tile}w{self.num_warps}s{self.num_stages}{'' if self.loop else 'u'}"

    @classmethod
    def parse(cls, name: str) -> Config:
        """The config of a name. Raises ValueError for a text that is none."""
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)w(\d+)s(\d+)(u?)", name)
        if found is None:
            raise ValueError(f"config: expected a name such as 128x64x64w8s3, got {name!r}")
        return cls(*map(int, found.groups()[:5]), loop=not found[6])


# No spills on sm_80 and sm_100 in any form that a network has, at 12 to 104 KB of shared memory.
SMALL = Config(64, 32, 64, 8, 2)
# sm_90 alone, each the fastest of those without a spill on an H200 at 128 images
# (docs/residual_chain.md); on sm_80 and sm_100 they spill in one form or another.
NARROW = Config(64, 32, 64, 4, 3)  # conv2 of 64 channels: four programs a multiprocessor
FIRST = Config(64, 64, 64, 4, 3)  # the same with a projection
WIDE = Config(128, 64, 64, 8, 3)  # 128 channels, next too; weights cross from L2 once a program
WIDER = Config(128, 32, 64, 8, 4)  # 256 next: half the slice pays for twice the next channels
HELD = Config(128, 32, 64, 8, 3)  # h2 of 256 channels in 128 KB of shared memory
PROJECTED = Config(64, 64, 64, 8, 3)
# The taps unrolled instead of in one loop, which Triton has miscompiled in a convolution
# (https://github.com/pytorch/pytorch/issues/173068).
UNROLLED = WIDE._replace(loop=False)
TF32 = Config(64, 32, 32, 8, 2)
TF32_NARROW = Config(64, 32, 16, 8, 2)  # sm_100: steps of 32 channels spill 16 bytes

# Bytes of a pixel's h2 held on chip over the slices; a longer one is read again for each slice. One
# in fp32 is held twice, as it is and rounded to TF32.
MAX_HELD = {torch.float16: 1024, torch.bfloat16: 1024, torch.float32: 512}
# Programs that keep 132 multiprocessors busy, two on each.
_PROGRAMS = 264


def configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """Every config of a dtype."""
    if dtype == torch.float32:
        return TF32, TF32_NARROW
    return SMALL, NARROW, FIRST, WIDE, WIDER, HELD, PROJECTED, UNROLLED


def _block(channels: int) -> int:
    """The power of two, 16 or more, that covers the channels: a tile's side."""
    return max(16, next_power_of_2(channels))


def choose_config(
    dtype: torch.dtype,
    arch: int,
    mid: int,
    following: int,
    conv2: bool,
    projection: bool,
    whole: bool = True,
) -> Config:
    """Heuristic config for sm_<arch>: mid-channels of h2, and the next convolution's (0: none).

    `whole` says that every count of channels is a multiple of 64.
    """
    if dtype == torch.float32:
        return TF32_NARROW if arch >= 100 else TF32
    # Masks of partial blocks take registers: with them the larger tiles spill up to 900 bytes, and
    # one that did gave wrong sums on an H200 (K = 72, a projection of any width).
    if arch != 90 or not whole:
        return SMALL
    widest = max(_block(following), _block(mid) if conv2 else 0)
    if following == 0 and not conv2:
        return WIDE
    if projection:
        return FIRST if conv2 and widest <= 64 else PROJECTED
    if widest > 256:
        return SMALL
    if not conv2:
        return HELD
    if mid <= 64 and widest <= 128:
        return NARROW
    return WIDE if widest <= 128 else WIDER


def slices_of(pixels: int, steps: int, config: Config) -> int:
    """Slices of the output channels that one program takes where they are independent."""
    splits = max(1, min(steps, _PROGRAMS // max(1, cdiv(pixels, config.block_m))))
    return min(steps, next_power_of_2(cdiv(steps, splits)))


def runs(x: torch.Tensor) -> bool:
    """Whether the kernels are for x: without tf32 an fp32 product has no matrix instruction."""
    return x.dtype in (torch.float16, torch.bfloat16) or (
        x.dtype == torch.float32 and allow_tf32_of_convolutions()
    )


def _arch(x: torch.Tensor) -> int:
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


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


def _dense(name: str, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor of rank 4 with its channels innermost."""
    check_tensor(name, t, like)
    if t.ndim != 4:
        raise ValueError(f"{name}: expected rank 4, got {t.ndim}")
    return t.contiguous(memory_format=torch.channels_last)


def _vectors(
    suffix: str,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    x: torch.Tensor,
    absent: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of one convolution as fp32 vectors, 1 and 0 where there are none.

    `absent` stands in where there is no convolution.
    """
    if weight is None:
        if scale is not None or shift is not None:
            raise ValueError(f"scale{suffix}, shift{suffix}: expected none without weight{suffix}")
        return absent, absent
    found = []
    for name, vector, neutral in (("scale", scale, 1.0), ("shift", shift, 0.0)):
        if vector is None:
            vector = x.new_full((weight.shape[0],), neutral, dtype=torch.float32)
        check_shape(name + suffix, vector, weight.shape[:1])
        if vector.device != x.device:
            raise ValueError(f"{name}{suffix}: expected a tensor on {x.device}")
        found.append(vector.to(torch.float32).contiguous())
    return found[0], found[1]


class Launch(NamedTuple):
    """All of a call that its arguments' kinds and its parameters decide.

    The kernel takes x, ``before``, the residual, ``after``, and the outputs.
    """

    shapes: tuple[tuple[int, ...], ...]
    before: tuple[torch.Tensor, ...]
    after: tuple[torch.Tensor, ...]
    kernel: Repeatable


def _empty(shapes: Sequence[tuple[int, ...]], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        if len(shape) == 4
        else x.new_empty(shape)
        for shape in shapes
    )


def launch_residual_chain(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight2: torch.Tensor | None,
    scale2: torch.Tensor | None,
    shift2: torch.Tensor | None,
    weight3: torch.Tensor | None,
    scale3: torch.Tensor | None,
    shift3: torch.Tensor | None,
    weight_d: torch.Tensor | None,
    scale_d: torch.Tensor | None,
    shift_d: torch.Tensor | None,
    weight_n: torch.Tensor | None,
    scale_n: torch.Tensor | None,
    shift_n: torch.Tensor | None,
    stride: int,
    stride_d: int,
    act: str,
    *,
    config: Config | None = None,
    allow_tf32: bool | None = None,
    wrap_triton: Wrap = direct,
    keep: Callable[[Launch], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The block's output and the next convolution's, both channels-last, in x's dtype.

    See resnet_fast.ops.residual_chain for the arguments. Tensors in another layout are copied
    first. `config` overrides the heuristic, `allow_tf32` torch.backends.cudnn.allow_tf32; `keep` is
    given the launch. Raises ValueError or TypeError rather than read out of bounds.
    """
    check_input(x)
    if weight2 is None and weight3 is None:
        raise ValueError("weight2, weight3: expected one of them at least")
    if weight3 is None and weight_n is not None:
        raise ValueError("weight_n: expected none without weight3")
    x = _dense("x", x, x)
    residual = _dense("residual", residual, x)
    code = activation_code(act)
    images, channels, height, width = x.shape
    p, q, mid = height, width, channels
    if weight2 is not None:
        weight2 = _dense("weight2", weight2, x)
        if stride not in (1, 2):
            raise ValueError(f"stride: expected 1 or 2, got {stride}")
        check_shape("weight2", weight2, (weight2.shape[0], channels, 3, 3))
        p, q, mid = (height - 1) // stride + 1, (width - 1) // stride + 1, weight2.shape[0]
    elif stride != 1:
        raise ValueError(f"stride: expected 1 without weight2, got {stride}")
    outputs = mid
    if weight3 is not None:
        weight3 = _dense("weight3", weight3, x)
        check_shape("weight3", weight3, (weight3.shape[0], mid, 1, 1))
        outputs = weight3.shape[0]
    following = 0
    if weight_n is not None:
        weight_n = _dense("weight_n", weight_n, x)
        check_shape("weight_n", weight_n, (weight_n.shape[0], outputs, 1, 1))
        following = weight_n.shape[0]
    if weight_d is not None:
        weight_d = _dense("weight_d", weight_d, x)
        check_shape("weight_d", weight_d, (outputs, residual.shape[1], 1, 1))
        hd, wd = residual.shape[2:]
        if stride_d < 1 or (hd - 1) // stride_d + 1 != p or (wd - 1) // stride_d + 1 != q:
            raise ValueError(
                f"residual: expected {p} x {q} pixels at stride_d {stride_d}, got {hd} x {wd}"
            )
        check_shape("residual", residual, (images, *residual.shape[1:]))
    else:
        if stride_d != 1:
            raise ValueError(f"stride_d: expected 1 without weight_d, got {stride_d}")
        check_shape("residual", residual, (images, outputs, p, q))
    # What stands in for an absent tensor is never read; x would be kept alive by a kept launch.
    absent = weight2 if weight3 is None else weight3
    assert absent is not None
    vectors2 = _vectors("2", weight2, scale2, shift2, x, absent)
    vectors3 = _vectors("3", weight3, scale3, shift3, x, absent)
    vectors_d = _vectors("_d", weight_d, scale_d, shift_d, x, absent)
    vectors_n = _vectors("_n", weight_n, scale_n, shift_n, x, absent)

    def pointer(t: torch.Tensor | None) -> torch.Tensor:
        return absent if t is None else t

    before = (pointer(weight2), *vectors2)
    after = (pointer(weight_d), *vectors_d)
    shape = (images, outputs, p, q)
    shapes = (shape, (images, following, p, q) if weight_n is not None else (0,))
    m = images * p * q
    if m == 0 or outputs == 0:
        y, h = _empty(shapes, x)
        return y, h
    if type(m) is int and m >= 1 << 31:
        raise ValueError(f"x: expected fewer than 2^31 output pixels, got {m}")
    tf32 = x.dtype == torch.float32 and (
        allow_tf32_of_convolutions() if allow_tf32 is None else allow_tf32
    )
    if x.dtype == torch.float32 and not (tf32 or INTERPRET):
        raise TypeError("x: expected float16, bfloat16, or float32 where tf32 is allowed")
    if config is None:
        conv2 = weight2 is not None and weight3 is not None
        projected = 0 if weight_d is None else residual.shape[1]
        whole = all(c % 64 == 0 for c in (channels, mid, outputs, following, projected))
        config = choose_config(x.dtype, _arch(x), mid, following, conv2, projected > 0, whole)
    residual_size = (*residual.shape[2:], residual.shape[1])
    flags: dict[str, Any] = {
        "STRIDE": stride,
        "STRIDE_D": stride_d,
        "HAS_PROJECTION": weight_d is not None,
        "LOOP": config.loop,
        "ACT": code,
        "ALLOW_TF32": tf32,
        "INTERPRET": INTERPRET,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }

    rows = cdiv(m, config.block_m)
    sizes = (m, height, width, p, q, channels)
    if weight3 is None:
        shapes = shapes[:1]
        grid: tuple[int, ...] = (rows * cdiv(outputs, config.block_n),)
        kernel = Repeatable(basic_kernel, grid, (*sizes, outputs, *residual_size), flags)
    else:
        before = (*before, weight3, *vectors3)
        after = (*after, pointer(weight_n), *vectors_n)
        steps = cdiv(outputs, config.block_n)
        slices = steps if weight_n is not None else slices_of(hint(m), steps, config)
        flags |= {
            "HAS_CONV2": weight2 is not None,
            "HAS_NEXT": weight_n is not None,
            "HELD": weight2 is not None or mid * x.element_size() <= MAX_HELD[x.dtype],
            "SLICES": slices,
            "EVEN_MID": mid == _block(mid),
            "EVEN_K": outputs % config.block_n == 0,
            "BLOCK_MID": _block(mid),
            "BLOCK_NEXT": _block(following),
        }
        sizes = (*sizes, mid, outputs, *residual_size, following)
        kernel = Repeatable(chain_kernel, (rows, cdiv(steps, slices)), sizes, flags)
    launch = Launch(shapes, before, after, kernel)
    results = _fire(launch, x, residual, wrap_triton)
    if keep is not None:
        keep(launch)
    return results


def _fire(
    launch: Launch, x: torch.Tensor, residual: torch.Tensor, wrap_triton: Wrap = direct
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the outputs and launch."""
    outputs = _empty(launch.shapes, x)
    operands = (x, *launch.before, residual, *launch.after, *outputs)
    with device_of(x):
        launch.kernel(*operands, wrap_triton=wrap_triton)
    return outputs[0], outputs[1] if len(outputs) > 1 else x.new_empty(0)


def prepare_residual_chain(
    *parameters: Any,
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """:func:`launch_residual_chain` with all arguments but the first two bound.

    The first call of a kind decides for those that follow, which allocate and launch.
    """
    known: dict[Any, Launch] = {}

    def call(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kind = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (x, residual))
        if x.dtype == torch.float32:
            kind = (*kind, allow_tf32_of_convolutions())
        launch = known.get(kind)
        if launch is None:
            return launch_residual_chain(
                x, residual, *parameters, keep=lambda launch: keep_few(known, kind, launch)
            )
        last = torch.channels_last
        return _fire(
            launch, x.contiguous(memory_format=last), residual.contiguous(memory_format=last)
        )

    return call
