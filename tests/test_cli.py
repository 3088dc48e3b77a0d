"""The command line: help, output formats, errors and exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from resnet_fast import __version__, cli, kernel_report, verify
from resnet_fast.bench import BenchError, runner
from resnet_fast.fuse import Explanation
from resnet_fast.ops import _checks


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "resnet_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("resnet-fast: error: ") and "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("command", ("info", "verify", "bench", "demo", "explain", "traffic"))
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage: resnet-fast" in out and f"$ resnet-fast {command}" in out


def test_summaries_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"resnet-fast {__version__}\n"


def test_module_and_no_arguments() -> None:
    top = run("--help")
    assert top.returncode == 0 and "explain" in top.stdout
    bare = run()
    assert bare.returncode == 2 and "Usage" in bare.stderr + bare.stdout


def test_unknown_model_suggests_names(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "bench", "explain", "traffic"):
        assert cli.main([command, "resnet5"]) == 2
        assert "did you mean resnet50" in error_line(capsys)


def test_a_subprocess_fails_in_one_line() -> None:
    result = run("verify", "resnet5")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "resnet50" in result.stderr
    debug = run("--debug", "verify", "resnet5")
    assert debug.returncode == 1 and "Traceback" in debug.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (("bench", "resnet18", "--batch", "1,x"), "'batch'"),
        (("bench", "resnet18", "--batch", ""), "'batch'"),
        (("bench", "resnet18", "--peers", "tensorrt"), "'peers'"),
        (("bench", "resnet18", "--threads", "0"), "'threads'"),
        (("bench", "resnet18", "--threads", "-2"), "'threads'"),
        (("bench", "resnet18", "--threads", "two"), "--threads"),
        (("bench", "resnet18", "--json", "/nonexistent/x.json"), "/nonexistent"),
        (("bench", "resnet18", "--reps", "0"), "--reps"),
        (("demo", "--device", "tpu"), "'device'"),
        (("verify",), "MODEL"),
        (("verify", "resnet18", "--nonsense"), "--nonsense"),
        (("polish",), "polish"),
    ),
)
def test_bad_input(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert words in error_line(capsys)


@pytest.mark.parametrize(
    ("option", "values", "expected"),
    (
        ("--batch", ("0", "-1"), "'batch': expected at least 1"),
        ("--size", ("1", "0", "-1"), "'size': expected at least 16"),
        ("--dtype", ("int4", "torch.float8_e5m2", ""), "'dtype': expected one of fp32, bf16, fp16"),
        ("--device", ("tpu",), "'device': expected cpu"),
        ("--size", ("big", "64x64"), "--size"),
    ),
)
@pytest.mark.parametrize("command", ("verify", "bench", "explain"))
def test_commands_refuse_alike(
    command: str,
    option: str,
    values: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is run: no network is built for a question that has no answer."""
    for module, work in (
        (verify, "build_reference"),
        (verify, "build_model"),
        (runner, "WorkerProcess"),
    ):
        monkeypatch.setattr(module, work, lambda *_: pytest.fail("work was begun"))
    for value in values:
        assert cli.main([command, "resnet18", option, value]) == 2
        assert expected in error_line(capsys)


def test_info_without_a_home_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("resnet_fast.plan.cache.path", lambda: None)
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cache"] is None
    assert cli.main(["info"]) == 0
    assert "none: there is no home folder" in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] and "cpu" in facts["libraries"]
    for library in facts["libraries"].values():
        assert library["loaded"] or library["reason"]
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert facts["cache"].split("/")[-1] in text
    assert "None" not in text and text.count("cpu/conv_bn_act/depthwise") == 1
    cuda = {row["op"] for row in facts["kernels"] if row["device"] == "cuda"}
    assert all(text.count(f"cuda/{op}: ") == 1 for op in cuda)
    assert cli.main(["info", "--variants"]) == 0
    text = capsys.readouterr().out
    names = [row["name"] for row in facts["kernels"] if row["device"] == "cuda"]
    assert all(name in text for name in names)
    assert names or "no CUDA kernels: " in text


def test_cuda_kernels_in_a_line_and_in_rows(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = dict.fromkeys(("dynamic_shared", "threads", "blocks", "warps"))
    first = {"op": "scan", "device": "cuda", "shared": 0, "registers": 40, "local": 0} | unknown
    first |= {"name": "cuda/scan/scan_kernel<8>/sm_80", "isa": "sm_80"}
    second = first | {"name": "cuda/scan/scan_kernel<8>/sm_90a", "isa": "sm_90a"}
    second |= {"registers": 41, "local": 16, "dynamic_shared": 3 << 9, "threads": 128, "warps": 12}
    line = "cuda/scan: 1 kernels for sm_80, sm_90a, at most 41 registers, 1.5 KB shared, "
    assert kernel_report.summary([first, second]) == [line + "16 B spilled"]
    assert kernel_report.summary([first])[0].endswith("40 registers, none spilled")
    Console(width=160).print(kernel_report.table_of_variants([first, second], None))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == [first["name"], "40", "?", "0", "?", "?", "?"]
    assert rows[2] == [second["name"], "41", "1536", "16", "128", "?", "12"]
    assert "native library is absent" in kernel_report.table_of_variants(None, None)
    absent = {"cuda_absence": None, "cuda_resources_absence": "out of ink"}
    assert kernel_report.table_of_variants([], absent) == "no CUDA kernels: out of ink"


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_verify(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", "resnet18", "--dtype", dtype, "--size", "64", "--batch", "2"]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] and len(result["sites"]) == 20
    assert result["network"]["error"] <= result["network"]["limit"]


def test_torch_names_of_dtypes(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("bfloat16", "torch.bfloat16"):
        arguments = ["verify", "resnet18", "--dtype", name, "--size", "32", "--json"]
        assert cli.main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["dtype"] == "bf16"


def test_verify_small_images_at_batch_1(capsys: pytest.CaptureFixture[str]) -> None:
    """Here torch's convolution is im2col and a matrix product: it sets the limit, and it runs."""
    arguments = ["verify", "resnet18", "--size", "64", "--batch", "1", "--json"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="resnet_fast: candidate", category=UserWarning)
        assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] and len(result["sites"]) == 20


def test_verify_without_torchvision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert cli.main(["verify", "resnet18", "--size", "32"]) == 0
    assert "plain_reference: all within budget" in capsys.readouterr().out


def test_a_mismatch_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = verify.Check("layer1.0.conv1", False, 1.0, 0.1)
    good = verify.Check("output", True, 0.0, 0.1)
    result = verify.Verification("resnet18", "fp32", 1, 32, "cpu", "torchvision", good, [bad])
    monkeypatch.setattr(verify, "verify_model", lambda *args, **kwargs: result)
    assert cli.main(["verify", "resnet18"]) == 1
    out = capsys.readouterr().out
    assert "MISMATCH" in out and "1 outside the budget" in out


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "resnet18", "--size", "64", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 20 and all(row["candidate"] and row["reason"] for row in rows)
    assert len({row["name"] for row in rows}) == 20
    assert cli.main(["explain", "resnet18", "--size", "64"]) == 0
    out = capsys.readouterr().out
    assert "layer4.1.conv2" in out and "OK: the candidate was verified" in out
    assert " us " not in out.splitlines()[0]  # nothing was timed
    assert out.splitlines()[-1] == "20 of 20 sites fused"
    if _checks.has_op("_run_sequence"):
        assert "23 layers run as one native call at 3x64x64" in out.splitlines()[-2]


def test_explain_fits_a_narrow_terminal() -> None:
    row = {"name": "layer1.0.downsample", "op": "conv_bn_act", "x_shape": (1, 128, 28, 28)}
    row |= {"weight_shape": (128, 128, 3, 3), "act": "relu", "residual": True}
    row |= {"candidate": "onednn", "reason": "OK", "meaning": "", "fused": True}
    row |= {"error": 1e-6, "limit": 1e-5, "bytes": 10_000_000}
    for width, whole in ((80, False), (160, True)):
        out = io.StringIO()
        cli.print_explanation(Explanation([row]), Console(file=out, width=width))
        heading, line = out.getvalue().splitlines()[:2]
        assert "…" not in line and line.split()[-3:] == ["1.0e-06", "1.0e-05", "10.00"]
        assert ("1x128x28x28" in line and "weight" in heading) == whole


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = (tmp_path / "out.json", tmp_path / "out.csv")
    arguments = ["bench", "resnet18", "--batch", "1", "--size", "64", "--reps", "1"]
    arguments += ["--threads", "1", "--peers", "eager,eager_nhwc"]
    assert cli.main([*arguments, "--json", str(files[0]), "--csv", str(files[1])]) == 0
    result = json.loads(files[0].read_text())
    assert [row["engine"] for row in result["rows"]] == ["resnet_fast", "eager", "eager_nhwc"]
    assert len(files[1].read_text().splitlines()) == 4
    out = capsys.readouterr().out
    assert "vs best peer" in out and f"resnet_fast {__version__}" in out.splitlines()[-1]


def test_bench_refuses_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise BenchError("resnet_fast is wrong by 1")

    monkeypatch.setattr("resnet_fast.bench.bench", refuse)
    assert cli.main(["bench", "resnet18"]) == 1
    assert "wrong by 1" in error_line(capsys)


def test_unexpected_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(cli, "collect_info", broken)
    assert cli.main(["info"]) == 1
    assert "RuntimeError: first second" in error_line(capsys)
    with pytest.raises(RuntimeError):
        cli.main(["info", "--debug"])


def test_demo_quick() -> None:
    command = [sys.executable, "-m", "resnet_fast", "demo", "--quick", "--device", "cpu"]
    environment = os.environ | {"COLUMNS": "160"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith("Summary on cpu: within the error budget")
    assert "slower than eager" in last
