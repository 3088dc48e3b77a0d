"""A program's 8-bit form, from what its calibration showed: which values are bytes, and how."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.errors import AccelerateError, ArgumentError
from resnet_fast.fuse.calibrate import Observed, Observer, linear_path, observe
from resnet_fast.fuse.int8 import Int8
from resnet_fast.fuse.program import Program
from resnet_fast.fuse.steps import Ref, Step
from resnet_fast.ops import conv_bn_act_int8 as int8
from resnet_fast.ops._checks import require_op


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


def refusal(conv: Any, step: Step) -> str | None:
    """Why a convolution stays in fp32 among 8-bit ones, or None."""
    if step.target.bn is None and step.target.act == "none" and step.args[1] is None:
        return "nothing is fused with it"
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
        why = refusal(modules[step.target.conv.container]._modules[step.target.conv.name], step)
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


def quantize_(
    root: nn.Module, programs: list[tuple[Program, nn.Module]], calibration: Iterable[Any]
) -> None:
    """Give each of ``programs`` its 8-bit form, all of them or none.

    Args:
        root: the model that is run on ``calibration``.
        programs: those of eval, each with the module that it was traced from.
        calibration: batches, as :func:`resnet_fast.fuse.calibrate.observe` takes them.

    Raises:
        AccelerateError: if no site can run on 8 bits, or the calibration fails.
    """
    observers, linears = [], []
    for program, unit in programs:
        modules = program.modules(unit)
        seen = Observer(program, same_grid(program, modules))
        observers.append((program, modules, seen))
        linears += [(module, step, seen) for module, step in linear_steps(program, modules)]
    batches = observe(
        root, [(program, seen) for program, _, seen in observers], linears, calibration
    )
    forms = [quantized(p, modules, seen.found, batches) for p, modules, seen in observers]
    if not any(form.means for form in forms):
        reasons = dict.fromkeys(why for form in forms for why in form.refused.values())
        raise AccelerateError(f"no site can run on 8 bits: {'; '.join(reasons)}")
    for (program, _), form in zip(programs, forms, strict=True):
        program.int8 = form


def check_quantization(model: nn.Module, dtype: Any, calibration: Any) -> None:
    """Raise for what ``accelerate`` cannot quantise; its docstring lists the errors."""
    if dtype not in (None, "int8"):
        raise ArgumentError("dtype", '"int8" or None', repr(dtype))
    if dtype is None:
        if calibration is not None:
            raise ArgumentError("calibration", 'None without dtype="int8"', "batches")
        return
    if calibration is None or not isinstance(calibration, Iterable):
        raise ArgumentError("calibration", "an iterable of batches", type(calibration).__name__)
    for name, tensor in model.named_parameters():
        if tensor.device.type != "cpu" or tensor.dtype is not torch.float32:
            found = f"{name} in {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
            raise ArgumentError("model", 'parameters in fp32 on the CPU with dtype="int8"', found)
    if not int8.available():
        require_op("_int8_conv")
