"""The convolutions over packed weights: every geometry, special value and instruction set."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import pytest
import torch
from fuzz_support import check_in_integers, random_geometries, wide
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from isa_support import rerun_below
from torch import Tensor

import resnet_fast
from resnet_fast.ops import activation, conv_bn_act_direct, conv_bn_act_onednn
from resnet_fast.plan.candidate import CANDIDATES, ConvArgs, default_order, run_aten
from resnet_fast.plan.site import Site, device_name
from resnet_fast.plan.verify import random_inputs, verify
from resnet_fast.testing import cases
from resnet_fast.testing.budget import in_formats, within_budget

PACKING = ("direct", "winograd2", "winograd4")
REGISTRATIONS = {
    "direct": "_conv_bn_act_direct",
    "winograd2": "_conv_bn_act_winograd2",
    "winograd4": "_conv_bn_act_winograd4",
    "onednn": "_conv_bn_act_onednn",
}


def spread(value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


def site_of(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    act: str = "relu",
    residual: bool = False,
    affine: bool = True,
    layout: str = "channels_last",
    dtype: str = "float32",
) -> Site:
    count = len(x) - 2
    return Site(
        op="conv_bn_act",
        x_shape=x,
        weight_shape=weight,
        stride=spread(stride, count),
        padding=spread(padding, count),
        dilation=spread(dilation, count),
        groups=1,
        act=act,
        affine=affine,
        residual=residual,
        dtype=dtype,
        layout=layout,
        device=device_name("cpu"),
    )


def poison_pool() -> None:
    """Fills the memory that the next outputs will get with NaN."""
    weight = torch.ones(64, 1, 1, 1)
    x = torch.ones(1, 1, 256, 256)
    packed = torch.ops.resnet_fast._direct_weight(weight, 1)
    out = torch.ops.resnet_fast._direct_conv(
        x, packed, weight, None, None, None, [1, 1], [0, 0], [1, 1], 1, "none"
    )
    out.fill_(float("nan"))


def cook_toom(points: list[float], m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Aᵀ, G and Bᵀ of F(m, 3) for finite ``points`` and infinity, derived in fp64."""
    n = m + 2
    at, g, bt = (torch.zeros(*shape, dtype=torch.float64) for shape in ((m, n), (n, 3), (n, n)))
    for i, p in enumerate(points):
        others = [q for q in points if q != p]
        at[:, i] = torch.tensor([p**k for k in range(m)])
        norm = torch.tensor([p - q for q in others], dtype=torch.float64).prod()
        g[i] = torch.tensor([p**k for k in range(3)], dtype=torch.float64) / norm
        bt[i, : n - 1] = polynomial(others)
    at[m - 1, n - 1] = g[n - 1, 2] = 1
    bt[n - 1] = polynomial(points)
    return at, g, bt


def polynomial(roots: list[float]) -> Tensor:
    """Coefficients of Π (z - root), constant first."""
    found = torch.ones(1, dtype=torch.float64)
    for root in roots:
        shifted = torch.cat([torch.zeros(1, dtype=torch.float64), found])
        found = shifted - root * torch.cat([found, torch.zeros(1, dtype=torch.float64)])
    return found


POINTS = {2: [0.0, 1.0, -1.0], 4: [0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2]}


def winograd_by_the_framework(x: Tensor, args: ConvArgs, m: int) -> Tensor:
    """The convolution alone, by Winograd's algorithm in PyTorch's own fp32 ops."""
    at, g, bt = (matrix.float() for matrix in cook_toom(POINTS[m], m))
    n, (p, q) = m + 2, args.padding
    rows, columns = (
        size + 2 * pad - 2 for size, pad in zip(x.shape[2:], args.padding, strict=True)
    )
    right = -(-columns // m) * m + 2 - x.shape[3] - q
    below = -(-rows // m) * m + 2 - x.shape[2] - p
    padded = torch.nn.functional.pad(x.contiguous(), (q, right, p, below))
    tiles = padded.unfold(2, n, m).unfold(3, n, m)
    v = torch.einsum("ia,ncpqab,jb->ncpqij", bt, tiles, bt)
    u = torch.einsum("ia,kcab,jb->kcij", g, args.weight, g)
    y = torch.einsum("kcij,ncpqij->nkpqij", u, v)
    y = torch.einsum("ai,nkpqij,bj->nkpaqb", at, y, at)
    return y.flatten(4).flatten(2, 3)[:, :, :rows, :columns]


def assert_within_budget(name: str, site: Site) -> None:
    """The budget, and for Winograd's algorithm the framework's error in the same algorithm too.

    Few channels make direct sums so short that no transform can match them; what the plan makes
    of that is to reject the candidate (test_chosen_sites_hold shows where it does not).
    """
    poison_pool()
    # A maximum over few values is a matter of luck, the framework's as much as ours.
    batch = max(2, -(-32768 // math.prod(site.out_shape[1:])))
    x, args, residual = random_inputs(site, "cpu", batch)
    wide = args._make(t.double() if isinstance(t, Tensor) else t for t in args)
    truth = run_aten(x.double(), wide, None if residual is None else residual.double(), site.act)
    frameworks = in_formats(lambda x, residual: run_aten(x, args, residual, site.act), x, residual)
    if name.startswith("winograd"):
        unit = torch.eye(args.weight.shape[0])[:, :, None, None]
        same = winograd_by_the_framework(x, args, int(name[-1]))
        after = args._replace(weight=unit, stride=[1, 1], padding=[0, 0])
        frameworks.append(run_aten(same, after, residual, site.act))
    ours = CANDIDATES[name].run(x, args, residual, site.act)
    verdict = within_budget(ours, frameworks, truth)
    assert verdict.ok, f"{name} at {site.key}: error {verdict.error:.3g} > {verdict.limit:.3g}"


def accepted() -> list[tuple[str, cases.ConvCase]]:
    found = []
    for case in cases.CASES["conv_bn_act"]:
        if case.groups != 1 or 0 in case.x or len(case.x) not in (4, 5):
            continue
        site = site_of(case.x, case.weight, case.stride, case.padding, case.dilation, case.act)
        found += [(name, case) for name in PACKING if CANDIDATES[name].reject(site) is None]
    return found


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(n, c, id=f"{n}-{c.name}") for n, c in accepted()]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cases(name: str, case: cases.ConvCase, layout: str) -> None:
    site = site_of(
        case.x,
        case.weight,
        case.stride,
        case.padding,
        case.dilation,
        case.act,
        case.residual,
        case.scale,
        layout,
    )
    assert_within_budget(name, site)


# ResNet's own sites, the edges of the tilings, and a depth beyond one panel of the product.
SHAPES = [
    ((2, 64, 56, 56), (64, 64, 3, 3), 1, 1),
    ((2, 256, 14, 14), (256, 256, 3, 3), 1, 1),
    ((1, 512, 7, 7), (512, 512, 3, 3), 1, 1),
    ((2, 33, 15, 17), (31, 33, 3, 3), 1, (0, 2)),
    ((1, 16, 3, 3), (16, 16, 3, 3), 1, 0),
    ((1, 16, 2, 9), (40, 16, 3, 3), 1, 1),
    ((2, 64, 56, 56), (256, 64, 1, 1), 1, 0),
    ((2, 300, 9, 9), (96, 300, 1, 1), 2, 0),
    ((1, 2048, 7, 7), (512, 2048, 1, 1), 1, 0),
    ((2, 128, 15, 15), (128, 128, 3, 3), 2, 1),
    ((2, 3, 64, 64), (64, 3, 7, 7), 2, 3),
    ((1, 17, 5, 6, 7), (35, 17, 3, 3, 3), 1, 1),
    # Several strips of filters: the panels of a chunk are gathered for the first alone; too deep
    # for that; and rows that are read in place although one panel does not hold them.
    ((2, 64, 17, 19), (520, 64, 3, 3), 2, 1),
    ((1, 1024, 14, 15), (600, 1024, 1, 1), 1, 0),
    ((1, 2048, 14, 14), (544, 2048, 1, 1), 1, 0),
    ((2, 512, 9, 14), (300, 512, 1, 1), 1, 0),
    # Few channels: windows read in place out of a padded band.
    ((2, 3, 31, 45), (33, 3, 7, 5), 2, (3, 2)),
    ((1, 1, 28, 28), (16, 1, 3, 3), 1, 1),
    ((2, 4, 9, 40), (40, 4, 3, 6), (3, 1), (0, 5)),
    ((1, 15, 5, 2), (7, 15, 1, 4), (1, 2), (2, 7)),
    ((3, 2, 1, 1), (32, 2, 2, 2), 1, 3),
]


@pytest.mark.parametrize(("x", "weight", "stride", "padding"), SHAPES)
@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("residual", [False, True])
def test_shapes(name, x, weight, stride, padding, residual) -> None:
    site = site_of(x, weight, stride, padding, residual=residual)
    if CANDIDATES[name].reject(site) is not None:
        pytest.skip("the candidate does not accept this geometry")
    assert_within_budget(name, site)


@pytest.mark.parametrize("x", [(2, 64, 56, 56), (2, 128, 28, 28), (2, 256, 14, 14), (2, 512, 7, 7)])
@pytest.mark.parametrize("residual", [False, True])
def test_chosen_sites_hold(x: tuple[int, ...], residual: bool) -> None:
    """ResNet's 3x3 sites at stride 1 verify with the first candidate of the default order."""
    site = site_of(x, (x[1], x[1], 3, 3), padding=1, residual=residual)
    name = default_order(site)[0]
    assert name.startswith("winograd")
    verdict = verify(site, CANDIDATES[name], torch.device("cpu"))
    assert verdict.ok, f"{name}: error {verdict.error:.3g} > {verdict.limit:.3g}"


@st.composite
def sites(draw: st.DrawFn, name: str) -> Site:
    def integer(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def pair(low: int, high: int) -> tuple[int, int]:
        return integer(low, high), integer(low, high)

    winograd = name.startswith("winograd")
    kernel = (3, 3) if winograd else pair(1, 5)
    stride, dilation = ((1, 1), (1, 1)) if winograd else (pair(1, 3), pair(1, 2))
    padding, size = pair(0, 3), pair(1, 19)
    for n, r, p, d in zip(size, kernel, padding, dilation, strict=True):
        assume(d * (r - 1) + 1 <= n + 2 * p)
    channels, filters = pair(1, 70)
    return site_of(
        (integer(1, 3), channels, *size),
        (filters, channels, *kernel),
        stride,
        padding,
        dilation,
        draw(st.sampled_from(["none", "relu", "relu6", "silu", "gelu"])),
        residual=draw(st.booleans()),
        affine=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "channels_last"])),
    )


# These few in each run: one in some hundreds has an outlier twice the framework's, which is what
# verification before use is for.
@settings(random_geometries(60, repeatable=True), max_examples=60)
@given(site=sites("winograd4"))
def test_random_geometries(site: Site) -> None:
    assert_within_budget("winograd4", site)


@random_geometries(60)
@given(site=sites("winograd4"))
def test_random_geometries_by_magnitude(site: Site) -> None:
    """F(4x4)'s points are no powers of two, so that nothing about it is exact: here an error is
    held against the largest sum of magnitudes, which a wrong address misses by far."""
    poison_pool()
    x, args, residual = random_inputs(site, "cpu", site.x_shape[0])
    truth = wide(args)
    magnitudes = truth._replace(
        **{
            name: value.abs()
            for name, value in truth._asdict().items()
            if isinstance(value, Tensor) and name != "mean"
        }
    )
    if truth.mean is not None:
        magnitudes = magnitudes._replace(mean=-truth.mean.abs())
    z = run_aten(x.double(), truth, None if residual is None else residual.double(), "none")
    largest = run_aten(
        x.double().abs(), magnitudes, None if residual is None else residual.double().abs(), "none"
    )
    ours = CANDIDATES["winograd4"].run(x, args, residual, site.act)
    error = (ours.double() - activation.value(site.act, z)).abs().max()
    assert error <= 1e-5 * largest.max()


@random_geometries(60)
@given(data=st.data())
@pytest.mark.parametrize("name", ["direct", "winograd2"])
def test_random_geometries_in_integers(name: str, data: st.DataObject) -> None:
    """F(2x2)'s halves and quarters are exact too."""
    site = data.draw(sites(name))
    poison_pool()
    check_in_integers(name, site)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("name", PACKING)
def test_threads(name: str, threads: int) -> None:
    """Every cut of the work gives the same numbers, bit by bit."""
    before = torch.get_num_threads()
    site = site_of((3, 40, 21, 19), (72, 40, 3, 3), padding=1)
    x, args, residual = random_inputs(site, "cpu", 3)
    expected = CANDIDATES[name].run(x, args, residual, "relu")
    try:
        torch.set_num_threads(threads)
        poison_pool()
        assert torch.equal(CANDIDATES[name].run(x, args, residual, "relu"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38])
@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_special_values_go_where_the_framework_puts_them(name, value, act) -> None:
    site = site_of((2, 40, 13, 14), (37, 40, 3, 3), padding=1, act=act)
    x, args, residual = random_inputs(site, "cpu")
    x[0, 3, 5, 6] = value
    x[1, 7, 0, 0] = value
    x[1, 8, 12, 13] = -value
    expected = run_aten(x, args, residual, act)
    actual = CANDIDATES[name].run(x, args, residual, act)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    assert torch.equal(actual[actual.isinf()], expected[expected.isinf()])


@pytest.mark.parametrize("name", PACKING)
def test_special_weights(name: str) -> None:
    site = site_of((1, 8, 6, 6), (5, 8, 3, 3), act="none", affine=False)
    x, args, _ = random_inputs(site, "cpu", 1)
    args.weight[2, 3, 1, 1] = float("nan")
    args.weight[4, 0, 0, 2] = float("inf")
    expected = run_aten(x, args, None, "none")
    actual = CANDIDATES[name].run(x, args, None, "none")
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("parameters", ["norm", "bias", "weight"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in REGISTRATIONS for dtype in ("float32", "bfloat16")],
)
def test_registrations(name: str, dtype: str, residual: bool, parameters: str) -> None:
    """The op a traced graph holds: schema, fake and aliasing."""
    available = {"onednn": conv_bn_act_onednn, "direct": conv_bn_act_direct}
    if name in available and not available[name].available(getattr(torch, dtype)):
        pytest.skip(f"{name} does not run {dtype} on this processor")
    site = site_of(
        (2, 9, 6, 5),
        (7, 9, 3, 3),
        padding=1,
        residual=residual,
        affine=parameters == "norm",
        dtype=dtype,
    )
    x, args, added = random_inputs(site, "cpu")
    if parameters == "weight":
        args = args._replace(bias=None)
    op = getattr(torch.ops.resnet_fast, REGISTRATIONS[name]).default
    torch.library.opcheck(op, (x, *args[:7], added, *args[7:], "relu"))
    traced = CANDIDATES[name].trace(x, args, added, "relu")
    assert torch.equal(traced, CANDIDATES[name].run(x, args, added, "relu"))


@pytest.mark.parametrize("name", PACKING)
def test_empty_batch(name: str) -> None:
    site = site_of((2, 9, 6, 5), (7, 9, 3, 3), padding=1)
    x, args, _ = random_inputs(site, "cpu")
    assert CANDIDATES[name].run(x[:0], args, None, "relu").shape == (0, 7, 6, 5)


def direct(**changes: object) -> Callable[[], Tensor]:
    weight = torch.randn(8, 4, 3, 3)
    arguments = {
        "x": torch.randn(1, 4, 6, 6),
        "packed": torch.ops.resnet_fast._direct_weight(weight, 1),
        "weight": weight,
        "scale": None,
        "shift": None,
        "residual": None,
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "act": "relu",
    } | changes
    return lambda: torch.ops.resnet_fast._direct_conv(*arguments.values())


def winograd(**changes: object) -> Callable[[], Tensor]:
    weight = torch.randn(8, 4, 3, 3)
    arguments = {
        "x": torch.randn(1, 4, 6, 6),
        "packed": torch.ops.resnet_fast._winograd_weight(weight, 4),
        "weight": weight,
        "m": 4,
        "scale": None,
        "shift": None,
        "residual": None,
        "padding": [1, 1],
        "act": "relu",
    } | changes
    return lambda: torch.ops.resnet_fast._winograd_conv(*arguments.values())


@pytest.mark.parametrize("call", [direct, winograd])
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"x": torch.randn(1, 5, 6, 6)}, "weight"),
        ({"x": torch.randn(1, 4, 6)}, "x|weight"),
        ({"x": torch.randn(1, 4, 6, 6).double()}, "x|weight"),
        ({"weight": torch.randn(8, 4, 3, 3).double()}, "weight"),
        ({"packed": torch.randn(7)}, "packed"),
        ({"packed": torch.randn(8, 4, 3, 3).double()}, "packed"),
        ({"scale": torch.randn(7)}, "scale"),
        ({"shift": torch.randn(8).double()}, "shift"),
        ({"residual": torch.randn(1, 8, 6, 5)}, "residual"),
        ({"padding": [1]}, "padding"),
        ({"padding": [-1, 0]}, "padding"),
        ({"x": torch.randn(1, 4, 1, 1), "padding": [0, 0]}, "kernel"),
        ({"act": "tanh"}, "act"),
    ],
)
def test_guards_name_the_argument(call, changes, names) -> None:
    with pytest.raises(RuntimeError, match=names):
        call(**changes)()


def test_no_output_memory_is_kept_by_weights() -> None:
    """Weights that were packed where an output had been would keep its whole segment in use."""
    gc.collect()
    x, weight = torch.randn(1, 8, 256, 256), torch.randn(64, 8, 3, 3)
    packed = torch.ops.resnet_fast._direct_weight(weight, 1)
    resnet_fast.release_memory()
    y = direct(x=x, packed=packed, weight=weight)()
    size = y.numel() * 4
    del y
    kept = torch.ops.resnet_fast._direct_weight(torch.randn(128, 128, 3, 3), 1)
    assert resnet_fast.release_memory() >= size
    assert kept.isfinite().all()


def test_memory_is_kept_and_given_back() -> None:
    gc.collect()  # outputs in other tests' reference cycles are in use, and hold their segments
    resnet_fast.release_memory()
    x = torch.randn(1, 8, 128, 128)
    weight = torch.randn(64, 8, 3, 3)
    call = direct(x=x, packed=torch.ops.resnet_fast._direct_weight(weight, 1), weight=weight)
    first = call()
    assert resnet_fast.release_memory() < first.numel() * 4  # what is in use stays
    address = first.data_ptr()
    del first
    second = call()
    assert second.data_ptr() == address
    assert second.isfinite().all()
    del second
    assert resnet_fast.release_memory() >= 64 * 128 * 128 * 4
    assert resnet_fast.release_memory() == 0


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lower_instruction_sets(isa: str) -> None:
    rerun_below(isa, __file__)


def test_random_inputs_have_randomised_statistics() -> None:
    _, args, _ = random_inputs(site_of((1, 4, 6, 6), (8, 4, 3, 3)), "cpu")
    assert args.mean.abs().max() > 0.1 and (args.var - 1).abs().max() > 0.1


def test_a_wrong_result_is_seen() -> None:
    site = site_of((2, 16, 8, 8), (16, 16, 3, 3), padding=1)
    x, args, _ = random_inputs(site, "cpu")
    wide = args._make(t.double() if isinstance(t, Tensor) else t for t in args)
    truth = run_aten(x.double(), wide, None, "relu")
    framework = run_aten(x, args, None, "relu")
    wrong = framework.clone()
    wrong[1, 3, 7, 7] += 1e-4
    assert not within_budget(wrong, framework, truth).ok
