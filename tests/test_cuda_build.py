"""Every CUDA kernel compiles without warnings or spills, and moves memory in 16-byte accesses.

Needs nvcc but no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Compiled = Callable[[Path], tuple[Path, str]]

SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# The default build: code for 8.0 and 9.0a, and the PTX of 8.0, which every later device runs. The
# same PTX is assembled here for those devices.
CODE = {"80": "80", "90a": "90a", "86": "80", "89": "80", "100": "80", "120": "80"}
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# Element types of 16-byte accesses, as mangled; fp64 is scalar by design.
VECTOR_TYPES = {"f", "NS_4fp16E", "NS_4bf16E"}


@cache
def toolkit() -> Path | None:
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = shutil.which("nvcc")
    if found:
        guesses.insert(0, str(Path(found).resolve().parent.parent))
    for guess in guesses:
        if guess and (Path(guess) / "bin/nvcc").exists():
            return Path(guess)
    return None


@cache
def known_code() -> frozenset[str]:
    home = toolkit()
    if home is None:
        return frozenset()
    nvcc = [str(home / "bin/nvcc"), "--list-gpu-code"]
    text = subprocess.run(nvcc, capture_output=True, text=True).stdout
    return frozenset(re.findall(r"sm_(\w+)", text))


def knows(arch: str) -> bool:
    return arch.rstrip("a") in known_code()


@cache
def cuobjdump() -> str | None:
    """The toolkit's disassembler, or the one that comes with Triton."""
    home = toolkit()
    candidates = [home / "bin/cuobjdump"] if home else []
    spec = importlib.util.find_spec("triton")
    if spec and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations)))
        candidates.append(folder / "backends/nvidia/bin/cuobjdump")
    return next((str(path) for path in candidates if path.exists()), shutil.which("cuobjdump"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """A function from a source to (its fat binary, ptxas's report), for every known device."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    headers = Path(torch.origin).parent / "include"
    folder = tmp_path_factory.mktemp("cuda_build")

    @cache
    def build(source: Path) -> tuple[Path, str]:
        home = toolkit()
        if home is None:
            pytest.skip("nvcc was not found")
        target = folder / f"{source.stem}.fatbin"
        command = [str(home / "bin/nvcc"), "-std=c++20", "-O3", "-fatbin", str(source)]
        command += ["-o", str(target), "-isystem", str(headers), "-DUSE_CUDA", TARGET]
        for real, virtual in CODE.items():
            if knows(real):
                command.append(f"-gencode=arch=compute_{virtual},code=sm_{real}")
        command += ["-Xptxas=-v,-warn-spills", "-Werror=all-warnings"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return target, done.stderr

    return build


@pytest.mark.parametrize("arch", CODE)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_warnings_or_spills(compiled: Compiled, source: Path, arch: str) -> None:
    _, report = compiled(source)
    if not knows(arch):
        pytest.skip(f"this nvcc does not know sm_{arch}")
    rows = re.findall(
        rf"entry function '(\S+)' for 'sm_{arch}'\n.*\n\s+(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
    )
    assert rows, f"ptxas reported no kernel for sm_{arch}"
    assert not [row for row in rows if row[1:] != ("0", "0", "0")]


def kernels(sass: str) -> dict[str, str]:
    """Disassembly by mangled kernel name."""
    parts = re.split(r"\n\s*Function : (\S+)\n", sass)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_vector_kernels_move_16_bytes(compiled: Compiled, source: Path, arch: str) -> None:
    binary, _ = compiled(source)
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump was not found")
    command = [tool, "-sass", "-arch", f"sm_{arch}", str(binary)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seen = set()
    for name, body in kernels(sass).items():
        match = re.search(r"_kernelI(f|NS_4fp16E|NS_4bf16E)Li(\d+)E", name)
        if match is None or match[2] == "1":
            continue
        seen.add(match[1])
        streams = 3 if "backward" in name else 2 if "add_act" in name or "Lb1E" in name else 1
        # To registers, or to shared memory by cp.async.
        loads = re.findall(r"LDG\.E\.128|LDGSTS\.E\.BYPASS\.128", body)
        assert len(loads) >= streams, name
        assert re.search(r"STG\.E\.128", body), name
    assert seen == VECTOR_TYPES
