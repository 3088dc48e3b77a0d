"""Several layers as one kernel, or one by one: which of them runs at a place.

A kernel that stands for a group of layers replaces kernels that have been chosen already, so it
has two hurdles: it is verified against fp64 as every candidate is, and it must win a measurement
against those layers, and against its like, on the device at hand, on the tensors at hand. Both are
paid at first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from resnet_fast.plan import binding, cache
from resnet_fast.plan.measure import measure
from resnet_fast.plan.plan import LAYERS, Entry
from resnet_fast.testing.budget import Verdict


@dataclass(frozen=True)
class Choice:
    """What runs, ``LAYERS`` or a kernel's name, and why: the facts of a line of ``explain()``.

    ``notes`` says which kernels were not in the running.
    """

    name: str
    reason: str
    error: float | None = None
    limit: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        facts = [] if self.error is None else [f"error {self.error:.1e} of {self.limit:.1e}"]
        facts += [f"{name} {value:.0f} us" for name, value in self.measured.items()]
        return ", ".join([f"{self.name} ({self.reason})", *facts, *self.notes])


def choose(
    key: str,
    device: torch.device,
    verify: Mapping[str, Callable[[], Verdict]],
    runs: Mapping[str, Callable[[], Any]],
    variant: str = "",
) -> Choice:
    """Decide between kernels and the layers that they stand for.

    Args:
        key: the place's identity without the batch: of the cache's verdicts and of plan entries.
        device: where it runs. On ``meta`` nothing does: the first kernel is taken as it is.
        verify: by kernel, the comparison with fp64.
        runs: a call each, by kernel and under ``LAYERS``, on the tensors at hand.
        variant: what the verdicts depend on beside the key.

    An entry of the plan in force decides without a measurement, never without verification.
    """
    if not verify:
        return Choice(LAYERS, "NO_CANDIDATE")
    plan = binding.active_plan()
    entry = plan.entries.get(key) if plan is not None else None
    if entry is not None and entry.candidate == LAYERS:
        return Choice(LAYERS, "SLOWER", measured=entry.measured)
    planned = entry is not None and entry.candidate in verify
    names = [entry.candidate] if entry is not None and planned else list(verify)
    if device.type == "meta":
        return Choice(names[0], "ASSUMED")
    verdict_key = f"{key}|{variant}" if variant else key
    verdicts = {name: _verdict(verdict_key, name, verify[name]) for name in names}
    held = {name: verdict for name, verdict in verdicts.items() if verdict.ok}
    if not held:
        verdict = verdicts[names[0]]
        return Choice(LAYERS, "MISMATCH", verdict.error, verdict.limit)
    notes = tuple(
        f"{name} MISMATCH: error {verdict.error:.1e} beyond {verdict.limit:.1e}"
        for name, verdict in verdicts.items()
        if not verdict.ok
    )
    first = next(iter(held))
    if entry is not None and planned:
        return Choice(first, "OK", *held[first][1:], entry.measured)
    medians = measure({name: runs[name] for name in (*held, LAYERS)}, device)
    measured = {name: round(value, 2) for name, value in medians.items()}
    winner = min(measured, key=measured.__getitem__)
    # Of the layers' sites there are verdicts elsewhere.
    verdict = held.get(winner, held[first])
    into = binding.grouping()
    if into is not None:
        into.entries[key] = Entry(winner, verdict.error, verdict.limit, measured[winner], measured)
    reason = "SLOWER" if winner == LAYERS else "OK"
    return Choice(winner, reason, verdict.error, verdict.limit, measured, notes)


def _verdict(key: str, name: str, verify: Callable[[], Verdict]) -> Verdict:
    """The kept verdict, or a new one."""
    kept = cache.get(key, name)
    if kept is not None:
        return Verdict(kept["ok"], kept["error"], kept["limit"])
    verdict = verify()
    cache.put(key, name, ok=verdict.ok, error=verdict.error, limit=verdict.limit)
    return verdict
