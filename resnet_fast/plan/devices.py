"""Devices by name: the two roofs of a roofline, and what bounds a kernel's tiles.

Figures are the vendor's, dense (no sparsity), products accumulated in fp32, at the boost clock of
the data sheet: bounds, which nothing reaches.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from resnet_fast.errors import ArgumentError
from resnet_fast.plan.site import device_name


@dataclass(frozen=True)
class Device:
    """One device's figures.

    Attributes:
        name: what :func:`named` takes.
        plan_name: what :func:`resnet_fast.plan.device_name` calls it.
        capability: compute capability.
        sms: streaming multiprocessors.
        shared_memory: bytes of shared memory that one CTA can ask for (the opt-in maximum).
        l2: bytes of L2.
        bandwidth: bytes of memory a second, by the data sheet.
        peaks: floating-point operations a second by arithmetic: ``fp16``, ``bf16`` and ``tf32`` on
            the tensor cores, ``fp32`` beside them.
        copied: bytes a second that a copy was measured to move, where one was.
    """

    name: str
    plan_name: str
    capability: tuple[int, int]
    sms: int
    shared_memory: int
    l2: int
    bandwidth: float
    peaks: dict[str, float]
    copied: float | None = None

    @property
    def memory_roof(self) -> float:
        """Bytes a second that a kernel can hope for: the measured copy's, else the data sheet's."""
        return self.copied or self.bandwidth

    def seconds(self, moved: int, flops: int, arithmetic: str) -> tuple[float, str]:
        """The least time for ``moved`` bytes and ``flops`` operations, and which roof sets it."""
        memory, compute = moved / self.memory_roof, flops / self.peaks[arithmetic]
        return (compute, "compute") if compute > memory else (memory, "memory")


def _peaks(tensor: float, tf32: float, fp32: float) -> dict[str, float]:
    """TFLOP/s of the 16-bit tensor cores, of TF32 and of fp32, by arithmetic."""
    return {"fp16": tensor * 1e12, "bf16": tensor * 1e12, "tf32": tf32 * 1e12, "fp32": fp32 * 1e12}


# Shared memory a CTA: CUDA C++ Programming Guide, table "Technical Specifications per Compute
# Capability", maximum per thread block: 99, 163 and 227 KiB at 8.9, 8.0 and 9.0.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # NVIDIA H100 Tensor Core GPU data sheet, column SXM: bandwidth. NVIDIA H100 Tensor Core
        # GPU Architecture, H100 SXM5: SMs, L2, dense peaks. The copy was measured on an H100
        # (beside it a GEMM in fp16 reached 800 TFLOP/s, which is no roof here).
        Device(
            "H100",
            "cuda:NVIDIA H100 80GB HBM3:sm_90",
            (9, 0),
            sms=132,
            shared_memory=227 << 10,
            l2=50 << 20,
            bandwidth=3.35e12,
            peaks=_peaks(989.4, 494.7, 66.9),
            copied=3.0e12,
        ),
        # NVIDIA H200 Tensor Core GPU data sheet, column SXM: bandwidth; the chip is
        # the H100's. The copy was measured on an H200 (a GEMM in fp16 beside it: 758 TFLOP/s).
        Device(
            "H200",
            "cuda:NVIDIA H200:sm_90",
            (9, 0),
            sms=132,
            shared_memory=227 << 10,
            l2=50 << 20,
            bandwidth=4.8e12,
            peaks=_peaks(989.4, 494.7, 66.9),
            copied=4.24e12,
        ),
        # NVIDIA A100 Tensor Core GPU data sheet, column 80GB SXM; SMs and L2: NVIDIA A100 Tensor
        # Core GPU Architecture.
        Device(
            "A100",
            "cuda:NVIDIA A100-SXM4-80GB:sm_80",
            (8, 0),
            sms=108,
            shared_memory=163 << 10,
            l2=40 << 20,
            bandwidth=2.039e12,
            peaks=_peaks(312, 156, 19.5),
        ),
        # NVIDIA L4 Tensor Core GPU data sheet (its tensor figures are sparse: half of them here);
        # SMs and L2: NVIDIA Ada GPU Architecture.
        Device(
            "L4",
            "cuda:NVIDIA L4:sm_89",
            (8, 9),
            sms=58,
            shared_memory=99 << 10,
            l2=48 << 20,
            bandwidth=300e9,
            peaks=_peaks(121, 60, 30.3),
        ),
        # NVIDIA Ada GPU Architecture, appendix A: GeForce RTX 4090. Its fp16 products accumulated
        # in fp16 run at twice the rate, and are not these.
        Device(
            "RTX4090",
            "cuda:NVIDIA GeForce RTX 4090:sm_89",
            (8, 9),
            sms=128,
            shared_memory=99 << 10,
            l2=72 << 20,
            bandwidth=1.008e12,
            peaks=_peaks(165.2, 82.6, 82.6),
        ),
    )
}


def named(name: str) -> Device:
    """The device called ``name``, in any case, with or without spaces.

    Raises ``ArgumentError``, which names the choices, for one that is not in :data:`DEVICES`.
    """
    found = DEVICES.get(re.sub(r"[\s_-]", "", name).upper())
    if found is None:
        raise ArgumentError("device", f"one of {', '.join(DEVICES)}", repr(name))
    return found


def of(device: torch.device | str) -> Device | None:
    """The figures of a device that is present; None for one that :data:`DEVICES` does not hold."""
    name = device_name(device)
    return next((known for known in DEVICES.values() if known.plan_name == name), None)
