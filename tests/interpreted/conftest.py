"""What every test of a kernel under Triton's interpreter starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that a kernel does not write is NaN, whatever the allocator returns."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", filled)
