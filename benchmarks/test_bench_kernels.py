"""Microbenchmarks of the CPU kernels at networks' shapes, with each one's share of the peak.

    python -m pytest benchmarks/test_bench_kernels.py --benchmark-enable -k "fp32 and direct"

One image, on warm caches: what a kernel can do, of which a network, whose layers put each other out
of the caches, gets less. A row's ``extra_info`` holds GFLOP/s = 2 · multiply-adds / median seconds
/ 1e9 and ``share``, that rate over the median of :file:`benchmarks/peak.cpp` for the dtype, with as
many threads, in the same run. Winograd's algorithm is counted as the direct convolution that it
stands for, so that its share may exceed 1. Each kernel is checked against fp64 before it is timed.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from resnet_fast.ops import conv_bn_act_int8 as int8
from resnet_fast.ops._checks import has_op
from resnet_fast.plan.candidate import CANDIDATES, run_aten
from resnet_fast.plan.site import Site, device_name
from resnet_fast.plan.verify import random_inputs
from resnet_fast.testing.budget import in_formats, within_budget
from resnet_fast.testing.shapes import ConvSite, conv_sites

pytest.importorskip("pytest_benchmark")

ROUNDS, CALLS = 15, 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# MobileNetV2's depthwise layers: channels, stride and size of the image.
DEPTHWISE = [(32, 1, 112), (96, 2, 112), (144, 1, 56), (192, 1, 28), (576, 1, 14), (960, 1, 7)]


class Row(NamedTuple):
    """A kernel at a site."""

    kernel: str
    dtype: str
    site: ConvSite

    def __str__(self) -> str:
        s = self.site
        groups = f"g{s.groups}" if s.groups > 1 else ""
        plus = "+" if s.residual else ""
        return f"{self.kernel}-{self.dtype}-c{s.c}k{s.k}r{s.r}s{s.stride}{groups}h{s.h}{plus}"


def site_of(s: ConvSite, dtype: str) -> Site:
    """The plan's site for one image of ``s``."""
    return Site(
        op="conv_bn_act",
        x_shape=(1, s.c, s.h, s.h),
        weight_shape=(s.k, s.c // s.groups, s.r, s.r),
        stride=(s.stride, s.stride),
        padding=(s.padding, s.padding),
        dilation=(1, 1),
        groups=s.groups,
        act=s.act,
        affine=True,
        residual=s.residual,
        dtype=str(DTYPES[dtype]).removeprefix("torch."),
        layout="channels_last",
        device=device_name("cpu"),
    )


def rows() -> list[Row]:
    """Every kernel at every site of ResNet-50 that it takes, then grouped and depthwise sites."""
    dense = list(conv_sites("resnet50"))
    narrow = [s for s in conv_sites("resnext50_32x4d") if s.groups > 1]
    narrow += [ConvSite(c, c, 3, stride, c, h, "relu6", False) for c, stride, h in DEPTHWISE]
    found = []
    for dtype in DTYPES:
        for kernel in ("direct", "winograd2", "winograd4"):
            for s in (*dense, *narrow):
                # A reason that the machine gives, and not the site, is a skip of the test.
                if kernel == "direct" or (s.r == 3 and s.stride == s.groups == 1):
                    found.append(Row(kernel, dtype, s))
    found += [Row("direct", "int8", s) for s in (*dense, *narrow)]
    return found


@functools.cache
def peaks() -> dict[str, float]:
    """What the cores can do by dtype, in GFLOP/s; empty without a C++ compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return {}
    source = Path(__file__).with_name("peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "peak")
        flags = ["-std=c++20", "-O3", "-march=native", "-Wno-psabi"]
        subprocess.run([compiler, *flags, "-o", program, str(source), "-lpthread"], check=True)
        threads = str(torch.get_num_threads())
        run = subprocess.run([program, threads], check=True, capture_output=True, text=True)
    return {line.split()[0]: float(line.split()[1]) for line in run.stdout.splitlines()}


def call_of(row: Row) -> Callable[[], Tensor]:
    """The kernel with its weights packed, checked; skips where this machine has it not."""
    if row.dtype == "int8":
        return int8_call(row.site)
    site = site_of(row.site, row.dtype)
    candidate = CANDIDATES[row.kernel]
    refusal = candidate.reject(site)
    if refusal is not None:
        pytest.skip(refusal)
    x, args, residual = random_inputs(site, "cpu", 1)
    wide = args._make(t.double() if isinstance(t, Tensor) else t for t in args)
    truth = run_aten(x.double(), wide, None if residual is None else residual.double(), site.act)
    given = in_formats(lambda x, residual: run_aten(x, args, residual, site.act), x, residual)
    assert candidate.prepare is not None
    prepared = candidate.prepare(x, args, site.act)
    if row.kernel == "direct":  # F(4x4) is held to its own algorithm's error by the tests
        assert within_budget(prepared(x, residual), given, truth).ok
    return lambda: prepared(x, residual)


def int8_call(s: ConvSite) -> Callable[[], Tensor]:
    """The same on bytes."""
    if not has_op("_int8_conv"):
        pytest.skip("the CPU op library is not loaded")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def bytes_of(*shape: int) -> Tensor:
        q = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return q.contiguous(memory_format=torch.channels_last)

    weight = draw(s.k, s.c // s.groups, s.r, s.r)
    tensors = (weight, None, draw(s.k), draw(s.k), draw(s.k), draw(s.k).abs() + 0.5)
    x_grid, y_grid = int8.Grid(0.017, 37), int8.Grid(0.3, 20)
    r_grid = int8.Grid(0.021, 100) if s.residual else None
    geometry = ([s.stride] * 2, [s.padding] * 2, [1, 1], s.groups, s.act)
    call = int8.prepare(tensors, 1e-5, *geometry, x_grid, r_grid, y_grid, None)
    x, added = bytes_of(1, s.c, s.h, s.h), bytes_of(1, s.k, s.p, s.p) if s.residual else None
    assert int8.deviation(call, x, added, call(x, added)) <= 1
    return lambda: call(x, added)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines that are shown when all rows have run."""
    lines: list[str] = []
    yield lines
    if not lines:
        return
    shown = ", ".join(f"{name} {rate:.0f}" for name, rate in peaks().items())
    capture: Any = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        print(f"\n\npeak, {torch.get_num_threads()} threads: {shown or 'not measured'}")
        print(f"{'kernel at one image':44}{'us':>9}{'GFLOP/s':>9}{'share':>7}")
        print("\n".join(lines))


@pytest.mark.parametrize("row", rows(), ids=str)
def test_kernel(benchmark: Any, row: Row, table: list[str]) -> None:
    benchmark.group = f"{row.kernel} {row.dtype}"
    with torch.inference_mode():
        call = call_of(row)
        benchmark.pedantic(call, rounds=ROUNDS, iterations=CALLS, warmup_rounds=3)
    if benchmark.disabled or benchmark.stats is None:
        return
    seconds = benchmark.stats.stats.median
    rate = 2 * row.site.macs / seconds / 1e9
    peak = peaks().get(row.dtype)
    share = None if peak is None else round(rate / peak, 3)
    benchmark.extra_info |= {"GFLOP/s": round(rate, 1), "share": share}
    shown = "-" if share is None else f"{share:.2f}"
    table.append(f"{row!s:44}{seconds * 1e6:9.1f}{rate:9.1f}{shown:>7}")
