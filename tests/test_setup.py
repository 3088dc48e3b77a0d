"""setup.py says what a build lacks instead of showing a traceback, and builds nothing twice."""

from __future__ import annotations

import os
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
    for name in ("_C_cpu.abi3.so", "_C_cpu_asan.abi3.so", "_C_cuda.abi3.so"):
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
