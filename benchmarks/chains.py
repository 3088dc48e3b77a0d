"""A network's residual chains, one by one: verified, then timed beside their layers.

    python -m benchmarks.chains --model resnet50 --batch 128 --dtype fp16 --out chains.json

For each distinct chain of the network: its error and limit against fp64, then in one interleaved
run, the second-level cache cleared before each call, the chain by its default config and by every
other, and its layers by each way to run them. Bytes are those the chain has to move (the traffic
account's), so GB/s and the share of the roofline are comparable with a copy's. A chain that is not
verified is not timed. ``--warm`` compiles the kernels first, a process a CPU; ``--once`` only runs
each chain once, for a sanitizer or a profiler to watch.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import resnet_fast
from benchmarks.campaign import chain_table
from resnet_fast import ops
from resnet_fast.bench.report import environment, save_json
from resnet_fast.nn.chain import ChainBlock, chain_blocks
from resnet_fast.plan import devices
from resnet_fast.plan.candidate import CANDIDATES
from resnet_fast.plan.chain import ChainArgs, ChainSite, run_chain, verify_chain
from resnet_fast.testing.networks import randomize_batchnorm_
from resnet_fast.verify import dtype_from_name

# Larger than any second-level cache: writing it evicts what the call before has left there.
_FLUSH_BYTES = 256 << 20


class Case:
    """One chain of the network with tensors to run it on."""

    def __init__(self, name: str, block: ChainBlock, inner: Tensor, x: Tensor) -> None:
        self.name, self.site = name, block.site(inner, x)
        self.args: ChainArgs = block.args()
        self.inner, self.x = torch.randn_like(inner), torch.randn_like(x)
        self.operands = self.args.operands()

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of the op."""
        return (self.inner, self.x, *self.operands, *self.site.strides, "relu")

    def layers(self, name: str) -> Callable[[], Any]:
        """The chain's layers, each by the candidate ``name``."""
        run = CANDIDATES[name].run

        def call() -> Any:
            conv2, conv3, down, following = self.args
            inner, shortcut = self.inner, self.x
            if down is not None:
                shortcut = run(shortcut, down, None, "none")
            if conv3 is None:
                return run(inner, conv2, shortcut, "relu")
            if conv2 is not None:
                inner = run(inner, conv2, None, "relu")
            y = run(inner, conv3, shortcut, "relu")
            return y, None if following is None else run(y, following, None, "relu")

        return call

    def runs(self) -> dict[str, Callable[[], Any]]:
        """Every way to run it here, by name."""
        found: dict[str, Callable[[], Any]] = {
            "chain": lambda: run_chain(self.inner, self.x, self.operands, self.site.strides, "relu")
        }
        if self.x.is_cuda:
            from resnet_fast.kernels import residual_chain as room

            for config in room.configs(self.x.dtype):
                launch = functools.partial(
                    room.launch_residual_chain, *self.arguments, config=config
                )
                found[f"chain {config.name}"] = launch
        sites = self.site.sites
        for name, candidate in CANDIDATES.items():
            if all(candidate.reject(site) is None for site in sites):
                found[f"layers {name}"] = self.layers(name)
        return found


def cases(model: str, batch: int, size: int, dtype: torch.dtype, device: str) -> list[Case]:
    """The distinct chains of a network, in its order."""
    torch.manual_seed(0)
    network = randomize_batchnorm_(getattr(resnet_fast, model)()).eval().to(device, dtype)
    network = network.to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    found: dict[str, Case] = {}
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        for name, block in chain_blocks(
            [getattr(network, f"layer{i}") for i in (1, 2, 3, 4)],
            [f"layer{i}" for i in (1, 2, 3, 4)],
        ):
            inner = block.inner(x, None)
            if block.saves and block.site(inner, x).key not in found:
                found[block.site(inner, x).key] = Case(name, block, inner, x)
            x = block.finish(x, inner)
    return list(found.values())


def interleaved(
    runs: dict[str, Callable[[], Any]], device: torch.device, reps: int
) -> dict[str, list[float]]:
    """Microseconds of each call, ``reps`` of each, taking turns; a failing one has none."""
    samples: dict[str, list[float]] = {}
    length = _FLUSH_BYTES if device.type == "cuda" else 0
    flush = torch.empty(length, dtype=torch.int8, device=device)
    for name, run in list(runs.items()):
        try:
            run(), run()
            samples[name] = []
        except (RuntimeError, ValueError, TypeError) as failure:
            print(f"  {name}: {str(failure)[:200]}", file=sys.stderr)
    for _ in range(reps):
        for name in samples:
            flush.zero_()
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                runs[name]()
                end.record()
                end.synchronize()
                samples[name].append(start.elapsed_time(end) * 1e3)
            else:
                before = time.perf_counter()
                runs[name]()
                samples[name].append((time.perf_counter() - before) * 1e6)
    return samples


def measure(case: Case, reps: int) -> dict[str, Any]:
    """One row: verdict, bytes, and every way's median and quartiles."""
    device = case.x.device
    verdict = verify_chain(case.site, device)
    work = ops.module("residual_chain").work(*case.arguments)
    row: dict[str, Any] = {
        "name": case.name,
        "key": case.site.key,
        "ok": verdict.ok,
        "error": verdict.error,
        "limit": verdict.limit,
        "bytes": work.read + work.written,
        "flops": work.flops,
    }
    if not verdict.ok:
        return row
    known = devices.of(device)
    if known is not None:
        seconds, row["roof"] = known.seconds(row["bytes"], work.flops, _arithmetic(case.site))
        row["roofline_us"] = seconds * 1e6
    row["us"] = {}
    with torch.inference_mode():
        for name, samples in interleaved(case.runs(), device, reps).items():
            low, median, high = statistics.quantiles([*samples, *samples], n=4)
            row["us"][name] = {"median": median, "quartiles": [low, high]}
    return row


def _arithmetic(site: ChainSite) -> str:
    dtype = site.sites[0].dtype
    return {"float16": "fp16", "bfloat16": "bf16"}.get(dtype, "tf32")


def _warm(job: tuple[str, int, int, str, str, int]) -> str:
    *question, index = job
    model, batch, size, dtype, device = question
    case = cases(model, batch, size, dtype_from_name(dtype), device)[index]
    for name, run in case.runs().items():
        try:
            run()
        except (RuntimeError, ValueError, TypeError) as failure:
            return f"{case.name} {name}: {str(failure)[:200]}"
    return ""


def warm(model: str, batch: int, size: int, dtype: str, device: str, count: int) -> None:
    """Compile every kernel of every case into Triton's cache, a process a case."""
    jobs = [(model, batch, size, dtype, device, index) for index in range(count)]
    workers = min(count, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for message in filter(None, pool.map(_warm, jobs)):
            print(message, file=sys.stderr)


def parser_of(name: str, text: str | None) -> argparse.ArgumentParser:
    """What measurements of a network's parts are asked with."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=text)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--reps", type=int, default=20)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where a chain left its error budget."""
    parser = parser_of("chains", __doc__)
    parser.add_argument("--warm", action="store_true")
    options = parser.parse_args(argv)
    dtype = dtype_from_name(options.dtype)
    found = cases(options.model, options.batch, options.size, dtype, options.device)
    if options.once:
        for case in found:
            with torch.inference_mode():
                case.runs()["chain"]()
            work = ops.module("residual_chain").work(*case.arguments)
            print(f"{case.name}: {work.read} bytes read, {work.written} written, as counted")
        return 0
    if options.warm:
        # At four images: sizes are arguments of the kernels, only what divides them is compiled in.
        question = (options.model, 4, options.size, options.dtype, options.device)
        warm(*question, len(found))
    rows: list[dict[str, Any]] = []
    for case in found:
        rows.append(measure(case, options.reps))
        result = {
            "schema": 1,
            "command": "python -m benchmarks.chains " + " ".join(argv or sys.argv[1:]),
            "environment": environment(torch.get_num_threads()),
            "model": options.model,
            "dtype": options.dtype,
            "batch": options.batch,
            "size": options.size,
            "chains": rows,
        }
        if options.out is not None:
            save_json(result, options.out)
    print(chain_table(rows))
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
