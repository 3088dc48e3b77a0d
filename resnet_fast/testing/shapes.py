"""The convolutions of ResNet-family networks, as sites: geometry and how often each occurs.

A walk over the architecture (He et al. 2015, table 1, with the stride in the 3×3 convolution as
torchvision has it), without building a network.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class ConvSite:
    """One convolution at one input size: weight [k, c / groups, r, r] over an h × h image."""

    c: int
    k: int
    r: int
    stride: int
    groups: int
    h: int
    act: str
    residual: bool

    @property
    def padding(self) -> int:
        return self.r // 2

    @property
    def p(self) -> int:
        """Rows, and columns, of the output."""
        return (self.h + 2 * self.padding - self.r) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-adds an image."""
        return self.p * self.p * self.k * (self.c // self.groups) * self.r * self.r

    @property
    def elements(self) -> int:
        """Activations read and written an image: input, residual and output."""
        return self.h * self.h * self.c + (2 if self.residual else 1) * self.p * self.p * self.k


@dataclass(frozen=True)
class Architecture:
    """What tells the networks apart."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool = True
    groups: int = 1
    width_per_group: int = 64


NETWORKS: dict[str, Architecture] = {
    "resnet18": Architecture((2, 2, 2, 2), bottleneck=False),
    "resnet34": Architecture((3, 4, 6, 3), bottleneck=False),
    "resnet50": Architecture((3, 4, 6, 3)),
    "resnet101": Architecture((3, 4, 23, 3)),
    "resnet152": Architecture((3, 8, 36, 3)),
    "resnext50_32x4d": Architecture((3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": Architecture((3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": Architecture((3, 4, 23, 3), groups=64, width_per_group=4),
    "wide_resnet50_2": Architecture((3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": Architecture((3, 4, 23, 3), width_per_group=128),
}


def walk(network: str, image: int = 224) -> list[ConvSite]:
    """Every convolution of ``network``, in an order in which they can run."""
    architecture = NETWORKS[network]
    sites: list[ConvSite] = []

    def conv(
        c: int,
        k: int,
        r: int,
        h: int,
        stride: int = 1,
        groups: int = 1,
        act: str = "relu",
        residual: bool = False,
    ) -> int:
        site = ConvSite(c, k, r, stride, groups, h, act, residual)
        sites.append(site)
        return site.p

    size = conv(3, 64, 7, image, 2)
    size = (size + 2 - 3) // 2 + 1
    channels = 64
    for stage, count in enumerate(architecture.blocks):
        planes = 64 << stage
        outputs = planes * (4 if architecture.bottleneck else 1)
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            before = size
            if architecture.bottleneck:
                width = planes * architecture.width_per_group // 64 * architecture.groups
                conv(channels, width, 1, before)
                size = conv(width, width, 3, before, stride, architecture.groups)
            else:
                size = conv(channels, planes, 3, before, stride)
            if stride != 1 or channels != outputs:
                conv(channels, outputs, 1, before, stride, act="none")
            if architecture.bottleneck:
                conv(width, outputs, 1, size, residual=True)
            else:
                conv(planes, outputs, 3, size, residual=True)
            channels = outputs
    return sites


def conv_sites(network: str, image: int = 224) -> dict[ConvSite, int]:
    """The distinct convolutions of ``network``, in the order of first use, each with its count."""
    return dict(Counter(walk(network, image)))


def macs(network: str, image: int = 224) -> int:
    """Multiply-adds of all convolutions and the classifier of ``network`` for one image."""
    architecture = NETWORKS[network]
    features = 512 * (4 if architecture.bottleneck else 1)
    return sum(site.macs for site in walk(network, image)) + features * 1000
