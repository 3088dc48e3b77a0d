"""One engine in one process, driven by JSON lines: ``python -m resnet_fast.bench.worker``.

Requests arrive on stdin, one object a line with a ``command``; each is answered by one object.
Replies go to the original stdout; whatever a library prints goes to stderr instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Ask the kernel to end this process with its driver, also while it is stopped."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _memory_mb() -> float | None:
    """Peak resident memory since the last reset, in MB (10**6 bytes)."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return None


def _reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def _put_in_force(wanted: Any) -> None:
    """Let the plan ``wanted`` decide; only a change makes every site look up its binding again."""
    from resnet_fast import plan

    if plan.active_plan() is not wanted:
        plan.set_plan(wanted)


class Worker:
    """State of one worker between requests."""

    def __init__(self) -> None:
        self.call: Any = None
        # The process's plan when the engine was checked: engines may share the process.
        self.plan: Any = None
        self.cuda = False
        self.build_peak: float | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request; a failure becomes a reply of one line."""
        try:
            return getattr(self, request["command"])(request)
        except Exception as error:
            if os.environ.get("RESNET_FAST_DEBUG"):
                traceback.print_exc()
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            return {"failed": f"{type(error).__name__}: {message}"}

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Draw the problem and write it to files that the other workers read."""
        import torch

        from resnet_fast import verify

        torch.set_num_threads(request["threads"])
        problem = verify.make_problem(
            request["model"],
            request["dtype"],
            request["batch"],
            request["size"],
            seed=request["seed"],
            device=request["device"],
        )
        torch.save(vars(problem), request["path"])
        return {"reference": problem.reference}

    def build(self, request: dict[str, Any]) -> dict[str, Any]:
        """Prepare an engine, run it once and check the output against the truth."""
        import torch

        from resnet_fast import plan, verify
        from resnet_fast.bench import engines

        torch.set_num_threads(request["threads"])
        self.cuda = request["device"] == "cuda"
        # Peers at their best: let cuDNN choose by measuring, which the unread calls pay for.
        torch.backends.cudnn.benchmark = self.cuda
        problem = verify.Problem(**torch.load(request["path"], weights_only=True))
        job = engines.Job(
            problem.model,
            request["dtype"],
            request["device"],
            request["threads"],
            problem.state,
            problem.x,
        )
        _put_in_force(None)
        start = time.perf_counter()
        try:
            self.call = engines.ENGINES[request["engine"]](job)
            output = engines.to_tensor(self.call())
        except engines.Unavailable as error:
            return {"unavailable": str(error)}
        seconds = time.perf_counter() - start
        self.plan = plan.active_plan()
        # What 8 bits lose is a figure to report; the budget is for those who keep the dtype.
        judge = verify.check_distance if job.int8 else verify.check_output
        check = judge(problem, output, request["engine"])
        if job.int8 and not check.ok:
            wrong = check.detail or f"{check.error:.3g} of fp64's norm away (limit {check.limit})"
            return {"failed": f"the output is broken: {wrong}"}
        self.build_peak = _memory_mb()
        _reset_peak()
        return {
            "build_seconds": seconds,
            "error": check.error,
            "limit": check.limit,
            "within_budget": check.ok,
        }

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Call the engine ``warmup`` times unread, then ``count`` times; milliseconds each."""
        _put_in_force(self.plan)
        for _ in range(request["warmup"]):
            self.call()
        if not self.cuda:
            samples = []
            for _ in range(request["count"]):
                start = time.perf_counter()
                self.call()
                samples.append((time.perf_counter() - start) * 1e3)
            return {"ms": samples}
        import torch

        events = [torch.cuda.Event(enable_timing=True) for _ in range(request["count"] + 1)]
        events[0].record()
        for event in events[1:]:
            self.call()
            event.record()
        torch.cuda.synchronize()
        return {"ms": [a.elapsed_time(b) for a, b in itertools.pairwise(events)]}

    def memory(self, request: dict[str, Any]) -> dict[str, Any]:
        """Peak memory while preparing and while running."""
        reply: dict[str, Any] = {"prepare_peak_mb": self.build_peak, "run_peak_mb": _memory_mb()}
        if self.cuda:
            import torch

            reply["cuda_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
        return reply


def main() -> None:
    """Serve requests until stdin closes."""
    _die_with_parent()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        replies.write(json.dumps(worker.answer(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
