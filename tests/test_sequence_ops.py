"""The ops below a sequence, by lists of steps, and the guard that ends one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sequence_support import OPS, convolution, needs_sequences, run, step
from torch.nn import functional as F

from resnet_fast import _library
from resnet_fast.ops.activation import ACTIVATIONS
from resnet_fast.ops.bn_act import reference
from resnet_fast.testing.budget import expect_within_budget

pytestmark = [needs_sequences, pytest.mark.usefixtures("no_grad")]

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 16, 40])
@pytest.mark.parametrize(
    "kernel, stride, padding, dilation",
    [(3, 2, 1, 1), (2, 2, 0, 1), (5, 1, 2, 1), (3, 1, 1, 2), (1, 3, 0, 1), (4, 3, 2, 3)],
)
def test_max_pool(
    channels: int, kernel: int, stride: int, padding: int, dilation: int, dtype: torch.dtype
) -> None:
    x = torch.randn(2, channels, 13, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 3, 4], x[1, -1, 0, 0], x[1, 0, 6:] = torch.nan, torch.inf, -torch.inf
    window = (kernel, kernel, stride, stride, padding, padding, dilation, dilation)
    y = run(x, [], step("max_pool", 0, 1, window=window))
    expected = F.max_pool2d(x, kernel, stride, padding, dilation)
    assert torch.equal(y.nan_to_num(1e9), expected.nan_to_num(1e9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 16, 40])
@pytest.mark.parametrize("kernel, stride, padding", [(2, 2, 0), (3, 1, 1), (3, 2, 1), (5, 3, 2)])
def test_average_pool(
    channels: int, kernel: int, stride: int, padding: int, dtype: torch.dtype
) -> None:
    """To the bit as torch's own."""
    x = torch.randn(2, channels, 13, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 3, 4], x[1, -1, 0, 0] = torch.nan, torch.inf
    window = (kernel, kernel, stride, stride, padding, padding, 1, 1)
    y = run(x, [], step("average_pool", 0, 1, window=window))
    last = x.contiguous(memory_format=torch.channels_last)
    expected = F.avg_pool2d(last, kernel, stride, padding)
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
    assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("channels", [1, 16, 130])
def test_affine(channels: int, act: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, channels, 7, 5, generator=generator)).to(dtype)
    scale, shift = torch.randn(2, channels, generator=generator)
    y = run(x, [scale, shift], step("affine", 0, 1, constants=0, act=ACTIVATIONS.index(act)))
    given = reference(x, scale, shift, act=act)
    truth = reference(x.double(), scale.double(), shift.double(), act=act)
    expect_within_budget(y, given, truth)
    x[0, 0, 0, 0] = torch.nan
    y = run(x, [scale, shift], step("affine", 0, 1, constants=0, act=ACTIVATIONS.index(act)))
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("filters", [5, 7, 64])
def test_pad_channels(stride: int, filters: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    window = (1, 1, stride, stride, 0, 0, 1, 1)
    y = run(x, [], step("pad_channels", 0, 1, filters=filters, window=window))
    assert torch.equal(y, F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, filters - 5)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 16, 130])
def test_mean(channels: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, channels, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = run(x, [], step("mean", 0, 1))
    given = F.adaptive_avg_pool2d(x, 1)
    expect_within_budget(y, given, x.double().mean((2, 3), keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 16, 130])
def test_gate(channels: int, dtype: torch.dtype) -> None:
    """Both factors made by steps: what is gated is written over, or read once more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, channels, 7, 5, generator=generator).to(dtype)
    x[0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    same = {"window": (1, 1, 1, 1, 0, 0, 1, 1)}
    pooled = [*step("max_pool", 0, 1, **same), *step("mean", 1, 2)]
    gated = [*pooled, *step("gate", 1, 3, second=2)]
    by = run(x, [], pooled)
    assert torch.equal(run(x, [], gated).isnan(), (x * by).isnan())
    assert torch.equal(run(x, [], gated).nan_to_num(), (x * by).nan_to_num())
    again = [*gated, *step("gate", 3, 4, second=2), *step("gate", 1, 5, second=2)]
    assert torch.equal(run(x, [], again).nan_to_num(), (x * by).nan_to_num())
    squared = [*pooled, *step("gate", 2, 3, second=2)]
    assert torch.equal(run(x, [], squared).nan_to_num(), (by * by).nan_to_num())


@pytest.mark.parametrize("filters", [32, 33])
@pytest.mark.parametrize("act", [0, 1, 3])
def test_a_residual_is_written_over_only_where_that_is_the_same(filters: int, act: int) -> None:
    """Three convolutions that add the value before them: at its last use, and before it."""
    constants = convolution(filters, filters)
    x = torch.randn(2, filters, 6, 5, generator=torch.Generator().manual_seed(1))
    made = {"constants": 0, "filters": filters, "act": act}
    steps = [
        *step("direct", 0, 1, **made),
        *step("direct", 1, 2, **made),
        *step("direct", 2, 3, second=1, **made),
        *step("direct", 3, 4, second=2, **made),
        *step("direct", 4, 5, second=3, **made),
        *step("direct", 5, 6, second=5, **made),
        *step("direct", 6, 7, second=0, **made),
    ]
    values = [x]
    for i, residual in enumerate([None, None, 1, 2, 3, 5, 0]):
        added = None if residual is None else values[residual]
        name = ACTIVATIONS[act]
        values.append(
            torch.ops.resnet_fast._direct_conv(
                values[i], *constants, added, [1, 1], [0, 0], [1, 1], 1, name
            )
        )
    assert torch.equal(run(x, constants, steps), values[-1])


def test_the_arena_is_smaller_than_the_values() -> None:
    constants = convolution()
    x = torch.randn(4, 32, 9, 9).contiguous(memory_format=torch.channels_last)
    made = {"constants": 0, "filters": 32}
    steps = [n for i in range(8) for n in step("direct", i, i + 1, **made)]
    handle = OPS._make_sequence(constants, steps, [])
    size = OPS._sequence_bytes(x, handle)
    OPS._free_sequence(handle)
    assert size == 2 * x.numel() * 4  # the one that is read and the one that is written


HOSTILE: dict[str, list[int]] = {
    "no steps": [],
    "half a step": [0] * 14,
    "channels of a window": step("pad_channels", 0, 1, filters=64, window=(3, 3, 1, 1, 2, 2, 1, 1)),
    "fewer channels": step("pad_channels", 0, 1, filters=31),
    "unknown kind": [10, *step("mean", 0, 1)[1:]],
    "reads the future": step("mean", 1, 1),
    "reads below": step("mean", -1, 1),
    "makes another value": step("mean", 0, 2),
    "no constants": step("direct", 0, 1, filters=32),
    "constants beyond": step("direct", 0, 1, filters=32, constants=1),
    "constants far beyond": step("direct", 0, 1, filters=32, constants=2**62),
    "no filters": step("direct", 0, 1, constants=0),
    "other filters": step("direct", 0, 1, constants=0, filters=31),
    "unknown activation": step("direct", 0, 1, constants=0, filters=32, act=99),
    "pool with an activation": step("mean", 0, 1, act=1),
    "norm without constants": step("affine", 0, 1),
    "norm with constants beyond": step("affine", 0, 1, constants=3),
    "norm with a weight as its scale": step("affine", 0, 1, constants=1),
    "norm of other channels": [
        *step("pad_channels", 0, 1, filters=64),
        *step("affine", 1, 2, constants=2),
    ],
    "norm of a window": step("affine", 0, 1, constants=2, window=(3, 3, 1, 1, 1, 1, 1, 1)),
    "norm with a residual": step("affine", 0, 1, constants=2, second=0),
    "mean over pixels apart": step("average_pool", 0, 1, window=(2, 2, 1, 1, 0, 0, 2, 2)),
    "mean over padding": step("average_pool", 0, 1, window=(2, 2, 1, 1, 2, 2, 1, 1)),
    "join of nothing": step("join", 0, 1),
    "join with an activation": step("join", 0, 1, second=0, act=1),
    "join of other sizes": [*step("mean", 0, 1), *step("join", 0, 2, second=1)],
    "join of a window": step("join", 0, 1, second=0, window=(1, 1, 2, 2, 0, 0, 1, 1)),
    "gate by nothing": step("gate", 0, 1),
    "gate by an image": step("gate", 0, 1, second=0),
    "gate of a window": [
        *step("mean", 0, 1),
        *step("gate", 0, 2, second=1, window=(3, 3, 1, 1, 1, 1, 1, 1)),
    ],
    "gate of every second pixel": [
        *step("mean", 0, 1),
        *step("gate", 0, 2, second=1, window=(1, 1, 2, 2, 0, 0, 1, 1)),
    ],
    "gate with an activation": [*step("mean", 0, 1), *step("gate", 0, 2, second=1, act=1)],
    "gate by other channels": [
        *step("pad_channels", 0, 1, filters=64),
        *step("mean", 1, 2),
        *step("gate", 0, 3, second=2),
    ],
    "mean with a residual": step("mean", 0, 1, second=0),
    "residual of another shape": step(
        "direct", 0, 1, constants=0, filters=32, second=0, window=(1, 1, 2, 2, 0, 0, 1, 1)
    ),
    "window of nothing": step("max_pool", 0, 1, window=(0, 1, 1, 1, 0, 0, 1, 1)),
    "window too large": step("max_pool", 0, 1, window=(99, 1, 1, 1, 0, 0, 1, 1)),
    "padding too large": step("max_pool", 0, 1, window=(2, 2, 1, 1, 2, 2, 1, 1)),
    "negative padding": step("max_pool", 0, 1, window=(2, 2, 1, 1, -1, 0, 1, 1)),
    "huge stride": step("max_pool", 0, 1, window=(2, 2, 2**62, 1, 0, 0, 1, 1)),
    "Winograd of a 1x1 kernel": step("winograd4", 0, 1, constants=0, filters=32),
}


@pytest.mark.parametrize("steps", HOSTILE.values(), ids=HOSTILE)
def test_hostile_steps(steps: list[int]) -> None:
    with pytest.raises(RuntimeError, match=r"steps|constants"):
        run(torch.randn(1, 32, 8, 8), convolution(), steps)


def test_hostile_tensors() -> None:
    steps = step("direct", 0, 1, constants=0, filters=32)
    x = torch.randn(1, 32, 8, 8)
    for index in range(4):
        for wrong in (torch.zeros(3), torch.zeros(32).double(), torch.zeros(64)[::2]):
            if index == 1 and wrong.dtype is torch.float32:
                continue  # the weight itself is for Winograd's kernels
            constants = convolution()
            constants[index] = wrong
            with pytest.raises(RuntimeError, match="constants"):
                run(x, constants, steps)
    for bad in (x.double(), x[0], x.bfloat16(), x.half()):
        handle = OPS._make_sequence(convolution(), steps, [])
        # What was packed in fp32 does not serve bf16, which older processors do not multiply.
        expected = "constants|this CPU does not multiply" if bad.dtype is torch.bfloat16 else "x: "
        with pytest.raises(RuntimeError, match=expected):
            OPS._run_sequence(bad, handle)
        OPS._free_sequence(handle)


def test_unknown_numbers() -> None:
    steps = step("mean", 0, 1)
    handle = OPS._make_sequence([], steps, [])
    OPS._free_sequence(handle)
    OPS._free_sequence(handle)  # twice is nothing
    for number in (handle, 0, -1, 2**62):
        with pytest.raises(RuntimeError, match="sequence: "):
            OPS._run_sequence(torch.randn(1, 4, 4, 4), number)


@pytest.mark.parametrize("shape", [(3,), (5000,), (700, 40)])
def test_what_is_watched_ends_it(shape: tuple[int, ...]) -> None:
    x, watched = torch.randn(1, 4, 4, 4), torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last)
    transposed = torch.randn(shape).T if len(shape) > 1 else torch.randn(2 * shape[0])[::2]
    handle = OPS._make_sequence([], step("mean", 0, 1), [watched, transposed])
    assert OPS._run_sequence(x, handle).shape == (1, 4, 1, 1)
    for tensor in (watched, transposed):
        tensor.data.mul_(2)
        assert OPS._run_sequence(x, handle).shape == (0,)
        tensor.data.div_(2)
        assert OPS._run_sequence(x, handle).shape == (1, 4, 1, 1)
    OPS._free_sequence(handle)


def test_the_guard_sees_what_it_is_told_to() -> None:
    native = _library.native()
    assert native is not None

    class Thing:
        pass

    thing, tensor, places = Thing(), torch.zeros(3), {"a": 1.5, "b": None}

    def edits() -> Iterator[Callable[[], None]]:
        yield lambda: None
        yield lambda: places.update(a=2.5)
        yield lambda: places.update(c=1)
        yield lambda: hooks.update(one=1)
        yield lambda: children.update(z=0)
        yield lambda: children.update(x=2)
        yield lambda: (children.pop("x"), children.update(x=one))
        yield lambda: setattr(thing, "__class__", type("Other", (Thing,), {}))
        yield lambda: tensor.add_(1)
        yield lambda: setattr(tensor, "data", torch.ones(3))

    one = object()
    for index, edit in enumerate(edits()):
        thing, tensor, places = Thing(), torch.zeros(3), {"a": 1.5, "b": None}
        hooks: dict[str, Any] = {}
        children: dict[str, Any] = {"x": one, "y": object()}
        guard = native.Guard()
        guard.same(places, "a", places["a"])
        guard.same(places, "b", None)
        guard.absent(places, "c")
        guard.empty(hooks)
        guard.items(children)
        guard.type(thing)
        guard.tensor(tensor)
        assert guard.holds()
        edit()
        assert guard.holds() is (index == 0), index


def test_a_guard_of_a_tensor_whose_class_holds_a_value() -> None:
    """Where torch has a getter, a subclass may have anything."""

    class Odd(torch.Tensor):
        _version = 7

    native = _library.native()
    assert native is not None
    guard, tensor = native.Guard(), torch.zeros(3).as_subclass(Odd)
    guard.tensor(tensor)
    assert guard.holds()
    Odd._version = 8
    assert not guard.holds()
