"""act(x * scale + shift + residual), scale and shift per channel: one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activation import activate, activation_code
from .launch import (
    Wrap,
    cdiv,
    channel_vector,
    check_input,
    check_shape,
    check_tensor,
    device_of,
    direct,
    hint,
    needs_int64,
    output_format,
)

# (BLOCK_ROWS, BLOCK_COLS, num_warps): 1,024 elements a tile, 8 a thread, as in add_act. The
# narrowest tile that holds a row wastes no lanes on 7x7 (49) and 14x14 (196) planes in NCHW; the
# widest streams long rows, which channels-last has from 1,024 channels and NCHW from 32x32.
CONFIGS = ((16, 64, 4), (4, 256, 4), (1, 1024, 4))


def choose_config(cols: int) -> tuple[int, int, int]:
    """Heuristic (BLOCK_ROWS, BLOCK_COLS, num_warps) for rows of `cols` elements."""
    for config in CONFIGS:
        if cols <= config[1]:
            return config
    return CONFIGS[-1]


# x as a [ROWS, COLS] matrix in memory order; a program owns a BLOCK_ROWS x BLOCK_COLS tile.
#   channels-last: rows are pixels, columns are channels  -> channel = column
#   NCHW:          rows are (n, c) planes, columns pixels -> channel = row % C
# fp32 inside, the store rounds once.
@triton.jit
def bn_act_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    ROWS,
    COLS,
    C,
    CHANNELS_LAST: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    pid = tl.program_id(0)
    if WIDE:
        COLS = tl.cast(COLS, tl.int64)
    tiles = tl.cdiv(COLS, BLOCK_COLS)
    pid_row = pid // tiles
    pid_col = pid % tiles
    if WIDE:
        pid_row = pid_row.to(tl.int64)
        pid_col = pid_col.to(tl.int64)
    row = pid_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = pid_col * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_ok = row < ROWS
    col_ok = col < COLS
    ok = row_ok[:, None] & col_ok[None, :]
    i = (row * COLS)[:, None] + col[None, :]

    v = tl.load(x_ptr + i, mask=ok, other=0.0).to(tl.float32)
    if CHANNELS_LAST:
        if HAS_SCALE:
            v *= tl.load(scale_ptr + col, mask=col_ok, other=0.0)[None, :]
        if HAS_SHIFT:
            v += tl.load(shift_ptr + col, mask=col_ok, other=0.0)[None, :]
    else:
        c = row % C
        if HAS_SCALE:
            v *= tl.load(scale_ptr + c, mask=row_ok, other=0.0)[:, None]
        if HAS_SHIFT:
            v += tl.load(shift_ptr + c, mask=row_ok, other=0.0)[:, None]
    if HAS_RESIDUAL:
        v += tl.load(residual_ptr + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, activate(v, ACT).to(y_ptr.dtype.element_ty), mask=ok)


def launch_bn_act(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    act: str,
    *,
    config: tuple[int, int, int] | None = None,
    wide: bool | None = None,
    wrap_triton: Wrap = direct,
) -> torch.Tensor:
    """act(x * scale + shift + residual) for x [N, C, *spatial], in x's dtype.

    Output is channels-last where x is, else contiguous. Raises ValueError or TypeError rather
    than read out of bounds.
    """
    check_input(x)
    if x.ndim < 2:
        raise ValueError(f"x: expected at least 2 dimensions, got {x.ndim}")
    c = x.shape[1]
    code = activation_code(act)
    fmt = output_format(x)
    x = x.contiguous(memory_format=fmt)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=fmt)
    if residual is not None:
        check_tensor("residual", residual, x)
        check_shape("residual", residual, x.shape)
        residual = residual.contiguous(memory_format=fmt)
    scale_arg = channel_vector("scale", scale, c, x)
    shift_arg = channel_vector("shift", shift, c, x)
    numel = x.numel()
    if numel == 0:
        return y

    inner = numel // (x.shape[0] * c)
    channels_last = fmt != torch.contiguous_format or inner == 1
    rows, cols = (x.shape[0] * inner, c) if channels_last else (x.shape[0] * c, inner)
    block_rows, block_cols, num_warps = config or choose_config(hint(cols))
    grid = (cdiv(rows, block_rows) * cdiv(cols, block_cols),)
    with device_of(x):
        wrap_triton(bn_act_kernel)[grid](
            x,
            scale_arg,
            shift_arg,
            x if residual is None else residual,
            y,
            rows,
            cols,
            c,
            CHANNELS_LAST=channels_last,
            HAS_SCALE=scale is not None,
            HAS_SHIFT=shift is not None,
            HAS_RESIDUAL=residual is not None,
            ACT=code,
            WIDE=needs_int64(x) if wide is None else wide,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            num_warps=num_warps,
        )
    return y
