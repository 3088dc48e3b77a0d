"""Random geometries: how many a test draws, and values that no order of summation rounds."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from resnet_fast.ops import activation
from resnet_fast.plan.candidate import CANDIDATES, ConvArgs, run_aten
from resnet_fast.plan.site import Site
from resnet_fast.plan.verify import random_inputs
from resnet_fast.testing.budget import expect_within_budget


def random_geometries(draws: int, repeatable: bool = False) -> settings:
    """``draws`` geometries, or RESNET_FAST_EXAMPLES; ``repeatable``: the same in each run."""
    return settings(
        max_examples=int(os.environ.get("RESNET_FAST_EXAMPLES", draws)),
        deadline=None,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
        derandomize=repeatable,
        # Only what is drawn anew has failures to remember.
        **({"database": None} if repeatable else {}),
    )


def wide(args: ConvArgs) -> ConvArgs:
    """The same in fp64."""
    return args._make(t.double() if isinstance(t, Tensor) else t for t in args)


def check_in_integers(name: str, site: Site) -> None:
    """The candidate on whole numbers: every partial sum is exact, and what remains is the
    activation's own rounding."""
    generator = torch.Generator().manual_seed(0)
    x, args, residual = random_inputs(site, "cpu", site.x_shape[0])
    for t in (x, *args.tensors, residual):
        if t is not None:
            t.copy_(torch.randint(-3, 4, t.shape, generator=generator))
    if args.var is not None:
        # Scales are halves.
        args = args._replace(var=args.var.fill_(4), eps=0.0)
    # Not in fp32, where torch crashes if a block of columns is padding alone (pytorch #195394).
    z = run_aten(x.double(), wide(args), None if residual is None else residual.double(), "none")
    ours = CANDIDATES[name].run(x, args, residual, site.act)
    framework = activation.value(site.act, z.float())
    expect_within_budget(ours, framework, activation.value(site.act, z))
