"""Builds the three native parts; everything declarative is in pyproject.toml.

resnet_fast._C_cpu   op library on the LibTorch stable ABI, always
resnet_fast._C_cuda  the same for CUDA, where nvcc and a CUDA build of torch are found
resnet_fast._native  pybind11 module without torch: build info, CPU features, kernel variants

Environment: RESNET_FAST_CUDA=0 skips CUDA, RESNET_FAST_CUDA=all builds only resnet_fast._C_cuda_all
for every architecture, RESNET_FAST_SANITIZE=address only resnet_fast._C_cpu_asan, =thread only
resnet_fast._C_cpu_tsan; TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX and MAX_JOBS as for any extension.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)

STABLE_TARGET = "0x020b000000000000"  # torch 2.11: the oldest torch that the libraries load in
# PTX is kept for 8.0: that of 9.0a runs on 9.0 only, that of 8.0 on everything later.
CUDA_ARCHES = "8.0+PTX;9.0a"
ALL_CUDA_ARCHES = "8.0;8.6;8.9;9.0a;10.0;12.0"
SANITIZE = os.environ.get("RESNET_FAST_SANITIZE", "")
SANITIZERS = {"address": "asan", "thread": "tsan"}
if SANITIZE and SANITIZE not in SANITIZERS:
    sys.exit(f"resnet_fast: RESNET_FAST_SANITIZE={SANITIZE}: expected one of {[*SANITIZERS]}")
ALL_CUDA = os.environ.get("RESNET_FAST_CUDA") == "all" and not SANITIZE
# A build beside the ordinary one has its own objects and configuration.
ASIDE = SANITIZE or ("all" if ALL_CUDA else "")
VARIANTS = "build/generated/cuda_variants.h"
CONFIGURATION = "-".join(filter(None, ("build/generated/configuration", ASIDE)))

BUILD_ADVICE = """
resnet_fast: the native build failed. It needs
  - a C++20 compiler:      apt-get install g++   (or: dnf install gcc-c++), or set CXX
  - Python's headers:      apt-get install python3-dev   (or: dnf install python3-devel)
  - torch, pybind11, ninja, setuptools and wheel in this environment, and
    pip install --no-build-isolation .   so that the build sees that torch
  - RESNET_FAST_CUDA=0     where only the CUDA part fails or is not wanted
"""


def cuda_home() -> Path | None:
    """The CUDA toolkit that has both nvcc and its headers.

    torch takes the parent of nvcc's folder for it, which is wrong where nvcc on PATH is a wrapper.
    """
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        guesses.append(str(Path(nvcc).resolve().parent.parent))
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True)
        guesses += re.findall(r"^#\$ (?:_?TOP_?)=(.+)$", dry.stderr.decode(), re.MULTILINE)
    guesses += ["/usr/local/cuda", *sorted(glob("/usr/local/cuda-*"), reverse=True)]
    for guess in guesses:
        if guess and (Path(guess) / "bin/nvcc").exists():
            home = Path(guess).resolve()
            if (home / "include/cuda_runtime.h").exists():
                return home
    return None


HOME = cuda_home()
if HOME is not None:
    os.environ["CUDA_HOME"] = str(HOME)  # before torch guesses

try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except ImportError as error:
    sys.exit(f"resnet_fast: {error.name or 'torch'} cannot be imported: {error}\n{BUILD_ADVICE}")


def cuda_absence() -> str | None:
    """Why the CUDA library is not built, or None."""
    if SANITIZE:
        return "sanitizer build"
    if os.environ.get("RESNET_FAST_CUDA", "1") == "0":
        return "switched off by RESNET_FAST_CUDA=0"
    if not glob("csrc/cuda/*.cu"):
        return "no CUDA sources"
    if HOME is None:
        return "nvcc was not found"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    nvcc = nvcc_version()
    if nvcc.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc {nvcc} and torch's CUDA {torch.version.cuda} differ in their major version"
    return None


def nvcc_version() -> str:
    if HOME is None:
        return ""
    text = subprocess.run([str(HOME / "bin/nvcc"), "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", text.stdout)
    return found.group(1) if found else ""


CUDA_ABSENCE = cuda_absence()
if ALL_CUDA:
    if CUDA_ABSENCE is not None:
        sys.exit(f"resnet_fast: the CUDA library cannot be built: {CUDA_ABSENCE}")
    os.environ["TORCH_CUDA_ARCH_LIST"] = ALL_CUDA_ARCHES
elif CUDA_ABSENCE is None:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHES)

WARNINGS = ["-Wall", "-Wextra", "-Werror"]
CXX_FLAGS = ["-std=c++20", "-fvisibility=hidden", *WARNINGS]
# No kernel reads errno or floating-point traps; both would keep loops from vectorising.
# -Wno-psabi: vectors wider than the baseline's registers never cross a call.
KERNEL_FLAGS = [
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
]


def is_clang() -> bool:
    compiler = os.environ.get("CXX") or "c++"
    try:
        text = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True)
    except OSError:
        return False
    return "clang" in text.stdout


if is_clang():
    KERNEL_FLAGS += ["-Wno-unknown-warning-option", "-Wno-pass-failed"]


def system_includes() -> list[str]:
    # As system headers, so that torch's own warnings are not ours to answer for.
    return [flag for path in include_paths() for flag in ("-isystem", path)]


def headers(*folders: str) -> list[str]:
    found = [f for folder in folders for f in glob(f"{folder}/*.h") + glob(f"{folder}/*.cuh")]
    return sorted([*found, "setup.py", CONFIGURATION])


def cpu_library() -> Extension:
    compile_args = [*CXX_FLAGS, *KERNEL_FLAGS, *system_includes()]
    compile_args += [f"-DTORCH_TARGET_VERSION={STABLE_TARGET}"]
    link_args: list[str] = []
    name = "resnet_fast._C_cpu"
    if SANITIZE:
        flag = f"-fsanitize={SANITIZE}"
        compile_args += [flag, "-fno-omit-frame-pointer", "-g1", "-O1"]
        link_args += [flag]
        name += f"_{SANITIZERS[SANITIZE]}"
    return Extension(
        name,
        ["csrc/ops.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        include_dirs=[str(ROOT / "csrc")],
        depends=headers("csrc", "csrc/math", "csrc/cpu"),
        extra_compile_args={"cxx": compile_args},
        extra_link_args=link_args,
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        language="c++",
        py_limited_api=True,  # free of Python: loaded by torch.ops.load_library
    )


def cuda_library() -> Extension:
    defines = [f"-DTORCH_TARGET_VERSION={STABLE_TARGET}", "-DUSE_CUDA"]
    return Extension(
        "resnet_fast._C_cuda_all" if ALL_CUDA else "resnet_fast._C_cuda",
        sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp")),
        include_dirs=[str(ROOT / "csrc")],
        depends=headers("csrc", "csrc/math", "csrc/cuda"),
        extra_compile_args={
            "cxx": [*CXX_FLAGS, "-O2", "-g0", *defines, *system_includes()],
            "nvcc": [
                "-std=c++20",
                "-O3",
                "-Xcompiler=-fvisibility=hidden",
                "-Werror=all-warnings",
                # That a later nvcc will drop an architecture is no error of this one.
                "-Wno-deprecated-gpu-targets",
                f"-Xcompiler={','.join(WARNINGS)}",
                "--expt-relaxed-constexpr",
                *defines,
                *system_includes(),
            ],
        },
        library_dirs=[*library_paths(), f"{HOME}/lib64", f"{HOME}/lib"],
        libraries=["torch_cpu", "torch_cuda", "cudart"],
        language="c++",
        py_limited_api=True,
    )


def cuda_objects(extension: Extension, folder: str) -> list[Path]:
    cuda = (source for source in extension.sources if source.endswith(".cu"))
    return [Path(folder, source).with_suffix(".o") for source in cuda]


def native_module() -> Extension:
    compile_args = [*CXX_FLAGS, "-O2", "-g0", "-isystem", pybind11.get_include()]
    compile_args += ["-isystem", sysconfig.get_paths()["include"]]
    return Extension(
        "resnet_fast._native",
        ["csrc/native.cpp"],
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "build/generated")],
        depends=[
            *headers("csrc", "csrc/math", "csrc/cpu", "csrc/cuda"),
            "build/generated/build_info.h",
            VARIANTS,
        ],
        extra_compile_args={"cxx": compile_args},
        language="c++",
    )


def write_if_changed(path: str, text: str) -> None:
    """Keeps the time stamp of a file whose content stays, so that nothing is rebuilt for it."""
    target = ROOT / path
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


def write_configuration() -> None:
    """What a binary depends on besides its sources; every extension lists this file."""
    names = ("CXX", "CC", "CXXFLAGS", "CFLAGS", "CPPFLAGS", "LDFLAGS", "TORCH_CUDA_ARCH_LIST")
    rows = [f"{name}={os.environ.get(name, '')}" for name in names]
    rows += [f"torch={torch.__version__}", f"cuda={HOME} {nvcc_version()}"]
    write_if_changed(CONFIGURATION, "\n".join(rows) + "\n")


def write_build_info() -> None:
    """What the build knows, as a header for resnet_fast._native."""
    facts = {
        "torch_version": torch.__version__,
        "stable_abi_target": "2.11",
        "cxx_flags": " ".join(CXX_FLAGS + KERNEL_FLAGS),
        "cuda_version": nvcc_version() if CUDA_ABSENCE is None else "",
        "cuda_absence": CUDA_ABSENCE or "",
        "cuda_arch_list": os.environ["TORCH_CUDA_ARCH_LIST"] if CUDA_ABSENCE is None else "",
    }
    rows = "\n".join(f'    {{"{key}", R"({value})"}},' for key, value in facts.items())
    text = (
        "#pragma once\n\n// Written by setup.py.\n"
        "inline constexpr const char* kBuildInfo[][2] = {\n" + rows + "\n};\n"
    )
    write_if_changed("build/generated/build_info.h", text)


def cuda_resources() -> ModuleType:
    """kernels/cuda_resources.py by its path: the package is not there yet."""
    name = "cuda_resources"
    spec = importlib.util.spec_from_file_location(name, ROOT / "kernels" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def op_of(stem: str) -> str:
    """The op that a source is named for; its stem where that is none."""
    ops = re.findall(r'"([a-z]\w*)\(', Path("csrc/ops.cpp").read_text())
    return max((op for op in ops if f"{stem}_".startswith(f"{op}_")), key=len, default=stem)


def write_cuda_variants(objects: Iterable[Path]) -> None:
    """What nvcc has made of each kernel, as a header for resnet_fast._native."""
    rows: dict[tuple[str, ...], tuple[int, ...]] = {}
    absence = ""
    for path in objects:
        resources = cuda_resources()
        try:
            variants, _ = resources.read(path, resources.find_cuobjdump(HOME))
        except resources.ResourceError as error:
            absence = str(error)
            print(f"resnet_fast: the CUDA kernels' resources are not known: {absence}")
            rows.clear()
            break
        for v in variants:
            figures = (v.registers, v.shared, v.dynamic_shared, v.local, v.threads)
            known = [-1 if figure is None else figure for figure in (*figures, v.blocks, v.warps)]
            rows[op_of(path.stem), path.stem, v.name, f"sm_{v.arch}"] = tuple(known)
    lines = (
        f"    {{{', '.join(map(json.dumps, (*names, *known)))}}},\n"
        for names, known in sorted(rows.items())
    )
    text = f"""#pragma once

#include <array>

// Written by setup.py. A figure below zero is not known.
struct CudaVariant {{
  const char *op, *source, *kernel, *arch;
  int registers, shared, dynamic_shared, local, threads, blocks, warps;
}};
inline constexpr const char* kCudaVariantsAbsence = {json.dumps(absence)};
inline constexpr std::array<CudaVariant, {len(rows)}> kCudaVariants = {{{{
{"".join(lines)}}}}};
"""
    write_if_changed(VARIANTS, text)


class Build(BuildExtension):
    """BuildExtension with advice on failure, and object files that outlive the call.

    The CUDA library comes before resnet_fast._native, which lists its kernels.
    """

    def run(self) -> None:
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        tag += f"-{ASIDE}" if ASIDE else ""
        # One folder of objects: a wheel links what a build in place has compiled.
        self.build_temp = str(ROOT / "build" / f"temp.{tag}")
        if self.inplace or getattr(self, "editable_mode", False):
            # An editable install would link in a temporary folder, each time.
            self.build_lib = str(ROOT / "build" / f"inplace.{tag}")
        # torch forces every link; the extensions' `depends` name all that matters.
        self.force = False
        compiler = (os.environ.get("CXX") or "c++").split()[0]
        if shutil.which(compiler) is None:
            sys.exit(f"resnet_fast: no C++ compiler: {compiler!r} is not on PATH\n{BUILD_ADVICE}")
        try:
            super().run()
        except Exception as error:
            sys.exit(f"{error}\n{BUILD_ADVICE}")

    def build_extensions(self) -> None:
        self.parallel = None  # the order counts; ninja compiles the files of each in parallel
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        objects = cuda_objects(ext, self.build_temp) if ext.name == "resnet_fast._C_cuda" else []
        self.force = not all(path.exists() for path in objects)
        super().build_extension(ext)
        if objects:
            write_cuda_variants(objects)


class BuildPython(build_py):
    """build_py into an empty folder: no wheel holds what only an earlier build put there."""

    def run(self) -> None:
        target = Path(self.build_lib).resolve()
        if ROOT / "build" in target.parents and not getattr(self, "editable_mode", False):
            shutil.rmtree(target, ignore_errors=True)
        super().run()


if CUDA_ABSENCE is not None:
    print(f"resnet_fast: the CUDA library is not built: {CUDA_ABSENCE}")
write_configuration()
if ALL_CUDA:
    extensions = [cuda_library()]
else:
    extensions = [cpu_library()]
    if not SANITIZE:
        write_build_info()
        if CUDA_ABSENCE is None:
            extensions += [cuda_library()]
        else:
            write_cuda_variants([])
        extensions += [native_module()]

setup(
    packages=[
        *find_packages(include=["resnet_fast", "resnet_fast.*"]),
        "resnet_fast.kernels",
    ],
    package_dir={"resnet_fast.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={
        "build_ext": Build.with_options(no_python_abi_suffix=False),
        "build_py": BuildPython,
    },
)
