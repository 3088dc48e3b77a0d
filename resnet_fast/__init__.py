"""Fused residual-network kernels for PyTorch, and the ResNet family and ``accelerate()`` on them.

``resnet_fast.resnet50(...)`` takes the place of ``torchvision.models.resnet50(...)``: the same
``state_dict``, the same numbers, fused in ``eval()``. ``accelerate(model)`` does the same for a
network that exists already, ``explain(model)`` says what runs where and why, ``undo(model)`` gives
the original back.
"""

from __future__ import annotations

from resnet_fast import ops, plan
from resnet_fast._library import release_memory
from resnet_fast._version import __version__
from resnet_fast.errors import (
    AccelerateError,
    ArgumentError,
    DTypeError,
    LibraryError,
    PlanError,
    ResNetFastError,
    VerificationError,
    WeightsError,
)
from resnet_fast.fuse import accelerate, explain, undo
from resnet_fast.models import (
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    cifar_resnet1202,
    plain18,
    plain20,
    plain32,
    plain34,
    plain44,
    plain56,
    plain110,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from resnet_fast.ops import add_act, bn_act, bn_act_train, conv_bn_act
from resnet_fast.ops._pack import clear as refresh

__all__ = [
    "AccelerateError",
    "ArgumentError",
    "DTypeError",
    "LibraryError",
    "PlanError",
    "ResNetFastError",
    "VerificationError",
    "WeightsError",
    "__version__",
    "accelerate",
    "add_act",
    "bn_act",
    "bn_act_train",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
    "cifar_resnet1202",
    "conv_bn_act",
    "explain",
    "ops",
    "plain18",
    "plain20",
    "plain32",
    "plain34",
    "plain44",
    "plain56",
    "plain110",
    "plan",
    "refresh",
    "release_memory",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "undo",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
