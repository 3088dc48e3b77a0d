# ruff: noqa: E501  (one convolution a line)
"""Every Triton kernel x config x dtype under Triton's interpreter, against fp64.

Triton reads TRITON_INTERPRET when a kernel is decorated, so this file needs a process of its own:
tests/test_triton_interpreter.py starts it. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/triton_kernels.py
"""

from __future__ import annotations

import itertools
import mmap
from typing import Any, NamedTuple

import pytest
import torch
from resnet_fast.kernels import activation, add_act, bn_act, conv_bn_act, conv_tiles, launch

import resnet_fast.ops.add_act_triton
import resnet_fast.ops.bn_act_triton
import resnet_fast.ops.conv_bn_act_triton  # noqa: F401
from resnet_fast import ops
from resnet_fast.testing.budget import within_budget

assert launch.INTERPRET, "run with TRITON_INTERPRET=1"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
REFERENCE = {op: ops.module(op).reference for op in ("conv_bn_act", "bn_act", "add_act")}


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) else value


def _layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "last" and x.ndim in LAST:
        return x.contiguous(memory_format=LAST[x.ndim])
    if layout == "slice":
        # Every second channel of a larger tensor, one column in: neither layout.
        wide = torch.full((x.shape[0], 2 * x.shape[1], *x.shape[2:-1], x.shape[-1] + 1), 1e4)
        view = wide.to(x.dtype)[:, ::2, ..., 1:]
        view.copy_(x)
        return view
    return x


def _assert_budget(op: str, actual: torch.Tensor, args: tuple[Any, ...]) -> None:
    truth = REFERENCE[op](*map(_double, args))
    verdict = within_budget(actual, REFERENCE[op](*args), truth)
    assert verdict.ok, verdict
    assert actual.dtype == args[0].dtype
    fmt = launch.output_format(args[0])
    assert actual.stride() == torch.empty(truth.shape).contiguous(memory_format=fmt).stride()


class Geometry(NamedTuple):
    """One convolution: shapes, then geometry, layout of x, activation and epilogue."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    layout: str
    act: str
    residual: bool


# fmt: off
GEOMETRIES = {
    "1x1": Geometry((3, 70, 7, 7), (37, 70, 1, 1), (1, 1), (0, 0), (1, 1), 1, "last", "relu", True),
    "1x1-nchw": Geometry((1, 33, 5, 3), (130, 33, 1, 1), (1, 1), (0, 0), (1, 1), 1, "", "none", False),
    "1x1-groups": Geometry((2, 12, 3, 3), (6, 4, 1, 1), (1, 1), (0, 0), (1, 1), 3, "last", "silu", True),
    "1x1-stride2": Geometry((3, 20, 7, 7), (24, 20, 1, 1), (2, 2), (0, 0), (1, 1), 1, "last", "none", False),
    "1x1-padded": Geometry((1, 20, 3, 4), (8, 20, 1, 1), (1, 1), (1, 0), (1, 1), 1, "", "sigmoid", False),
    "3x3": Geometry((3, 36, 7, 7), (21, 36, 3, 3), (1, 1), (1, 1), (1, 1), 1, "last", "relu", True),
    "3x3-stride2": Geometry((1, 40, 9, 7), (24, 40, 3, 3), (2, 2), (1, 1), (1, 1), 1, "", "relu", False),
    "3x3-dilation2": Geometry((3, 24, 7, 5), (9, 24, 3, 3), (1, 1), (2, 2), (2, 2), 1, "slice", "gelu", True),
    "3x3-groups": Geometry((1, 68, 6, 6), (34, 34, 3, 3), (1, 2), (1, 1), (1, 1), 2, "last", "hardswish", True),
    "rectangle": Geometry((1, 23, 9, 8), (5, 23, 2, 5), (3, 1), (0, 2), (2, 1), 1, "last", "relu6", False),
    "depthwise": Geometry((3, 6, 7, 7), (6, 1, 3, 3), (1, 1), (1, 1), (1, 1), 6, "last", "relu6", False),
    "stem": Geometry((1, 3, 13, 15), (10, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1, "last", "relu", False),
    "stem-dilated": Geometry((3, 3, 11, 9), (4, 3, 3, 3), (1, 2), (2, 0), (2, 3), 1, "", "leaky_relu", True),
    "1d": Geometry((3, 22, 19), (9, 22, 3), (2,), (1,), (1,), 1, "slice", "relu", True),
    "1d-pointwise": Geometry((2, 22, 9), (9, 22, 1), (1,), (0,), (1,), 1, "slice", "none", True),
    "3d": Geometry((1, 21, 3, 5, 4), (6, 21, 3, 2, 2), (1, 2, 1), (1, 0, 1), (1, 2, 1), 1, "last", "relu", True),
    "3d-thin": Geometry((3, 2, 5, 4, 3), (4, 2, 3, 3, 3), (2, 1, 1), (1, 1, 1), (1, 1, 1), 1, "", "silu", False),
    # More taps than are unrolled.
    "8x8": Geometry((1, 17, 9, 8), (3, 17, 8, 8), (1, 1), (1, 2), (1, 1), 1, "last", "relu", False),
    "8x8-depthwise": Geometry((1, 3, 9, 8), (3, 1, 8, 8), (1, 1), (1, 2), (1, 1), 3, "", "relu", False),
}
# fmt: on


def _conv_args(g: Geometry, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    rng = torch.Generator().manual_seed(seed)
    x = _layout(_random(rng, *g.x).to(dtype), g.layout)
    fan = torch.Size(g.weight[1:]).numel()
    weight = (_random(rng, *g.weight) / fan**0.5).to(dtype)
    if g.layout == "last" and weight.ndim in LAST:
        weight = weight.contiguous(memory_format=LAST[weight.ndim])
    k = g.weight[0]
    scale, shift = _random(rng, k) + 0.5, _random(rng, k)
    geometry = (list(g.stride), list(g.padding), list(g.dilation), g.groups)
    args = (x, weight, scale, shift, None, *geometry, g.act)
    if g.residual:
        shape = REFERENCE["conv_bn_act"](*map(_double, args)).shape
        args = (*args[:4], _random(rng, *shape).to(dtype), *args[5:])
    return args


def _fits(config: conv_tiles.Config, g: Geometry) -> bool:
    return not config.packed or g.weight[-1] * g.weight[1] <= config.block_c


# Every config and dtype meets the plain product, strided 3x3 taps and a packed row; the heuristic's
# choice (below) meets every geometry. The full product takes minutes.
CONV = [
    pytest.param(name, config, dtype, id=f"{name}-{config.name}-{str(dtype)[6:]}")
    for name, dtype in itertools.product(("1x1", "3x3-stride2", "stem-dilated", "1d"), DTYPES)
    for config in conv_tiles.configs(dtype)
    if _fits(config, GEOMETRIES[name]) and (config.packed or name != "stem-dilated")
]


@pytest.mark.parametrize("name, config, dtype", CONV)
def test_conv(name: str, config: conv_tiles.Config, dtype: torch.dtype) -> None:
    args = _conv_args(GEOMETRIES[name], dtype)
    _assert_budget("conv_bn_act", conv_bn_act.launch_conv_bn_act(*args, config=config), args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv_heuristic(name: str, dtype: torch.dtype) -> None:
    args = _conv_args(GEOMETRIES[name], dtype, seed=1)
    y = conv_bn_act.launch_conv_bn_act(*args)
    _assert_budget("conv_bn_act", y, args)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv_int64_offsets_and_op(name: str) -> None:
    args = _conv_args(GEOMETRIES[name], torch.float16)
    y = torch.ops.resnet_fast._conv_bn_act_triton(*args)
    assert torch.equal(y, conv_bn_act.launch_conv_bn_act(*args, wide=False))
    assert torch.equal(y, conv_bn_act.launch_conv_bn_act(*args, wide=True))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv_prepared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of the first call of a kind launches the next ones, and those of no other."""
    g = GEOMETRIES[name]
    decided: list[Any] = []
    decide = conv_bn_act._decide
    monkeypatch.setattr(conv_bn_act, "_decide", lambda *a: decided.append(a) or decide(*a))
    for dtype in (torch.float16, torch.float32):
        x, weight, scale, shift, residual, *rest = _conv_args(g, dtype, seed=3)
        call = conv_bn_act.prepare_conv_bn_act(weight, scale, shift, *rest)
        call(x, residual)
        decided.clear()
        fresh = _conv_args(g, dtype, seed=4)
        # The same weights, other inputs in memory of their own.
        args = (fresh[0], weight, scale, shift, fresh[4], *rest)
        y = call(fresh[0], fresh[4])
        assert decided == []
        _assert_budget("conv_bn_act", y, args)
        assert torch.equal(y, conv_bn_act.launch_conv_bn_act(*args))
        decided.clear()
        more = torch.cat([fresh[0], x])
        args = (more, *args[1:4], None, *rest)
        assert torch.equal(call(more, None), conv_bn_act.launch_conv_bn_act(*args))
        assert len(decided) == 2, "one image more, and no residual, is another kind"


def test_conv_prepared_refuses_a_residual_of_another_kind() -> None:
    x, weight, scale, shift, residual, *rest = _conv_args(GEOMETRIES["3x3"], torch.float16)
    call = conv_bn_act.prepare_conv_bn_act(weight, scale, shift, *rest)
    for _ in range(2):  # decided, and kept
        with pytest.raises(ValueError, match="residual"):
            call(x, residual[:1])
        with pytest.raises(TypeError, match="residual"):
            call(x, residual.float())
        call(x, residual)
    assert call(x[:0], residual[:0]).shape == (0, *residual.shape[1:])


def test_conv_prepared_keeps_few_kinds() -> None:
    x, weight, scale, shift, _, *rest = _conv_args(GEOMETRIES["1d-pointwise"], torch.float32)
    call = conv_bn_act.prepare_conv_bn_act(weight, scale, shift, *rest)
    for images in range(1, 20):
        some = x[:1].expand(images, -1, -1).contiguous()
        args = (some, weight, scale, shift, None, *rest)
        assert torch.equal(call(some, None), conv_bn_act.launch_conv_bn_act(*args))
    (known,) = [c.cell_contents for c in call.__closure__ or () if type(c.cell_contents) is dict]
    assert len(known) == 16


@pytest.mark.parametrize("name", ["1x1", "1x1-nchw", "3x3-stride2", "3x3-groups", "1d", "3d"])
def test_conv_in_parts(name: str) -> None:
    """The reduction in two parts, and in more than there are blocks of channels."""
    g = GEOMETRIES[name]
    for dtype, splits in ((torch.float16, 2), (torch.float32, 2), (torch.bfloat16, 8)):
        args = _conv_args(g, dtype, seed=2)
        config = conv_tiles.configs(dtype)[0]._replace(block_m=64, block_n=64, block_c=16)
        for wide in (False, True):
            y = conv_bn_act.launch_conv_bn_act(*args, config=config, splits=splits, wide=wide)
            _assert_budget("conv_bn_act", y, args)
    again = conv_bn_act.launch_conv_bn_act(*args, config=config, splits=8)
    assert torch.equal(y, again), "one order of summation"


def test_parts_fill_the_multiprocessors_and_are_worth_their_sums() -> None:
    choose = conv_tiles.choose_splits
    # ResNet-50's last stage at one image, tiles of 64x64x64: 512 filters and 2048.
    assert choose(8, 8, 9) == 8 and choose(32, 8, 1) == 2 and choose(8, 32, 1) == 8
    assert choose(132, 32, 9) == choose(67, 32, 9) == 1
    assert choose(1, 1, 9) == 1, "one block of channels is not split"
    assert choose(1, 4, 1) == 1, "nor are four products"
    assert conv_bn_act.choose(torch.float16, 49, 512, 512, 1, 3, 9)[1] == 8
    with pytest.raises(ValueError, match="splits"):
        args = _conv_args(GEOMETRIES["stem"], torch.float16)
        packed = conv_tiles.PACKED_CONFIGS[1]
        conv_bn_act.launch_conv_bn_act(*args, config=packed, splits=2)


def test_conv_is_the_public_ops_cuda_kernel() -> None:
    args = _conv_args(GEOMETRIES["3x3-groups"], torch.float16)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    y = torch.ops.resnet_fast.conv_bn_act.default.redispatch(keys, *args)
    assert torch.equal(y, conv_bn_act.launch_conv_bn_act(*args))


class _Altered:
    """Stands in for wrap_triton: launches one program, with some arguments replaced."""

    def __init__(self, **changes: int) -> None:
        self.changes = changes

    def __call__(self, kernel: Any) -> Any:
        self.kernel = kernel
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **flags: Any) -> None:
            named = dict(zip(self.kernel.arg_names, args, strict=False))
            self.kernel[(1,)](**{**named, **flags, **self.changes})

        return launch


# Q is 3: the product of the three is 2 in 32 bits.
@pytest.mark.parametrize("o, p", [(1, 1431655766), (715827883, 2)])
def test_conv_image_of_more_pixels_than_32_bits_count(o: int, p: int) -> None:
    """The first tile of an image of 2^32 pixels and two: all of it belongs to image 0."""
    g = GEOMETRIES["1x1-stride2"]._replace(x=(3, 20, 3, 5))
    args = _conv_args(g, torch.float32)
    y = conv_bn_act.launch_conv_bn_act(*args)
    altered = _Altered(D=2**31 - 1, H=2**31 - 1, O=o, P=p, M=6)
    tile = conv_bn_act.launch_conv_bn_act(*args, wide=True, wrap_triton=altered)
    assert torch.equal(tile[0], y[0])
    assert tile[1:].isnan().all()


def _sparse(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of which only the pages that are written take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


TAPS = {
    "unrolled": (torch.float16, conv_tiles.HALF_CONFIGS[2]),
    "loop": (torch.float32, conv_tiles.FLOAT_CONFIGS[0]),
    "packed": (torch.float16, conv_tiles.PACKED_CONFIGS[0]),
    "packed-loop": (torch.float32, conv_tiles.PACKED_FLOAT_CONFIGS[0]),
}


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("axis", ["t", "r", "s"])
@pytest.mark.parametrize("far", ["x", "weight"])
def test_conv_taps_beyond_32_bits(far: str, axis: str, taps: str) -> None:
    """Taps 2^30 elements apart: the third is 2^31 from the first."""
    dtype, config = TAPS[taps]
    step, half = 1 << 30, 1 << 29
    x = {"t": (1, 1, 3, 1, 2), "r": (1, 1, 3, 2), "s": (1, 1, 3)}[axis]
    dims = len(x) - 2
    ones = (1,) * dims
    g = Geometry(x, (4, 1, 3, *ones[1:]), ones, (0,) * dims, ones, 1, "", "none", False)
    args = list(_conv_args(g, dtype))
    y = conv_bn_act.launch_conv_bn_act(*args, config=config)
    memory = _sparse(3 * step, dtype)
    if far == "weight":
        args[1] = memory.as_strided(g.weight, (1, 1, step, *ones[1:])).copy_(args[1])
    elif axis == "s":
        args[0] = memory.as_strided(x, (1, 1, step)).copy_(args[0])
    else:
        # Contiguous, so that it is read in place: the columns that count are half a row apart.
        wide = memory.view(*x[:-1], step)
        wide[..., ::half] = args[0]
        args[0], args[5] = wide, [*ones[1:], half]
    assert torch.equal(conv_bn_act.launch_conv_bn_act(*args, config=config), y)


def test_conv_reach_beyond_32_bits() -> None:
    """A small x whose padding and dilation lead 2^31 elements out of it: the middle tap counts."""
    far = 1 << 20
    g = GEOMETRIES["3x3"]._replace(x=(1, 1024, 2, 2), weight=(4, 1024, 3, 1), residual=False)
    args = list(_conv_args(g._replace(padding=(1, 0)), torch.float32))
    weight = args[1]
    args[1], args[6] = weight[:, :, 1:2], [0, 0]
    middle = conv_bn_act.launch_conv_bn_act(*args)
    args[1], args[6:8] = weight, [[far, 0], [far, 1]]
    assert torch.equal(conv_bn_act.launch_conv_bn_act(*args), middle)


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_conv_activations_with_nan(act: str) -> None:
    g = GEOMETRIES["1x1"]._replace(act=act)
    args = _conv_args(g, torch.float32)
    args[0][1, 3, 2, 2] = float("nan")
    _assert_budget("conv_bn_act", conv_bn_act.launch_conv_bn_act(*args), args)


@pytest.mark.parametrize("present", [(False, False), (True, False), (False, True)])
def test_conv_optional_affine(present: tuple[bool, bool]) -> None:
    args = list(_conv_args(GEOMETRIES["3x3"], torch.float32))
    args[2:4] = [t if p else None for t, p in zip(args[2:4], present, strict=True)]
    _assert_budget("conv_bn_act", conv_bn_act.launch_conv_bn_act(*args), tuple(args))


@pytest.mark.parametrize("name", ["1x1", "3x3", "stem", "3d"])
def test_conv_any_strides(name: str) -> None:
    """x expanded over the batch, the weight and the residual transposed: strides of any kind."""
    args = list(_conv_args(GEOMETRIES[name]._replace(residual=True), torch.float32))
    args[0] = args[0][:1].expand_as(args[0])
    args[1] = args[1].transpose(0, 1).contiguous().transpose(0, 1)
    args[4] = args[4].transpose(-1, -2).contiguous().transpose(-1, -2)
    _assert_budget("conv_bn_act", conv_bn_act.launch_conv_bn_act(*args), tuple(args))


def test_conv_meaningless_stride_of_one_column() -> None:
    """A dimension of size 1 may carry any stride, and the tensor still counts as contiguous."""
    args = list(_conv_args(GEOMETRIES["1x1-nchw"]._replace(x=(2, 33, 5, 1)), torch.float32))
    args[0] = args[0].as_strided(args[0].shape, (165, 5, 1, 999))
    assert args[0].is_contiguous()
    _assert_budget("conv_bn_act", conv_bn_act.launch_conv_bn_act(*args), tuple(args))


def _no_launch(kernel: Any) -> Any:
    raise AssertionError("launched on an empty tensor")


def test_empty_batch_launches_nothing() -> None:
    args = list(_conv_args(GEOMETRIES["3x3"], torch.float32))
    args[0], args[4] = args[0][:0], args[4][:0]
    y = conv_bn_act.launch_conv_bn_act(*args, wrap_triton=_no_launch)
    assert y.shape == (0, 21, 7, 7)
    x = torch.zeros(0, 5, 3)
    c = torch.ones(5)
    assert bn_act.launch_bn_act(x, c, c, x, "relu", wrap_triton=_no_launch).shape == x.shape
    assert add_act.launch_add_act(x, x, "relu", wrap_triton=_no_launch).shape == x.shape
    g = add_act.launch_add_act_backward(x, x, x, "relu", wrap_triton=_no_launch)
    assert g.shape == x.shape


SHAPES = [
    pytest.param((3, 5, 7, 7), "", id="nchw"),
    pytest.param((1, 70, 5, 3), "last", id="nhwc"),
    pytest.param((2, 3, 33, 35), "", id="nchw-long"),
    pytest.param((1, 1030, 1, 2), "last", id="nhwc-long"),
    pytest.param((3, 6, 4, 5), "slice", id="slice"),
    pytest.param((3, 37), "", id="2d"),
    pytest.param((3, 7, 11), "", id="3d"),
    pytest.param((1, 3, 2, 5, 3), "last", id="5d"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", bn_act.CONFIGS)
@pytest.mark.parametrize("shape, layout", SHAPES)
def test_bn_act(
    shape: tuple[int, ...], layout: str, config: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(0)
    x = _layout(_random(rng, *shape).to(dtype), layout)
    scale, shift = _random(rng, shape[1]), _random(rng, shape[1])
    residual = _random(rng, *shape).to(dtype)
    args = (x, scale, shift, residual, "relu")
    y = bn_act.launch_bn_act(*args, config=config)
    _assert_budget("bn_act", y, args)
    if dtype == torch.float32:
        assert torch.equal(y, bn_act.launch_bn_act(*args, config=config, wide=True))


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_bn_act_op(act: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x, c = 3 * _random(rng, 2, 9, 5), _random(rng, 9)
    for args in ((x, None, c, None, act), (x, c, None, x, act), (x, None, None, None, act)):
        _assert_budget("bn_act", torch.ops.resnet_fast._bn_act_triton(*args), args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", add_act.CONFIGS)
@pytest.mark.parametrize("shape, layout", SHAPES)
def test_add_act(
    shape: tuple[int, ...], layout: str, config: tuple[int, int], dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(0)
    x = _layout(_random(rng, *shape).to(dtype), layout)
    residual = _random(rng, *shape).to(dtype)
    args = (x, residual, "relu")
    y = add_act.launch_add_act(*args, config=config)
    _assert_budget("add_act", y, args)
    assert torch.equal(y, add_act.launch_add_act(*args, config=config, wide=True))
    assert torch.equal(y, torch.ops.resnet_fast._add_act_triton(*args))


def _gradient(grad_y: torch.Tensor, x: torch.Tensor, r: torch.Tensor, act: str) -> torch.Tensor:
    x = x.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(REFERENCE["add_act"](x, r, act), x, grad_y)
    return grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", add_act.CONFIGS)
@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_add_act_backward(act: str, config: tuple[int, int], dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    x = _layout((3 * _random(rng, 2, 6, 5, 7)).to(dtype), "last")
    residual, grad_y = (_random(rng, *x.shape).to(dtype) for _ in range(2))
    # The kinks of every activation, and NaN.
    for i, kink in enumerate((0.0, 3.0, -3.0, 6.0, float("nan"))):
        x[0, 0, 0, i], residual[0, 0, 0, i] = kink, 0.0
    args = (grad_y, x, residual, act)
    grad = add_act.launch_add_act_backward(*args, config=config)
    truth = _gradient(*map(_double, args))
    assert within_budget(grad, _gradient(*args), truth).ok
    assert grad.stride() == x.stride()
    assert torch.equal(grad.nan_to_num(), _wide_backward(*args).nan_to_num())
    op = torch.ops.resnet_fast._add_act_backward_triton(*args)
    assert torch.equal(grad.nan_to_num(), op.nan_to_num())


def _wide_backward(*args: Any) -> torch.Tensor:
    return add_act.launch_add_act_backward(*args, wide=True)


def _bad_conv(**changes: Any) -> tuple[Any, ...]:
    names = ["x", "weight", "scale", "shift", "residual"]
    names += ["stride", "padding", "dilation", "groups", "act"]
    args = dict(zip(names, _conv_args(GEOMETRIES["3x3"], torch.float32), strict=True))
    return tuple({**args, **changes}.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.zeros(3, 36, 7, 7, dtype=torch.float64)},
        {"x": torch.zeros(3, 35, 7, 7)},
        {"x": torch.zeros(36, 7)},
        {"x": torch.zeros(1, 36, 1, 1).expand(1, 36, 1 << 31, 1)},
        {"padding": [1 << 31, 0]},
        {"weight": torch.zeros(21, 36, 3)},
        {"weight": torch.zeros(21, 36, 3, 3, dtype=torch.float16)},
        {"weight": torch.zeros(21, 36, 10, 3)},
        {"scale": torch.zeros(20)},
        {"shift": torch.zeros(21, 1)},
        {"residual": torch.zeros(3, 21, 7, 1)},
        {"residual": torch.zeros(3, 21, 7, 7, dtype=torch.float16)},
        {"stride": [0, 1]},
        {"stride": [1]},
        {"padding": [-1, 0]},
        {"dilation": [1, 0]},
        {"groups": 0},
        {"groups": 2},
        {"act": "tanh"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_conv_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        conv_bn_act.launch_conv_bn_act(*_bad_conv(**changes), wrap_triton=_no_launch)


def test_packed_config_refuses_a_longer_row() -> None:
    with pytest.raises(ValueError, match="config"):
        conv_bn_act.launch_conv_bn_act(*_bad_conv(), config=conv_tiles.PACKED_CONFIGS[0])


def test_elementwise_refuse() -> None:
    x, c = torch.zeros(2, 3, 4), torch.zeros(3)
    for call in (
        lambda: add_act.launch_add_act(x, x[:1], "relu"),
        lambda: add_act.launch_add_act(x, x.half(), "relu"),
        lambda: add_act.launch_add_act_backward(x[:1], x, x, "relu"),
        lambda: bn_act.launch_bn_act(x, c[:2], c, None, "relu"),
        lambda: bn_act.launch_bn_act(c, c, c, None, "relu"),
        lambda: bn_act.launch_bn_act(x, c, c, x[..., :1], "relu"),
        lambda: bn_act.launch_bn_act(x.double(), c, c, None, "relu"),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()
