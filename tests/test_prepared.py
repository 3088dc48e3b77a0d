"""Calls of a site with every choice made: the candidates' own, and when a site uses them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast.nn.prepared import batch_kind
from resnet_fast.nn.site import FusedSite
from resnet_fast.ops import _several, conv_bn_act_triton
from resnet_fast.plan.candidate import CANDIDATES
from resnet_fast.plan.site import Site
from resnet_fast.plan.verify import random_inputs
from resnet_fast.testing.networks import randomize_batchnorm_

PREPARED = [name for name, candidate in CANDIDATES.items() if candidate.prepare is not None]
# What of those that a CPU plan never picks runs on CPU tensors all the same.
ANYWHERE = ["conv+bn_act", "aten"]


def _site(**changes: object) -> Site:
    settings: dict[str, object] = {
        "op": "conv_bn_act",
        "x_shape": (3, 16, 9, 7),
        "weight_shape": (24, 16, 3, 3),
        "stride": (2, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "act": "relu",
        "affine": True,
        "residual": True,
        "dtype": "float32",
        "layout": "channels_last",
        "device": "cpu",
    }
    return Site(**{**settings, **changes})  # type: ignore[arg-type]


def test_what_runs_on_a_gpu_from_python_is_prepared() -> None:
    expected = {"triton", "implicit_gemm", "cudnn", "conv+bn_act", "aten"}
    assert expected <= set(PREPARED)
    assert {name for name in CANDIDATES if name.startswith("implicit_gemm")} <= set(PREPARED)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PREPARED)
def test_a_prepared_call_is_the_call(name: str, dtype: str, affine: bool, residual: bool) -> None:
    candidate = CANDIDATES[name]
    site = _site(dtype=dtype, affine=affine, residual=residual)
    if candidate.reject(site) is not None and name not in ANYWHERE:
        assert len(candidate.reject(site) or "") > 10
        return
    assert candidate.prepare is not None
    x, args, r = random_inputs(site, torch.device("cpu"), 3)
    with torch.no_grad():
        call = candidate.prepare(x, args, site.act)
        for seed in range(2):
            torch.manual_seed(seed)
            x = torch.randn_like(x)
            r = None if r is None else torch.randn_like(r)
            assert torch.equal(call(x, r), candidate.run(x, args, r, site.act))


def test_the_frameworks_own_path_is_decided_once_and_sees_every_change() -> None:
    """fp64 has no kernel of this package: a site of it runs on aten."""
    conv, bn = nn.Conv2d(6, 8, 3, padding=1, bias=False).double(), nn.BatchNorm2d(8).double()
    randomize_batchnorm_(bn).eval()
    site = FusedSite()
    x, r = torch.randn(2, 6, 5, 7).double(), torch.randn(2, 8, 5, 7).double()
    whys: list[object] = []
    why = site._why_not
    site._why_not = lambda *a: whys.append(a) or why(*a)  # type: ignore[method-assign]

    def expect(decisions: int) -> None:
        whys.clear()
        assert torch.equal(site(x, conv, bn, r), torch.relu(bn(conv(x)) + r))
        assert len(whys) == decisions

    with torch.no_grad():
        expect(1)
        expect(0)
        assert {row["candidate"] for row in site.rows()} == {"aten"}
        conv.weight.mul_(2)
        expect(1)
        bn.running_mean = torch.randn(8).double()
        expect(1)
        expect(0)
        x, r = torch.randn(3, 6, 5, 7).double(), torch.randn(3, 8, 5, 7).double()
        expect(0)
        bn.train()
        site(x, conv, bn, r)
        assert len(whys) == 1
        bn.eval()
    assert torch.allclose(site(x, conv, bn, r), torch.relu(bn(conv(x)) + r), rtol=0, atol=0)


def test_batches_that_one_choice_serves() -> None:
    """On a GPU a kernel is picked by how many tiles there are; on the CPU torch asks 1 and 16."""
    kinds = {n: batch_kind(torch.empty(n, 3, device="cpu")) for n in (1, 2, 15, 16, 99)}
    assert kinds[2] == kinds[15] and kinds[16] == kinds[99]
    assert len({kinds[1], kinds[2], kinds[16]}) == 3
    meta = {n: batch_kind(torch.empty(n, 3, device="meta")) for n in (1, 2, 3, 4, 5, 8, 9)}
    assert meta[3] == meta[4] and meta[5] == meta[8]
    assert len({meta[n] for n in (1, 2, 4, 8, 9)}) == 5


class _Seen(TorchDispatchMode):
    """Writes down which ops are called, and answers with their first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return args[0]


def test_a_launch_gives_way_to_the_op_where_it_would_not_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[Any] = []

    def prepared(*parameters: Any) -> Any:
        return lambda *inputs: launched.append((inputs, parameters)) or inputs[0]

    room = SimpleNamespace(prepare_stem_pool=prepared, prepare_conv_bn_act=prepared)
    monkeypatch.setattr(_several, "room", lambda name: room)
    monkeypatch.setattr(conv_bn_act_triton, "room", lambda name: room)
    monkeypatch.setattr(_several, "has_kernel", lambda op, *arguments: True)
    monkeypatch.setattr(_several, "launched", lambda launch, *inputs: launch(*inputs))
    monkeypatch.setattr(conv_bn_act_triton, "launched", lambda launch, *inputs: launch(*inputs))
    x, weight = torch.randn(1, 3, 9, 9), torch.randn(4, 3, 7, 7)
    there = SimpleNamespace(device=torch.device("cuda"))
    parameters = (weight, None, None, None, None, "relu")
    stem = _several.prepare("stem_pool", there, *parameters)  # type: ignore[arg-type]
    geometry = ([2, 2], [3, 3], [1, 1], 1, "relu")
    conv = conv_bn_act_triton.prepare(weight, None, None, *geometry)
    op = torch.ops.resnet_fast.stem_pool.default
    with torch.no_grad():
        assert stem(x) is x and conv(x, None) is x
        assert [inputs for inputs, _ in launched] == [(x,), (x, None)]
        with _Seen() as seen:
            stem(x)
            if hasattr(torch.ops.resnet_fast, "_conv_bn_act_triton"):
                conv(x, None)
        assert seen.names[0] == "resnet_fast::stem_pool"
        assert seen.names[1:] in ([], ["resnet_fast::_conv_bn_act_triton"])
        assert len(launched) == 2
    expected = op(x, *parameters)
    assert torch.equal(stem(x), expected) and len(launched) == 2, "gradients are recorded"
    here = _several.prepare("stem_pool", x, *parameters)
    with torch.no_grad():
        assert torch.equal(here(x), expected) and len(launched) == 2, "a CPU has no launch"
