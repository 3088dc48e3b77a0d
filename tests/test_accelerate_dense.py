"""Dense networks and their kin: norms before convolutions, joined channels and average pooling."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sequence_support import by_step, found, needs_sequences
from torch import Tensor, nn

import resnet_fast
from resnet_fast.fuse.capture import STATE
from resnet_fast.fuse.match import REASONS
from resnet_fast.nn import alone as _alone
from resnet_fast.nn.alone import Norms
from resnet_fast.ops.activation import ACTIVATIONS
from resnet_fast.ops.bn_act import reference
from resnet_fast.testing.budget import expect_within_budget, in_formats
from resnet_fast.testing.networks import randomize_batchnorm_

torchvision = pytest.importorskip("torchvision")
pytestmark = [needs_sequences, pytest.mark.usefixtures("no_grad")]


def dense(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"growth_rate": 8, "block_config": (2, 3), "num_init_features": 16, "bn_size": 2}
    model = torchvision.models.DenseNet(**(sizes | options), num_classes=10)
    return randomize_batchnorm_(model, 0).eval()


def images(batch: int = 2, size: int = 64, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, size, size, generator=generator)


def expect_same(fused: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    """That a first call, later ones and one step by step agree, and with the model's own."""
    first = fused(x)
    expect_within_budget(first, in_formats(model, x), copy.deepcopy(model).double()(x.double()))
    for _ in range(3):
        assert torch.equal(fused(x), first)
    assert torch.equal(by_step(fused, x), first)
    return first


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_a_dense_network_is_one_call(batch: int) -> None:
    model = dense()
    fused = resnet_fast.accelerate(model, images())
    expect_same(fused, model, images(batch))
    (sequence,) = found(fused)
    # 12 convolutions, 7 norms by themselves, 5 joins, two poolings, mean and linear layer.
    assert sequence.count == 12 + 7 + 5 + 2 + 2
    told = resnet_fast.explain(fused)
    assert "28 layers run as one native call" in str(told)
    assert told.summary == "12 of 12 sites fused"
    alone = [row["name"] for row in told.rows if row["notes"] == REASONS["MULTIPLE_USERS"]]
    assert alone == [f"features.denseblock{b}.denselayer1.conv2" for b in (1, 2)] + [
        "features.denseblock2.denselayer2.conv2"
    ]


def test_bf16() -> None:
    model = dense().to(torch.bfloat16)
    fused = resnet_fast.accelerate(model)
    x = images().to(torch.bfloat16)
    y = fused(x)
    truth = copy.deepcopy(model).double()(x.double())
    expect_within_budget(y, in_formats(model, x), truth)
    assert torch.equal(by_step(fused, x), y) and torch.equal(fused(x), y)


def test_either_layout_gives_the_same_bits() -> None:
    model = dense()
    fused = resnet_fast.accelerate(model)
    x = images()
    y = expect_same(fused, model, x)
    assert torch.equal(fused(x.contiguous(memory_format=torch.channels_last)), y)


def _statistics(net: Any) -> None:
    net.features.denseblock2.denselayer2.norm1.running_var.mul_(3)


def _data(net: Any) -> None:
    net.features.transition1.norm.weight.data.mul_(2)


def _data_of_a_lone_convolution(net: Any) -> None:
    net.features.denseblock1.denselayer1.conv2.weight.data.mul_(-1)


def _parameter(net: Any) -> None:
    net.features.norm5.bias = nn.Parameter(torch.linspace(-1, 1, 40))


def _eps(net: Any) -> None:
    net.features.denseblock1.denselayer2.norm1.eps = 0.5


def _activation(net: Any) -> None:
    net.features.denseblock1.denselayer2.relu1 = nn.Hardswish()


def _pooling(net: Any) -> None:
    net.features.transition1.pool.kernel_size = 3


def _ceiling(net: Any) -> None:
    net.features.transition1.pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)


def _norm(net: Any) -> None:
    net.features.denseblock2.denselayer1.norm1 = nn.Identity()


def _hook(net: Any) -> None:
    net.features.denseblock2.denselayer1.norm1.register_forward_hook(lambda m, args, y: y * 2)


def _hook_on_the_activation(net: Any) -> None:
    net.features.transition1.relu.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def _batch_statistics(net: Any) -> None:
    net.features.denseblock2.denselayer1.norm1.train()


def _no_statistics(net: Any) -> None:
    norm = net.features.denseblock2.denselayer1.norm1
    norm.running_mean = norm.running_var = None


def _patch(net: Any) -> None:
    norm = net.features.norm5
    norm.forward = lambda x: x * 2


EDITS = [
    *(_statistics, _data, _data_of_a_lone_convolution, _parameter, _eps, _activation),
    *(_pooling, _ceiling, _norm, _hook, _hook_on_the_activation, _batch_statistics),
    *(_no_statistics, _patch),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_shows(edit: Callable[[Any], None]) -> None:
    fused, x = resnet_fast.accelerate(dense()), images()
    before = expect_same(fused, dense(), x)
    edited = dense()
    edit(fused)
    edit(edited)
    y = fused(x)
    assert not torch.allclose(y, before)
    truth = copy.deepcopy(edited).double()
    expect_within_budget(y, in_formats(edited, x), truth(x.double()))
    for _ in range(3):
        expect_within_budget(fused(x), in_formats(edited, x), truth(x.double()))


def test_training_and_back() -> None:
    model = dense(drop_rate=0.2)
    fused, x = resnet_fast.accelerate(copy.deepcopy(model)), images(4)
    before = expect_same(fused, model, x)
    for net in (fused, model):
        net.train()
        torch.manual_seed(3)
        with torch.enable_grad():
            net(x).square().mean().backward()
        net.eval()
    for ours, theirs in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    for name, value in model.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), value, rtol=1e-4, atol=1e-5)
    # What a step left in the statistics counts from the next call on.
    for name, value in model.named_buffers():
        fused.get_buffer(name).copy_(value)
    assert not torch.allclose(expect_same(fused, model, x), before)


def test_copies_and_pickles_start_anew() -> None:
    fused, x = resnet_fast.accelerate(dense()), images()
    y = fused(x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert not found(twin)
        assert torch.equal(twin(x), y) and torch.equal(twin(x), y)


class Blocks(nn.Module):
    """Two convolutions with norms, and what is made of them."""

    def __init__(self, forward: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(3, 24, 3, padding=1, stride=1), nn.BatchNorm2d(24)
        self.conv3, self.conv4 = nn.Conv2d(16, 16, 1), nn.Conv2d(40, 16, 1)
        self.norm, self.norm40 = nn.BatchNorm2d(16), nn.BatchNorm2d(40)
        self.pool, self.most = nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)
        self.outside = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.ceil = nn.AvgPool2d(2, 2, ceil_mode=True)
        self.divisor = nn.AvgPool2d(2, 2, divisor_override=3)
        self.combine = forward

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.bn1(self.conv1(x))), F.relu(self.bn2(self.conv2(x)))
        return self.combine(self, a, b)


ONE_CALL: dict[str, tuple[int, Callable[[Any, Tensor, Tensor], Tensor]]] = {
    "join": (4, lambda m, a, b: m.conv4(torch.cat([a, b], 1))),
    "join by keyword": (4, lambda m, a, b: m.conv4(torch.cat((a, b), dim=-3))),
    "join by its other name": (4, lambda m, a, b: m.conv4(torch.concat([a, b], 1))),
    "join and norm": (5, lambda m, a, b: m.conv4(F.relu(m.norm40(torch.cat([a, b], 1))))),
    "norm without activation": (5, lambda m, a, b: m.conv4(m.norm40(torch.cat([a, b], 1)))),
    "join twice": (5, lambda m, a, b: torch.cat([b, m.conv4(torch.cat([a, b], 1))], 1)),
    "join again": (5, lambda m, a, b: m.conv4(torch.cat([a, b], 1)) + m.conv3(a)),
    "both ways": (5, lambda m, a, b: torch.cat([torch.cat([a, b], 1), torch.cat([b, a], 1)], 1)),
    "twice the same": (4, lambda m, a, b: torch.cat([a, b, b], 1)),
    "one": (4, lambda m, a, b: torch.cat([torch.cat([m.conv3(a)], 1), b], 1)),
    "pooled": (6, lambda m, a, b: m.conv4(torch.cat([m.pool(a), m.most(b)], 1))),
    "sigmoid": (4, lambda m, a, b: torch.cat([torch.sigmoid(m.norm(a)), b], 1)),
    "norm of a norm": (5, lambda m, a, b: m.conv3(F.relu(m.norm(F.relu(m.norm(a)))))),
    "norm read twice": (4, lambda m, a, b: (lambda h: m.conv3(h) + h)(F.relu(m.norm(a)))),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("way", ONE_CALL)
def test_what_is_part_of_the_call(way: str, batch: int) -> None:
    count, forward = ONE_CALL[way]
    torch.manual_seed(0)
    model = randomize_batchnorm_(Blocks(forward)).eval()
    fused = resnet_fast.accelerate(copy.deepcopy(model))
    expect_same(fused, model, images(batch, size=13))
    (sequence,) = found(fused)
    assert sequence.count == count


OTHERS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "images": lambda m, a, b: m.conv3(torch.cat([a, a], 0)),
    "lines": lambda m, a, b: m.conv3(torch.cat([a, a], 2)),
    "of a scaled value": lambda m, a, b: m.conv4(torch.cat([a * 2, b], 1)),
    "written to": lambda m, a, b: m.conv4(torch.cat([a, b], 1).mul_(2)),
    "without padding": lambda m, a, b: m.conv3(m.outside(a)),
    "rounded up": lambda m, a, b: m.conv3(m.ceil(a)),
    "another divisor": lambda m, a, b: m.conv3(m.divisor(a)),
    "in place behind a norm": lambda m, a, b: m.conv3(m.norm(a).mul_(2)),
}


@pytest.mark.parametrize("way", OTHERS)
def test_what_is_not(way: str) -> None:
    torch.manual_seed(0)
    model = randomize_batchnorm_(Blocks(OTHERS[way])).eval()
    fused = resnet_fast.accelerate(copy.deepcopy(model))
    expect_same(fused, model, images(size=13))
    steps = len(fused.__dict__[STATE].programs[False].steps)
    assert all(sequence.count < steps - 1 for sequence in found(fused))


# Norms by themselves.


def norm_of(channels: int = 24) -> nn.BatchNorm2d:
    torch.manual_seed(0)
    return randomize_batchnorm_(nn.Sequential(nn.BatchNorm2d(channels)))[0].eval()


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_alone(act: str, affine: bool) -> None:
    norm = norm_of() if affine else nn.BatchNorm2d(24, affine=False).eval()
    x = last(images(3, 9, 24))
    y = Norms()(0, norm, act, x)
    assert y is not None and y.is_contiguous(memory_format=torch.channels_last)
    given = reference(norm(x), act=act)
    expect_within_budget(y, given, reference(copy.deepcopy(norm).double()(x.double()), act=act))


def test_what_is_no_plain_norm_is_left() -> None:
    class Shifted(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    norms, norm, x = Norms(), norm_of(), last(images(2, 9, 24))
    assert norms(0, norm, "relu", x) is not None
    assert norms(1, Shifted(24).eval(), "relu", x) is None
    assert norms(2, nn.BatchNorm2d(24, track_running_stats=False).eval(), "relu", x) is None
    assert norms(3, nn.GroupNorm(2, 24), "relu", x) is None
    for other in (x.contiguous(), x[:0], x.double(), x[0], x.to("meta"), None):
        assert norms(0, norm, "relu", other) is None
    assert norms(0, norm, "relu", last(images(2, 9, 23))) is None
    with torch.enable_grad():
        assert norms(0, norm, "relu", x) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norms(0, norm, "relu", x) is None
    assert norms(0, norm.train(), "relu", x) is None


def test_a_norm_outside_the_budget_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        ok = False

    monkeypatch.setattr(_alone, "within_budget", lambda *args: Failed)
    norms = Norms()
    for _ in range(6):
        assert norms(0, norm_of(), "relu", last(images(2, 9, 24))) is None


def test_many_norms_are_each_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than a site remembers shapes."""
    judged: list[Any] = []
    real = _alone.within_budget
    monkeypatch.setattr(_alone, "within_budget", lambda *a: judged.append(a) or real(*a))
    norms, x = Norms(), last(images(1, 5, 24))
    many = [norm_of() for _ in range(70)]
    for _ in range(3):
        for place, norm in enumerate(many):
            assert norms(place, norm, "relu", x) is not None
    assert len(judged) == 70
