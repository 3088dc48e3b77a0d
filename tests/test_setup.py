"""setup.py says what a build lacks instead of showing a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("module", ("pybind11", "torch"))
def test_a_missing_module_is_named_with_advice(module: str, tmp_path: Path) -> None:
    absent = f'raise ModuleNotFoundError("No module named {module!r}", name="{module}")\n'
    (tmp_path / f"{module}.py").write_text(absent)
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"{module} cannot be imported" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr
