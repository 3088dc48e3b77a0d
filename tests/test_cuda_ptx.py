"""Each function of ptx.cuh becomes the machine instruction it is named for, and means there what
the host's layer says.

The first needs nvcc, the second a GPU. The kernels are those of
tests/cuda_on_host/layer_instructions.cuh, one instruction each.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from host_support import raw
from test_cuda_build import ROOT, cuobjdump, knows, toolkit
from test_cuda_on_host import instruction, operands
from torch import Tensor

PROGRAM = ROOT / "tests/cuda_on_host/layer_instructions.cu"
NVCC = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]
# By the kernel's name, patterns of its instructions.
SASS = {
    r"load": [r"LDSM\.16\.M88\.4 "],
    r"multiply.*fp16": [r"HMMA\.16816\.F32 "],
    r"multiply.*bf16": [r"HMMA\.16816\.F32\.BF16 "],
    r"multiply.*If": [r"HMMA\.1688\.F32\.TF32 "],
    # Written out: cvt.rna.tf32 has no instruction of its own there.
    r"round": [r"FSETP\.\w+.*\+?INF", r"LOP3\.LUT .*0xffffe000"],
    r"exchange": [r"SHFL\.BFLY ", r"SHFL\.DOWN ", r"SHFL\.IDX "],
    r"copy": [
        r"LDGSTS\.E ",
        r"LDGSTS\.E\.64 ",
        r"LDGSTS\.E\.BYPASS\.128 ",
        r"LDGDEPBAR",
        r"DEPBAR\.LE SB0, 0x1 ",
        r"DEPBAR\.LE SB0, 0x0 ",
    ],
    r"add": [r"ATOMG\.E\.ADD\.STRONG\.GPU "],
    r"narrow": [r"F2FP?\.BF16\S* "],
    r"larger": [r"FMNMX\.NAN "],
    r"synchronise": [r"BAR\.SYNC", r"MEMBAR\.\S*GPU "],
}


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_each_function_is_its_instruction(tmp_path: Path, arch: str) -> None:
    home, tool = toolkit(), cuobjdump()
    if home is None or tool is None or not knows(arch):
        pytest.skip(f"no nvcc that knows sm_{arch}, or no cuobjdump")
    binary = tmp_path / "kernels.cubin"
    command = [str(home / "bin/nvcc"), *NVCC, f"-arch=sm_{arch}", "-cubin", str(PROGRAM)]
    command += ["-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    listing = subprocess.run([tool, "-sass", str(binary)], capture_output=True, text=True).stdout
    functions = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", listing, re.S))
    for kernel, patterns in SASS.items():
        (name,) = (name for name in functions if re.search(rf"\d{kernel}", name))
        for pattern in patterns:
            assert re.search(pattern, functions[name]), f"{name}: no {pattern}"


def operands_of_each_kernel() -> dict[str, tuple[Tensor, Tensor, int]]:
    """``data``, ``in`` and the words of ``out`` by kernel: small integers, so that sums are exact,
    and any bits where the instruction moves or rounds them."""
    generator = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator, dtype=torch.int64)

    def factors(dtype: torch.dtype) -> Tensor:
        width = 4 // dtype.itemsize
        parts = [integers(-8, 9, 32, n).to(t) for n, t in ((4 * width, dtype), (2 * width, dtype))]
        return operands(*parts, integers(-99, 100, 32, 4).float())

    bits = integers(-(2**31), 2**31, 1024).to(torch.int32)
    nothing = bits[:0]
    return {
        "load": (bits[:256], integers(0, 64, 32).to(torch.int32) * 16, 128),
        "fp16": (nothing, factors(torch.float16), 128),
        "bf16": (nothing, factors(torch.bfloat16), 128),
        "tf32": (nothing, factors(torch.float32), 128),
        "round": (nothing, bits[:32], 32),
        "narrow": (nothing, bits[32:64], 32),
        "exchange": (nothing, bits[:64], 192),
        "copy": (nothing, bits[:512], 32 * 33),
        "synchronise": (nothing, bits[:64], 65),
    }


@pytest.mark.gpu
def test_the_host_agrees_with_the_device(tmp_path: Path) -> None:
    home = toolkit()
    if home is None:
        pytest.skip("nvcc was not found")
    program = tmp_path / "program"
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    command = [str(home / "bin/nvcc"), *NVCC, f"-arch=sm_{arch}", str(PROGRAM), "-o", str(program)]
    subprocess.run(command, check=True)
    for kernel, (data, given, words) in operands_of_each_kernel().items():
        size = data.numel() * 4
        command = [str(program), kernel, str(words), str(size)]
        done = subprocess.run(command, input=raw(data) + raw(given), capture_output=True)
        assert done.returncode == 0, f"{kernel}: {done.stderr.decode()}"
        device = torch.from_numpy(numpy.frombuffer(done.stdout, numpy.int32).copy())
        host = instruction(kernel, words, given, data=data, bytes=size)
        if kernel == "copy":  # what is there before the wait is anybody's guess
            device, host = (
                t.view(32, 33)[:, [*range(16, 23), *range(24, 33)]] for t in (device, host)
            )
        assert torch.equal(device, host), kernel
