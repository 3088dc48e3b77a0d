"""Every CUDA kernel compiles without warnings or spills, and moves memory in 16-byte accesses.

Needs nvcc but no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# The first two are the default build; the others are compiled where the toolkit knows them.
ARCHES = ("80", "90a", "86", "89", "100", "120")
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# csrc/cuda: 16-byte loads and stores of these element types; fp64 is scalar by design.
VECTOR_TYPES = {"f": "float", "NS_4fp16E": "fp16", "NS_4bf16E": "bf16"}


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
def known_arches() -> frozenset[str]:
    home = toolkit()
    if home is None:
        return frozenset()
    text = subprocess.run(
        [str(home / "bin/nvcc"), "--list-gpu-arch"], capture_output=True, text=True
    )
    return frozenset(re.findall(r"compute_(\w+)", text.stdout))


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


def require_arch(arch: str) -> None:
    if toolkit() is None:
        pytest.skip("nvcc was not found")
    if arch.rstrip("a") not in known_arches():
        pytest.skip(f"this nvcc does not know sm_{arch}")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A function from (source, arch) to (object file, ptxas report), each compiled once."""
    include = importlib.util.find_spec("torch")
    assert include is not None and include.origin is not None
    headers = Path(include.origin).parent / "include"
    folder = tmp_path_factory.mktemp("cuda_build")

    @cache
    def build(source: Path, arch: str) -> tuple[Path, str]:
        home = toolkit()
        assert home is not None
        target = folder / f"{source.stem}.sm_{arch}.o"
        command = [str(home / "bin/nvcc"), "-std=c++20", "-O3", "-c", str(source)]
        command += ["-o", str(target), "-isystem", str(headers), "-DUSE_CUDA", TARGET]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v,-warn-spills"]
        command += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return target, done.stderr

    yield build


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_warnings_or_spills(compiled, source: Path, arch: str) -> None:
    require_arch(arch)
    _, report = compiled(source, arch)
    rows = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        report,
    )
    assert rows, "ptxas reported no kernel"
    assert not [row for row in rows if row[1:] != ("0", "0", "0")]


def kernels(sass: str) -> dict[str, str]:
    """Disassembly by mangled kernel name."""
    parts = re.split(r"\n\s*Function : (\S+)\n", sass)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("arch", ARCHES[:2])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_vector_kernels_move_16_bytes(compiled, source: Path, arch: str) -> None:
    require_arch(arch)
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump was not found")
    binary, _ = compiled(source, arch)
    sass = subprocess.run([tool, "-sass", str(binary)], capture_output=True, text=True, check=True)
    seen = set()
    for name, body in kernels(sass.stdout).items():
        match = re.search(r"_kernelI(f|NS_4fp16E|NS_4bf16E)Li(\d+)E", name)
        if match is None or match[2] == "1":
            continue
        seen.add(match[1])
        streams = 3 if "backward" in name else 2 if "add_act" in name or "Lb1E" in name else 1
        assert len(re.findall(r"LDG\.E\.128", body)) >= streams, name
        assert re.search(r"STG\.E\.128", body), name
    assert seen == set(VECTOR_TYPES)
