"""Grouped and depthwise convolutions of this package's own: geometries, dtypes and edges."""

from __future__ import annotations

import pytest
import torch
from fuzz_support import check_in_integers, random_geometries
from hypothesis import assume, given
from hypothesis import strategies as st
from isa_support import rerun_below
from torch import Tensor

from resnet_fast import _library, models
from resnet_fast.ops import _pack, conv_bn_act_direct
from resnet_fast.ops.activation import ACTIVATIONS
from resnet_fast.plan.candidate import CANDIDATES, default_order, run_aten
from resnet_fast.plan.site import Site, device_name
from resnet_fast.plan.verify import random_inputs, verify
from resnet_fast.testing import reordered
from resnet_fast.testing.budget import expect_within_budget, in_formats
from resnet_fast.testing.networks import randomize_batchnorm_

if not conv_bn_act_direct.available(torch.float32):
    pytest.skip("the CPU op library is not loaded", allow_module_level=True)

needs_bf16 = pytest.mark.skipif(
    not conv_bn_act_direct.available(torch.bfloat16),
    reason="this CPU, or this process, has no AVX512_BF16",
)
DTYPES = ["float32", pytest.param("bfloat16", marks=needs_bf16)]


def site_of(
    x: tuple[int, ...],
    filters: int,
    groups: int,
    kernel: int | tuple[int, int] = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    act: str = "relu",
    residual: bool = False,
    affine: bool = True,
    layout: str = "channels_last",
    dtype: str = "float32",
) -> Site:
    taps = (kernel, kernel) if isinstance(kernel, int) else kernel
    geometry = ((value, value) for value in (stride, padding, dilation))
    return Site(
        "conv_bn_act", x, (filters, x[1] // groups, *taps), *geometry, groups, act, affine,
        residual, dtype, layout, device_name("cpu"),
    )  # fmt: skip


def poison_pool(dtype: torch.dtype) -> None:
    """Fills the memory that the next outputs will get with NaN."""
    weight = torch.ones(64, 1, 1, 1, dtype=dtype)
    x = torch.ones(1, 1, 256, 256, dtype=dtype)
    packed = torch.ops.resnet_fast._direct_weight(weight, 1)
    torch.ops.resnet_fast._direct_conv(
        x, packed, weight, None, None, None, [1, 1], [0, 0], [1, 1], 1, "none"
    ).fill_(float("nan"))


def check(site: Site) -> None:
    dtype = getattr(torch, site.dtype)
    poison_pool(dtype)
    x, args, residual = random_inputs(site, "cpu", site.x_shape[0])
    wide = args._make(t.double() if isinstance(t, Tensor) else t for t in args)
    truth = run_aten(x.double(), wide, None if residual is None else residual.double(), site.act)
    frameworks = in_formats(lambda a, b: run_aten(a, args, b, site.act), x, residual)
    # The greatest error of few values is luck: the framework is asked from either end of its sums.
    scale, shift = _pack.fold(*args[1:7])
    frameworks.append(
        reordered.conv_bn_act(
            x=x, weight=args.weight, scale=scale, shift=shift, residual=residual,
            stride=args.stride, padding=args.padding, dilation=args.dilation, groups=args.groups,
            act=site.act,
        )
    )  # fmt: skip
    y = CANDIDATES["direct"].run(x, args, residual, site.act)
    assert y.dtype is dtype
    expect_within_budget(y, frameworks, truth)


SHAPES = [
    # ResNeXt's, MobileNet's and EfficientNet's; then a group that fills vectors, one of more
    # filters than channels, one that no vector holds, part of a block, 1x1, a line of one pixel.
    ((2, 128, 14, 14), 128, 32, 3, 1, 1),
    ((1, 256, 15, 13), 256, 32, 3, 2, 1),
    ((1, 512, 7, 7), 512, 32, 3, 1, 1),
    ((1, 1024, 7, 7), 1024, 32, 3, 1, 1),
    ((2, 96, 28, 29), 96, 96, 3, 2, 1),
    ((1, 48, 14, 17), 48, 48, 5, 1, 2),
    ((1, 48, 14, 15), 48, 48, 5, 2, 2),
    ((1, 256, 5, 6), 256, 2, 3, 1, 1),
    ((2, 12, 9, 7), 20, 4, 3, 1, 1),
    ((1, 18, 9, 7), 18, 6, 3, 1, 1),
    ((1, 22, 9, 7), 22, 11, 3, 2, 0),
    ((2, 64, 6, 9), 64, 8, 1, 1, 0),
    ((1, 32, 9, 1), 32, 32, 3, 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "filters", "groups", "kernel", "stride", "padding"), SHAPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_shapes(x, filters, groups, kernel, stride, padding, residual, layout, dtype) -> None:
    check(
        site_of(
            x, filters, groups, kernel, stride, padding,
            residual=residual, layout=layout, dtype=dtype,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [40, 10, 1])
def test_activations(act: str, affine: bool, groups: int, dtype: str) -> None:
    check(site_of((2, 40, 6, 8), 40, groups, act=act, residual=True, affine=affine, dtype=dtype))


@random_geometries(60)
@given(data=st.data())
def test_random_geometries_in_integers(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups, channels = draw(2, 24), data.draw(st.sampled_from([1, 1, 2, 3, 4, 8, 16, 32]))
    filters = data.draw(st.sampled_from([channels, channels, 1, 2, 5]))
    size, kernel = (draw(1, 20), draw(1, 20)), (draw(1, 5), draw(1, 5))
    stride, padding, dilation = draw(1, 3), draw(0, 3), draw(1, 2)
    assume(all(n + 2 * padding > dilation * (r - 1) for n, r in zip(size, kernel, strict=True)))
    site = site_of(
        (draw(1, 3), groups * channels, *size), groups * filters, groups, kernel, stride,
        padding, dilation, residual=data.draw(st.booleans()),
        act=data.draw(st.sampled_from(["none", "relu", "relu6", "silu"])),
    )  # fmt: skip
    poison_pool(torch.float32)
    check_in_integers("direct", site)


@pytest.mark.parametrize("groups", [32, 8])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_special_values_go_where_the_framework_puts_them(value: str, act: str, groups: int) -> None:
    site = site_of((1, 32, 5, 9), 32, groups, act=act)
    x, args, _ = random_inputs(site, "cpu", 1)
    x[0, 5, 2, 3] = float(value)
    expected = run_aten(x, args, None, act)
    actual = CANDIDATES["direct"].run(x, args, None, act)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("groups", [32, 8, 2])
def test_registration_and_empty_batch(groups: int) -> None:
    site = site_of((2, 32, 6, 5), 32, groups, residual=True)
    x, args, residual = random_inputs(site, "cpu")
    assert residual is not None
    op = torch.ops.resnet_fast._conv_bn_act_direct.default
    torch.library.opcheck(op, (x, *args[:7], residual, *args[7:], "relu"))
    assert CANDIDATES["direct"].run(x[:0], args, residual[:0], "relu").shape == (0, 32, 6, 5)


def test_it_is_what_runs_and_passes_its_verification() -> None:
    for groups in (24, 96):
        site = site_of((1, 96, 14, 14), 96, groups)
        assert default_order(site)[0] == ("direct" if permutes() or groups == 96 else "onednn")
        assert verify(site, CANDIDATES["direct"], "cpu").ok


def test_guards() -> None:
    weight = torch.randn(8, 2, 3, 3)
    packed = torch.ops.resnet_fast._direct_weight(weight, 4)
    geometry = ([1, 1], [1, 1], [1, 1])
    x = torch.randn(1, 8, 5, 5)
    conv = torch.ops.resnet_fast._direct_conv
    assert conv(x, packed, weight, None, None, None, *geometry, 4, "relu").shape == (1, 8, 5, 5)
    for groups in (0, -1, 3, 8):
        with pytest.raises(RuntimeError, match=r"groups|weight"):
            conv(x, packed, weight, None, None, None, *geometry, groups, "relu")
    for groups in (0, -2, 3):
        with pytest.raises(RuntimeError, match="groups"):
            torch.ops.resnet_fast._direct_weight(weight, groups)
    with pytest.raises(RuntimeError, match="packed"):
        conv(x, packed[1:], weight, None, None, None, *geometry, 4, "relu")
    with pytest.raises(RuntimeError, match="packed"):
        conv(x, packed.bfloat16(), weight, None, None, None, *geometry, 4, "relu")
    deep = torch.randn(1, 8, 3, 5, 5), torch.randn(8, 2, 1, 3, 3)
    with pytest.raises(RuntimeError, match="rank"):
        threes = ([1, 1, 1], [0, 1, 1], [1, 1, 1])
        conv(deep[0], packed, deep[1], None, None, None, *threes, 4, "relu")


def permutes() -> bool:
    """Whether this process has the instructions that narrow groups want."""
    native = _library.native()
    return native is not None and native.current_isa() != "baseline"


@pytest.mark.skipif(not permutes(), reason="narrow groups want AVX2")
@torch.no_grad()
def test_resnext_is_one_native_call() -> None:
    torch.manual_seed(0)
    net = randomize_batchnorm_(models.resnext50_32x4d(num_classes=10), 0).eval()
    x = torch.randn(2, 3, 64, 64)
    for _ in range(3):
        y = net(x)
    assert [sequence.whole for _, sequence in net.sequences] == [True]
    assert torch.equal(y, net._head(net._trunk(x)))
    net.layer2[0].conv2.weight.data.mul_(2)
    assert torch.equal(net(x), net._head(net._trunk(x)))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lower_instruction_sets(isa: str) -> None:
    rerun_below(isa, __file__)


@pytest.mark.parametrize(("channels", "filters"), [(3, 3), (2, 4), (1, 6), (12, 12)])
def test_groups_that_no_vector_holds_run_elsewhere(channels: int, filters: int) -> None:
    site = site_of((1, 8 * channels, 9, 9), 8 * filters, 8)
    assert default_order(site)[0] == "onednn"
