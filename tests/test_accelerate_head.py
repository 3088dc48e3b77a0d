"""The classifier behind the mean over each image, in an accelerated model's one native call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sequence_support import by_step, found, needs_sequences
from torch import Tensor, nn
from torch.nn.utils import parametrize

import resnet_fast
from resnet_fast.nn import alone as _alone
from resnet_fast.nn.alone import Linears
from resnet_fast.testing.budget import expect_within_budget, in_formats
from resnet_fast.testing.networks import randomize_batchnorm_

pytestmark = [needs_sequences, pytest.mark.usefixtures("no_grad")]


class Classifier(nn.Module):
    """A convolution and a head, written in one way of many."""

    def __init__(self, head: Callable[[Any, Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 40, 3, bias=False), nn.BatchNorm2d(40)
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(40, 7, bias=bias)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self, F.relu(self.bn(self.conv(x))))


def pair(head: Callable[[Any, Tensor], Tensor], bias: bool = True) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = randomize_batchnorm_(Classifier(head, bias)).eval()
    return net, resnet_fast.accelerate(copy.deepcopy(net))


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 12, 11, generator=torch.Generator().manual_seed(1))


HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "pool": lambda m, h: m.fc(torch.flatten(m.pool(h), 1)),
    "function": lambda m, h: m.fc(torch.flatten(F.adaptive_avg_pool2d(h, (1, 1)), start_dim=1)),
    "keyword": lambda m, h: m.fc(F.adaptive_avg_pool2d(h, output_size=1).flatten(1)),
    "mean": lambda m, h: m.fc(h.mean([2, 3])),
    "kept": lambda m, h: m.fc(m.flat(h.mean((-2, -1), keepdim=True))),
    "dropout": lambda m, h: m.fc(m.drop(m.flat(m.pool(h)))),
    "early dropout": lambda m, h: m.fc(torch.flatten(m.drop(m.pool(h)), 1)),
    "functional dropout": lambda m, h: m.fc(F.dropout(h.mean((2, 3)), 0.5, m.training)),
}


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", HEADS)
def test_the_head_is_part_of_the_call(way: str, bias: bool, batch: int) -> None:
    net, fused = pair(HEADS[way], bias)
    x = images(batch)
    first = fused(x)
    assert first.shape == (batch, 7)
    expect_within_budget(first, in_formats(net, x), copy.deepcopy(net).double()(x.double()))
    for _ in range(3):
        assert torch.equal(fused(x), first)
    (sequence,) = found(fused)
    assert sequence.count == 3  # convolution, mean and linear layer
    assert torch.equal(by_step(fused, x), first)
    assert "3 layers run as one native call" in str(resnet_fast.explain(fused))


@pytest.mark.parametrize(
    "head",
    [
        lambda m, h: m.fc(F.adaptive_avg_pool2d(h, (1, 2))[..., 0].flatten(1)),
        lambda m, h: m.fc(h.mean(dim=2).mean(dim=2)),
        lambda m, h: m.fc(h.flatten(2)[:, :, 0]),
        lambda m, h: m.fc(F.dropout(h.mean((2, 3)), 0.5)),
        lambda m, h: m.fc(h.amax((2, 3))),
        lambda m, h: m.fc(h.permute(0, 2, 3, 1)).mean((1, 2)),
    ],
    ids=["half", "lines", "corner", "dropping", "maximum", "pixels"],
)
def test_other_heads_run_after_it(head: Callable[[Any, Tensor], Tensor]) -> None:
    net, fused = pair(head)
    x = images()
    for _ in range(4):
        torch.manual_seed(5)
        y = fused(x)
        torch.manual_seed(5)
        torch.testing.assert_close(y, net(x))
    assert all(sequence.count <= 2 for sequence in found(fused))


def _parametrized(net: Any) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    parametrize.register_parametrization(net.fc, "weight", Doubled())


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "edit",
    [
        lambda net: net.fc.weight.data.mul_(2),
        lambda net: net.fc.bias.add_(1),
        lambda net: setattr(net, "fc", nn.Linear(40, 5)),
        lambda net: setattr(net, "fc", Shifted(40, 7)),
        lambda net: setattr(net, "fc", nn.Identity()),
        lambda net: setattr(net.fc, "forward", lambda x: x[:, :3]),
        lambda net: net.fc.register_forward_hook(lambda module, args, y: y * 2),
        lambda net: net.flat.register_forward_hook(lambda module, args, y: y * 2),
        lambda net: net.drop.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda net: setattr(net.flat, "start_dim", 0),
        _parametrized,
    ],
    ids=[
        "data", "bias", "replaced", "subclass", "identity", "patched", "hook", "hooked flatten",
        "hooked dropout", "flatten", "parametrized",
    ],
)  # fmt: skip
def test_edits_of_the_head_show(edit: Callable[[Any], Any]) -> None:
    """At one image, which a flatten from the first dimension on turns into a vector."""
    net, fused = pair(HEADS["dropout"])
    x = images(1)
    before = fused(x)
    for _ in range(3):
        fused(x)
    assert found(fused)[0].count == 3
    for model in (net, fused):
        torch.manual_seed(3)
        edit(model)
    wanted = net(x)
    assert wanted.shape != before.shape or not torch.allclose(wanted, before)
    for _ in range(4):
        torch.testing.assert_close(fused(x), wanted)


def test_a_flatten_at_the_end_is_looked_at() -> None:
    net, fused = pair(lambda m, h: torch.sin(m.flat(m.pool(h))))
    x = images(1)
    for _ in range(3):
        assert torch.allclose(fused(x), net(x)) and fused(x).shape == (1, 40)
    assert found(fused)[0].count == 2
    fused.flat.start_dim = 0
    assert fused(x).shape == (40,)


def test_dropout_drops_again_in_training() -> None:
    net, fused = pair(HEADS["dropout"])
    x = images()
    for _ in range(4):
        kept = fused(x)
    fused.drop.train()
    net.drop.train()
    for seed in range(3):
        torch.manual_seed(seed)
        y = fused(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(y, net(x))
        assert not torch.allclose(y, kept)
    fused.drop.eval()
    assert torch.equal(fused(x), kept)


def test_a_step_outside_the_budget_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        ok = False

    monkeypatch.setattr(_alone, "within_budget", lambda *args: Failed)
    linear, x = nn.Linear(40, 7), torch.randn(2, 40)
    linears = Linears()
    assert linears(0, linear, x) is None and linears(0, linear, x) is None


def test_what_is_no_plain_linear_layer_is_left() -> None:
    linears, linear = Linears(), nn.Linear(40, 7)
    x = torch.randn(3, 40)
    y = linears(0, linear, x)
    assert y is not None
    expect_within_budget(y, linear(x), copy.deepcopy(linear).double()(x.double()))
    assert torch.equal(linears(0, linear, x.t().contiguous().t()), y)
    assert linears(0, Shifted(40, 7), x) is None
    assert linears(0, linear, x[None]) is None and linears(0, linear, x[:0]) is None
    assert linears(0, linear.double(), x.double()) is None
    linear.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linears(0, linear, x) is None
    with torch.enable_grad():
        assert linears(0, linear, x) is None


def test_the_layer_follows_its_weights() -> None:
    linears, linear = Linears(), nn.Linear(40, 7)
    x = torch.randn(3, 40)
    linears(0, linear, x)
    linear.weight.data.mul_(3)
    linear.bias.data.zero_()
    y = linears(0, linear, x)
    assert y is not None
    torch.testing.assert_close(y, linear(x))
    linear.weight = nn.Parameter(torch.randn(7, 40))
    y = linears(0, linear, x)
    assert y is not None
    torch.testing.assert_close(y, linear(x))
