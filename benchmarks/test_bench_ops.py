"""Microbenchmarks by op over ResNet-50's shapes, this package's op beside the framework's own.

    python -m pytest benchmarks/test_bench_ops.py --benchmark-enable

The last-level cache is overwritten before each call. Each row's ``extra_info`` holds
GB/s = (bytes of inputs + bytes of outputs) / median seconds / 1e9 and, for a convolution,
GFLOP/s = 2 · multiply-adds / median seconds / 1e9. Every op is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast import ops
from resnet_fast.testing import cases
from resnet_fast.testing.budget import within_budget
from resnet_fast.testing.shapes import ConvSite, conv_sites

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 32 if DEVICE == "cuda" else 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 15
# Larger than the last-level caches met so far; a GPU's L2 is smaller.
CACHE_BYTES = 256 << 20

CONVS = list(conv_sites("resnet50"))
# One shape a stage: what a block's last pointwise step sees.
OUTPUTS = [(BATCH, site.k, site.p, site.p) for site in CONVS if site.residual]


def conv_case(site: ConvSite) -> cases.ConvCase:
    """The op's case at one of the network's sites."""
    return cases.ConvCase(
        name_of(site),
        (BATCH, site.c, site.h, site.h),
        (site.k, site.c // site.groups, site.r, site.r),
        site.stride,
        site.padding,
        groups=site.groups,
        act=site.act,
        residual=site.residual,
    )


def name_of(site: ConvSite) -> str:
    """For example c64k256r1s1h56+."""
    plus = "+" if site.residual else ""
    return f"c{site.c}k{site.k}r{site.r}s{site.stride}h{site.h}{plus}"


BENCHES: list[cases.Case] = [
    *(conv_case(site) for site in CONVS),
    *(cases.BnActCase(f"c{shape[1]}", shape, "relu", residual=True) for shape in OUTPUTS),
    *(cases.AddActCase(f"c{shape[1]}", shape, "relu") for shape in OUTPUTS),
    *(
        cases.BnActTrainCase(f"c{s[1]}", (max(s[0], 4), *s[1:]), "relu", residual=True)
        for s in OUTPUTS
    ),
]


def nbytes(*values: Any) -> int:
    """Bytes of every tensor among ``values``."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def first(result: Any) -> Tensor:
    """The op's main output."""
    return result[0] if isinstance(result, tuple) else result


def to64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in fp64."""
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def measure(benchmark: Any, call: Callable[[], Any], moved: int, macs: int) -> None:
    """Time ``call`` on a cold cache and note its rates."""
    sweep = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=DEVICE)

    def cold() -> None:
        sweep.add_(1)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def timed() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, setup=cold, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.disabled or benchmark.stats is None:
        return
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = round(moved / seconds / 1e9, 2)
    if macs:
        benchmark.extra_info["GFLOP/s"] = round(2 * macs / seconds / 1e9, 1)


def macs_of(case: cases.Case) -> int:
    """Multiply-adds of a convolution, 0 for the others."""
    if not isinstance(case, cases.ConvCase):
        return 0
    count = 1
    for extent in (*cases.output_shape(case), *case.weight[1:]):
        count *= extent
    return count


@pytest.mark.parametrize("path", ("op", "framework"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BENCHES, ids=lambda case: f"{case.op}-{case.name}")
def test_forward(benchmark: Any, case: cases.Case, dtype: str, path: str) -> None:
    benchmark.group = f"{case.op} {case.name} {dtype}"
    arguments = cases.make(case, DTYPES[dtype], DEVICE, torch.channels_last)
    reference = ops.module(case.op).reference
    op = getattr(ops, case.op)
    with torch.inference_mode():
        framework = first(reference(**arguments))
        truth = first(reference(**to64(arguments)))
        assert within_budget(first(op(**arguments)), framework, truth).ok
        call = op if path == "op" else reference
        moved = nbytes(*arguments.values(), framework)
        measure(benchmark, lambda: call(**arguments), moved, macs_of(case))


@pytest.mark.parametrize("path", ("op", "framework"))
@pytest.mark.parametrize(
    "case",
    [case for case in BENCHES if case.op in ("add_act", "bn_act_train")],
    ids=lambda case: f"{case.op}-{case.name}",
)
def test_forward_backward(benchmark: Any, case: cases.Case, path: str) -> None:
    benchmark.group = f"{case.op} {case.name} fp32 forward + backward"
    arguments = cases.make(case, torch.float32, DEVICE, torch.channels_last)
    leaves = [v.requires_grad_() for v in arguments.values() if isinstance(v, Tensor)]
    call = getattr(ops, case.op) if path == "op" else ops.module(case.op).reference
    grad_y = torch.randn_like(arguments["x"])

    def step() -> None:
        torch.autograd.grad(first(call(**arguments)), leaves, grad_y)

    # Forward reads the inputs and writes y; backward reads them and grad_y and writes gradients.
    measure(benchmark, step, 3 * nbytes(*leaves) + 2 * nbytes(grad_y), 0)
