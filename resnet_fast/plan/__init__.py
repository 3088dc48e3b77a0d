"""Sites, candidates, verification, measurement and the plan that binds them."""

from __future__ import annotations

from typing import Any

from torch import nn

from resnet_fast.plan.binding import (
    Binding,
    active_plan,
    resolve,
    set_plan,
    tune,
    use,
)
from resnet_fast.plan.candidate import CANDIDATES, Candidate, ConvArgs, default_order
from resnet_fast.plan.plan import Entry, Plan, load_plan, parse, save_plan
from resnet_fast.plan.reasons import REASONS
from resnet_fast.plan.site import Site, device_name
from resnet_fast.plan.verify import verify


def model_rows(model: nn.Module) -> list[dict[str, Any]]:
    """One row for every site of ``model`` and every shape that it has run with."""
    rows: list[dict[str, Any]] = []
    for path, module in model.named_modules():
        if getattr(module, "is_site", False):
            rows += [{**row, "name": row["name"] or path} for row in module.rows()]
    return rows


__all__ = [
    "CANDIDATES",
    "REASONS",
    "Binding",
    "Candidate",
    "ConvArgs",
    "Entry",
    "Plan",
    "Site",
    "active_plan",
    "default_order",
    "device_name",
    "load_plan",
    "model_rows",
    "parse",
    "resolve",
    "save_plan",
    "set_plan",
    "tune",
    "use",
    "verify",
]
