"""The CUDA library's kernels of the stem on a device; their device code is in
tests/test_cuda_host_stem_pool.py and test_cuda_host_max_pool.py, what decides in test_stem.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stem_host_support import Arguments, draw, in_tf32, laid_out, reference
from torch import Tensor

from resnet_fast import ops
from resnet_fast.ops import activation, stem_pool_cuda
from resnet_fast.testing.budget import expect_within_budget, in_formats

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("last", "planes", "slice")
OP = torch.ops.resnet_fast._stem_pool_cuda


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    if not stem_pool_cuda.AVAILABLE:
        pytest.skip("the CUDA library is not loaded")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


def on_device(a: Arguments) -> Arguments:
    return Arguments(*(v.cuda() if isinstance(v, Tensor) else v for v in a))


def expect(y: Tensor, a: Arguments) -> None:
    truth = reference(*(v.double() if isinstance(v, Tensor) else v for v in a))
    frameworks = in_formats(reference, *a)
    if y.dtype is torch.float32:
        frameworks += in_formats(reference, *in_tf32(a))
    expect_within_budget(y, frameworks, truth)


@pytest.mark.parametrize("raw", [False, True], ids=["", "uint8"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_fp64(dtype: torch.dtype, channels: int, layout: str, raw: bool) -> None:
    for size in ((1, 1), (7, 7), (33, 17), (6, 100), (64, 96)):
        for filters in (64, 37, 136):
            a = on_device(draw((3, channels, *size), filters, dtype, layout, raw))
            y = OP(*a)
            assert y.is_contiguous(memory_format=output_format(a.x))
            expect(y, a)


def output_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_every_activation(act: str) -> None:
    a = on_device(draw((2, 3, 45, 61), 64, torch.float16, act=act))
    expect(OP(*a), a)


@pytest.mark.parametrize("image", [*DTYPES, torch.uint8], ids=str)
def test_without_triton_it_is_the_op(image: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.module("stem_pool")._several, "AVAILABLE", False)
    a = on_device(draw((2, 3, 45, 64), 64, torch.float16, raw=True))
    a = a._replace(x=a.x.to(image))
    called: list[Any] = []
    run = stem_pool_cuda.run
    monkeypatch.setitem(
        ops.module("stem_pool")._several._without_triton,
        "stem_pool",
        lambda *given: called.append(given) or run(*given),
    )
    expect(ops.stem_pool(*a), a)
    assert called


def test_runs_are_bit_identical() -> None:
    """A race would show: sums have one order."""
    for layout, raw in (("last", False), ("planes", True)):
        a = on_device(draw((32, 3, 224, 224), 64, torch.float16, layout, raw))
        first = OP(*a)
        assert torch.equal(first[:1], OP(*a._replace(x=a.x[:1])))
        for _ in range(20):
            assert torch.equal(OP(*a), first)


def test_captured() -> None:
    a = on_device(draw((4, 3, 96, 96), 64, torch.float16))
    expected = OP(*a)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OP(*a)
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    a = on_device(draw((2, 3, 13, 11), 10, torch.float16, layout))
    checks = ["test_schema", "test_faketensor"]
    torch.library.opcheck(OP.default, tuple(a), test_utils=checks)


def test_empty_batch() -> None:
    a = on_device(draw((0, 3, 13, 11), 10, torch.float16))
    assert OP(*a).shape == (0, 10, 4, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(1, 3, 9, 9, dtype=torch.float64)},
        {"x": torch.zeros(1, 3, 9, 9)},
        {"x": torch.zeros(1, 5, 9, 9, dtype=torch.half)},
        {"x": torch.zeros(1, 3, 0, 9, dtype=torch.half)},
        {"x": torch.zeros(3, 9, 9, dtype=torch.half)},
        {"weight": torch.zeros(10, 3, 7, 7, dtype=torch.float64)},
        {"weight": torch.zeros(10, 4, 7, 7, dtype=torch.half)},
        {"weight": torch.zeros(10, 3, 7, 5, dtype=torch.half)},
        {"weight": torch.zeros(3, 7, 7, dtype=torch.half)},
        {"scale": torch.zeros(9)},
        {"shift": torch.zeros(10, dtype=torch.half)},
        {"input_scale": torch.zeros(10)},
        {"input_shift": torch.zeros(1)},
        {"act": "tanh"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_refuses(change: dict[str, Any]) -> None:
    a = draw((1, 3, 9, 9), 10, torch.float16)._replace(**change)
    with pytest.raises(RuntimeError):
        OP(*on_device(a))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_beyond_32_bit_indices(layout: str) -> None:
    """More than 2^31 elements of x and of y: the last image is what it is alone."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    a = on_device(draw((1, 3, 1024, 1024), 64, torch.float16, layout))
    x = a.x.new_empty(700, 3, 1024, 1024).contiguous(memory_format=output_format(a.x)).fill_(1.0)
    x[-1:] = a.x
    y = OP(*a._replace(x=x))
    assert y.numel() > 1 << 31
    assert torch.equal(y[-1:], OP(*a)) and torch.equal(y[0], y[350])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
def test_max_pool(dtype: torch.dtype, layout: str) -> None:
    """Values, and gradients summed in fp32, are the framework's, bit for bit, at every run."""
    for channels, size in ((64, (56, 57)), (5, (9, 12)), (8, (1, 1))):
        x = laid_out(torch.randint(-9, 9, (4, channels, *size)).to(dtype), layout).cuda()
        x[0, 0, 0, 0] = torch.nan
        # On the CPU, whose kernel adds in one order.
        leaf = x.cpu().to(dtype if dtype is torch.float64 else torch.float32).requires_grad_()
        wide = torch.nn.functional.max_pool2d(leaf, 3, 2, 1)
        grad_y = torch.randn(wide.shape, dtype=torch.float64).to(dtype)
        (grad,) = torch.autograd.grad(wide, leaf, grad_y.to(wide.dtype))
        ours = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = torch.ops.resnet_fast._max_pool(ours)
        assert y.is_contiguous(memory_format=output_format(x))
        assert torch.equal(y.cpu().nan_to_num(), wide.to(dtype).nan_to_num())
        for _ in range(3):
            (found,) = torch.autograd.grad(y, ours, grad_y.cuda(), retain_graph=True)
            assert torch.equal(found.cpu(), grad.to(dtype))
