"""The ImageNet residual networks, drop-in for ``torchvision.models``.

Signatures, attribute names, ``state_dict`` keys and, under one seed, initial weights are
torchvision's. He et al. 2015 (arXiv:1512.03385), Xie et al. 2016 (arXiv:1611.05431), Zagoruyko
and Komodakis 2016 (arXiv:1605.07146).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.errors import ArgumentError
from resnet_fast.models import weights as _weights
from resnet_fast.nn.blocks import (
    BasicBlock,
    Bottleneck,
    NormLayer,
    SiteReLU,
    check_images,
    conv1x1,
    conv_bn_relu,
    stem_site,
    to_planned_layout,
)
from resnet_fast.nn.chain import Chains
from resnet_fast.nn.chain import may_run as may_chain
from resnet_fast.nn.sequence import Sequenced, max_pool, plain


@plain
class ResNet(Sequenced):
    """Table 1 of He et al. 2015. ``(N, 3, H, W)`` images to ``(N, num_classes)`` logits.

    Raises ``ArgumentError`` for arguments that torchvision's ``ResNet`` refuses.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        self.chains = Chains()
        norm_layer = norm_layer or nn.BatchNorm2d
        dilate = replace_stride_with_dilation
        if dilate is None:
            dilate = (False, False, False)
        elif not isinstance(dilate, Sequence) or len(dilate) != 3:
            raise ArgumentError(
                "replace_stride_with_dilation", "None or a 3-element tuple", repr(dilate)
            )
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ArgumentError("num_classes", "a non-negative int", repr(num_classes))
        if not isinstance(groups, int) or groups < 1:
            raise ArgumentError("groups", "a positive int", repr(groups))
        self._norm_layer = norm_layer
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(self.inplanes)
        self.relu = SiteReLU("conv1")
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) and m.weight is not None:
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
        if not zero_init_residual:
            return
        # Blocks start as the identity (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        for m in self.modules():
            if isinstance(m, Bottleneck) and m.bn3.weight is not None:
                nn.init.constant_(m.bn3.weight, 0)  # type: ignore[arg-type]
            elif isinstance(m, BasicBlock) and m.bn2.weight is not None:
                nn.init.constant_(m.bn2.weight, 0)  # type: ignore[arg-type]

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        norm_layer = self._norm_layer
        out_planes = planes * block.expansion
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        downsample = None
        if stride != 1 or self.inplanes != out_planes:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, out_planes, stride), norm_layer(out_planes)
            )
        shape = (self.groups, self.base_width)
        layers: list[nn.Module] = [
            block(self.inplanes, planes, stride, downsample, *shape, first_dilation, norm_layer)
        ]
        self.inplanes = out_planes
        for _ in range(1, blocks):
            layers.append(block(out_planes, planes, 1, None, *shape, self.dilation, norm_layer))
        return nn.Sequential(*layers)

    def _trunk(self, x: Tensor) -> Tensor:
        check_images(x, self.conv1)
        site = stem_site(self.relu)
        x = to_planned_layout(x, self, site, self.bn1)
        if not torch.compiler.is_compiling() and self.chains is not None and may_chain(x):
            x = self.chains.stems.forward(x, self.conv1, self.bn1, self.relu, self.maxpool)
            stages = ("layer1", "layer2", "layer3", "layer4")
            return self.chains.forward([getattr(self, stage) for stage in stages], stages, x)
        x = conv_bn_relu(site, x, self.conv1, self.bn1, self.relu)
        x = max_pool(self.maxpool, x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.layer4(x)


def _build(
    name: str,
    block: type[BasicBlock | Bottleneck],
    layers: Sequence[int],
    weights: Any,
    progress: bool,
    kwargs: dict[str, Any],
    **fixed: int,
) -> ResNet:
    for argument, value in fixed.items():
        if kwargs.setdefault(argument, value) != value:
            raise ArgumentError(argument, f"{value} in {name}", kwargs[argument])
    if "pretrained" in kwargs:
        # torchvision's argument before 0.13, which it still takes.
        old = kwargs.pop("pretrained")
        warnings.warn(f"pretrained={old!r}: use weights=", FutureWarning, stacklevel=3)
        if not isinstance(old, bool):
            raise ArgumentError("pretrained", "a bool", repr(old))
        if old and weights is not None:
            raise ArgumentError("pretrained", "no weights beside it", repr(weights))
        weights = "IMAGENET1K_V1" if old else weights
    entry = _weights.resolve(name, weights)
    if entry is not None:
        classes = len(entry.meta["categories"])
        if kwargs.setdefault("num_classes", classes) != classes:
            raise ArgumentError(
                "num_classes", f"{classes} with weights {entry}", kwargs["num_classes"]
            )
    model = ResNet(block, layers, **kwargs)
    if entry is not None:
        _weights.load_into(model, entry.get_state_dict(progress=progress, check_hash=True))
    return model


def resnet18(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18 (He et al. 2015, table 1); ``weights`` as ``torchvision.models.resnet18``."""
    return _build("resnet18", BasicBlock, (2, 2, 2, 2), weights, progress, kwargs)


def resnet34(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34 (He et al. 2015, table 1); ``weights`` as ``torchvision.models.resnet34``."""
    return _build("resnet34", BasicBlock, (3, 4, 6, 3), weights, progress, kwargs)


def resnet50(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 (He et al. 2015, table 1); ``weights`` as ``torchvision.models.resnet50``."""
    return _build("resnet50", Bottleneck, (3, 4, 6, 3), weights, progress, kwargs)


def resnet101(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 (He et al. 2015, table 1); ``weights`` as ``torchvision.models.resnet101``."""
    return _build("resnet101", Bottleneck, (3, 4, 23, 3), weights, progress, kwargs)


def resnet152(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 (He et al. 2015, table 1); ``weights`` as ``torchvision.models.resnet152``."""
    return _build("resnet152", Bottleneck, (3, 8, 36, 3), weights, progress, kwargs)


def resnext50_32x4d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50, 32 groups of width 4 (Xie et al. 2016, table 1)."""
    return _build(
        "resnext50_32x4d",
        Bottleneck,
        (3, 4, 6, 3),
        weights,
        progress,
        kwargs,
        groups=32,
        width_per_group=4,
    )


def resnext101_32x8d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 32 groups of width 8 (Xie et al. 2016)."""
    return _build(
        "resnext101_32x8d",
        Bottleneck,
        (3, 4, 23, 3),
        weights,
        progress,
        kwargs,
        groups=32,
        width_per_group=8,
    )


def resnext101_64x4d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 64 groups of width 4 (Xie et al. 2016)."""
    return _build(
        "resnext101_64x4d",
        Bottleneck,
        (3, 4, 23, 3),
        weights,
        progress,
        kwargs,
        groups=64,
        width_per_group=4,
    )


def wide_resnet50_2(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 with 3x3 convolutions twice as wide (Zagoruyko and Komodakis 2016)."""
    return _build(
        "wide_resnet50_2",
        Bottleneck,
        (3, 4, 6, 3),
        weights,
        progress,
        kwargs,
        width_per_group=128,
    )


def wide_resnet101_2(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 with 3x3 convolutions twice as wide (Zagoruyko and Komodakis 2016)."""
    return _build(
        "wide_resnet101_2",
        Bottleneck,
        (3, 4, 23, 3),
        weights,
        progress,
        kwargs,
        width_per_group=128,
    )
