"""The 8-bit convolution (CPU) against fp64, byte by byte: geometries, activations, guards."""

from __future__ import annotations

import pytest
import torch
from fuzz_support import random_geometries
from hypothesis import assume, given
from hypothesis import strategies as st
from isa_support import rerun_below
from torch import Tensor
from torch.nn import functional as F

from resnet_fast.ops import activation
from resnet_fast.ops import conv_bn_act_int8 as int8
from resnet_fast.ops.activation import ACTIVATIONS
from resnet_fast.ops.conv_bn_act_int8 import Grid

if not int8.available():
    pytest.skip("the CPU op library is not loaded", allow_module_level=True)

OPS = torch.ops.resnet_fast
#: x, weight, stride, padding, dilation, groups.
GEOMETRIES = {
    "pointwise": ((2, 64, 7, 9), (64, 64, 1, 1), 1, 0, 1, 1),
    "pointwise-deep": ((1, 2048, 3, 3), (40, 2048, 1, 1), 1, 0, 1, 1),
    "pointwise-strided": ((2, 64, 8, 8), (128, 64, 1, 1), 2, 0, 1, 1),
    "stem": ((1, 3, 20, 21), (64, 3, 7, 7), 2, 3, 1, 1),
    "stem-wide": ((1, 3, 9, 40), (33, 3, 3, 3), 2, 1, 1, 1),
    "same": ((2, 64, 7, 7), (64, 64, 3, 3), 1, 1, 1, 1),
    "same-deep": ((1, 512, 7, 7), (96, 512, 3, 3), 1, 1, 1, 1),
    "odd": ((2, 20, 9, 8), (24, 20, 3, 3), 2, 1, 1, 1),
    "few": ((3, 5, 7, 7), (3, 5, 1, 1), 1, 0, 1, 1),
    "dilated": ((1, 6, 11, 11), (5, 6, 3, 3), 1, 2, 2, 1),
    "padded-beyond": ((1, 16, 2, 2), (16, 16, 3, 3), 1, 3, 1, 1),
    "depthwise": ((2, 72, 12, 13), (72, 1, 3, 3), 1, 1, 1, 72),
    "depthwise-strided": ((1, 128, 13, 12), (128, 1, 3, 3), 2, 1, 1, 128),
    "depthwise-5": ((1, 40, 12, 13), (40, 1, 5, 5), 1, 2, 1, 40),
    "depthwise-5-strided": ((1, 40, 12, 13), (40, 1, 5, 5), 2, 2, 1, 40),
    "depthwise-7": ((1, 16, 9, 9), (16, 1, 7, 7), 1, 3, 1, 16),
    "depthwise-dilated": ((1, 24, 11, 11), (24, 1, 3, 3), 1, 2, 2, 24),
    "depthwise-dilated-strided": ((1, 24, 11, 11), (24, 1, 3, 3), 2, 2, 2, 24),
    "depthwise-line": ((1, 10, 5, 5), (10, 1, 1, 4), 3, 0, 1, 10),
    "groups-of-4": ((2, 32, 9, 9), (32, 4, 3, 3), 1, 1, 1, 8),
    "groups-of-8": ((1, 64, 9, 16), (64, 8, 3, 3), 2, 1, 1, 8),
    "groups-of-16": ((1, 48, 8, 8), (48, 16, 3, 3), 1, 1, 1, 3),
    "groups-of-4-dilated": ((1, 16, 9, 9), (16, 4, 3, 3), 1, 2, 2, 4),
    "groups-of-4-few": ((1, 8, 9, 9), (8, 4, 3, 3), 1, 1, 1, 2),
    "groups-of-32": ((1, 128, 7, 7), (128, 32, 3, 3), 1, 1, 1, 4),
    "groups-widening": ((1, 8, 9, 9), (16, 1, 3, 3), 1, 1, 1, 8),
}


def real_sums(x: Tensor, zero: int, weight: Tensor, *geometry: int) -> Tensor:
    stride, padding, dilation, groups = geometry
    return F.conv2d(x.double() - zero, weight.double(), None, stride, padding, dilation, groups)


def check(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    act: str,
    residual: bool,
    seed: int = 0,
) -> None:
    """The op through :func:`int8.prepare`, and fp64 arithmetic on the same real numbers.

    The sums are integers in fp64. A byte may differ from the real value by half a step, and by
    what fp32 rounds in the epilogue.
    """
    generator = torch.Generator().manual_seed(seed)
    filters = weight_shape[0]
    q = torch.randint(0, 256, x_shape, dtype=torch.uint8, generator=generator)
    weight = torch.randn(weight_shape, generator=generator)
    gamma, beta, mean = (torch.randn(filters, generator=generator) for _ in range(3))
    var = torch.rand(filters, generator=generator) + 0.5
    x_grid = Grid(0.017, 37)
    geometry = (stride, padding, dilation, groups)
    q_weight, w_scale = int8.quantize_weight(weight)
    conv = real_sums(q, x_grid.zero, q_weight, *geometry) * x_grid.scale
    conv = conv * w_scale.view(1, -1, 1, 1)
    gain = gamma.double() / (var.double() + 1e-5).sqrt()
    real = (conv - mean.double().view(1, -1, 1, 1)) * gain.view(1, -1, 1, 1)
    real = real + beta.double().view(1, -1, 1, 1)
    added, r_grid = None, None
    size = real.abs()
    if residual:
        r_grid = Grid(0.021, 100)
        added = torch.randint(0, 256, real.shape, dtype=torch.uint8, generator=generator)
        addend = (added.double() - r_grid.zero) * r_grid.scale
        real, size = real + addend, size + addend.abs()
    real = activation.value(act, real)
    y_grid = Grid.over(0.8 * float(real.min()), 0.8 * float(real.max()))  # some are beyond
    call = int8.prepare(
        (weight, None, gamma, beta, mean, var),
        1e-5,
        *([stride] * 2, [padding] * 2, [dilation] * 2, groups, act),
        *(x_grid, r_grid, y_grid, None),
    )
    q = q.contiguous(memory_format=torch.channels_last)
    y = call(q, added)
    assert y.dtype is torch.uint8 and y.shape == real.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    on_grid = (real / y_grid.scale + y_grid.zero).clamp(0, 255)
    # Of the offset that stands for x's zero, too, which is far larger than what it leaves.
    terms = size + call.before[3].double().abs().view(1, -1, 1, 1) * y_grid.scale
    allowed = 0.5 + 16 * torch.finfo(torch.float32).eps * (terms / y_grid.scale + 255)
    assert ((y.double() - on_grid).abs() <= allowed).all()
    assert int8.deviation(call, q, added, y) <= 1


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_bytes(geometry: str, act: str, residual: bool) -> None:
    check(*GEOMETRIES[geometry], act, residual)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act: str) -> None:
    for name in ("odd", "depthwise", "groups-of-4"):
        check(*GEOMETRIES[name], act, False, seed=3)


@random_geometries(100)
@given(data=st.data())
def test_random_geometries(data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 1, 2, 4, 8]))
    per_group = draw(st.sampled_from([1, 2, 3, 4, 8, 16, 17]))
    filters = groups * draw(st.sampled_from([1, per_group, 5, 16]))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    size = draw(st.tuples(st.integers(1, 18), st.integers(1, 18)))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding = draw(st.integers(0, 3))
    spans = (n + 2 * padding - dilation * (r - 1) for n, r in zip(size, kernel, strict=True))
    assume(all(span > 0 for span in spans))
    check(
        (draw(st.integers(1, 3)), groups * per_group, *size),
        (filters, per_group, *kernel),
        *(stride, padding, dilation, groups),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.booleans()),
        draw(st.integers(0, 1000)),
    )


def test_an_empty_batch() -> None:
    weight, _ = int8.quantize_weight(torch.randn(8, 4, 3, 3))
    x = torch.empty(0, 4, 9, 9, dtype=torch.uint8)
    packed = OPS._int8_weight(weight, 1)
    one = torch.ones(8)
    y = OPS._int8_conv(x, packed, weight, one, one, None, [1, 1], [1, 1], [1, 1], 1, "relu", 0, 1.0,
                       1.0, 0)  # fmt: skip
    assert y.shape == (0, 8, 9, 9)


def test_sums_do_not_saturate() -> None:
    """The largest products, to the greatest depth: the sum is 65,000 times 255 * 127."""
    channels = int8.MAX_DEPTH // 4 * 4
    weight = torch.full((16, channels, 1, 1), 127, dtype=torch.int8)
    x = torch.full((1, channels, 1, 2), 255, dtype=torch.uint8)
    scale = torch.full((16,), 200 / (channels * 255 * 127))
    y = OPS._int8_conv(x, OPS._int8_weight(weight, 1), weight, scale, torch.zeros(16), None,
                       [1, 1], [0, 0], [1, 1], 1, "none", 0, 1.0, 1.0, 0)  # fmt: skip
    assert (y == 200).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 17, 300), (1, 1, 5, 5), (2, 64, 9, 9), (0, 3, 4, 4)])
def test_to_bytes_and_back(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = torch.randn(shape).contiguous(memory_format=layout)
    grid = Grid(0.02, 100)
    q = int8.quantize(x, grid)
    assert q.is_contiguous(memory_format=torch.channels_last)
    # The product that the kernel rounds, in fp32 as there; a tie may fall to either side.
    exact = (x.double() * (1 / grid.scale) + grid.zero).clamp(0, 255)
    assert ((q.double() - exact).abs() <= 0.5 + 1e-4).all()
    back = int8.dequantize(q, grid)
    assert torch.equal(back, (q.float() - grid.zero) * torch.tensor(grid.scale).float())


def test_what_no_grid_holds_goes_to_its_ends() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 1e30, -1e30, 1e-45, -0.0]).view(1, 1, 1, 7)
    q = int8.quantize(x, Grid(0.5, 10))
    assert q.flatten().tolist() == [255, 0, 0, 255, 0, 10, 10]


def test_a_grid_holds_zero_exactly() -> None:
    for low, high in ((-1.3, 2.9), (0.5, 4.0), (-7.0, -2.0), (0.0, 0.0), (-1e-30, 3e38)):
        grid = Grid.over(low, high)
        assert 0 <= grid.zero <= 255 and grid.scale > 0
        assert float(int8.dequantize(int8.quantize(torch.zeros(1, 1, 1, 1), grid), grid)) == 0


def test_weights_of_a_filter_of_zeros() -> None:
    weight = torch.randn(3, 4, 1, 1)
    weight[1] = 0
    q, scale = int8.quantize_weight(weight)
    assert (q[1] == 0).all() and (scale > 0).all()
    error = (q.double() * scale.view(-1, 1, 1, 1) - weight.double()).abs()
    assert (error <= scale.view(-1, 1, 1, 1) / 2 + 1e-12).all() and q.abs().max() == 127


@pytest.mark.parametrize("fault", ["pixel", "zero", "shift"])
def test_deviation_sees_a_fault(fault: str) -> None:
    x = torch.randint(0, 256, (1, 8, 6, 6), dtype=torch.uint8)
    weight = torch.randn(16, 8, 3, 3)
    call = int8.prepare(
        (weight, None, None, None, None, None),
        0.0,
        *([1, 1], [1, 1], [1, 1], 1, "none", Grid(0.02, 50), None, Grid(0.1, 128), None),
    )
    y = call(x, None)
    assert int8.deviation(call, x, None, y) <= 1
    if fault == "pixel":
        y[0, 3, 2, 2] += 2
    else:
        packed, w, scale, shift = call.before
        after = list(call.after)
        if fault == "zero":
            after[5] += 1  # what lies outside the image
        else:
            shift = shift + 1.5
        y = call.op(x, packed, w, scale, shift, None, *after)
    assert int8.deviation(call, x, None, y) > 1


def test_correcting_the_shift_takes_the_mean_error_off() -> None:
    """With the means of its input known, the mean of each output channel is that of fp32."""
    torch.manual_seed(0)
    x = torch.rand(8, 12, 10, 10) + torch.arange(12).view(1, -1, 1, 1)
    weight = torch.randn(32, 12, 1, 1)
    weight[:, 0] *= 40  # a coarse scale: the others are rounded badly
    grid = Grid.over(0, float(x.max()))
    real = F.conv2d(x, weight)
    y_grid = Grid.over(float(real.min()), float(real.max()))
    errors = []
    for means in (None, x.mean((0, 2, 3))):
        call = int8.prepare(
            (weight, None, None, None, None, None),
            0.0,
            *([1, 1], [0, 0], [1, 1], 1, "none", grid, None, y_grid, means),
        )
        y = int8.dequantize(call(int8.quantize(x, grid), None), y_grid)
        errors.append((y - real).mean((0, 2, 3)).abs().max())
    assert errors[1] < errors[0] / 4


def arguments(**changed: object) -> list[object]:
    weight, _ = int8.quantize_weight(torch.randn(8, 4, 3, 3))
    base = {
        "x": torch.zeros(1, 4, 9, 9, dtype=torch.uint8),
        "packed": OPS._int8_weight(weight, 1),
        "weight": weight,
        "scale": torch.ones(8),
        "shift": torch.zeros(8),
        "residual": None,
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "act": "relu",
        "zero": 0,
        "residual_scale": 1.0,
        "inverse": 1.0,
        "out_zero": 0,
    }
    return list((base | changed).values())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": torch.zeros(1, 4, 9, 9)}, "x: expected a CPU tensor of uint8"),
        ({"x": torch.zeros(1, 5, 9, 9, dtype=torch.uint8)}, "weight: expected C / groups"),
        ({"packed": torch.zeros(7, dtype=torch.int8)}, "packed: expected what _int8_weight"),
        ({"weight": torch.zeros(8, 4, 3, 3)}, "weight: expected a CPU tensor of int8"),
        ({"scale": torch.ones(7)}, "scale: expected a dense CPU vector"),
        ({"shift": torch.zeros(8, dtype=torch.float64)}, "shift: expected a dense CPU vector"),
        ({"residual": torch.zeros(1, 8, 9, 9)}, "residual: expected a CPU tensor of uint8"),
        (
            {"residual": torch.zeros(1, 8, 9, 8, dtype=torch.uint8)},
            "residual: expected the output's shape",
        ),
        ({"zero": 256}, "zero, out_zero: expected 0 to 255"),
        ({"out_zero": -1}, "zero, out_zero: expected 0 to 255"),
        ({"inverse": 0.0}, "inverse: expected a positive factor"),
        ({"act": "tanh"}, "act: unknown activation"),
        ({"groups": 3}, "groups: expected a positive divisor"),
    ],
)
def test_guards(changed: dict[str, object], words: str) -> None:
    OPS._int8_conv(*arguments())
    with pytest.raises(RuntimeError, match=words):
        OPS._int8_conv(*arguments(**changed))


def test_guards_against_a_sum_beyond_32_bits() -> None:
    weight = torch.ones(1, int8.MAX_DEPTH + 1, 1, 1, dtype=torch.int8)
    x = torch.zeros(1, int8.MAX_DEPTH + 1, 1, 1, dtype=torch.uint8)
    one = torch.ones(1)
    with pytest.raises(RuntimeError, match="at most"):
        OPS._int8_conv(x, OPS._int8_weight(weight, 1), weight, one, one, None, [1, 1], [0, 0],
                       [1, 1], 1, "none", 0, 1.0, 1.0, 0)  # fmt: skip


def test_fakes() -> None:
    for name in ("odd", "depthwise-strided"):
        x_shape, weight_shape, stride, padding, dilation, groups = GEOMETRIES[name]
        weight, _ = int8.quantize_weight(torch.randn(weight_shape))
        x = torch.zeros(x_shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        one = torch.ones(weight_shape[0])
        call = (x, OPS._int8_weight(weight, groups), weight, one, one, None, [stride] * 2,
                [padding] * 2, [dilation] * 2, groups, "relu", 3, 1.0, 1.0, 0)  # fmt: skip
        torch.library.opcheck(OPS._int8_conv.default, call, test_utils="test_faketensor")
    x = torch.randn(2, 3, 5, 5)
    torch.library.opcheck(OPS._int8_quantize.default, (x, 2.0, 3), test_utils="test_faketensor")
    q = int8.quantize(x, Grid(0.5, 3))
    torch.library.opcheck(OPS._int8_dequantize.default, (q, 2.0, 3), test_utils="test_faketensor")
    torch.library.opcheck(OPS._int8_mean.default, (q, 2.0, 3), test_utils="test_faketensor")
    weight, _ = int8.quantize_weight(torch.randn(8, 4, 1, 1))
    one = torch.ones(8)
    head = (torch.zeros(3, 4, dtype=torch.uint8), OPS._int8_weight(weight, 1), weight, one, one)
    torch.library.opcheck(OPS._int8_linear.default, head, test_utils="test_faketensor")


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa: str) -> None:
    rerun_below(isa, __file__)


@pytest.mark.parametrize("shape", [(2, 64, 7, 7), (1, 130, 3, 5), (3, 5, 1, 1), (0, 4, 2, 2)])
def test_means(shape: tuple[int, ...]) -> None:
    q = torch.randint(0, 256, shape, dtype=torch.uint8)
    grid = Grid(0.03, 17)
    expected = (q.double() - grid.zero).mean((2, 3), keepdim=True) * grid.scale
    for layout in (torch.contiguous_format, torch.channels_last):
        y = int8.mean(q.contiguous(memory_format=layout), grid)
        assert y.shape == (*shape[:2], 1, 1) and y.dtype is torch.float32
        # Sums are exact; the result is rounded once.
        allowed = torch.finfo(torch.float32).eps * expected.abs()
        assert ((y.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("rows", [0, 1, 13, 14, 15, 33])
@pytest.mark.parametrize("features", [4, 64, 1028, 2048])
@pytest.mark.parametrize("filters", [1, 31, 32, 100])
def test_linear_layers(rows: int, features: int, filters: int) -> None:
    generator = torch.Generator().manual_seed(rows + features + filters)
    x = torch.rand(rows, features, generator=generator) * 3 - 1
    weight = torch.randn(filters, features, generator=generator)
    bias = torch.randn(filters, generator=generator)
    grid = Grid(3 / 255, 85)
    constants = int8.linear_constants(weight, bias, grid, torch.zeros(features))
    y = int8.linear(x, grid, constants)
    assert y.shape == (rows, filters)
    q = int8.quantize(x[:, :, None, None], grid)[:, :, 0, 0]
    q_weight, scale = int8.quantize_weight(weight[:, :, None, None])
    real = (q.double() - grid.zero) * grid.scale
    expected = real @ (q_weight[:, :, 0, 0].double() * scale[:, None]).T + bias.double()
    size = real.abs() @ (q_weight[:, :, 0, 0].double().abs() * scale[:, None]).T + 1
    offset = constants.shift.double().abs()
    assert ((y.double() - expected).abs() <= 1e-6 * (size + offset)).all()


def test_guards_of_the_head() -> None:
    weight, _ = int8.quantize_weight(torch.randn(8, 6, 1, 1))
    packed, one = OPS._int8_weight(weight, 1), torch.ones(8)
    with pytest.raises(RuntimeError, match="a multiple of 4 channels"):
        OPS._int8_linear(torch.zeros(1, 6, dtype=torch.uint8), packed, weight, one, one)
    with pytest.raises(RuntimeError, match="x: expected a CPU tensor of uint8 with 2"):
        OPS._int8_linear(torch.zeros(1, 6), packed, weight, one, one)
    with pytest.raises(RuntimeError, match=r"weight: expected int8 of shape"):
        OPS._int8_linear(torch.zeros(1, 8, dtype=torch.uint8), packed, weight, one, one)
    weight, _ = int8.quantize_weight(torch.randn(8, 8, 1, 1))
    x = torch.zeros(1, 8, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="packed: expected what"):
        OPS._int8_linear(x, packed[:5], weight, one, one)
    with pytest.raises(RuntimeError, match="scale: expected a dense"):
        OPS._int8_linear(x, OPS._int8_weight(weight, 1), weight, one[:7], one)
    with pytest.raises(RuntimeError, match="expected 1 to 2"):
        OPS._int8_mean(torch.zeros(1, 4, 0, 3, dtype=torch.uint8), 1.0, 0)
