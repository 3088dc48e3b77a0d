"""The place of ``stem_pool`` in a network: its verification and its operands."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fast import ops
from resnet_fast.ops import _pack, _several, stem_pool_cuda
from resnet_fast.plan.candidate import ConvArgs, run_aten
from resnet_fast.plan.site import Site
from resnet_fast.plan.verify import comparing, in_fp64, random_inputs
from resnet_fast.testing.budget import Verdict, in_formats, within_budget

#: The op's name in plans and in ``explain()``, and that of its Triton kernel.
NAME = "stem_pool"
#: That of the CUDA library's kernel.
NATIVE = "stem_pool_cuda"


def key_of(site: Site) -> str:
    """Identity of the stem without the batch: that of its convolution, which is all that varies."""
    return f"{NAME}|{site.key}"


def operands(args: ConvArgs) -> tuple[Tensor | None, ...]:
    """Weight, scale and shift as the op has them."""
    return (args.weight.detach(), *_pack.fold(*args[1:7]))


def kernels(x: Tensor) -> tuple[str, ...]:
    """Names of the kernels that may run a stem of ``x`` on CUDA, its weight being of that dtype."""
    found = (NAME,) if ops.module(NAME).runs(x) else ()
    return (*found, NATIVE) if stem_pool_cuda.runs(x, x) else found


def run_stem(
    x: Tensor, operands: tuple[Tensor | None, ...], act: str, kernel: str = NAME
) -> Tensor:
    """The stem by its op, or by the registration of the kernel that is named."""
    if kernel == NATIVE:
        return torch.ops.resnet_fast._stem_pool_cuda(x, *operands, None, None, act)
    return torch.ops.resnet_fast.stem_pool(x, *operands, None, None, act)


def prepare_stem(
    x: Tensor, operands: tuple[Tensor | None, ...], act: str, kernel: str = NAME
) -> Callable[[Tensor], Tensor]:
    """:func:`run_stem` for images like ``x``."""
    if kernel == NATIVE:
        op = torch.ops.resnet_fast._stem_pool_cuda.default
        return lambda x: op(x, *operands, None, None, act)
    return _several.prepare(NAME, x, *operands, None, None, act)


def run_layers(x: Tensor, args: ConvArgs, act: str) -> Tensor:
    """The stem by the framework's own ops: what it is compared with."""
    return F.max_pool2d(run_aten(x, args, None, act), 3, 2, 1)


def verify_stem(site: Site, device: torch.device, kernel: str = NAME) -> Verdict:
    """Compare the stem with fp64 on two random images. One that raises is a mismatch."""
    with comparing():
        x, args, _ = random_inputs(site, device)
        truth = run_layers(x.double(), in_fp64(args), site.act)
        given = in_formats(lambda a: run_layers(a, args, site.act), x)
        try:
            ours = run_stem(x, operands(args), site.act, kernel)
        except (RuntimeError, ValueError, TypeError):
            return Verdict(False, math.inf, 0.0)
        return within_budget(ours, given, truth)
