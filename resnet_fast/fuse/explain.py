"""``explain()``: one row for each convolution, what runs there or why it was not fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from resnet_fast.errors import ArgumentError
from resnet_fast.fuse.capture import STATE, conv_paths, is_site
from resnet_fast.fuse.int8 import Int8
from resnet_fast.fuse.match import REASONS, SITES
from resnet_fast.fuse.prefix import Prefix
from resnet_fast.fuse.program import Program, site_refusal
from resnet_fast.fuse.steps import SiteTarget, Step
from resnet_fast.nn.blocks import BasicBlock, Bottleneck
from resnet_fast.nn.sequence import Sequenced, Sequences
from resnet_fast.plan import REASONS as PLAN_REASONS
from resnet_fast.plan import model_rows

#: Columns of the printed table. Rows hold more.
COLUMNS = (
    "name",
    "x_shape",
    "dtype",
    "layout",
    "act",
    "residual",
    "candidate",
    "reason",
    "error",
    "limit",
    "microseconds",
    "bytes",
)
_FIELDS = (
    "name",
    "op",
    "x_shape",
    "weight_shape",
    "dtype",
    "layout",
    "act",
    "residual",
    "candidate",
    "reason",
    "meaning",
    "error",
    "limit",
    "microseconds",
    "bytes",
    "notes",
)


class Explanation:
    """The rows of a model, as data (``rows``), as text (``str()``) and as a rich table.

    ``calls`` has a line for each image size at which layers run as one native call.

    Every row has the fields of a site's row, and ``fused``: whether a fused call stands there.
    """

    def __init__(self, rows: list[dict[str, Any]], calls: Sequence[str] = ()) -> None:
        self.rows = rows
        self.calls = tuple(calls)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def summary(self) -> str:
        """One line: how many rows are fused, and the reasons of the others."""
        fused = sum(bool(row["fused"]) for row in self.rows)
        others = Counter(str(row["reason"]) for row in self.rows if not row["fused"])
        text = f"{fused} of {len(self.rows)} sites fused"
        if others:
            text += "; not fused: " + ", ".join(f"{k} {n}" for k, n in others.most_common())
        return text

    @property
    def meanings(self) -> dict[str, str]:
        """The reason codes that occur, with their meaning."""
        return {str(row["reason"]): str(row["meaning"]) for row in self.rows}

    def _cells(self) -> list[list[str]]:
        return [[_text(row.get(column)) for column in COLUMNS] for row in self.rows]

    def __str__(self) -> str:
        table = [list(COLUMNS), *self._cells()]
        widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines += ["", *(f"{code}: {meaning}" for code, meaning in self.meanings.items())]
        details = dict.fromkeys(str(row["notes"]) for row in self.rows if row["notes"])
        lines += [f"note: {detail}" for detail in details]
        return "\n".join([*lines, *self.calls, self.summary])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(*COLUMNS)
        for cells in self._cells():
            table.add_row(*cells)
        return Group(table, *self.calls, self.summary)


def explain(model: nn.Module) -> Explanation:
    """What runs at each convolution of ``model``, and why.

    An accelerated model has a row for every convolution, several where a site has run with
    several shapes; what was not fused has its reason code from :data:`resnet_fast.fuse.REASONS`.
    A model of this package has the rows of its sites.

    Raises:
        ArgumentError: if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", "a torch.nn.Module", type(model).__name__)
    state = model.__dict__.get(STATE)
    if state is None or state.origin is None:
        return _plain(model)
    refusals = _refusals(model, state.units)
    bytes_of = {
        step.target.path: (program.int8, step)
        for program in _programs(model)
        if program.int8 is not None and not model.training
        for step in program.steps
        if step.kind == "site"
    }
    rows: list[dict[str, Any]] = []
    for path, conv in conv_paths(model).items():
        report = state.reports.get(path)
        if report is None:
            rows.append(_row(path, conv, "NOT_ACCELERATED"))
        elif report.reason not in SITES:
            rows.append(_row(path, conv, report.reason, report.detail))
        elif (refusal := refusals.get(path)) is not None:
            rows.append(_row(path, conv, refusal))
        elif (eight := bytes_of.get(path)) is not None and (
            row := _int8_row(path, conv, *eight)
        ) is not None:
            rows.append(row)
        else:
            why = "" if eight is None else eight[0].refused.get(path, "")
            note = REASONS[report.note] if report.note else ""
            rows += _site_rows(path, conv, "; ".join(filter(None, (note, why and f"fp32: {why}"))))
    carried = {id(site) for conv in conv_paths(model).values() for site in conv.children()}
    if any(is_site(module) and id(module) not in carried for module in model.modules()):
        rows += [
            complete(row)
            for row in model_rows(model)
            if row["name"] not in state.reports or state.reports[row["name"]].reason not in SITES
        ]
    return Explanation(rows, _calls(model))


def _programs(model: nn.Module) -> list[Program]:
    """The programs of the model and of what is below it, each once."""
    states = [module.__dict__.get(STATE) for module in model.modules()]
    return list(dict.fromkeys(p for s in states if s is not None for p in s.programs.values()))


def _calls(model: nn.Module) -> list[str]:
    found: list[Sequences | Prefix] = []
    for module in model.modules():
        if isinstance(module, Sequenced) and module.sequences is not None:
            found.append(module.sequences)
        state = module.__dict__.get(STATE)
        if state is not None:
            found += [program.prefix for program in dict.fromkeys(state.programs.values())]
    eight = [program.int8 for program in _programs(model) if program.int8 is not None]
    found += [form.prefix for form in eight]
    chains: list[Any] = [
        m.chains for m in model.modules() if isinstance(m, Sequenced) and m.chains is not None
    ]
    lines = [sequence.describe(shape) for known in found for shape, sequence in known]
    for module in model.modules():
        state = module.__dict__.get(STATE)
        if state is not None:
            chains += [program.chains for program in dict.fromkeys(state.programs.values())]
            chains += [] if state.graphs is None else [state.graphs]
    lines += [line for known in chains for line in known.lines()]
    lines += [
        f"8 bits for {len(form.means)} of {len(form.means) + len(form.refused)} sites and "
        f"{len(form.linears)} linear layers, calibrated on {form.batches} batches"
        for form in eight
    ]
    for path, module in model.named_modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            lines += [f"{path}: {line}" for line in module.trained.lines()]
    return lines


def _plain(model: nn.Module) -> Explanation:
    rows = [complete(row) for row in model_rows(model)]
    if not rows:
        rows = [_row(path, conv, "NOT_ACCELERATED") for path, conv in conv_paths(model).items()]
    return Explanation(rows, _calls(model))


def _refusals(model: nn.Module, units: list[str]) -> dict[str, str | None]:
    """By path of each site's convolution: the reason code that it is not fused now, or None."""
    found: dict[str, str | None] = {}
    modules = dict(model.named_modules())
    for path in units:
        root = modules.get(path)
        state = None if root is None else root.__dict__.get(STATE)
        if root is None or state is None:
            continue
        programs: list[Program] = list(dict.fromkeys(state.programs.values()))
        for program in programs:
            if program.training is not None and program.training != root.training:
                continue
            for step in program.steps:
                if isinstance(step.target, SiteTarget):
                    found[step.target.path] = site_refusal(step.target, program, root)
    return found


def _site_rows(path: str, conv: nn.Module, note: str) -> list[dict[str, Any]]:
    sites: list[Any] = list(conv.children())
    rows = [row for site in sites if is_site(site) for row in site.rows()]
    if not rows:
        return [_row(path, conv, "REPLACED")]
    ran = [row for row in rows if row["reason"] != "NOT_RUN"] or rows[:1]
    for row in ran:
        row["name"] = path
        row["notes"] = "; ".join(t for t in (row.get("notes"), note) if t)
    return [complete(row) for row in ran]


def _int8_row(path: str, conv: nn.Module, form: Int8, step: Step) -> dict[str, Any] | None:
    """The row of a site that has run on bytes, or None."""
    shape = form.shape(path)
    if shape is None:
        return None
    return _row(path, conv, "INT8", f"grids from {form.batches} batches") | {
        "op": "conv_bn_act",
        "x_shape": shape,
        "dtype": "int8",
        "layout": "channels_last",
        "act": step.target.act,
        "residual": step.args[1] is not None,
        "candidate": "int8",
        "fused": True,
    }


def _row(path: str, conv: nn.Module, reason: str, detail: str = "") -> dict[str, Any]:
    weight = getattr(conv, "weight", None)
    row = dict.fromkeys(_FIELDS) | {
        "name": path,
        "op": "conv",
        "weight_shape": None if weight is None else tuple(weight.shape),
        "dtype": None if weight is None else str(weight.dtype).removeprefix("torch."),
        "act": "none",
        "residual": False,
        "candidate": "aten",
        "reason": reason,
        "meaning": REASONS[reason],
        "notes": detail,
    }
    return row | {"fused": False}


def complete(row: dict[str, Any]) -> dict[str, Any]:
    """A site's row with every field, its reason's meaning and whether a fused call stands there."""
    full: dict[str, Any] = dict.fromkeys(_FIELDS) | row
    full["meaning"] = full["meaning"] or PLAN_REASONS.get(str(full["reason"]), "")
    return full | {"fused": full["candidate"] not in (None, "aten") or full["reason"] == "TRAINING"}


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, tuple):
        return "x".join(str(n) for n in value)
    return str(value)
