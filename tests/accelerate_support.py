"""Networks and helpers of the tests of accelerate()."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from resnet_fast.testing.budget import expect_within_budget, in_formats
from resnet_fast.testing.networks import randomize_batchnorm_

torchvision = pytest.importorskip("torchvision")
from torchvision.models.resnet import BasicBlock  # noqa: E402


class NarrowResNet(torchvision.models.ResNet):
    """torchvision's ResNet with an eighth of the width, to keep tests short."""

    def __init__(self):
        super().__init__(BasicBlock, [2, 1, 1, 1])
        self.fc = nn.Linear(64, 10)

    def _make_layer(self, block, planes, *args, **options):
        return super()._make_layer(block, planes // 8, *args, **options)


def narrow(seed=0):
    torch.manual_seed(seed)
    return randomize_batchnorm_(NarrowResNet(), seed).eval()


def network(name, **options):
    torch.manual_seed(0)
    if name == "googlenet":
        options.setdefault("init_weights", False)
    return randomize_batchnorm_(torchvision.models.get_model(name, weights=None, **options)).eval()


def tiny(module):
    """``module`` with random batch-norm statistics, in eval."""
    return randomize_batchnorm_(module).eval()


def images(batch=2, size=32, channels=3, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_same_numbers(accelerated, model, x, either_format=True, **options):
    """Every output of ``accelerated`` is within the budget that ``model`` sets in either format.

    ``model`` is left as it is, statistics included. One that runs in the format of ``x`` alone is
    asked in no other. ``options`` are passed to both.
    """
    twin = copy.deepcopy(model)

    def ask(x):
        return tree_leaves(twin(x, **options))

    # In fp64 the framework's fp32 results set the budget.
    narrow = torch.float32 if x.dtype is torch.float64 else x.dtype
    twin.to(narrow)
    given = x.to(narrow, copy=True)
    answers = in_formats(ask, given) if either_format else [ask(given)]
    twin.double()
    truths = ask(x.to(torch.float64, copy=True))
    ours = tree_leaves(accelerated(x, **options))
    for actual, *frameworks, truth in zip(ours, *answers, truths, strict=True):
        expect_within_budget(actual, frameworks, truth)


def reports(accelerated):
    return {path: report.reason for path, report in accelerated._acceleration.reports.items()}


def notes(accelerated):
    return {path: report.note for path, report in accelerated._acceleration.reports.items()}


def site_targets(accelerated, training=False):
    program = accelerated._acceleration.programs[training]
    return {s.target.path: (s, s.target) for s in program.steps if s.kind == "site"}


def has_residual(accelerated, path):
    return site_targets(accelerated)[path][0].args[1] is not None


class ConvBN(nn.Module):
    """Two convolutions with norms, and a ``combine`` that subclasses define."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 1)
        self.bn2 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.combine(x)


class Optional(ConvBN):
    def forward(self, x, *, scale=None, twice: bool = False):
        y = self.relu(self.bn(self.conv(x)))
        if scale is not None:
            y = y * scale
        return y * 2 if twice else y


class Reflecting(ConvBN):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")

    def combine(self, x):
        return self.bn(self.conv(x))
