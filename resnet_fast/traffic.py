"""The traffic of a network on a device, beside what other ways of running it would move.

Nothing runs: :mod:`resnet_fast.plan.traffic` counts on meta tensors. The yardsticks are the
framework's network module by module, every site as one kernel, and the minimum: each residual block
as one kernel that reads its input and writes its output, the stem up to the first block and the
head as one each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import verify
from resnet_fast._version import __version__
from resnet_fast.errors import ArgumentError, LibraryError
from resnet_fast.ops._work import Work, nbytes
from resnet_fast.plan import devices, model_rows, traffic
from resnet_fast.plan.devices import Device
from resnet_fast.plan.reasons import REASONS
from resnet_fast.plan.traffic import Launch

PLOT_SUFFIXES = (".svg", ".png")


@dataclass(frozen=True)
class Question:
    """What is asked: a network, what it is given, where and how it is to run."""

    model: str
    dtype: str
    batch: int
    size: int
    device: Device
    plan: str


@dataclass(frozen=True)
class Way:
    """One way to run the network: its launches, or why it has none.

    ``notes`` say what a reader of the figures has to know.
    """

    name: str
    launches: list[Launch] = field(default_factory=list)
    absence: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Traffic:
    """The answer: the plan's launches, and the yardsticks."""

    question: Question
    plan: Way
    yardsticks: tuple[Way, ...]

    def totals(self, launches: Iterable[Launch]) -> dict[str, Any]:
        """Sums an image, in MB (10⁶ bytes), GFLOP and microseconds at the roofline.

        ``roof`` is the one that takes the larger part of the time, ``roof_share`` that part.
        """
        launches = list(launches)
        batch = self.question.batch
        times = {"memory": 0.0, "compute": 0.0}
        for launch in launches:
            seconds, roof = self.time(launch)
            times[roof] += seconds
        roof, total = max(times, key=times.__getitem__), sum(times.values())

        def megabytes(name: str) -> float:
            return sum(getattr(launch.work, name) for launch in launches) / batch / 1e6

        read, written = megabytes("read"), megabytes("written")
        return {
            "launches": sum(launch.launches for launch in launches),
            "mb_per_image": read + written,
            "mb_read_per_image": read,
            "mb_written_per_image": written,
            "mb_parameters_per_image": megabytes("parameters"),
            "gflop_per_image": sum(launch.work.flops for launch in launches) / batch / 1e9,
            "us_per_image": total / batch * 1e6,
            "images_per_second": batch / total if total else None,
            "roof": roof,
            "roof_share": times[roof] / total if total else None,
        }

    def time(self, launch: Launch) -> tuple[float, str]:
        """Seconds of ``launch`` at the roofline, and the roof."""
        work = launch.work
        return self.question.device.seconds(work.read + work.written, work.flops, launch.arithmetic)

    def stages(self) -> dict[str, list[Launch]]:
        """The plan's launches by stage: stem, the network's layers, head."""
        found: dict[str, list[Launch]] = {}
        for stage, launch in zip(_stages(self.plan.launches), self.plan.launches, strict=True):
            found.setdefault(stage, []).append(launch)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One row a launch, bytes and operations of the whole batch."""
        rows = []
        for stage, launch in zip(_stages(self.plan.launches), self.plan.launches, strict=True):
            seconds, roof = self.time(launch)
            rows.append(
                {
                    "op": launch.op,
                    "path": launch.path,
                    "stage": stage,
                    "launches": launch.launches,
                    **launch.work._asdict(),
                    "arithmetic": launch.arithmetic,
                    "known": launch.known,
                    "us_per_image": seconds / self.question.batch * 1e6,
                    "roof": roof,
                    "inputs": launch.inputs,
                    "outputs": launch.outputs,
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        question, device = self.question, self.question.device
        asked = {name: getattr(question, name) for name in ("model", "dtype", "batch", "size")}
        return {
            **asked,
            "plan": question.plan,
            "device": vars(device),
            "versions": {"resnet_fast": __version__, "torch": str(torch.__version__)},
            **self.totals(self.plan.launches),
            "notes": self.plan.notes,
            "stages": {stage: self.totals(found) for stage, found in self.stages().items()},
            "yardsticks": {
                way.name: {**self.totals(way.launches), "notes": way.notes}
                if way.launches
                else {"absence": way.absence}
                for way in self.yardsticks
            },
            "rows": self.rows(),
        }


def count(
    model: str,
    dtype: str = "fp16",
    batch: int = 1,
    size: int | None = None,
    device: str = "H100",
    plan: str = "default",
) -> Traffic:
    """Count network ``model`` under ``plan`` (:data:`resnet_fast.plan.traffic.PLANS`).

    ``device`` is one of :data:`resnet_fast.plan.devices.DEVICES`. Raises ``ArgumentError`` for
    names and numbers that there are none of, ``LibraryError`` where the plan's kernels are missing.
    """
    verify.check_model_name(model)
    verify.dtype_from_name(dtype)
    chosen = devices.named(device)
    if plan not in traffic.PLANS:
        raise ArgumentError("plan", f"one of {', '.join(traffic.PLANS)}", repr(plan))
    if batch < 1:
        raise ArgumentError("batch", "at least 1", str(batch))
    side = verify.default_size(model) if size is None else size
    question = Question(model, dtype, batch, side, chosen, plan)
    counted = _planned(question, plan)
    layers = counted
    if plan != "layers":
        try:
            layers = _planned(question, "layers")
        except LibraryError as missing:
            layers = Way("layers", absence=str(missing))
    eager, minimum = _references(question)
    return Traffic(question, counted, (eager, layers, minimum))


def _planned(question: Question, plan: str) -> Way:
    with torch.device("meta"):
        model = verify.build_model(question.model)
    model.to(verify.dtype_from_name(question.dtype))
    with traffic.planned(plan, question.device):
        launches = traffic.account(model, _images(question))
        rows = model_rows(model)
    sites = Counter((row["candidate"], row["reason"]) for row in rows)
    notes = [
        f"{number} sites by {candidate or 'nothing'}: {REASONS[reason]}"
        for (candidate, reason), number in sites.most_common()
    ]
    notes += dict.fromkeys(row["notes"] for row in rows if row["notes"])
    return Way(plan, launches, notes=(*notes, *_unknown(launches)))


def _references(question: Question) -> tuple[Way, Way]:
    with torch.device("meta"):
        model, source = verify.build_reference(question.model)
    model.to(verify.dtype_from_name(question.dtype))
    x = _images(question)
    launches = traffic.account(model, x)
    eager = Way("eager", launches, notes=(source, *_unknown(launches)))
    return eager, Way("minimum", _whole_blocks(model, x, launches))


def _images(question: Question) -> Tensor:
    # The layout that every way of running prefers on a GPU, so that none pays for a conversion.
    shape = (question.batch, 3, question.size, question.size)
    dtype = verify.dtype_from_name(question.dtype)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _unknown(launches: Sequence[Launch]) -> tuple[str, ...]:
    unknown = Counter(launch.op for launch in launches if not launch.known)
    return tuple(
        f"{number} launches of {op} are counted by their inputs and outputs: it is unknown"
        for op, number in unknown.items()
    )


def _stages(launches: Sequence[Launch]) -> list[str]:
    stages: list[str] = []
    for launch in launches:
        first = launch.path.partition(".")[0]
        if first.startswith("layer"):
            stages.append(first)
        elif not stages or stages[-1] in ("stem", "head") or not first:
            stages.append(stages[-1] if stages else "stem")
        else:
            stages.append("head")
    return stages


def _whole_blocks(model: nn.Module, x: Tensor, launches: Sequence[Launch]) -> list[Launch]:
    """One launch a block, and one for what is before them and for what is behind."""
    blocks = {
        f"{layer}.{name}": block
        for layer, module in model.named_children()
        if layer.startswith("layer")
        for name, block in module.named_children()
    }
    ends: dict[str, tuple[Tensor, Tensor]] = {}

    def note(path: str) -> Any:
        return lambda module, args, y: ends.__setitem__(path, (args[0], y))

    handles = [block.register_forward_hook(note(path)) for path, block in blocks.items()]
    try:
        with torch.no_grad():
            logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    first, last = ends[next(iter(blocks))][0], ends[list(blocks)[-1]][1]
    ends = {"stem": (x, first), **ends, "head": (last, logits)}

    def owner(path: str, stage: str) -> str:
        return ".".join(path.split(".")[:2]) if stage.startswith("layer") else stage

    flops: Counter[str] = Counter()
    arithmetic: dict[str, str] = {}
    for stage, launch in zip(_stages(launches), launches, strict=True):
        flops[owner(launch.path, stage)] += launch.work.flops
        arithmetic.setdefault(owner(launch.path, stage), launch.arithmetic)
    weights: Counter[str] = Counter()
    for path, module in model.named_modules():
        # In the order of their names the head's comes last: what is no layer's is the stem's first.
        stage = path.partition(".")[0]
        stage = stage if stage.startswith("layer") else "head" if path == "fc" else "stem"
        weights[owner(path, stage)] += _parameters(module)
    return [
        Launch(
            "block",
            path,
            1,
            Work(nbytes(taken) + weights[path], nbytes(given), flops[path], weights[path]),
            arithmetic[path],
            True,
            (tuple(taken.shape),),
            (tuple(given.shape),),
        )
        for path, (taken, given) in ends.items()
    ]


def _parameters(module: nn.Module) -> int:
    """Bytes that a fused kernel reads of ``module``: a norm is a scale and a shift in fp32."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return 2 * 4 * module.num_features
    return nbytes(*module.parameters(recurse=False))


# What is printed.


def heading(told: Traffic) -> str:
    """What the figures are of, and the roofs."""
    asked, device = told.question, told.question.device
    kinds = sorted({launch.arithmetic for launch in told.plan.launches if launch.work.flops})
    peaks = ", ".join(f"{device.peaks[kind] / 1e12:.4g} TFLOP/s {kind}" for kind in kinds)
    roof = f"{device.memory_roof / 1e12:.4g} TB/s"
    if device.copied:
        roof += f" as copied ({device.bandwidth / 1e12:.4g} by the data sheet)"
    return (
        f"{asked.model} {asked.dtype} batch {asked.batch} at {asked.size}x{asked.size}, plan "
        f"{asked.plan}, as if on {device.name}: {roof}, {peaks}"
    )


def _table(headings: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, text in enumerate(headings):
        table.add_column(text, justify="right" if index else "left", no_wrap=True)
    return table


def _roof(totals: dict[str, Any]) -> str:
    return f"{totals['roof']} {totals['roof_share']:.0%}"


def stage_table(told: Traffic) -> Any:
    """One line a stage, an image's figures."""
    table = _table(
        ("stage", "launches", "MB read", "MB written", "of it weights", "GFLOP", "us", "roof")
    )
    stages = {**told.stages(), "network": told.plan.launches}
    for stage, launches in stages.items():
        sums = told.totals(launches)
        table.add_row(
            stage,
            str(sums["launches"]),
            f"{sums['mb_read_per_image']:.2f}",
            f"{sums['mb_written_per_image']:.2f}",
            f"{sums['mb_parameters_per_image']:.2f}",
            f"{sums['gflop_per_image']:.3f}",
            f"{sums['us_per_image']:.2f}",
            _roof(sums),
            end_section=stage == list(stages)[-2],
        )
    return table


def yardstick_table(told: Traffic) -> Any:
    """The plan beside each yardstick, with the ratio of the bytes and of the time."""
    table = _table(
        ("an image", "launches", "MB", "of it weights", "us", "images/s", "roof", "x MB", "x us")
    )
    ours = told.totals(told.plan.launches)
    for way in (told.plan, *told.yardsticks):
        name = "this plan" if way is told.plan else way.name
        if not way.launches:
            table.add_row(name, *["-"] * 8)
            continue
        sums = told.totals(way.launches)
        table.add_row(
            name,
            str(sums["launches"]),
            f"{sums['mb_per_image']:.1f}",
            f"{sums['mb_parameters_per_image']:.2f}",
            f"{sums['us_per_image']:.2f}",
            f"{sums['images_per_second']:.0f}",
            _roof(sums),
            f"{sums['mb_per_image'] / ours['mb_per_image']:.2f}",
            f"{sums['us_per_image'] / ours['us_per_image']:.2f}",
        )
    return table


def notes(told: Traffic) -> list[str]:
    """Lines below the tables."""
    lines = [f"{told.question.plan}: {note}" for note in told.plan.notes]
    for way in told.yardsticks:
        if way is not told.plan:
            lines += [f"{way.name}: {note}" for note in (*way.notes, way.absence) if note]
    return [
        *lines,
        "minimum: each residual block, the stem and the head as one kernel each",
        "Counted, not run. Weights are read once a launch and shared by the batch.",
    ]


# The plot.


def check_plot(path: Path) -> None:
    """Raise ``ArgumentError`` for a file that no plot can be written to, ``LibraryError`` without
    matplotlib."""
    if path.suffix not in PLOT_SUFFIXES:
        raise ArgumentError("plot", f"a file that ends in {' or '.join(PLOT_SUFFIXES)}", str(path))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise LibraryError(
            "--plot draws with matplotlib, which is not installed: "
            "pip install 'matplotlib>=3.8,<4', which is this package's extra 'plot'"
        ) from None


def plot(told: Traffic, path: Path) -> None:
    """Draw the roofline with a point a launch to ``path``: its area is its part of the time."""
    check_plot(path)
    from matplotlib.figure import Figure

    device = told.question.device
    rows = [row for row in told.rows() if row["flops"]]
    others = [row for row in told.rows() if not row["flops"]]
    intensity = [row["flops"] / (row["read"] + row["written"]) for row in rows]
    low, high = min(intensity) / 3, max(*intensity, 2 * max(device.peaks.values()) / 3e12) * 3
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for kind in sorted({row["arithmetic"] for row in rows}):
        peak = device.peaks[kind]
        ridge = peak / device.memory_roof
        ends = [low, ridge, high]
        axes.plot(
            ends,
            [min(device.memory_roof * at, peak) / 1e12 for at in ends],
            color="black",
            linewidth=1,
            label=f"{device.memory_roof / 1e12:.3g} TB/s, {peak / 1e12:.4g} TFLOP/s {kind}",
        )
    total = sum(row["us_per_image"] for row in told.rows())
    for index, stage in enumerate(told.stages()):
        points = [
            (at, row) for at, row in zip(intensity, rows, strict=True) if row["stage"] == stage
        ]
        time = sum(row["us_per_image"] for row in told.rows() if row["stage"] == stage)
        axes.scatter(
            [at for at, _ in points],
            [_height(device, at, row["arithmetic"]) for at, row in points],
            s=[20 + 4000 * row["us_per_image"] / total for _, row in points],
            color=f"C{index}",
            alpha=0.55,
            linewidths=0.5,
            edgecolors="black",
            label=f"{stage}: {time:.2f} µs",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte moved (FLOP/B)")
    axes.set_ylabel("at most (TFLOP/s)")
    asked = told.question
    axes.set_title(
        f"{asked.model} {asked.dtype}, batch {asked.batch}, plan {asked.plan}, on {device.name}: "
        f"{total:.1f} µs an image",
        fontsize=11,
    )
    spent = sum(row["us_per_image"] for row in others) / total
    axes.text(
        0.98,
        0.02,
        f"area: part of the time\nnot shown: {len(others)} launches without products, "
        f"{spent:.0%} of the time",
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        fontsize=8,
    )
    axes.grid(True, which="major", alpha=0.3)
    legend = axes.legend(loc="upper left", fontsize=8)
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_sizes([40])
    figure.savefig(path, dpi=150)


def _height(device: Device, intensity: float, kind: str) -> float:
    return min(device.memory_roof * intensity, device.peaks[kind]) / 1e12
