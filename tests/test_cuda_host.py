"""The CUDA kernels' device code, compiled for the host, against PyTorch in fp64.

The machine is tests/cuda_on_host/cuda.h. Outputs start as NaN between guards; AddressSanitizer and
UndefinedBehaviorSanitizer watch reads, writes and the alignment of vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from host_support import driver, raw, run
from torch import Tensor

from resnet_fast.ops import activation
from resnet_fast.testing.budget import expect_within_budget as check

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Geometry:
    """Shape as batch, channels, plane; `resident` blocks of 256 threads bound the grid."""

    batch: int
    channels: int
    plane: int
    resident: int = 1

    @property
    def numel(self) -> int:
        return self.batch * self.channels * self.plane


# Below one vector; a tail; planes shorter than a vector, straddled, aligned; more than one step of
# the grid-stride loop; a channel count that shares no factor with the threads.
GEOMETRIES = (
    Geometry(1, 3, 1),
    Geometry(2, 5, 49),
    Geometry(3, 7, 3),
    Geometry(1, 64, 56),
    Geometry(2, 24, 121),
    Geometry(1, 1, 6007),
    Geometry(5, 37, 49, resident=2),
    Geometry(2, 1031, 7),
    Geometry(8, 9, 64, resident=3),
)


def run_kernel(
    op: str,
    dtype: torch.dtype,
    act: str,
    geometry: Geometry,
    tensors: dict[str, Tensor | None],
    access: str = "vector",
    index: int = 32,
    **words: str,
) -> Tensor:
    """The kernel's output, a line of ``geometry.numel`` elements."""
    results = run(
        driver(op),
        tensors=tensors,
        outputs={"y": dtype},
        dtype=str(dtype).removeprefix("torch."),
        access=access,
        index=index,
        act=activation.code(act),
        numel=geometry.numel,
        channels=geometry.channels,
        plane=geometry.plane,
        resident=geometry.resident,
        **words,
    )
    return results["y"]


def draw(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator, dtype=torch.float64) * 2
    # In fp64 the framework's fp32 error is the standard, of the same numbers.
    return values.to(torch.float32 if dtype == torch.float64 else dtype).to(dtype)


def narrow(tensor: Tensor) -> Tensor:
    """What the framework gets: fp32 for fp64."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def accesses(dtype: torch.dtype) -> list[tuple[str, int]]:
    every = [("vector", 32), ("vector", 64), ("scalar", 32)]
    return every if dtype == torch.float16 else every[:1]


def clear_of_kinks(z: Tensor, act: str) -> Tensor:
    """Where a rounded pre-activation cannot fall on the other side of a kink."""
    clear = torch.ones_like(z, dtype=torch.bool)
    for kink in activation.KINKS[act]:
        clear &= (z - kink).abs() > 2**-4
    return clear


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", activation.ACTIVATIONS)
def test_every_activation(act: str, dtype: torch.dtype) -> None:
    geometry = Geometry(2, 5, 49)
    x, residual, grad_y = (draw(geometry.numel, dtype, seed) for seed in range(3))
    actual = run_kernel("add_act", dtype, act, geometry, {"x": x, "residual": residual})
    truth = activation.value(act, x.double() + residual.double())
    check(actual, activation.value(act, narrow(x) + narrow(residual)), truth)

    inputs = {"x": x, "residual": residual, "grad_y": grad_y}
    actual = run_kernel("add_act", dtype, act, geometry, inputs)
    z = x.double() + residual.double()
    clear = clear_of_kinks(z, act)
    truth = activation.grad(act, grad_y.double(), z)[clear]
    check(
        actual[clear],
        activation.grad(act, narrow(grad_y), narrow(x) + narrow(residual))[clear],
        truth,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_add_act_maps_every_element(geometry: Geometry, dtype: torch.dtype) -> None:
    x, residual, grad_y = (draw(geometry.numel, dtype, seed) for seed in range(3))
    z = x.double() + residual.double()
    clear = clear_of_kinks(z, "relu")
    inputs = {"x": x, "residual": residual}
    for access, index in accesses(dtype):
        actual = run_kernel("add_act", dtype, "relu", geometry, inputs, access, index)
        check(actual, torch.relu(narrow(x) + narrow(residual)), torch.relu(z))

        backward = inputs | {"grad_y": grad_y}
        actual = run_kernel("add_act", dtype, "relu", geometry, backward, access, index)
        truth = activation.grad("relu", grad_y.double(), z)
        framework = activation.grad("relu", narrow(grad_y), narrow(x) + narrow(residual))
        check(actual[clear], framework[clear], truth[clear])


@pytest.mark.parametrize("layout", ["channels_last", "planes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_bn_act_maps_every_element(geometry: Geometry, dtype: torch.dtype, layout: str) -> None:
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual = (draw(geometry.numel, dtype, seed) for seed in range(2))
    scale, shift = (draw(geometry.channels, statistics, seed) for seed in range(2, 4))
    shape = (geometry.batch, geometry.channels, geometry.plane)
    affine_shape = (1, geometry.channels, 1)
    if layout == "channels_last":
        shape = (geometry.batch, geometry.plane, geometry.channels)
        affine_shape = (1, 1, geometry.channels)

    def reference(kind: torch.dtype, flags: tuple[bool, bool, bool]) -> Tensor:
        z = x.to(kind).view(shape)
        if flags[1]:
            z = z * scale.to(kind).view(affine_shape)
        if flags[2]:
            z = z + shift.to(kind).view(affine_shape)
        if flags[0]:
            z = z + residual.to(kind).view(shape)
        return torch.nn.functional.silu(z).view(-1)

    for access, index in accesses(dtype):
        for flags in ((True, True, True), (False, True, True), (False, False, True)):
            inputs = {
                "x": x,
                "residual": residual if flags[0] else None,
                "scale": scale if flags[1] else None,
                "shift": shift if flags[2] else None,
            }
            actual = run_kernel(
                "bn_act", dtype, "silu", geometry, inputs, access, index, layout=layout
            )
            framework = reference(torch.float32 if dtype == torch.float64 else dtype, flags)
            check(actual, framework, reference(torch.float64, flags))


def test_absent_parameters_keep_every_bit() -> None:
    geometry = Geometry(1, 5, 7)
    x = draw(geometry.numel, torch.float32, 0)
    x[:4] = torch.tensor([-0.0, torch.inf, -torch.inf, 1e-42])
    for layout in ("channels_last", "planes"):
        actual = run_kernel("bn_act", torch.float32, "none", geometry, {"x": x}, layout=layout)
        assert raw(actual) == raw(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_pass_as_in_the_framework(dtype: torch.dtype) -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0], dtype=dtype)
    x, residual = special.repeat_interleave(6), torch.zeros(36, dtype=dtype)
    grad_y = special.repeat(6)
    geometry = Geometry(1, 1, 36)
    inputs = {"x": x, "residual": residual}
    for act in ("none", "relu", "relu6", "leaky_relu"):
        actual = run_kernel("add_act", dtype, act, geometry, inputs)
        truth = activation.value(act, x.double())
        check(actual, activation.value(act, narrow(x)), truth)
        if act == "relu6":
            continue  # at NaN the framework's CPU mask stops the gradient, its CUDA mask does not
        actual = run_kernel("add_act", dtype, act, geometry, inputs | {"grad_y": grad_y})
        truth = activation.grad(act, grad_y.double(), x.double())
        check(actual, activation.grad(act, narrow(grad_y), narrow(x)), truth)
