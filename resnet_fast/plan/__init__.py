"""Sites, candidates, verification, measurement and the plan that binds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from resnet_fast.plan.binding import (
    Binding,
    active_plan,
    as_if_on,
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


def model_sites(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every site of ``model`` with the path of its convolution, such as ``layer1.0.conv2``."""
    for path, module in model.named_modules():
        if getattr(module, "is_site", False):
            # A network's stem hangs on its ReLU, the sites of a block on the block.
            parent = path.rpartition(".")[0].removesuffix("relu").removesuffix(".")
            yield ".".join(filter(None, (parent, module.name))) if module.name else path, module


def model_rows(model: nn.Module) -> list[dict[str, Any]]:
    """One row for every site of ``model`` and every shape that it has run with."""
    return [{**row, "name": path} for path, module in model_sites(model) for row in module.rows()]


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
    "as_if_on",
    "default_order",
    "device_name",
    "load_plan",
    "model_rows",
    "model_sites",
    "parse",
    "resolve",
    "save_plan",
    "set_plan",
    "tune",
    "use",
    "verify",
]
