"""The steps of a program, as data: what they read, look up and call, and how they pickle."""

from __future__ import annotations

import builtins
import inspect
import math
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

_FUNCTION_HOMES = {
    "torch.nn.functional": F,
    "torch": torch,
    "operator": operator,
    "builtins": builtins,
    "math": math,
}


class Ref:
    """An argument that is the value in a slot."""

    __slots__ = ("slot",)

    def __init__(self, slot: int) -> None:
        self.slot = slot

    def __repr__(self) -> str:
        return f"%{self.slot}"


class Leaf(NamedTuple):
    """A module by its container's index and its name there."""

    container: int
    name: str


class SiteTarget(NamedTuple):
    """The modules of a site and what they compute together."""

    conv: Leaf
    bn: Leaf | None
    act_module: Leaf | None
    act: str
    child: str
    path: str
    #: Whether of a norm with an activation of its own the site takes the norm alone.
    norm_alone: bool = False


class NormTarget(NamedTuple):
    """A batch norm that no convolution comes before, and the activation behind it."""

    bn: Leaf
    act_module: Leaf | None
    act: str
    #: Whether of a norm with an activation of its own the step takes the norm alone.
    norm_alone: bool


class Step(NamedTuple):
    """``slots[out] = kind(target)(*args, **kwargs)``, then the slots in ``free`` are dropped."""

    kind: str
    out: int
    target: Any
    args: Any
    kwargs: Any
    free: tuple[int, ...]


class Link(NamedTuple):
    """A container of the traced structure: its parent's index, its name, its children's count."""

    parent: int
    name: str
    size: int


class Named(NamedTuple):
    """A function on its way through pickle."""

    home: str
    name: str


def loaded(arg: Any, slots: list[Any]) -> Any:
    kind = type(arg)
    if kind is Ref:
        return slots[arg.slot]
    if kind is tuple:
        return tuple([loaded(item, slots) for item in arg])
    if kind is list:
        return [loaded(item, slots) for item in arg]
    if kind is dict:
        return {key: loaded(item, slots) for key, item in arg.items()}
    if kind is slice:
        return slice(loaded(arg.start, slots), loaded(arg.stop, slots), loaded(arg.step, slots))
    if isinstance(arg, tuple):
        return kind(*[loaded(item, slots) for item in arg])
    return arg


def leaves_of(step: Step) -> list[Leaf]:
    """The modules that a step looks up."""
    if step.kind == "site":
        found = (step.target.conv, step.target.bn, step.target.act_module)
        return [leaf for leaf in found if leaf is not None]
    if step.kind == "affine":
        behind = step.target.act_module
        return [step.target.bn] if behind is None else [step.target.bn, behind]
    return [step.target] if step.kind == "module" else []


def reads_of(step: Step) -> set[int]:
    """The slots that a step reads."""
    found: set[int] = set()
    _reads((step.args, step.kwargs), found)
    return found


def cuts_of(steps: list[Step], inputs: int) -> list[int]:
    if inputs != 1:
        return []
    reads: list[set[int]] = []
    for step in steps:
        found = reads_of(step)
        # While a program is recorded its input is in channels-last, which to a site is the same.
        if 0 in found and step.kind != "site":
            return []
        reads.append(found)
    cuts = []
    later: set[int] = set()  # what the steps from here on read of those before
    for count in range(len(steps) - 1, 0, -1):
        later = (later - {steps[count].out}) | reads[count]
        if later == {steps[count - 1].out}:
            cuts.append(count)
    return cuts[::-1]


def _reads(arg: Any, found: set[int]) -> None:
    if isinstance(arg, Ref):
        found.add(arg.slot)
    elif isinstance(arg, (tuple, list)):
        for item in arg:
            _reads(item, found)
    elif isinstance(arg, dict):
        _reads(list(arg.values()), found)
    elif isinstance(arg, slice):
        _reads([arg.start, arg.stop, arg.step], found)


def to_name(target: Any) -> Any:
    if not callable(target) or inspect.isclass(target):
        return target
    name = getattr(target, "__name__", "")
    for home, module in _FUNCTION_HOMES.items():
        if getattr(module, name, None) is target:
            return Named(home, name)
    return target


def from_name(target: Any) -> Any:
    if isinstance(target, Named):
        return getattr(_FUNCTION_HOMES[target.home], target.name)
    return target
