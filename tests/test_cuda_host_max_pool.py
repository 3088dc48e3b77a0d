"""The CUDA kernels of max_pool on the host, against the framework's on the CPU, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from host_support import driver, run
from torch import Tensor

from resnet_fast.ops import _max_pool

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = ((1, 1), (1, 9), (8, 1), (2, 2), (7, 6), (9, 9), (20, 13))
KERNEL = "csrc/cuda/max_pool.cuh"
# Vectors of fp16 and fp32 alone, which are built in a third of the time.
FEW = {
    "tests/cuda_on_host/max_pool.cpp": [
        ("run<bf16>(it)", "return 2"),
        ("run<double>(it)", "return 2"),
        (": run<T, 1>(it)", ": void()"),
    ]
}


@pytest.fixture(scope="session")
def program() -> Path:
    return driver("max_pool")


def drawn(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Tensor:
    """Values of which many are equal; ``special``: also NaN, infinities and zeros of both signs."""
    x = torch.randint(-3, 4, shape).to(dtype)
    if kind == "special":
        values = torch.tensor([torch.nan, -torch.inf, torch.inf, -0.0, 0.0], dtype=dtype)
        draw = torch.randint(0, 12, shape)
        x = torch.where(draw < 5, values[draw.clamp(max=4)], x)
        x[:, 0] = torch.where(torch.rand(x[:, 0].shape) < 0.8, -torch.inf, x[:, 0])
    return x


def on_host(
    program: Path,
    x: Tensor,
    grad_y: Tensor | None = None,
    *,
    planes: bool = False,
    vector: bool = True,
    wanted: int = 1,
    order: str = "ascending",
) -> Tensor:
    """What the kernel makes of ``x``, by pixels or as ``planes`` of one channel.

    ``wanted`` threads shorten the strips: 1 leaves them 8 rows long.
    """
    n, channels, height, width = x.shape
    flat = [t if planes or t is None else t.permute(0, 2, 3, 1) for t in (x, grad_y)]
    y = run(
        program,
        tensors={"x": flat[0], "grad_y": flat[1]},
        outputs={"y": x.dtype},
        dtype=str(x.dtype).removeprefix("torch."),
        images=n * channels if planes else n,
        channels=1 if planes else channels,
        height=height,
        width=width,
        vector=vector and not planes,
        wanted=wanted,
        order=order,
    )["y"]
    if grad_y is None:
        height, width = (height + 1) // 2, (width + 1) // 2
    if planes:
        return y.view(n, channels, height, width)
    return y.view(n, height, width, channels).permute(0, 3, 1, 2)


def same(a: Tensor, b: Tensor) -> bool:
    """The same numbers, zeros of the same sign, NaN at the same places."""
    numbers = torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
    return numbers and torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())


def gradient(x: Tensor, grad_y: Tensor) -> Tensor:
    """The framework's, of 16-bit tensors summed in fp32 and rounded once."""
    wide = x.double() if x.dtype is torch.float64 else x.float()
    leaf = wide.requires_grad_()
    (grad,) = torch.autograd.grad(_max_pool.reference(leaf), leaf, grad_y.to(wide.dtype))
    return grad.to(x.dtype)


@pytest.mark.parametrize("kind", ["ties", "special"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["vector", "scalar", "planes"])
def test_bits_are_the_frameworks(program: Path, dtype: torch.dtype, form: str, kind: str) -> None:
    for index, size in enumerate(SIZES):
        channels = 5 if form == "scalar" else 16
        x = drawn((1 + index % 2, channels, *size), dtype, kind)
        y = _max_pool.reference(x)
        grad_y = torch.randn(y.shape, dtype=torch.float64).to(dtype)
        for wanted in (1, 1 << 40):
            options = {"planes": form == "planes", "vector": form == "vector", "wanted": wanted}
            assert same(on_host(program, x, **options), y), size
            grad_x = on_host(program, x, grad_y, **options)
            assert same(grad_x, gradient(x, grad_y)), size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_framework_in_the_dtype_agrees(program: Path, dtype: torch.dtype) -> None:
    """Where the sums of gradients are exact, in its own 16 bits too."""
    x = drawn((2, 16, 15, 11), dtype, "special")
    leaf = x.clone().requires_grad_()
    y = _max_pool.reference(leaf)
    grad_y = torch.randint(-8, 9, y.shape).to(dtype)
    y.backward(grad_y)
    assert leaf.grad is not None and same(on_host(program, x, grad_y), leaf.grad)


def test_hostile_gradients_stay_at_their_maxima(program: Path) -> None:
    x = drawn((1, 8, 9, 9), torch.float32, "ties")
    grad_y = torch.randn(1, 8, 5, 5)
    grad_y[0, :, 1, 2], grad_y[0, :, 3, 3] = torch.nan, torch.inf
    assert same(on_host(program, x, grad_y), gradient(x, grad_y))


def test_orders_of_threads_make_no_difference(program: Path) -> None:
    x = drawn((2, 16, 20, 13), torch.float16, "special")
    grad_y = torch.randn(2, 16, 10, 7).half()
    first = on_host(program, x, grad_y)
    for order in ("descending", "shuffled"):
        assert same(on_host(program, x, grad_y, order=order), first)


BUGS = {
    "the last of equal values": ("v > value[j]", "v >= value[j]"),
    "the first NaN": ("|| v != v", "|| (v != v && value[j] == value[j])"),
    "a NaN passed over": ("|| v != v", ""),
    "the place of minus infinity": ("(p > 0 ? 0 : 3)", "0"),
    "a window to the right forgotten": ("before.give(sum[1], 1, 6);", ""),
    "a window counted twice": (
        "now.give(sum[0], 0, 4);",
        "now.give(sum[0], 0, 4); now.give(sum[0], 0, 4);",
    ),
    "the row below the last windows": ("at.end == s.rows ? at.end + 1 : at.end", "at.end"),
    "a strip without the windows above": ("row(2 * at.first - 3)", "row(2 * at.first - 4)"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str) -> None:
    broken = driver("max_pool", patches={**FEW, KERNEL: [BUGS[bug]]})
    with pytest.raises(AssertionError):
        for dtype in (torch.float32, torch.float16):
            test_bits_are_the_frameworks(broken, dtype, "vector", "special")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_op(layout: torch.memory_format) -> None:
    """Its registrations, by the framework's own kernels on the CPU."""
    op = torch.ops.resnet_fast._max_pool.default
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=layout)
    torch.library.opcheck(op, (x.requires_grad_(),))
    torch.library.opcheck(
        torch.ops.resnet_fast._max_pool_backward.default,
        (torch.randn(2, 3, 5, 4), x.detach()),
        test_utils=["test_schema", "test_faketensor"],
    )
    wide = torch.randn(1, 2, 5, 4, dtype=torch.float64).contiguous(memory_format=layout)
    assert torch.autograd.gradcheck(op, wide.requires_grad_())
    assert torch.autograd.gradgradcheck(op, wide)
