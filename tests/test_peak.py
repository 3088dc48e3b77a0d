"""The probe of what the machine can do compiles and measures."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "benchmarks" / "peak.cpp"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_peak(tmp_path: Path) -> None:
    """Registers give far more than any loop that goes through memory could."""
    program = tmp_path / "peak"
    flags = ["-std=c++20", "-O3", "-march=native", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    subprocess.run(["g++", *flags, "-o", str(program), str(SOURCE), "-lpthread"], check=True)
    out = subprocess.run([str(program), "1"], check=True, capture_output=True, text=True).stdout
    rows = {line.split()[0]: [float(n) for n in line.split()[1:3]] for line in out.splitlines()}
    assert {"fp32", "read"} <= set(rows)
    for median, best in rows.values():
        assert 0 < median <= best
    # A multiply-add of floats that were read from memory takes 4 bytes for 2 operations.
    assert rows["fp32"][0] > rows["read"][0] / 2
