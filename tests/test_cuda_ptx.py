"""Each function of ptx.cuh becomes the machine instruction it is named for.

Needs nvcc but no GPU. The kernels are those of tests/cuda_on_host/layer_instructions.cuh, one
instruction each.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from test_cuda_build import ROOT, cuobjdump, knows, toolkit

KERNELS = ROOT / "tests/cuda_on_host/layer_instructions.cuh"
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
    source, binary = tmp_path / "kernels.cu", tmp_path / "kernels.cubin"
    source.write_text(f'#include "{KERNELS}"\n')
    nvcc = [str(home / "bin/nvcc"), "-std=c++20", "-O3", "--expt-relaxed-constexpr"]
    command = [*nvcc, f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    listing = subprocess.run([tool, "-sass", str(binary)], capture_output=True, text=True).stdout
    functions = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", listing, re.S))
    for kernel, patterns in SASS.items():
        (name,) = (name for name in functions if re.search(rf"\d{kernel}", name))
        for pattern in patterns:
            assert re.search(pattern, functions[name]), f"{name}: no {pattern}"
