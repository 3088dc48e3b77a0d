"""Promise 1: a candidate is compared with fp64 at its own site before it is ever used."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from resnet_fast.plan.candidate import Candidate, ConvArgs, run_aten
from resnet_fast.plan.site import DTYPES, Site
from resnet_fast.testing.budget import Verdict, in_formats, within_budget

# Two images: enough to show a wrong batch stride, and half the cost of anything larger.
_BATCH = 2
# Where the framework's algorithm is another than at two images, its sums differ in kind from the
# candidate's. One draw of so few values then says little: at 128x8x8 two candidates of three whose
# error is beyond the limit on most inputs pass a single draw. Each of several has to hold.
_DRAWS = 4


def random_inputs(
    site: Site, device: torch.device | str, batch: int = _BATCH, draw: int = 0
) -> tuple[Tensor, ConvArgs, Tensor | None]:
    """Inputs for ``site`` with randomised batch-norm statistics, the same at every call."""
    generator = torch.Generator().manual_seed(zlib.crc32(site.key.encode()) + draw)
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


def framework_path(site: Site, device: torch.device | str, batch: int) -> str:
    """The algorithm that the framework picks for the site's convolution at ``batch`` images."""
    dtype = DTYPES[site.dtype]
    layout = torch.contiguous_format
    if site.layout == "channels_last":
        layout = torch.channels_last if len(site.x_shape) == 4 else torch.channels_last_3d
    x = torch.empty(batch, *site.x_shape[1:], dtype=dtype, device=device, memory_format=layout)
    weight = torch.empty(site.weight_shape, dtype=dtype, device=device)
    geometry = (list(site.stride), list(site.padding), list(site.dilation))
    unpadded = [0] * len(site.stride)
    chosen = torch._C._select_conv_backend(
        x, weight, None, *geometry, False, unpadded, site.groups, None
    )
    return str(chosen).rpartition(".")[2]


def framework_batch(site: Site, device: torch.device | str) -> tuple[str, int]:
    """The framework's algorithm at the batch that runs, and the images to verify it with.

    Few images, on which the framework runs the same algorithm: what a candidate replaces at one
    image may be another than at two (see :mod:`resnet_fast.testing.budget`).
    """
    running = max(1, site.x_shape[0])
    path = framework_path(site, device, running)
    few = (n for n in (_BATCH, 1, 16) if framework_path(site, device, n) == path)
    return path, next(few, running)


def batch_for(site: Site, candidate: Candidate, device: torch.device | str) -> int:
    """The images to verify ``candidate`` with: few, on which the same kernel runs as at the site.

    A candidate that picks a kernel by the batch is asked which, from few images to all of them.
    """
    path, batch = framework_batch(site, device)
    if candidate.variant is None:
        return batch
    wanted, running = candidate.variant(site), max(1, site.x_shape[0])
    while batch < running:
        at = dataclasses.replace(site, x_shape=(batch, *site.x_shape[1:]))
        if candidate.variant(at) == wanted and framework_path(site, device, batch) == path:
            break
        batch *= 2
    return min(batch, running)


@contextlib.contextmanager
def comparing() -> Iterator[None]:
    """Records no gradients, and lets cuDNN choose without measuring.

    With ``torch.backends.cudnn.benchmark`` it would try every algorithm for shapes and for an fp64
    that run once.
    """
    searched = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.backends.cudnn.benchmark = searched


def verify(site: Site, candidate: Candidate, device: torch.device | str) -> Verdict:
    """Compare ``candidate`` with fp64 at ``site``.

    Returns:
        The verdict: ``error`` and ``limit`` in the output's units, and whether it holds. A
        candidate that raises is a mismatch with an infinite error, never a crash of the caller.
    """
    with comparing():
        batch = batch_for(site, candidate, device)
        verdicts = []
        draws = 1 if framework_batch(site, device)[1] == _BATCH else _DRAWS
        for draw in range(draws):
            x, args, residual = random_inputs(site, device, batch, draw)
            verdicts.append(_compare(site, candidate, x, args, residual))
            if not verdicts[-1].ok:
                return verdicts[-1]
        return max(verdicts, key=lambda verdict: verdict.error / (verdict.limit or 1.0))


def in_fp64(args: ConvArgs) -> ConvArgs:
    """The same numbers, in fp64."""
    return ConvArgs._make(t.double() if isinstance(t, Tensor) else t for t in args)


def _compare(
    site: Site, candidate: Candidate, x: Tensor, args: ConvArgs, residual: Tensor | None
) -> Verdict:
    truth = run_aten(
        x.double(), in_fp64(args), None if residual is None else residual.double(), site.act
    )
    frameworks = in_formats(lambda a, b: run_aten(a, args, b, site.act), x, residual)
    try:
        ours = candidate.run(x, args, residual, site.act)
    except (RuntimeError, ValueError, TypeError):
        return Verdict(False, float("inf"), 0.0)
    if ours.shape != truth.shape or ours.dtype != x.dtype:
        return Verdict(False, float("inf"), 0.0)
    return within_budget(ours, frameworks, truth)
