"""The CIFAR networks of He et al. 2015 (arXiv:1512.03385), section 4.2: 6n+2 layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.errors import ArgumentError
from resnet_fast.nn import recorder as _recorder
from resnet_fast.nn.blocks import (
    BasicBlock,
    PlainBlock,
    SiteReLU,
    check_images,
    conv1x1,
    conv3x3,
    conv_bn_relu,
    stem_site,
    to_planned_layout,
)
from resnet_fast.nn.sequence import Sequenced, plain


@plain
class ZeroPadShortcut(nn.Module):
    """Option A: the identity at every ``stride``-th pixel, new channels zero. No parameters."""

    def __init__(self, in_planes: int, out_planes: int, stride: int) -> None:
        super().__init__()
        self.new_planes = out_planes - in_planes
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        taken = x[:, :, :: self.stride, :: self.stride]
        y = F.pad(taken, (0, 0, 0, 0, 0, self.new_planes))
        recorder = _recorder.active()
        if recorder is not None:
            recorder.pad_channels(self, self.stride, x, y)
        return y

    def extra_repr(self) -> str:
        return f"new_planes={self.new_planes}, stride={self.stride}"


@plain
class CifarResNet(Sequenced):
    """ResNet of ``depth = 6n + 2`` layers: 16, 32, 64 channels at 32, 16, 8 pixels, n blocks each.

    ``shortcut``: "A" subsamples and pads with zero channels where the shape changes, "B" projects
    there (1x1 convolution and norm), "C" projects in every block. ``plain=True`` leaves the
    shortcuts out. Input ``(N, in_channels, H, W)``, output ``(N, num_classes)`` logits.
    Raises ``ArgumentError`` for a depth that is not 6n+2 or an unknown shortcut.
    """

    def __init__(
        self,
        depth: int,
        shortcut: str = "A",
        plain: bool = False,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if not isinstance(depth, int) or depth < 8 or (depth - 2) % 6:
            raise ArgumentError("depth", "6n+2 with n >= 1", depth)
        if shortcut not in ("A", "B", "C"):
            raise ArgumentError("shortcut", "'A', 'B' or 'C'", repr(shortcut))
        for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(argument, "a positive int", repr(value))
        self.shortcut = shortcut
        self.plain = plain
        self.inplanes = 16
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(in_channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = SiteReLU("conv1")
        self.layer1 = self._make_layer(16, blocks, stride=1)
        self.layer2 = self._make_layer(32, blocks, stride=2)
        self.layer3 = self._make_layer(64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, planes: int, blocks: int, stride: int) -> nn.Sequential:
        block = PlainBlock if self.plain else BasicBlock
        layers = []
        for i in range(blocks):
            s = stride if i == 0 else 1
            layers.append(block(self.inplanes, planes, s, self._downsample(planes, s)))
            self.inplanes = planes
        return nn.Sequential(*layers)

    def _downsample(self, planes: int, stride: int) -> nn.Module | None:
        changes = stride != 1 or self.inplanes != planes
        if self.plain or not (changes or self.shortcut == "C"):
            return None
        if self.shortcut == "A":
            return ZeroPadShortcut(self.inplanes, planes, stride)
        return nn.Sequential(conv1x1(self.inplanes, planes, stride), nn.BatchNorm2d(planes))

    def _trunk(self, x: Tensor) -> Tensor:
        check_images(x, self.conv1)
        site = stem_site(self.relu)
        x = to_planned_layout(x, self, site, self.bn1)
        x = conv_bn_relu(site, x, self.conv1, self.bn1, self.relu)
        # One input channel is both layouts at once and the stem then answers in NCHW.
        x = to_planned_layout(x, self, site, self.bn1)
        return self.layer3(self.layer2(self.layer1(x)))


def cifar_resnet20(**kwargs: object) -> CifarResNet:
    """ResNet-20, n = 3; keywords are those of ``CifarResNet``."""
    return CifarResNet(20, **kwargs)  # type: ignore[arg-type]


def cifar_resnet32(**kwargs: object) -> CifarResNet:
    """ResNet-32, n = 5; keywords are those of ``CifarResNet``."""
    return CifarResNet(32, **kwargs)  # type: ignore[arg-type]


def cifar_resnet44(**kwargs: object) -> CifarResNet:
    """ResNet-44, n = 7; keywords are those of ``CifarResNet``."""
    return CifarResNet(44, **kwargs)  # type: ignore[arg-type]


def cifar_resnet56(**kwargs: object) -> CifarResNet:
    """ResNet-56, n = 9; keywords are those of ``CifarResNet``."""
    return CifarResNet(56, **kwargs)  # type: ignore[arg-type]


def cifar_resnet110(**kwargs: object) -> CifarResNet:
    """ResNet-110, n = 18; keywords are those of ``CifarResNet``."""
    return CifarResNet(110, **kwargs)  # type: ignore[arg-type]


def cifar_resnet1202(**kwargs: object) -> CifarResNet:
    """ResNet-1202, n = 200; keywords are those of ``CifarResNet``."""
    return CifarResNet(1202, **kwargs)  # type: ignore[arg-type]
