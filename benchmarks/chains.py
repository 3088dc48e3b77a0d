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
import copy
import functools
import multiprocessing
import os
import re
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
from resnet_fast.plan import binding, devices
from resnet_fast.plan.candidate import CANDIDATES
from resnet_fast.plan.chain import ChainArgs, ChainSite, run_chain, verify_chain
from resnet_fast.plan.measure import seconds_cuda
from resnet_fast.plan.site import device_name
from resnet_fast.testing.networks import randomize_batchnorm_
from resnet_fast.verify import dtype_from_name

# Larger than any second-level cache: writing it evicts what the call before has left there.
_FLUSH_BYTES = 256 << 20


class Case:
    """One chain of the network with tensors to run it on.

    Attributes:
        match: regular expression for the names of those ways to run it that are looked at.
    """

    match = ""

    def __init__(self, name: str, block: ChainBlock, inner: Tensor, x: Tensor) -> None:
        self.name, self.site = name, block.site(inner, x)
        self.args: ChainArgs = block.args()
        self.inner, self.x = inner, x
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

    def runs(self, configs: Sequence[str] = ()) -> dict[str, Callable[[], Any]]:
        """Every way to run it here, by name; ``configs`` beside the dtype's own."""
        found: dict[str, Callable[[], Any]] = {
            "chain": lambda: run_chain(self.inner, self.x, self.operands, self.site.strides, "relu")
        }
        if self.x.is_cuda:
            from resnet_fast.kernels import chain_tiles, residual_chain

            own = chain_tiles.configs(self.x.dtype)
            for config in (*own, *map(chain_tiles.Config.parse, configs)):
                launch = functools.partial(
                    residual_chain.launch_residual_chain, *self.arguments, config=config
                )
                found[f"chain {config.name}"] = launch
        sites = self.site.sites
        for name, candidate in CANDIDATES.items():
            if all(candidate.reject(site) is None for site in sites):
                found[f"layers {name}"] = self.layers(name)
        return {name: run for name, run in found.items() if re.search(self.match, name)}


def _stages(network: Any) -> list[tuple[str, ChainBlock]]:
    names = [f"layer{i}" for i in (1, 2, 3, 4)]
    return chain_blocks([getattr(network, name) for name in names], names)


def cases(model: str, batch: int, size: int, dtype: torch.dtype, device: str) -> list[Case]:
    """The distinct chains of a network, in its order."""
    torch.manual_seed(0)
    network = randomize_batchnorm_(getattr(resnet_fast, model)()).eval().to(dtype)
    # A GPU's sizes are found on meta tensors, where nothing runs, hence nothing is compiled.
    place = torch.device("cpu" if device == "cpu" else "meta")
    shadow = copy.deepcopy(network).to(place)
    network = network.to(device).to(memory_format=torch.channels_last)
    found: dict[str, Case] = {}
    with torch.no_grad(), binding.as_if_on(device_name(torch.device(device))):
        x = torch.zeros(batch, 3, size, size, device=place, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        x = shadow.maxpool(shadow.relu(shadow.bn1(shadow.conv1(x))))
        for (name, block), (_, outline) in zip(_stages(network), _stages(shadow), strict=True):
            inner = outline.inner(x, None)
            if block.saves:
                sizes = (inner, x)
                drawn = [torch.randn(t.shape, device=device).to(dtype) for t in sizes]
                case = Case(
                    name, block, *(t.contiguous(memory_format=torch.channels_last) for t in drawn)
                )
                found.setdefault(case.site.key, case)
            x = outline.finish(x, inner)
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
        except Exception as failure:  # compilers have errors of their own
            print(f"  {name}: {str(failure)[:200]}", file=sys.stderr)
    for _ in range(reps):
        for name in samples:
            if device.type == "cuda":
                samples[name].append(seconds_cuda(runs[name], flush.zero_) * 1e6)
            else:
                before = time.perf_counter()
                runs[name]()
                samples[name].append((time.perf_counter() - before) * 1e6)
    return samples


def measure(case: Case, reps: int, configs: Sequence[str] = ()) -> dict[str, Any]:
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
        for name, samples in interleaved(case.runs(configs), device, reps).items():
            low, median, high = statistics.quantiles([*samples, *samples], n=4)
            row["us"][name] = {"median": median, "quartiles": [low, high]}
    return row


def _arithmetic(site: ChainSite) -> str:
    dtype = site.sites[0].dtype
    return {"float16": "fp16", "bfloat16": "bf16"}.get(dtype, "tf32")


# A worker of the pool has many jobs of one network.
_cases = functools.lru_cache(maxsize=1)(cases)


def _warm(job: tuple[str, int, int, str, str, tuple[str, ...], int, str]) -> str:
    model, batch, size, dtype, device, configs, index, name = job
    case = _cases(model, batch, size, dtype_from_name(dtype), device)[index]
    try:
        case.runs(configs)[name]()
    except Exception as failure:  # compilers have errors of their own
        return f"{case.name} {name}: {str(failure)[:200]}"
    return ""


def each_in_a_process(work: Callable[[Any], str], jobs: Sequence[Any]) -> None:
    """Call ``work`` with every job, a process a CPU, and print what it has to say.

    Kernels are compiled by one processor each: what these compile, the caches on disk hold.
    """
    workers = max(1, min(len(jobs), len(os.sched_getaffinity(0))))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for message in filter(None, pool.map(work, jobs)):
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
    parser.add_argument("--reps", type=int, default=20, help="0: only --warm")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where a chain left its error budget."""
    parser = parser_of("chains", __doc__)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--match", default="", help="only ways whose names match this")
    parser.add_argument("--configs", default="", help="more of them, such as 64x64x64w4s3,...")
    options = parser.parse_args(argv)
    Case.match = options.match
    configs = tuple(filter(None, options.configs.split(",")))
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
        jobs = [(i, name) for i, case in enumerate(found) for name in case.runs(configs)]
        each_in_a_process(_warm, [(*question, configs, *job) for job in jobs])
    if options.reps == 0:
        return 0
    rows: list[dict[str, Any]] = []
    for case in found:
        rows.append(measure(case, options.reps, configs))
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
