"""Sites and residual blocks: parameters, and one call to one op."""

from resnet_fast.nn.blocks import BasicBlock, Bottleneck, PlainBlock, PlainSite, unfuse_
from resnet_fast.nn.site import FusedSite

__all__ = ["BasicBlock", "Bottleneck", "FusedSite", "PlainBlock", "PlainSite", "unfuse_"]
