"""Residual networks by name."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from torch import nn

from resnet_fast.errors import ArgumentError
from resnet_fast.models.cifar import (
    CifarResNet,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    cifar_resnet1202,
)
from resnet_fast.models.plain import (
    plain18,
    plain20,
    plain32,
    plain34,
    plain44,
    plain56,
    plain110,
)
from resnet_fast.models.resnet import (
    ResNet,
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
from resnet_fast.models.weights import digits_resnet20, load_weights
from resnet_fast.nn.blocks import unfuse_

TORCHVISION = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder
    for builder in (
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
        cifar_resnet20,
        cifar_resnet32,
        cifar_resnet44,
        cifar_resnet56,
        cifar_resnet110,
        cifar_resnet1202,
        plain18,
        plain34,
        plain20,
        plain32,
        plain44,
        plain56,
        plain110,
    )
}


def list_models() -> list[str]:
    """The names that ``build`` takes; those in ``TORCHVISION`` are torchvision's networks."""
    return list(_BUILDERS)


def build(name: str, **kwargs: Any) -> nn.Module:
    """The network ``name``, with the keywords of its factory.

    Raises ``ArgumentError`` for an unknown name.
    """
    builder = _BUILDERS.get(name)
    if builder is None:
        close = get_close_matches(str(name), _BUILDERS, n=3) or list(_BUILDERS)
        raise ArgumentError("name", f"a network such as {', '.join(close)}", repr(name))
    return builder(**kwargs)


def plain_reference(name: str, **kwargs: Any) -> nn.Module:
    """The network ``name`` in plain PyTorch: the same modules, keys and weights, no fused site.

    The reference where torchvision is absent. Raises ``ArgumentError`` for an unknown name.
    """
    return unfuse_(build(name, **kwargs))


def input_shape(name: str, batch: int = 1, size: int | None = None) -> tuple[int, int, int, int]:
    """The input of the network ``name``: its paper's image size unless ``size`` is given.

    Raises ``ArgumentError`` for an unknown name.
    """
    builder = _BUILDERS.get(name)
    if builder is None:
        raise ArgumentError("name", "one of resnet_fast.models.list_models()", repr(name))
    imagenet = name in TORCHVISION or name in ("plain18", "plain34")
    return (batch, 3, *(2 * (size or (224 if imagenet else 32),)))


__all__ = [
    "TORCHVISION",
    "CifarResNet",
    "ResNet",
    "build",
    "digits_resnet20",
    "input_shape",
    "list_models",
    "load_weights",
    "plain_reference",
    *_BUILDERS,
]
