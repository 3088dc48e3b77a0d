"""Calls whose result does not depend on how their input lies in memory.

Everything else in a program is handed the layout that the model would have had without sites.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fast.fuse.capture import is_hooked
from resnet_fast.fuse.match import is_inplace_function

_LAYOUT_FREE_FUNCTIONS = {
    operator.add,
    operator.iadd,
    operator.mul,
    operator.imul,
    operator.sub,
    operator.truediv,
    getattr,
    torch.add,
    torch.cat,
    torch.concat,
    torch.concatenate,
    torch.flatten,
    torch.mean,
    torch.mul,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
    F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
    F.avg_pool2d,
    F.dropout,
    F.hardswish,
    F.interpolate,
    F.max_pool2d,
    F.relu,
    F.relu6,
    F.silu,
}
_LAYOUT_FREE_METHODS = {
    "add",
    "add_",
    "dim",
    "flatten",
    "mean",
    "mul",
    "mul_",
    "relu",
    "relu_",
    "size",
}


def is_layout_free(kind: str, node: fx.Node, root: nn.Module) -> bool:
    """Whether a call gives the same values for its input in either memory format."""
    if kind == "function":
        return node.target in _LAYOUT_FREE_FUNCTIONS or is_inplace_function(node.target)
    if kind == "method":
        # What is written in place must be the value itself, never a copy in another layout.
        return node.target in _LAYOUT_FREE_METHODS or str(node.target).endswith("_")
    if kind != "module":
        return False
    module = root.get_submodule(str(node.target))
    return (
        type(module).__module__.startswith("torch.nn.modules")
        and not isinstance(module, nn.Unflatten)
        and not is_hooked(module)
    )
