"""Derivatives of derivatives, as gradient penalties take them, against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.nn import FusedSite
from resnet_fast.ops import activation


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_bn_act_train(act: str, residual: bool) -> None:
    x, weight, bias = draw(3, 2, 3, 2), draw(2), draw(2)
    added = draw(3, 2, 3, 2) if residual else None

    def f(*tensors: Tensor | None) -> Tensor:
        return ops.bn_act_train(*tensors, eps=1e-3, act=act)[0]

    assert torch.autograd.gradgradcheck(f, (x, weight, bias, added))


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_add_act(act: str) -> None:
    inputs = (draw(2, 3, 2), draw(2, 3, 2))
    assert torch.autograd.gradgradcheck(lambda a, b: ops.add_act(a, b, act), inputs)


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_bn_act(act: str) -> None:
    inputs = (draw(2, 3, 2), draw(3), draw(3), draw(2, 3, 2))
    assert torch.autograd.gradgradcheck(lambda *t: ops.bn_act(*t, act=act), inputs)


@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_conv_bn_act(act: str) -> None:
    inputs = (draw(2, 2, 4, 3), draw(3, 2, 2, 2), draw(3), draw(3), draw(2, 3, 3, 2))
    assert torch.autograd.gradgradcheck(lambda *t: ops.conv_bn_act(*t, act=act), inputs)


def test_gradient_penalty_of_a_site() -> None:
    """The penalty's gradient is the framework's: in fp64, to its roundings."""
    torch.manual_seed(1)
    conv, bn, site = nn.Conv2d(2, 3, 3).double(), nn.BatchNorm2d(3).double(), FusedSite("silu")
    x = draw(4, 2, 5, 5)
    found = []
    for forward in (lambda x: site(x, conv, bn), lambda x: nn.functional.silu(bn(conv(x)))):
        (slope,) = torch.autograd.grad(forward(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.norm(), [conv.weight, bn.weight, bn.bias]))
    for ours, theirs in zip(*found, strict=True):
        rounding = torch.finfo(torch.float64).eps * theirs.abs().max()
        assert theirs.abs().max() > 0
        # Some hundred roundings: the penalty passes four sums over 108 values.
        assert (ours - theirs).abs().max() <= 512 * rounding
