"""The residual chain under Triton's interpreter, every form x config x dtype, against fp64.

Started by tests/test_triton_interpreter.py; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/residual_chain.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from resnet_fast.kernels import activation, chain_tiles, launch
from resnet_fast.kernels import residual_chain as room

from resnet_fast import ops
from resnet_fast.errors import LibraryError
from resnet_fast.testing.budget import within_budget
from resnet_fast.testing.chains import CHAINS, Chain, make

assert launch.INTERPRET, "run with TRITON_INTERPRET=1"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REFERENCE = ops.module("residual_chain").reference


def _check(arguments: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    truth, framework = REFERENCE(**wide), REFERENCE(**arguments)
    actual = room.launch_residual_chain(*arguments.values(), allow_tf32=False, **options)
    for ours, theirs, exact in zip(actual, framework, truth, strict=True):
        verdict = within_budget(ours, theirs, exact)
        assert verdict.ok, verdict
        assert ours.dtype == arguments["x"].dtype
        if exact.dim() == 4:
            assert ours.is_contiguous(memory_format=torch.channels_last)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.name)
def test_matches_fp64(chain: Chain, dtype: torch.dtype) -> None:
    _check(make(chain, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chain", CHAINS[:5], ids=lambda c: c.name)
def test_every_config(chain: Chain, dtype: torch.dtype) -> None:
    for config in chain_tiles.configs(dtype):
        _check(make(chain, dtype), config=config)


@pytest.mark.parametrize("loop", [False, True])
def test_several_slices_and_blocks(loop: bool) -> None:
    """More slices than one, and more than one step over the input's channels."""
    config = chain_tiles.Config(64, 16, 16, 4, 2, loop)
    for chain in CHAINS:
        _check(make(chain, torch.float16), config=config)


def test_h2_read_again_for_each_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_HELD", dict.fromkeys(room.MAX_HELD, 32))
    config = chain_tiles.Config(64, 16, 16, 4, 2)
    for chain in CHAINS:
        if not chain.conv2:
            _check(make(chain, torch.float16), config=config)


def test_independent_slices_are_spread_over_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = chain_tiles.Config(64, 16, 16, 4, 2)
    assert chain_tiles.slices_of(10**6, 16, config) == 16
    assert chain_tiles.slices_of(64 * 100, 16, config) == 8
    assert chain_tiles.slices_of(1, 16, config) == 1
    for programs in (1, 8, 1000):
        monkeypatch.setattr(chain_tiles, "_PROGRAMS", programs)
        for chain in CHAINS:
            if not chain.following:
                _check(make(chain, torch.float16), config=config)


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_activations(act: str) -> None:
    for dtype in (torch.float32, torch.float16):
        _check(make(CHAINS[0], dtype) | {"act": act})


@pytest.mark.parametrize("layout", ["nchw", "slice"])
def test_layouts(layout: str) -> None:
    for chain in CHAINS[:4]:
        arguments = make(chain, torch.float16)
        for key, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.dim() == 4:
                if layout == "nchw":
                    arguments[key] = value.contiguous()
                else:
                    larger = value.new_full([2 * n for n in value.shape], 1e4)
                    arguments[key] = larger[tuple(slice(1, None, 2) for _ in value.shape)]
                    arguments[key].copy_(value)
        _check(arguments)


def test_not_finite() -> None:
    """NaN and infinities come out where the layers have them: masked lanes add none."""
    for value in (float("nan"), float("inf")):
        arguments = make(CHAINS[0], torch.float16)
        arguments["x"][0, 3, 2, 2] = value
        y, h = _check(arguments)
        assert not y.isfinite().all() and not h.isfinite().all() and y.isfinite().any()


def test_repeated_runs_are_bit_identical() -> None:
    arguments = make(CHAINS[1], torch.float16)
    first = room.launch_residual_chain(*arguments.values())
    again = room.launch_residual_chain(*arguments.values())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.name)
def test_prepared(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of the first call of a kind launches the next ones, and those of no other."""
    x, residual, *parameters = make(chain, torch.float16).values()
    call = room.prepare_residual_chain(*parameters)
    call(x, residual)
    fresh = (torch.randn_like(x), torch.randn_like(residual))
    expected = room.launch_residual_chain(*fresh, *parameters)
    with monkeypatch.context() as patch:
        if x.shape[0]:  # nothing is launched on an empty batch, and nothing kept
            patch.setattr(room, "launch_residual_chain", None)
        for mine, theirs in zip(call(*fresh), expected, strict=True):
            assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()
        if x.shape[0]:
            with pytest.raises(TypeError, match="NoneType"):
                call(*(torch.cat([t, t]) for t in fresh))
    for _ in range(2):  # of another layout: decided, and kept
        for mine, theirs in zip(call(*(t.contiguous() for t in fresh)), expected, strict=True):
            assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()


def test_it_is_the_public_ops_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp16; fp32 without tf32 and fp64 run by the layers, and a failure of Triton is typed."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    overload = torch.ops.resnet_fast.residual_chain.default
    launched = []
    launch_chain = room.launch_residual_chain

    def noted(x: torch.Tensor, *rest: Any) -> Any:
        launched.append(x.dtype)
        return launch_chain(x, *rest)

    monkeypatch.setattr(room, "launch_residual_chain", noted)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for dtype in (torch.float16, torch.float32):
        arguments = make(CHAINS[0], dtype)
        results = overload.redispatch(keys, *arguments.values())
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        for ours, theirs, exact in zip(
            results, REFERENCE(**arguments), REFERENCE(**wide), strict=True
        ):
            assert within_budget(ours, theirs, exact).ok
        overload.redispatch(keys, *wide.values())
    assert launched == [torch.float16]

    def fails(*arguments: Any) -> Any:
        raise launch.FAILURES[0]("out of registers")

    monkeypatch.setattr(room, "launch_residual_chain", fails)
    with pytest.raises(LibraryError, match="Triton cannot run here"):
        overload.redispatch(keys, *make(CHAINS[0], torch.float16).values())


def test_guards() -> None:
    arguments = make(CHAINS[0], torch.float16)

    def launched(**changes: Any) -> None:
        room.launch_residual_chain(*(arguments | changes).values())

    x = arguments["x"]
    for changes, name in (
        ({"weight3": arguments["weight3"][:, 1:]}, "weight3"),
        ({"weight_n": arguments["weight_n"][:, 1:]}, "weight_n"),
        ({"weight2": arguments["weight2"][..., 1:]}, "weight2"),
        ({"residual": arguments["residual"][..., 1:]}, "residual"),
        ({"residual": arguments["residual"][1:]}, "residual"),
        ({"scale2": torch.ones(1)}, "scale2"),
        ({"stride": 3}, "stride"),
        ({"stride": 2}, "residual"),
        ({"stride_d": 2}, "stride_d"),
        ({"weight2": None, "weight3": None}, "weight2"),
        ({"scale_d": torch.ones(2)}, "scale_d"),
        ({"x": x.float()}, "residual"),
        ({"x": x[0], "residual": x}, "x"),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            launched(**changes)
