"""A program's 8-bit form, from what its calibration showed: which values are bytes, and how."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from resnet_fast.fuse.calibrate import Observed, linear_path
from resnet_fast.fuse.int8 import Int8
from resnet_fast.fuse.program import Program
from resnet_fast.fuse.steps import Ref, Step
from resnet_fast.ops import conv_bn_act_int8 as int8


def linear_steps(program: Program, modules: list[nn.Module]) -> list[tuple[nn.Module, Step]]:
    """The linear layers that can run on 8 bits, with their steps."""
    found: list[tuple[nn.Module, Step]] = []
    for step in program.steps:
        if step.kind != "module" or len(step.args) != 1 or step.kwargs:
            continue
        module: Any = modules[step.target.container]._modules[step.target.name]
        plain = type(module) is nn.Linear and isinstance(step.args[0], Ref)
        if plain and int8.fits_linear(module.in_features):
            found.append((module, step))
    return found


def same_grid(program: Program, modules: list[nn.Module]) -> dict[int, int]:
    """By slot, the slot whose grid it has: through max pooling and steps that hand values on."""
    same: dict[int, int] = {}
    for step in program.steps:
        ref = step.args[0] if len(step.args) == 1 and isinstance(step.args[0], Ref) else None
        if ref is None:
            continue
        pools = step.kind == "module" and isinstance(
            modules[step.target.container]._modules[step.target.name], nn.MaxPool2d
        )
        if pools or Int8.passes(step, modules):
            same[step.out] = same.get(ref.slot, ref.slot)
    return same


def refusal(conv: Any) -> str | None:
    """Why a convolution stays in fp32 among 8-bit ones, or None."""
    if not isinstance(conv, nn.Conv2d):
        return "8 bits are for two spatial dimensions"
    if conv.weight[0].numel() > int8.MAX_DEPTH:
        return f"more than {int8.MAX_DEPTH} values a filter"
    return None


def quantized(program: Program, modules: list[nn.Module], found: Observed, batches: int) -> Int8:
    """The 8-bit form of ``program``, from what its calibration showed."""
    same = same_grid(program, modules)
    grids = {slot: histogram.grid() for slot, histogram in found.values.items()}
    for slot, home in same.items():
        if home in grids:
            grids[slot] = grids[home]
    refused: dict[str, str] = {}
    means: dict[str, Tensor] = {}
    for step in program.steps:
        if step.kind != "site":
            continue
        path = step.target.path
        why = refusal(modules[step.target.conv.container]._modules[step.target.conv.name])
        slots = [step.out, *(ref.slot for ref in step.args if isinstance(ref, Ref))]
        if why is None and (path not in found.sums or any(slot not in grids for slot in slots)):
            why = "no batch of the calibration reached it"
        if why is not None:
            refused[path] = why
        else:
            means[path] = found.means(path)
    linears = {
        step.out: found.means(linear_path(step))
        for _, step in linear_steps(program, modules)
        if linear_path(step) in found.sums
    }
    return Int8(grids, means, batches, refused, linears)
