"""The first steps of an accelerated model as one native call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sequence_support import by_step, needs_sequences
from torch import Tensor, nn

import resnet_fast
from resnet_fast.fuse.capture import STATE
from resnet_fast.fuse.program import Program
from resnet_fast.nn.sequence import image_mean
from resnet_fast.testing.budget import expect_within_budget, in_formats
from resnet_fast.testing.networks import randomize_batchnorm_

torchvision = pytest.importorskip("torchvision")
pytestmark = [needs_sequences, pytest.mark.usefixtures("no_grad")]


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return randomize_batchnorm_(torchvision.models.resnet18(num_classes=10), seed).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def program_of(module: nn.Module) -> Program:
    return module.__dict__[STATE].programs[False]


def ready(net: nn.Module, x: Tensor) -> Any:
    for _ in range(3):
        net(x)
    found = [sequence for _, sequence in program_of(net).prefix]
    assert found, "no sequence was made"
    return found[-1]


def test_the_same_bits_as_step_by_step() -> None:
    x = images()
    net = resnet_fast.accelerate(model(), x)
    first = net(x)
    ready(net, x)
    assert torch.equal(net(x), first)
    assert torch.equal(net(x), by_step(net, x))
    assert torch.equal(net(x.contiguous(memory_format=torch.channels_last)), first)
    assert "layers run as one native call at 3x64x64" in str(resnet_fast.explain(net))


def _write_through_data(net: Any) -> None:
    net.layer2[0].conv1.weight.data.mul_(2)


def _write_statistics(net: Any) -> None:
    net.layer4[1].bn2.running_mean.add_(1)


def _change_pool(net: Any) -> None:
    net.maxpool.kernel_size = 5
    net.maxpool.padding = 2


def _replace_pool(net: Any) -> None:
    net.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)


def _replace_block(net: Any) -> None:
    net.layer1[1] = nn.Identity()


def _replace_activation(net: Any) -> None:
    net.layer2[1].relu = nn.SiLU()


def _patch_conv(net: Any) -> None:
    conv = net.layer3[0].conv1
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) * 2


def _hook(net: Any) -> None:
    net.layer2.register_forward_hook(lambda module, args, y: y * 2)


def _patch_block(net: Any) -> None:
    block = net.layer2[0]
    block.forward = lambda x: type(block).forward(block, x) * 2


def _hook_conv(net: Any) -> None:
    net.layer2[0].conv1.register_forward_hook(lambda module, args, y: y * 2)


def _hook_head(net: Any) -> None:
    net.fc.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _hook_itself(net: Any) -> None:
    net.register_forward_hook(lambda module, args, y: y * 2)


def _replace_head(net: Any) -> None:
    net.fc = nn.Identity()


@pytest.mark.parametrize(
    "edit",
    [
        _write_through_data,
        _write_statistics,
        _change_pool,
        _replace_pool,
        _replace_block,
        _replace_activation,
        _patch_conv,
        _hook,
        _patch_block,
        _hook_conv,
        _hook_head,
        _hook_itself,
        _replace_head,
    ],
    ids=lambda edit: edit.__name__.strip("_"),
)
def test_edits_show_in_the_next_forward(edit: Callable[[Any], None]) -> None:
    x = images()
    net, edited = (resnet_fast.accelerate(model(), x) for _ in range(2))
    ready(net, x)
    before = net(x)
    edit(net)
    edit(edited)
    y = net(x)
    assert y.shape != before.shape or not torch.equal(y, before)
    assert torch.equal(y, by_step(edited, x))
    for _ in range(4):
        assert torch.equal(net(x), y)


class Doubling(nn.Module):
    """A block whose forward depends on its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return y * 2 if self.training else y


def test_a_block_in_another_mode_than_the_network() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(Doubling(), nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32)).eval()
    x = images()
    net = resnet_fast.accelerate(plain, x)
    ready(net, x)
    y = net(x)
    for block in (plain[0], net[0]):
        block.training = True
    assert not torch.equal(net(x), y)
    assert torch.allclose(net(x), plain(x), atol=1e-5)


def test_a_head_of_ones_own_keeps_its_hooks() -> None:
    """What comes after the sequence is not its business."""
    x = images()
    plain = model()
    plain.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 4)).eval()
    net = resnet_fast.accelerate(plain, x)
    ready(net, x)
    seen = []
    net.fc[1].register_forward_hook(lambda module, args, y: seen.append(y))
    net(x)
    assert len(seen) == 1 and list(program_of(net).prefix)


class Branching(nn.Module):
    """A second use of an early value, after the last layer that a sequence knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.bn1(self.conv1(x)))
        second = torch.relu(self.bn2(self.conv2(first)))
        return torch.sin(second) * first.amax()


def test_a_value_that_is_used_later_is_not_skipped() -> None:
    torch.manual_seed(0)
    x = images()
    net = resnet_fast.accelerate(randomize_batchnorm_(Branching()).eval(), x)
    program = program_of(net)
    expected = by_step(net, x)
    assert program.cuts[0] == 1 and 2 not in program.cuts
    for _ in range(4):
        assert torch.equal(net(x), expected)


def test_copies_and_pickles_start_empty() -> None:
    x = images()
    net = resnet_fast.accelerate(model(), x)
    ready(net, x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not list(program_of(other).prefix)
        assert torch.equal(other(x), net(x))


class Squeezed(nn.Module):
    """A block with squeeze-and-excitation, its mean and its product written in one way of each."""

    def __init__(self, mean: Callable[[Tensor], Tensor] | None, swapped: bool):
        super().__init__()
        self.expand = nn.Conv2d(16, 32, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.shortcut = nn.Identity()
        self.blur, self.avgpool = nn.Identity(), nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project = nn.Conv2d(32, 16, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.mean, self.swapped = mean, swapped

    def forward(self, x: Tensor) -> Tensor:
        h = self.blur(F.silu(self.bn1(self.expand(x))))
        s = self.avgpool(h) if self.mean is None else self.mean(h)
        s = self.fc2(F.silu(self.fc1(s))).sigmoid()
        return self.bn2(self.project(s * h if self.swapped else h * s)) + self.shortcut(x)


def squeezed(mean: Callable[[Tensor], Tensor] | None = None, swapped: bool = False) -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    net = nn.Sequential(*stem, Squeezed(mean, swapped), Squeezed(mean, swapped), nn.Flatten())
    return randomize_batchnorm_(net).eval()


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    "mean",
    [
        None,
        lambda h: h.mean((2, 3), keepdim=True),
        lambda h: h.mean([2, 3], True),
        lambda h: h.mean((-2, -1), keepdim=True),
    ],
    ids=["pool", "tuple", "list", "negative"],
)
@pytest.mark.parametrize("batch, size", [(1, 3), (1, 16), (3, 16)])
def test_gates_are_steps(mean: Any, swapped: bool, batch: int, size: int) -> None:
    """Two blocks of six steps behind a stem; at size 3 a map is one pixel."""
    net = squeezed(mean, swapped)
    fused = resnet_fast.accelerate(copy.deepcopy(net))
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    first = fused(x)
    frameworks = in_formats(net, x)
    expect_within_budget(first, frameworks, copy.deepcopy(net).double()(x.double()))
    sequence = ready(fused, x)
    assert sequence.count == 13
    assert torch.equal(fused(x), first) and torch.equal(by_step(fused, x), first)


@pytest.mark.parametrize(
    "edit",
    [
        lambda net: setattr(net[3].avgpool, "output_size", 2),
        lambda net: setattr(net[3], "avgpool", nn.AdaptiveMaxPool2d(1)),
        lambda net: setattr(net[3], "blur", nn.Hardtanh(-0.1, 0.1)),
        lambda net: net[3].blur.register_forward_hook(lambda module, args, y: y * 2),
        lambda net: net[4].fc2.weight.data.mul_(2),
        lambda net: net[4].avgpool.register_forward_hook(lambda module, args, y: y * 2),
    ],
    ids=["size", "pool", "identity", "hooked identity", "weight", "hook"],
)
def test_edits_of_gates_show(edit: Callable[[Any], Any]) -> None:
    net = squeezed()
    fused = resnet_fast.accelerate(copy.deepcopy(net))
    x = torch.randn(2, 3, 4, 4)  # maps of two by two: a pool to that size is nothing
    before = fused(x)
    ready(fused, x)
    for module in (net, fused):
        edit(module)
    wanted = net(x)
    for _ in range(3):
        torch.testing.assert_close(fused(x), wanted)
    assert not torch.allclose(wanted, before)


def test_a_mean_is_exact_to_rounding() -> None:
    x = torch.randn(2, 40, 9, 7).contiguous(memory_format=torch.channels_last)
    y = image_mean(x)
    assert y is not None and y.shape == (2, 40, 1, 1)
    expect_within_budget(y, x.mean((2, 3), keepdim=True), x.double().mean((2, 3), keepdim=True))
    assert image_mean(x.contiguous()) is None and image_mean(x.double()) is None


def test_stochastic_depth_is_no_step_in_eval() -> None:
    net = torchvision.models.efficientnet_b0(weights=None, num_classes=7)
    net = randomize_batchnorm_(net).eval()
    fused = resnet_fast.accelerate(copy.deepcopy(net))
    x = images()
    frameworks = in_formats(net, x)
    first = fused(x)
    expect_within_budget(first, frameworks, copy.deepcopy(net).double()(x.double()))
    assert ready(fused, x).count == 115
    assert torch.equal(fused(x), first)
    residual = [row for row in resnet_fast.explain(fused).rows if row["residual"]]
    assert len(residual) == 9
