"""Residual blocks of He et al. 2015 (arXiv:1512.03385): parameters, and one site a convolution.

Attribute names, construction order and therefore ``state_dict`` keys and seeded initialisation
are torchvision's. The sites hold no parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as _nn_module

from resnet_fast.errors import ArgumentError, DTypeError
from resnet_fast.nn.prepared import is_autocasting
from resnet_fast.nn.sequence import Sequenced, plain
from resnet_fast.nn.site import FusedSite
from resnet_fast.nn.training import BlockTraining

NormLayer = Callable[..., nn.Module]

# fp64 stays as given: it is the reference's dtype and no planned candidate prefers a layout there.
_PLANNED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PlainSite(nn.Module):
    """``act(bn(conv(x)) + residual)`` by plain module calls: the reference of ``FusedSite``."""

    def __init__(self, act: str = "relu", name: str = "") -> None:
        super().__init__()
        if act not in ("none", "relu"):
            raise ArgumentError("act", "'none' or 'relu'", repr(act))
        self.act = act
        self.name = name

    def forward(
        self, x: Tensor, conv: nn.Module, bn: nn.Module | None, residual: Tensor | None = None
    ) -> Tensor:
        y = conv(x)
        if bn is not None:
            y = bn(y)
        if residual is not None:
            y = y + residual
        return F.relu(y) if self.act == "relu" else y

    def extra_repr(self) -> str:
        return f"act={self.act!r}"


@plain
class SiteReLU(nn.ReLU):
    """A ReLU that carries the site of the convolution before it.

    The stem's site hangs here and not on the network, so that ``children()`` of a network stays
    torchvision's: ``nn.Sequential(*list(net.children())[:-1])`` and torchvision's
    ``IntermediateLayerGetter`` go by it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(inplace=True)
        self.site = FusedSite("relu", name)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` runs more than its ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _nn_module._global_forward_hooks
        or _nn_module._global_forward_pre_hooks
        or _nn_module._global_backward_hooks
        or _nn_module._global_backward_pre_hooks
    )


def stem_site(relu: nn.Module) -> nn.Module | None:
    """The site that ``relu`` carries; None once the user has put another activation there."""
    return relu.site if isinstance(relu, SiteReLU) else None


def conv_bn_relu(
    site: nn.Module | None,
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module,
    relu: nn.Module,
    residual: Tensor | None = None,
) -> Tensor:
    """``relu(bn(conv(x)) + residual)`` at ``site``.

    Module by module where ``relu`` was replaced or is hooked, and under ``torch.fx`` tracing,
    which must see convolutions and norms rather than a choice made from a tensor's properties.
    """
    if site is None or isinstance(x, fx.Proxy):
        reason = None
    elif type(relu) not in (nn.ReLU, SiteReLU) or "forward" in relu.__dict__:
        reason = "REPLACED"
    elif is_hooked(relu):
        reason = "HOOKED"
    else:
        return site(x, conv, bn, residual)
    _skip(site, reason)
    y = bn(conv(x))
    return relu(y if residual is None else y + residual)


def _skip(site: nn.Module | None, reason: str | None) -> None:
    """Note at ``site`` why its modules run one by one."""
    if isinstance(site, FusedSite) and reason is not None:
        site.skipped(reason)


def shortcut(site: nn.Module | None, x: Tensor, downsample: nn.Module | None) -> Tensor:
    """The residual branch: identity, a projection ``Sequential(conv, norm)`` at ``site``, or a
    module of its own."""
    if downsample is None:
        return x
    if site is None or isinstance(x, fx.Proxy):
        reason = None
    elif (
        type(downsample) is not nn.Sequential
        or len(downsample) != 2
        or "forward" in downsample.__dict__
    ):
        reason = "REPLACED"
    elif is_hooked(downsample):
        reason = "HOOKED"
    else:
        return site(x, downsample[0], downsample[1])
    _skip(site, reason)
    return downsample(x)


def check_images(x: Tensor, conv: nn.Module) -> None:
    """Raise a typed error for an input that the stem's convolution cannot take.

    A convolution that is no plain one has the say itself.
    """
    if isinstance(x, fx.Proxy) or not isinstance(conv, nn.Conv2d):
        return
    if not isinstance(x, Tensor):
        raise ArgumentError("x", "a tensor of shape [N, C, H, W]", type(x).__name__)
    if x.dim() != 4 or x.shape[1] != conv.in_channels:
        raise ArgumentError("x", f"shape [N, {conv.in_channels}, H, W]", f"{list(x.shape)}")
    weight = conv.weight
    if x.device != weight.device:
        raise ArgumentError("x", f"a tensor on {weight.device}, as the network", f"{x.device}")
    if x.dtype is not weight.dtype and not is_autocasting(x.device):
        raise DTypeError("x", f"{weight.dtype}, as the network's parameters", f"{x.dtype}")


def to_planned_layout(
    x: Tensor, network: nn.Module, site: nn.Module | None, bn: nn.Module
) -> Tensor:
    """``x`` in channels-last, once for the whole network, where the plan's candidates want it.

    In eval, for 4-D floating input and a batch-normalised network with fused sites. In training
    the user's layout is kept, so that gradients and saved tensors have the layout asked for.
    """
    if (
        network.training
        or not isinstance(site, FusedSite)
        or not isinstance(bn, nn.BatchNorm2d)
        or isinstance(x, fx.Proxy)
        or x.dim() != 4
        or x.dtype not in _PLANNED_DTYPES
    ):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def conv3x3(
    in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """3x3 convolution, padded to keep the size at stride 1."""
    return nn.Conv2d(
        in_planes,
        out_planes,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        groups=groups,
        bias=False,
        dilation=dilation,
    )


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution."""
    return nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False)


@plain
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 5 left)."""

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1:
            raise ArgumentError("groups", "1 in a BasicBlock", groups)
        if base_width != 64:
            raise ArgumentError("width_per_group", "64 in a BasicBlock", base_width)
        if dilation > 1:
            raise ArgumentError("dilation", "1 in a BasicBlock", dilation)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride
        self.site1 = FusedSite("relu", "conv1")
        self.site2 = FusedSite("relu", "conv2")
        self.site_downsample = _shortcut_site(downsample)
        self.trained = BlockTraining()

    def forward(self, x: Tensor) -> Tensor:
        y = self.trained.forward(self, x) if self.training and type(self) is BasicBlock else None
        return self.finish(x, self.start(x)) if y is None else y

    def start(self, x: Tensor) -> Tensor:
        """The first convolution."""
        return conv_bn_relu(self.site1, x, self.conv1, self.bn1, self.relu)

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """What follows the first convolution of ``x``, which gave ``y``."""
        identity = shortcut(self.site_downsample, x, self.downsample)
        return conv_bn_relu(self.site2, y, self.conv2, self.bn2, self.relu, identity)


@plain
class PlainBlock(BasicBlock):
    """The same two convolutions without the shortcut (He et al. 2015, figure 3 middle)."""

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """What follows the first convolution, which gave ``y``."""
        return conv_bn_relu(self.site2, y, self.conv2, self.bn2, self.relu)


@plain
class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (He et al. 2015, figure 5 right).

    The stride is on the 3x3 convolution ("v1.5"), as in torchvision.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.site1 = FusedSite("relu", "conv1")
        self.site2 = FusedSite("relu", "conv2")
        self.site3 = FusedSite("relu", "conv3")
        self.site_downsample = _shortcut_site(downsample)
        self.trained = BlockTraining()

    def forward(self, x: Tensor) -> Tensor:
        y = self.trained.forward(self, x) if self.training and type(self) is Bottleneck else None
        return self.finish(x, self.middle(self.start(x))) if y is None else y

    def start(self, x: Tensor) -> Tensor:
        """The first convolution."""
        return conv_bn_relu(self.site1, x, self.conv1, self.bn1, self.relu)

    def middle(self, y: Tensor) -> Tensor:
        """The second convolution."""
        return conv_bn_relu(self.site2, y, self.conv2, self.bn2, self.relu)

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """The third, of ``y``, and the shortcut of ``x``."""
        identity = shortcut(self.site_downsample, x, self.downsample)
        return conv_bn_relu(self.site3, y, self.conv3, self.bn3, self.relu, identity)


def _shortcut_site(downsample: nn.Module | None) -> FusedSite | None:
    """A site for a projection, ``Sequential(conv, norm)``; nothing else has a convolution here."""
    if type(downsample) is nn.Sequential and len(downsample) == 2:
        return FusedSite("none", "downsample")
    return None


def unfuse_(network: nn.Module) -> nn.Module:
    """Replaces every ``FusedSite`` of ``network`` by a ``PlainSite``, in place; returns it.

    What is left of a network of this package is torch's modules, one after the other.
    """
    for module in list(network.modules()):
        if isinstance(module, Sequenced):
            module.sequences = module.chains = None
        for name, child in list(module.named_children()):
            if isinstance(child, FusedSite):
                setattr(module, name, PlainSite(child.act, child.name))
    return network
