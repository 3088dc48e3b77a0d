"""This package's convolutions in bf16, where the CPU multiplies it: geometries and edges."""

from __future__ import annotations

import pytest
import torch
from fuzz_support import random_geometries
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from resnet_fast.ops import conv_bn_act_direct
from resnet_fast.ops.activation import ACTIVATIONS
from resnet_fast.plan.candidate import CANDIDATES, default_order, run_aten
from resnet_fast.plan.site import Site, device_name
from resnet_fast.plan.verify import random_inputs, verify
from resnet_fast.testing.budget import expect_within_budget, in_formats

if not conv_bn_act_direct.available(torch.bfloat16):
    pytest.skip("this CPU, or this process, has no AVX512_BF16", allow_module_level=True)


def site_of(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    act: str = "relu",
    residual: bool = False,
    affine: bool = True,
    layout: str = "channels_last",
) -> Site:
    count = len(x) - 2
    geometry = ((value,) * count for value in (stride, padding, dilation))
    return Site(
        "conv_bn_act", x, weight, *geometry, 1, act, affine, residual, "bfloat16", layout,
        device_name("cpu"),
    )  # fmt: skip


def poison_pool() -> None:
    """Fills the memory that the next outputs will get with NaN."""
    weight = torch.ones(64, 2, 1, 1).bfloat16()
    x = torch.ones(1, 2, 256, 256).bfloat16()
    packed = torch.ops.resnet_fast._direct_weight(weight, 1)
    torch.ops.resnet_fast._direct_conv(
        x, packed, weight, None, None, None, [1, 1], [0, 0], [1, 1], 1, "none"
    ).fill_(float("nan"))


def check(site: Site, batch: int = 2, name: str = "direct") -> None:
    poison_pool()
    x, args, residual = random_inputs(site, "cpu", batch)
    wide = args._make(t.double() if isinstance(t, Tensor) else t for t in args)
    truth = run_aten(x.double(), wide, None if residual is None else residual.double(), site.act)
    frameworks = in_formats(lambda a, b: run_aten(a, args, b, site.act), x, residual)
    y = CANDIDATES[name].run(x, args, residual, site.act)
    assert y.dtype is torch.bfloat16
    expect_within_budget(y, frameworks, truth)


SHAPES = [
    # ResNet's, then the edges: odd depth, one channel, part of a block, more than one panel.
    ((2, 3, 64, 64), (64, 3, 7, 7), 2, 3),
    ((1, 3, 9, 65), (40, 3, 3, 3), 2, 1),
    ((1, 3, 9, 65), (16, 3, 3, 3), 1, 1),
    ((2, 16, 9, 65), (16, 16, 3, 3), 1, 1),
    ((2, 24, 9, 9), (48, 24, 1, 1), 1, 0),
    ((1, 1, 20, 11), (33, 1, 5, 5), 1, 2),
    ((2, 14, 7, 9), (32, 14, 3, 3), 1, 1),
    ((1, 15, 7, 9), (32, 15, 3, 3), 1, 1),
    ((2, 64, 28, 28), (256, 64, 1, 1), 1, 0),
    ((2, 128, 15, 15), (128, 128, 3, 3), 2, 1),
    ((1, 2048, 7, 7), (512, 2048, 1, 1), 1, 0),
    ((2, 5, 9, 7), (33, 5, 3, 3), 1, 1),
    ((2, 1, 9, 7), (3, 1, 1, 1), 1, 0),
    ((2, 513, 5, 5), (40, 513, 1, 1), 1, 0),
    ((1, 17, 5, 6, 7), (35, 17, 3, 3, 3), 1, 1),
]


@pytest.mark.parametrize(("x", "weight", "stride", "padding"), SHAPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_shapes(x, weight, stride, padding, residual, layout) -> None:
    check(site_of(x, weight, stride, padding, residual=residual, layout=layout))


@pytest.mark.parametrize("name", ["winograd2", "winograd4"])
@pytest.mark.parametrize(
    ("x", "weight", "padding"),
    [
        ((2, 64, 14, 14), (64, 64, 3, 3), 1),
        ((1, 128, 28, 28), (128, 128, 3, 3), 1),
        ((2, 33, 9, 7), (35, 33, 3, 3), 1),
        ((1, 5, 3, 4), (70, 5, 3, 3), 0),
        ((1, 300, 5, 6), (40, 300, 3, 3), 2),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_winograd_shapes(name, x, weight, padding, residual, act) -> None:
    check(site_of(x, weight, padding=padding, residual=residual, act=act), name=name)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("affine", [False, True])
def test_activations(act: str, affine: bool) -> None:
    check(site_of((2, 34, 6, 5), (70, 34, 3, 3), padding=1, act=act, residual=True, affine=affine))


@random_geometries(40)
@given(data=st.data())
def test_random_geometries(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    channels, filters, size, kernel = draw(1, 40), draw(1, 70), draw(1, 12), draw(1, 4)
    stride, padding, dilation = draw(1, 3), draw(0, 3), draw(1, 2)
    assume(size + 2 * padding >= dilation * (kernel - 1) + 1)
    x, weight = (2, channels, size, size + draw(0, 3)), (filters, channels, kernel, kernel)
    check(
        site_of(x, weight, stride, padding, dilation, residual=data.draw(st.booleans())), draw(1, 3)
    )


@pytest.mark.parametrize("name", ["direct", "winograd2", "winograd4"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("channels", [3, 6, 20])
def test_special_values_go_where_the_framework_puts_them(
    name: str, value: str, act: str, channels: int
) -> None:
    site = site_of((1, channels, 7, 9), (40, channels, 3, 3), padding=1, act=act)
    x, args, _ = random_inputs(site, "cpu", 1)
    x[0, 2, 2, 3] = float(value)
    expected = run_aten(x, args, None, act)
    actual = CANDIDATES[name].run(x, args, None, act)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


def test_registration_and_empty_batch() -> None:
    site = site_of((2, 9, 6, 5), (7, 9, 3, 3), padding=1, residual=True)
    x, args, residual = random_inputs(site, "cpu")
    op = torch.ops.resnet_fast._conv_bn_act_direct.default
    torch.library.opcheck(op, (x, *args[:7], residual, *args[7:], "relu"))
    assert CANDIDATES["direct"].run(x[:0], args, residual[:0], "relu").shape == (0, 7, 6, 5)


def test_the_default_order() -> None:
    pointwise = site_of((1, 256, 14, 14), (1024, 256, 1, 1), residual=True)
    assert default_order(pointwise) == ("direct", "onednn", "aten")
    assert verify(pointwise, CANDIDATES["direct"], "cpu").ok
    large = site_of((1, 64, 56, 56), (64, 64, 3, 3), padding=1)
    assert default_order(large) == ("winograd4", "direct", "onednn", "aten")
    assert verify(large, CANDIDATES["winograd4"], "cpu").ok
    # Transformed weights are eight times as many bytes: read once, for few tiles, they cost more.
    assert default_order(site_of((1, 256, 14, 14), (256, 256, 3, 3), padding=1))[0] == "direct"


def test_guards() -> None:
    weight = torch.randn(8, 4, 1, 1).bfloat16()
    packed = torch.ops.resnet_fast._direct_weight(weight, 1)
    arguments = [None, None, None, [1, 1], [0, 0], [1, 1], 1, "relu"]
    x = torch.randn(1, 4, 3, 3)
    with pytest.raises(RuntimeError, match="weight"):
        torch.ops.resnet_fast._direct_conv(x, packed, weight, *arguments)
    with pytest.raises(RuntimeError, match="packed"):
        torch.ops.resnet_fast._direct_conv(x.bfloat16(), packed.float(), weight, *arguments)
    with pytest.raises(RuntimeError, match="packed"):
        torch.ops.resnet_fast._direct_conv(x.bfloat16(), packed[1:], weight, *arguments)
    with pytest.raises(RuntimeError, match="weight"):
        torch.ops.resnet_fast._direct_weight(weight.half(), 1)
