"""The built CUDA library loads without a GPU, and its PTX assembles for devices beyond 9.0.

That the sources compile without warnings is the build's own affair (setup.py), and for every
architecture that of `make cuda-arches`; what nvcc has made is judged in test_cuda_resources.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_library_support import EVERY, built_library

from resnet_fast.kernels import cuda_resources

ROOT = Path(__file__).resolve().parents[1]
LIBRARY, CUOBJDUMP = built_library()

# Devices that find no code in the default build, and run the PTX of 8.0. Code for 8.0 runs on 8.9.
LATER = ("100", "120")

LOAD = """
import sys
import torch

cpu, cuda, *ops = sys.argv[1:]
known = torch._C._dispatch_has_kernel_for_dispatch_key
torch.ops.load_library(cpu)
assert not any(known(f"resnet_fast::{op}", "CUDA") for op in ops)
torch.ops.load_library(cuda)
print(*(op for op in ops if known(f"resnet_fast::{op}", "CUDA")))
"""


def test_the_library_registers_its_ops_without_a_gpu() -> None:
    """Beside the CPU library, which defines the ops, and without any Python of this package."""
    sources = "".join(path.read_text() for path in ROOT.glob("csrc/cuda/*.cu"))
    ops = re.findall(r'm\.impl\(\s*"(\w+)"', sources)
    assert {"add_act", "bn_act"} <= set(ops)
    cpu = cuda_resources.library("_C_cpu")
    assert cpu is not None
    done = subprocess.run(
        [sys.executable, "-c", LOAD, cpu, LIBRARY, *ops],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ops


def assembler() -> Path | None:
    """The toolkit's ptxas, or Triton's for the newest devices."""
    beside = [CUOBJDUMP.with_name(name) for name in ("ptxas-blackwell", "ptxas")]
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    found = [*(Path(home) / "bin/ptxas" for home in homes if home), *beside]
    return next((path for path in found if path.exists()), None)


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The ordinary library's PTX, a file a source."""
    library = cuda_resources.library()
    if library is None:
        pytest.skip("the ordinary CUDA library is not built")
    folder = tmp_path_factory.mktemp("ptx")
    command = [CUOBJDUMP, "-xptx", "all", library]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    files = sorted(folder.glob("*.ptx"))
    if not files:
        pytest.skip("the library was built without PTX")
    return files


@pytest.mark.skipif(not EVERY, reason="takes a minute: make cuda-arches")
@pytest.mark.parametrize("device", LATER)
def test_ptx_assembles_without_spills(device: str, ptx: list[Path], tmp_path: Path) -> None:
    tool = assembler()
    if tool is None:
        pytest.skip("ptxas was not found")
    for path in ptx:
        command = [tool, f"-arch=sm_{device}", "-v", path, "-o", tmp_path / "code.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        rows = re.findall(
            r"Compiling entry function '(\S+)' for 'sm_\w+'\n.*\n\s+(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads",
            done.stderr,
        )
        assert rows, f"ptxas reported no kernel of {path.name}"
        assert not [row for row in rows if row[1:] != ("0", "0", "0")]
