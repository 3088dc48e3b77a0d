"""The CUDA kernels of conv_stats, run on the host, against PyTorch in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conv_host_support import (
    DTYPES,
    GEMM,
    NARROW,
    SHAPES,
    TF32,
    Conv,
    conv,
    draw_operands,
    nhwc,
    tiles,
    to_tf32,
)
from host_support import HostError, driver, run
from torch import Tensor

from resnet_fast.ops import activation
from resnet_fast.testing.budget import expect_within_budget as check

EPS = 1e-5
KERNEL = "csrc/cuda/conv_stats.cuh"
DRIVER = "tests/cuda_on_host/conv_stats.cpp"
OUTPUTS = ("z", "mean_z", "rstd_z")


@dataclass(frozen=True)
class Inputs:
    """x and a weight; for a batch norm in front its mean, rstd, weight, bias and activation."""

    x: Tensor
    weight: Tensor
    norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None
    act: str = "none"

    def operand(self, dtype: torch.dtype) -> Tensor:
        """What is multiplied, in ``dtype``."""
        x = self.x.to(dtype)
        if self.norm is None:
            return x
        wide = torch.promote_types(dtype, torch.float32)
        mean, rstd, gamma, beta = (
            None if t is None else t.to(wide).view(-1, 1, 1) for t in self.norm
        )
        y = (x.to(wide) - mean) * (rstd if gamma is None else rstd * gamma)
        return activation.value(self.act, y if beta is None else y + beta).to(dtype)

    def product(self, shape: Conv, dtype: torch.dtype) -> Tensor:
        operand = self.operand(dtype)
        if dtype == TF32:  # as the framework multiplies on tensor cores; half a step, ties away
            operand = to_tf32((operand.view(torch.int32) + 4096).view(TF32))
        return conv(operand, self.weight.to(dtype), shape)

    def flipped(self) -> Inputs:
        """The same sums from their other end: the framework's error is that of either."""
        norm = (
            None
            if self.norm is None
            else tuple(None if t is None else t.flip(0) for t in self.norm)
        )
        return Inputs(self.x.flip(1), self.weight.flip(1), norm, self.act)


def draw(
    shape: Conv, dtype: torch.dtype, norm: bool = False, act: str = "relu", affine: bool = True
) -> Inputs:
    x, weight, generator = draw_operands(shape, dtype)
    if not norm:
        return Inputs(x, weight)
    mean, beta = (torch.randn(shape.channels, generator=generator) for _ in range(2))
    rstd, gamma = (0.5 + torch.rand(shape.channels, generator=generator) for _ in range(2))
    given = (mean, rstd, gamma, beta) if affine else (mean, rstd, None, None)
    return Inputs(x, weight, given, act)


def run_stats(
    program: Path,
    shape: Conv,
    given: Inputs,
    tile: str,
    order: str = "ascending",
    seed: int = 0,
) -> dict[str, Tensor]:
    dtype = given.x.dtype
    names = ("mean", "rstd", "gamma", "beta")
    found = run(
        program,
        tensors={
            "x": nhwc(given.x),
            "weight": nhwc(given.weight),
            **dict(zip(names, given.norm or [None] * 4, strict=True)),
        },
        outputs={"z": dtype, "mean_z": torch.float32, "rstd_z": torch.float32},
        order=order,
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        act=activation.code(given.act),
        tile=tile,
        copy=shape.copy(dtype),
        eps=EPS,
        **shape.values(),
    )
    sizes = (shape.batch, shape.out(0), shape.out(1), shape.filters)
    return {**found, "z": found["z"].view(sizes).permute(0, 3, 1, 2)}


def statistics(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(z.to(dtype), (0, 2, 3), correction=0)
    return mean, torch.rsqrt(var + EPS)


def expect(shape: Conv, given: Inputs, found: dict[str, Tensor]) -> None:
    """z by the layers; mean and rstd by what z became, as the batch norm behind it sees it."""
    z = found["z"]
    frameworks = [given.product(shape, z.dtype), given.flipped().product(shape, z.dtype)]
    check(z, frameworks, given.product(shape, torch.float64))
    wide = statistics(z, torch.float32)
    for name, framework, truth in zip(OUTPUTS[1:], wide, statistics(z, torch.float64), strict=True):
        check(found[name], framework, truth)


@pytest.fixture(scope="session")
def program() -> Path:
    return driver("conv_stats")


def stats_tiles(dtype: torch.dtype) -> list[str]:
    return [tile for tile in tiles(dtype) if tile in ("128x128x3", "128x64x3", "64x64x4")]


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_computes_every_shape(
    program: Path, shape: Conv, dtype: torch.dtype, norm: bool
) -> None:
    given = draw(shape, dtype, norm)
    for tile in stats_tiles(dtype):
        expect(shape, given, run_stats(program, shape, given, tile))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NARROW, ids=str)
def test_channels_that_no_wide_copy_divides(program: Path, shape: Conv, dtype: torch.dtype) -> None:
    given = draw(shape, dtype)
    expect(shape, given, run_stats(program, shape, given, "128x64x3"))


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_every_activation_in_front(program: Path, act: str) -> None:
    for dtype in DTYPES:
        given = draw(SHAPES[1], dtype, norm=True, act=act)
        expect(SHAPES[1], given, run_stats(program, SHAPES[1], given, "128x64x3"))


def test_a_batch_norm_without_parameters_in_front(program: Path) -> None:
    given = draw(SHAPES[1], torch.float16, norm=True, affine=False)
    expect(SHAPES[1], given, run_stats(program, SHAPES[1], given, "64x64x4"))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normalised"])
def test_the_order_of_threads_changes_no_bit(program: Path, norm: bool) -> None:
    for dtype, tile in (
        (torch.float16, "128x128x3"),
        (torch.bfloat16, "64x64x4"),
        (TF32, "128x64x3"),
    ):
        given = draw(SHAPES[2], dtype, norm)
        first = run_stats(program, SHAPES[2], given, tile)
        for order, seed in (("descending", 0), ("shuffled", 1), ("shuffled", 2)):
            again = run_stats(program, SHAPES[2], given, tile, order, seed)
            assert all(torch.equal(first[name], again[name]) for name in OUTPUTS)


def test_many_tiles_are_folded(program: Path) -> None:
    """72 partials a channel: one fold of 64, and one of what is left."""
    shape = Conv(2, 8, (48, 48), 16)
    given = draw(shape, torch.float16)
    expect(shape, given, run_stats(program, shape, given, "64x64x4"))


def test_a_mean_far_beyond_the_spread(program: Path) -> None:
    """Sums of squares would leave no digit of a variance beside a mean of 4096 deviations."""
    shape = Conv(4, 8, (20, 11), 16)
    given = draw(shape, TF32)
    given.x[:, 0] = 1.0
    given.weight[:, 0] = 4096.0
    found = run_stats(program, shape, given, "64x64x4")
    assert (statistics(found["z"], torch.float64)[0] > 4000).all()
    expect(shape, given, found)


def test_a_normalised_operand_is_zero_outside_the_image(program: Path) -> None:
    """And not what the batch norm makes of zero."""
    shape = Conv(1, 8, (3, 3), 8, (3, 3), padding=(2, 2))
    given = draw(shape, torch.float16, norm=True)
    mean, rstd, gamma, beta = given.norm
    given = Inputs(given.x, given.weight, (mean, rstd, gamma, beta + 100), "relu")
    expect(shape, given, run_stats(program, shape, given, "64x64x4"))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normalised"])
def test_plain_accesses_race_nowhere(norm: bool) -> None:
    traced = driver("conv_stats", tracing=True)
    given = draw(SHAPES[1], torch.float16, norm)
    for tile in stats_tiles(torch.float16):
        expect(SHAPES[1], given, run_stats(traced, SHAPES[1], given, tile, "shuffled", 5))


BUGS = {
    "padding normalised like a pixel": (
        KERNEL,
        "if ((inside_ >> turn & 1u) != 0) {",
        "if (turn >= 0) {",
        "wrong",
    ),
    "moments joined before they are there": (
        KERNEL,
        "= own;\n  sync_block();",
        "= own;",
        "race|wrong",
    ),
    "moments kept over strips that others read": (
        KERNEL,
        "every warp is behind them.\n  sync_block();",
        "every warp is behind them.\n",
        "race|wrong",
    ),
    "pixels behind the last counted": (
        KERNEL,
        "< place.pixels) filled = turn + 1;",
        "<= place.pixels) filled = turn + 1;",
        "wrong|guard|Address",
    ),
    "a stage normalised before others have left it": (
        GEMM,
        "filled next.\n    sync_block();",
        "filled next.\n",
        "race|wrong",
    ),
    "a fold that forgets its last": (
        KERNEL,
        "begin + kFolded < count ? begin + kFolded : count",
        "begin + kFolded < count ? begin + kFolded - 1 : count",
        "wrong",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str) -> None:
    path, old, new, shown = BUGS[bug]
    others = [('if (dtype == "bfloat16") return run<bf16>(c);', ""), ("run<float>(c)", "2")]
    # The moments pass through shared memory by plain stores.
    tracing = bug.startswith("moments")
    broken = driver("conv_stats", {path: [(old, new)], DRIVER: others}, tracing=tracing)
    # Seven stages in a ring of three, as for conv_bn_act; for a fold, more than 64 tiles.
    fold = "fold" in bug
    shape = Conv(2, 8, (48, 48), 16) if fold else Conv(2, 72, (9, 5), 72, (2, 3), padding=(1, 1))
    given = draw(shape, torch.float16, norm=not fold)
    seen = ""
    for order in ("ascending", "descending", "shuffled"):
        try:
            found = run_stats(broken, shape, given, "64x64x4" if fold else "128x64x3", order)
            expect(shape, given, found)
        except HostError as error:
            seen += str(error)
        except AssertionError:
            seen += "wrong"
    assert any(word in seen for word in shown.split("|")), seen or "nothing"
