"""The CUDA and Triton ops on a device, against fp64, case by case."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast import _library
from resnet_fast.ops import activation
from resnet_fast.testing.budget import error
from resnet_fast.testing.budget import expect_within_budget as judge
from resnet_fast.testing.cases import CASES, Case, make

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)
TRITON_OPS = ("conv_bn_act", "bn_act", "add_act")


def parameters(ops: tuple[str, ...]) -> list[Any]:
    return [pytest.param(op, case, id=f"{op}-{case.name}") for op in ops for case in CASES[op]]


@pytest.fixture
def cuda_library() -> None:
    status = _library.status()["cuda"]
    if not status.loaded:
        pytest.skip(f"the CUDA library is not loaded: {status.reason}")


def normalised(op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the public function as the schema wants them: a list a spatial dimension."""
    if op != "conv_bn_act":
        return arguments
    spatial = arguments["x"].dim() - 2
    lists = {
        name: [arguments[name]] * spatial
        if isinstance(arguments[name], int)
        else list(arguments[name])
        for name in ("stride", "padding", "dilation")
    }
    return {**arguments, **lists}


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def drawn(
    case: Case, dtype: torch.dtype, layout: torch.memory_format, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``dtype``, and those that the framework gets: the same in fp32 for fp64."""
    given = make(case, torch.float32 if dtype == torch.float64 else dtype, "cuda", layout, seed)
    return (wide(given) if dtype == torch.float64 else given), given


def output_format(x: Tensor) -> torch.memory_format:
    """Channels-last where x is so and not also contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats and not x.is_contiguous():
        return formats[x.dim()]
    return torch.contiguous_format


def compare(op: str, run: Any, case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    arguments, given = drawn(case, dtype, layout)
    reference = importlib.import_module(f"resnet_fast.ops.{op}").reference
    actual = run(**normalised(op, arguments))
    truth = reference(**wide(arguments))
    framework = reference(**given)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=output_format(arguments["x"]))
    judge(actual, framework, truth)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("op,case", parameters(("add_act", "bn_act")))
def test_cuda_matches_reference(
    cuda_library: None, op: str, case: Case, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    compare(op, getattr(torch.ops.resnet_fast, op), case, dtype, layout)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op,case", parameters(TRITON_OPS))
def test_triton_matches_reference(
    op: str, case: Case, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    importlib.import_module(f"resnet_fast.ops.{op}_triton")
    compare(op, getattr(torch.ops.resnet_fast, f"_{op}_triton"), case, dtype, layout)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("op,case", parameters(("add_act",)))
def test_cuda_gradient_matches_reference(
    cuda_library: None, op: str, case: Case, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    arguments, given = drawn(case, dtype, layout)
    x, residual, act = arguments["x"], arguments["residual"], arguments["act"]
    upstream, narrow = drawn(case, dtype, layout, seed=1)
    grad_y = upstream["x"]
    actual = torch.ops.resnet_fast._add_act_backward(grad_y, x, residual, act)
    z = x.double() + residual.double()
    # A rounded sum may fall on the other side of a kink.
    clear = torch.ones_like(z, dtype=torch.bool)
    for kink in activation.KINKS[act]:
        clear &= (z - kink).abs() > 2**-4
    truth = activation.grad(act, grad_y.double(), z)
    framework = activation.grad(act, narrow["x"], given["x"] + given["residual"])
    judge(actual[clear], framework[clear], truth[clear])


def test_misaligned_and_strided_views(cuda_library: None) -> None:
    base = torch.randn(4097, device="cuda", dtype=torch.float16)
    for x in (base[1:], base[::2], base[:4096].view(64, 64).t()):
        y = torch.ops.resnet_fast.add_act(x, x, "relu")
        assert y.is_contiguous()
        assert error(y, torch.relu(x.double() * 2)) == 0.0


def test_current_stream_and_graph_capture(cuda_library: None) -> None:
    x = torch.randn(2, 64, 7, 7, device="cuda").to(memory_format=torch.channels_last)
    scale, shift = torch.rand(64, device="cuda"), torch.rand(64, device="cuda")

    def work() -> Tensor:
        y = torch.ops.resnet_fast.bn_act(x, scale, shift, None, "relu")
        return torch.ops.resnet_fast.add_act(y, x, "relu")

    expected = work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    captured.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_beyond_32_bit_indices(cuda_library: None, layout: torch.memory_format) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    shape = (2, 513, 1024, 2049)  # 2^31 and a little
    x = torch.empty(shape, device="cuda", dtype=torch.float16, memory_format=layout).fill_(-1.0)
    x[-1, -1, -1, -1] = 2.0
    scale = torch.ones(513, device="cuda")
    shift = torch.arange(513, device="cuda", dtype=torch.float32)
    y = torch.ops.resnet_fast.bn_act(x, scale, shift, None, "relu")
    for n, c, h, w in ((0, 0, 0, 0), (0, 512, 1023, 2048), (1, 511, 1023, 2048), (1, 512, 5, 7)):
        assert y[n, c, h, w].item() == max(c - 1.0, 0.0)
    assert y[-1, -1, -1, -1].item() == 514.0
    del y
    z = torch.ops.resnet_fast.add_act(x, x, "relu")
    assert z[-1, -1, -1, -1].item() == 4.0
    assert torch.count_nonzero(z[:, -1]).item() == 1
