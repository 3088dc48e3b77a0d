"""act(conv(x, weight) * scale + shift + residual): implicit GEMM over pixels and channels.

Here a call is checked and launched. The device code is in ``conv_kernels.py`` and ``conv_taps.py``,
tiles and their choice in ``conv_tiles.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .activation import activation_code
from .conv_kernels import conv_kernel, gemm_kernel, sum_kernel
from .conv_tiles import Config, choose
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
from .product import allow_tf32_of_convolutions

# Above this many taps the loops over t, r and s stay loops: unrolled, a 31x31 filter would
# take minutes to compile. 49 keeps the 7x7 stem and every 3x3x3 unrolled. fp32 without tf32 has no
# matrix instruction to feed, its products are unrolled FMAs already: seven of them spill 6 KB.
MAX_STATIC_TAPS = 49
# Pixels x channels of a program that sums parts: 2 KB of each part.
_SUM_TILE = (8, 64)
_NO_EPILOGUE = {"HAS_SCALE": False, "HAS_SHIFT": False, "HAS_RESIDUAL": False, "ACT": 0}


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
