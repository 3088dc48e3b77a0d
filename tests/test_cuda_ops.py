"""The CUDA and Triton ops on a device, against fp64, case by case."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast import _library, kernels, ops
from resnet_fast.errors import DTypeError, LibraryError
from resnet_fast.ops import activation
from resnet_fast.testing import tf32
from resnet_fast.testing.budget import error
from resnet_fast.testing.budget import expect_within_budget as judge
from resnet_fast.testing.cases import CASES, Case, case, make
from resnet_fast.testing.reordered import REORDERED

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)
TRITON_OPS = ("conv_bn_act", "bn_act", "add_act")


def parameters(ops: tuple[str, ...]) -> list[Any]:
    return [pytest.param(op, case, id=f"{op}-{case.name}") for op in ops for case in CASES[op]]


@pytest.fixture
def cuda_library() -> None:
    status = _library.status()["cuda"]
    if not status.loaded:
        pytest.skip(f"the CUDA library is not loaded: {status.reason}")


@pytest.fixture
def triton() -> None:
    available, reason = kernels.available()
    if not available:
        pytest.skip(reason)


def normalised(op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the public function as the schema wants them: a list a spatial dimension."""
    if op != "conv_bn_act":
        return arguments
    spatial = arguments["x"].dim() - 2
    lists = {
        name: [arguments[name]] * spatial
        if isinstance(arguments[name], int)
        else list(arguments[name])
        for name in ("stride", "padding", "dilation")
    }
    return {**arguments, **lists}


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def exact(arguments: dict[str, Any]) -> dict[str, Any]:
    """In fp64 and on the CPU: torch's hardswish on CUDA has a sixth in fp32 in every dtype."""
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in wide(arguments).items()}


def drawn(
    case: Case, dtype: torch.dtype, layout: torch.memory_format, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``dtype``, and those that the framework gets: the same in fp32 for fp64."""
    given = make(case, torch.float32 if dtype == torch.float64 else dtype, DEVICE, layout, seed)
    return (wide(given) if dtype == torch.float64 else given), given


def output_format(x: Tensor) -> torch.memory_format:
    """Channels-last where x is so and not also contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats and not x.is_contiguous():
        return formats[x.dim()]
    return torch.contiguous_format


def compare(op: str, run: Any, case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    arguments, given = drawn(case, dtype, layout)
    reference = importlib.import_module(f"resnet_fast.ops.{op}").reference
    actual = run(**normalised(op, arguments))
    truth = reference(**exact(arguments))
    framework = [reference(**given), REORDERED[op](**given)]
    if op == "conv_bn_act" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        with tf32.Products():
            framework.append(reference(**exact(arguments)).float())
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=output_format(arguments["x"]))
    judge(actual, framework, truth)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("op,case", parameters(("add_act", "bn_act")))
def test_cuda_matches_reference(
    cuda_library: None, op: str, case: Case, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    compare(op, getattr(torch.ops.resnet_fast, op), case, dtype, layout)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op,case", parameters(TRITON_OPS))
def test_triton_matches_reference(
    triton: None, op: str, case: Case, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    compare(op, getattr(torch.ops.resnet_fast, f"_{op}_triton"), case, dtype, layout)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op,case", parameters(TRITON_OPS))
def test_public_op_matches_reference(
    triton: None, op: str, case: Case, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Whichever library brought the kernel that answers."""
    compare(op, getattr(ops, op), case, dtype, layout)


def run(f: Any, arguments: dict[str, Any], grad_y: Tensor) -> dict[str, Tensor]:
    """The gradient of every tensor argument, by name."""
    leaves = {
        name: value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    f(**leaves).backward(grad_y)
    return {name: leaf.grad for name, leaf in leaves.items() if isinstance(leaf, Tensor)}


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "op,name",
    [("conv_bn_act", "bare_residual"), ("bn_act", "silu_residual"), ("add_act", "hardswish")],
)
def test_public_gradients_match_reference(
    triton: None, op: str, name: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Smooth activations, or gradients away from their kinks."""
    arguments, _ = drawn(case(op, name), dtype, layout)
    reference = importlib.import_module(f"resnet_fast.ops.{op}").reference
    z = reference(**wide(arguments) | {"act": "none"})
    clear = torch.ones_like(z, dtype=torch.bool)
    for kink in activation.KINKS[arguments["act"]]:
        clear &= (z - kink).abs() > 2**-4
    grad_y = (torch.randn(z.shape, device=z.device, dtype=z.dtype) * clear).to(dtype)
    actual = run(getattr(ops, op), arguments, grad_y)
    truth = run(reference, exact(arguments), grad_y.double().cpu())
    frameworks = [run(f, arguments, grad_y) for f in (reference, REORDERED[op])]
    for name, grad in actual.items():
        judge(grad, [framework[name] for framework in frameworks], truth[name])


def test_what_no_kernel_runs_is_refused_in_words() -> None:
    conv = make(case("conv_bn_act", "3x3_odd"), torch.float32, DEVICE)
    with pytest.raises((DTypeError, LibraryError), match=r"torch\.nn"):
        ops.conv_bn_act(**wide(conv))
    train = make(case("bn_act_train", "relu_residual"), torch.float32, DEVICE)
    if not _library.status()["cuda"].loaded:
        with pytest.raises(LibraryError, match=r"torch\.nn"):
            ops.bn_act_train(**train)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("op,case", parameters(("add_act",)))
def test_cuda_gradient_matches_reference(
    cuda_library: None, op: str, case: Case, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    arguments, given = drawn(case, dtype, layout)
    x, residual, act = arguments["x"], arguments["residual"], arguments["act"]
    upstream, narrow = drawn(case, dtype, layout, seed=1)
    grad_y = upstream["x"]
    actual = torch.ops.resnet_fast._add_act_backward(grad_y, x, residual, act)
    z = x.double() + residual.double()
    # A rounded sum may fall on the other side of a kink.
    clear = torch.ones_like(z, dtype=torch.bool)
    for kink in activation.KINKS[act]:
        clear &= (z - kink).abs() > 2**-4
    truth = activation.grad(act, grad_y.double().cpu(), z.cpu())
    framework = activation.grad(act, narrow["x"], given["x"] + given["residual"])
    judge(actual[clear], framework[clear], truth[clear.cpu()])


def test_misaligned_and_strided_views(cuda_library: None) -> None:
    base = torch.randn(4097, device=DEVICE, dtype=torch.float16)
    for x in (base[1:], base[::2], base[:4096].view(64, 64).t()):
        y = torch.ops.resnet_fast.add_act(x, x, "relu")
        assert y.is_contiguous()
        assert error(y, torch.relu(x.double() * 2)) == 0.0


def test_current_stream_and_graph_capture(cuda_library: None) -> None:
    x = torch.randn(2, 64, 7, 7, device=DEVICE).to(memory_format=torch.channels_last)
    scale, shift = torch.rand(64, device=DEVICE), torch.rand(64, device=DEVICE)

    def work() -> Tensor:
        y = torch.ops.resnet_fast.bn_act(x, scale, shift, None, "relu")
        return torch.ops.resnet_fast.add_act(y, x, "relu")

    expected = work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    captured.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def opcheck_arguments(op: str, layout: torch.memory_format) -> tuple[Any, ...]:
    typical = {"conv_bn_act": "3x3_odd", "bn_act": "silu_residual", "add_act": "hardswish"}
    name = op.removeprefix("_").removesuffix("_triton").removesuffix("_backward")
    arguments = normalised(name, make(case(name, typical[name]), torch.float32, DEVICE, layout))
    if "backward" in op:
        return (torch.randn_like(arguments["x"]), *arguments.values())
    if not op.endswith("_triton"):
        for value in arguments.values():
            if isinstance(value, Tensor):
                value.requires_grad_()
    return tuple(arguments.values())


OPCHECK = ("conv_bn_act", "bn_act", "add_act", "_add_act_backward")


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("op", OPCHECK)
def test_opcheck(triton: None, op: str, layout: torch.memory_format) -> None:
    """Schema, fake, autograd registration and ahead-of-time tracing, on a device."""
    overload = getattr(torch.ops.resnet_fast, op).default
    torch.library.opcheck(overload, opcheck_arguments(op, layout))


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("op", OPCHECK)
def test_opcheck_triton(triton: None, op: str, layout: torch.memory_format) -> None:
    op = f"_{op.removeprefix('_')}_triton"
    overload = getattr(torch.ops.resnet_fast, op).default
    torch.library.opcheck(overload, opcheck_arguments(op, layout))


@pytest.mark.parametrize("op", TRITON_OPS)
def test_triton_compiled_for_any_batch(triton: None, op: str) -> None:
    """A symbolic batch runs the kernels with 64-bit offsets: the eager result, for each batch."""
    torch._dynamo.reset()
    run = getattr(torch.ops.resnet_fast, f"_{op}_triton")
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    typical = {"conv_bn_act": "groups", "bn_act": "relu_residual", "add_act": "gelu"}
    for seed, batch in ((0, 2), (1, 4)):
        given = make(case(op, typical[op]), torch.float16, DEVICE, torch.channels_last, seed)
        arguments = normalised(op, given)
        for name in ("x", "residual"):
            if arguments.get(name) is not None:
                arguments[name] = torch.cat([arguments[name]] * (batch // 2))
        positional = tuple(arguments.values())
        with torch._dynamo.config.patch(error_on_recompile=seed == 1):
            assert torch.equal(compiled(*positional), run(*positional))


def needs_memory(gibibytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gibibytes << 30:
        pytest.skip(f"needs {gibibytes} GiB of free device memory")


@pytest.mark.slow
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("site", ["1x1", "3x3", "stem", "bn_act", "add_act"])
def test_triton_beyond_32_bit_indices(triton: None, site: str, layout: torch.memory_format) -> None:
    """More than 2^31 elements: the last image is what it is alone. Integers, so sums are exact."""
    needs_memory(24)
    beyond_32_bits(site, layout, (129, 16, 1024, 1024))


def beyond_32_bits(site: str, layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    ops = torch.ops.resnet_fast
    n, c, h, w = shape
    if site == "stem":
        n, c = n * c // 3 + 1, 3
    x = torch.empty((n, c, h, w), device=DEVICE, dtype=torch.float16, memory_format=layout)
    x.fill_(1.0)
    x[-1] = torch.randint(-3, 4, (c, h, w), device=DEVICE).half()
    scale = torch.arange(1, 1 + c, device=DEVICE, dtype=torch.float32)

    def run(x: Tensor) -> Tensor:
        if site == "bn_act":
            return ops._bn_act_triton(x, scale, scale, x, "relu")
        if site == "add_act":
            return ops._add_act_triton(x, x, "relu")
        size, stride = {"1x1": (1, 1), "3x3": (3, 1), "stem": (7, 2)}[site]
        generator = torch.Generator().manual_seed(0)
        weight = torch.randint(-1, 2, (c, c, size, size), generator=generator).half().to(DEVICE)
        geometry = ([stride] * 2, [size // 2] * 2, [1, 1], 1)
        return ops._conv_bn_act_triton(x, weight, None, None, None, *geometry, "none")

    whole = run(x)
    for image in (0, n // 2, n - 1):
        assert torch.equal(whole[image], run(x[image : image + 1])[0]), image


@pytest.mark.slow
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_beyond_32_bit_indices(cuda_library: None, layout: torch.memory_format) -> None:
    needs_memory(24)
    shape = (2, 513, 1024, 2049)  # 2^31 and a little
    x = torch.empty(shape, device=DEVICE, dtype=torch.float16, memory_format=layout).fill_(-1.0)
    x[-1, -1, -1, -1] = 2.0
    scale = torch.ones(513, device=DEVICE)
    shift = torch.arange(513, device=DEVICE, dtype=torch.float32)
    y = torch.ops.resnet_fast.bn_act(x, scale, shift, None, "relu")
    for n, c, h, w in ((0, 0, 0, 0), (0, 512, 1023, 2048), (1, 511, 1023, 2048), (1, 512, 5, 7)):
        assert y[n, c, h, w].item() == max(c - 1.0, 0.0)
    assert y[-1, -1, -1, -1].item() == 514.0
    del y
    z = torch.ops.resnet_fast.add_act(x, x, "relu")
    assert z[-1, -1, -1, -1].item() == 4.0
    assert torch.count_nonzero(z[:, -1]).item() == 1
