"""A network's convolutions, one by one: every candidate verified, then timed beside the others.

    python -m benchmarks.convolutions --model resnet50 --batch 128 --dtype fp16 --out conv.json

For each distinct convolution of the network, with its batch norm, residual and activation: the
candidates of its site that hold against fp64 (cuDNN's own path among them), in one interleaved run,
the second-level cache cleared before each call. Bytes are those the layer has to move, so GB/s and
the share of the roofline are comparable with a copy's. A candidate that leaves its error budget is
listed and not timed. On a GPU the row also has what a call costs the host, as it is and prepared
as a site keeps it. ``--warm`` verifies and compiles first, a process a CPU; ``--once`` runs each of
this package's CUDA kernels once, for a sanitizer to watch.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import resnet_fast
from benchmarks.chains import each_in_a_process, interleaved, parser_of
from resnet_fast import ops
from resnet_fast.bench.report import environment, save_json
from resnet_fast.nn.site import FusedSite
from resnet_fast.ops import _pack
from resnet_fast.plan import binding, devices
from resnet_fast.plan.candidate import CANDIDATES, Candidate
from resnet_fast.plan.site import DTYPES, Site, device_name
from resnet_fast.plan.verify import random_inputs, verify
from resnet_fast.verify import dtype_from_name

OURS = "implicit_gemm"


def sites(model: str, batch: int, size: int, dtype: torch.dtype, device: str) -> list[Site]:
    """The distinct convolutions of a network at this batch, in its order."""
    # A GPU's are found on meta tensors, where nothing runs, hence nothing is compiled or timed.
    place = "cpu" if device == "cpu" else "meta"
    network = getattr(resnet_fast, model)().eval().to(place, dtype)
    network = network.to(memory_format=torch.channels_last)
    network.chains = network.sequences = None
    images = torch.zeros(batch, 3, size, size, device=place, dtype=dtype)
    with torch.inference_mode(), binding.as_if_on(device_name(torch.device(device))):
        network(images.contiguous(memory_format=torch.channels_last))
    found: dict[str, Site] = {}
    for module in network.modules():
        if isinstance(module, FusedSite):
            for _, site in module._bindings.values():
                found.setdefault(site.key, site)
    return list(found.values())


# Calls whose launches a GPU's queue holds: the host never waits for the device.
_QUEUED = 64


def host_us(run: Callable[[], Any]) -> float:
    """Median microseconds until one call of ``run`` returns, the device idle at first."""
    samples = []
    for _ in range(_QUEUED):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples) * 1e6


def measure(site: Site, batch: int, device: torch.device, reps: int) -> dict[str, Any]:
    """One row: bytes, and every candidate's verdict, median and quartiles."""
    x, args, residual = random_inputs(site, device, batch)
    scale, shift = _pack.fold(*args[1:7])
    work = ops.module("conv_bn_act").work(
        x, args.weight, scale, shift, residual, *args[7:], site.act
    )
    row: dict[str, Any] = {
        "key": site.key,
        "bytes": work.read + work.written,
        "flops": work.flops,
        "candidates": {},
    }
    known = devices.of(device)
    if known is not None:
        kind = {"float16": "fp16", "bfloat16": "bf16"}.get(site.dtype, "tf32")
        seconds, row["roof"] = known.seconds(row["bytes"], work.flops, kind)
        row["roofline_us"] = seconds * 1e6
    runs: dict[str, Callable[[], Any]] = {}
    kept: dict[str, Callable[[], Any]] = {}
    for name, candidate in CANDIDATES.items():
        if candidate.reject(site) is not None:
            continue
        entry: dict[str, Any] = {}
        if name != "aten":
            verdict = verify(site, candidate, device)
            entry = {"ok": verdict.ok, "error": verdict.error, "limit": verdict.limit}
        if candidate.variant is not None:
            entry["variant"] = candidate.variant(site)
        row["candidates"][name] = entry
        if entry.get("ok", True):
            runs[name] = functools.partial(candidate.run, x, args, residual, site.act)
            if candidate.prepare is not None:
                kept[name] = functools.partial(candidate.prepare(x, args, site.act), x, residual)
    with torch.inference_mode():
        for name, samples in interleaved(runs, device, reps).items():
            low, median, high = statistics.quantiles([*samples, *samples], n=4)
            row["candidates"][name] |= {"median_us": median, "quartiles_us": [low, high]}
        for key, calls in (("host_us", runs), ("prepared_host_us", kept)):
            for name, run in calls.items() if device.type == "cuda" else ():
                run()  # what is paid once
                torch.cuda.synchronize(device)
                row["candidates"][name][key] = host_us(run)
                torch.cuda.synchronize(device)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One convolution a line: this package's best kernel beside cuDNN's best path."""
    lines = [
        f"{'x':>18} {'weight':>16} {'roof us':>8} {'ours':<26} {'us':>8} {'rival':<12} {'us':>8} "
        f"{'ratio':>6}"
    ]
    for row in rows:
        us = {k: v["median_us"] for k, v in row["candidates"].items() if "median_us" in v}
        mine = {k: v for k, v in us.items() if k.startswith(OURS)}
        rivals = {k: v for k, v in us.items() if k not in mine and k != "triton"}
        best = min(mine, key=mine.__getitem__, default="-")
        rival = min(rivals, key=rivals.__getitem__, default="-")
        a, b = mine.get(best, float("nan")), rivals.get(rival, float("nan"))
        parts = row["key"].split("|")
        lines.append(
            f"{parts[1]:>18} {parts[2]:>16} {row.get('roofline_us', float('nan')):>8.1f} "
            f"{best:<26} {a:>8.1f} {rival:<12} {b:>8.1f} {b / a:>6.2f}"
        )
        wrong = [k for k, v in row["candidates"].items() if not v.get("ok", True)]
        if wrong:
            lines.append(f"{'':>18} beyond the error budget, not timed: {', '.join(wrong)}")
    for key, meaning in (("host_us", "as it is"), ("prepared_host_us", "prepared")):
        costs: dict[str, list[float]] = {}
        for row in rows:
            for name, entry in row["candidates"].items():
                if key in entry:
                    costs.setdefault(name, []).append(entry[key])
        if costs:
            told = ", ".join(f"{k} {statistics.median(v):.0f}" for k, v in costs.items())
            lines.append(f"us of the host a call, {meaning}, median: {told}")
    return "\n".join(lines)


def run_once(site: Site, device: torch.device, batch: int) -> None:
    """Each of this package's CUDA kernels that takes the site."""
    x, args, residual = random_inputs(site, device, batch)
    for name, candidate in CANDIDATES.items():
        if name.startswith(OURS) and candidate.reject(site) is None:
            _run(candidate, x, args, residual, site.act)
            print(f"{name} at {site.key}")


def _run(candidate: Candidate, x: Tensor, args: Any, residual: Tensor | None, act: str) -> None:
    with torch.inference_mode():
        candidate.run(x, args, residual, act)


def _warm(job: tuple[Site, int, str]) -> str:
    site, batch, name = job
    device = torch.device(name)
    x, args, residual = random_inputs(site, device, batch)
    told = []
    for candidate in CANDIDATES.values():
        if candidate.name == "aten" or candidate.reject(site) is not None:
            continue
        try:
            if binding.verified(site, candidate, device)[0]:
                _run(candidate, x, args, residual, site.act)
        except (RuntimeError, ValueError, TypeError) as failure:
            told.append(f"{candidate.name} at {site.key}: {str(failure)[:200]}")
    return "\n".join(told)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where one of this package's kernels left its error budget."""
    parser = parser_of("convolutions", __doc__)
    parser.add_argument("--warm", action="store_true")
    options = parser.parse_args(argv)
    dtype, device = dtype_from_name(options.dtype), torch.device(options.device)
    found = sites(options.model, options.batch, options.size, dtype, options.device)
    assert all(DTYPES[site.dtype] is dtype for site in found)
    if options.once:
        for site in found:
            run_once(site, device, options.batch)
        return 0
    if options.warm:
        each_in_a_process(_warm, [(site, options.batch, options.device) for site in found])
    if options.reps == 0:
        return 0
    rows: list[dict[str, Any]] = []
    for site in found:
        rows.append(measure(site, options.batch, device, options.reps))
        result = {
            "schema": 1,
            "command": "python -m benchmarks.convolutions " + " ".join(argv or sys.argv[1:]),
            "environment": environment(torch.get_num_threads()),
            "model": options.model,
            "dtype": options.dtype,
            "batch": options.batch,
            "size": options.size,
            "convolutions": rows,
        }
        if options.out is not None:
            save_json(result, options.out)
    print(table(rows))
    entries = [(k, v) for row in rows for k, v in row["candidates"].items()]
    return int(not all(v.get("ok", True) for k, v in entries if k.startswith(OURS)))


if __name__ == "__main__":
    sys.exit(main())
