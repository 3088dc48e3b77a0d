"""A repeated launch hands the compiled kernel what Triton's own launch would.

No device is needed: Triton compiles for sm_90 as it always does, and what its launcher is given is
written down instead of launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from resnet_fast.kernels import conv_bn_act, launch, residual_chain, stem_pool
from triton.backends.compiler import GPUTarget

# Place of the first argument of the kernel in what a launcher is given: grid, stream, function,
# metadata of the kernel and of the launch, and two hooks come before.
_FIRST = 9
_METADATA = 6

Calls = list[tuple[Any, ...]]
# One for all tests: kernels stay compiled, and with the launcher that they were compiled with.
_written: Calls = []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    _written.clear()

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            pass

        def __call__(self, *given: Any) -> None:
            _written.append(given)

    class Utilities:
        def load_binary(self, *binary: Any) -> tuple[int, ...]:
            return (1, 2, 100, 0, 1024)

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    class Driver:
        launcher_cls = Launcher
        utils = Utilities()

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 7

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    for room in (conv_bn_act, residual_chain, stem_pool):
        monkeypatch.setattr(room, "check_input", lambda x: None)
    yield _written


def _same(one: tuple[Any, ...], other: tuple[Any, ...], outputs: int) -> None:
    """Both launch the same; tensors by address, but for the ``outputs`` that each call makes."""
    assert len(one) == len(other) > _FIRST
    fresh = 0
    for place, (a, b) in enumerate(zip(one, other, strict=True)):
        if isinstance(a, torch.Tensor):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), place
            fresh += a.data_ptr() != b.data_ptr()
        elif place != _METADATA:
            assert type(a) is type(b) and a == b, (place, a, b)
    assert fresh == outputs


def _operands(
    images: int, channels: int, filters: int, size: int, taps: int
) -> tuple[torch.Tensor, ...]:
    x = torch.randn(images, channels, size, size).half()
    residual = torch.randn(images, filters, size, size).half()
    weight = torch.randn(filters, channels, taps, taps).half()
    last = torch.channels_last
    return x.contiguous(memory_format=last), weight, residual.contiguous(memory_format=last)


# Filter size, channels, image size, launches of a call: the product, and the sum of its parts.
CASES = {"1x1": (1, 64, 14, 1), "3x3": (3, 32, 14, 1), "parts": (3, 512, 7, 2)}


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_arguments_are_those_of_tritons_own_launch(
    case: str, residual: bool, calls: Calls
) -> None:
    taps, channels, size, launches = CASES[case]
    x, weight, r = _operands(1, channels, 64, size, taps)
    scale, shift = torch.rand(64), torch.rand(64)
    rest = ([1, 1], [taps // 2] * 2, [1, 1], 1, "relu")
    added = r if residual else None
    prepared = conv_bn_act.prepare_conv_bn_act(weight, scale, shift, *rest)
    first = prepared(x, added)
    assert len(calls) == launches
    own, calls[:] = list(calls), []
    again = prepared(x, added)
    assert again.stride() == first.stride() and again.shape == first.shape
    assert len(calls) == launches
    for one, other in zip(own, calls, strict=True):
        # The output, and between product and sum the parts.
        _same(one, other, outputs=1 if launches == 1 or one is own[0] else 2)


# The chain with all of its operands, without the first and the last product, and the tail of a
# basic block: filters of conv2, conv3, projection and next conv1, 0 for none.
CHAINS = {"whole": (64, 64, 64, 64), "tail": (0, 64, 0, 0), "basic": (64, 0, 64, 0)}


@pytest.mark.parametrize("case", CHAINS)
def test_a_chains_arguments_are_those_of_tritons_own_launch(case: str, calls: Calls) -> None:
    last = torch.channels_last
    x = torch.randn(2, 64, 8, 8).half().contiguous(memory_format=last)
    operands: list[Any] = []
    for filters, taps in zip(CHAINS[case], (3, 1, 1, 1), strict=True):
        weight = torch.randn(filters, 64, taps, taps).half().contiguous(memory_format=last)
        vectors = (torch.rand(filters), torch.rand(filters))
        operands += [weight, *vectors] if filters else [None] * 3
    prepared = residual_chain.prepare_residual_chain(*operands, 1, 1, "relu")
    residual = torch.randn_like(x)
    prepared(x, residual)
    (own,) = calls
    calls.clear()
    prepared(x, residual)
    (again,) = calls
    # Without a next convolution the kernel is handed an empty tensor as its second output.
    _same(own, again, outputs=2 if CHAINS[case][3] else 1)


def test_a_stems_arguments_are_those_of_tritons_own_launch(calls: Calls) -> None:
    x = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    vectors = [torch.rand(n) for n in (64, 64, 3, 3)]
    prepared = stem_pool.prepare_stem_pool(torch.randn(64, 3, 7, 7).half(), *vectors, "relu")
    prepared(x)
    (own,) = calls
    calls.clear()
    prepared(x)
    (again,) = calls
    _same(own, again, outputs=1)


def test_only_the_first_launch_of_a_kind_is_tritons(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, _ = _operands(2, 64, 64, 7, 1)
    prepared = conv_bn_act.prepare_conv_bn_act(
        weight, None, None, [1, 1], [0, 0], [1, 1], 1, "none"
    )
    bound: list[Any] = []
    run = type(conv_bn_act.gemm_kernel).run
    monkeypatch.setattr(
        type(conv_bn_act.gemm_kernel), "run", lambda *a, **k: bound.append(a) or run(*a, **k)
    )
    for _ in range(3):
        prepared(x, None)
    assert len(calls) == 3 and len(bound) == 1
    # An address that the kernel was not specialised for.
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    odd = memory[1:].as_strided(x.shape, x.stride())
    assert odd.data_ptr() % 16 and odd.stride() == x.stride()
    prepared(odd, None)
    assert len(bound) == 2
    assert calls[-1][4] is not None and calls[-1][_FIRST] is odd
    prepared(x, None)
    assert len(bound) == 2, "and the first kernel is still the one of aligned addresses"
    assert calls[-1][_FIRST] is x
    # A hook that wants to see every launch does.
    seen: list[Any] = []
    monkeypatch.setattr(conv_bn_act.gemm_kernel, "pre_run_hooks", [lambda *a, **k: seen.append(a)])
    prepared(x, None)
    assert len(seen) == 1 and len(bound) == 3


def test_a_launch_that_is_traced_is_tritons() -> None:
    given: list[Any] = []

    class Wrapped:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *a, **k: given.append((grid, a, k))

    repeat = launch.Repeatable(object(), (4, 2), (8, 9), {"BLOCK": 16})
    x = torch.zeros(1)
    repeat(x, wrap_triton=lambda kernel: Wrapped())
    assert given == [((4, 2), (x, 8, 9), {"BLOCK": 16})]
