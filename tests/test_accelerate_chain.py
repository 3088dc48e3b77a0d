"""Residual blocks of accelerated networks as chains: found in the steps, run as the layers are.

As in tests/test_chain.py chains are let run on the CPU, where the op is its layers.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast.fuse import chain as fuse_chain
from resnet_fast.plan import group
from resnet_fast.testing.budget import expect_within_budget, in_formats
from resnet_fast.testing.networks import randomize_batchnorm_

tv = pytest.importorskip("torchvision").models


pytest_plugins = ("chain_support",)
pytestmark = pytest.mark.usefixtures("chains_on_the_cpu")


def images(batch: int = 2, size: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batchnorm_(getattr(tv, name)(num_classes=7)).eval()


FORMS = {
    "resnet18": ["conv2+down"] * 3,
    "resnet50": [
        *("conv2+conv3+down+next", "conv2+conv3+next", "conv2+conv3+next"),
        *("conv2+conv3+down+next", *["conv2+conv3+next"] * 3),
        *("conv3+down+next", *["conv3+next"] * 4),
        "conv3+down",
    ],
    "resnext50_32x4d": ["conv3+down+next", "conv3+next", "conv3+next"],
}


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_torchvisions_networks(chains_on_the_cpu: list[str], name: str) -> None:
    plain = network(name)
    fused = resnet_fast.accelerate(copy.deepcopy(plain), images())
    chains_on_the_cpu.clear()
    x = images(seed=2)
    frameworks = in_formats(plain, x)
    truth = copy.deepcopy(plain).double()(x.double())
    for i in range(2):
        chains_on_the_cpu.clear()
        expect_within_budget(fused(x), frameworks, truth)
        if i == 1:
            assert chains_on_the_cpu[: len(FORMS[name])] == FORMS[name]
    told = str(resnet_fast.explain(fused))
    assert "layer1.0" in told or name == "resnet18"
    assert "by residual_chain (OK), error" in told
    assert "stem: conv1 and maxpool by stem_pool (OK), error" in told
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        expect_within_budget(other(x), frameworks, truth)


@torch.no_grad()
def test_changes_are_seen(chains_on_the_cpu: list[str]) -> None:
    plain = network("resnet18")
    fused = resnet_fast.accelerate(copy.deepcopy(plain), images())
    fused(images())
    changes = [
        lambda net: net.layer2[0].conv2.weight.mul_(1.5),
        lambda net: net.layer3[0].downsample[1].bias.add_(1.0),
        lambda net: setattr(net.layer3[0].bn2, "eps", 0.5),
        lambda net: setattr(net.layer2[0], "relu", nn.SiLU()),
        lambda net: net.conv1.weight.mul_(1.5),
        lambda net: setattr(net.maxpool, "stride", 1),
        lambda net: net.layer4[0].conv2.register_forward_hook(lambda m, a, y: y * 2),
    ]
    for change in changes:
        for net in (plain, fused):
            change(net)
        ours, theirs = fused(images()), plain(images())
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@torch.no_grad()
def test_layers_stay_where_they_are_faster(
    chains_on_the_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        group, "measure", lambda runs, device: {k: float(k != "layers") for k in runs}
    )
    plain = network("resnet18")
    fused = resnet_fast.accelerate(copy.deepcopy(plain), images())
    first = fused(images())
    chains_on_the_cpu.clear()
    assert torch.equal(fused(images()), first) and chains_on_the_cpu == []
    told = str(resnet_fast.explain(fused))
    assert told.count("layers (SLOWER)") == 4 and "stem: conv1 and maxpool by layers" in told
    theirs = plain(images())
    assert (first - theirs).abs().max() <= 1e-4 * theirs.abs().max()


class Tail(nn.Module):
    """A bottleneck's tail, and variations of what surrounds it."""

    def __init__(self, variation: str = "") -> None:
        super().__init__()
        self.variation = variation
        self.conv1, self.bn1 = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.down, self.bnd = nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.next, self.bnn = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Any:
        early = self.bnd(self.down(x)) if self.variation == "shortcut first" else None
        h1 = F.relu(self.bn1(self.conv1(x)))
        h2 = F.relu(self.bn2(self.conv2(h1)))
        shortcut = self.bnd(self.down(x)) if early is None else early
        y = F.relu(self.bn3(self.conv3(h2)) + shortcut)
        h = F.relu(self.bnn(self.next(y)))
        if self.variation == "h2 is read twice":
            return h, h2.sum()
        if self.variation == "the shortcut is read twice":
            return h, shortcut.sum()
        if self.variation == "y is a result":
            return h, y
        if self.variation == "the next is late":
            return (y * 2).sum() + h
        return h, y.sum()


VARIATIONS = {
    "": "conv2+conv3+down+next",
    # x is dropped behind conv1, before the chain would read it.
    "shortcut first": None,
    "h2 is read twice": "conv3+down+next",
    "the shortcut is read twice": "conv2+conv3+next",
    "y is a result": "conv2+conv3+down+next",
    "the next is late": "conv2+conv3+down+next",
}


@pytest.mark.parametrize("variation", VARIATIONS)
@torch.no_grad()
def test_what_surrounds_a_tail(chains_on_the_cpu: list[str], variation: str) -> None:
    torch.manual_seed(0)
    plain = randomize_batchnorm_(Tail(variation)).eval()
    x = torch.randn(2, 32, 9, 7)
    fused = resnet_fast.accelerate(copy.deepcopy(plain), x)
    chains_on_the_cpu.clear()
    for _ in range(2):
        ours, theirs = fused(x), plain(x)
        for a, b in zip(*(torch.utils._pytree.tree_leaves(t) for t in (ours, theirs)), strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    expected = VARIATIONS[variation]
    assert set(chains_on_the_cpu) == (set() if expected is None else {expected})


class Given(Tail):
    """A tail whose shortcut comes from outside."""

    def forward(self, x: Tensor, shortcut: Tensor) -> Any:  # type: ignore[override]
        h2 = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(h2)) + shortcut)


@torch.no_grad()
def test_a_shortcut_of_another_shape_runs_by_the_layers(chains_on_the_cpu: list[str]) -> None:
    torch.manual_seed(0)
    plain = randomize_batchnorm_(Given()).eval()
    x, shortcut = torch.randn(2, 32, 9, 7), torch.randn(2, 32, 9, 7)
    fused = resnet_fast.accelerate(copy.deepcopy(plain), (x, shortcut))
    for given in (shortcut, shortcut[:, :, :1, :1], shortcut[:1], shortcut.float() * 2):
        chains_on_the_cpu.clear()
        ours, theirs = fused(x, given), plain(x, given)
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
        assert bool(chains_on_the_cpu) is (given.shape == shortcut.shape)


def test_groups_read_no_step_twice() -> None:
    fused = resnet_fast.accelerate(network("resnet50"), images())
    (program,) = dict.fromkeys(fused.__dict__[resnet_fast.fuse.capture.STATE].programs.values())
    modules, refusal = program.enter(fused)
    assert refusal is None
    groups = fuse_chain.groups_of(program, modules)
    members = [index for found in groups for index in found.steps]
    assert len(members) == len(set(members)) and len(groups) == 14


@torch.no_grad()
def test_a_wrong_input_raises_what_the_layers_raise() -> None:
    plain = network("resnet18")
    fused = resnet_fast.accelerate(copy.deepcopy(plain), images())
    for x in (images()[:, :2], images().double()):
        with pytest.raises(RuntimeError) as theirs:
            plain(x)
        with pytest.raises(RuntimeError) as ours:
            fused(x)
        assert str(ours.value) == str(theirs.value)
