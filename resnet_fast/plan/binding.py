"""From a site to the candidate that runs there: the active plan, else the default order.

Every choice passes verification first (its verdict may come from the cache). ``aten`` needs none:
it is the framework's own path.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from resnet_fast.plan import cache
from resnet_fast.plan.candidate import (
    CANDIDATES,
    MUST_WIN,
    Candidate,
    ConvArgs,
    default_order,
)
from resnet_fast.plan.measure import measure
from resnet_fast.plan.plan import Entry, Plan
from resnet_fast.plan.site import Site, device_name, stand_in
from resnet_fast.plan.verify import framework_batch, verify


@dataclass
class Binding:
    """What runs at a site, and why: the facts of one ``explain()`` row."""

    candidate: Candidate
    reason: str
    error: float | None = None
    limit: float | None = None
    microseconds: float | None = None
    notes: list[str] = field(default_factory=list)


# Runs a candidate on the tensors of the call that is being decided.
Call = Callable[[Candidate], Tensor]

_state = threading.local()
# Bindings made under an older generation are stale; bumped when the process's plan changes.
_generation = 0
_process_plan: Plan | None = None


def generation() -> int:
    """Changes whenever bindings have to be looked up again."""
    return _generation


def active_plan() -> Plan | None:
    """The plan in force, or None for the default order."""
    return _process_plan


def _set_plan(plan: Plan | None) -> None:
    global _process_plan, _generation
    _process_plan = plan
    _generation += 1


@contextlib.contextmanager
def use(plan: Plan | None) -> Iterator[None]:
    """Let ``plan`` decide within the block, for every model of the process."""
    before = _process_plan
    _set_plan(plan)
    try:
        yield
    finally:
        _set_plan(before)


@contextlib.contextmanager
def as_if_on(device: str) -> Iterator[None]:
    """Within the block, bind the sites of meta tensors as on ``device``, by its name in a plan.

    Nothing runs on meta tensors, so nothing can be compared: candidates are taken as verified
    there, and the bindings say ``ASSUMED``.
    """
    token = stand_in.set(device)
    _set_plan(_process_plan)
    try:
        yield
    finally:
        stand_in.reset(token)
        _set_plan(_process_plan)


def verified(site: Site, candidate: Candidate, device: torch.device) -> tuple[bool, float, float]:
    """``(ok, error, limit)`` of ``candidate`` at ``site``, from the cache or a fresh comparison.

    A verdict holds where the framework runs the algorithm that the candidate was compared with. On
    the meta device, where there is nothing to compare, every candidate is taken as verified.
    """
    if device.type == "meta":
        return True, 0.0, 0.0
    key = f"{site.key}|{framework_batch(site, device)[0]}"
    if candidate.variant is not None:
        key += f"|{candidate.variant(site)}"
    kept = cache.get(key, candidate.name)
    if kept is None:
        verdict = verify(site, candidate, device)
        cache.put(key, candidate.name, ok=verdict.ok, error=verdict.error, limit=verdict.limit)
        return verdict.ok, verdict.error, verdict.limit
    return kept["ok"], kept["error"], kept["limit"]


def _race(
    order: Sequence[str], site: Site, device: torch.device, call: Call | None
) -> dict[str, float]:
    """Microseconds of the order's candidates that have to win, and of the first that need not.

    Only verified ones run. Empty where nothing can be measured.
    """
    if call is None or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return {}
    runs: dict[str, Callable[[], Tensor]] = {}
    for name in order:
        candidate = CANDIDATES[name]
        if candidate.reject(site) is not None:
            continue
        if name != "aten" and not verified(site, candidate, device)[0]:
            continue
        runs[name] = functools.partial(call, candidate)
        if name not in MUST_WIN:
            break
    return measure(runs, device)


def resolve(site: Site, device: torch.device, call: Call | None = None) -> Binding:
    """The binding of ``site``: the first candidate of the plan's or default order that holds.

    ``call`` runs a candidate on the tensors at hand. The default order's candidates that have to
    win a measurement (:data:`resnet_fast.plan.candidate.MUST_WIN`) are passed over without it.
    """
    plan = _process_plan
    entry = plan.entries.get(site.key) if plan is not None else None
    order = default_order(site)
    if entry is not None:
        order = (entry.candidate, *(name for name in order if name != entry.candidate))
    notes: list[str] = []
    mismatch = False
    times: dict[str, float] | None = None
    for name in order:
        candidate = CANDIDATES[name]
        refusal = candidate.reject(site)
        if refusal is not None:
            notes.append(f"{name}: {refusal}")
            continue
        timed = entry.microseconds if entry is not None and entry.candidate == name else None
        if name == "aten":
            if mismatch:
                reason = "MISMATCH"
                _warn(site, notes, "the framework's own path")
            elif entry is not None and entry.candidate == "aten":
                reason = "FRAMEWORK"
            else:
                reason = "NO_CANDIDATE"
            return Binding(candidate, reason, microseconds=timed, notes=notes)
        ok, error, limit = verified(site, candidate, device)
        if ok and device.type == "meta":
            return Binding(candidate, "ASSUMED", notes=notes)
        if ok and name in MUST_WIN and (entry is None or entry.candidate != name):
            if times is None:
                times = _race(order[order.index(name) :], site, device, call)
            if not times:
                notes.append(f"{name}: not measured here")
                continue
            # Of two equals the later: it needs no trust.
            if min(reversed(times), key=times.__getitem__) != name:
                listed = ", ".join(f"{key} {value:.0f} us" for key, value in times.items())
                notes.append(f"{name}: slower here ({listed})")
                continue
            timed = round(times[name], 2)
        if ok:
            return Binding(candidate, "OK", error, limit, timed, notes)
        mismatch = True
        notes.append(f"{name}: error {error:.3g} beyond the limit {limit:.3g}")
        if entry is not None and entry.candidate == name:
            _warn(site, notes, "the default order")
    raise AssertionError("aten accepts every site")


def _warn(site: Site, notes: list[str], instead: str) -> None:
    """Say that a plan's choice, or every fused candidate, left the budget.

    One candidate of the default order giving way to the next is no news: its note is in explain().
    """
    warnings.warn(
        f"resnet_fast: left the error budget at {site.key}: {'; '.join(notes)}; the site runs on "
        f"{instead}",
        stacklevel=3,
    )


def tuning() -> Plan | None:
    """The plan that this thread is measuring into, or None."""
    return getattr(_state, "tuning", None)


def grouping() -> Plan | None:
    """The plan that this thread enters its choices of layer groups into, or None."""
    return getattr(_state, "grouping", None)


def tune_site(plan: Plan, site: Site, x: Tensor, args: ConvArgs, residual: Tensor | None) -> None:
    """Measure every candidate that accepts ``site`` and holds, and enter the fastest."""
    if site.key in plan.entries:
        return
    figures: dict[str, tuple[float | None, float | None]] = {}
    runs = {}
    for name, candidate in CANDIDATES.items():
        if candidate.reject(site) is not None:
            continue
        error = limit = None
        if name != "aten":
            ok, error, limit = verified(site, candidate, x.device)
            if not ok:
                continue
        figures[name] = (error, limit)
        runs[name] = lambda c=candidate: c.run(x, args, residual, site.act)
    medians = measure(runs, x.device)
    winner = min(medians, key=medians.__getitem__)
    plan.entries[site.key] = Entry(
        winner,
        *figures[winner],
        microseconds=round(medians[winner], 2),
        measured={name: round(value, 2) for name, value in medians.items()},
    )


def tune(model: nn.Module, *example_inputs: Tensor, plan: Plan | None = None) -> Plan:
    """Measure the candidates of every site that ``model`` reaches, and return the plan.

    Args:
        model: a model of this package or an accelerated one; its mode is restored.
        example_inputs: what to call it with; their batch is the one measured.
        plan: a plan to extend; sites that it already has are kept.

    The model is put under the plan with :func:`use`, or for good with :func:`set_plan`.
    """
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    if plan is None:
        plan = Plan(device_name(device))
    if example_inputs:
        plan.batch = int(example_inputs[0].shape[0])
    modes = {module: module.training for module in model.modules()}
    _state.tuning = plan
    try:
        model.eval()
        with torch.inference_mode():
            model(*example_inputs)
            _state.tuning = None
            if device.type != "cpu":
                # Kernels that stand for several layers are measured against the fastest of those.
                _state.grouping = plan
                with use(plan):
                    model(*example_inputs)
    finally:
        _state.tuning = _state.grouping = None
        for module, mode in modes.items():
            module.training = mode
    return plan


def set_plan(plan: Plan | None) -> None:
    """Let ``plan`` decide for every model of this process from now on; None undoes that."""
    _set_plan(plan)
