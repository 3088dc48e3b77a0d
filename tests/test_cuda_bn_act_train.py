"""bn_act_train and norm_act on a device: values, gradients, determinism, capture, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast import _library, ops
from resnet_fast.ops import activation
from resnet_fast.testing.budget import expect_within_budget as judge
from resnet_fast.testing.cases import CASES, Case, case, make
from resnet_fast.testing.reordered import REORDERED

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FORMATS = (torch.contiguous_format, torch.channels_last)
REFERENCE = ops.module("bn_act_train").reference
# Stem, first and last blocks of ResNet-50 and a small map; a batch that no vector divides.
SHAPES = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 2048, 7, 7), (1, 512, 7, 7), (3, 37, 15, 13))


@pytest.fixture(autouse=True)
def cuda_library() -> None:
    status = _library.status()["cuda"]
    if not status.loaded:
        pytest.skip(f"the CUDA library is not loaded: {status.reason}")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def step(f: Any, arguments: dict[str, Any], grad_y: Tensor) -> dict[str, Tensor]:
    """Outputs, and the gradient of every tensor argument, by name."""
    leaves = {
        name: value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    y, mean, rstd = f(**leaves)
    y.backward(grad_y)
    grads = {f"grad_{k}": v.grad for k, v in leaves.items() if isinstance(v, Tensor)}
    return {"y": y.detach(), "mean": mean, "rstd": rstd} | grads


def compare(arguments: dict[str, Any]) -> None:
    """Against fp64, by the framework's errors; in fp64 by those of its fp32."""
    dtype = arguments["x"].dtype
    given = cast(arguments, torch.float32) if dtype == torch.float64 else arguments
    wide = cast(arguments, torch.float64)
    z = REFERENCE(**wide | {"act": "none"})[0]
    clear = torch.ones_like(z, dtype=torch.bool)
    for kink in activation.KINKS[arguments["act"]]:
        clear &= (z - kink).abs() > 2**-4
    grad_y = (torch.randn(z.shape, device=z.device) * clear).to(given["x"].dtype)
    actual = step(ops.bn_act_train, arguments, grad_y.to(dtype))
    # On the CPU: torch's hardswish on CUDA has a sixth in fp32 in every dtype.
    exact = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in wide.items()}
    truth = step(REFERENCE, exact, grad_y.double().cpu())
    if given["weight"] is None and given["bias"] is not None:
        # torch's backward on CUDA fails for a norm that only shifts.
        given = given | {"weight": torch.ones_like(given["bias"])}
    frameworks = [step(f, given, grad_y) for f in (REFERENCE, REORDERED["bn_act_train"])]
    assert actual.keys() == truth.keys()
    for name, tensor in actual.items():
        judge(tensor, [framework[name] for framework in frameworks], truth[name])


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entry", CASES["bn_act_train"], ids=lambda entry: entry.name)
def test_matches_reference(entry: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    drawn = torch.float32 if dtype == torch.float64 else dtype
    compare(cast_activations(make(entry, drawn, DEVICE, layout), dtype))


def cast_activations(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return cast(arguments, dtype) if dtype == torch.float64 else arguments


def drawn(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, act: str = "relu"
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(DEVICE)

    def like_x(values: Tensor) -> Tensor:
        return values.to(dtype).contiguous(memory_format=layout)

    return {
        "x": like_x(2 * normal(*shape) + 1),
        "weight": normal(shape[1]) + 0.5,
        "bias": normal(shape[1]),
        "residual": like_x(normal(*shape)),
        "eps": 1e-5,
        "act": act,
    }


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_a_network(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    compare(drawn(shape, dtype, layout))


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_the_same_bits_in_each_run(deterministic: None, layout: torch.memory_format) -> None:
    for shape in SHAPES:
        arguments = drawn(shape, torch.float16, layout)
        grad_y = torch.randn_like(arguments["x"])
        first = step(ops.bn_act_train, arguments, grad_y)
        for name, tensor in step(ops.bn_act_train, arguments, grad_y).items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_norm_act_is_its_second_half(layout: torch.memory_format) -> None:
    for shape in SHAPES:
        arguments = drawn(shape, torch.bfloat16, layout, "silu")
        y, mean, rstd = ops.bn_act_train(**arguments)
        x = arguments.pop("x")
        assert torch.equal(ops.norm_act(x, mean, rstd, **arguments), y)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_graph_capture(layout: torch.memory_format) -> None:
    """Forward and backward on the current stream, with nothing that a capture forbids."""
    arguments = drawn((4, 64, 14, 14), torch.float16, layout)
    leaves = {k: v.requires_grad_() for k, v in arguments.items() if isinstance(v, Tensor)}
    grad_y = torch.randn_like(arguments["x"])

    def work() -> tuple[Tensor, ...]:
        y = ops.bn_act_train(**arguments)[0]
        return y, *torch.autograd.grad(y, list(leaves.values()), grad_y)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for tensor in captured:
        tensor.detach().fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    for tensor, value in zip(captured, expected, strict=True):
        assert torch.equal(tensor, value)


def test_autocast_leaves_it_alone() -> None:
    """Half-precision activations beside fp32 parameters is what autocast brings, and what it
    takes."""
    arguments = drawn((4, 64, 14, 14), torch.float16, torch.channels_last)
    expected = ops.bn_act_train(**arguments)
    with torch.autocast(DEVICE):
        found = ops.bn_act_train(**arguments)
    for tensor, value in zip(found, expected, strict=True):
        assert tensor.dtype == value.dtype and torch.equal(tensor, value)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("name", ["relu_residual", "bare", "3d"])
def test_opcheck(name: str, layout: torch.memory_format) -> None:
    arguments = make(case("bn_act_train", name), torch.float32, DEVICE, layout)
    _, mean, rstd = ops.bn_act_train(**arguments)
    act, _ = arguments["act"], arguments["eps"]
    tensors = [arguments[key] for key in ("x", "weight", "bias", "residual")]
    backward = (torch.randn_like(arguments["x"]), *tensors, mean, rstd, act)
    torch.library.opcheck(torch.ops.resnet_fast._bn_act_train_backward.default, backward)
    for tensor in tensors:
        if tensor is not None:
            tensor.requires_grad_()
    forward = torch.ops.resnet_fast.bn_act_train.default
    torch.library.opcheck(forward, tuple(arguments.values()))


def test_misaligned_and_strided_views() -> None:
    shape = (4, 16, 7, 8)
    whole = torch.randn(2 * 4 * 16 * 7 * 8 + 1, device=DEVICE, dtype=torch.float16)
    count = whole.numel() // 2
    for x in (whole[1 : 1 + count].view(shape), whole[: 2 * count : 2].view(shape)):
        y, mean, rstd = ops.bn_act_train(x, act="relu")
        expected = ops.bn_act_train(x.clone(), act="relu")
        # Another access width is another order of the sums.
        framework = REFERENCE(x.contiguous(), act="relu")
        truth = REFERENCE(x.double(), act="relu")
        for tensor, aligned, theirs, exact in zip(
            (y, mean, rstd), expected, framework, truth, strict=True
        ):
            judge(tensor, theirs, exact)
            judge(aligned, theirs, exact)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_beyond_32_bit_indices(layout: torch.memory_format) -> None:
    """A little more than 2^31 elements, of two values a channel: every statistic is exact."""
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GiB of free device memory")
    shape = (2, 513, 1024, 2049)
    x = torch.empty(shape, device=DEVICE, dtype=torch.float16, memory_format=layout)
    x[0] = -1.0
    x[1] = 1.0
    y, mean, rstd = ops.bn_act_train(x, eps=0.0, act="relu")
    assert torch.count_nonzero(mean) == 0 and (rstd == 1.0).all()
    for c, h, w in ((0, 0, 0), (512, 1023, 2048), (511, 1023, 2048), (512, 5, 7)):
        assert y[0, c, h, w].item() == 0.0 and y[1, c, h, w].item() == 1.0
    del y
    grads = torch.ops.resnet_fast._bn_act_train_backward(x, x, None, None, None, mean, rstd, "none")
    assert torch.count_nonzero(grads[2]) == 0
    assert (grads[1] == 2 * 1024 * 2049).all()  # sum of grad_y times xhat, both of them x
    assert torch.count_nonzero(grads[0][:, ::171, ::93, ::97]) == 0
