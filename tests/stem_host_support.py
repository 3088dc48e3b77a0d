"""The stem's CUDA kernel on the host: cases, and what they are judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from host_support import run
from torch import Tensor

from resnet_fast import ops
from resnet_fast.ops import activation
from resnet_fast.testing.budget import expect_within_budget, in_formats
from resnet_fast.testing.tf32 import rounded

reference = ops.module("stem_pool").reference


class Arguments(NamedTuple):
    """What ``stem_pool`` takes, in its order."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    input_scale: Tensor | None
    input_shift: Tensor | None
    act: str


def draw(
    shape: tuple[int, ...],
    filters: int,
    dtype: torch.dtype,
    layout: str = "last",
    raw: bool = False,
    act: str = "relu",
) -> Arguments:
    """Random arguments; ``raw`` is an image of uint8 with its normalisation."""
    channels = shape[1]
    x = torch.randint(0, 256, shape).to(torch.uint8) if raw else torch.randn(shape).to(dtype)
    weight = (torch.randn(filters, channels, 7, 7) / (49 * channels) ** 0.5).to(dtype)
    vectors: tuple[Tensor | None, Tensor | None] = (None, None)
    if raw:
        vectors = (1 / (64 + torch.rand(channels)), -2 * torch.rand(channels) - 1)
    affine = (torch.randn(filters) + 0.5, torch.randn(filters))
    return Arguments(laid_out(x, layout), weight, *affine, *vectors, act)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` channels-last, contiguous, or as a slice that is neither."""
    if layout == "last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        # Every second channel of a larger image, one column in; what lies between is hostile.
        wide = torch.full((x.shape[0], 2 * x.shape[1], x.shape[2], x.shape[3] + 1), 199.0)
        view = wide.to(x.dtype)[:, ::2, :, 1:]
        view.copy_(x)
        return view
    return x.contiguous()


class Launch(NamedTuple):
    """What the kernel was launched with; the image's access is one of ``StemAccess``."""

    strip: int
    tiles: int
    across: int
    shared: int
    access: int
    blocks: int


def launch(
    program: Path,
    a: Arguments,
    *,
    tiling: tuple[int, int] = (0, 0),
    multiprocessors: int = 132,
    shared: int = 228,
    resident: int = 1 << 30,
    **schedule: Any,
) -> tuple[Tensor, Launch]:
    """What the kernel makes of ``a``, channels-last where ``x`` is so and not contiguous too.

    ``tiling`` is a strip and its tiles, (0, 0) for those that are chosen for a device of so many
    multiprocessors with so many KiB of shared memory.
    """
    n, channels, height, width = a.x.shape
    filters = a.weight.shape[0]
    last = a.x.is_contiguous(memory_format=torch.channels_last) and not a.x.is_contiguous()
    elements = a.x.untyped_storage().nbytes() // a.x.element_size()
    integers = {
        "x_offset": a.x.storage_offset(),
        **dict(zip(("x_image", "x_channel", "x_row", "x_column"), a.x.stride(), strict=True)),
        **dict(zip(("w_filter", "w_channel", "w_row", "w_column"), a.weight.stride(), strict=True)),
        **{"batch": n, "channels": channels, "height": height, "width": width},
        **{"filters": filters, "strip": tiling[0], "tiles": tiling[1]},
        **{"multiprocessors": multiprocessors, "shared": shared, "resident": resident},
        **{"channels_last": last, "act": activation.code(a.act)},
    }
    results = run(
        program,
        tensors={
            "x": a.x.as_strided((elements,), (1,), 0),
            "weight": a.weight.as_strided((a.weight.numel(),), (1,), 0),
            "scale": a.scale,
            "shift": a.shift,
            "input_scale": a.input_scale,
            "input_shift": a.input_shift,
        },
        outputs={"launched": torch.int32, "y": a.weight.dtype},
        dtype=str(a.weight.dtype).removeprefix("torch."),
        image=str(a.x.dtype).removeprefix("torch."),
        **integers,
        **schedule,
    )
    y = results["y"]
    rows, columns = (height + 3) // 4, (width + 3) // 4
    if last:
        y = y.view(n, rows, columns, filters).permute(0, 3, 1, 2)
    return y.view(n, filters, rows, columns), Launch(*results["launched"].tolist())


def expect(y: Tensor, a: Arguments) -> None:
    """``y`` within the budget of the framework's layers in the dtype, of fp64."""
    assert y.dtype is a.weight.dtype
    truth = reference(*(v.double() if isinstance(v, Tensor) else v for v in a))
    if y.dtype is torch.float32:
        a = in_tf32(a)
    expect_within_budget(y, in_formats(reference, *a), truth)


def in_tf32(a: Arguments) -> Arguments:
    """What a TF32 convolution multiplies: image and weight rounded to 10 bits of fraction."""
    x = a.x.float()
    for vector, op in ((a.input_scale, torch.mul), (a.input_shift, torch.add)):
        x = x if vector is None else op(x, vector.view(1, -1, 1, 1))
    return a._replace(x=rounded(x), weight=rounded(a.weight), input_scale=None, input_shift=None)
