"""The first steps of a program as one native call (:mod:`resnet_fast.nn.sequence`)."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.fuse.capture import is_hooked
from resnet_fast.fuse.steps import Ref, Step
from resnet_fast.nn.prepared import keep
from resnet_fast.nn.recorder import Recorder
from resnet_fast.nn.sequence import (
    Attempts,
    Sequence,
    Structure,
    agrees,
    build,
    image_mean,
    may_run,
    sequence_key,
)

# What ``Tensor.mean`` takes to give the mean over an image at unchanged rank.
_OVER_IMAGES: tuple[tuple[Any, Any], ...] = (
    (((2, 3),), {"keepdim": True}),
    (([2, 3],), {"keepdim": True}),
    (((-2, -1),), {"keepdim": True}),
    (((2, 3), True), {}),
    (([2, 3], True), {}),
)
_PRODUCTS = (operator.mul, torch.mul)


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


def mean_by(target: Any, args: Any, kwargs: Any, slots: list[Any]) -> Tensor | None:
    """A step's result where it is the mean over an image, and a sequence would compute it.

    Computed as it would be, so that a network's result does not depend on which of the two ran.
    """
    if not _is_mean(target, args, kwargs):
        return None
    return image_mean(slots[args[0].slot])


def _is_mean(target: Any, args: Any, kwargs: Any) -> bool:
    """Whether a step with a module or a method of this name is the mean over each image."""
    if type(target) is nn.AdaptiveAvgPool2d:
        plain = len(args) == 1 and type(args[0]) is Ref and not kwargs
        return plain and target.output_size in (1, (1, 1)) and not is_hooked(target)
    return target == "mean" and type(args[0]) is Ref and (args[1:], kwargs) in _OVER_IMAGES


def enter(recorder: Recorder, step: Step, modules: list[nn.Module], read: list[Any], y: Any) -> int:
    """Enter a step that is no site, where a sequence knows it: pooling, and gates of channels.

    Args:
        read: the values that it read.
        y: its result.

    Returns how many steps a sequence has for it: none for an identity, else one.
    """
    if not all(isinstance(value, Tensor) for value in (*read, y)):
        return 1
    target: Any = step.target
    if step.kind == "module":
        target = modules[target.container]._modules[target.name]
        if type(target) is nn.Identity and len(read) == 1 and y is read[0]:
            return 0
    if step.kind in ("module", "method") and _is_mean(target, step.args, step.kwargs):
        recorder.mean(read[0], y, target if step.kind == "module" else None)
    elif step.kind == "module":
        if len(read) == len(step.args) == 1 and not step.kwargs:
            recorder.max_pool(target, read[0], y)
    elif target in _PRODUCTS and len(read) == len(step.args) == 2 and not step.kwargs:
        x, by = read if read[0].shape == y.shape else reversed(read)
        recorder.gate(x, by, y)
    return 1
