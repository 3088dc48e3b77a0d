"""The first steps of a program as one native call (:mod:`resnet_fast.nn.sequence`)."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resnet_fast import _library
from resnet_fast.fuse.capture import is_hooked
from resnet_fast.fuse.steps import Ref, Step
from resnet_fast.nn.alone import Linears, Norms
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

_AXES: tuple[Any, ...] = ((2, 3), [2, 3], (-2, -1), [-2, -1])
# What ``Tensor.mean`` takes to give the mean over an image: at unchanged rank, and as rows.
_OVER_IMAGES: tuple[tuple[Any, Any], ...] = (
    *(((axes,), {"keepdim": True}) for axes in _AXES),
    *(((axes, True), {}) for axes in _AXES),
)
_AS_ROWS: tuple[tuple[Any, Any], ...] = tuple(((axes,), {}) for axes in _AXES)
_ONE_PIXEL = (1, (1, 1), [1, 1])
_PRODUCTS = (operator.mul, torch.mul)
_JOINS = (torch.cat, torch.concat, torch.concatenate)


class Prefix:
    """The sequences of one program, by input size. Copies and pickles of it start empty.

    A sequence replaces the steps up to one whose value is all that the later steps use of them.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[int, Sequence]] = {}
        self._attempts = Attempts()
        #: The linear layers behind a mean, where they run for themselves.
        self.linears = Linears()
        #: The same of norms that no convolution comes before.
        self.norms = Norms()

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
        _library.release_memory()  # what verification has left
        return Recorder(x.contiguous(memory_format=torch.channels_last))

    def keep(
        self,
        record: Recorder,
        count: int,
        value: Tensor,
        modules: list[nn.Module],
        parents: list[nn.Module],
        modal: bool,
    ) -> None:
        """Keep the sequence of ``record``, if it does what the first ``count`` steps did.

        Args:
            record: cut to what those steps entered.
            count: of the program's steps.
            value: the last one's result.
            modules: those that the steps called.
            parents: those that they were looked up in, from the root on.
            modal: whether the program is of one mode, and so of modules that are all in it.
        """
        x = record.x
        structure = Structure(modules, [*parents, *modules], parents[1:], modal)
        built = build(structure, record, whole=value.dim() == 2)
        if built is None or not agrees(built, x, value):
            return
        key = sequence_key(x)
        keep(self._known, key, (count, built))
        self._attempts.succeeded(key)


def mean_by(target: Any, args: Any, kwargs: Any, slots: list[Any]) -> Tensor | None:
    """A step's result where it is the mean over an image, and a sequence would compute it.

    Computed as it would be, so that a network's result does not depend on which of the two ran.
    """
    rank = _mean_rank(target, args, kwargs)
    if rank == 0:
        return None
    y = image_mean(slots[args[0].slot])
    return y.flatten(1) if y is not None and rank == 2 else y


def _mean_rank(target: Any, args: Any, kwargs: Any) -> int:
    """The rank of the result where a step with a module, function or method of this name is the
    mean over each image, else 0."""
    if not args or type(args[0]) is not Ref:
        return 0
    if type(target) is nn.AdaptiveAvgPool2d:
        plain = len(args) == 1 and not kwargs
        return 4 if plain and target.output_size in _ONE_PIXEL and not is_hooked(target) else 0
    if target is F.adaptive_avg_pool2d:
        sizes = (*args[1:], *(kwargs.values() if set(kwargs) == {"output_size"} else ()))
        return 4 if len(sizes) == 1 and sizes[0] in _ONE_PIXEL else 0
    if target != "mean":
        return 0
    return 4 if (args[1:], kwargs) in _OVER_IMAGES else 2 if (args[1:], kwargs) in _AS_ROWS else 0


def follows_mean(node: fx.Node, root: nn.Module) -> bool:
    """Whether a call's input is the mean over each image, perhaps flattened, or thinned out in
    training: what a classifier reads."""
    while node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        target: Any = node.target
        if node.op == "call_module":
            target = root.get_submodule(str(target))
            if isinstance(target, nn.AdaptiveAvgPool2d):
                return True
            if not isinstance(target, (nn.Flatten, nn.Dropout, nn.Identity)):
                return False
        elif target in (F.adaptive_avg_pool2d, "mean"):
            return True
        elif target not in (torch.flatten, F.dropout, "flatten"):
            return False
    return False


def enter(recorder: Recorder, step: Step, modules: list[nn.Module], read: list[Any], y: Any) -> int:
    """Enter a step that is no site, where a sequence knows it: pooling, gates of channels, and what
    leads to a classifier.

    Args:
        read: the values that it read.
        y: its result.

    Returns how many steps a sequence has for it: none for an identity, one less than there are
    values that are joined, else one.
    """
    if not all(isinstance(value, Tensor) for value in (*read, y)):
        return 1
    target: Any = step.target
    if step.kind == "module":
        target = modules[target.container]._modules[target.name]
    if len(read) == 1 and _is_identity(target, read[0], y):
        recorder.same(read[0], y, target if type(target) is nn.Flatten else None)
        return 0
    if _mean_rank(target, step.args, step.kwargs) > 0:
        recorder.mean(read[0], y, target if step.kind == "module" else None)
    elif step.kind == "module":
        if len(read) == len(step.args) == 1 and not step.kwargs:
            recorder.max_pool(target, read[0], y)
            recorder.average_pool(target, read[0], y)
    elif _joins(target, step):
        return recorder.join(read, y)
    elif target in _PRODUCTS and len(read) == len(step.args) == 2 and not step.kwargs:
        x, by = read if read[0].shape == y.shape else reversed(read)
        recorder.gate(x, by, y)
    return 1


def values_of(args: Any, slots: list[Any]) -> list[Any]:
    """The values that a step's positional arguments name, those in a list of them included."""
    found = []
    for arg in args:
        if isinstance(arg, Ref):
            found.append(slots[arg.slot])
        elif isinstance(arg, (tuple, list)):
            found += [slots[item.slot] for item in arg if isinstance(item, Ref)]
    return found


def _joins(target: Any, step: Step) -> bool:
    """Whether a step puts the channels of images side by side."""
    if target not in _JOINS or len(step.args) not in (1, 2):
        return False
    several = isinstance(step.args[0], (tuple, list)) and all(
        isinstance(item, Ref) for item in step.args[0]
    )
    dim = step.args[1] if len(step.args) == 2 else step.kwargs.get("dim")
    return several and dim in (1, -3) and set(step.kwargs) <= {"dim"}


def _is_identity(target: Any, x: Tensor, y: Tensor) -> bool:
    """Whether a step hands on ``x``, or its rows where an image is one pixel."""
    if type(target) in (nn.Identity, nn.Dropout) or target is F.dropout:
        return y is x
    flattens = type(target) is nn.Flatten or target in (torch.flatten, "flatten")
    return flattens and x.dim() == 4 and y.shape == x.shape[:2]
