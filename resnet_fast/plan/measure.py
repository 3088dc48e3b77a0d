"""Timing of a site's candidates: interleaved, so that drift hits all of them alike."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Enough rounds for a median, few enough that tuning ResNet-50 at batch 1 takes seconds.
_ROUNDS = 7

# Cycles a second that the clock of no GPU exceeds by much: what is slept lasts at least as long.
_CLOCK = 2.5e9


def _seconds_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def seconds_cuda(run: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """Seconds that the current CUDA device takes for one call of ``run``, untimed ``before`` first.

    The device is kept busy until the host has launched all of it, and what passes between the
    events is the device's time alone: without that a kernel of 10 us is measured as the 100 us that
    Python takes to launch it. What a launch costs the host is measured by a call before, unread.
    """
    host = _seconds_cpu(run)
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(2 * host * _CLOCK))
    if before is not None:
        before()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def measure(
    runs: Mapping[str, Callable[[], Tensor]], device: torch.device, rounds: int = _ROUNDS
) -> dict[str, float]:
    """Median microseconds of each of ``runs``, after one unread warm-up call each."""
    on_cuda = device.type == "cuda"
    seconds = seconds_cuda if on_cuda else _seconds_cpu
    samples: dict[str, list[float]] = {name: [] for name in runs}
    # Events and the sleep are the current device's.
    current = torch.cuda.device(device) if on_cuda else contextlib.nullcontext()
    with torch.inference_mode(), current:
        for run in runs.values():
            run()
        if on_cuda:
            torch.cuda.synchronize(device)
        for _ in range(rounds):
            for name, run in runs.items():
                samples[name].append(seconds(run))
    return {name: statistics.median(values) * 1e6 for name, values in samples.items()}
