"""Random but well-conditioned networks: default BN statistics would hide folding bugs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# The last norm of a block, by its name in the block: the one that has the shortcut added.
_LAST = ("bn3", "bn2")


@torch.no_grad()
def randomize_batchnorm_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws mean, variance, weight and bias of every batch norm of ``model``, in place.

    mean ~ N(0, 0.1), variance ~ U(0.5, 1.5), weight ~ U(0.5, 1.5), bias ~ N(0, 0.1); the last
    weight of each residual block ~ U(0.1, 0.3), so that activations stay finite in fp16 through
    152 layers of shortcuts. Drawn in fp32 on the CPU: one seed gives one network on every device.
    Returns ``model``.
    """
    generator = torch.Generator().manual_seed(seed)
    last = set()
    for block in model.modules():
        for name in _LAST:
            norm = getattr(block, name, None)
            if isinstance(norm, _BatchNorm):
                last.add(id(norm))
                break

    def uniform(n: int, low: float, high: float) -> torch.Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    for norm in model.modules():
        if not isinstance(norm, _BatchNorm):
            continue
        n = norm.num_features
        mean, bias = torch.randn(2, n, generator=generator) * 0.1
        variance = uniform(n, 0.5, 1.5)
        weight = uniform(n, 0.1, 0.3) if id(norm) in last else uniform(n, 0.5, 1.5)
        for target, value in (
            (norm.running_mean, mean),
            (norm.running_var, variance),
            (norm.weight, weight),
            (norm.bias, bias),
        ):
            if target is not None:
                target.copy_(value)
    return model
