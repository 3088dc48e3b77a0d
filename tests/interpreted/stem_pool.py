"""The stem's Triton kernel under Triton's interpreter, against fp64.

By hand, as in triton_kernels.py:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/stem_pool.py
"""

from __future__ import annotations

import itertools
import mmap
from typing import Any

import pytest
import torch
from resnet_fast.kernels import activation, launch, stem_pool

from resnet_fast import ops
from resnet_fast.testing.budget import expect_within_budget, in_formats

assert launch.INTERPRET, "run with TRITON_INTERPRET=1"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
reference = ops.module("stem_pool").reference


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def _image(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    x = torch.randint(0, 256, shape) if dtype == torch.uint8 else torch.randn(shape)
    x = x.to(dtype)
    if layout == "last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        # Every second channel of a larger image, one column in: neither layout.
        wide = torch.full((shape[0], 2 * shape[1], shape[2], shape[3] + 1), 99.0).to(dtype)
        view = wide[:, ::2, :, 1:]
        view.copy_(x)
        return view
    return x


def _arguments(
    shape: tuple[int, ...],
    outputs: int,
    dtype: torch.dtype,
    layout: str = "",
    image: torch.dtype | None = None,
    act: str = "relu",
) -> tuple[Any, ...]:
    channels = shape[1]
    x = _image(shape, image or dtype, layout)
    weight = (_random(outputs, channels, 7, 7) / (49 * channels) ** 0.5).to(dtype)
    scale, shift = _random(outputs) + 0.5, _random(outputs)
    vectors = (None, None)
    if image == torch.uint8:
        deviation = 1 + torch.rand(channels)
        vectors = (1 / (64 * deviation), -2 * torch.rand(channels) - 1)
    return x, weight, scale, shift, *vectors, act


def _assert_budget(y: torch.Tensor, args: tuple[Any, ...]) -> None:
    x, weight, *_ = args
    assert y.dtype == weight.dtype
    fmt = launch.output_format(x)
    double = [v.double() if isinstance(v, torch.Tensor) else v for v in args]
    truth = reference(*double)
    assert y.stride() == torch.empty(truth.shape).contiguous(memory_format=fmt).stride()
    expect_within_budget(y, in_formats(reference, *args), truth)


SHAPES = {
    "7x7": ((1, 3, 7, 7), 10),
    "17x23": ((3, 3, 17, 23), 37),
    "one-pixel": ((3, 3, 1, 1), 5),
    "one-row": ((1, 4, 1, 30), 10),
    "one-column": ((1, 1, 30, 1), 10),
    "grey": ((1, 1, 9, 12), 37),
    "two": ((1, 2, 12, 9), 10),
    "four": ((1, 4, 13, 11), 70),
    "two-tiles": ((1, 3, 3, 241), 10),
    # A multiple of eight pooled columns, in one tile and in two.
    "eight": ((1, 3, 9, 32), 16),
    "64-columns": ((1, 3, 3, 256), 10),
}


@pytest.mark.parametrize("layout", ["", "last", "slice"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, layout: str) -> None:
    args = _arguments(*SHAPES[name], torch.float16, layout)
    _assert_budget(stem_pool.launch_stem_pool(*args), args)


CONFIGS = [
    pytest.param(dtype, config, tf32, id=f"{config.name}-{str(dtype)[6:]}-{tf32}")
    for dtype, tf32 in (*itertools.product(DTYPES, [False]), (torch.float32, True))
    for config in stem_pool.configs(dtype, tf32)
]


@pytest.mark.parametrize("image", ["same", "uint8"])
@pytest.mark.parametrize("dtype, config, tf32", CONFIGS)
def test_configs(dtype: torch.dtype, config: stem_pool.Config, tf32: bool, image: str) -> None:
    raw = torch.uint8 if image == "uint8" else None
    args = _arguments((1, 3, 13, 11), 37, dtype, "last", raw)
    y = stem_pool.launch_stem_pool(*args, config=config, allow_tf32=tf32)
    _assert_budget(y, args)


@pytest.mark.parametrize("strip", [1, 2, 3, 100])
def test_strips(strip: int) -> None:
    args = _arguments((2, 3, 21, 9), 10, torch.float16, act="silu")
    args = (*args[:2], -args[2], *args[3:])
    y = stem_pool.launch_stem_pool(*args, strip=strip)
    _assert_budget(y, args)
    assert torch.equal(y, stem_pool.launch_stem_pool(*args))


@pytest.mark.parametrize("image", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_image_dtypes(dtype: torch.dtype, image: torch.dtype) -> None:
    """The image is converted once, to the weight's dtype."""
    args = _arguments((1, 3, 9, 13), 10, dtype, image=image)
    _assert_budget(stem_pool.launch_stem_pool(*args), args)
    converted = args[0].to(dtype)
    # Triton's interpreter truncates where it narrows to bf16.
    if image != torch.uint8 and dtype != torch.bfloat16:
        same = stem_pool.launch_stem_pool(converted, *args[1:])
        assert torch.equal(stem_pool.launch_stem_pool(*args), same)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("layout", ["", "last", "slice"])
def test_normalisation_leaves_the_padding_zero(channels: int, layout: str) -> None:
    args = _arguments((1, channels, 10, 7), 10, torch.float16, layout, torch.uint8)
    _assert_budget(stem_pool.launch_stem_pool(*args), args)
    between = (args[0] + torch.rand(args[0].shape), *args[1:])
    _assert_budget(stem_pool.launch_stem_pool(*between), between)
    for vectors in ((args[4], None), (None, args[5])):
        part = (*args[:4], *vectors, args[6])
        _assert_budget(stem_pool.launch_stem_pool(*part), part)


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_activations(act: str) -> None:
    args = _arguments((1, 3, 11, 14), 10, torch.float32, "last", act=act)
    args = (args[0], 3 * args[1], *args[2:])
    _assert_budget(stem_pool.launch_stem_pool(*args), args)


@pytest.mark.parametrize("present", [(False, False), (True, False), (False, True)])
def test_optional_affine_and_maxima_below_zero(present: tuple[bool, bool]) -> None:
    """Pooling pads with what no value is below: maxima may be negative."""
    args = list(_arguments((1, 3, 12, 10), 10, torch.float16, act="none"))
    args[3] = args[3] - 20
    args[2:4] = [t if p else None for t, p in zip(args[2:4], present, strict=True)]
    _assert_budget(stem_pool.launch_stem_pool(*args), tuple(args))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", ["", "last"])
@pytest.mark.parametrize("act", ["none", "relu"])
def test_special_values_stay_where_they_belong(value: float, layout: str, act: str) -> None:
    """One pixel at a time: no window that does not hold it is touched."""
    for y, x in ((0, 0), (7, 9), (14, 20), (6, 12)):
        args = _arguments((1, 3, 15, 21), 10, torch.float32, layout, act=act)
        args[0][0, 1, y, x] = value
        _assert_budget(stem_pool.launch_stem_pool(*args), args)


def test_strides_of_any_kind() -> None:
    """x expanded over the batch and transposed, the weight channels-last."""
    args = list(_arguments((3, 3, 14, 9), 10, torch.float16))
    args[0] = args[0][:1].expand_as(args[0])
    args[1] = args[1].contiguous(memory_format=torch.channels_last)
    _assert_budget(stem_pool.launch_stem_pool(*args), tuple(args))
    args[0] = args[0].transpose(-1, -2)
    _assert_budget(stem_pool.launch_stem_pool(*args), tuple(args))


FAR = {
    "images": ((2, 1, 5, 5), (1 << 31, 0, 5, 1)),
    "rows": ((1, 1, 9, 5), (0, 0, 1 << 28, 1)),
    "columns": ((1, 1, 5, 9), (0, 0, 1, 1 << 28)),
    "channels": ((1, 3, 5, 5), (0, 1 << 30, 5, 1)),
}


@pytest.mark.parametrize("axis", FAR)
def test_offsets_beyond_32_bits(axis: str) -> None:
    """The last image, row, column or channel lies 2^31 elements from the first."""
    shape, strides = FAR[axis]
    # Only the pages that are written take memory.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(mmap.mmap(-1, (1 << 31) + 64, flags=flags), dtype=torch.uint8)
    args = _arguments(shape, 4, torch.float16, image=torch.uint8)
    x = memory.as_strided(shape, strides).copy_(args[0])
    y = stem_pool.launch_stem_pool(x, *args[1:])
    assert torch.equal(y, stem_pool.launch_stem_pool(*args))


def test_is_the_public_ops_cuda_kernel() -> None:
    args = _arguments((1, 3, 9, 13), 10, torch.float16)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    y = torch.ops.resnet_fast.stem_pool.default.redispatch(keys, *args)
    assert torch.equal(y, stem_pool.launch_stem_pool(*args))
    double = [v.double() if isinstance(v, torch.Tensor) else v for v in args]
    wide = torch.ops.resnet_fast.stem_pool.default.redispatch(keys, *double)
    assert wide.dtype == torch.float64


def _no_launch(kernel: Any) -> Any:
    raise AssertionError("launched on an empty tensor")


def test_empty_batch_launches_nothing() -> None:
    args = _arguments((0, 3, 9, 13), 10, torch.float16)
    y = stem_pool.launch_stem_pool(*args, wrap_triton=_no_launch)
    assert y.shape == (0, 10, 3, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.zeros(1, 3, 9, 9, dtype=torch.float64)},
        {"x": torch.zeros(1, 3, 9, 9, dtype=torch.int32)},
        {"x": torch.zeros(1, 4, 9, 9)},
        {"x": torch.zeros(3, 9, 9)},
        {"x": torch.zeros(1, 3, 0, 9)},
        {"x": torch.zeros(1, 3, 1, 1).expand(1, 3, 1 << 28, 1)},
        {"x": torch.zeros(1, 5, 9, 9), "weight": torch.zeros(10, 5, 7, 7)},
        {"weight": torch.zeros(10, 3, 7, 7, dtype=torch.float64)},
        {"weight": torch.zeros(10, 3, 7, 5)},
        {"weight": torch.zeros(0, 3, 7, 7)},
        {"scale": torch.zeros(9)},
        {"shift": torch.zeros(10, 1)},
        {"input_scale": torch.zeros(10)},
        {"input_shift": torch.zeros(1)},
        {"act": "tanh"},
        {"strip": 0},
    ],
    ids=lambda c: next(iter(c)),
)
def test_refuses(changes: dict[str, Any]) -> None:
    names = ("x", "weight", "scale", "shift", "input_scale", "input_shift", "act")
    args = dict(zip(names, _arguments((1, 3, 9, 9), 10, torch.float32), strict=True))
    with pytest.raises((ValueError, TypeError)):
        stem_pool.launch_stem_pool(**{**args, **changes}, wrap_triton=_no_launch)


@pytest.mark.parametrize("layout", ["", "last", "slice"])
@pytest.mark.parametrize("image", [None, torch.uint8])
def test_prepared(image: torch.dtype | None, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of the first call of a kind launches the next ones, and those of no other."""
    for dtype in (torch.float16, torch.float32):
        x, *parameters = _arguments((2, 3, 17, 23), 12, dtype, layout, image)
        call = stem_pool.prepare_stem_pool(*parameters)
        call(x)
        fresh = _image(tuple(x.shape), image or dtype, layout)
        assert fresh.stride() == x.stride()
        expected = stem_pool.launch_stem_pool(fresh, *parameters)
        with monkeypatch.context() as patch:
            patch.setattr(stem_pool, "launch_stem_pool", None)
            y = call(fresh)
            assert torch.equal(y, expected) and y.stride() == expected.stride()
            _assert_budget(y, (fresh, *parameters))
            with pytest.raises(TypeError, match="NoneType"):
                call(fresh[:1])
        assert torch.equal(call(fresh[:1]), stem_pool.launch_stem_pool(fresh[:1], *parameters))
        assert call(fresh[:0]).shape == (0, *y.shape[1:])


def test_prepared_without_vectors() -> None:
    x, weight, *_ = _arguments((1, 3, 9, 9), 12, torch.float16)
    call = stem_pool.prepare_stem_pool(weight, None, None, None, None, "none")
    for _ in range(2):
        y = call(x)
    assert torch.equal(y, stem_pool.launch_stem_pool(x, weight, None, None, None, None, "none"))
