"""Write the README's table from benchmarks/results/*.json.

    python -m benchmarks.render_readme [--check]

Each file is what ``resnet-fast bench --json FILE`` or the campaign wrote. ``--check`` changes
nothing and exits 1 when the README is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- results: begin (python -m benchmarks.render_readme) -->"
END = "<!-- results: end -->"
TITLES = {
    "resnet_fast": "resnet_fast",
    "resnet_fast_tuned": "resnet_fast, tuned",
    "resnet_fast_graph": "resnet_fast, CUDA graph",
    "resnet_fast_layers": "resnet_fast, layer by layer",
    "eager": "torchvision eager NCHW",
    "eager_nhwc": "eager NHWC",
    "eager_graph": "eager NHWC, CUDA graph",
    "cudnn_fused": "cuDNN fused, CUDA graph",
    "compile": "torch.compile + freezing",
    "compile_max": "torch.compile max-autotune",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


def render(results: Path) -> str:
    """The Markdown for every result file, in the order of their names.

    Files of one machine and commit are one table.
    """
    runs: dict[str, dict[str, Any]] = {}
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text())
        check_publishable(result)
        run = runs.setdefault(json.dumps(result["environment"], sort_keys=True), {"rows": []})
        run["environment"] = result["environment"]
        eight = any(row["dtype"] == "int8" for row in result["rows"])
        # Beside networks on 8 bits eager is in fp32: its figure belongs to their lines.
        run["rows"] += [row | {"dtype": "int8"} if eight else row for row in result["rows"]]
        run["commands"] = [*run.get("commands", []), *filter(None, [result.get("command")])]
    for run in runs.values():
        run["rows"].sort(key=lambda row: (row["model"], row["dtype"], row["batch"]))
    parts = [render_run(run) for run in runs.values()]
    return "\n\n".join(part for part in parts if part) or "No results are committed yet."


def check_publishable(result: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a result that no table may show."""
    if result.get("dry") or result.get("tests", "ok") != "ok":
        raise ValueError("a dry run, or one whose tests failed, is not a result to publish")


def render_run(result: dict[str, Any]) -> str:
    """A run as a table: a line a network, dtype and batch; median milliseconds by engine."""
    rows = result["rows"]
    cases: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        case = cases.setdefault((row["model"], row["dtype"], row["batch"]), {})
        # A second measurement of an engine (another round of a campaign) does not replace one.
        if "median_ms" in row:
            case.setdefault(row["engine"], row)
    engines = [name for name in TITLES if any(name in case for case in cases.values())]
    if not engines:
        return ""
    lines = ["| milliseconds a batch | " + " | ".join(TITLES[name] for name in engines) + " |"]
    lines.append("|---|" + "---:|" * len(engines))
    for (model, dtype, batch), case in cases.items():
        best = min(row["median_ms"] for row in case.values())
        cells = []
        for name in engines:
            if name not in case:
                cells.append("–")
                continue
            value = case[name]["median_ms"]
            text = f"{value:.3g}" if value < 100 else f"{value:.0f}"
            cells.append(f"**{text}**" if value == best else text)
        lines.append(f"| {model} {dtype} batch {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + caption(result)


def caption(result: dict[str, Any]) -> str:
    """Machine, versions and command under a table."""
    facts = result["environment"]
    machine = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    versions = [
        f"{name} {facts[name]}"
        for name in ("torch", "torchvision", "onnxruntime", "openvino", "nncf", "cudnn", "driver")
        if facts.get(name)
    ]
    sizes = sorted({row["size"] for row in result["rows"]})
    text = f"{machine}; {', '.join(versions)}; commit {facts['commit']}, {facts['date']}. "
    text += f"Images of {', '.join(f'{size}²' for size in sizes)}, medians, lower is better; "
    text += "the fastest is bold."
    if any(row["dtype"] == "int8" for row in result["rows"]):
        text += " On 8 bits: all but eager, which is in fp32."
    commands = (command.split(" --json ")[0] for command in result.get("commands", ()))
    return text + "".join(f" `{command}`" for command in commands)


def update(readme: str, table: str) -> str:
    """Replace what stands between the markers."""
    head, found, rest = readme.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise ValueError("README.md has no results markers")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    """Update README.md, or check it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render_readme")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    path = ROOT / "README.md"
    before = path.read_text()
    after = update(before, render(ROOT / "benchmarks" / "results"))
    if options.check:
        if before != after:
            print("README.md is stale: python -m benchmarks.render_readme", file=sys.stderr)
        return int(before != after)
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
