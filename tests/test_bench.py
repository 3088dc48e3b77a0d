"""The benchmark's arithmetic, its driver and its refusal."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx.experimental.optimization import fuse

from resnet_fast import plan
from resnet_fast.bench import BenchError, bench, bench_model, runner
from resnet_fast.bench import engines as engines_module
from resnet_fast.bench.engines import ENGINES, OURS, CudnnFused
from resnet_fast.bench.report import notes, percentile, save_csv, save_json, summarise, table
from resnet_fast.errors import ArgumentError
from resnet_fast.testing.budget import expect_within_budget, in_formats

CASE = {"model": "resnet18", "batch": 2, "dtype": "fp32", "size": 64}


def test_percentile() -> None:
    assert percentile([3.0], 0.9) == 3.0
    assert percentile([4.0, 1.0, 3.0, 2.0, 5.0], 0.5) == 3.0
    assert percentile([0.0, 10.0], 0.1) == pytest.approx(1.0)


def test_ratios_compare_medians() -> None:
    info: dict[str, Any] = {"error": 0.0, "limit": 1.0, "within_budget": True}
    rows = summarise(
        CASE,
        [
            ("resnet_fast", [10.0, 10.0, 40.0], info),
            ("eager", [20.0, 20.0, 20.0], info),
            ("eager_nhwc", [5.0, 5.0, 5.0], info),
            ("openvino", [], {"unavailable": "not installed"}),
        ],
    )
    ours, eager, nhwc, absent = rows
    assert ours["vs_eager"] == 2.0
    assert ours["best_peer"] == "eager_nhwc" and ours["vs_best_peer"] == 0.5
    assert eager["vs_eager"] == 1.0 and nhwc["images_per_second"] == 400.0
    assert absent["status"] == "unavailable" and "median_ms" not in absent


def test_report_files(tmp_path: Path) -> None:
    info: dict[str, Any] = {"error": 1e-6, "limit": 1e-5, "within_budget": True}
    result = {"environment": {"cpu": "x"}, "rows": summarise(CASE, [("eager", [1.0, 2.0], info)])}
    save_json(result, tmp_path / "a.json")
    save_csv(result, tmp_path / "a.csv")
    assert json.loads((tmp_path / "a.json").read_text()) == result
    header, line = (tmp_path / "a.csv").read_text().splitlines()
    assert header.startswith("model,batch") and line.startswith("resnet18,2")
    assert table(result["rows"]).row_count == 1


def test_an_absent_peer_is_named_below_the_table() -> None:
    info = {"unavailable": "not installed (pip install openvino)"}
    rows = summarise(CASE, [("openvino", [], info)]) * 2
    (median,) = (c for c in table(rows).columns if c.header == "median ms")
    assert list(median.cells) == ["unavailable"] * 2
    assert notes(rows) == ["openvino is unavailable: not installed (pip install openvino)"]


def test_quick_bench_in_workers(tmp_path: Path) -> None:
    result = bench(
        "resnet18",
        batches=(2,),
        size=64,
        reps=1,
        threads=1,
        engines=("resnet_fast", "eager", "cudnn_fused"),
        turn_seconds=0.01,
    )
    ours, eager, cudnn = result["rows"]
    assert ours["within_budget"] and ours["error"] <= ours["limit"]
    assert ours["median_ms"] > 0 and eager["vs_eager"] == 1.0
    assert ours["run_peak_mb"] > 10
    assert cudnn["status"] == "unavailable" and cudnn["reason"] == "runs on CUDA only"
    assert result["environment"]["torch"] == torch.__version__


def test_a_wrong_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(job: Any) -> Any:
        model = ENGINES["eager"](job)
        return lambda: model() + 1

    monkeypatch.setitem(ENGINES, "resnet_fast", wrong)
    with pytest.raises(BenchError, match="nothing is reported"):
        bench_model("resnet18", size=32, reps=1, engines=("resnet_fast",), isolate=False)


def test_a_failing_peer_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: Any) -> Any:
        raise RuntimeError("no such thing\nsecond line")

    monkeypatch.setitem(ENGINES, "eager", broken)
    (row,) = bench_model("resnet18", size=32, reps=1, engines=("eager",), isolate=False)
    assert row["status"] == "failed" and row["reason"] == "RuntimeError: no such thing"


class Failing:
    """A worker whose engine fails after ``good`` turns; the first is the probe."""

    def __init__(self, engine: str, good: int) -> None:
        self.engine, self.good = engine, good
        self.info: dict[str, Any] = {"within_budget": True}
        self.samples: list[float] = []
        self.seconds_a_call = 0.0

    def ask(self, command: str, **request: Any) -> dict[str, Any]:
        self.good -= 1
        return {"ms": [1.0]} if self.good >= 0 else {"failed": "RuntimeError: out of memory"}


@pytest.mark.parametrize("good", (0, 1, 2))
def test_ours_failing_while_it_is_timed_is_no_report(good: int) -> None:
    def rounds(worker: Any) -> None:
        runner._rounds([worker], 2, 0.0, lambda message: None, "resnet18 fp32 batch 1")

    peer = Failing("compile", good)
    rounds(peer)
    assert peer.info["failed"] == "RuntimeError: out of memory"
    with pytest.raises(BenchError, match="batch 1: resnet_fast failed: RuntimeError: out of mem"):
        rounds(Failing("resnet_fast", good))


@pytest.mark.usefixtures("sites_taken_as_verified")
def test_engines_that_share_a_process_keep_their_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is what is timed, whichever engine was built last."""
    ran: list[list[tuple[str, ...]]] = []

    def inference(model: Any, x: Any) -> Any:
        seen: list[tuple[str, ...]] = []
        ran.append(seen)

        def call() -> Any:
            with torch.inference_mode():
                y = model(x)
            seen.append(tuple(row["candidate"] for row in plan.model_rows(model)))
            return y

        return call

    def tune(model: Any, x: Any) -> plan.Plan:
        with torch.inference_mode():
            model(x)
        sites = [site for module in model.modules() for _, site in bindings(module)]
        return plan.Plan(plan.device_name("cpu"), {s.key: plan.Entry("aten") for s in sites})

    def bindings(module: Any) -> Any:
        return getattr(module, "_bindings", {}).values()

    monkeypatch.setattr(engines_module, "_inference", inference)
    monkeypatch.setattr(plan, "tune", tune)
    kept = plan.Plan("kept")
    with plan.use(kept):
        bench_model(
            "cifar_resnet20",
            engines=("resnet_fast", "resnet_fast_tuned"),
            reps=2,
            turn_seconds=0.001,
            isolate=False,
        )
        assert plan.active_plan() is kept
    default, tuned = ran
    assert len(default) > 4 and set(default) == {default[0]}
    assert set(default[0]) != {"aten"}
    assert len(tuned) > 4 and {name for row in tuned for name in row} == {"aten"}


def test_an_absent_peer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (row,) = bench_model("resnet18", size=32, reps=1, engines=("openvino",), isolate=False)
    assert row["status"] == "unavailable" and row["reason"].startswith("not installed")


def test_a_worker_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    worker = runner.WorkerProcess("eager", 1, tmp_path / "log")
    try:
        assert "worker ended" in worker.ask("memory")["failed"]
    finally:
        worker.close()


def test_workers_sleep_between_turns(tmp_path: Path) -> None:
    worker = runner.WorkerProcess("eager", 1, tmp_path / "log")
    try:
        assert worker.ask("memory")["run_peak_mb"] > 0
        os.waitid(os.P_PID, worker.process.pid, os.WSTOPPED | os.WNOWAIT)
    finally:
        worker.close()


def test_cudnn_executor_folds_and_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wiring on the CPU, with cuDNN's two calls spelled out in plain ones."""
    from resnet_fast import verify

    conv = torch.nn.functional.conv2d

    def relu(x: Any, w: Any, b: Any, *geometry: Any) -> torch.Tensor:
        return conv(x, w, b, *geometry).relu()

    def add_relu(x: Any, w: Any, z: Any, alpha: float, b: Any, *geometry: Any) -> torch.Tensor:
        return (conv(x, w, b, *geometry) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    for name in ("resnet18", "resnet50"):
        problem = verify.make_problem(name, "fp32", 1, 32)
        model, _ = verify.build_reference(name)
        model.load_state_dict(problem.state)
        with torch.inference_mode():
            actual = CudnnFused(model, torch.float32)(problem.x)
            # The framework that folds, too: its weights are rounded once more.
            frameworks = in_formats(fuse(model), problem.x)
        expect_within_budget(actual, frameworks, problem.truth)


def test_ours_are_engines() -> None:
    assert set(OURS) < set(ENGINES)


def test_torchvisions_other_networks_run_through_accelerate() -> None:
    pytest.importorskip("torchvision")
    from resnet_fast import verify

    assert "mobilenet_v2" in verify.other_names() and "resnet18" not in verify.other_names()
    assert verify.default_size("efficientnet_b3") == 300
    rows = bench_model(
        "mobilenet_v2", size=64, reps=1, turn_seconds=0.001, engines=("resnet_fast", "eager"),
        isolate=False,
    )  # fmt: skip
    assert [row["status"] for row in rows] == ["ok", "ok"]


class _Timm(ModuleType):
    """As much of timm as the benchmark asks for."""

    __version__ = "1.2.3"

    def list_models(self) -> list[str]:
        return ["convmixer_4"]

    def create_model(self, name: str) -> torch.nn.Module:
        assert name == "convmixer_4"
        conv, norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
        head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10)
        return torch.nn.Sequential(conv, norm, torch.nn.ReLU(), *head)

    def get_pretrained_cfg(self, name: str) -> Any:
        return SimpleNamespace(input_size=(3, 48, 48))


def test_timms_networks_run_through_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", _Timm("timm"))
    rows = bench_model(
        "timm/convmixer_4", reps=1, turn_seconds=0.001, engines=("resnet_fast", "eager"),
        isolate=False,
    )  # fmt: skip
    assert [(row["status"], row["size"]) for row in rows] == [("ok", 48)] * 2
    assert rows[0]["reference"] == "timm 1.2.3"
    with pytest.raises(ArgumentError, match="did you mean timm/convmixer_4"):
        bench_model("timm/convmixer_5")
    with pytest.raises(ArgumentError, match=r"timm\.list_models\(\)"):
        bench_model("timm/zzz")


def test_timm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ArgumentError, match="pip install timm"):
        bench_model("timm/resnet18")
