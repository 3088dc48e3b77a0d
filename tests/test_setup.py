"""setup.py says what a build lacks instead of showing a traceback, and builds nothing twice."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout of its own, of sources that compile in no time."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("resnet_fast", "kernels", "csrc"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "resnet_fast/py.typed", tmp_path / "resnet_fast")
    for package in ("resnet_fast", "kernels"):
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "csrc/ops.cpp").write_text("int resnet_fast_ops;\n")
    (tmp_path / "csrc/native.cpp").write_text('extern "C" void* PyInit__native() { return 0; }\n')
    return tmp_path


def setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env=os.environ | {"RESNET_FAST_CUDA": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("module", ("pybind11", "torch"))
def test_a_missing_module_is_named_with_advice(module: str, tmp_path: Path) -> None:
    absent = f'raise ModuleNotFoundError("No module named {module!r}", name="{module}")\n'
    (tmp_path / f"{module}.py").write_text(absent)
    result = setup(ROOT, "--version", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"{module} cannot be imported" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr


def test_a_missing_compiler_is_named_with_advice(tree: Path) -> None:
    result = setup(tree, "-q", "build_ext", "--inplace", CXX="/nonexistent")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    reason = "\nresnet_fast: no C++ compiler: '/nonexistent' is not on PATH\n"
    assert reason in f"\n{result.stderr}"
    assert "or set CXX" in result.stderr.partition(reason)[2]


def test_an_unknown_sanitizer_is_named(tree: Path) -> None:
    result = setup(tree, "--version", RESNET_FAST_SANITIZE="adress")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "RESNET_FAST_SANITIZE=adress: expected one of ['address', 'thread']" in result.stderr


def test_a_failing_compiler_ends_in_advice(tree: Path) -> None:
    result = setup(tree, "-q", "build_ext", "--inplace", CXX="/bin/false")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "the native build failed. It needs" in result.stderr
    assert result.stderr.rstrip().splitlines()[-1].lstrip().startswith("- RESNET_FAST_CUDA=0")


def objects(tree: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in tree.glob("build/**/*.o")}


def test_nothing_is_compiled_twice_and_a_wheel_holds_what_was_built(tree: Path) -> None:
    in_place = ("-q", "build_ext", "--inplace")
    first = setup(tree, *in_place)
    assert first.returncode == 0, first.stderr
    compiled = objects(tree)
    assert {path.name for path in compiled} == {"ops.o", "native.o"}
    assert setup(tree, *in_place).returncode == 0
    assert objects(tree) == compiled

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = {"_C_cpu.abi3.so", f"_native{suffix}"}
    assert {path.name for path in tree.glob("resnet_fast/*.so")} == built
    # What other builds have left, beside the sources and where wheels are put together.
    for name in ("_C_cpu.abi3.so", "_C_cpu_asan.abi3.so", "_C_cpu_tsan.abi3.so", "_C_cuda.abi3.so"):
        (tree / "resnet_fast" / name).write_text("stale")
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    gone = tree / f"build/lib.{tag}/resnet_fast/gone.py"
    gone.parent.mkdir(parents=True)
    gone.touch()
    made = setup(tree, "-q", "bdist_wheel")
    assert made.returncode == 0, made.stderr
    assert objects(tree) == compiled
    (file,) = tree.glob("dist/*.whl")
    with zipfile.ZipFile(file) as wheel:
        names = set(wheel.namelist())
        assert wheel.read("resnet_fast/_C_cpu.abi3.so")[:4] == b"\x7fELF"
    assert {Path(name).name for name in names if name.endswith(".so")} == built
    assert "resnet_fast/py.typed" in names and "resnet_fast/gone.py" not in names

    (tree / "csrc/ops.cpp").write_text("int resnet_fast_ops = 1;\n")
    assert setup(tree, *in_place).returncode == 0
    changed = objects(tree).items() ^ compiled.items()
    assert {path.name for path, _ in changed} == {"ops.o"}


KERNELS = """
#include "launch.cuh"

namespace resnet_fast {
template <typename T, int N>
__global__ void __launch_bounds__(64, 2) rotate_kernel(T* x) {
  extern __shared__ float part[];
  part[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = part[(threadIdx.x + N) % 64];
}
__global__ void scatter_kernel(float* x, int n) {
  __shared__ float shared[100];
  float local[200];
  for (int i = 0; i < 200; ++i) local[i] = x[i];
  for (int i = 0; i < n; ++i) local[i * 7 % 200] += x[i];
  for (int i = 0; i < 200; ++i) x[i] = local[i];
  shared[n] = x[n];
  __syncthreads();
  x[n] = shared[threadIdx.x];
}
void launch_rotate(float* x, int bytes) {
  allow_shared_memory<rotate_kernel<float, 3>>(0, std::integral_constant<int, 60000>{});
  rotate_kernel<float, 3><<<1, 64, 60000>>>(x);
  allow_shared_memory<rotate_kernel<float, 4>>(0, bytes);
  rotate_kernel<float, 4><<<1, 64, bytes>>>(x);
  scatter_kernel<<<1, 64>>>(x, 3);
}
}  // namespace resnet_fast
"""


@pytest.fixture
def cuda_tree(tree: Path) -> Path:
    """That of one CUDA source, with the real headers, for one architecture."""
    shutil.copytree(ROOT / "csrc/math", tree / "csrc/math")
    (tree / "csrc/cuda").mkdir()
    for path in (ROOT / "csrc/stable.h", *ROOT.glob("csrc/cuda/*.*h")):
        shutil.copy(path, tree / path.relative_to(ROOT))
    shutil.copy(ROOT / "kernels/cuda_resources.py", tree / "kernels")
    (tree / "csrc/native.cpp").write_text(
        '#include "cuda_variants.h"\nextern "C" void* PyInit__native() { return 0; }\n'
    )
    (tree / "csrc/ops.cpp").write_text('const char* ops[] = {"rotate(Tensor x)", "_part(int i)"};')
    (tree / "csrc/cuda/rotate_tile.cu").write_text(KERNELS)
    probe = setup(tree, "--version", RESNET_FAST_CUDA="1")
    if absence := re.search(r"the CUDA library is not built: (.*)", probe.stdout):
        pytest.skip(absence[1])
    return tree


def build_cuda(folder: Path) -> subprocess.CompletedProcess[str]:
    chosen = {"RESNET_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    return setup(folder, "-q", "build_ext", "--inplace", **chosen)


def test_the_kernels_that_nvcc_made_are_listed(cuda_tree: Path) -> None:
    """With -1 for what is unknown, once a build that changes them, and with a reason otherwise."""
    header = cuda_tree / "build/generated/cuda_variants.h"

    def rows() -> dict[str, list[int]]:
        lines = re.findall(
            r'\{"rotate", "rotate_tile", "(.+)", "sm_90a", (.+)\}', header.read_text()
        )
        return {name: [int(figure) for figure in figures.split(", ")] for name, figures in lines}

    def kept() -> dict[Path, int]:
        paths = [header, *cuda_tree.glob("build/**/*.o"), *cuda_tree.glob("resnet_fast/*.so")]
        return {path: path.stat().st_mtime_ns for path in paths}

    first = build_cuda(cuda_tree)
    assert first.returncode == 0, first.stderr + first.stdout
    listed = rows()
    assert set(listed) == {"rotate_kernel<fp32, 3>", "rotate_kernel<fp32, 4>", "scatter_kernel"}
    # Registers, static and dynamic shared memory, local memory, threads, blocks, warps.
    assert listed["rotate_kernel<fp32, 3>"][1:] == [0, 60000, 0, 64, 3, 6]
    assert listed["rotate_kernel<fp32, 4>"][1:] == [0, -1, 0, 64, -1, -1]
    scatter = listed["scatter_kernel"]
    assert scatter[3] >= 800 and [*scatter[1:3], *scatter[4:]] == [400, 0, -1, -1, -1]

    before = kept()
    assert build_cuda(cuda_tree).returncode == 0
    assert kept() == before

    source = cuda_tree / "csrc/cuda/rotate_tile.cu"
    source.write_text(KERNELS.replace("60000", "70000"))
    assert build_cuda(cuda_tree).returncode == 0
    assert rows()["rotate_kernel<fp32, 3>"][2] == 70000
    names = {path.name.partition(".")[0] for path, _ in kept().items() - before.items()}
    assert names >= {"cuda_variants", "rotate_tile", "native", "_C_cuda", "_native"}
    assert not names & {"ops"}

    reader = cuda_tree / "kernels/cuda_resources.py"
    reader.write_text(f'{reader.read_text()}def read(*_): raise ResourceError("out of ink")\n')
    without = build_cuda(cuda_tree)
    assert without.returncode == 0 and "are not known: out of ink" in without.stdout
    assert rows() == {} and 'kCudaVariantsAbsence = "out of ink"' in header.read_text()


@pytest.mark.parametrize(
    ("planted", "warning"),
    (
        ("__global__ void idle_kernel() { int unused; }", "unused"),
        ("int ignores(int parameter) { return 0; }", "parameter"),
    ),
    ids=("device", "host"),
)
def test_a_warning_in_cuda_is_an_error(cuda_tree: Path, planted: str, warning: str) -> None:
    (cuda_tree / "csrc/cuda/rotate_tile.cu").write_text(f'#include "launch.cuh"\n{planted}\n')
    result = build_cuda(cuda_tree)
    assert result.returncode == 1
    assert re.search(rf"error.*{warning}", result.stdout + result.stderr)
