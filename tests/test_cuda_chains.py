"""Kernels of several layers on a device: against fp64, repeated, captured, in a network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fast
from resnet_fast import kernels, models, ops
from resnet_fast.nn import unfuse_
from resnet_fast.plan import cache
from resnet_fast.testing import tf32
from resnet_fast.testing.budget import expect_within_budget, in_formats
from resnet_fast.testing.chains import CHAINS, Chain, make, reordered
from resnet_fast.testing.networks import randomize_batchnorm_

pytestmark = pytest.mark.gpu

if not kernels.available()[0]:
    pytest.skip(kernels.available()[1], allow_module_level=True)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def own_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RESNET_FAST_CACHE_DIR", str(tmp_path / "cache"))
    cache.forget()
    yield
    cache.forget()


def expect_chain(arguments: dict[str, Any], results: tuple[Tensor, ...]) -> None:
    reference = ops.module("residual_chain").reference
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    answers = [reference(**arguments), reordered(**arguments)]
    if arguments["x"].dtype is torch.float32:
        with tf32.Products():
            answers.append(tuple(t.float() for t in reference(**wide)))
    for ours, exact, *theirs in zip(results, reference(**wide), *answers, strict=True):
        expect_within_budget(ours, theirs, exact)


def launch(arguments: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    from resnet_fast.kernels import residual_chain as room

    return room.launch_residual_chain(*arguments.values(), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.name)
def test_chain(chain: Chain, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    arguments = make(chain, dtype, "cuda")
    expect_chain(arguments, launch(arguments))
    expect_chain(arguments, ops.residual_chain(**arguments))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_config_at_the_widths_it_is_for(dtype: torch.dtype) -> None:
    from resnet_fast.kernels import chain_tiles

    chain = Chain("layer1", (3, 64, 13, 11), 64, 256, 64)
    arguments = make(chain, dtype, "cuda")
    for config in chain_tiles.configs(dtype):
        expect_chain(arguments, launch(arguments, config=config))


def test_runs_are_bit_identical() -> None:
    """A race would show: sums have one order."""
    for chain in (Chain("layer1", (8, 64, 28, 28), 64, 256, 128), CHAINS[3]):
        arguments = make(chain, torch.float16, "cuda")
        first = launch(arguments)
        for _ in range(20):
            for a, b in zip(launch(arguments), first, strict=True):
                assert torch.equal(a, b)


def test_captured() -> None:
    arguments = make(CHAINS[0], torch.float16, "cuda")
    expected = ops.residual_chain(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.residual_chain(**arguments)
    for result in results:
        result.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_stem_pool(dtype: torch.dtype, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).cuda()

    reference = ops.module("stem_pool").reference
    for raw in (False, True):
        x = normal(3, 3, 45, 61).to(dtype)
        vectors: tuple[Any, ...] = (None, None)
        if raw:
            x = (x.float() * 40 + 128).clamp(0, 255).to(torch.uint8)
            vectors = (normal(3).abs() / 64, normal(3))
        x = x.contiguous(memory_format=layout)
        weight = (normal(64, 3, 7, 7) / 12).to(dtype)
        parts = (weight, normal(64), normal(64), *vectors)
        y = ops.stem_pool(x, *parts, act="relu")
        wide = [None if t is None else t.double() for t in parts]
        truth = reference(x if raw else x.double(), *wide, act="relu")
        expect_within_budget(y, reference(x, *parts, act="relu"), truth)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.no_grad()
def test_network(name: str) -> None:
    """Chained, its logits are within budget, and it says so; captured, it replays them."""
    torch.manual_seed(0)
    net = randomize_batchnorm_(models.build(name, num_classes=10)).to("cuda", torch.float16).eval()
    x = torch.randn(4, 3, 96, 96).to("cuda", torch.float16)
    plain = unfuse_(copy.deepcopy(net))
    frameworks = in_formats(plain, x)
    y = net(x)
    expect_within_budget(y, frameworks, plain.double()(x.double()))
    told = str(resnet_fast.explain(net))
    assert "stem: conv1 and maxpool by" in told and "MISMATCH" not in told, told
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = net(x)
    graph.replay()
    assert torch.equal(captured, y)
