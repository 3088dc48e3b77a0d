"""The networks without shortcuts that He et al. 2015 compare with (figure 3 middle, figure 6)."""

from __future__ import annotations

from typing import Any

from resnet_fast.models.cifar import CifarResNet
from resnet_fast.models.resnet import ResNet
from resnet_fast.nn.blocks import PlainBlock


def _imagenet(layers: tuple[int, int, int, int], kwargs: dict[str, Any]) -> ResNet:
    network = ResNet(PlainBlock, layers, **kwargs)
    for stage in (network.layer2, network.layer3, network.layer4):
        for name in ("downsample", "site_downsample"):
            stage.get_submodule("0").register_module(name, None)
    return network


def plain18(**kwargs: Any) -> ResNet:
    """The 18-layer plain network for ImageNet; keywords are those of ``ResNet``."""
    return _imagenet((2, 2, 2, 2), kwargs)


def plain34(**kwargs: Any) -> ResNet:
    """The 34-layer plain network for ImageNet; keywords are those of ``ResNet``."""
    return _imagenet((3, 4, 6, 3), kwargs)


def plain20(**kwargs: Any) -> CifarResNet:
    """The 20-layer plain network for CIFAR; keywords are those of ``CifarResNet``."""
    return CifarResNet(20, plain=True, **kwargs)


def plain32(**kwargs: Any) -> CifarResNet:
    """The 32-layer plain network for CIFAR; keywords are those of ``CifarResNet``."""
    return CifarResNet(32, plain=True, **kwargs)


def plain44(**kwargs: Any) -> CifarResNet:
    """The 44-layer plain network for CIFAR; keywords are those of ``CifarResNet``."""
    return CifarResNet(44, plain=True, **kwargs)


def plain56(**kwargs: Any) -> CifarResNet:
    """The 56-layer plain network for CIFAR; keywords are those of ``CifarResNet``."""
    return CifarResNet(56, plain=True, **kwargs)


def plain110(**kwargs: Any) -> CifarResNet:
    """The 110-layer plain network for CIFAR; keywords are those of ``CifarResNet``."""
    return CifarResNet(110, plain=True, **kwargs)
