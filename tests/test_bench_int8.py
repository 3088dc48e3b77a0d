"""The benchmark on 8 bits: who takes part, on which images, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from resnet_fast import verify
from resnet_fast.bench import BenchError, bench_model, int8
from resnet_fast.bench.engines import ENGINES, OURS
from resnet_fast.bench.report import notes, summarise, table
from resnet_fast.errors import ArgumentError
from resnet_fast.ops import conv_bn_act_int8

NETWORK = "cifar_resnet20"


def bench_int8(*engines: str, **options: Any) -> list[dict[str, Any]]:
    return bench_model(
        NETWORK, dtype="int8", batch=2, reps=1, threads=1, turn_seconds=0.001, isolate=False,
        engines=engines, **options,
    )  # fmt: skip


def test_calibration_is_the_same_at_each_call_and_not_the_input() -> None:
    job: Any = SimpleNamespace(x=verify.make_problem(NETWORK, "fp32", 2, 32).x)
    first, second = int8.calibration(job), int8.calibration(job)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    images = torch.cat(first)
    assert images.dtype is torch.float32 and images.shape[1:] == job.x.shape[1:]
    assert not any(torch.equal(image, x) for image in images for x in job.x)


@pytest.mark.skipif(not conv_bn_act_int8.available(), reason="the CPU op library is not loaded")
def test_ours_quantises_and_its_distance_is_a_figure() -> None:
    ours, eager = bench_int8("resnet_fast", "eager")
    assert (ours["status"], ours["dtype"]) == ("ok", "int8")
    assert 1e-4 < ours["error"] < 0.1 and ours["limit"] == verify.BROKEN
    assert (eager["status"], eager["dtype"]) == ("ok", "fp32") and eager["error"] < 1e-5
    assert ours["vs_eager"] == pytest.approx(eager["median_ms"] / ours["median_ms"])


def test_engines_without_8_bits_say_so() -> None:
    reasons = {
        "resnet_fast_tuned": "no plan chooses among 8-bit kernels",
        "eager_nhwc": "does not quantise the network",
        "compile": "does not quantise the network",
        "compile_max": "does not quantise the network",
    }
    rows = bench_int8(*reasons)
    assert {row["engine"]: row["reason"] for row in rows} == reasons
    assert {row["status"] for row in rows} == {"unavailable"}


def test_openvino_without_nncf_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", ModuleType("openvino"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else name)
    (row,) = bench_int8("openvino")
    assert row["status"] == "unavailable" and row["reason"] == "not installed (pip install nncf)"


@pytest.mark.parametrize(
    ("peer", "modules"),
    (("onnxruntime", ("onnx", "onnxruntime")), ("openvino", ("openvino", "nncf"))),
)
def test_a_peer_quantises(peer: str, modules: tuple[str, ...]) -> None:
    for module in modules:
        pytest.importorskip(module)
    (row,) = bench_int8(peer)
    assert row["status"] == "ok", row["reason"]
    assert 1e-4 < row["error"] < 0.1


@pytest.mark.parametrize(
    ("spoil", "words"),
    (
        (lambda y: y * torch.nan, "nan of fp64's norm away"),
        (lambda y: y * 1.6, r"0\.6 of fp64's norm away \(limit 0\.5\)"),
        (lambda y: y[:, 1:], "shape"),
    ),
    ids=("nan", "far", "shape"),
)
def test_a_broken_output_is_refused(
    spoil: Callable[[torch.Tensor], torch.Tensor], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = ENGINES["eager"]

    def broken(job: Any) -> Any:
        call: Any = eager(job)
        return lambda: spoil(call())

    for engine in ("resnet_fast", "openvino"):
        monkeypatch.setitem(ENGINES, engine, broken)
    peer, kept = bench_int8("openvino", "eager")
    assert peer["status"] == "failed" and peer["reason"].startswith("the output is broken: ")
    assert kept["best_peer"] == "eager"
    with pytest.raises(BenchError, match=f"resnet_fast failed: the output is broken: .*{words}"):
        bench_int8("resnet_fast")


def test_8_bits_may_lose_more_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = ENGINES["eager"]

    def inexact(job: Any) -> Any:
        call: Any = eager(job)
        return lambda: call() * 1.1

    monkeypatch.setitem(ENGINES, "resnet_fast", inexact)
    (row,) = bench_int8("resnet_fast")
    assert row["status"] == "ok" and row["error"] == pytest.approx(0.1, rel=1e-3)


def test_the_report_names_fp32() -> None:
    case = {"model": NETWORK, "batch": 1, "dtype": "int8", "size": 32, "reference": "the network"}
    info: dict[str, Any] = {"error": 0.01, "limit": verify.BROKEN, "within_budget": True}
    rows = summarise(case, [("resnet_fast", [1.0], info), ("eager", [4.0], info)])
    assert [row["dtype"] for row in rows] == ["int8", "fp32"] and rows[0]["vs_eager"] == 4.0
    (network,) = (column for column in table(rows).columns if column.header == "network")
    assert list(network.cells) == [f"{NETWORK} int8 b1", f"{NETWORK} fp32 b1"]
    assert notes(rows) == [
        "eager, in fp32, is the network; error is the output's distance from fp64, relative"
    ]


def test_8_bits_are_for_the_cpu() -> None:
    with pytest.raises(ArgumentError, match=r"'dtype'.*CUDA"):
        bench_model(NETWORK, dtype="int8", device="cuda", engines=OURS)
