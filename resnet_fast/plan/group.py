"""Several layers as one kernel, or one by one: which of the two runs at a place.

A kernel that stands for a group of layers replaces kernels that have been chosen already, so it
has two hurdles: it is verified against fp64 as every candidate is, and it must win a measurement
against those layers on the device at hand, on the tensors at hand. Both are paid at first use.
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
    """What runs, ``LAYERS`` or the kernel's name, and why: the facts of a line of ``explain()``."""

    name: str
    reason: str
    error: float | None = None
    limit: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        facts = [] if self.error is None else [f"error {self.error:.1e} of {self.limit:.1e}"]
        facts += [f"{name} {value:.0f} us" for name, value in self.measured.items()]
        return ", ".join([f"{self.name} ({self.reason})", *facts])


def choose(
    key: str,
    name: str,
    device: torch.device,
    verify: Callable[[], Verdict],
    runs: Mapping[str, Callable[[], Any]],
    variant: str = "",
) -> Choice:
    """Decide between the kernel ``name`` and the layers it stands for.

    Args:
        key: the place's identity without the batch: of the cache's verdict and of plan entries.
        name: the kernel's name.
        device: where it runs. On ``meta`` nothing does: the kernel is taken as it is.
        verify: compares the kernel with fp64.
        runs: a call each under ``name`` and ``LAYERS``, on the tensors at hand.
        variant: what the verdict depends on beside the key.

    An entry of the plan in force decides without a measurement, never without verification.
    """
    plan = binding.active_plan()
    entry = plan.entries.get(key) if plan is not None else None
    if entry is not None and entry.candidate == LAYERS:
        return Choice(LAYERS, "SLOWER", measured=entry.measured)
    if device.type == "meta":
        return Choice(name, "ASSUMED")
    verdict_key = f"{key}|{variant}" if variant else key
    kept = cache.get(verdict_key, name)
    if kept is None:
        verdict = verify()
        cache.put(verdict_key, name, ok=verdict.ok, error=verdict.error, limit=verdict.limit)
    else:
        verdict = Verdict(kept["ok"], kept["error"], kept["limit"])
    if not verdict.ok:
        return Choice(LAYERS, "MISMATCH", verdict.error, verdict.limit)
    if entry is not None and entry.candidate == name:
        return Choice(name, "OK", verdict.error, verdict.limit, entry.measured)
    measured = {k: round(v, 2) for k, v in measure(runs, device).items()}
    winner = min(measured, key=measured.__getitem__)
    into = binding.grouping()
    if into is not None:
        into.entries[key] = Entry(winner, verdict.error, verdict.limit, measured[winner], measured)
    return Choice(
        winner,
        "OK" if winner == name else "SLOWER",
        verdict.error,
        verdict.limit,
        measured,
    )
