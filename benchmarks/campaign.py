"""Everything a short GPU session should bring home, the most telling part first.

    python -m benchmarks.campaign --minutes 9 --out DIR [--dry]

Builds in place what does not load. Then all that waits for compilers runs side by side, on every
processor: the GPU tests, each failure in DIR/failures.log at once, and the Triton kernels of what
is measured. Then, one at a time, the residual chains, ResNet-50 in fp16, single convolutions, a
training step, the sanitizer, and network by network. Each step is a subprocess with a time limit of
its own: nothing of the package is imported here, where it may not be built yet. DIR/campaign.json
is rewritten after each, and each bench step saves after each batch size, so that an end at any
moment keeps what was measured. Needs no network. ``--dry`` walks the same steps on the CPU with
tiny settings.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESERVE_SECONDS = 5.0
MINIMUM_SECONDS = 8.0

OURS = ("resnet_fast", "resnet_fast_tuned", "resnet_fast_graph")
LAYERS = "resnet_fast_layers"
QUICK_PEERS = ("eager", "eager_nhwc", "eager_graph", "cudnn_fused")


@dataclass(frozen=True)
class Step:
    """One subprocess: what to run, for how long at most, and with which environment.

    ``beside`` steps run together with their neighbours of that kind: they measure nothing.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    beside: bool = False


@dataclass(frozen=True)
class Rows:
    """A bench step's order: one network and dtype, several batch sizes, some engines."""

    model: str
    dtype: str
    batches: tuple[int, ...]
    engines: tuple[str, ...]
    limit: float
    size: int = 224
    device: str = "cuda"
    reps: int = 8
    threads: int | None = None


# Ordered by what is missed most if the time runs out: the headline, then one image and the other
# networks and dtypes, each beside torch.compile; its slow mode; the batch sizes between.
BESIDE_COMPILE = (*OURS, *QUICK_PEERS, "compile")
ROWS = (
    Rows("resnet50", "fp16", (128,), (*BESIDE_COMPILE, LAYERS), 240),
    Rows("resnet50", "fp16", (1,), (*BESIDE_COMPILE, LAYERS), 150),
    Rows("resnet50", "bf16", (128, 1), BESIDE_COMPILE, 120),
    Rows("resnet18", "fp16", (128, 1), BESIDE_COMPILE, 90),
    Rows("resnet50", "fp32", (128, 1), BESIDE_COMPILE, 120),
    Rows("resnet50", "fp16", (128, 1), (OURS[2], "compile_max"), 180),
    Rows("resnet18", "bf16", (128, 1), BESIDE_COMPILE, 90),
    Rows("resnet18", "fp32", (128, 1), BESIDE_COMPILE, 90),
    Rows("resnet18", "fp16", (128, 1), (OURS[2], "compile_max"), 150),
    Rows("resnet50", "fp16", (256, 32, 8), (*OURS, *QUICK_PEERS), 60),
    Rows("resnet50", "bf16", (256, 32, 8), (*OURS, *QUICK_PEERS), 60),
    Rows("resnet50", "fp32", (256, 32, 8), (*OURS, *QUICK_PEERS), 75),
    Rows("resnet18", "fp16", (256, 32, 8), (*OURS, *QUICK_PEERS), 45),
    Rows("resnet18", "bf16", (256, 32, 8), (*OURS, *QUICK_PEERS), 45),
    Rows("resnet18", "fp32", (256, 32, 8), (*OURS, *QUICK_PEERS), 45),
    Rows("resnet50", "fp16", (256, 32, 8), (OURS[2], "compile"), 120),
)
DRY_ROWS = (
    Rows("resnet18", "fp32", (1, 2), ("resnet_fast", "eager"), 90, 32, "cpu", 1, 1),
    Rows(
        "resnet18", "bf16", (1,), ("resnet_fast", "eager_nhwc", "cudnn_fused"), 90, 32, "cpu", 1, 1
    ),
)


def gpu_tests() -> list[str]:
    """The test files that hold GPU tests: collecting the others may need what is not installed."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    marked = re.compile(r"^(@|pytestmark = \[?)pytest\.mark\.gpu\b", re.MULTILINE)
    return [f"tests/{file.name}" for file in files if marked.search(file.read_text())]


def chain_steps(out: Path, dry: bool) -> list[Step]:
    """The residual chains one by one: what every other figure follows from."""
    command = (sys.executable, "-m", "benchmarks.chains", "--out")
    if dry:
        tiny = ("--batch", "1", "--size", "64", "--dtype", "bf16", "--device", "cpu", "--reps", "1")
        return [Step("chains", (*command, str(out / "chains.json"), *tiny), 90)]
    return [
        Step("chains", (*command, str(out / "chains.json")), 60),
        Step("chains b1", (*command, str(out / "chains_b1.json"), "--batch", "1"), 60),
    ]


def watched_steps(out: Path) -> list[Step]:
    """The chains under the sanitizer, and their bytes by the hardware's counters."""
    once = (sys.executable, "-m", "benchmarks.chains", "--once", "--batch")
    order: list[Step] = []
    profiler, sanitizer = shutil.which("ncu"), shutil.which("compute-sanitizer")
    if profiler is not None:
        metrics = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
        counted = (profiler, "--csv", "--metrics", metrics, "--kernel-name", "chain_kernel")
        log = ("--log-file", str(out / "chains_ncu.csv"))
        order.append(Step("chains under ncu", (*counted, *log, *once, "128"), 90))
    for tool in ("memcheck", "racecheck", "synccheck"):
        if sanitizer is not None:
            watch = (sanitizer, "--tool", tool, "--error-exitcode", "9")
            tiny = ("1", "--size", "64")
            order.append(Step(f"chains under {tool}", (*watch, *once, *tiny), 120))
            single = (sys.executable, "-m", "benchmarks.convolutions", "--once", "--batch")
            order.append(Step(f"convolutions under {tool}", (*watch, *single, *tiny), 120))
    return order


def steps(out: Path, dry: bool) -> list[Step]:
    """The campaign's steps in order."""
    python = sys.executable
    order: list[Step] = []
    if dry:
        order.append(Step("build", (python, "-c", "import resnet_fast"), 60))
        order.append(
            Step("tests", (python, "-m", "pytest", "-q", "-x", "tests/test_errors.py"), 60)
        )
    else:
        order.append(Step("build", (python, "-m", "benchmarks.campaign", "--build"), 180))
    if dry:
        return order + chain_steps(out, dry) + rows_steps(out, dry)
    order += beside_steps(out)
    rows = rows_steps(out, dry)
    convolutions = (python, "-m", "benchmarks.convolutions", "--out")
    training = (python, "-m", "benchmarks.training", "--out")
    single = [
        Step("convolutions", (*convolutions, str(out / "convolutions.json")), 60),
        Step("convolutions b1", (*convolutions, str(out / "convolutions_b1.json"), *ONE), 40),
        Step("training", (*training, str(out / "training.json")), 150),
    ]
    return [*order, *chain_steps(out, dry), *rows[:2], *single, *watched_steps(out), *rows[2:]]


ONE = ("--batch", "1")


def beside_steps(out: Path) -> list[Step]:
    """What compiles for minutes on one processor, and measures nothing.

    No result is published before the tests are green (render_readme).
    """
    python = sys.executable
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider"]
    tests += ["-p", "benchmarks.failures"]
    if importlib.util.find_spec("xdist") is not None:
        tests += ["-n", str(max(1, (os.cpu_count() or 2) // 2))]
    environment = {
        "RESNET_FAST_REQUIRE_GPU": "1",
        "RESNET_FAST_FAILURES": str(out / "failures.log"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    found = [Step("tests", (*tests, *gpu_tests()), 240, environment, beside=True)]
    for name, more in (("chains", ()), ("convolutions", ()), ("convolutions", ONE)):
        command = (python, "-m", f"benchmarks.{name}", "--warm", "--reps", "0", *more)
        title = " ".join(("warm", name, *(("b1",) if more else ())))
        found.append(Step(title, command, 180, beside=True))
    return found


def rows_steps(out: Path, dry: bool) -> list[Step]:
    """A step for each of the bench's orders."""
    python = sys.executable
    order: list[Step] = []
    for index, rows in enumerate(DRY_ROWS if dry else ROWS):
        path = out / f"rows_{index:02d}.json"
        name = f"{rows.model} {rows.dtype} b{','.join(map(str, rows.batches))} #{index}"
        command = (python, "-m", "benchmarks.campaign", "--rows", json.dumps(vars(rows)))
        order.append(Step(name, (*command, "--out", str(path)), rows.limit))
    return order


def build() -> int:
    """Make the package importable in this checkout without a network.

    The op libraries are free of Python and load in any torch since 2.11: where they are there, only
    what does not load is built.
    """
    environment = dict(os.environ)
    if "TORCH_CUDA_ARCH_LIST" not in environment:
        import torch

        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            suffix = "a" if major >= 9 else ""
            environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}{suffix}"
    if not _loads(environment):
        inplace = (sys.executable, "setup.py", "build_ext", "--inplace")
        status = subprocess.run(inplace, cwd=ROOT, env=environment).returncode
        if status:
            return status
    # An editable install maps resnet_fast.kernels to kernels/. Without pip, a link does.
    install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    editable = (*install, "--no-build-isolation", "-e", str(ROOT))
    if subprocess.run(editable, env=environment).returncode == 0:
        return 0
    link = ROOT / "resnet_fast" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..") / "kernels")
    return 0


def _loads(environment: dict[str, str]) -> bool:
    """Whether all three native parts load as they are."""
    told = "from resnet_fast import _library as l; print([s.loaded for s in l.status().values()])"
    command = (sys.executable, "-c", told)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout.strip() == "[True, True, True]"


def run_rows(order: dict[str, Any], path: Path) -> int:
    """Bench one order in this process; save after each batch size."""
    from resnet_fast.bench.report import environment, save_json
    from resnet_fast.bench.runner import BenchError, bench_model, default_threads

    rows: list[dict[str, Any]] = []
    failed = False
    for batch in order["batches"]:
        try:
            rows += bench_model(
                order["model"],
                batch=batch,
                dtype=order["dtype"],
                size=order["size"],
                device=order["device"],
                threads=order["threads"],
                engines=tuple(order["engines"]),
                reps=order["reps"],
                turn_seconds=0.1 if order["device"] == "cuda" else 0.02,
                isolate=False,
            )
        except BenchError as error:
            failed = True
            print(error, file=sys.stderr)
            continue
        facts = environment(order["threads"] or default_threads())
        save_json({"schema": 1, "environment": facts, "rows": rows}, path)
    return int(failed)


def run_step(step: Step, limit: float, log: Path) -> dict[str, Any]:
    """Run one step within ``limit`` seconds and describe how it ended."""
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=os.environ | step.environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Compilers that the step started must not run beside the next measurement.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    tail = log.read_text(errors="replace").strip().splitlines()[-4:]
    status = "timeout" if code is None else "ok" if code == 0 else "failed"
    return {
        "name": step.name,
        "status": status,
        "code": code,
        "seconds": round(time.monotonic() - start, 1),
        "tail": tail,
    }


def campaign(minutes: float, out: Path, dry: bool) -> int:
    """Run every step that the time allows; return 0 when those that ran succeeded."""
    end = time.monotonic() + minutes * 60
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("rows_*.json"), *out.glob("chains*.json")):
        old.unlink()
    done: list[dict[str, Any]] = []
    result: dict[str, Any] = {}

    def run(index: int, step: Step) -> dict[str, Any]:
        left = end - time.monotonic() - RESERVE_SECONDS
        if left < MINIMUM_SECONDS:
            return {"name": step.name, "status": "no time left", "seconds": 0.0, "tail": []}
        limit = min(step.limit, left)
        print(f"{step.name} (at most {limit:.0f} s) ...", flush=True)
        record = run_step(step, limit, out / f"step_{index:02d}.log")
        print(f"  {step.name}: {record['status']} after {record['seconds']} s", flush=True)
        return record

    order = list(enumerate(steps(out, dry)))
    while order:
        together = list(itertools.takewhile(lambda entry: entry[1].beside, order)) or order[:1]
        order = order[len(together) :]
        with ThreadPoolExecutor(len(together)) as pool:
            done += pool.map(lambda entry: run(*entry), together)
        result = collect(out, done, dry)
        temporary = out / "campaign.json.tmp"
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(out / "campaign.json")
        if together[0][1].name == "build" and done[-1]["status"] != "ok":
            break
    text = table(result)
    (out / "table.txt").write_text(text + "\n")
    print(text)
    return int(any(step["status"] in ("failed", "timeout") for step in done))


def collect(out: Path, done: Sequence[dict[str, Any]], dry: bool) -> dict[str, Any]:
    """Gather the steps' records and the rows saved so far."""
    rows: list[dict[str, Any]] = []
    environment: dict[str, Any] = {}
    for path in sorted(out.glob("rows_*.json")):
        saved = json.loads(path.read_text())
        environment = saved["environment"]
        rows += saved["rows"]
    tests = next((step["status"] for step in done if step["name"] == "tests"), "not run")
    return {
        "schema": 1,
        "dry": dry,
        "tests": tests,
        "environment": environment,
        "steps": list(done),
        "rows": rows,
        "chains": [json.loads(path.read_text()) for path in sorted(out.glob("chains*.json"))],
    }


def table(result: dict[str, Any]) -> str:
    """A short plain-text table of the campaign."""
    lines = [f"GPU tests: {result['tests']}" + ("  (dry run on the CPU)" if result["dry"] else "")]
    for step in result["steps"]:
        if step["status"] != "ok":
            reason = f": {step['tail'][-1]}" if step["tail"] else ""
            lines.append(f"{step['name']}: {step['status']}{reason}")
    lines.append(
        f"{'network':<22} {'engine':<18} {'median ms':>9} {'img/s':>9} {'vs eager':>8} {'error':>8}"
    )
    for row in result["rows"]:
        network = f"{row['model']} {row['dtype']} b{row['batch']}"
        if "median_ms" not in row:
            lines.append(f"{network:<22} {row['engine']:<18} {row['status']}: {row['reason']}")
            continue
        ratio = f"{row['vs_eager']:.2f}" if "vs_eager" in row else "-"
        lines.append(
            f"{network:<22} {row['engine']:<18} {row['median_ms']:>9.3f} "
            f"{row['images_per_second']:>9.0f} {ratio:>8} {row['error']:>8.1e}"
            + ("" if row["within_budget"] else " outside the budget")
        )
    for measured in result.get("chains", ()):
        question = f"{measured['model']} {measured['dtype']} b{measured['batch']}"
        lines += ["", f"residual chains of {question}", chain_table(measured["chains"])]
    return "\n".join(lines)


def chain_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of benchmarks.chains as text, one chain a line, the best of its layers beside it."""
    lines = [
        f"{'chain':<10} {'error':>8} {'of':>8} {'MB':>8} {'us':>9} {'GB/s':>6} {'TFLOP/s':>7} "
        f"{'of roof':>7} {'best config':<22} {'us':>8} {'best layers':<20} {'us':>8} {'ratio':>6}"
    ]
    for row in rows:
        megabytes = row["bytes"] / 1e6
        start = f"{row['name']:<10} {row['error']:>8.1e} {row['limit']:>8.1e} {megabytes:>8.1f}"
        if not row["ok"]:
            lines.append(f"{start} MISMATCH: not timed")
            continue
        us = {name: entry["median"] for name, entry in row["us"].items()}
        chain = us.get("chain", float("nan"))
        configs = {k.removeprefix("chain "): v for k, v in us.items() if k.startswith("chain ")}
        layers = {k.removeprefix("layers "): v for k, v in us.items() if k.startswith("layers ")}
        best = min(configs, key=configs.__getitem__, default="-")
        rival = min(layers, key=layers.__getitem__, default="-")
        roof = f"{row['roofline_us'] / chain:>7.0%}" if "roofline_us" in row else f"{'-':>7}"
        other = layers.get(rival, float("nan"))
        fastest = configs.get(best, float("nan"))
        lines.append(
            f"{start} {chain:>9.1f} {row['bytes'] / chain / 1e3:>6.0f} "
            f"{row['flops'] / chain / 1e6:>7.1f} {roof} {best:<22} "
            f"{fastest:>8.1f} {rival:<20} {other:>8.1f} {other / chain:>6.2f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaign", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny settings on the CPU")
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.build:
        return build()
    if options.out is None:
        parser.error("--out DIR is required")
    if options.rows:
        return run_rows(json.loads(options.rows), options.out)
    if options.minutes <= 0:
        parser.error("--minutes must be positive")
    return campaign(options.minutes, options.out.resolve(), options.dry)


if __name__ == "__main__":
    sys.exit(main())
