"""A site: one place in a network, described by all that decides how to run it."""

from __future__ import annotations

import functools
import math
import platform
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from resnet_fast.errors import PlanError

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Site:
    """One call: op, shapes, geometry, dtype, layout and device.

    ``x_shape`` and ``weight_shape`` are N C H W and K C R S (or their 1-D and 3-D kin); ``layout``
    is ``contiguous`` or ``channels_last``.
    """

    op: str
    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    act: str
    affine: bool
    residual: bool
    dtype: str
    layout: str
    device: str

    @property
    def key(self) -> str:
        """Identity without the batch: sites that differ only in batch share a plan entry."""

        def dims(values: tuple[int, ...]) -> str:
            return "x".join(map(str, values))

        return "|".join(
            (
                self.op,
                f"x{dims(self.x_shape[1:])}",
                f"w{dims(self.weight_shape)}",
                f"s{dims(self.stride)}",
                f"p{dims(self.padding)}",
                f"d{dims(self.dilation)}",
                f"g{self.groups}",
                self.act,
                "bn" if self.affine else "bias",
                "residual" if self.residual else "plain",
                self.dtype,
                self.layout,
                self.device,
            )
        )

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output, N K P Q."""
        spatial = (
            (n + 2 * p - d * (r - 1) - 1) // s + 1
            for n, p, d, r, s in zip(
                self.x_shape[2:],
                self.padding,
                self.dilation,
                self.weight_shape[2:],
                self.stride,
                strict=True,
            )
        )
        return (self.x_shape[0], self.weight_shape[0], *spatial)

    @property
    def bytes(self) -> int:
        """Bytes that must move at least: input, weights, residual and output, each once."""
        size = torch.finfo(DTYPES[self.dtype]).bits // 8
        out = math.prod(self.out_shape)
        elements = math.prod(self.x_shape) + math.prod(self.weight_shape) + out
        return size * (elements + (out if self.residual else 0))

    @property
    def flops(self) -> int:
        """Floating-point operations of the convolution, two for each multiply-add."""
        return 2 * math.prod(self.out_shape) * math.prod(self.weight_shape[1:])


@functools.cache
def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def _device_name(kind: str, index: int | None) -> str:
    if kind == "cpu":
        return f"cpu:{_cpu_model()}:{torch.backends.cpu.get_cpu_capability()}"
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability(index)
        return f"cuda:{torch.cuda.get_device_name(index)}:sm_{major}{minor}"
    return kind


# What the meta device stands for (:func:`resnet_fast.plan.binding.as_if_on`).
stand_in: ContextVar[str | None] = ContextVar("stand_in", default=None)


def device_name(device: torch.device | str) -> str:
    """What a plan calls ``device``: its kind, model and instruction set or architecture."""
    device = torch.device(device)
    if device.type == "meta" and (name := stand_in.get()) is not None:
        return name
    return _device_name(device.type, device.index).replace("|", "/")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``; PlanError for a dtype that no plan covers."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise PlanError(f"no plan covers dtype {name}; expected one of {', '.join(DTYPES)}")
    return name
