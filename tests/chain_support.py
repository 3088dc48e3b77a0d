"""Chains on a CPU, where the op is its layers: fixtures for testing what decides about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast.nn import chain as chain_module
from resnet_fast.plan import cache, group


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache for the whole file: verification takes most of its time."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def chains_on_the_cpu(monkeypatch: pytest.MonkeyPatch, verdicts: Any) -> Iterator[list[str]]:
    """Lets chains run here, and win every measurement; the list has a row for each chain's call."""
    calls: list[str] = []
    prepare = chain_module.prepare

    def noted(op: str, x: Tensor, *parameters: Any) -> Any:
        weights = zip(("conv2", "conv3", "down", "next"), parameters[:12:3], strict=True)
        name = "+".join(name for name, weight in weights if weight is not None)
        call = prepare(op, x, *parameters)

        def run(inner: Tensor, x: Tensor) -> Any:
            calls.append(name)
            return call(inner, x)

        return run

    monkeypatch.setenv("RESNET_FAST_CACHE_DIR", str(verdicts))
    cache.forget()
    monkeypatch.setattr(chain_module, "runs_on", lambda x: x.dtype is not torch.float64)
    monkeypatch.setattr(chain_module, "prepare", noted)
    monkeypatch.setattr(
        group, "measure", lambda runs, device: {k: float(k == "layers") for k in runs}
    )
    yield calls
    cache.forget()
