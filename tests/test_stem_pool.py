"""The contract of ``stem_pool`` where its layers run one by one; its kernel: tests/interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resnet_fast import ops
from resnet_fast.errors import ArgumentError, DTypeError, ResNetFastError
from resnet_fast.ops import activation
from resnet_fast.testing.budget import expect_within_budget, in_formats

reference = ops.module("stem_pool").reference
OP = torch.ops.resnet_fast.stem_pool.default
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = [(1, 3, 7, 7), (3, 3, 17, 23), (2, 1, 1, 1), (1, 4, 12, 9), (0, 3, 9, 9)]


def _arguments(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    image: torch.dtype | None = None,
    outputs: int = 10,
    act: str = "relu",
) -> dict[str, Any]:
    channels = shape[1]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    raw = torch.randint(0, 256, shape) if image is torch.uint8 else torch.randn(shape)
    arguments = {
        "x": raw.to(image or dtype),
        "weight": (torch.randn(outputs, channels, 7, 7) / (49 * channels) ** 0.5).to(dtype),
        "scale": torch.randn(outputs, dtype=wide),
        "shift": torch.randn(outputs, dtype=wide),
        "input_scale": None,
        "input_shift": None,
        "act": act,
    }
    if image is torch.uint8:
        arguments["input_scale"] = 1 / (64 + torch.rand(channels, dtype=wide))
        arguments["input_shift"] = -2 * torch.rand(channels, dtype=wide) - 1
    return arguments


def _layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        wide = x.repeat_interleave(2, dim=1).contiguous(memory_format=torch.channels_last)
        return wide[:, ::2]
    return x


def _expect(y: torch.Tensor, arguments: dict[str, Any]) -> None:
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    if y.dtype is torch.float64:
        arguments = {
            k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
        }
    expect_within_budget(y, in_formats(reference, *arguments.values()), reference(**double))


@pytest.mark.parametrize("layout", ["", "last", "slice"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    arguments = _arguments(shape, dtype)
    arguments["x"] = _layout(arguments["x"], layout)
    y = ops.stem_pool(**arguments)
    assert y.dtype is dtype
    assert list(y.shape) == [shape[0], 10, (shape[2] + 3) // 4, (shape[3] + 3) // 4]
    x = arguments["x"]
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    expected = torch.channels_last if last else torch.contiguous_format
    assert y.is_contiguous(memory_format=expected)
    _expect(y, arguments)


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_activations(act: str) -> None:
    arguments = _arguments((1, 3, 12, 11), torch.float32, act=act)
    _expect(ops.stem_pool(**arguments), arguments)


@pytest.mark.parametrize("image", [torch.uint8, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_images(dtype: torch.dtype, image: torch.dtype) -> None:
    """As if normalised first, and rounded after it: what is padded is zero, not the shift."""
    arguments = _arguments((2, 3, 12, 11), dtype, torch.uint8)
    if image is torch.float32:
        arguments["x"] = arguments["x"] + torch.rand(2, 3, 12, 11)
    y = ops.stem_pool(**arguments)
    assert y.dtype is dtype
    _expect(y, arguments)
    wide = arguments["input_scale"].dtype
    x = arguments["x"].to(wide) * arguments["input_scale"].view(1, 3, 1, 1)
    x = (x + arguments["input_shift"].view(1, 3, 1, 1)).to(dtype)
    normalised = {**arguments, "x": x, "input_scale": None, "input_shift": None}
    assert torch.equal(y, ops.stem_pool(**normalised))


@pytest.mark.parametrize("image", [*DTYPES, torch.uint8])
def test_image_dtypes(image: torch.dtype) -> None:
    arguments = _arguments((1, 3, 12, 11), torch.float16, image)
    arguments["input_scale"] = arguments["input_shift"] = None
    y = ops.stem_pool(**arguments)
    assert torch.equal(y, ops.stem_pool(**{**arguments, "x": arguments["x"].half()}))


def test_nan_wins_and_padding_does_not() -> None:
    arguments = _arguments((1, 3, 16, 16), torch.float32, act="none")
    arguments["shift"] = arguments["shift"] - 50
    arguments["x"][0, 0, 8, 8] = float("nan")
    y = ops.stem_pool(**arguments)
    assert y.isnan().any() and (y[~y.isnan()] < 0).all()
    _expect(y, arguments)


def test_gradients() -> None:
    names = ("x", "weight", "scale", "shift", "input_scale", "input_shift")
    arguments = _arguments((1, 2, 7, 9), torch.float64, outputs=3, act="silu")
    arguments["input_scale"] = torch.rand(2, dtype=torch.float64) + 0.5
    arguments["input_shift"] = torch.randn(2, dtype=torch.float64)
    inputs = [arguments[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *given: ops.stem_pool(*given, "silu"), inputs)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_gradients_in_fp32(act: str) -> None:
    """Each gradient within budget of fp64, given those of the framework's own layers."""
    arguments = _arguments((2, 3, 17, 13), torch.float32, act=act)
    names = ("x", "weight", "scale", "shift")

    def gradients(f: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        given = {n: arguments[n].detach().to(dtype).requires_grad_() for n in names}
        y = f(**{**arguments, **given})
        ramp = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        return torch.autograd.grad(y, list(given.values()), ramp)

    truth = gradients(reference, torch.float64)
    framework = gradients(reference, torch.float32)
    ours = gradients(ops.stem_pool, torch.float32)
    for mine, theirs, right in zip(ours, framework, truth, strict=True):
        expect_within_budget(mine, theirs, right)


def _some(layout: str = "", grad: bool = False) -> tuple[Any, ...]:
    arguments = _arguments((2, 3, 13, 11), torch.float32)
    arguments["x"] = _layout(arguments["x"], layout)
    if grad:
        arguments["weight"].requires_grad_()
    return tuple(arguments.values())


@pytest.mark.parametrize("layout", ["", "last", "slice"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(layout: str, grad: bool) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(OP, _some(layout, grad), test_utils=checks)


def test_opcheck_of_raw_images() -> None:
    arguments = _arguments((2, 3, 13, 11), torch.float16, torch.uint8)
    torch.library.opcheck(OP, tuple(arguments.values()), test_utils=["test_faketensor"])


@pytest.mark.parametrize("grad", [False, True])
def test_aot_dispatch(grad: bool) -> None:
    torch.library.opcheck(OP, _some(grad=grad), test_utils=["test_aot_dispatch_dynamic"])


class Stem(torch.nn.Module):
    """The op with parameters, as a network would hold it."""

    def __init__(self) -> None:
        super().__init__()
        x, self.weight, self.scale, self.shift, *_ = _some()
        self.example = x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.stem_pool(x, self.weight, self.scale, self.shift, act="relu")


def test_export_keeps_the_node(no_grad: None) -> None:
    stem = Stem()
    program = torch.export.export(stem, (stem.example,))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [OP]
    assert torch.equal(program.module()(stem.example), stem(stem.example))


def test_compiles_whole(no_grad: None) -> None:
    stem = Stem()
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(stem.example), stem(stem.example))


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("x", torch.zeros(2, 3, 9, 9, dtype=torch.int32), DTypeError),
        ("x", torch.zeros(3, 9, 9), ArgumentError),
        ("x", torch.zeros(2, 5, 9, 9), ArgumentError),
        ("x", torch.zeros(2, 0, 9, 9), ArgumentError),
        ("x", torch.zeros(2, 3, 0, 9), ArgumentError),
        ("x", 1, ArgumentError),
        ("weight", torch.zeros(10, 3, 7, 7, dtype=torch.uint8), DTypeError),
        ("weight", torch.zeros(10, 3, 5, 7), ArgumentError),
        ("weight", torch.zeros(10, 4, 7, 7), ArgumentError),
        ("weight", torch.zeros(0, 3, 7, 7), ArgumentError),
        ("weight", torch.zeros(10, 3, 7, 7, device="meta"), ArgumentError),
        ("scale", torch.zeros(9), ArgumentError),
        ("scale", torch.zeros(10).double(), DTypeError),
        ("shift", torch.zeros(10, 1), ArgumentError),
        ("input_scale", torch.zeros(10), ArgumentError),
        ("input_scale", torch.zeros(3).half(), DTypeError),
        ("input_shift", torch.zeros(3, device="meta"), ArgumentError),
        ("act", "tanh", ArgumentError),
    ],
)
def test_errors_name_the_argument(argument: str, value: Any, error: type[Exception]) -> None:
    arguments = {**_arguments((2, 3, 9, 9), torch.float32), argument: value}
    with pytest.raises(ResNetFastError) as raised:
        ops.stem_pool(**arguments)
    assert type(raised.value) is error
    assert raised.value.argument == argument
