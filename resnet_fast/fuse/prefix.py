"""The first steps of a program as one native call (:mod:`resnet_fast.nn.sequence`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.nn.prepared import keep
from resnet_fast.nn.recorder import Recorder
from resnet_fast.nn.sequence import (
    Attempts,
    Sequence,
    Structure,
    agrees,
    build,
    may_run,
    sequence_key,
)


class Prefix:
    """The sequences of one program, by input size. Copies and pickles of it start empty.

    A sequence replaces the steps up to one whose value is all that the later steps use of them.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[int, Sequence]] = {}
        self._attempts = Attempts()

    def __reduce__(self) -> tuple[type[Prefix], tuple[()]]:
        return Prefix, ()

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], Sequence]]:
        """Image shape and sequence of each that holds."""
        known = list(self._known.items())
        return iter([(tuple(key[1]), found) for key, (_, found) in known if found.holds()])

    def run(self, inputs: list[Any]) -> tuple[int, Tensor] | None:
        """How many steps a sequence has taken from ``inputs``, and their value."""
        if len(inputs) != 1 or torch.compiler.is_compiling() or not may_run(inputs[0]):
            return None
        x = inputs[0]
        key = sequence_key(x)
        known = self._known.get(key)
        if known is None:
            return None
        count, sequence = known
        if sequence.holds():
            y = sequence(x)
            if y is not None:
                return count, y
        self._known.pop(key, None)
        return None

    def recorder(self, inputs: list[Any]) -> Recorder | None:
        """A recorder for a forward of ``inputs``, where one is due."""
        if len(inputs) != 1 or torch.compiler.is_compiling() or not may_run(inputs[0]):
            return None
        x = inputs[0]
        if not self._attempts.due(sequence_key(x)):
            return None
        return Recorder(x.contiguous(memory_format=torch.channels_last))

    def keep(
        self,
        record: Recorder,
        count: int,
        value: Tensor,
        modules: list[nn.Module],
        parents: list[nn.Module],
    ) -> None:
        """Keep the sequence of ``record``, if it does what the first ``count`` steps did.

        Args:
            record: cut to what those steps entered.
            count: of the program's steps.
            value: the last one's result.
            modules: those that the steps called.
            parents: those that they were looked up in.
        """
        x = record.x
        built = build(Structure(modules, [*parents, *modules]), record, whole=False)
        if built is None or not agrees(built, x, value):
            return
        key = sequence_key(x)
        keep(self._known, key, (count, built))
        self._attempts.succeeded(key)
