"""Modules whose derived values are kept: which may be, and how a change of them is seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import _library
from resnet_fast.nn.prepared import Prepared
from resnet_fast.nn.sequence import Structure
from resnet_fast.nn.site import FusedSite

_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


def guard_of(*roots: nn.Module, parents: Iterable[nn.Module] = ()) -> Any:
    """A guard of all that the convolutions and norms below ``roots`` depend on in ``eval()``.

    ``parents`` are modules whose children have to stay.
    """
    native = _library.native()
    assert native is not None
    guard = native.Guard()
    structure = Structure.below(*roots)
    structure.watch(guard)
    for parent in parents:
        if parent._modules:
            guard.items(parent._modules)
    for module in structure.modules:
        if isinstance(module, nn.BatchNorm2d):
            guard.same(module.__dict__, "training", False)
            guard.same(module.__dict__, "eps", module.__dict__["eps"])
        if isinstance(module, nn.Conv2d):
            for name in _GEOMETRY:
                guard.same(module.__dict__, name, module.__dict__[name])
        for where in (module._parameters, module._buffers):
            for name, tensor in where.items():
                guard.same(where, name, tensor)
                if tensor is not None and name != "num_batches_tracked":
                    guard.tensor(tensor)
    return guard


def is_regular(conv: Any, norm: Any) -> bool:
    """Whether the two are torch's convolution and batch norm, in eval, with tensors to watch."""
    if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or norm.training:
        return False
    if norm.running_mean is None or norm.running_var is None:
        return False
    if conv.weight.dtype is not norm.running_mean.dtype:
        return False
    args = FusedSite.args(conv, norm)
    # Not computed at each look, nor without a version to compare.
    return Prepared.held(conv, norm, args.tensors) and not any(
        t is not None and t.is_inference() for t in args.tensors
    )


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be timed."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
