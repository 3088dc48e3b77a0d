"""Blocks that train by conv_stats: the framework's step, verified, measured, and the modules' own.

A CPU runs the ops as their layers, so what decides is tested here without a GPU: the kernels are
taken to be there, and to win, or not, as the test says.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import models, plan
from resnet_fast.nn import training as module
from resnet_fast.nn.blocks import BasicBlock, Bottleneck, unfuse_
from resnet_fast.plan import cache, group
from resnet_fast.plan import training as place
from resnet_fast.plan.plan import Entry, Plan
from resnet_fast.testing.networks import randomize_batchnorm_
from resnet_fast.testing.step import Comparison


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, verdicts: Any) -> Iterator[list[int]]:
    """Lets blocks train so here, and win; a row for each block's call, with its convolutions."""
    found: list[int] = []

    def noted(x: Tensor, block: place.TrainBlock) -> Any:
        found.append(len(block.convs) + (block.down is not None))
        return place.run_fused(x, block)

    monkeypatch.setenv("RESNET_FAST_CACHE_DIR", str(verdicts))
    cache.forget()
    monkeypatch.setattr(module, "runs_on", lambda x: x.dtype is not torch.float64)
    monkeypatch.setattr(module, "has_kernels", lambda x, block: True)
    monkeypatch.setattr(module, "run_fused", noted)
    wins(monkeypatch, True)
    yield found
    cache.forget()


def wins(monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    monkeypatch.setattr(
        group, "measure", lambda runs, device: {k: float((k == "layers") == ours) for k in runs}
    )


def block(kind: type[nn.Module] = Bottleneck, stride: int = 1) -> nn.Module:
    torch.manual_seed(0)
    down = None
    planes = 8 * getattr(kind, "expansion", 1)
    if stride != 1 or kind is Bottleneck:
        down = nn.Sequential(nn.Conv2d(16, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
    made = kind(16 if down is not None else 8, 8, stride, down)
    return randomize_batchnorm_(made).train()


def images(channels: int = 16, batch: int = 4, size: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def by_layers(net: nn.Module) -> nn.Module:
    """A copy that runs torch's modules one by one."""
    plain = unfuse_(copy.deepcopy(net))
    for part in plain.modules():
        if isinstance(part, (BasicBlock, Bottleneck)):
            part.trained.forward = lambda block, x: None  # type: ignore[method-assign]
    return plain


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_a_networks_step_is_the_frameworks(calls: list[int], name: str) -> None:
    torch.manual_seed(1)
    net = randomize_batchnorm_(getattr(models, name)(num_classes=5)).train()
    net = net.to(memory_format=torch.channels_last)
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    x = x.contiguous(memory_format=torch.channels_last)
    comparison = Comparison(by_layers(net), x, y)
    state = copy.deepcopy(net.state_dict())
    net(x)  # decides
    net.load_state_dict(state)
    calls.clear()
    comparison.expect(name, net)
    blocks = [m for m in net.modules() if isinstance(m, (BasicBlock, Bottleneck))]
    assert len(calls) == len(blocks)


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("stride", [1, 2])
def test_running_statistics_are_torchs(
    calls: list[int], kind: type[nn.Module], stride: int
) -> None:
    ours = block(kind, stride)
    theirs = by_layers(ours)
    x = images(ours.conv1.in_channels)
    for momentum in (0.1, None):
        for net in (ours, theirs):
            for part in net.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.momentum = momentum
            net(x)
        for (name, mine), other in zip(
            ours.named_buffers(), dict(theirs.named_buffers()).values(), strict=True
        ):
            torch.testing.assert_close(mine, other, msg=name)
    assert calls


def test_autocast_runs_in_its_dtype(calls: list[int]) -> None:
    net = block()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(images())
        expected = by_layers(net)(images())
    assert calls and y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert net.conv1.weight.grad.dtype is torch.float32


def test_a_block_that_loses_runs_its_layers(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wins(monkeypatch, False)
    net = block()
    net(images())
    (line,) = net.trained.lines()
    assert "layers (SLOWER)" in line and not calls


def test_a_plan_decides_without_a_measurement(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = block(), images()
    net(x)
    key = place.key_of(x, module._place(net, x), plan.site.device_name(x.device))
    monkeypatch.setattr(group, "measure", lambda *a: pytest.fail("the plan decides"))
    for name, count in ((place.NAME, 1), ("layers", 0)):
        calls.clear()
        with plan.use(Plan("cpu", {key: Entry(name)})):
            net(x)
        assert len(calls) == count


def test_a_wrong_kernel_is_not_used(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fused = place.run_fused

    def wrong(x: Tensor, block: place.TrainBlock) -> Any:
        y, measured = fused(x, block)
        return y + 0 * y + (x.mean() - x.mean().detach()), measured  # a wrong gradient of x alone

    monkeypatch.setattr(place, "run_fused", wrong)
    monkeypatch.setenv("RESNET_FAST_CACHE_DIR", str(tmp_path))
    cache.forget()
    net = block()
    net(images())
    (line,) = net.trained.lines()
    assert "layers (MISMATCH)" in line and not calls


def test_verified_with_images_that_take_the_kernels_that_run() -> None:
    """As ResNet-50's first stage: 64-pixel tiles give way to larger ones at 4 and 8 images."""
    bn = (None, None, 1e-5)
    convs = tuple(
        place.TrainConv(torch.empty(k, c, r, r), *bn, (1, 1), (r // 2, r // 2), (1, 1), 1)
        for k, c, r in ((64, 256, 1), (64, 64, 3), (256, 64, 1))
    )
    taken = place.TrainBlock(convs, None, "relu")
    for batch, least in ((1, 2), (2, 2), (4, 4), (8, 8), (128, 8)):
        x = torch.empty(batch, 256, 56, 56, dtype=torch.float16)
        assert place._images(x, taken) == least
        if batch > 1:
            assert place.variant_of(x, taken, least) == place.variant_of(x, taken, batch)


def unplain(name: str, net: Any) -> None:
    changes: dict[str, Any] = {
        "a hook": lambda: net.conv2.register_forward_hook(lambda *a: None),
        "a hook of the norm": lambda: net.bn1.register_forward_pre_hook(lambda *a: None),
        "a norm in eval": lambda: net.bn2.eval(),
        "another norm": lambda: setattr(net, "bn1", nn.GroupNorm(2, 8)),
        "another activation": lambda: setattr(net, "relu", nn.SiLU()),
        "a patched forward": lambda: setattr(net.conv1, "forward", net.conv1.forward),
        "a bias": lambda: setattr(net, "conv1", nn.Conv2d(16, 8, 1)),
        "reflected padding": lambda: setattr(net.conv2, "padding_mode", "reflect"),
        "another shortcut": lambda: setattr(net, "downsample", nn.Conv2d(16, 32, 1)),
    }
    changes[name]()


@pytest.mark.parametrize(
    "change",
    [
        "a hook",
        "a hook of the norm",
        "a norm in eval",
        "another norm",
        "another activation",
        "a patched forward",
        "a bias",
        "reflected padding",
        "another shortcut",
    ],
)
def test_what_is_not_plain_runs_by_its_modules(calls: list[int], change: str) -> None:
    net = block()
    unplain(change, net)
    net(images())
    assert not calls


def test_only_a_recorded_step_in_channels_last(calls: list[int]) -> None:
    net, x = block(), images()
    with torch.no_grad():
        net(x)
    net(x.contiguous())
    net.eval()(x)
    net.train()
    assert not calls
    net(x)
    assert calls == [4]


def test_copies_and_pickles_start_empty(calls: list[int]) -> None:
    net = block()
    net(images())
    assert list(net.trained.lines())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not list(other.trained.lines())
        assert torch.equal(other(images()), net(images()))


def test_explain_says_how_blocks_train(calls: list[int]) -> None:
    net = models.resnet18(num_classes=3).train().to(memory_format=torch.channels_last)
    x = images(3, 2, 64)
    net(x)
    lines = str(resnet_fast.explain(net)).splitlines()
    assert any("layer1.0: training by conv_stats (OK)" in line for line in lines)


def test_compiled_training_runs_the_modules(calls: list[int]) -> None:
    torch._dynamo.reset()
    net = block()
    y = torch.compile(net, backend="aot_eager", fullgraph=True)(images())
    assert not calls and y.shape == (4, 32, 7, 7)
