"""A residual chain's place in a network: its sites, its verification, its operands."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast.ops import _pack
from resnet_fast.plan.candidate import ConvArgs, run_aten
from resnet_fast.plan.site import Site
from resnet_fast.plan.verify import comparing, in_fp64, random_inputs
from resnet_fast.testing.budget import Verdict, in_formats, within_budget

#: The kernel's name in plans and in ``explain()``.
NAME = "residual_chain"

# Which layers a chain takes in by default, from the bytes that each form moves in ResNet-50, fp16,
# and what the kernel's tiles can hold (kernels/chain_tiles.py).
#
# conv2 joins up to 128 channels. At 256 a program's 64 pixels read 1.2 MB of its weights from the
# second-level cache to save 66 KB of memory; a kernel of its own has larger tiles.
MAX_CONV2 = 128
# The next convolution joins up to 256 channels. The accumulator of 512 takes every register there
# is, and spills on sm_80 and sm_100.
MAX_NEXT = 256


class ChainArgs(NamedTuple):
    """The parameters of a chain's convolutions and norms, None for a convolution it has not."""

    conv2: ConvArgs | None
    conv3: ConvArgs | None
    down: ConvArgs | None
    following: ConvArgs | None

    def operands(self) -> list[Tensor | None]:
        """Weights with their channels innermost, and fp32 scales and shifts, as the op has them."""
        found: list[Tensor | None] = []
        for args in self:
            if args is None:
                found += [None, None, None]
            else:
                weight = args.weight.detach().contiguous(memory_format=torch.channels_last)
                found += [weight, *_pack.fold(*args[1:7])]
        return found


@dataclass(frozen=True)
class ChainSite:
    """The sites of a chain's convolutions, by their roles; None where it has no such."""

    conv2: Site | None
    conv3: Site | None
    down: Site | None
    following: Site | None

    @property
    def sites(self) -> list[Site]:
        """Those that are there, in the order of their roles."""
        return [site for site in (getattr(self, f.name) for f in fields(self)) if site is not None]

    @property
    def key(self) -> str:
        """Identity without the batch."""
        roles = "+".join(f.name for f in fields(self) if getattr(self, f.name) is not None)
        return "|".join((NAME, roles, *(site.key for site in self.sites)))

    @property
    def batch(self) -> int:
        """The images to verify it with, so that the kernel splits its work as at the place's batch.

        Slices of the output that no next convolution ties together are dealt out by their number.
        """
        dealt = self.conv3 is not None and self.following is None
        return max(1, self.sites[0].x_shape[0]) if dealt else 2

    @property
    def strides(self) -> tuple[int, int]:
        """Strides of the 3x3 convolution and of the projection."""
        return tuple(1 if s is None else s.stride[0] for s in (self.conv2, self.down))  # type: ignore[return-value]


def run_layers(
    x: Tensor, residual: Tensor, args: ChainArgs, act: str
) -> tuple[Tensor, Tensor | None]:
    """The chain by the framework's own ops: what it is compared with."""
    if args.down is not None:
        residual = run_aten(residual, args.down, None, "none")
    if args.conv3 is None:
        assert args.conv2 is not None
        return run_aten(x, args.conv2, residual, act), None
    if args.conv2 is not None:
        x = run_aten(x, args.conv2, None, act)
    y = run_aten(x, args.conv3, residual, act)
    return y, None if args.following is None else run_aten(y, args.following, None, act)


def run_chain(
    x: Tensor, residual: Tensor, operands: list[Tensor | None], strides: tuple[int, int], act: str
) -> tuple[Tensor, Tensor | None]:
    """The chain by its op."""
    y, h = torch.ops.resnet_fast.residual_chain(x, residual, *operands, *strides, act)
    return y, h if operands[9] is not None else None


def verify_chain(site: ChainSite, device: torch.device, act: str = "relu") -> Verdict:
    """Compare the chain with fp64 on random numbers.

    Returns:
        The verdict of whichever result is nearer to its limit. A chain that raises is a mismatch.
    """
    first = next(s for s in (site.conv2, site.conv3) if s is not None)
    shortcut = site.down or site.conv3 or site.conv2
    assert shortcut is not None
    with comparing():
        drawn = [None if s is None else random_inputs(s, device, 1) for s in _roles(site)]
        args = ChainArgs(*(None if d is None else d[1] for d in drawn))
        x = random_inputs(first, device, site.batch)[0]
        # Of another seed than x, whose site may be the same.
        inputs = random_inputs(shortcut, device, site.batch, draw=1)
        residual = inputs[0] if site.down is not None else inputs[2]
        assert residual is not None
        wide = ChainArgs(*(None if a is None else in_fp64(a) for a in args))
        truth = run_layers(x.double(), residual.double(), wide, act)
        given = in_formats(lambda a, b: run_layers(a, b, args, act), x, residual)
        try:
            ours = run_chain(x, residual, args.operands(), site.strides, act)
        except (RuntimeError, ValueError, TypeError):
            return Verdict(False, math.inf, 0.0)
        verdicts = [
            within_budget(mine, [g[i] for g in given], exact)  # type: ignore[misc]
            for i, (mine, exact) in enumerate(zip(ours, truth, strict=True))
            if mine is not None and exact is not None
        ]
    return max(verdicts, key=lambda v: math.inf if not v.ok else v.error / (v.limit or 1.0))


def _roles(site: ChainSite) -> list[Site | None]:
    return [getattr(site, f.name) for f in fields(site)]
