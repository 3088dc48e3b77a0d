"""Promise 1: a candidate is compared with fp64 at its own site before it is ever used."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from resnet_fast.plan.candidate import Candidate, ConvArgs, run_aten
from resnet_fast.plan.site import DTYPES, Site
from resnet_fast.testing.budget import Verdict, error, within_budget

# Two images: enough to show a wrong batch stride, and half the cost of anything larger.
_BATCH = 2


def random_inputs(
    site: Site, device: torch.device | str, batch: int = _BATCH
) -> tuple[Tensor, ConvArgs, Tensor | None]:
    """Inputs for ``site`` with randomised batch-norm statistics, the same at every call."""
    generator = torch.Generator().manual_seed(zlib.crc32(site.key.encode()))
    dtype = DTYPES[site.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    channels = site.weight_shape[0]
    fan_in = max(1, math.prod(site.weight_shape[1:]))
    x = normal(batch, *site.x_shape[1:]).to(device, dtype)
    residual = None
    if site.residual:
        residual = normal(batch, *site.out_shape[1:]).to(device, dtype)
    if site.layout == "channels_last":
        layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        x = x.contiguous(memory_format=layout)
        residual = None if residual is None else residual.contiguous(memory_format=layout)

    def parameter(t: Tensor) -> Tensor:
        return t.to(device, dtype)

    weight = parameter(normal(*site.weight_shape) / fan_in**0.5)
    gamma = beta = mean = var = bias = None
    if site.affine:
        gamma = parameter(uniform(0.5, 1.5, channels))
        beta = parameter(normal(channels))
        mean = parameter(normal(channels))
        var = parameter(uniform(0.5, 2.0, channels))
    else:
        bias = parameter(normal(channels))
    geometry = (list(site.stride), list(site.padding), list(site.dilation), site.groups)
    return x, ConvArgs(weight, bias, gamma, beta, mean, var, 1e-5, *geometry), residual


def _other_layout(x: Tensor, args: ConvArgs, residual: Tensor | None, site: Site) -> Tensor:
    """The framework's own result in the memory format that ``site`` does not have."""
    layout = torch.contiguous_format
    if site.layout == "contiguous" and x.dim() > 3:
        layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    other = None if residual is None else residual.contiguous(memory_format=layout)
    return run_aten(x.contiguous(memory_format=layout), args, other, site.act)


def _worse(a: Tensor, b: Tensor, truth: Tensor) -> Tensor:
    """Of two results of the framework's own op, the one with the greater error.

    The framework sums in another order in either memory format, and calls both right; its error in
    one of them alone, a maximum over few values, is too noisy a standard for fp32.
    """
    return a if error(a, truth) >= error(b, truth) else b


def verify(site: Site, candidate: Candidate, device: torch.device | str) -> Verdict:
    """Compare ``candidate`` with fp64 at ``site``.

    Returns:
        The verdict: ``error`` and ``limit`` in the output's units, and whether it holds. A
        candidate that raises is a mismatch with an infinite error, never a crash of the caller.
    """
    with torch.inference_mode(False), torch.no_grad():
        x, args, residual = random_inputs(site, device)
        wide = ConvArgs._make(t.double() if isinstance(t, Tensor) else t for t in args)
        truth = run_aten(
            x.double(), wide, None if residual is None else residual.double(), site.act
        )
        framework = run_aten(x, args, residual, site.act)
        try:
            ours = candidate.run(x, args, residual, site.act)
        except (RuntimeError, ValueError, TypeError):
            return Verdict(False, float("inf"), 0.0)
        if ours.shape != framework.shape or ours.dtype != framework.dtype:
            return Verdict(False, float("inf"), 0.0)
        standard = _worse(framework, _other_layout(x, args, residual, site), truth)
        return within_budget(ours, standard, truth)
