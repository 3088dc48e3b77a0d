"""The CUDA library's convolutions, run on the host, against PyTorch in fp64.

tests/cuda_on_host gives each instruction its documented meaning: copies land as late as the rules
allow, shared memory starts as NaN, races and accesses out of range are errors. Outputs start as
NaN between guards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conv_host_support import (
    DTYPES,
    GEMM,
    NARROW,
    SHAPES,
    Conv,
    conv,
    draw_operands,
    nhwc,
    tiles,
)
from host_support import HostError, driver, run
from torch import Tensor

from resnet_fast.ops import activation
from resnet_fast.testing.budget import expect_within_budget as check
from resnet_fast.testing.budget import within_budget

KERNEL = "csrc/cuda/conv_bn_act.cuh"
DRIVER = "tests/cuda_on_host/conv_bn_act.cpp"
GROUPED = "csrc/cuda/conv_bn_act_grouped.cuh"


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    act: str = "relu"

    def reference(self, shape: Conv, dtype: torch.dtype) -> Tensor:
        """The layers one by one in ``dtype``."""
        z = conv(self.x.to(dtype), self.weight.to(dtype), shape)
        wide = torch.promote_types(dtype, torch.float32)
        if self.scale is not None:
            z = (z * self.scale.to(wide).view(-1, 1, 1)).to(dtype)
        if self.shift is not None:
            z = (z + self.shift.to(wide).view(-1, 1, 1)).to(dtype)
        if self.residual is not None:
            z = z + self.residual.to(dtype)
        return activation.value(self.act, z)


def draw(
    shape: Conv, dtype: torch.dtype, act: str = "relu", parts: str = "scale shift residual"
) -> Inputs:
    x, weight, generator = draw_operands(shape, dtype)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    residual = normal(shape.batch, shape.filters, shape.out(0), shape.out(1)).to(dtype)
    return Inputs(
        x,
        weight,
        0.5 + torch.rand(shape.filters, generator=generator) if "scale" in parts else None,
        normal(shape.filters) if "shift" in parts else None,
        residual if "residual" in parts else None,
        act,
    )


def run_conv(
    program: Path,
    shape: Conv,
    given: Inputs,
    tile: str,
    parts: int = 1,
    copy: int | None = None,
    wide: bool = True,
    order: str = "ascending",
    seed: int = 0,
) -> Tensor:
    """The kernel's output as [N, K, P, Q]."""
    dtype = given.x.dtype
    tensors = {
        "x": nhwc(given.x),
        "weight": nhwc(given.weight),
        "scale": given.scale,
        "shift": given.shift,
        "residual": nhwc(given.residual),
    }
    y = run(
        program,
        tensors=tensors,
        outputs={"y": dtype},
        order=order,
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        act=activation.code(given.act),
        tile=tile,
        parts=parts,
        copy=shape.copy(dtype) if copy is None else copy,
        wide=int(wide),
        **shape.values(),
    )["y"]
    return y.view(shape.batch, shape.out(0), shape.out(1), shape.filters).permute(0, 3, 1, 2)


def expect(shape: Conv, given: Inputs, actual: Tensor) -> None:
    truth = given.reference(shape, torch.float64)
    check(actual, given.reference(shape, given.x.dtype), truth)


@pytest.fixture(scope="session")
def program() -> Path:
    return driver("conv_bn_act")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_computes_every_shape(program: Path, shape: Conv, dtype: torch.dtype) -> None:
    given = draw(shape, dtype)
    for tile in tiles(dtype):
        expect(shape, given, run_conv(program, shape, given, tile))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NARROW, ids=str)
def test_channels_that_no_wide_copy_divides(program: Path, shape: Conv, dtype: torch.dtype) -> None:
    given = draw(shape, dtype)
    expect(shape, given, run_conv(program, shape, given, "128x64x3"))


@pytest.mark.parametrize("copy", [4, 0])
def test_a_misaligned_view_takes_narrower_copies(program: Path, copy: int) -> None:
    shape = SHAPES[1]
    given = draw(shape, torch.float16)
    expect(shape, given, run_conv(program, shape, given, "128x64x3", copy=copy, wide=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_of_k_are_added_in_order(program: Path, parts: int, dtype: torch.dtype) -> None:
    for shape in (SHAPES[1], SHAPES[6], NARROW[0]):
        given = draw(shape, dtype)
        tile = "64x64x4" if shape.copy(dtype) == 16 else "128x64x3"
        actual = run_conv(program, shape, given, tile, parts)
        expect(shape, given, actual)
        again = run_conv(program, shape, given, tile, parts, order="shuffled", seed=3)
        assert torch.equal(actual, again)


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_every_activation(program: Path, act: str) -> None:
    shape = SHAPES[0]
    for dtype in DTYPES:
        given = draw(shape, dtype, act)
        expect(shape, given, run_conv(program, shape, given, "64x64x4"))


@pytest.mark.parametrize("present", ["", "scale", "shift", "residual", "scale shift"])
def test_absent_parts_of_the_epilogue(program: Path, present: str) -> None:
    shape = replace(SHAPES[1], filters=76)  # its last vector of 8 filters is half empty
    given = draw(shape, torch.float16, "none", present)
    for parts in (1, 2):
        expect(shape, given, run_conv(program, shape, given, "128x64x4", parts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_changes_no_bit(program: Path, dtype: torch.dtype) -> None:
    for shape in (SHAPES[1], SHAPES[5], NARROW[0]):
        given = draw(shape, dtype)
        names = tiles(dtype) if shape.copy(dtype) == 16 else ("128x64x3",)
        for tile in names:
            first = run_conv(program, shape, given, tile)
            for order, seed in (("descending", 0), ("shuffled", 1), ("shuffled", 2)):
                again = run_conv(program, shape, given, tile, order=order, seed=seed)
                assert torch.equal(first, again)


@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("tile", ["128x64x3", "grouped"])
def test_a_special_value_reaches_what_sees_it_and_nothing_else(
    program: Path, tile: str, special: float
) -> None:
    shape = Conv(2, 32, (6, 7), 32, (3, 3), padding=(1, 1), groups=8 if tile == "grouped" else 2)
    given = draw(shape, torch.float16, "none")
    given.x[1, 13, 2, 5] = special
    truth = given.reference(shape, torch.float64)
    assert 0 < (~truth.isfinite()).sum() < truth.numel() / 4
    expect(shape, given, run_conv(program, shape, given, tile))


GROUPED_SHAPES = (
    Conv(2, 40, (7, 9), 40, (3, 3), padding=(1, 1), groups=40),
    Conv(1, 32, (8, 6), 32, (5, 5), stride=(2, 2), padding=(2, 2), groups=32),
    Conv(1, 64, (5, 11), 64, (3, 3), padding=(1, 1), groups=32),
    Conv(2, 24, (7, 7), 24, (3, 3), stride=(2, 1), padding=(1, 1), groups=6),
    Conv(1, 8, (9, 5), 8, (3, 2), dilation=(2, 2), padding=(0, 1), groups=2),
    Conv(1, 48, (4, 4), 48, (3, 3), padding=(1, 1), groups=6),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GROUPED_SHAPES, ids=str)
def test_narrow_groups(program: Path, shape: Conv, dtype: torch.dtype) -> None:
    if 16 // dtype.itemsize < shape.channels // shape.groups:
        pytest.skip("four channels of fp32 are a vector: wider groups go to the tensor cores")
    for act, present in (("silu", "scale shift residual"), ("none", "")):
        given = draw(shape, dtype, act, present)
        actual = run_conv(program, shape, given, "grouped")
        expect(shape, given, actual)
        again = run_conv(program, shape, given, "grouped", order="descending")
        assert torch.equal(actual, again)


WAIT = "    wait_copies<Tile::kStages - 2>();\n"
COPY_X = """swizzled(row, chunk) + within;
      if constexpr (Tile::kCopy != 0) {
        const bool inside = tap_[0]"""
STRIP = """      sync_warp();
      float value[kTurns]"""
FAR = "out of range|Address|wrong"

# One bug of each kind: the file, its text, the text instead, and what shows it: the layer's word
# for it, or a wrong result.
BUGS = {
    "a missing wait": (GEMM, WAIT, "", "race|wrong"),
    "a wait for one group too few": (GEMM, WAIT, WAIT.replace("2", "1"), "race|wrong"),
    "a missing barrier in the loop": (
        GEMM,
        "filled next.\n    sync_block();",
        "filled next.\n",
        "race",
    ),
    "a missing barrier before the epilogue": (
        GEMM,
        "  wait_copies<0>();\n  sync_block();",
        "  wait_copies<0>();",
        "race|wrong",
    ),
    "a pixel too many": (GEMM, "if (m >= pixels)", "if (m > pixels)", FAR),
    "a store behind the last pixel": (
        KERNEL,
        "if (m >= place.pixels || present <= 0)",
        "if (m > place.pixels || present <= 0)",
        "guard|Address",
    ),
    "a filter too many": (GEMM, "row < filters_ && k_ < depth_", "k_ < depth_", FAR),
    "k beyond its end": (GEMM, "row < filters_ && k_ < depth_", "row < filters_", FAR),
    "another swizzle for copies": (
        GEMM,
        COPY_X,
        COPY_X.replace("(row, chunk)", "(row, chunk ^ 1)"),
        "wrong",
    ),
    "a halo read as if inside": (
        GEMM,
        "(pixel.rows >> row) & (pixel.columns >> column) & 1u",
        "pixel.rows >> row & 1u",
        FAR,
    ),
    "a strip read before it is written": (
        GEMM,
        STRIP,
        STRIP.replace("      sync_warp();\n", ""),
        "race|wrong",
    ),
    "weights read before they are written": (GROUPED, "  sync_block();\n", "", "race|wrong"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str) -> None:
    path, old, new, shown = BUGS[bug]
    others = [('if (dtype == "bfloat16") return run<bf16>(c);', ""), ("run<float>(c)", "2")]
    broken = driver("conv_bn_act", patches={path: [(old, new)], DRIVER: others})
    # Seven stages in a ring of three: the last lies where the epilogue's strips do.
    shape = Conv(1, 72, (9, 5), 72, (2, 3), padding=(1, 1), groups=18 if path == GROUPED else 1)
    tile = "grouped" if path == GROUPED else "128x64x3"
    given = draw(shape, torch.float16)
    truth = given.reference(shape, torch.float64)
    framework = given.reference(shape, torch.float16)
    seen = ""
    for order in ("ascending", "descending", "shuffled"):
        try:
            actual = run_conv(broken, shape, given, tile, order=order)
        except HostError as error:
            seen += str(error)
        else:
            seen += "" if within_budget(actual, [framework], truth).ok else "wrong"
    assert any(word in seen for word in shown.split("|")), seen or "nothing"
