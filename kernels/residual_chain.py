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

Here a call is checked and launched. The device code is in ``chain_kernels.py``, tiles and their
choice in ``chain_tiles.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .activation import activation_code
from .chain_kernels import basic_kernel, chain_kernel
from .chain_tiles import MAX_HELD, Config, block, choose_config, slices_of
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
)
from .product import allow_tf32_of_convolutions


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
            "EVEN_MID": mid == block(mid),
            "EVEN_K": outputs % config.block_n == 0,
            "BLOCK_MID": block(mid),
            "BLOCK_NEXT": block(following),
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
