"""Activations of fp32 over their whole range, on CPU, against fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from resnet_fast import ops
from resnet_fast.ops import activation

EPS = torch.finfo(torch.float32).eps
#: The largest error in units of EPS of the value, and what counts as nothing beside 1.
LIMITS = {"silu": 2.5, "sigmoid": 3.0}
NOTHING = 1e-36
FORMS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "bn_act": lambda x, act: ops.bn_act(x, act=act),
    "conv_bn_act": lambda x, act: ops.conv_bn_act(x, torch.ones(1, 1, 1, 1), act=act),
}


def values() -> Tensor:
    """Fine steps where the function bends, every magnitude beyond, and the ends of the range."""
    ends = torch.tensor(
        [3e38, 1e38, 1e20, 200.0, 176.0, 174.0, 104.0, 90.0, 88.0, 87.0, 1e-40, 0.0]
    )
    fine = torch.linspace(-110, 110, 400_003)
    wide = torch.logspace(-30, 38, 4001)
    return torch.cat([fine, wide, -wide, ends, -ends])[None, None, None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("act", LIMITS)
def test_within_units_of_the_last_place(act: str, form: str) -> None:
    x = values()
    y, truth = FORMS[form](x, act), activation.value(act, x.double())
    off = (y.double() - truth).abs()
    allowed = LIMITS[act] * EPS * truth.abs() + NOTHING
    worst = (off / allowed).argmax()
    assert (off <= allowed).all(), (x.flatten()[worst], y.flatten()[worst], truth.flatten()[worst])
