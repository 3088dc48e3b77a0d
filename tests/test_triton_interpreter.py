"""Runs each file of tests/interpreted in a process where Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from resnet_fast import kernels

HERE = Path(__file__).parent
FILES = sorted(f for f in (HERE / "interpreted").glob("*.py") if f.stem != "conftest")
AVAILABLE, REASON = kernels.available()


@pytest.mark.skipif(not AVAILABLE, reason=REASON)
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_kernels_match_fp64_under_the_interpreter(file: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # An outer run's own options and coverage hooks do not apply to the inner one.
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", str(file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    assert counts["tests"] > 0
    assert counts["failures"] == counts["errors"] == counts["skipped"] == 0, counts
