"""The demo: real digits, ImageNet networks against eager, and an account of what was fused."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

# A ratio this close to 1 is called the same speed: two medians of one engine differ as much.
NOISE = 0.03


@dataclass
class DigitsResult:
    """What the digits part found; rates in images a second."""

    images: int
    reference_accuracy: float
    fused_accuracy: float
    agreeing: int
    reference_rate: float
    fused_rate: float


def run_demo(*, quick: bool, device: str | None, console: Console) -> bool:
    """Run the demo and print it; return False when an answer was wrong."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    good = True
    parts: list[str] = []
    slower: list[str] = []
    with _progress(console) as advance:
        console.rule("1. Handwritten digits through a ResNet-20", align="left")
        advance("digits", 0.0)
        digits = _digits_or_none(quick, device, console)
        if digits is not None:
            good &= digits.agreeing == digits.images
            ratio = digits.fused_rate / digits.reference_rate
            parts.append(
                f"digits {digits.fused_accuracy:.1%} (reference {digits.reference_accuracy:.1%}), "
                f"{digits.agreeing}/{digits.images} answers equal, {ratio:.2f}x"
            )
            _note_slower(slower, "digits", ratio)
        else:
            parts.append("digits skipped")
        console.rule("2. ImageNet networks against eager", align="left")
        rows = _networks(quick, device, advance)
        good &= _print_networks(rows, console, parts, slower)
        console.rule("3. What was fused in resnet18", align="left")
        advance("explain resnet18", 0.97)
        _explain(quick, device, console)
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    verdict = "within the error budget" if good else "WRONG ANSWERS"
    console.print(
        f"Summary on {device}: {verdict}; {'; '.join(parts)}; "
        f"slower than eager: {', '.join(slower) or 'nothing'}; took {minutes} min {seconds} s.",
        style="bold" if good else "bold red",
        highlight=False,
        soft_wrap=True,
    )
    return good


def _note_slower(slower: list[str], what: str, ratio: float) -> None:
    if ratio < 1 - NOISE:
        slower.append(f"{what} ({ratio:.2f}x)")


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, plain lines elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        shown: list[str] = []

        def line(message: str, fraction: float) -> None:
            head = message.split(":")[0]
            if head not in shown:
                shown.append(head)
                console.print(f"[{fraction:4.0%}] {head}", highlight=False, markup=False)

        yield line
        return
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def update(message: str, fraction: float) -> None:
            bar.update(task, description=message, completed=fraction)

        yield update


def _digits_or_none(quick: bool, device: str, console: Console) -> DigitsResult | None:
    from resnet_fast.errors import LibraryError

    try:
        result = digits_part(quick=quick, device=device)
    except LibraryError as error:
        console.print(f"skipped: {error}", highlight=False, markup=False)
        return None
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("path", "accuracy", "images/s"):
        table.add_column(heading, justify="left" if heading == "path" else "right")
    for path, accuracy, rate in (
        ("reference (eager)", result.reference_accuracy, result.reference_rate),
        ("fused", result.fused_accuracy, result.fused_rate),
    ):
        table.add_row(path, f"{accuracy:.2%}", f"{rate:.0f}")
    console.print(table)
    console.print(
        f"{result.agreeing} of {result.images} held-out MNIST digits get the same answer from both",
        highlight=False,
    )
    return result


def digits_part(*, quick: bool = False, device: str = "cpu") -> DigitsResult:
    """Classify the held-out digits with the shipped ResNet-20, plain and fused."""
    import torch

    from resnet_fast import models
    from resnet_fast.data import digits
    from resnet_fast.nn.blocks import unfuse_

    _, held_out = digits()
    fused = models.digits_resnet20().to(device)
    reference = unfuse_(copy.deepcopy(fused))
    batch = 100
    # Every tenth image: the split is ordered by class.
    step = 10 if quick else 1
    images = held_out.images[::step].to(device)
    labels = held_out.labels[::step].to(device)

    def classify(model: torch.nn.Module) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        with torch.inference_mode():
            answers = torch.cat([model(part).argmax(1) for part in images.split(batch)])
        if device == "cuda":
            torch.cuda.synchronize()
        return answers, time.perf_counter() - start

    answers = {}
    seconds: dict[str, list[float]] = {"reference": [], "fused": []}
    for turn in range(3 if quick else 7):
        for name, model in (("reference", reference), ("fused", fused)):
            answers[name], taken = classify(model)
            # The first turn pays for verification and for packing weights.
            if turn:
                seconds[name].append(taken)
    count = len(labels)
    return DigitsResult(
        count,
        float((answers["reference"] == labels).double().mean()),
        float((answers["fused"] == labels).double().mean()),
        int((answers["reference"] == answers["fused"]).sum()),
        count / statistics.median(seconds["reference"]),
        count / statistics.median(seconds["fused"]),
    )


def _networks(
    quick: bool, device: str, advance: Callable[[str, float], None]
) -> list[dict[str, Any]]:
    from resnet_fast.bench import bench_model

    names = ("resnet18",) if quick else ("resnet18", "resnet50")
    batches = (1,) if quick else (1, 8)
    cases = [(name, batch) for name in names for batch in batches]
    rows: list[dict[str, Any]] = []
    for index, (name, batch) in enumerate(cases):
        fraction = 0.05 + 0.9 * index / len(cases)

        def tell(message: str, what: str = f"{name} batch {batch}", at: float = fraction) -> None:
            advance(f"{what}: {message}", at)

        rows += bench_model(
            name,
            batch=batch,
            dtype="fp16" if device == "cuda" else "fp32",
            size=64 if quick else 224,
            device=device,
            engines=("resnet_fast", "eager", "eager_nhwc"),
            reps=2 if quick else 4,
            turn_seconds=0.1 if quick else 0.4,
            progress=tell,
        )
    return rows


def _print_networks(
    rows: list[dict[str, Any]], console: Console, parts: list[str], slower: list[str]
) -> bool:
    from resnet_fast.bench.report import notes, table

    console.print(table(rows))
    ours = [row for row in rows if row["engine"] == "resnet_fast"]
    for note in notes(rows):
        console.print(note, highlight=False, markup=False)
    for row in ours:
        what = f"{row['model']} b{row['batch']}"
        parts.append(f"{what} {row['vs_eager']:.2f}x eager (error {row['error']:.0e})")
        _note_slower(slower, what, row["vs_eager"])
        _note_slower(slower, f"{what} beside {row['best_peer']}", row["vs_best_peer"])
    return all(row["within_budget"] for row in ours)


def _explain(quick: bool, device: str, console: Console) -> None:
    from resnet_fast.cli import explanation, print_explanation

    dtype = "fp16" if device == "cuda" else "fp32"
    told = explanation("resnet18", 1, dtype, 64 if quick else None, device)
    print_explanation(told, console)
