"""Marks, seeds and threads for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Two: enough to run the parallel paths, few enough to share a machine.
torch.set_num_threads(int(os.environ.get("RESNET_FAST_TEST_THREADS", "2")))

_REQUIRE_GPU = os.environ.get("RESNET_FAST_REQUIRE_GPU") == "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes seconds or much memory")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or _REQUIRE_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("RESNET_FAST_REQUIRE_GPU=1, and torch sees no CUDA device", pytrace=False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Where a GPU is required, a GPU test that skips itself has failed."""
    outcome = yield
    report = outcome.get_result()
    if _REQUIRE_GPU and report.skipped and item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped where a GPU is required: {report.longrepr}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    """A test that leaves torch another number of threads fails itself, not one that comes later:
    with one thread torch's convolutions choose other algorithms, of other errors."""
    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before, f"the test leaves torch {after} threads, and found {before}"


@pytest.fixture
def no_grad() -> Iterator[None]:
    """No gradients are recorded, as where a network is only used."""
    with torch.no_grad():
        yield


@pytest.fixture
def sites_taken_as_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifying candidates is tested with the plan; elsewhere it would take most of the time."""
    from resnet_fast.plan import binding

    monkeypatch.setattr(binding, "verified", lambda *_: (True, 0.0, 0.0))
    monkeypatch.setattr(binding, "_generation", binding.generation() + 1)
