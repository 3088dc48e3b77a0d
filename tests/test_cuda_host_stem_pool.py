"""The stem's CUDA kernel on the host, against fp64; outputs start as NaN between guards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from host_support import HostError, driver
from stem_host_support import draw, expect, laid_out, launch
from torch import Tensor

from resnet_fast.ops import activation

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("last", "planes", "slice")
# One pixel, one row, one column; tails of every kind; more than one tile; rows of whole vectors,
# with and without more than one of them.
SIZES = ((1, 1), (1, 30), (30, 1), (7, 7), (8, 9), (33, 17), (6, 100), (5, 8), (19, 64))
PIXELS, PLANES, ELEMENTS = range(3)


@pytest.fixture(scope="session")
def program() -> Path:
    return driver("stem_pool")


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    kind = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


@pytest.mark.parametrize("raw", [False, True], ids=["", "uint8"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64(
    program: Path, dtype: torch.dtype, channels: int, layout: str, raw: bool
) -> None:
    for index, size in enumerate(SIZES if dtype is torch.float16 else SIZES[-4:]):
        # Filters of a whole vector and not, of one warp and of two.
        a = draw((1 + index % 2, channels, *size), (64, 37, 16)[index % 3], dtype, layout, raw)
        y, launched = launch(program, a)
        expect(y, a)
        vectors = layout != "slice" and size[1] % 8 == 0
        wanted = PIXELS if layout == "last" or channels == 1 else PLANES
        assert launched.access == (wanted if vectors else ELEMENTS)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_filters(program: Path, dtype: torch.dtype, layout: str) -> None:
    for filters in (1, 5, 8, 20, 33, 64, 70, 136):
        a = draw((2, 3, 11, 21), filters, dtype, layout)
        expect(launch(program, a)[0], a)


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation(program: Path, act: str, dtype: torch.dtype) -> None:
    """Maxima are of activated values: some activations are not monotone."""
    a = draw((1, 3, 11, 14), 24, dtype, act=act)
    a = a._replace(weight=3 * a.weight)
    expect(launch(program, a)[0], a)


@pytest.mark.parametrize("present", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_affine_and_maxima_below_zero(
    program: Path, dtype: torch.dtype, present: tuple[bool, bool]
) -> None:
    """Pooling pads with what no value is below: maxima may be negative."""
    for size in ((12, 10), (13, 11)):
        a = draw((1, 3, *size), 10, dtype, act="none")
        shift = None if a.shift is None else a.shift - 20
        a = a._replace(scale=a.scale if present[0] else None, shift=shift if present[1] else None)
        expect(launch(program, a)[0], a)


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_is_zero_behind_the_normalisation(
    program: Path, layout: str, given: tuple[bool, bool]
) -> None:
    for raw in (False, True):
        for channels in (1, 3, 4):
            for width in (7, 16):
                a = draw((1, channels, 10, width), 10, torch.float16, layout, raw)
                vectors = (torch.rand(channels) / 64, torch.randn(channels) - 3)
                chosen = [v if use else None for v, use in zip(vectors, given, strict=True)]
                a = a._replace(input_scale=chosen[0], input_shift=chosen[1])
                expect(launch(program, a)[0], a)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_pixels_stay_where_they_belong(
    program: Path, dtype: torch.dtype, channels: int, layout: str, value: float
) -> None:
    """One at a time: no window that does not hold it is touched, and NaN wins in those that do."""
    for width in (21, 24):
        places = [(0, 0), (7, 9), (14, 20), (6, 12), (3, 15)]
        a = draw((len(places), channels, 15, width), 10, dtype, layout, act="none")
        for image, (y, x) in enumerate(places):
            a.x[image, channels // 2, y, x] = value
        expect(launch(program, a)[0], a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_weights_and_sums(program: Path, dtype: torch.dtype) -> None:
    a = draw((1, 3, 9, 17), 10, dtype, act="relu")
    a.weight[3, 1, 3, 3] = float("nan")
    a.scale[5] = float("inf")
    a.shift[7] = float("nan")
    y = launch(program, a)[0]
    assert y[:, [3, 7]].isnan().all() and not y[:, [0, 1, 2, 4, 6, 8, 9]].isnan().any()


TILINGS = ((1, 1), (2, 2), (3, 1), (8, 4))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_same_in_every_tiling(program: Path, dtype: torch.dtype, layout: str) -> None:
    """A value's products have one order, whoever makes them, and however few blocks there are."""
    a = draw((2, 3, 29, 77), 40, dtype, layout, act="silu")
    y, _ = launch(program, a)
    expect(y, a)
    for tiling in TILINGS:
        for resident in (1, 1 << 30) if tiling == (2, 2) else (1 << 30,):
            other, launched = launch(program, a, tiling=tiling, resident=resident)
            assert (launched.strip, launched.tiles) == tiling
            assert same(other, y), (tiling, resident)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_same_in_every_order(program: Path, dtype: torch.dtype) -> None:
    for layout, width, raw in (("last", 64, False), ("planes", 64, True), ("slice", 61, False)):
        a = draw((1, 3, 15, width), 40, dtype, layout, raw)
        y, _ = launch(program, a, tiling=(2, 1), resident=2)
        for order in ("descending", "shuffled"):
            other, _ = launch(program, a, tiling=(2, 1), resident=2, order=order)
            assert same(other, y), order


def test_strides_of_any_kind(program: Path) -> None:
    """x expanded over the batch and transposed, the weight channels-last."""
    a = draw((3, 3, 16, 16), 10, torch.float16, "planes")
    a = a._replace(weight=a.weight.contiguous(memory_format=torch.channels_last))
    expanded = a._replace(x=a.x[:1].expand_as(a.x))
    y, launched = launch(program, expanded)
    assert launched.access == PLANES
    expect(y, expanded)
    transposed = a._replace(x=a.x.transpose(-1, -2))
    y, launched = launch(program, transposed)
    assert launched.access == ELEMENTS
    expect(y, transposed)
    rows = a._replace(x=laid_out(a.x, "last")[:, :, ::2])
    y, launched = launch(program, rows)
    assert launched.access == PIXELS
    expect(y, rows)
    shifted = a._replace(x=torch.cat([a.x, a.x], 3)[:, :, :, 4:20])
    y, launched = launch(program, shifted)
    assert launched.access == ELEMENTS
    expect(y, shifted)


def test_what_is_chosen(program: Path) -> None:
    """Few images are cut small enough to occupy a device, many as large as two blocks fit."""
    a = draw((1, 3, 224, 224), 64, torch.float16)
    y, one = launch(program, a)
    expect(y, a)
    assert one.blocks >= 66 and one.shared <= 113 * 1024
    _, small = launch(program, a, multiprocessors=1)
    assert small.blocks < one.blocks and 56 * 1024 < small.shared <= 113 * 1024
    _, other = launch(program, a, multiprocessors=1, shared=164)
    assert other.shared <= 81 * 1024
    # fp32 weights of four channels are too large for two blocks of the smallest device.
    wide = draw((1, 4, 16, 16), 64, torch.float32)
    y, least = launch(program, wide, shared=100)
    expect(y, wide)
    assert 49 * 1024 < least.shared <= 99 * 1024


# One kind of kernel, which is built in a third of the time.
ONE_KIND = {
    "tests/cuda_on_host/stem_pool.cpp": [
        ("run<bf16>(it)", "return 2"),
        ("run<float>(it)", "return 2"),
        *((f"run<T, {channels}>(it)", "it.finish(), void()") for channels in (1, 2, 4)),
    ]
}
WINDOW, KERNEL = "csrc/cuda/stem_pool_window.cuh", "csrc/cuda/stem_pool.cuh"
BUGS = {
    "a pixel that is none of the filter's": (KERNEL, "unit == 0 ? word & mask", "~mask == 1 ? 0"),
    "a window one row up": (KERNEL, "(2 * i + row) *", "(2 * i - 1 + row) *"),
    "a window one pixel on": (KERNEL, "(early + 4 *", "(early + 1 + 4 *"),
    "a column right of the map": (
        KERNEL,
        "odd = 2 * (column + g) + 1 < shape.columns ? odd : -INFINITY;",
        "",
    ),
    "a row below the map": (KERNEL, "s1[j / 4][j % 4] = -INFINITY", "s1[j / 4][j % 4] = 0.0f"),
    "no column from the tile before": (KERNEL, "tile == 0 ? -INFINITY : edge[j]", "-INFINITY"),
    "the wrong column from the tile before": (KERNEL, "(lane + 28)", "(lane + 24)"),
    "NaN lost": (KERNEL, "max_or_nan(even, odd)", "fmaxf(even, odd)"),
    "outputs of another block": (KERNEL, "q >= out.stored &&", "q > out.stored &&"),
    "padding normalised": (WINDOW, "if (inside(y0 + chunk", "if (a.raw || inside(y0 + chunk"),
    "padding left as it was": (
        WINDOW,
        "uint32_t word[kWords] = {};",
        "uint32_t word[kWords] = {};"
        "if (!inside(y0 + chunk / width, x0 + chunk % width * kStemChunk)) continue;",
    ),
    "copies not waited for": (WINDOW, "    wait_copies<0>();\n", ""),
}
RACES = {
    "filters overwritten while they are read": (
        "    sync_block();\n    if (a.raw)",
        "    if (a.raw)",
    ),
    "a window read before it is there": (
        "    sync_block();\n\n    // The warp's",
        "    // The warp's",
    ),
    "filters read before they are there": ("  sync_block();\n  const int lane", "  const int lane"),
    "outputs over those being read": ("  sync_warp();\n#pragma unroll", "#pragma unroll"),
    "outputs read before they are there": ("  sync_warp();\n  constexpr", "  constexpr"),
}


def caught(program: Path, orders: tuple[str, ...] = ("ascending", "descending")) -> bool:
    """Whether any of a few cases shows that something is wrong with the kernel."""
    torch.manual_seed(1)
    for order in orders:
        for layout, size, raw in (
            ("last", (23, 64), False),
            ("planes", (9, 64), True),
            ("slice", (5, 61), False),
        ):
            a = draw((1, 3, *size), 40, torch.float16, layout, raw, act="none")
            a = a._replace(shift=a.shift - 20)
            if layout == "last":
                a.x[0, 0, 9, 13] = float("nan")
                a.x[0, 2, 20, 40] = float("inf")
            for tiling in ((2, 1), (1, 2)):
                try:
                    y, _ = launch(program, a, tiling=tiling, resident=2, order=order)
                    expect(y, a)
                except (HostError, AssertionError):
                    return True
    return False


@pytest.mark.parametrize("tracing", [False, True])
def test_nothing_is_wrong_without_a_planted_bug(tracing: bool) -> None:
    assert not caught(driver("stem_pool", patches=ONE_KIND, tracing=tracing))


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str) -> None:
    file, old, new = BUGS[bug]
    assert caught(driver("stem_pool", patches={**ONE_KIND, file: [(old, new)]}))


@pytest.mark.parametrize("race", RACES)
def test_planted_races_are_caught(race: str) -> None:
    patches = {**ONE_KIND, KERNEL: [RACES[race]]}
    assert caught(driver("stem_pool", patches=patches, tracing=True), ("ascending",))
