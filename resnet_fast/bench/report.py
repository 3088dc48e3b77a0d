"""Rows, statistics, environment and tables of a benchmark."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]


def percentile(samples: Sequence[float], fraction: float) -> float:
    """Linear-interpolated percentile of a non-empty sample."""
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(
    case: dict[str, Any], results: Sequence[tuple[str, Sequence[float], dict[str, Any]]]
) -> list[Row]:
    """Turn samples into rows; each ratio is the other engine's median over this one's.

    ``vs_eager`` compares with eager NCHW, ``vs_best_peer`` with the fastest engine that is not
    this package's. Above 1 means this row is faster. Of a network on 8 bits, eager is the fp32
    network, and its row's dtype says so.
    """
    from resnet_fast.bench.engines import OURS

    rows: list[Row] = []
    for engine, samples, info in results:
        row: Row = {**case, "engine": engine, "status": "ok", "reason": None}
        if engine == "eager" and case["dtype"] == "int8":
            row["dtype"] = "fp32"
        if "unavailable" in info:
            row |= {"status": "unavailable", "reason": info["unavailable"]}
        elif "failed" in info:
            row |= {"status": "failed", "reason": info["failed"]}
        elif samples:
            row |= {
                "median_ms": statistics.median(samples),
                "p10_ms": percentile(samples, 0.1),
                "p90_ms": percentile(samples, 0.9),
                "samples": len(samples),
                "images_per_second": case["batch"] * 1e3 / statistics.median(samples),
            }
        for key in (
            "error",
            "limit",
            "within_budget",
            "build_seconds",
            "prepare_peak_mb",
            "run_peak_mb",
            "cuda_peak_mb",
        ):
            if info.get(key) is not None:
                row[key] = info[key]
        rows.append(row)
    medians = {row["engine"]: row["median_ms"] for row in rows if "median_ms" in row}
    peers = [engine for engine in medians if engine not in OURS]
    best = min(peers, key=lambda engine: medians[engine], default=None)
    for row in rows:
        if "median_ms" not in row:
            continue
        if "eager" in medians:
            row["vs_eager"] = medians["eager"] / row["median_ms"]
        if best is not None:
            row["best_peer"] = best
            row["vs_best_peer"] = medians[best] / row["median_ms"]
    return rows


def environment(threads: int) -> dict[str, Any]:
    """Describe the machine and the software that the figures belong to."""
    import torch

    import resnet_fast

    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "resnet_fast": resnet_fast.__version__,
        "commit": commit(),
    }
    for name in ("torchvision", "timm", "triton", "onnxruntime", "openvino", "nncf"):
        facts[name] = _version(name)
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["driver"] = _driver()
    return facts


def cpu_model() -> str:
    """The processor's name, with its family and model where Linux tells them."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if not line.strip():
                break
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    except OSError:
        pass
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def commit() -> str | None:
    """The checkout's commit, marked ``+`` when files differ from it; None elsewhere.

    Results that are being written are no difference: one run writes several.
    """
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str | None:
        try:
            out = subprocess.run(
                ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return out.stdout.strip() if out.returncode == 0 else None

    # An installed package inside someone else's repository must not report that one's commit.
    if git("rev-parse", "--show-toplevel") != str(root):
        return None
    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", ":!benchmarks/results")
    return head and head + ("+" if changed else "")


def _version(module: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip().splitlines()[0] if out.returncode == 0 and out.stdout else None


def save_json(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a result; the file appears whole or not at all."""
    target = Path(path)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(target)


COLUMNS = (
    "model",
    "batch",
    "dtype",
    "size",
    "device",
    "threads",
    "engine",
    "status",
    "reason",
    "median_ms",
    "p10_ms",
    "p90_ms",
    "samples",
    "images_per_second",
    "vs_eager",
    "vs_best_peer",
    "best_peer",
    "error",
    "limit",
    "within_budget",
    "build_seconds",
    "prepare_peak_mb",
    "run_peak_mb",
    "cuda_peak_mb",
    "reference",
)


def save_csv(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the rows, one line each, with the environment repeated in each."""
    facts = {f"env_{key}": value for key, value in result["environment"].items()}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *facts], restval="", extrasaction="ignore")
        writer.writeheader()
        for row in result["rows"]:
            writer.writerow(row | facts)


def table(rows: Sequence[Row]) -> Table:
    """Rows as a rich table."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False)
    out.add_column("network")
    out.add_column("engine", no_wrap=True)
    for heading in ("median ms", "p10 to p90", "img/s", "vs eager", "vs best peer", "error", "MB"):
        out.add_column(heading, justify="right")
    for row in rows:
        network = f"{row['model']} {row['dtype']} b{row['batch']}"
        if "median_ms" not in row:
            out.add_row(network, row["engine"], row["status"])
            continue
        memory = row.get("cuda_peak_mb", row.get("run_peak_mb"))
        out.add_row(
            network,
            row["engine"],
            f"{row['median_ms']:.2f}",
            f"{row['p10_ms']:.2f} to {row['p90_ms']:.2f}",
            f"{row['images_per_second']:.1f}",
            f"{row['vs_eager']:.2f}" if "vs_eager" in row else "-",
            f"{row['vs_best_peer']:.2f}" if "vs_best_peer" in row else "-",
            f"{row['error']:.1e}" + ("" if row["within_budget"] else " !"),
            f"{memory:.0f}" if memory else "-",
        )
    return out


def notes(rows: Sequence[Row]) -> list[str]:
    """Lines below the table: why an engine was not timed, and what the others compare with."""
    lines = [
        f"{row['engine']} is {row['status']}: {row['reason']}"
        for row in rows
        if "median_ms" not in row
    ]
    references = [row["reference"] for row in rows if "reference" in row]
    eight = any(row["dtype"] == "int8" for row in rows)
    error = (
        "the output's distance from fp64, relative" if eight else "the worst output's, against fp64"
    )
    eager = "eager, in fp32," if eight else "eager"
    lines += [f"{eager} is {name}; error is {error}" for name in references]
    return list(dict.fromkeys(lines))
