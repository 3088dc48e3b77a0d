"""accelerate() on norms that carry their activation (timm), and over the identities around them.

The norm is told by its name and module, so a stand-in written here is taken as timm's own; where
timm is installed its networks are accelerated as well.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate_support import assert_same_numbers, images, notes, reports, tiny
from torch import Tensor, nn

from resnet_fast import accelerate, undo
from resnet_fast.nn import norms
from resnet_fast.nn.site import FusedSite


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's class of this name computes, its check of the input's rank included."""

    def __init__(self, channels: int, act: nn.Module | None = None, drop: nn.Module | None = None):
        super().__init__(channels)
        self.drop = drop or nn.Identity()
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected four axes")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        x = F.batch_norm(x, *statistics, self.training, self.momentum, self.eps)
        return self.act(self.drop(x))


BatchNormAct2d.__module__ = "timm.layers.norm_act"


class Inverted(nn.Module):
    """An inverted bottleneck as timm writes it: no activation at the end, a path that may drop."""

    def __init__(self, channels: int = 8, act: type[nn.Module] = nn.SiLU):
        super().__init__()
        self.conv_pw = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.bn1 = BatchNormAct2d(2 * channels, act(inplace=True))
        self.conv_dw = nn.Conv2d(
            2 * channels, 2 * channels, 3, padding=1, groups=2 * channels, bias=False
        )
        self.bn2 = BatchNormAct2d(2 * channels, act(inplace=True))
        self.aa = nn.Identity()
        self.conv_pwl = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.bn3 = BatchNormAct2d(channels)
        self.drop_path: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.bn1(self.conv_pw(x))
        x = self.aa(self.bn2(self.conv_dw(x)))
        x = self.bn3(self.conv_pwl(x))
        return self.drop_path(x) + shortcut


def network(act: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    torch.manual_seed(0)
    return tiny(nn.Sequential(nn.Conv2d(3, 8, 3), Inverted(act=act), Inverted(act=act)))


def sites(model: nn.Module) -> list[FusedSite]:
    return [module for module in model.modules() if isinstance(module, FusedSite)]


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU, nn.ReLU6, nn.Hardswish])
def test_norm_residual_and_activation_join(act: type[nn.Module], no_grad: None) -> None:
    model = network(act)
    fused = accelerate(copy.deepcopy(model))
    for seed in range(3):
        assert_same_numbers(fused, model, images(seed=seed))
    # The first convolution's result is also the shortcut of the block behind it.
    assert reports(fused).pop("0") == "ALONE"
    told = notes(fused)
    assert told.pop("0") == "MULTIPLE_USERS" and not any(told.values())
    assert list(reports(fused).values()).count("FUSED") == 6
    rows = [row for site in sites(fused) for row in site.rows()]
    assert [(row["act"] == "none", row["residual"]) for row in rows[1:]] == 2 * [
        (False, False), (False, False), (True, True)
    ]  # fmt: skip
    assert {row["reason"] for row in rows} & {"UNKNOWN_NORM", "HOOKED"} == set()


def test_training_updates_the_same_statistics() -> None:
    # In fp64, where formulas are compared and not roundings.
    model = network().double().train()
    fused = accelerate(copy.deepcopy(model))
    for seed in range(2):
        x = images(seed=seed).double()
        wanted, found = model(x), fused(x)
        torch.testing.assert_close(found, wanted)
        weights = torch.randn_like(wanted)
        wanted.backward(weights)
        found.backward(weights)
    for (name, a), (other, b) in zip(
        model.state_dict().items(), fused.state_dict().items(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(b, a)
    for p, q in zip(model.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    assert fused[1].bn1.num_batches_tracked == 2


def test_gradients_in_eval_take_the_norm_alone() -> None:
    model = network()
    fused = accelerate(copy.deepcopy(model))
    x, y = images().requires_grad_(), images().requires_grad_()
    found, wanted = fused(x), model(y)
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert "GRAD" in {row["reason"] for site in sites(fused) for row in site.rows()}


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.bn1, "act", nn.Tanh()),
        lambda block: setattr(block.bn1, "act", nn.Identity()),
        lambda block: setattr(block.bn3, "act", nn.ReLU()),
        lambda block: setattr(block.bn2, "drop", nn.Hardtanh(-0.1, 0.1)),
        lambda block: setattr(block, "drop_path", nn.Hardtanh(-0.1, 0.1)),
        lambda block: setattr(block, "bn1", nn.BatchNorm2d(16).eval()),
        lambda block: block.bn1.register_forward_hook(lambda module, args, y: y * 2),
        lambda block: block.drop_path.register_forward_hook(lambda module, args, y: y * 2),
        lambda block: block.bn1.act.register_forward_hook(lambda module, args, y: y * 2),
        lambda block: setattr(block.bn2, "forward", lambda x: x),
        lambda block: setattr(block.bn1, "eps", 0.5),
        lambda block: block.bn1.running_mean.add_(1),
    ],
)
def test_what_is_changed_afterwards_runs(change: Any, no_grad: None) -> None:
    model = network()
    fused = accelerate(copy.deepcopy(model))
    x = images()
    for _ in range(3):
        before = fused(x)
    for changed in (model, fused):
        change(changed[1])
    for _ in range(3):
        assert_same_numbers(fused, model, x)
    assert not torch.allclose(model(x), before)


def test_a_hooked_norm_runs_whole(no_grad: None) -> None:
    model = network()
    seen: list[Tensor] = []
    model[1].bn1.register_forward_hook(lambda module, args, y: seen.append(y))
    fused = accelerate(copy.deepcopy(model))
    torch.testing.assert_close(fused(images()), model(images()))
    assert len(seen) == 2 and reports(fused)["1.conv_pw"] == "HOOKED"
    torch.testing.assert_close(seen[0], seen[1])


def test_a_norm_behind_no_site_keeps_its_activation(no_grad: None) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.bn = BatchNormAct2d(8, nn.SiLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(self.bn(self.conv(x))))

    model = tiny(Twice())
    fused = accelerate(copy.deepcopy(model))
    assert reports(fused) == {"conv": "SHARED_MODULE"}
    torch.testing.assert_close(fused(images(channels=8)), model(images(channels=8)))


def test_a_site_that_is_handed_the_norm_calls_it_whole(no_grad: None) -> None:
    """As torchvision's ResNet does with a norm layer of the user's: nobody else runs its act."""
    conv, norm = nn.Conv2d(8, 8, 1), tiny(BatchNormAct2d(8, nn.SiLU()))
    x = images(channels=8)
    for act in ("none", "relu"):
        site = FusedSite(act)
        wanted = norm(conv(x))
        torch.testing.assert_close(site(x, conv, norm), wanted.relu() if act == "relu" else wanted)
        assert [row["reason"] for row in site.rows()] == ["UNKNOWN_NORM"]


def _hand_over(block: nn.Module) -> None:
    block[1] = tiny(BatchNormAct2d(8, nn.SiLU()))


def _hand_over_beside_another_act(block: nn.Module) -> None:
    _hand_over(block)
    block[2] = nn.Tanh()


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("change", [_hand_over, _hand_over_beside_another_act])
def test_a_norm_with_an_activation_in_a_plain_ones_place_runs_whole(
    change: Any, dtype: str | None, no_grad: None
) -> None:
    torch.manual_seed(0)
    model = tiny(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    options = {} if dtype is None else {"dtype": dtype, "calibration": [images()]}
    fused = accelerate(copy.deepcopy(model), **options)
    for _ in range(3):
        fused(images())
    for changed in (model, fused):
        torch.manual_seed(1)
        change(changed)
    for _ in range(3):
        assert_same_numbers(fused, model, images())


def test_undo_copy_and_keys(no_grad: None) -> None:
    model = network()
    keys = list(model.state_dict())
    fused = accelerate(copy.deepcopy(model))
    assert list(fused.state_dict()) == keys
    twin = copy.deepcopy(fused)
    torch.testing.assert_close(twin(images()), fused(images()))
    back = undo(fused)
    assert not sites(back) and torch.equal(back(images()), model(images()))


def test_the_name_alone_is_not_enough() -> None:
    namesake = type("BatchNormAct2d", (nn.BatchNorm2d,), {"__module__": "other.norms"})
    assert norms.is_norm_act(BatchNormAct2d(4)) and not norms.is_norm_act(namesake(4))
    grown = BatchNormAct2d(4)
    grown.extra = nn.ReLU()
    assert not norms.is_norm_act(grown)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenetv3_small_050", "seresnet18"])
def test_timm(name: str, no_grad: None) -> None:
    timm = pytest.importorskip("timm")
    model = tiny(timm.create_model(name))
    fused = accelerate(copy.deepcopy(model))
    assert_same_numbers(fused, model, images(size=64))
    counts = list(reports(fused).values())
    assert counts.count("FUSED") > 0.8 * len(counts)
