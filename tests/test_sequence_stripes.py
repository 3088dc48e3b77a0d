"""Inverted residuals in stripes: the bits of their layers one by one, without the wide values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from isa_support import rerun_below
from sequence_support import OPS, needs_sequences, run, step, threads_set
from torch import Tensor

from resnet_fast.ops import conv_bn_act_direct
from resnet_fast.ops.activation import ACTIVATIONS

pytestmark = [needs_sequences, pytest.mark.usefixtures("no_grad")]

DTYPES = [t for t in (torch.float32, torch.bfloat16) if conv_bn_act_direct.available(t)]
PLAIN = (1, 1, 1, 1, 0, 0, 1, 1)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with threads_set(request.param) as count:
        yield count


class Block:
    """A convolution that makes x, the three of an inverted residual, and every value between."""

    def __init__(self, channels: int, wide: int, filters: int, window: tuple[int, ...]) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.sizes, self.window = (channels, wide, filters), window
        self.steps: list[int] = []
        self.constants: list[Tensor] = []

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def layer(self, x: Tensor, read: int, filters: int, act: str, **more: Any) -> Tensor:
        residual, second = more.pop("residual", None), more.pop("second", -1)
        window, groups = more.pop("window", PLAIN), more.pop("groups", 1)
        kh, kw, *geometry = window
        depth = x.shape[1] // groups
        weight = (self.normal(filters, depth, kh, kw) / (depth * kh * kw) ** 0.5).to(x.dtype)
        constants = [OPS._direct_weight(weight, groups), weight, *self.normal(2, filters)]
        pairs = [geometry[i : i + 2] for i in (0, 2, 4)]
        y = OPS._direct_conv(x, *constants, residual, *pairs, groups, act)
        self.steps += step(
            *("direct", read, len(self.steps) // 16 + 1),
            **{"constants": len(self.constants), "filters": filters, "window": window},
            **{"groups": groups, "second": second, "act": ACTIVATIONS.index(act)},
        )
        self.constants += constants
        return y

    def expect(self, x: Tensor, y: Tensor) -> None:
        run(torch.full_like(x, torch.nan), self.constants, self.steps)
        given = run(x, self.constants, self.steps)
        assert torch.isfinite(given).all()
        assert torch.equal(given, y)

    def held(self, x: Tensor) -> int:
        handle = OPS._make_sequence(self.constants, self.steps, [])
        size = OPS._sequence_bytes(x, handle)
        OPS._free_sequence(handle)
        return int(size)


def images(batch: int, channels: int, size: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(batch, channels, size, 33, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


WINDOWS = [
    (3, 3, 1, 1, 1, 1, 1, 1),
    (5, 5, 1, 1, 2, 2, 1, 1),
    (3, 3, 2, 2, 1, 1, 1, 1),
    (5, 5, 2, 2, 2, 2, 1, 1),
    (3, 3, 1, 1, 2, 2, 2, 2),
    (3, 5, 3, 1, 0, 2, 1, 1),
    (2, 2, 2, 2, 0, 0, 1, 1),
]
ENDS = ["depthwise", "projection"]
BLOCKS = [(window, end) for window in WINDOWS for end in ENDS]
# A residual is of the size that the window leaves as it was.
BLOCKS += [(window, end) for window in WINDOWS[:2] for end in ("residual", "another residual")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window, end", BLOCKS, ids=str)
def test_a_block(window: tuple[int, ...], end: str, dtype: torch.dtype, threads: int) -> None:
    block = Block(32, 200 if dtype is torch.float32 else 392, 32, window)
    channels, wide, filters = block.sizes
    x = images(1 + threads % 2, channels, 97, dtype)
    values = [block.layer(x, 0, channels, "none")]
    if end == "another residual":
        values.append(block.layer(values[0], 1, channels, "relu"))
    read = len(values)
    a = block.layer(values[-1], read, wide, "relu6")
    y = b = block.layer(a, read + 1, wide, "silu", window=window, groups=wide)
    if end != "depthwise":
        more = {"residual": values[0], "second": 1} if "residual" in end else {}
        y = block.layer(b, read + 2, filters, "relu", **more)
    at = len(block.steps) // 16
    block.expect(x, block.layer(y, at, filters, "none"))
    # What the block of memory holds goes in or comes out: the wide values have no place there.
    elements = sum(value.numel() + 16 for value in (*values, y))
    assert block.held(x) <= elements * x.element_size()


def test_small_blocks_run_layer_by_layer(threads: int) -> None:
    """Where the wide values fit the caches they are kept whole."""
    block = Block(8, 32, 8, WINDOWS[0])
    x = images(1, 8, 20, torch.float32)
    a = block.layer(x, 0, 32, "relu")
    b = block.layer(a, 1, 32, "relu", window=WINDOWS[0], groups=32)
    block.expect(x, block.layer(b, 2, 8, "none"))
    assert block.held(x) >= 2 * a.numel() * 4


def test_a_chain_of_separable_convolutions(threads: int) -> None:
    """Pointwise and depthwise in turn: none is part of two stripes."""
    block = Block(8, 200, 200, WINDOWS[0])
    value = x = images(2, 8, 80, torch.float32)
    for i in range(0, 6, 2):
        value = block.layer(value, i, 200, "relu")
        value = block.layer(value, i + 1, 200, "relu6", window=WINDOWS[0], groups=200)
    block.expect(x, value)


def test_a_wide_value_that_is_read_again_is_kept(threads: int) -> None:
    block = Block(8, 200, 200, WINDOWS[0])
    x = images(2, 8, 97, torch.float32)
    a = block.layer(x, 0, 200, "relu")
    b = block.layer(a, 1, 200, "relu", window=WINDOWS[0], groups=200)
    block.expect(x, block.layer(b, 2, 200, "relu", residual=a, second=1))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa: str) -> None:
    rerun_below(isa, "tests/test_sequence_stripes.py")
