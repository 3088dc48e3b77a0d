"""The GPU campaign's dry mode, and the README's table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import campaign, chains, convolutions, render_readme, training
from resnet_fast.testing.budget import Verdict

ROOT = Path(__file__).resolve().parents[1]


def test_dry_campaign(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.campaign", "--dry", "--minutes", "4"]
    run = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / "campaign.json").read_text())
    assert [step["status"] for step in result["steps"]] == ["ok"] * 5
    assert result["dry"] and result["tests"] == "ok"
    assert {row["engine"] for row in result["rows"]} >= {"resnet_fast", "eager"}
    assert {row["batch"] for row in result["rows"]} == {1, 2}
    unavailable = [row for row in result["rows"] if row["engine"] == "cudnn_fused"]
    assert unavailable[0]["reason"] == "runs on CUDA only"
    (measured,) = result["chains"]
    assert len(measured["chains"]) == 9 and all(row["ok"] for row in measured["chains"])
    told = (tmp_path / "table.txt").read_text()
    assert "resnet18 fp32 b1" in told and "residual chains of resnet50 bf16 b1" in told


def test_what_compiles_runs_together_and_before_all_that_measures() -> None:
    steps = campaign.steps(Path("out"), dry=False)
    names = [step.name for step in steps]
    together = ["tests", "warm chains", "warm convolutions", "warm convolutions b1"]
    assert names[:7] == ["build", *together, "chains", "chains b1"]
    assert [step.name for step in steps if step.beside] == together
    assert names[7].startswith("resnet50 fp16 b128")


def test_steps_beside_each_other_share_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = (sys.executable, "-c", "import time; time.sleep(2)")
    order = [campaign.Step(f"wait {i}", wait, 30, beside=i < 3) for i in range(4)]
    monkeypatch.setattr(campaign, "steps", lambda out, dry: order)
    start = time.monotonic()
    assert campaign.campaign(1, tmp_path, dry=True) == 0
    assert 4 < time.monotonic() - start < 8
    done = json.loads((tmp_path / "campaign.json").read_text())["steps"]
    assert [step["name"] for step in done] == [step.name for step in order]


def test_failures_are_written_down_at_once(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "def test_good():\n    pass\ndef test_bad():\n    assert 1 == 2\n"
    )
    log = tmp_path / "failures.log"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.failures", str(tmp_path)]
    path = {"RESNET_FAST_FAILURES": str(log), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True)
    assert run.returncode == 1
    told = log.read_text().splitlines()
    assert told[0] == "test_it.py::test_bad [call]" and told[-1].endswith("assert 1 == 2")


def test_what_is_watched_is_there_only_with_its_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign.shutil, "which", lambda name: None)
    assert campaign.watched_steps(tmp_path) == []
    monkeypatch.setattr(campaign.shutil, "which", lambda name: f"/bin/{name}")
    watched = {step.name: step.command for step in campaign.watched_steps(tmp_path)}
    tools = ("memcheck", "racecheck", "synccheck")
    assert set(watched) == {
        "chains under ncu",
        *(f"{kind} under {tool}" for kind in ("chains", "convolutions") for tool in tools),
    }
    for name, command in watched.items():
        assert f"benchmarks.{name.partition(' ')[0]}" in command


def test_each_chain_runs_once_to_be_watched(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--once", "--batch", "1", "--size", "32", "--dtype", "fp32", "--device", "cpu"]
    assert chains.main(arguments) == 0
    assert capsys.readouterr().out.count("bytes read") == 9


def test_a_wrong_chain_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chains, "verify_chain", lambda site, device: Verdict(False, 1.0, 0.1))
    monkeypatch.setattr(chains, "interleaved", lambda *a: pytest.fail("timed"))
    arguments = ["--batch", "1", "--size", "32", "--dtype", "fp32", "--device", "cpu"]
    assert chains.main(arguments) == 1
    assert capsys.readouterr().out.count("MISMATCH: not timed") == 9


def test_time_is_kept_and_partial_results_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = sys.executable
    order = [
        campaign.Step("build", (python, "-c", "pass"), 30),
        campaign.Step("sleeper", (python, "-c", "import time; time.sleep(60)"), 0.5),
        campaign.Step("broken", (python, "-c", "raise SystemExit('no luck')"), 30),
    ]
    monkeypatch.setattr(campaign, "steps", lambda out, dry: order)
    assert campaign.campaign(1, tmp_path, dry=True) == 1
    steps = json.loads((tmp_path / "campaign.json").read_text())["steps"]
    assert [step["status"] for step in steps] == ["ok", "timeout", "failed"]
    assert steps[2]["tail"] == ["no luck"]
    assert campaign.campaign(0.05, tmp_path, dry=True) == 0
    steps = json.loads((tmp_path / "campaign.json").read_text())["steps"]
    assert {step["status"] for step in steps} == {"no time left"}


MODELS, DTYPES = ("resnet18", "resnet50"), ("fp16", "bf16", "fp32")


def first(model: str, dtype: str, batch: int, engine: str) -> int:
    """Which step measures this first."""
    return next(
        index
        for index, r in enumerate(campaign.ROWS)
        if (r.model, r.dtype) == (model, dtype) and batch in r.batches and engine in r.engines
    )


def test_every_case_is_measured_and_the_most_telling_come_first() -> None:
    ours = campaign.OURS[2]
    assert first("resnet50", "fp16", 128, "compile") == 0
    assert set(campaign.ROWS[0].engines) >= {*campaign.OURS, *campaign.QUICK_PEERS}
    beside_compile = [
        first(model, dtype, batch, "compile")
        for model in MODELS
        for dtype in DTYPES
        for batch in (128, 1)
    ]
    slow = [first(model, "fp16", batch, "compile_max") for model in MODELS for batch in (128, 1)]
    between = [
        first(model, dtype, batch, ours)
        for model in MODELS
        for dtype in DTYPES
        for batch in (8, 32, 256)
    ]
    assert max(*beside_compile, *slow) < min(between)
    for rows in campaign.ROWS:
        # A ratio needs both sides from one step; what compiles slowly runs beside one of ours.
        assert ours in rows.engines
        assert ("compile_max" in rows.engines) <= (len(rows.engines) == 2)


def test_gpu_tests_are_the_files_that_hold_some() -> None:
    """Only these are collected: another's imports must not fail the campaign."""
    (tests,) = (step for step in campaign.steps(Path("out"), dry=False) if step.name == "tests")
    named = [part for part in tests.command if part.startswith("tests")]
    listed = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests"]
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    assert "tests/test_cuda_ops.py" in named
    assert set(named) == {line.split("::")[0] for line in found.splitlines() if "::" in line}


def _result() -> dict[str, object]:
    row = {"model": "resnet18", "dtype": "fp32", "batch": 1, "size": 224}
    facts = {"cpu": "a processor", "threads": 2, "torch": "2", "commit": "abc", "date": "today"}
    return {
        "environment": facts,
        "command": "resnet-fast bench resnet18",
        "rows": [
            row | {"engine": "eager", "median_ms": 20.0},
            row | {"engine": "resnet_fast", "median_ms": 10.0},
            row | {"engine": "openvino", "status": "unavailable", "reason": "not installed"},
        ],
    }


def test_readme_table(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(_result()))
    text = render_readme.render(tmp_path)
    assert "| resnet18 fp32 batch 1 | **10** | 20 |" in text
    more = _result()
    more["command"] = "resnet-fast bench resnet18 --batch 8 --json b.json"
    more["rows"] = [row | {"batch": 8} for row in more["rows"]]
    (tmp_path / "b.json").write_text(json.dumps(more))
    both = render_readme.render(tmp_path)
    assert both.count("milliseconds a batch") == 1, "one machine and commit, one table"
    assert "batch 8 | **10** | 20 |" in both and "`resnet-fast bench resnet18 --batch 8`" in both
    assert "a processor, 2 threads" in text and "`resnet-fast bench resnet18`" in text
    readme = f"top\n{render_readme.BEGIN}\nold\n{render_readme.END}\nend\n"
    assert render_readme.update(readme, text).startswith(f"top\n{render_readme.BEGIN}\n| milli")
    with pytest.raises(ValueError, match="markers"):
        render_readme.update("nothing", text)


def test_red_or_dry_results_are_not_published() -> None:
    for mark in ({"dry": True}, {"tests": "failed"}):
        with pytest.raises(ValueError, match="not a result"):
            render_readme.check_publishable(_result() | mark)


def test_readme_matches_the_results() -> None:
    assert render_readme.main(["--check"]) == 0


def test_single_convolutions_are_verified_before_they_are_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "convolutions.json"
    tiny = ["--model", "resnet18", "--batch", "1", "--size", "32", "--device", "cpu"]
    assert convolutions.main([*tiny, "--dtype", "fp32", "--reps", "1", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["convolutions"]
    assert len({row["key"] for row in rows}) == len(rows) == 15
    for row in rows:
        assert "median_us" in row["candidates"]["aten"]
        for entry in row["candidates"].values():
            assert ("median_us" in entry) == entry.get("ok", True)
    assert capsys.readouterr().out.count("\n") >= 15


def test_what_calls_cost_the_host_is_told_by_candidate() -> None:
    def row(one: float, other: float) -> dict[str, Any]:
        costs = {
            "triton": {"host_us": one, "prepared_host_us": one / 4},
            "aten": {"host_us": other},
        }
        return {"key": "conv|1x2x3x4|2x2x1x1|", "candidates": costs}

    told = convolutions.table([row(100, 30), row(120, 40)]).splitlines()[-2:]
    assert told == [
        "us of the host a call, as it is, median: triton 110, aten 35",
        "us of the host a call, prepared, median: triton 28",
    ]
    assert "host" not in convolutions.table([{"key": "a|b|c", "candidates": {"aten": {}}}])
    slow = convolutions.host_us(lambda: time.sleep(1e-3))
    assert 1e3 <= slow < 1e5


def test_a_training_step_is_held_against_the_frameworks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "training.json"
    tiny = ["--model", "resnet18", "--batch", "4", "--size", "32", "--device", "cpu"]
    command = [*tiny, "--dtype", "fp32", "--reps", "1", "--engines", "resnet_fast,eager_nhwc"]
    assert training.main([*command, "--out", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["held"] and all(row["median_us"] > 0 for row in result["rows"])
    monkeypatch.setattr(training, "difference", lambda model, exact: float("nan"))
    monkeypatch.setattr(training, "interleaved", lambda *a: pytest.fail("timed"))
    assert training.main(command) == 1
    assert "not timed" in capsys.readouterr().out
