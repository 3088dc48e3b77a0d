"""Triton kernels compiled offline: no spills, the matrix instructions, the recorded figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resnet_fast import kernels

AVAILABLE, REASON = kernels.available()
if not AVAILABLE:
    pytest.skip(REASON, allow_module_level=True)

import triton  # noqa: E402
from resnet_fast.kernels import compile as offline  # noqa: E402

FIGURES = Path(__file__).parent / "data" / "triton_resources.json"

# ptxas is bundled with Triton, so a version's figures are reproducible; this only absorbs
# changes of register allocation between patch builds.
REGISTERS = 8


def _expected_matrix(name: str) -> str:
    """The matrix instruction of a convolution by its name; fp32 without tf32 uses FMAs."""
    dtype, arch = name.split("/")[-2:]
    if not name.startswith("conv_bn_act/") or dtype == "fp32":
        return "none"
    return {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}[arch]


def _names() -> set[str]:
    return {f"{v.name}/sm_{arch}" for v in offline.variants() for arch in v.archs}


def _recorded() -> dict[str, dict[str, Any]]:
    versions = json.loads(FIGURES.read_text())
    return versions.get(triton.__version__) or versions[max(versions)]


def test_every_variant_is_recorded_without_a_spill() -> None:
    recorded = _recorded()
    assert set(recorded) == _names(), "regenerate: python -m resnet_fast.kernels.compile --out"
    for name, row in recorded.items():
        assert "error" not in row and row["spill"] == 0, (name, row)
        assert row["matrix"] == _expected_matrix(name), (name, row)


def _now(name: str) -> bool:
    """What is compiled in each run: GEMMs, and fp16 of the rest (an unrolled 3x3 takes seconds)."""
    return "/gemm/" in name or name.endswith("/fp16")


def test_compiled_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiles afresh, in an empty cache, and compares with the record.

    sm_90 for all of them and sm_80 for the filters, which spill there first.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    recorded = _recorded()
    known = triton.__version__ in json.loads(FIGURES.read_text())
    names = [v.name for v in offline.variants() if _now(v.name)]
    compiled = offline.compile_all(names, archs=(90,))
    filters = [n for n in names if "/conv3x3/" in n]
    compiled |= offline.compile_all(filters, archs=(80,))
    assert len(compiled) > len(filters) > 0
    for name, row in compiled.items():
        assert "error" not in row, (name, row)
        assert row["spill"] == 0, (name, row)
        assert row["matrix"] == _expected_matrix(name), (name, row)
        if known:
            assert row["shared"] == recorded[name]["shared"], (name, row)
            assert row["registers"] <= recorded[name]["registers"] + REGISTERS, (name, row)
