"""bn_act_train's CUDA kernels on the host, forward and backward, against PyTorch in fp64.

The launches are the launcher's own (csrc/cuda/bn_act_train_launch.h).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from host_support import driver, run
from torch import Tensor

from resnet_fast import ops
from resnet_fast.ops import activation
from resnet_fast.testing.budget import within_budget
from resnet_fast.testing.reordered import REORDERED

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = ("channels_last", "planes")
REFERENCE = ops.module("bn_act_train").reference
EPS = 1e-3


@dataclass(frozen=True)
class Geometry:
    """Shape as batch, channels, plane; `resident` blocks bound the grid."""

    batch: int
    channels: int
    plane: int
    resident: int = 1


# Planes of one element, shorter than a vector, straddled, aligned; one channel; channels that the
# lanes do not divide, with a whole number of vectors and without; more columns than a block takes;
# blocks of one warp and of eight; one split and several, of which the last has less to do.
GEOMETRIES = (
    Geometry(9, 21, 1),
    Geometry(16, 64, 1, resident=3),
    Geometry(2, 5, 49),
    Geometry(8, 7, 3, resident=2),
    Geometry(3, 64, 49, resident=4),
    Geometry(8, 3, 49, resident=7),
    Geometry(16, 12, 196, resident=5),
    Geometry(1, 1, 6007, resident=3),
    Geometry(1, 1, 8000, resident=3),
    Geometry(2, 1031, 7, resident=40),
    Geometry(8, 1031, 9),
    Geometry(4, 320, 16, resident=6),
    Geometry(2, 24, 784, resident=9),
)


class Problem:
    """Random arguments as [N, C, P], of a dtype, and what the kernels make of them."""

    def __init__(
        self,
        geometry: Geometry,
        dtype: torch.dtype,
        act: str = "relu",
        *,
        residual: bool = True,
        affine: bool = True,
        offset: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.geometry, self.dtype, self.act = geometry, dtype, act
        shape = (geometry.batch, geometry.channels, geometry.plane)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(seed)

        def normal(*sizes: int) -> Tensor:
            values = torch.randn(sizes, generator=generator, dtype=torch.float64)
            return values.to(torch.float32 if dtype == torch.float64 else dtype).double()

        self.x = (2 * normal(*shape) + offset).to(torch.float32).to(dtype)
        self.residual = normal(*shape).to(dtype) if residual else None
        self.weight = (normal(shape[1]) + 0.5).to(self.wide) if affine else None
        self.bias = normal(shape[1]).to(self.wide) if affine else None
        self.grad_y = normal(*shape).to(dtype)

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """Of the reference, in fp64 or in what the framework gets: fp32 for fp64."""
        same = dtype == self.dtype
        wide = dtype if dtype == torch.float64 else torch.float32
        tensors = {
            "x": self.x if same else self.x.to(dtype),
            "weight": None if self.weight is None else self.weight.to(wide),
            "bias": None if self.bias is None else self.bias.to(wide),
            "residual": None if self.residual is None else self.residual.to(dtype),
        }
        return tensors | {"eps": EPS, "act": self.act}

    def clear_of_kinks(self) -> Problem:
        """No gradient arrives where a rounded pre-activation may be on either side of a kink."""
        z = REFERENCE(**self.arguments(torch.float64) | {"act": "none"})[0]
        clear = torch.ones_like(z, dtype=torch.bool)
        for kink in activation.KINKS[self.act]:
            clear &= (z - kink).abs() > 2**-4
        self.grad_y = self.grad_y * clear
        return self

    def run(self, layout: str, program: Any = None, **how: Any) -> dict[str, Tensor]:
        """Outputs of the forward, and of the backward from its statistics."""

        def line(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.dim() == 1 or layout == "planes":
                return tensor
            return tensor.transpose(1, 2).contiguous()

        def whole(tensor: Tensor) -> Tensor:
            if tensor.numel() == self.geometry.channels != self.x.numel():
                return tensor
            n, c, p = self.x.shape
            if layout == "planes":
                return tensor.view(n, c, p)
            return tensor.view(n, p, c).transpose(1, 2).contiguous()

        program = program or driver("bn_act_train")
        values = {
            "batch": self.geometry.batch,
            "channels": self.geometry.channels,
            "plane": self.geometry.plane,
            "resident": self.geometry.resident,
            "act": activation.code(self.act),
            "eps": EPS,
            "layout": layout,
            "dtype": str(self.dtype).removeprefix("torch."),
            "access": "vector",
            "index": 32,
        } | how
        inputs = {"x": self.x, "weight": self.weight, "bias": self.bias, "residual": self.residual}
        lines = {name: line(tensor) for name, tensor in inputs.items()}
        kinds = {"y": self.dtype, "mean": self.wide, "rstd": self.wide}
        forward = run(program, tensors=lines, outputs=kinds, **values)
        lines |= {"grad_y": line(self.grad_y), "mean": forward["mean"], "rstd": forward["rstd"]}
        kinds = {"grad_x": self.dtype, "grad_weight": self.wide, "grad_bias": self.wide}
        if self.residual is not None:
            kinds["grad_z"] = self.dtype
        backward = run(program, tensors=lines, outputs=kinds, **values)
        return {name: whole(tensor) for name, tensor in (forward | backward).items()}

    def evaluate(self, f: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """What :meth:`run` returns, by the framework."""
        arguments = self.arguments(dtype)
        wide = dtype if dtype == torch.float64 else torch.float32
        ones = torch.ones(self.geometry.channels, dtype=wide)
        if arguments["weight"] is None:  # their gradients are there all the same
            arguments |= {"weight": ones, "bias": torch.zeros_like(ones)}
        leaves = {
            name: value.clone().requires_grad_() if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        y, mean, rstd = f(**leaves)
        y.backward(self.grad_y.to(dtype))
        found = {"y": y, "mean": mean, "rstd": rstd}
        for name in ("x", "weight", "bias"):
            found[f"grad_{name}"] = leaves[name].grad
        if self.residual is not None:
            found["grad_z"] = leaves["residual"].grad
        return {name: tensor.detach() for name, tensor in found.items()}

    def truth_and_frameworks(self) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        narrow = torch.float32 if self.dtype == torch.float64 else self.dtype
        frameworks = [self.evaluate(f, narrow) for f in (REFERENCE, REORDERED["bn_act_train"])]
        truth = self.evaluate(REFERENCE, torch.float64)
        # Torch's sums over so many values stray further in fp64 than an fp64 result may.
        for c, line in enumerate(self.x.double().transpose(0, 1).flatten(1).tolist()):
            mean = math.fsum(line) / len(line)
            variance = math.fsum((value - mean) ** 2 for value in line) / len(line)
            truth["mean"][c], truth["rstd"][c] = mean, 1 / math.sqrt(variance + EPS)
        return truth, frameworks

    def expect(self, layout: str, **how: Any) -> None:
        actual = self.run(layout, **how)
        truth, frameworks = self.truth_and_frameworks()
        assert actual.keys() == truth.keys()
        for name, tensor in actual.items():
            verdict = within_budget(tensor, [f[name] for f in frameworks], truth[name])
            assert verdict.ok, f"{name}: error {verdict.error:.3e} beyond {verdict.limit:.3e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_geometry(geometry: Geometry, dtype: torch.dtype, layout: str) -> None:
    Problem(geometry, dtype).clear_of_kinks().expect(layout)
