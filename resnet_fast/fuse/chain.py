"""A program's residual blocks as chains: what nn/chain.py does for this package's own networks.

In the steps of a rewritten graph a block's tail is a site with a residual and what feeds it:

    i  site  conv2      inner -> h2        read by step k alone
    j  site  down       x -> shortcut      read by step k alone, no activation; or no such step
    k  site  conv3      h2, shortcut -> y
    l  site  next conv1 y -> h             wherever it stands

All of it can run where ``k`` stands: what it reads is there by then, and ``h`` earlier than asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast import _library
from resnet_fast.fuse.match import module_activation
from resnet_fast.fuse.steps import Ref, SiteTarget, Step, leaves_of
from resnet_fast.nn.chain import Pair, Place, is_joinable, may_run
from resnet_fast.nn.guarded import guard_of, is_capturing, is_regular
from resnet_fast.nn.prepared import keep
from resnet_fast.nn.sequence import Structure
from resnet_fast.nn.stem import POOL, StemPlace, is_stem
from resnet_fast.ops import _pack
from resnet_fast.plan import binding as _binding
from resnet_fast.plan.chain import MAX_NEXT
from resnet_fast.plan.plan import LAYERS

if TYPE_CHECKING:
    from resnet_fast.fuse.program import Program


class Group(NamedTuple):
    """Steps that one kernel stands for, by index, and the slots that it reads and writes.

    Of a stem, which is a site and a pooling, ``inner`` is the image, and there is no ``x``.
    """

    place: Place | StemPlace
    steps: tuple[int, ...]  # in order; the one that the kernel runs at is ``at``
    at: int
    inner: int
    x: int | None
    y: int
    h: int | None
    path: str


def groups_of(program: Program, modules: list[nn.Module]) -> list[Group]:
    """The chains among the steps of ``program``, in order, no step in two of them."""
    steps = program.steps
    made = {step.out: index for index, step in enumerate(steps)}
    readers: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        for slot in _slots((step.args, step.kwargs)):
            readers.setdefault(slot, []).append(index)
    pairs = {i: _regular(step, modules) for i, step in enumerate(steps) if step.kind == "site"}
    taken: set[int] = set()

    def alone(slot: int, by: int) -> int | None:
        """The step that makes ``slot``, where ``by`` alone reads it."""
        index = made.get(slot)
        free = index is not None and index not in taken and readers[slot] == [by]
        return index if free and slot != program.result else None

    def site(index: int | None, act: str) -> Pair:
        """The modules of a regular site without a residual."""
        if index is None or pairs.get(index) is None:
            return None
        fits = steps[index].target.act == act and steps[index].args[1] is None
        return pairs[index] if fits else None

    found: list[Group] = []
    for k, step in enumerate(steps):
        if step.kind == "module" and len(step.args) == 1 and not step.kwargs:
            before = alone(step.args[0].slot, k) if isinstance(step.args[0], Ref) else None
            stem = site(before, "relu")
            if (
                before is not None
                and stem is not None
                and is_stem(stem[0], _modules(step, modules)[0])
            ):
                place = StemPlace(*stem)
                inner = steps[before].args[0].slot
                found.append(Group(place, (before, k), k, inner, None, step.out, None, "stem"))
                taken.update((before, k))
            continue
        last = pairs.get(k)
        if last is None or k in taken or step.target.act != "relu" or step.args[1] is None:
            continue
        members = [k]
        inner, x = step.args[0].slot, step.args[1].slot
        conv2 = conv3 = following = None
        basic = last[0].kernel_size == (3, 3)
        if basic and is_joinable(last[0], None) and last[0].stride == (1, 1):
            conv2 = last
        elif _is_pointwise(last[0], 1):
            conv3 = last
            before = alone(inner, k)
            conv2 = site(before, "relu")
            if before is not None and conv2 is not None and is_joinable(conv2[0]):
                members.append(before)
                inner = steps[before].args[0].slot
            else:
                conv2 = None
        else:
            continue
        beside = alone(x, k)
        down = site(beside, "none")
        if beside is not None and down is not None and _is_pointwise(down[0], 2):
            members.append(beside)
            x = steps[beside].args[0].slot
        else:
            down = None
        h = None
        for behind in readers.get(step.out, ()) if conv3 is not None else ():
            following = site(behind, "relu")
            if following is not None and behind not in taken:
                conv = following[0]
                if _is_pointwise(conv, 1) and conv.out_channels <= MAX_NEXT:
                    members.append(behind)
                    h = steps[behind].out
                    break
            following = None
        chain = Place(conv2, conv3, down, following)
        # What the chain reads at k may have been dropped behind its last reader before.
        dropped = {slot for r in range(k) if r not in members for slot in steps[r].free}
        if chain.saves and not {inner, x} & dropped:
            taken.update(members)
            path = step.target.path.rpartition(".")[0]
            found.append(Group(chain, tuple(sorted(members)), k, inner, x, step.out, h, path))
    return found


def _slots(arg: Any) -> Iterator[int]:
    if isinstance(arg, Ref):
        yield arg.slot
    elif isinstance(arg, (tuple, list)):
        for item in arg:
            yield from _slots(item)
    elif isinstance(arg, dict):
        yield from _slots(list(arg.values()))
    elif isinstance(arg, slice):
        yield from _slots([arg.start, arg.stop, arg.step])


def _is_pointwise(conv: Any, most: int) -> bool:
    """Whether a convolution is 1x1 and dense, its stride at most ``most`` each way."""
    geometry = (conv.kernel_size, conv.padding, conv.groups)
    strides = ((1, 1), (2, 2))[:most]
    return geometry == ((1, 1), (0, 0), 1) and conv.stride in strides


def _regular(step: Step, modules: list[nn.Module]) -> Pair:
    """The convolution and norm of a site that is what was matched, in eval; else None."""
    target: SiteTarget = step.target
    called = _modules(step, modules)
    conv, bn = called[0], called[1] if target.bn is not None else None
    act = called[-1] if target.act_module is not None else None
    if bn is None or not is_regular(conv, bn) or target.child not in conv._modules:
        return None
    if act is not None and module_activation(act) != target.act:
        return None
    return conv, bn


def _modules(step: Step, modules: list[nn.Module]) -> list[Any]:
    return [modules[leaf.container]._modules[leaf.name] for leaf in leaves_of(step)]


class Chained:
    """The chains of a program for inputs of one kind, decided at their first run."""

    def __init__(
        self, groups: list[Group], called: list[nn.Module], parents: list[nn.Module]
    ) -> None:
        self.groups = groups
        self.generation, self.epoch = _binding.generation(), _pack.epoch()
        self._guard = guard_of(*called, parents=parents)
        for pool in called:
            if isinstance(pool, nn.MaxPool2d):
                for name in POOL:
                    self._guard.same(pool.__dict__, name, pool.__dict__[name])
        self.chosen: dict[int, Any] = {}
        self.lines: list[str] = []

    def holds(self) -> bool:
        """Whether the modules, their parameters and the plan are what they were."""
        return (
            self.generation == _binding.generation()
            and self.epoch == _pack.epoch()
            and self._guard.holds()
        )

    def __call__(
        self, program: Program, modules: list[nn.Module], slots: list[Any], contiguous: bool
    ) -> None:
        """Run every step of ``program``, the groups as they were chosen; the first time, choose."""
        skipped = {index for group in self.groups for index in group.steps}
        ends = {group.at: group for group in self.groups}
        for index, step in enumerate(program.steps):
            group = ends.get(index)
            if group is None:
                if index not in skipped:
                    program._run_steps([step], modules, slots, contiguous)
                continue
            steps = [program.steps[i] for i in group.steps]
            place = group.place
            fits = isinstance(place, StemPlace) or place.fits(slots[group.inner], slots[group.x])  # type: ignore[index]
            if fits and index not in self.chosen:
                self._choose(group, steps, program, modules, slots, contiguous)
            chain = self.chosen.get(index) if fits else None
            if chain is None:
                program._run_steps(_kept(steps), modules, slots, contiguous)
            else:
                self._run(group, chain, slots)
            # What the group's steps were the last to read, as far as nothing behind it reads it.
            for step in steps:
                for slot in step.free:
                    if slot not in (group.y, group.h):
                        slots[slot] = None

    @staticmethod
    def _run(group: Group, kernel: Any, slots: list[Any]) -> None:
        if group.x is None:
            slots[group.y] = kernel(slots[group.inner])
            return
        slots[group.y], h = kernel(slots[group.inner], slots[group.x])
        if group.h is not None:
            slots[group.h] = h

    def _choose(
        self,
        group: Group,
        steps: list[Step],
        program: Program,
        modules: list[nn.Module],
        slots: list[Any],
        contiguous: bool,
    ) -> None:
        def layers() -> Any:
            copied = list(slots)
            program._run_steps(_kept(steps), modules, copied, contiguous)
            return copied[group.y]

        inner = slots[group.inner]
        kernel: Any
        if isinstance(group.place, StemPlace):
            choice, kernel = group.place.decide(inner, layers)
        else:
            assert group.x is not None
            choice, kernel = group.place.decide(inner, slots[group.x], layers)
        self.chosen[group.at] = None if choice.name == LAYERS else kernel
        self.lines.append(f"{group.path}: {group.place.describe(choice)}")


def _kept(steps: list[Step]) -> list[Step]:
    return [step._replace(free=()) for step in steps]


class ProgramChains:
    """The chains of one program, by kind of input. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._known: dict[Any, Chained] = {}

    def __reduce__(self) -> tuple[type[ProgramChains], tuple[()]]:
        return ProgramChains, ()

    def lines(self) -> Iterator[str]:
        """What was chosen, for ``explain()``."""
        for key, chained in list(self._known.items()):
            if chained.holds():
                size = "x".join(map(str, key[1]))
                for line in chained.lines:
                    yield f"{line} (batch {key[0]}, {size})"

    def find(self, program: Program, modules: list[nn.Module], inputs: list[Any]) -> Chained | None:
        """The chains to run ``inputs`` by, or None where none are to."""
        if torch.compiler.is_compiling() or not inputs or not may_run(inputs[0]):
            return None
        x: Tensor = inputs[0]
        key = (1 << (x.shape[0] - 1).bit_length(), tuple(x.shape[1:]), x.dtype, x.device)
        found = self._known.get(key)
        if found is not None and found.holds():
            return found
        if is_capturing(x) or _library.native() is None:
            return None
        groups = groups_of(program, modules)
        called = [
            module
            for group in groups
            for index in group.steps
            for module in _modules(program.steps[index], modules)
        ]
        if not groups or not Structure.below(*called).is_plain():
            return None
        convolutions = [m for m in called if isinstance(m, nn.Conv2d)]
        if any(conv.weight.dtype is not x.dtype for conv in convolutions):
            return None
        stems = [group.place for group in groups if isinstance(group.place, StemPlace)]
        if any(stem.conv.in_channels != x.shape[1] for stem in stems):
            return None  # the layers say what is wrong
        found = Chained(groups, called, modules)
        keep(self._known, key, found)
        return found
