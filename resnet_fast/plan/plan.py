"""A plan binds sites to candidates, as JSON that can be read, reviewed and shipped."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from resnet_fast._version import __version__
from resnet_fast.errors import PlanError
from resnet_fast.plan.candidate import CANDIDATES
from resnet_fast.plan.site import device_name

_FORMAT = "resnet_fast plan 1"
#: Ops that stand for several layers, with the kernels that each may run by, and what a plan calls
#: the layers one by one (plan/group.py).
GROUPS = {
    "residual_chain": ("residual_chain",),
    "stem_pool": ("stem_pool", "stem_pool_cuda"),
    "conv_stats": ("conv_stats",),
}
LAYERS = "layers"
# A hostile or mistaken file must not be able to fill the memory; ResNet-152 needs under 50 KiB.
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Entry:
    """One site's choice: the candidate, its error and limit, and microseconds where measured."""

    candidate: str
    error: float | None = None
    limit: float | None = None
    microseconds: float | None = None
    measured: dict[str, float] = field(default_factory=dict)


@dataclass
class Plan:
    """Choices by site key for one device.

    Attributes:
        device: as :func:`resnet_fast.plan.device_name` calls it.
        entries: site key to :class:`Entry`.
        batch: images a forward had when the plan was measured, None for one that was not.
    """

    device: str
    entries: dict[str, Entry] = field(default_factory=dict)
    batch: int | None = None

    def to_json(self) -> str:
        """The plan as indented JSON with sorted sites, so that two plans can be compared."""
        return json.dumps(
            {
                "format": _FORMAT,
                "version": __version__,
                "torch": str(torch.__version__),
                "device": self.device,
                "batch": self.batch,
                "sites": {
                    key: {k: v for k, v in vars(entry).items() if v not in (None, {})}
                    for key, entry in sorted(self.entries.items())
                },
            },
            indent=1,
        )


def _require(condition: bool, what: str, got: object) -> None:
    if not condition:
        raise PlanError(f"plan: expected {what}, got {str(got)[:80]!r}")


def _number(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        # Compared, not converted: JSON's integers may be larger than any float.
        and 0 <= value <= sys.float_info.max
    )


def _names(key: str) -> tuple[str, ...]:
    """What may run at a place: a site's candidates, or a group's kernels and its layers."""
    op = key.split("|", 1)[0]
    return (*GROUPS[op], LAYERS) if op in GROUPS else tuple(CANDIDATES)


def _entry(key: str, raw: Any) -> Entry:
    _require(isinstance(raw, dict), f"an object for site {key[:60]}", raw)
    unknown = set(raw) - {"candidate", "error", "limit", "microseconds", "measured"}
    _require(not unknown, "known fields only", sorted(unknown))
    names = _names(key)
    name = raw.get("candidate")
    _require(
        isinstance(name, str) and name in names,
        f"a candidate among {', '.join(names)}",
        name,
    )
    for number in ("error", "limit", "microseconds"):
        value = raw.get(number)
        _require(value is None or _number(value), f"a finite number for {number}", value)
    measured = raw.get("measured", {})
    _require(
        isinstance(measured, dict) and all(k in names and _number(v) for k, v in measured.items()),
        "microseconds by candidate for measured",
        measured,
    )
    return Entry(name, raw.get("error"), raw.get("limit"), raw.get("microseconds"), measured)


def parse(text: str, device: torch.device | str | None = None) -> Plan:
    """Read a plan from JSON.

    Args:
        text: what :meth:`Plan.to_json` wrote.
        device: the device it is to run on; None takes whatever device the plan names.

    Raises:
        PlanError: malformed JSON, unknown fields or candidates, figures that are no figures, or a
            plan that was made for another device. Nothing of it is applied then.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as failure:
        raise PlanError(f"plan: expected JSON, got {str(failure)[:120]}") from None
    _require(isinstance(data, dict), "a JSON object", type(data).__name__)
    _require(data.get("format") == _FORMAT, f"format {_FORMAT!r}", data.get("format"))
    _require(isinstance(data.get("device"), str), "a device name", data.get("device"))
    if device is not None and data["device"] != device_name(device):
        raise PlanError(
            f"plan: expected one made for {device_name(device)!r}, got one made for "
            f"{data['device'][:120]!r}; tune on this device, or read it with device=None"
        )
    batch = data.get("batch")
    _require(
        batch is None or (isinstance(batch, int) and not isinstance(batch, bool) and batch > 0),
        "a positive batch",
        batch,
    )
    sites = data.get("sites")
    _require(isinstance(sites, dict), "an object of sites", type(sites).__name__)
    return Plan(data["device"], {key: _entry(key, raw) for key, raw in sites.items()}, batch)


def load_plan(file: str | os.PathLike[str], device: torch.device | str | None = "cpu") -> Plan:
    """Read a plan file; raises PlanError as :func:`parse` does, or where there is no such file."""
    path = Path(file)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise PlanError(f"plan {path}: expected at most {_MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise PlanError(f"plan {path}: expected a readable file, got {failure}") from None
    return parse(text, device)


def save_plan(plan: Plan, file: str | os.PathLike[str]) -> None:
    """Write ``plan`` in one step: a reader sees the old file or the new one."""
    path = Path(file)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(plan.to_json() + "\n", encoding="utf-8")
    os.replace(temporary, path)
