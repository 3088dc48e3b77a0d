"""The traffic of a network as tables and as a roofline plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_fast.errors import ArgumentError, LibraryError

if TYPE_CHECKING:
    from resnet_fast.plan.devices import Device
    from resnet_fast.plan.traffic import Launch
    from resnet_fast.traffic import Question, Traffic

PLOT_SUFFIXES = (".svg", ".png")


def heading(told: Traffic) -> str:
    """What the figures are of, and the roofs."""
    return heading_of(told.question, told.plan.launches)


def heading_of(asked: Question, launches: Iterable[Launch], what: str = "") -> str:
    """The same for launches of another kind, which ``what`` names."""
    device = asked.device
    kinds = sorted({launch.arithmetic for launch in launches if launch.work.flops})
    peaks = ", ".join(f"{device.peaks[kind] / 1e12:.4g} TFLOP/s {kind}" for kind in kinds)
    roof = f"{device.memory_roof / 1e12:.4g} TB/s"
    if device.copied:
        roof += f" as copied ({device.bandwidth / 1e12:.4g} by the data sheet)"
    return (
        f"{asked.model} {asked.dtype} batch {asked.batch} at {asked.size}x{asked.size}, "
        f"{what + ', ' if what else ''}plan {asked.plan}, as if on {device.name}: {roof}, {peaks}"
    )


def rich_table(headings: Sequence[str]) -> Any:
    """An empty table; all columns but the first hold figures."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, text in enumerate(headings):
        table.add_column(text, justify="right" if index else "left", no_wrap=True)
    return table


def roof_of(totals: dict[str, Any]) -> str:
    """Which roof takes the larger part of the time, and how much."""
    return f"{totals['roof']} {totals['roof_share']:.0%}"


def stage_table(told: Traffic) -> Any:
    """One line a stage, an image's figures."""
    table = rich_table(
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
            roof_of(sums),
            end_section=stage == list(stages)[-2],
        )
    return table


def yardstick_table(told: Traffic) -> Any:
    """The plan beside each yardstick, with the ratio of the bytes and of the time."""
    table = rich_table(
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
            roof_of(sums),
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
