"""Lists of steps drawn at random: run as one, they give what they give step by step.

What this is about is where values lie: in the gaps of one block, over what is read for the last
time, side by side in a whole that they are joined to, or nowhere, where a norm is folded into the
convolution behind it. The block is full of NaN before each run.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from isa_support import rerun_below
from sequence_support import OPS, needs_sequences, run, step
from torch import Tensor

from resnet_fast.ops import conv_bn_act_direct
from resnet_fast.ops.activation import ACTIVATIONS

pytestmark = [needs_sequences, pytest.mark.usefixtures("no_grad")]

CLAMPS = (0, ACTIVATIONS.index("relu"), ACTIVATIONS.index("relu6"))
SAME = {1: (1, 1, 1, 1, 0, 0, 1, 1), 3: (3, 3, 1, 1, 1, 1, 1, 1)}


class Drawn:
    """A list of steps over images of one size, with every value computed by a call of its own."""

    def __init__(self, seed: int, dtype: torch.dtype, batch: int, size: int = 7) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.steps: list[int] = []
        self.constants: list[Tensor] = []
        self.size = (size, size + 2)
        x = self.normal(batch, self.random.choice([3, 16, 40]), *self.size).to(dtype)
        self.values = [x.contiguous(memory_format=torch.channels_last)]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def image(self) -> int:
        """A value, the later ones more often."""
        images = [i for i, v in enumerate(self.values) if v.shape[2:] == self.size]
        return self.random.choice(images[-5:] if self.random.random() < 0.7 else images)

    def enter(self, kind: str, read: int, value: Tensor, constants: Any = (), **fields: Any) -> int:
        at = {"constants": len(self.constants)} if constants else {}
        self.steps += step(kind, read, len(self.values), **fields, **at)
        self.constants += constants
        self.values.append(value)
        return len(self.values) - 1

    def alone(self, kind: str, read: int, constants: Any = (), **fields: Any) -> int:
        """A step with one input: computed as a list of one."""
        at = {"constants": 0} if constants else {}
        y = run(self.values[read], list(constants), step(kind, 0, 1, **fields, **at))
        return self.enter(kind, read, y, constants, **fields)

    def affine(self, read: int) -> int:
        scale, shift = self.normal(2, self.values[read].shape[1])
        act = self.random.choice([*CLAMPS, CLAMPS[1], CLAMPS[1], ACTIVATIONS.index("silu")])
        return self.alone("affine", read, [scale, shift], act=act)

    def pool(self, read: int) -> int:
        return self.alone(self.random.choice(["max_pool", "average_pool"]), read, window=SAME[3])

    def gate(self, read: int) -> int:
        mean = self.alone("mean", read)
        return self.enter("gate", read, self.values[read] * self.values[mean], second=mean)

    def join(self, read: int, other: int | None = None) -> int:
        other = self.image() if other is None else other
        y = torch.cat([self.values[read], self.values[other]], 1)
        if y.shape[1] > 300:
            return read
        return self.enter("join", read, y, second=other)

    def pad(self, read: int) -> int:
        filters = self.values[read].shape[1] + self.random.choice([0, 5, 16])
        return self.alone("pad_channels", read, filters=filters)

    def direct(self, read: int) -> int:
        x, choice = self.values[read], self.random.choice
        residual, filters = None, choice([8, 32, 33, 64])
        if self.random.random() < 0.3:
            residual = self.image()
            filters = self.values[residual].shape[1]
        kernel, act = choice([1, 1, 3]), choice([*CLAMPS, ACTIVATIONS.index("silu")])
        groups = x.shape[1] if filters == x.shape[1] and self.random.random() < 0.5 else 1
        depth = x.shape[1] // groups
        weight = self.normal(filters, depth, kernel, kernel) / (depth * kernel**2) ** 0.5
        weight = weight.to(self.dtype)
        packed = OPS._direct_weight(weight, groups)
        constants = [packed, weight, *self.normal(2, filters)]
        added = None if residual is None else self.values[residual]
        padding = [kernel // 2] * 2
        y = OPS._direct_conv(
            x, *constants, added, [1, 1], padding, [1, 1], groups, ACTIVATIONS[act]
        )
        fields = {"filters": filters, "act": act, "window": SAME[kernel], "groups": groups}
        second = {} if residual is None else {"second": residual}
        return self.enter("direct", read, y, constants, **fields, **second)

    def normed(self, read: int) -> int:
        return self.direct(self.affine(read))

    def winograd(self, read: int) -> int:
        x, m, act = self.values[read], self.random.choice([2, 4]), self.random.choice(CLAMPS)
        filters = self.random.choice([16, 32, 40])
        weight = (self.normal(filters, x.shape[1], 3, 3) / (9 * x.shape[1]) ** 0.5).to(self.dtype)
        packed = OPS._winograd_weight(weight, m)
        constants = [packed, weight, *self.normal(2, filters)]
        y = OPS._winograd_conv(x, packed, weight, m, *constants[2:], None, [1, 1], ACTIVATIONS[act])
        fields = {"filters": filters, "act": act, "window": SAME[3]}
        return self.enter(f"winograd{m}", read, y, constants, **fields)

    def draw(self, count: int) -> None:
        kinds = [self.affine, self.direct, self.direct, self.join, self.join, self.join]
        kinds += [self.pool, self.winograd, self.pad, self.gate, self.normed, self.normed]
        for _ in range(count):
            self.random.choice(kinds)(self.image())

    def dense(self, count: int) -> None:
        """As a dense network's blocks: all that there is, and a norm, and two convolutions."""
        whole = self.pool(0)
        for _ in range(count):
            new = self.random.choice([self.direct, self.winograd])(self.normed(whole))
            whole = self.join(whole, new)

    def bring_together(self) -> None:
        """Join every value that nothing has read."""
        read = {n for i in range(0, len(self.steps), 16) for n in self.steps[i + 1 : i + 3]}
        left = [
            i
            for i, value in enumerate(self.values)
            if i not in read and value.shape[2:] == self.size
        ]
        self.random.shuffle(left)
        for other in left[1:]:
            left[0] = self.join(left[0], other)

    def expect(self, count: int) -> None:
        """That the first ``count`` steps in one call give the last one's value."""
        steps = self.steps[: 16 * count]
        x = self.values[0]
        run(torch.full_like(x, torch.nan), self.constants, steps)  # the block is used again
        y, expected = run(x, self.constants, steps), self.values[count]
        assert y.shape == expected.shape
        assert torch.equal(y, expected), (count, (y != expected).sum())
        assert torch.isfinite(y).all()


def dtypes() -> list[torch.dtype]:
    both = (torch.float32, torch.bfloat16)
    return [dtype for dtype in both if conv_bn_act_direct.available(dtype)]


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("seed", range(24))
def test_a_list_is_its_steps(seed: int, dtype: torch.dtype) -> None:
    # The larger images are many tasks, some of them done before others begin.
    drawn = Drawn(seed, dtype, batch=1 + seed % 3, size=(7, 21)[seed % 4 > 1])
    if seed % 2:
        drawn.dense(6)
    drawn.draw(20 if seed % 2 else 30)
    drawn.bring_together()
    total = len(drawn.steps) // 16
    for count in {total, *(drawn.random.randint(1, total) for _ in range(8))}:
        drawn.expect(count)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa: str) -> None:
    rerun_below(isa, "tests/test_sequence_lists.py")


def test_what_is_joined_takes_no_room_of_its_own() -> None:
    """Of a dense block there are its parts, and nothing of norms and joins."""
    drawn = Drawn(0, torch.float32, batch=1)
    whole = drawn.alone("max_pool", 0, window=SAME[3])
    for _ in range(4):
        scale, shift = drawn.normal(2, drawn.values[whole].shape[1])
        normed = drawn.alone("affine", whole, [scale, shift], act=1)
        weight = drawn.normal(16, drawn.values[normed].shape[1], 1, 1)
        constants = [OPS._direct_weight(weight, 1), weight, *drawn.normal(2, 16)]
        ones, none = [1, 1], [0, 0]
        y = OPS._direct_conv(drawn.values[normed], *constants, None, ones, none, ones, 1, "none")
        whole = drawn.join(whole, drawn.enter("direct", normed, y, constants, filters=16))
    drawn.alone("mean", whole)
    drawn.expect(len(drawn.steps) // 16)
    handle = OPS._make_sequence(drawn.constants, drawn.steps, [])
    held = OPS._sequence_bytes(drawn.values[0], handle)
    OPS._free_sequence(handle)
    assert held == -(-4 * drawn.values[whole].numel() // 64) * 64
