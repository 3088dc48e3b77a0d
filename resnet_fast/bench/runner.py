"""The driver: starts one worker per engine and gives them turns, A B C A B C ...

Only one worker is awake at a time: the others are stopped (SIGSTOP), so that no thread pool
spins beside the one being timed. A turn is a pause, unread warm-up calls, then timed calls.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from resnet_fast import plan, verify
from resnet_fast.bench.report import environment, summarise
from resnet_fast.errors import ArgumentError, ResNetFastError

DEFAULT_PEERS = ("eager", "eager_nhwc", "compile", "onnxruntime", "openvino")
# A turn lasts about this long, so that short networks are sampled more often.
TURN_SECONDS = 0.4
MAX_TURN_CALLS = 25
PAUSE_SECONDS = 0.05

Progress = Callable[[str], None]


class BenchError(ResNetFastError, RuntimeError):
    """A benchmark that must not be reported: this package's output is wrong, or it failed."""


class WorkerProcess:
    """A worker and the conversation with it."""

    def __init__(self, engine: str, threads: int, log: Path) -> None:
        self.engine = engine
        self.log = log.open("w+b")
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "PYTHONWARNINGS": "ignore",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "resnet_fast.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            text=True,
        )
        self.seconds_a_call = 0.0
        self.samples: list[float] = []
        self.info: dict[str, Any] = {}

    def ask(self, command: str, **request: Any) -> dict[str, Any]:
        """Wake the worker, send one request, wait for the reply and stop the worker again."""
        self._signal(signal.SIGCONT)
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"command": command} | request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"failed": f"worker ended with status {self.process.wait()}: {self._tail()}"}
        self._signal(signal.SIGSTOP)
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.log.close()

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def _tail(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"


class LocalWorker:
    """The same conversation within this process.

    For CUDA, where the CPU's thread pools do not matter and a context a process is dear.
    """

    def __init__(self, engine: str) -> None:
        from resnet_fast.bench.worker import Worker

        self.engine = engine
        self.worker: Any = Worker()
        self.seconds_a_call = 0.0
        self.samples: list[float] = []
        self.info: dict[str, Any] = {}

    def ask(self, command: str, **request: Any) -> dict[str, Any]:
        """Answer one request."""
        return self.worker.answer({"command": command} | request)

    def close(self) -> None:
        """Drop the engine and its memory."""
        self.worker = None


def bench_model(
    name: str,
    *,
    batch: int = 1,
    dtype: str = "fp32",
    size: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    engines: Sequence[str] = ("resnet_fast", *DEFAULT_PEERS),
    reps: int = 10,
    seed: int = 0,
    turn_seconds: float = TURN_SECONDS,
    isolate: bool = True,
    progress: Progress = lambda message: None,
) -> list[dict[str, Any]]:
    """Time ``engines`` on network ``name`` at one batch size, in ``reps`` interleaved rounds.

    With ``dtype`` int8 each engine quantises the fp32 network, and eager runs it as it is. Errors
    are then the outputs' distances from fp64, relative; one beyond ``verify.BROKEN`` fails.
    ``isolate=False`` keeps every engine in this process (see ``LocalWorker``).

    Returns one row an engine, unavailable ones included with the reason. Raises ``BenchError``
    if one of this package's engines fails, while it is timed too, or misses its error budget.
    """
    verify.check_model_name(name, others=True)
    if dtype == "int8" and device != "cpu":
        raise ArgumentError("dtype", "another than int8 on CUDA", repr(dtype))
    drawn_dtype = "fp32" if dtype == "int8" else dtype
    verify.dtype_from_name(drawn_dtype)
    _check_engines(engines)
    size = verify.default_size(name) if size is None else size
    threads = threads or default_threads()
    job = {"device": device, "threads": threads}
    what = f"{name} {dtype} batch {batch}"
    with _process_as_it_was(), tempfile.TemporaryDirectory(prefix="resnet_fast_bench_") as folder:
        path = str(Path(folder) / "problem.pt")
        workers: list[WorkerProcess | LocalWorker] = []

        def start(engine: str) -> WorkerProcess | LocalWorker:
            worker = (
                WorkerProcess(engine, threads, Path(folder) / f"{engine}.log")
                if isolate
                else LocalWorker(engine)
            )
            workers.append(worker)
            return worker

        try:
            progress("fp64 truth")
            drawn = start("truth")
            problem = drawn.ask(
                "prepare",
                path=path,
                model=name,
                dtype=drawn_dtype,
                batch=batch,
                size=size,
                seed=seed,
                **job,
            )
            drawn.close()
            workers.remove(drawn)
            if "failed" in problem:
                raise BenchError(f"{what}: {problem['failed']}")
            for engine in engines:
                progress(f"prepare {engine}")
                worker = start(engine)
                worker.info = worker.ask("build", engine=engine, path=path, dtype=dtype, **job)
                _refuse_wrong(worker, what)
                if "build_seconds" not in worker.info:
                    worker.close()
            alive = [worker for worker in workers if "build_seconds" in worker.info]
            _rounds(alive, reps, turn_seconds, progress, what)
            # Engines that share a process have no peak memory of their own.
            for worker in alive if isolate else ():
                worker.info |= worker.ask("memory")
                _refuse_wrong(worker, what)
        finally:
            for worker in workers:
                worker.close()
    case = {
        "model": name,
        "batch": batch,
        "dtype": dtype,
        "size": size,
        "device": device,
        "threads": threads,
        "reference": problem["reference"],
    }
    return summarise(case, [(w.engine, w.samples, w.info) for w in workers])


@contextlib.contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Engines that share this process set its threads, cuDNN's search and the plan in force."""
    import torch

    before = plan.active_plan()
    threads, search = torch.get_num_threads(), torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = search
        if plan.active_plan() is not before:
            plan.set_plan(before)


def _check_engines(names: Iterable[str]) -> None:
    from resnet_fast.bench.engines import ENGINES

    for name in names:
        if name not in ENGINES:
            raise ArgumentError("peers", "names among " + ", ".join(ENGINES), repr(name))


def _refuse_wrong(worker: WorkerProcess | LocalWorker, what: str) -> None:
    from resnet_fast.bench.engines import OURS

    if worker.engine not in OURS or "unavailable" in worker.info:
        return
    if "failed" in worker.info:
        raise BenchError(f"{what}: {worker.engine} failed: {worker.info['failed']}")
    if not worker.info["within_budget"]:
        raise BenchError(
            f"{what}: {worker.engine} is wrong by {worker.info['error']:.3g} against fp64 "
            f"(limit {worker.info['limit']:.3g}); nothing is reported"
        )


def _rounds(
    workers: Sequence[WorkerProcess | LocalWorker],
    reps: int,
    turn_seconds: float,
    progress: Progress,
    what: str,
) -> None:
    def turn(worker: WorkerProcess | LocalWorker, warmup: int, count: int) -> list[float]:
        reply = worker.ask("run", warmup=warmup, count=count)
        if "failed" in reply:
            worker.info["failed"] = reply["failed"]
            _refuse_wrong(worker, what)
        return reply.get("ms", [])

    for worker in workers:
        progress(f"warm up {worker.engine}")
        worker.seconds_a_call = sum(turn(worker, 2, 1)) / 1e3
    for rep in range(reps):
        for worker in workers:
            if "failed" in worker.info:
                continue
            progress(f"round {rep + 1}/{reps} {worker.engine}")
            time.sleep(PAUSE_SECONDS)
            calls = turn_seconds / max(worker.seconds_a_call, 1e-6)
            count = max(1, min(MAX_TURN_CALLS, round(calls)))
            worker.samples.extend(turn(worker, max(1, min(5, count // 3)), count))


def bench(
    name: str,
    *,
    batches: Sequence[int] = (1, 8),
    progress: Progress = lambda message: None,
    **options: Any,
) -> dict[str, Any]:
    """Run ``bench_model`` for each batch size; return ``{"environment", "rows"}``."""
    rows: list[dict[str, Any]] = []
    for batch in batches:

        def tell(message: str, batch: int = batch) -> None:
            progress(f"{name} batch {batch}: {message}")

        rows += bench_model(name, batch=batch, progress=tell, **options)
    threads = options.get("threads") or default_threads()
    return {"schema": 1, "environment": environment(threads), "rows": rows}


def default_threads() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))
