"""What the tests of sequences share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fast.fuse.capture import STATE
from resnet_fast.nn.recorder import KINDS
from resnet_fast.ops import _checks

needs_sequences = pytest.mark.skipif(
    not _checks.has_op("_run_sequence"), reason="the CPU op library is not loaded"
)

OPS = torch.ops.resnet_fast


def step(kind: str, read: int, made: int, **fields: Any) -> list[int]:
    window = fields.get("window", (1, 1, 1, 1, 0, 0, 1, 1))
    return [
        KINDS[kind],
        read,
        fields.get("second", -1),
        made,
        fields.get("constants", -1),
        fields.get("act", 0),
        fields.get("filters", 0),
        *window,
        fields.get("groups", 1),
    ]


def run(x: Tensor, constants: list[Tensor], steps: list[int], watched: Any = ()) -> Tensor:
    handle = OPS._make_sequence(constants, steps, list(watched))
    try:
        return OPS._run_sequence(x.contiguous(memory_format=torch.channels_last), handle)
    finally:
        OPS._free_sequence(handle)


def convolution(filters: int = 32, channels: int = 32, kernel: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(filters, channels, kernel, kernel, generator=generator)
    packed = torch.ops.resnet_fast._direct_weight(weight, 1)
    return [packed, weight, torch.ones(filters), torch.zeros(filters)]


@contextmanager
def threads_set(count: int) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def found(net: nn.Module) -> list[Any]:
    """The sequences of an accelerated model in eval()."""
    return [sequence for _, sequence in net.__dict__[STATE].programs[False].prefix]


def by_step(net: nn.Module, x: Tensor) -> Tensor:
    """An accelerated model of ``x`` with every step run for itself."""
    program = net.__dict__[STATE].programs[False]
    cuts, program.cuts = program.cuts, []
    try:
        return net(x)
    finally:
        program.cuts = cuts
