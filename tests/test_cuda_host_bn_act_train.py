"""bn_act_train's CUDA kernels on the host, forward and backward, against PyTorch in fp64.

The launches are the launcher's own (csrc/cuda/bn_act_train_launch.h).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from host_support import HostError, driver, run
from torch import Tensor

from resnet_fast import ops
from resnet_fast.ops import activation
from resnet_fast.testing.budget import expect_within_budget, within_budget
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
        self.geometry, self.dtype, self.act, self.offset = geometry, dtype, act, offset
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
        """What :meth:`run` returns, by the framework.

        Torch's sums stray in fp64, too, further than an fp64 result may: the truth is that of the
        values around 0, exactly the same but for the mean, and its statistics are exact sums.
        """
        arguments = self.arguments(dtype)
        if dtype == torch.float64:
            arguments["x"] = arguments["x"] - self.offset
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_every_activation(act: str, dtype: torch.dtype, layout: str) -> None:
    Problem(Geometry(8, 9, 49, resident=2), dtype, act).clear_of_kinks().expect(layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("access,index", [("scalar", 32), ("scalar", 64), ("vector", 64)])
def test_every_access(access: str, index: int, layout: str) -> None:
    for geometry in (Geometry(8, 9, 49, resident=2), Geometry(4, 64, 4)):
        problem = Problem(geometry, torch.float16).clear_of_kinks()
        problem.expect(layout, access=access, index=index)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["none", "silu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_absent_arguments(affine: bool, residual: bool, act: str, layout: str) -> None:
    """Nothing is written for a residual that is absent: the driver would not give the memory."""
    for channels in (16, 9):
        geometry = Geometry(8, channels, 49, resident=2)
        Problem(geometry, torch.bfloat16, act, residual=residual, affine=affine).expect(layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_any_order_gives_the_same_bits(geometry: Geometry, layout: str) -> None:
    problem = Problem(geometry, torch.float16)
    expected = problem.run(layout)
    for order, seed in (("descending", 0), ("shuffled", 1), ("shuffled", 2)):
        for name, tensor in problem.run(layout, order=order, seed=seed).items():
            assert torch.equal(tensor, expected[name]), f"{name}, {order}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [2000.0, -3e4])
def test_a_mean_of_many_deviations(offset: float, dtype: torch.dtype, layout: str) -> None:
    """1000 and 15000 of them; 16-bit values that near each other are few different ones."""
    for geometry in (Geometry(8, 24, 49, resident=3), Geometry(1, 1, 6007, resident=3)):
        Problem(geometry, dtype, offset=offset).clear_of_kinks().expect(layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("far", [0.0, 1e4])
def test_an_outlier_in_the_first_place(far: float, layout: str) -> None:
    """Deviations from one value of the channel would be those of a mean 1000 deviations away."""
    problem = Problem(Geometry(8, 24, 784, resident=3), torch.float32, offset=2000.0)
    problem.x[0, :, 0] = far
    problem.clear_of_kinks().expect(layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_channel(dtype: torch.dtype, layout: str) -> None:
    problem = Problem(Geometry(8, 12, 49, resident=3), dtype)
    problem.x[:, 3] = 0.125
    problem.x[:, 7] = 0.0
    problem.clear_of_kinks().expect(layout)
    problem.x[:, 3] = 0.1  # no sum of them is exact
    found = problem.run(layout)
    assert found["mean"][3] == problem.x[0, 3, 0].to(problem.wide) and found["mean"][7] == 0
    expected = torch.tensor(1 / math.sqrt(EPS), dtype=problem.wide)
    assert found["rstd"][3] == found["rstd"][7] == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_channel(
    special: float, dtype: torch.dtype, layout: str
) -> None:
    problem = Problem(Geometry(8, 9, 49, resident=2), dtype)
    expected = problem.run(layout)
    where = (3, 4, 48)  # its vector is the next channel's too
    others = [c for c in range(9) if c != where[1]]

    problem.x[where] = special
    found = problem.run(layout)
    for name in ("y", "grad_x"):
        assert found[name][:, where[1]].isnan().all()
        assert torch.equal(found[name][:, others], expected[name][:, others])
    for name in ("mean", "rstd", "grad_weight", "grad_bias"):
        assert torch.equal(found[name][others], expected[name][others])
    assert not found["mean"][where[1]].isfinite() and found["rstd"][where[1]].isnan()

    problem = Problem(Geometry(8, 9, 49, resident=2), dtype, "none")
    expected = problem.run(layout)
    problem.grad_y[where] = special
    found = problem.run(layout)
    assert torch.equal(found["y"], expected["y"])
    assert not found["grad_x"][:, where[1]].isfinite().any()
    assert torch.equal(found["grad_x"][:, others], expected["grad_x"][:, others])
    assert torch.equal(found["grad_bias"][others], expected["grad_bias"][others])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_values_a_channel(layout: str) -> None:
    """The fewest that the contract allows; of the gradient hardly a digit is left."""
    problem = Problem(Geometry(2, 19, 1), torch.float32)
    actual = problem.run(layout)
    truth, frameworks = problem.truth_and_frameworks()
    for name in ("y", "mean", "rstd"):
        expect_within_budget(actual[name], [f[name] for f in frameworks], truth[name])


CHANNELS = "csrc/cuda/channels.cuh"
MOMENTS = "csrc/cuda/moments.cuh"
TRAIN = "csrc/cuda/bn_act_train.cuh"
# What is wrong, the file, its text, the text in its place.
PLANTED = {
    "no barrier": (CHANNELS, "    sync_block();\n", ""),
    "a row too few": (CHANNELS, "if (line < depth)", "if (line + 1 < depth)"),
    "a column too many": (CHANNELS, "row == 0 && column < columns", "row == 0"),
    "the neighbour's lanes": (CHANNELS, "static_cast<int>(start - first) : 0", "0 : 0"),
    "a plane too long": (CHANNELS, "start + plane - first", "start + plane + 1 - first"),
    "half the rows": (CHANNELS, "unsigned half = rows / 2", "unsigned half = rows / 4"),
    "blocks of one size": (MOMENTS, "static_cast<double>(partial.count)", "1.0"),
    "threads of one size": (MOMENTS, "static_cast<C>(own.count) * share", "share"),
    "rows around nothing": (MOMENTS, "middle(row(0), row(1), row(2));", "C(0) * row(0);"),
    "planes around nothing": (MOMENTS, "C(1) / static_cast<C>(added), first)", "C(0), C(0))"),
    "means of one number": (MOMENTS, "(other.sum[kRest][k] - own.sum[kRest][k])", "C(0)"),
    "a mask of one channel": (CHANNELS, "static_cast<Index>(j) < left", "left > 0"),
    "sums for means": (TRAIN, "weight * rstd / values", "weight * rstd"),
}


# One dtype and one index are enough, and compile in a fraction of the time.
ELEMENTWISE = "tests/cuda_on_host/elementwise.h"
FP32_ALONE = [
    ("uint64_t", "uint32_t"),
    *(
        (f"with_access<{kind}>(it, f)", 'fail("case", "left out")')
        for kind in ("resnet_fast::fp16", "resnet_fast::bf16", "double")
    ),
]


def planted_problem() -> Problem:
    """Blocks and threads of several sizes, a last tile with a column less, planes that share
    vectors, means of 1000 deviations."""
    problem = Problem(Geometry(24, 37, 49, resident=4), torch.float32, offset=2000.0)
    return problem.clear_of_kinks()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_caught_without_a_bug(layout: str) -> None:
    planted_problem().expect(layout)


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug: str) -> None:
    path, old, new = PLANTED[bug]
    program = driver("bn_act_train", {path: [(old, new)], ELEMENTWISE: FP32_ALONE})
    problem, caught = planted_problem(), []
    for layout in LAYOUTS:
        for order in ("ascending", "shuffled"):
            try:
                problem.expect(layout, program=program, order=order)
            except (HostError, AssertionError) as error:
                caught.append(str(error))
    assert caught, f"{bug} shows nowhere"
