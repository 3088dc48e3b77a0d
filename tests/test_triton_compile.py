"""Triton kernels compiled offline: no spills, the matrix instructions, the recorded figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fast import kernels

AVAILABLE, REASON = kernels.available()
if not AVAILABLE:
    pytest.skip(REASON, allow_module_level=True)

import triton  # noqa: E402
from resnet_fast.kernels import chain_tiles, conv_bn_act, conv_tiles, launch, stem_pool  # noqa: E402
from resnet_fast.kernels import compile as offline  # noqa: E402

FIGURES = Path(__file__).parent / "data" / "triton_resources.json"

# ptxas is bundled with Triton, so a version's figures are reproducible; this only absorbs
# changes of register allocation between patch builds.
REGISTERS = 8

# Ops made of matrix products, and those whose figures come with 64-bit offsets as well.
PRODUCTS = ("conv_bn_act", "residual_chain", "stem_pool")
WIDE = ("conv_bn_act", "bn_act", "add_act", "add_act_backward")


def _expected_matrix(name: str) -> str:
    """The matrix instruction of a convolution by its name; fp32 without tf32 uses FMAs."""
    op, *_, dtype, arch = name.split("/")
    if op not in PRODUCTS or dtype == "fp32" or "/sum/" in name:
        return "none"
    return {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}[arch]


def _names() -> set[str]:
    return {f"{v.name}/sm_{arch}" for v in offline.variants() for arch in v.architectures}


def _recorded() -> dict[str, dict[str, Any]]:
    versions = json.loads(FIGURES.read_text())
    return versions.get(triton.__version__) or versions[max(versions)]


def test_every_variant_is_recorded_without_a_spill() -> None:
    recorded = _recorded()
    assert set(recorded) == _names(), "regenerate: python -m resnet_fast.kernels.compile --out"
    for name, row in recorded.items():
        assert "error" not in row and row["spill"] == 0, (name, row)
        assert row["matrix"] == _expected_matrix(name), (name, row)


def test_the_record_is_of_every_kind() -> None:
    """Each dtype on each architecture, with 32-bit and where they are told apart 64-bit offsets."""
    kinds = {(n.split("/")[0], "-wide/" in n, *n.split("/")[-2:]) for n in _recorded()}
    dtypes = {"conv_bn_act": 4, "bn_act": 3, "add_act": 3, "add_act_backward": 3}
    dtypes |= {"residual_chain": 3, "stem_pool": 4}
    counts = [count * (1 + (op in WIDE)) for op, count in dtypes.items()]
    assert len(kinds) == sum(counts) * len(offline.ARCHITECTURES)


# What is compiled in each run: what spills first, and one of every kind. An unrolled filter takes
# seconds; all of them take ten minutes.
def _now() -> list[tuple[str, int]]:
    narrow = [v.name for v in offline.variants() if 90 in v.architectures]
    narrow = [n for n in narrow if "-wide/" not in n]
    narrow = [n for n in narrow if not n.startswith("stem_pool/uint8/")]  # as with four channels
    chosen = [(n, 90) for n in narrow if n.endswith("/fp16")]
    chosen += [(n, 80) for n in narrow if "/conv3x3/" in n and n.endswith("/fp16")]
    tile = conv_tiles.HALF_CONFIGS[0].name
    floats = conv_tiles.FLOAT_CONFIGS[0].name
    packed = conv_tiles.PACKED_CONFIGS[1].name
    stem = stem_pool.HALF_CONFIGS[0].name
    filters = f"conv_bn_act/conv3x3/{tile}"
    chosen += [
        (f"{filters}/fp16", 100),
        (f"{filters}/bf16", 90),
        (f"{filters}-wide/fp16", 80),
        (f"{filters}-wide/fp16", 90),
        (f"conv_bn_act/conv3x3/{floats}/fp32", 80),
        (f"conv_bn_act/conv3x3/{floats}-wide/fp32", 90),
        (f"conv_bn_act/conv3x3/{floats}/tf32", 80),
        (f"conv_bn_act/conv7x7/{packed}-wide/fp16", 80),
        (f"conv_bn_act/gemm/{tile}-wide/fp16", 90),
        (f"conv_bn_act/gemm/{floats}/fp32", 90),
        (f"stem_pool/nchw/{stem}/fp16", 80),
        (f"stem_pool/uint8x4/{stem}/bf16", 80),
    ]
    # The form of the chain that has the fewest registers to spare elsewhere.
    fullest = f"residual_chain/tail_projection256/{chain_tiles.SMALL.name}"
    return [*chosen, (f"{fullest}/bf16", 80), (f"{fullest}/fp16", 100)]


def test_compiled_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiles afresh, in an empty cache, and compares with the record."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    recorded = _recorded()
    known = triton.__version__ in json.loads(FIGURES.read_text())
    chosen = _now()
    compiled = offline.compile_jobs(chosen)
    assert set(compiled) == {f"{name}/sm_{arch}" for name, arch in chosen}
    for name, row in compiled.items():
        assert "error" not in row, (name, row)
        assert row["spill"] == 0, (name, row)
        assert row["matrix"] == _expected_matrix(name), (name, row)
        if known:
            assert row["shared"] == recorded[name]["shared"], (name, row)
            assert row["registers"] <= recorded[name]["registers"] + REGISTERS, (name, row)


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


@pytest.mark.parametrize(
    "padding, dilation, wide",
    [(0, 1, False), (1 << 9, 1, False), (1 << 11, 1, True), (1 << 10, 1 << 10, True)],
)
def test_offsets_are_64_bit_where_padding_or_taps_reach_2_31(
    padding: int, dilation: int, wide: bool
) -> None:
    """Rows of 2^20 elements, 64 of them: x spans 2^26."""
    x, w = _meta(1, 1024, 64, 1024), _meta(8, 1024, 3, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    recorder = offline.Recorder()
    geometry = ([1, 1], [padding, 0], [dilation, 1], 1)
    conv_bn_act.launch_conv_bn_act(x, w, None, None, None, *geometry, "none", wrap_triton=recorder)
    assert recorder.arguments["WIDE"] is wide


def test_needs_int64() -> None:
    """The last element's offset decides, not the number of elements."""
    assert not launch.needs_int64(_meta(1 << 15, 1 << 15))
    assert launch.needs_int64(_meta(1 << 16, 1 << 15))
    assert launch.needs_int64(_meta(1, 1).as_strided((2, 1), (1 << 31, 1)))
    assert not launch.needs_int64(_meta(1 << 15), reach=1 << 30)
    assert launch.needs_int64(_meta(1 << 15), reach=1 << 31)
