"""The tests of a file again, in a process that may use no newer instructions than it is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_fast import _library


def rerun_below(isa: str, file: str) -> None:
    """Run the tests of ``file`` with ``isa`` as the newest set, without guards and this one."""
    native = _library.native()
    plain = isa == "avx512" and native is not None and native.cpu_features().get("avx512vnni")
    if (
        native is None
        or (native.current_isa() == isa and not plain)
        or ("RESNET_FAST_MAX_ISA" in os.environ)
    ):
        pytest.skip("this process runs the set already")
    environment = os.environ | {"RESNET_FAST_MAX_ISA": isa, "RESNET_FAST_EXAMPLES": "20"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", file, "-k", "not guards and not lower"],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:]
