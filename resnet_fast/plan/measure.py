"""Timing of a site's candidates: interleaved, so that drift hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Enough rounds for a median, few enough that tuning ResNet-50 at batch 1 takes seconds.
_ROUNDS = 7


def _seconds_cpu(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_cuda(run: Callable[[], Tensor]) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def measure(
    runs: Mapping[str, Callable[[], Tensor]], device: torch.device, rounds: int = _ROUNDS
) -> dict[str, float]:
    """Median microseconds of each of ``runs``, after one unread warm-up call each."""
    seconds = _seconds_cuda if device.type == "cuda" else _seconds_cpu
    samples: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for run in runs.values():
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for _ in range(rounds):
            for name, run in runs.items():
                samples[name].append(seconds(run))
    return {name: statistics.median(values) * 1e6 for name, values in samples.items()}
