"""A network over batch size, image size and threads beside its peers: a table and a plot.

    python -m benchmarks.scaling --model resnet50 --out scaling.json --plot scaling.svg

Each point is ``resnet-fast bench``'s: every engine in a process of its own, in turns, its output
compared with fp64 first. Batches run at the network's own size of image, sizes with one image.
What is drawn is the time a megapixel, which would be level if nothing but the arithmetic counted.
A step from one point to the next is a cliff where it costs this package a larger factor of that
time than it costs every peer; the largest is named.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from resnet_fast import verify
from resnet_fast.bench.engines import OURS
from resnet_fast.bench.report import environment, save_json
from resnet_fast.bench.runner import Progress, bench_model, default_threads
from resnet_fast.traffic_report import check_plot

OUR = "resnet_fast"
PEERS = "eager_nhwc,onnxruntime,openvino"
BATCHES = "1,2,4,8,16,32,64"
SIZES = "64,128,224,320,512,1024"

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """What is run at once."""

    threads: int
    batch: int
    size: int


def points(
    threads: Iterable[int], batches: Iterable[int], sizes: Iterable[int], size: int
) -> list[Point]:
    """Every batch at ``size`` and every size at one image, with each number of threads."""
    wanted = [
        point
        for count in threads
        for point in (
            *(Point(count, batch, size) for batch in sorted(batches)),
            *(Point(count, 1, side) for side in sorted(sizes)),
        )
    ]
    return list(dict.fromkeys(wanted))


def per_megapixel(row: Row) -> float:
    """Milliseconds for a megapixel of input."""
    return row["median_ms"] / (row["batch"] * row["size"] ** 2) * 1e6


def axes_of(rows: Sequence[Row]) -> list[tuple[int, str, list[Row]]]:
    """Threads, ``batch`` or ``size`` and the rows along it, for each axis that has two points."""
    found = []
    own = max(rows, key=lambda row: row["batch"])["size"]
    for threads in dict.fromkeys(row["threads"] for row in rows):
        for axis, other, value in (("batch", "size", own), ("size", "batch", 1)):
            line = [
                row
                for row in rows
                if row["threads"] == threads and row[other] == value and "median_ms" in row
            ]
            if len({row[axis] for row in line}) > 1:
                found.append((threads, axis, sorted(line, key=lambda row: row[axis])))
    return found


def lines(rows: Sequence[Row], axis: str) -> dict[str, dict[int, float]]:
    """By engine: the time a megapixel at each value of ``axis``."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["engine"], {})[row[axis]] = per_megapixel(row)
    return found


def cliffs(rows: Sequence[Row]) -> list[tuple[float, str]]:
    """Each step along an axis by how much more it costs this package than the peer that it costs
    most, the largest first: (factor, which step)."""
    found = []
    for threads, axis, line in axes_of(rows):
        times = lines(line, axis)
        ours = times.pop(OUR, {})
        for low, high in zip(list(ours), list(ours)[1:], strict=False):
            theirs = [t[high] / t[low] for t in times.values() if low in t and high in t]
            if theirs:
                factor = ours[high] / ours[low] / max(theirs)
                found.append((factor, f"{axis} {low} to {high}, {threads} threads"))
    return sorted(found, reverse=True)


def table(rows: Sequence[Row]) -> Table:
    """A line a point: milliseconds by engine, and the best peer's over this package's."""
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    drawn = Table("threads", "batch", "size", *engines, "best peer / ours", box=None)
    for column in drawn.columns:
        column.justify = "right"
    cells: dict[Point, dict[str, Row]] = {}
    for row in rows:
        point = Point(row["threads"], row["batch"], row["size"])
        cells.setdefault(point, {})[row["engine"]] = row
    for point, by_engine in cells.items():
        times = [by_engine[e].get("median_ms") if e in by_engine else None for e in engines]
        ratio = by_engine.get(OUR, {}).get("vs_best_peer")
        drawn.add_row(
            *(str(value) for value in (point.threads, point.batch, point.size)),
            *("-" if t is None else f"{t:.4g}" for t in times),
            "-" if ratio is None else f"{ratio:.2f}",
        )
    return drawn


def draw(result: dict[str, Any]) -> Any:
    """matplotlib's figure of the time a megapixel over batches and over sizes, a row of panels a
    number of threads; None where no axis has two points."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    panels = axes_of(rows)
    if not panels:
        return None
    across = 1 + any(axis != panels[0][1] for _, axis, _ in panels)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(5.0 * across, 3.4 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    for (threads, axis, line), panel in zip(panels, grid.flat, strict=False):
        for engine, times in lines(line, axis).items():
            panel.plot(
                list(times),
                list(times.values()),
                marker="o",
                markersize=3,
                color=f"C{engines.index(engine)}",
                linewidth=2 if engine in OURS else 1,
                label=engine,
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks := sorted({row[axis] for row in line}), [str(t) for t in ticks])
        panel.minorticks_off()
        panel.grid(axis="y", linewidth=0.4)
        where = f"images of {line[0]['size']}²" if axis == "batch" else "one image"
        panel.set_title(f"{where}, {threads} thread{'s' * (threads > 1)}", fontsize=10)
        panel.set_xlabel("images in a batch" if axis == "batch" else "side of the image (pixels)")
    grid[0, 0].set_ylim(bottom=0)  # shared; fixed only once every line is there
    for panel in grid[:, 0]:
        panel.set_ylabel("ms a megapixel")
    grid[0, 0].legend(fontsize=8)
    facts = result["environment"]
    figure.suptitle(f"{rows[0]['model']} {rows[0]['dtype']} on {facts['cpu']}", fontsize=11)
    return figure


def plot(result: dict[str, Any], path: Path) -> None:
    """Write :func:`draw`'s figure, if there is one.

    Raises ``ArgumentError`` for another suffix than .svg or .png, ``LibraryError`` without
    matplotlib.
    """
    check_plot(path)
    figure = draw(result)
    if figure is not None:
        figure.savefig(path)


def measure(
    model: str,
    where: Sequence[Point],
    *,
    engines: Sequence[str],
    out: Path | None = None,
    progress: Progress = lambda message: None,
    **options: Any,
) -> dict[str, Any]:
    """Run every point. ``out`` is written after each, so that a run can be stopped."""
    result: dict[str, Any] = {
        "schema": 1,
        "environment": environment(max(point.threads for point in where)),
        "rows": [],
    }
    for number, point in enumerate(where, 1):
        progress(f"{number} of {len(where)}: {point}")
        result["rows"] += bench_model(
            model,
            batch=point.batch,
            size=point.size,
            threads=point.threads,
            engines=engines,
            **options,
        )
        if out is not None:
            save_json(result, out)
    return result


def _numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, print. Returns the exit status."""
    cpus = default_threads()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--threads", type=_numbers, default=sorted({1, cpus}))
    parser.add_argument("--batches", type=_numbers, default=_numbers(BATCHES))
    parser.add_argument("--sizes", type=_numbers, default=_numbers(SIZES))
    parser.add_argument("--peers", default=PEERS, help="comma separated")
    parser.add_argument("--reps", type=int, default=5, help="turns of each engine at a point")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--plot", type=Path, help=".svg or .png; needs matplotlib")
    asked = parser.parse_args(argv)
    if asked.plot is not None:
        check_plot(asked.plot)
    console, log = Console(width=120), Console(stderr=True)
    peers = [name.strip() for name in asked.peers.split(",") if name.strip()]
    result = measure(
        asked.model,
        points(asked.threads, asked.batches, asked.sizes, verify.default_size(asked.model)),
        engines=(OUR, *peers),
        dtype=asked.dtype,
        reps=asked.reps,
        out=asked.out,
        progress=lambda message: log.print(message, highlight=False),
    )
    result["command"] = f"python -m benchmarks.scaling --model {asked.model} --dtype {asked.dtype}"
    result["command"] += f" --reps {asked.reps}"
    if asked.out is not None:
        save_json(result, asked.out)
    if asked.plot is not None:
        plot(result, asked.plot)
    console.print(table(result["rows"]))
    for factor, step in cliffs(result["rows"])[:1]:
        verdict = f"costs {factor:.2f} times what it costs the peer that it costs most"
        console.print(f"largest step: {step}: {verdict}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
