"""``accelerate()`` and ``undo()``: the accelerated model and how it stays the model."""

from __future__ import annotations

import contextlib
import copy
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.errors import AccelerateError, ArgumentError
from resnet_fast.fuse.capture import (
    SITE_CHILD,
    STATE,
    Capture,
    Graph,
    Unit,
    capture,
    conv_paths,
    copy_tree,
    is_fused_already,
)
from resnet_fast.fuse.grids import check_quantization, quantize_
from resnet_fast.fuse.match import SITES, Match, Matcher, NormMatch, call_counts
from resnet_fast.fuse.program import Program
from resnet_fast.fuse.verify import compare
from resnet_fast.nn.graphs import Replays
from resnet_fast.nn.norms import is_norm_act
from resnet_fast.nn.site import FusedSite
from resnet_fast.plan import Plan, set_plan, use


@dataclass
class Report:
    """What became of one convolution."""

    reason: str
    detail: str = ""
    #: Why an add that follows was left out of a fused site, or why nothing is fused with it.
    note: str = ""


#: The sites of one graph, and the batch norms that are part of none.
Matched = tuple[list[Match], list[NormMatch]]


@dataclass
class Acceleration:
    """What an accelerated module knows: its programs, and at the top how to go back."""

    #: By ``training``; a mode without a program runs the model's own forward.
    programs: dict[bool, Program] = field(default_factory=dict)
    origin: nn.Module | None = None
    #: (module of the original, its copy), for everything but the sites.
    pairs: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    #: By path of the convolution.
    reports: dict[str, Report] = field(default_factory=dict)
    #: Paths of the modules below that have programs.
    units: list[str] = field(default_factory=list)
    #: At the top, where it was asked for: recordings of the whole forward on CUDA.
    graphs: Replays | None = None


class Accelerated(nn.Module):
    """Mixed into the class of an accelerated module, before the class that it was made from."""

    accelerated_from: type[nn.Module]

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self.__dict__.get(STATE)
        if state is None or state.graphs is None:
            return self._run_program(*args, **kwargs)
        return state.graphs(self, self._run_program, args, kwargs)

    def _run_program(self, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(STATE)
        program = None if state is None else state.programs.get(self.training)
        if program is not None:
            inputs = program.bind(args, kwargs)
            if inputs is not None:
                ran, result = program.run(self, inputs)
                if ran:
                    return result
        return super().forward(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Convert the original, and take its parameters and buffers over again.

        Both share every tensor, and a conversion may replace tensors.
        """
        state = self.__dict__.get(STATE)
        if state is None or state.origin is None or not recurse:
            return super()._apply(fn, recurse)
        linked = _linked(state.pairs)
        state.origin._apply(fn)
        # What was put into the accelerated model afterwards is not the original's to convert.
        for module in self.modules():
            shared = linked.get(id(module))
            if shared is None:
                nn.Module._apply(module, fn, recurse=False)
                continue
            old, names = shared
            for kind in ("_parameters", "_buffers"):
                theirs, ours = old.__dict__[kind], module.__dict__[kind]
                own = nn.Module()
                for name, tensor in ours.items():
                    if (kind, name) not in names:
                        own.__dict__[kind][name] = tensor
                own._apply(fn)
                ours.update(own.__dict__[kind])
                ours.update({name: theirs[name] for k, name in names if k == kind})
            if type(module)._apply not in (nn.Module._apply, Accelerated._apply):
                module._apply(_unchanged, recurse=False)  # recurrent layers renew their weight list
        return self

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        state = self.__dict__.get(STATE)
        linked = _linked(state.pairs) if assign and state is not None else {}
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        for module in self.modules():
            if id(module) in linked:
                old, names = linked[id(module)]
                for kind, name in names:
                    old.__dict__[kind][name] = module.__dict__[kind][name]
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).accelerated_from,), self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = _blank(type(self).accelerated_from)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


_classes: weakref.WeakKeyDictionary[type, type[Accelerated]] = weakref.WeakKeyDictionary()


def accelerated_class(base: type[nn.Module]) -> type[Accelerated]:
    """The subclass of ``base`` that runs programs; one for each ``base``."""
    known = _classes.get(base)
    if known is not None:
        return known

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run(args, kwargs)

    forward.__doc__ = base.forward.__doc__
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    members = {
        "accelerated_from": base,
        "forward": forward,
        "__module__": __name__,
        "__doc__": base.__doc__,
    }
    return _classes.setdefault(
        base, type(f"Accelerated{base.__name__}", (Accelerated, base), members)
    )


def _blank(base: type[nn.Module]) -> Accelerated:
    kind = accelerated_class(base)
    return kind.__new__(kind)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _linked(
    pairs: list[tuple[nn.Module, nn.Module]],
) -> dict[int, tuple[nn.Module, list[tuple[str, str]]]]:
    """By id of the copy: the original, and which tensors the two still share."""
    linked = {}
    for old, new in pairs:
        names = [
            (kind, name)
            for kind in ("_parameters", "_buffers")
            for name, tensor in new.__dict__[kind].items()
            if name in old.__dict__[kind] and old.__dict__[kind][name] is tensor
        ]
        linked[id(new)] = (old, names)
    return linked


def accelerate(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    strict: bool = False,
    verify: bool = True,
    plan: Plan | None = None,
    cuda_graph: bool = False,
    dtype: str | None = None,
    calibration: Iterable[Any] | None = None,
) -> nn.Module:
    """A copy of ``model``'s structure that runs its convolutions fused, on the same parameters.

    ``act(bn(conv(x)) + residual)`` becomes one call wherever the traced forward allows it. The
    result is an instance of ``model``'s class with the same ``state_dict``, children and
    signature; ``model`` itself is left as it is, and :func:`undo` gives it back. What Python
    decides in ``forward``, apart from ``training``, is taken as it is now. Arguments that have a
    default keep it; a call that passes another value, hooks on a module in between, or a changed
    structure run the model's own forward, unfused.

    Args:
        model: any module. What does not trace is left as it is, what traces inside it is fused.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With
            ``verify``, one eval forward of both models on them compares every site with the
            modules that it stands for, and rolls back those beyond the error budget.
        strict: raise if nothing can be fused.
        verify: compare on ``example_inputs``. Without them each site is verified for its shapes
            when it first runs, as sites always are.
        plan: a plan to set for the process; see :func:`resnet_fast.plan.set_plan`.
        cuda_graph: run the whole forward on CUDA as one graph, in ``eval()`` without recorded
            gradients or autocast. It is recorded at the first call with inputs of a shape, and what
            ``forward`` decides by anything but its modules is taken as it was then. A forward that
            cannot be recorded runs as it does without, with a warning, and :func:`explain` says
            why.
        dtype: ``"int8"``: on a CPU in ``eval()``, without recorded gradients, ``torch.compile`` or
            ``torch.export``, the sites run on 8-bit operands, which is less exact: activations as
            uint8 on a grid for each tensor, weights as int8 with a scale a filter. Weights are
            taken as they are at each call; the grids are what ``calibration`` showed with the
            weights of that time.
        calibration: with ``dtype="int8"``, a finite iterable of batches like those that the model
            will see; some hundred images do. A batch is a tensor, a dict of keyword arguments, or a
            tuple or list of positional ones, of which those beyond ``forward``'s (labels) are left
            out.

    Raises:
        ArgumentError: if ``model`` is not a module, ``plan`` no plan, ``cuda_graph`` no bool,
            ``dtype`` another, or if one of ``dtype`` and ``calibration`` comes without the other;
            with ``dtype="int8"``, for a model that is not in fp32 on the CPU.
        LibraryError: with ``dtype="int8"``, without the native CPU library.
        AccelerateError: with ``dtype="int8"``, if no site can run on 8 bits, if the model fails on
            a batch of ``calibration`` or its activations there are not finite; with ``strict``, if
            nothing is fused; for a compiled or scripted module; if ``model`` itself fails on
            ``example_inputs``.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", "a torch.nn.Module", type(model).__name__)
    if plan is not None and not isinstance(plan, Plan):
        raise ArgumentError("plan", "a resnet_fast.plan.Plan or None", type(plan).__name__)
    if not isinstance(cuda_graph, bool):
        raise ArgumentError("cuda_graph", "a bool", repr(cuda_graph))
    if isinstance(model, torch.jit.ScriptModule):
        raise AccelerateError("a scripted module has no Python forward: accelerate its source")
    if type(model).__module__.startswith("torch._dynamo"):
        raise AccelerateError("the module is compiled: accelerate first, then torch.compile")
    check_quantization(model, dtype, calibration)
    origin = _original(model)
    root, pairs = copy_tree(origin)
    captured = capture(root)
    rejected: dict[str, str] = {}
    without_add: dict[str, str] = {}
    with use(plan) if plan is not None else contextlib.nullcontext():
        while True:
            state = _build(root, captured, rejected, without_add)
            if example_inputs is None or not verify or not state.units:
                break
            programs = [
                program
                for path in state.units
                for program in root.get_submodule(path).__dict__[STATE].programs.values()
            ]
            outcome = compare(origin, root, programs, example_inputs)
            if not (outcome.model or outcome.rejected or outcome.without_add):
                break
            rejected |= outcome.rejected
            without_add |= outcome.without_add
            _strip(root)
            if outcome.model:
                fused = [path for path, r in state.reports.items() if r.reason in SITES]
                reports = state.reports | {
                    path: Report("VERIFY_FAILED", outcome.model) for path in fused
                }
                state = _build(root, Capture(failures=captured.failures), {}, {})
                state.reports = reports
                break
    state.origin, state.pairs = origin, pairs
    state.graphs = Replays() if cuda_graph else None
    if strict and not any(r.reason in ("FUSED", "ALREADY_FUSED") for r in state.reports.values()):
        raise AccelerateError(_why_nothing(state))
    if calibration is not None:
        _quantize(root, state, calibration)
    if plan is not None:
        set_plan(plan)
    return root


def _quantize(root: nn.Module, state: Acceleration, calibration: Iterable[Any]) -> None:
    """Give the programs of eval their 8-bit forms."""
    units = [root.get_submodule(path) for path in state.units]
    programs = [(unit.__dict__[STATE].programs.get(False), unit) for unit in units]
    found = [(program, unit) for program, unit in programs if program is not None]
    if not found:
        raise AccelerateError(_why_nothing(state))
    quantize_(root, found, calibration)


def undo(accelerated: nn.Module) -> nn.Module:
    """The model that ``accelerated`` was made from: the very object.

    Raises:
        AccelerateError: if ``accelerated`` did not come from :func:`accelerate`.
    """
    state = accelerated.__dict__.get(STATE) if isinstance(accelerated, nn.Module) else None
    if state is None or state.origin is None:
        raise AccelerateError(
            f"a {type(accelerated).__name__} is nothing that accelerate() returned"
        )
    return state.origin


def _original(model: nn.Module) -> nn.Module:
    """The model to start from; for an accelerated one, what it was made from.

    Unless its structure was changed since: then the accelerated model is the one to start from.
    """
    state = model.__dict__.get(STATE)
    if state is None or state.origin is None:
        return model
    copies = {id(old): new for old, new in state.pairs}
    for old, new in state.pairs:
        theirs = {name: copies.get(id(child)) for name, child in old._modules.items()}
        ours = {name: m for name, m in new._modules.items() if name != SITE_CHILD}
        tensors = _linked([(old, new)])[id(new)][1]
        if theirs != ours or len(tensors) != len(new._parameters) + len(new._buffers):
            return model
    return state.origin


def _strip(root: nn.Module) -> None:
    """Take sites and programs off the copy again."""
    for module in list(root.modules()):
        module.__dict__.pop(STATE, None)
        for name in (SITE_CHILD, f"{SITE_CHILD}_train"):
            child = module._modules.get(name)
            if isinstance(child, FusedSite):
                del module._modules[name]


def _build(
    root: nn.Module,
    captured: Capture,
    rejected: dict[str, str],
    without_add: dict[str, str],
) -> Acceleration:
    """Match every unit, hang the sites on their convolutions, and install the programs."""
    state = Acceleration(reports=_initial_reports(root, captured))
    found: dict[str, dict[bool, Matched]] = {}
    for training in (False, True):
        having = [unit for unit in captured.units if training in unit.graphs]
        calls = call_counts(
            [unit.graphs[training] for unit in having], [unit.module for unit in having]
        )
        for unit in having:
            if training and not unit.mode_dependent:
                continue
            matched = _match(unit, unit.graphs[training], calls, rejected, without_add, state)
            found.setdefault(unit.path, {})[training] = matched
    for unit in captured.units:
        programs = _programs(unit, found[unit.path], state)
        if programs:
            state.units.append(unit.path)
        _install(unit.module, Acceleration(programs=programs), unit.module is root or programs)
    top = root.__dict__.get(STATE)
    state.programs = {} if top is None else top.programs
    _install(root, state, True)
    return state


def _initial_reports(root: nn.Module, captured: Capture) -> dict[str, Report]:
    reports = {}
    for path in conv_paths(root):
        report = Report("NOT_REACHED")
        parts = path.split(".")
        for n in range(len(parts)):
            above = ".".join(parts[:n])
            if above in captured.failures:
                report = Report(*captured.failures[above])
            elif any(unit.path == above for unit in captured.units):
                report = Report("NOT_REACHED")
            if is_fused_already(root.get_submodule(above)):
                report = Report("ALREADY_FUSED")
                break
        reports[path] = report
    return reports


def _match(
    unit: Unit,
    graph: Graph,
    calls: Counter[int],
    rejected: dict[str, str],
    without_add: dict[str, str],
    state: Acceleration,
) -> Matched:
    """What of a unit is fused, and in ``state`` the reports of its convolutions."""
    prefix = f"{unit.path}." if unit.path else ""
    own = {
        path.removeprefix(prefix): reason
        for path, reason in without_add.items()
        if path.startswith(prefix)
    }
    matcher = Matcher(graph, unit.module, calls, own)
    matches, refused = matcher.find()
    kept = []
    for match in matches:
        path = prefix + str(match.conv.target)
        if path in rejected:
            state.reports[path] = Report("VERIFY_FAILED", rejected[path])
        else:
            # One that a mode fuses and the other only calls counts as fused.
            if match.fuses or state.reports[path].reason != "FUSED":
                reason = "FUSED" if match.fuses else "ALONE"
                state.reports[path] = Report(reason, note=match.note)
            kept.append(match)
    for target, reason in refused.items():
        if state.reports.get(prefix + target, Report("")).reason not in SITES:
            state.reports[prefix + target] = Report(reason)
    return kept, matcher.norms(kept)


def _programs(unit: Unit, found: dict[bool, Matched], state: Acceleration) -> dict[bool, Program]:
    programs: dict[bool, Program] = {}
    acts: dict[str, str] = {}
    for training, (matches, norms) in found.items():
        if not matches:
            continue
        # A site has one activation: where the modes differ in it, training has sites of its own.
        child = SITE_CHILD
        if any(acts.get(str(m.conv.target), m.act) != m.act for m in matches):
            child = f"{SITE_CHILD}_train"
        for match in matches:
            target = str(match.conv.target)
            conv = unit.module.get_submodule(target)
            acts.setdefault(target, match.act)
            if child not in conv._modules:
                path = f"{unit.path}.{target}" if unit.path else target
                site = FusedSite(match.act, path)
                bn = None if match.bn is None else unit.module.get_submodule(str(match.bn.target))
                site.norm_alone = bn is not None and is_norm_act(bn)
                conv.add_module(child, site)
                site.train(conv.training)
        only = training if unit.mode_dependent else None
        program = Program(
            unit.module, unit.graphs[training], matches, norms, unit.path, only, child
        )
        programs[training] = program
        if only is None:
            programs[True] = program
    return programs


def _install(module: nn.Module, state: Acceleration, wanted: Any) -> None:
    if wanted:
        base = getattr(type(module), "accelerated_from", type(module))
        module.__class__ = accelerated_class(base)
        module.__dict__[STATE] = state


def _why_nothing(state: Acceleration) -> str:
    if not state.reports:
        return "nothing to fuse: the model has no convolution"
    counts = Counter(report.reason for report in state.reports.values())
    reasons = ", ".join(f"{code} ({count})" for code, count in counts.most_common())
    details = dict.fromkeys(r.detail for r in state.reports.values() if r.detail)
    tail = f"; first: {next(iter(details))}" if details else ""
    return f"nothing could be fused in {len(state.reports)} convolutions: {reasons}{tail}"
