"""A pytest plugin: every failure is written down at once, and a dead device ends its process.

    RESNET_FAST_FAILURES=failures.log python -m pytest -p benchmarks.failures ...

pytest tells failures at its end, which a run that is stopped for time never reaches. After an
illegal access every later call of the process fails as well: the process leaves, and pytest-xdist,
where it is, goes on with another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

_LINES = 9


def note(text: str) -> None:
    """Append to the file that the environment names."""
    with open(os.environ["RESNET_FAST_FAILURES"], "a", encoding="utf-8") as file:
        file.write(text + "\n")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    """Note a failure: its name, where it was and what pytest has to say."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.failed:
        told = str(report.longrepr).splitlines()
        wanted = [line for line in told if line.startswith(("E ", "tests/", "resnet_fast/"))]
        note("\n    ".join([f"{item.nodeid} [{report.when}]", *wanted[-_LINES:]]))
    if report.when == "teardown" and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as failure:
            note(f"{item.nodeid}: the device is lost: {str(failure).splitlines()[0]}")
            os._exit(9)
