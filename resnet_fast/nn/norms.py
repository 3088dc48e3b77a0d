"""Batch norms of other libraries that sites take, told by where they come from: none is imported.

torchvision's ``FrozenBatchNorm2d`` is a batch norm in any mode. timm's ``BatchNormAct2d`` is
torch's ``BatchNorm2d`` with a dropout and an activation behind it, kept as its children; a site
takes the norm alone, and what follows as the modules that they are.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

#: The children of timm's norm, in the order in which they follow it.
AFTER_NORM = ("drop", "act")


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether ``module`` is torchvision's FrozenBatchNorm2d."""
    kind = type(module)
    return kind.__name__ == "FrozenBatchNorm2d" and kind.__module__.startswith("torchvision.ops")


def is_norm_act(module: nn.Module) -> bool:
    """Whether ``module`` is timm's BatchNormAct2d, with the children that it is made with."""
    return is_norm_act_type(type(module)) and tuple(module._modules) == AFTER_NORM


def is_norm_act_type(kind: type) -> bool:
    """Whether ``kind`` is timm's BatchNormAct2d."""
    named = kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")
    return named and issubclass(kind, nn.BatchNorm2d)


def normalise(norm: Any, x: Tensor) -> Tensor:
    """What ``norm`` makes of ``x`` before any activation of its own, statistics updated."""
    if is_norm_act_type(type(norm)):
        return _BatchNorm.forward(norm, x)
    return cast(Tensor, norm(x))
