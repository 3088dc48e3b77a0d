"""Every op, case and dtype against the contract: values, gradients, layouts, compilation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fuzz_support import random_geometries
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from resnet_fast import ops
from resnet_fast.ops import activation
from resnet_fast.testing import budget, cases
from resnet_fast.testing.reordered import REORDERED

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

ALL = [pytest.param(op, case, id=f"{op}-{case.name}") for op in ops.OPS for case in cases.CASES[op]]
LAYOUTS = [
    pytest.param(op, case, memory_format, id=f"{op}-{case.name}-{name}")
    for op in ops.OPS
    for case in cases.CASES[op]
    for name, memory_format in FORMATS.items()
    if name == "nchw" or len(case.x) in (4, 5)
]
# One case an op stands for the rest where the machinery and not the arithmetic is under test.
TYPICAL = {
    "conv_bn_act": "3x3_odd",
    "bn_act": "silu_residual",
    "add_act": "hardswish",
    "bn_act_train": "relu_residual",
}


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def public(op: str) -> Callable[..., Any]:
    return getattr(ops, op)


def reference(op: str) -> Callable[..., Any]:
    return ops.module(op).reference


def native(op: str) -> Any:
    return getattr(torch.ops.resnet_fast, op).default


def tuple_of(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def map_tensors(kwargs: dict[str, Any], f: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {key: f(v) if isinstance(v, Tensor) else v for key, v in kwargs.items()}


def schema_args(op: str, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Positional arguments of the native op, integers spread over the spatial dimensions."""
    spatial = kwargs["x"].dim() - 2
    spread = {
        key: [v] * spatial if isinstance(v, int) else list(v)
        for key, v in kwargs.items()
        if key in ("stride", "padding", "dilation")
    }
    return tuple((kwargs | spread).values())


def away_from_kinks(op: str, kwargs: dict[str, Any], margin: float | None = None) -> Tensor:
    """True where the derivative is the same for every rounding of the pre-activation."""
    wide = map_tensors(kwargs, Tensor.double)
    act = wide.pop("act")
    z = tuple_of(reference(op)(**wide, act="none"))[0]
    if margin is None:
        margin = 8 * torch.finfo(kwargs["x"].dtype).eps * (z.abs().max().item() if z.numel() else 0)
    mask = torch.ones_like(z, dtype=torch.bool)
    for kink in activation.KINKS[act]:
        mask &= (z - kink).abs() > margin
    return mask


def outputs(result: Any) -> dict[str, Tensor]:
    return dict(zip(("y", "mean", "rstd"), tuple_of(result), strict=False))


def run(f: Callable[..., Any], kwargs: dict[str, Any], grad_y: Tensor) -> dict[str, Tensor]:
    """Outputs, and the gradient of every tensor argument, by name."""
    leaves = map_tensors(kwargs, lambda t: t.detach().clone().requires_grad_())
    results = outputs(f(**leaves))
    results["y"].backward(grad_y)
    grads = {f"grad_{key}": leaf.grad for key, leaf in leaves.items() if isinstance(leaf, Tensor)}
    return {key: t.detach() for key, t in results.items()} | grads


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` is filled with NaN, so that what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


class Yardstick:
    """The truth, in fp64, and the framework's errors, for outputs and gradients by name.

    The framework runs its ops with the axes read from either end (:mod:`.budget`); for fp64 its
    results are the fp32 ones, as the budget has it.
    """

    def __init__(self, op: str, kwargs: dict[str, Any], grad_y: Tensor | None = None) -> None:
        def evaluate(f: Callable[..., Any], dtype: torch.dtype) -> dict[str, Tensor]:
            def cast(t: Tensor) -> Tensor:
                return t.to(dtype) if torch.float64 in (t.dtype, dtype) else t

            if grad_y is None:
                return outputs(f(**map_tensors(kwargs, cast)))
            return run(f, map_tensors(kwargs, cast), grad_y.to(dtype))

        dtype = kwargs["x"].dtype
        narrow = torch.float32 if dtype == torch.float64 else dtype
        self.truth = evaluate(reference(op), torch.float64)
        self.frameworks = [evaluate(f, narrow) for f in (reference(op), REORDERED[op])]

    def expect(self, ours: dict[str, Tensor]) -> None:
        assert ours.keys() == self.truth.keys()
        for name, actual in ours.items():
            expect_within(name, actual, [f[name] for f in self.frameworks], self.truth[name])


def expect_within(name: str, ours: Tensor, framework: Tensor | list[Tensor], truth: Tensor) -> None:
    verdict = budget.within_budget(ours, framework, truth)
    assert verdict.ok, f"{name}: error {verdict.error:.3e} beyond {verdict.limit:.3e}"


def expect_layout(x: Tensor, y: Tensor) -> None:
    """Dense, channels-last if ``x`` is so and not contiguous, else contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = torch.contiguous_format
    own = formats.get(x.dim(), memory_format)
    if x.is_contiguous(memory_format=own) and not x.is_contiguous():
        memory_format = own
    assert y.stride() == torch.empty(y.shape, memory_format=memory_format).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("op", "case", "memory_format"), LAYOUTS)
def test_values_and_gradients(
    op: str, case: cases.Case, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    drawn = torch.float32 if dtype == torch.float64 else dtype
    kwargs = cases.make(case, drawn, memory_format=memory_format)
    if dtype == torch.float64:
        kwargs = map_tensors(kwargs, Tensor.double)
    before = map_tensors(kwargs, torch.clone)
    mask = away_from_kinks(op, map_tensors(kwargs, lambda t: t.to(drawn)))
    grad_y = (torch.randn(mask.shape) * mask).to(drawn).to(dtype)

    with poisoned():
        ours = run(public(op), kwargs, grad_y)
    Yardstick(op, kwargs, grad_y).expect(ours)

    expect_layout(kwargs["x"], ours["y"])
    for name, actual in ours.items():
        argument = name.removeprefix("grad_")
        like = kwargs.get(argument)
        if like is not None:
            assert actual.dtype == like.dtype and actual.shape == like.shape
        else:
            assert actual.dtype == (dtype if name == "y" else parameter_dtype(dtype))
    for key, value in before.items():
        assert not isinstance(value, Tensor) or torch.equal(value, kwargs[key]), f"{key} changed"


@pytest.mark.parametrize(("op", "case"), ALL)
def test_reading_backwards_asks_the_same(op: str, case: cases.Case) -> None:
    """The reordered reference is the reference, far within fp32: else it would set no standard."""
    kwargs = cases.make(case, torch.float32)
    mask = away_from_kinks(op, kwargs)
    grad_y = torch.randn(mask.shape) * mask
    forwards = run(reference(op), kwargs, grad_y)
    wide = map_tensors(kwargs, Tensor.double)
    truth = run(reference(op), wide, grad_y.double())
    for name, actual in run(REORDERED[op], wide, grad_y.double()).items():
        found = budget.error(forwards[name], truth[name])
        assert budget.error(actual, truth[name]) <= budget.limit(found, torch.float32, truth[name])


@pytest.mark.parametrize(("op", "case"), ALL)
def test_gradcheck(op: str, case: cases.Case) -> None:
    kwargs = cases.make(case, torch.float64)
    if kwargs["x"].numel() == 0:
        pytest.skip("nothing to differentiate")
    # gradcheck steps by 1e-6; the margin leaves room for the gain of the layers before the kink.
    mask = away_from_kinks(op, kwargs, margin=1e-3)
    leaves = map_tensors(kwargs, lambda t: t.clone().requires_grad_())
    names = [key for key, leaf in leaves.items() if isinstance(leaf, Tensor)]

    def f(*tensors: Tensor) -> Tensor:
        y = tuple_of(public(op)(**(leaves | dict(zip(names, tensors, strict=True)))))[0]
        return y * mask

    inputs = tuple(leaves[name] for name in names)
    # Fast mode projects the Jacobian on random vectors: a wrong entry anywhere shows, in a
    # thousandth of the evaluations.
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize(("op", "case", "memory_format"), LAYOUTS)
def test_opcheck(op: str, case: cases.Case, memory_format: torch.memory_format) -> None:
    kwargs = cases.make(case, torch.float32, memory_format=memory_format)
    leaves = map_tensors(kwargs, Tensor.requires_grad_)
    # Tracing costs a second, so only the typical case goes through ahead-of-time autograd.
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if case.name == TYPICAL[op]:
        utils.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(native(op), schema_args(op, leaves), test_utils=utils)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
def test_opcheck_of_backward_ops(memory_format: torch.memory_format) -> None:
    add = cases.make(cases.case("add_act", "gelu"), memory_format=memory_format)
    torch.library.opcheck(native("_add_act_backward"), (torch.randn_like(add["x"]), *add.values()))
    for name in ("relu_residual", "bare", "3d"):
        bn = cases.make(cases.case("bn_act_train", name), memory_format=memory_format)
        _, mean, rstd = ops.bn_act_train(**bn)
        del bn["eps"]
        act = bn.pop("act")
        args = (torch.randn_like(bn["x"]), *bn.values(), mean, rstd, act)
        torch.library.opcheck(native("_bn_act_train_backward"), args)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", ops.OPS)
def test_compiled_whole(op: str, backend: str) -> None:
    """One graph, the eager result and gradients, and no second graph for another batch size."""
    torch._dynamo.reset()
    case = cases.case(op, TYPICAL[op])
    compiled = torch.compile(public(op), backend=backend, fullgraph=True, dynamic=True)
    for i in range(2):
        kwargs = cases.make(case, memory_format=torch.channels_last, seed=i)
        if i == 1:
            batched = [key for key in ("x", "residual") if kwargs.get(key) is not None]
            kwargs |= {key: torch.cat([kwargs[key]] * 2) for key in batched}
        grad_y = torch.randn(tuple_of(public(op)(**kwargs))[0].shape)
        eager = run(public(op), kwargs, grad_y)
        with torch._dynamo.config.patch(error_on_recompile=i == 1):
            ours = run(compiled, kwargs, grad_y)
        assert ours["y"].stride() == eager["y"].stride()
        Yardstick(op, kwargs, grad_y).expect(ours)


@pytest.mark.parametrize("op", ops.OPS)
def test_exported(op: str) -> None:
    """``torch.export`` keeps the op as one node, under a symbolic batch."""
    kwargs = cases.make(cases.case(op, TYPICAL[op]))

    names = [key for key in ("x", "residual") if kwargs.get(key) is not None]

    class Call(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return public(op)(**(kwargs | dict(zip(names, tensors, strict=True))))

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        Call(),
        tuple(kwargs[key] for key in names),
        dynamic_shapes={"tensors": tuple({0: batch} for _ in names)},
    )
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert native(op) in targets
    doubled = {key: torch.cat([kwargs[key]] * 2) for key in names}
    ours = tuple_of(program.module()(*doubled.values()))[0]
    assert torch.equal(ours, tuple_of(public(op)(**(kwargs | doubled)))[0])


def stretched(t: Tensor) -> Tensor:
    """The same values behind other strides: a slice of every second element of a larger tensor."""
    if t.dim() == 0:
        return t
    larger = torch.full([2 * size + 1 for size in t.shape], torch.nan, dtype=t.dtype)
    view = larger[tuple(slice(1, 2 * size + 1, 2) for size in t.shape)]
    return view.copy_(t)


def overlapping(t: Tensor) -> Tensor:
    """Dimension 0 with stride 0."""
    return t[:1].expand(t.shape) if t.dim() > 0 and t.shape[0] > 0 else t


def permuted(t: Tensor) -> Tensor:
    """Dense, with the last two dimensions exchanged in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else t


@pytest.mark.parametrize("change", [stretched, overlapping, permuted])
@pytest.mark.parametrize(("op", "case"), ALL)
def test_strides_do_not_matter(
    op: str, case: cases.Case, change: Callable[[Tensor], Tensor]
) -> None:
    """Sliced, expanded and permuted inputs."""
    kwargs = map_tensors(cases.make(case, torch.float32), change)
    with poisoned():
        ours = outputs(public(op)(**kwargs))
    Yardstick(op, kwargs).expect(ours)
    expect_layout(kwargs["x"], ours["y"])


@pytest.mark.parametrize("op", ops.OPS)
def test_strides_of_the_gradient_do_not_matter(op: str) -> None:
    kwargs = cases.make(cases.case(op, TYPICAL[op]))
    y = tuple_of(public(op)(**kwargs))[0]
    grad_y = torch.randn([1] * y.dim()).expand(y.shape)
    Yardstick(op, kwargs, grad_y.contiguous()).expect(run(public(op), kwargs, grad_y))


@pytest.mark.parametrize("op", ops.OPS)
def test_only_wanted_gradients(op: str) -> None:
    """Each tensor alone may ask for its gradient."""
    kwargs = cases.make(cases.case(op, TYPICAL[op]))
    grad_y = torch.randn(tuple_of(public(op)(**kwargs))[0].shape)
    every = run(public(op), kwargs, grad_y)
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            single = kwargs | {key: value.clone().requires_grad_()}
            tuple_of(public(op)(**single))[0].backward(grad_y)
            assert torch.equal(single[key].grad, every[f"grad_{key}"])


def test_statistics_carry_no_gradient() -> None:
    kwargs = cases.make(cases.case("bn_act_train", "relu"))
    kwargs["x"].requires_grad_()
    y, mean, rstd = ops.bn_act_train(**kwargs)
    assert y.requires_grad and not mean.requires_grad and not rstd.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_not_finite(act: str, dtype: torch.dtype) -> None:
    """NaN and infinities come out where the framework has them."""
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 100.0, -100.0, 3.0, -3.0, 6.0])
    x = x.to(dtype)[None, None].repeat(1, 2, 3)
    zero = torch.zeros_like(x)
    for ours in (
        ops.bn_act(x, act=act),
        ops.add_act(x, zero, act=act),
        ops.conv_bn_act(x, torch.ones(2, 1, 1, dtype=dtype), groups=2, act=act),
    ):
        # Inf · 0 inside a zero-padded tile would show here as a NaN beside the Inf.
        expect_within(act, ours, activation.value(act, x), activation.value(act, x.double()))


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_derivative_at_kinks_is_the_frameworks(act: str) -> None:
    x = torch.tensor([-3.0, 0.0, 3.0, 6.0, torch.nan], dtype=torch.float64)[None, None]

    def grad(f: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        leaf = x.to(dtype, copy=True).requires_grad_()
        f(leaf).sum().backward()
        return leaf.grad

    def value(t: Tensor) -> Tensor:
        return activation.value(act, t)

    truth, framework = grad(value, torch.float64), grad(value, torch.float32)
    for f in (
        lambda t: ops.bn_act(t, act=act),
        lambda t: ops.add_act(t, torch.zeros_like(t), act=act),
        lambda t: ops.conv_bn_act(t, torch.ones(1, 1, 1, dtype=t.dtype), act=act),
    ):
        for dtype in (torch.float32, torch.float64):
            expect_within(act, grad(f, dtype), framework, truth)


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_table_of_activations(act: str) -> None:
    """The derivative formulas agree with autograd, from the input and from the output."""
    # Steps of a power of two: fp32 holds the same numbers.
    z = torch.linspace(-8, 8, 513, dtype=torch.float64).requires_grad_()
    narrow = z.detach().float().requires_grad_()
    y = activation.value(act, z)
    for leaf in (z, narrow):
        activation.value(act, leaf).sum().backward()
    ones = torch.ones_like(z)
    expect_within(act, activation.grad(act, ones, z.detach()), narrow.grad, z.grad)
    if act in activation.FROM_OUTPUT:
        ours = activation.grad_from_output(act, ones, y.detach())
        expect_within(act, ours, narrow.grad, z.grad)
    assert activation.ACTIVATIONS[activation.code(act)] == act


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """A convolution of small integers: every partial sum is exact, so results must be equal."""

    def integer(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    spatial = integer(1, 3)
    most = {1: 23, 2: 11, 3: 6}[spatial]
    groups = integer(1, 4)
    c, k = integer(1, 9), integer(1, 9)
    if draw(st.booleans()):
        c, k = 1, integer(1, 2)
    kernel = [integer(1, 4) for _ in range(spatial)]
    stride = [integer(1, 3) for _ in range(spatial)]
    padding = [integer(0, 3) for _ in range(spatial)]
    dilation = [integer(1, 3) for _ in range(spatial)]
    image = [integer(1, most) for _ in range(spatial)]
    shape = [integer(0, 3), groups * k]
    for h, r, s, p, d in zip(image, kernel, stride, padding, dilation, strict=True):
        assume(h + 2 * p >= d * (r - 1) + 1)
        shape.append((h + 2 * p - d * (r - 1) - 1) // s + 1)
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(integer(0, 2**31))

    def tensor(sizes: list[int], of: torch.dtype = dtype) -> Tensor:
        values = torch.randint(-3, 4, sizes, generator=generator)
        return values.to(of)

    layout = draw(st.sampled_from(list(FORMATS.values())))
    vector = parameter_dtype(dtype)
    return {
        "x": cases.to_memory_format(tensor([shape[0], groups * c, *image]), layout),
        "weight": cases.to_memory_format(tensor([groups * k, c, *kernel]), layout),
        "scale": tensor([groups * k], vector) if draw(st.booleans()) else None,
        "shift": tensor([groups * k], vector) if draw(st.booleans()) else None,
        "residual": tensor(shape) if draw(st.booleans()) else None,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "act": draw(st.sampled_from(["none", "relu", "relu6"])),
    }


@random_geometries(200, repeatable=True)
@given(convolutions())
def test_any_geometry(kwargs: dict[str, Any]) -> None:
    truth = ops.module("conv_bn_act").reference(**map_tensors(kwargs, Tensor.double))
    with poisoned():
        ours = ops.conv_bn_act(**kwargs)
    assert torch.equal(ours, truth.to(ours.dtype))
    expect_layout(kwargs["x"], ours)


def available_bytes() -> int:
    """Memory that could be had without swapping; 0 where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0


def need_gigabytes(count: int) -> None:
    if available_bytes() < count * 10**9:
        pytest.skip(f"needs {count} GB of free memory")
    if os.environ.get("RESNET_FAST_SKIP_HUGE") == "1":
        pytest.skip("RESNET_FAST_SKIP_HUGE=1")


@pytest.mark.slow
def test_more_elements_than_int32_can_index() -> None:
    """The end of the last channel lies beyond 2**31 elements."""
    need_gigabytes(10)
    size = 2**30 + 5
    x = torch.tensor([1.0, 3.0], dtype=torch.bfloat16).view(1, 2, 1).expand(1, 2, size)
    y = ops.bn_act(x, torch.tensor([2.0, 4.0]))
    assert y.numel() > 2**31
    for channel, expected in enumerate((2.0, 12.0)):
        for part in (y[0, channel, :999], y[0, channel, -999:], y[0, channel, :: 2**20 + 1]):
            assert (part == expected).all()


@pytest.mark.slow
def test_convolution_reads_beyond_int32() -> None:
    """Few outputs, from rows that lie up to 2**31 elements into the image."""
    need_gigabytes(10)
    rows = torch.arange(2**16).remainder(251).to(torch.bfloat16).view(1, 1, -1, 1)
    x = rows.expand(1, 1, 2**16, 2**15 + 1)
    stride = (2**13 - 1, 2**14)
    y = ops.conv_bn_act(x, torch.ones(1, 1, 1, 1, dtype=x.dtype), stride=stride)
    assert torch.equal(y, x[:, :, :: stride[0], :: stride[1]])
