"""CUDA kernels on the host: builds the drivers of tests/cuda_on_host and runs them."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
LAYER = Path("tests/cuda_on_host")
BUILDS = ROOT / "build/cuda_on_host"
FLAGS = ("-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TRACING = ("-fsanitize=thread",)
# Longer than any case takes: what runs on spins.
SECONDS = 300
KEPT_SECONDS = 7 * 24 * 3600

Patches = Mapping[str, Sequence[tuple[str, str]]]


class HostError(Exception):
    """A driver failed; the text is what it wrote to stderr."""


def driver(op: str, patches: Patches | None = None, *, tracing: bool = False) -> Path:
    """The program of ``tests/cuda_on_host/<op>.cpp``, built with the sanitizers.

    ``patches`` replaces text in the files it names, each ``old`` once or more in its file, for
    programs with a planted bug. With ``tracing`` the search for races sees plain accesses to shared
    memory, outputs and scratch, and nobody sees those outside (tests/cuda_on_host/trace.h).
    Programs are kept under their content's hash.
    """
    sources = _sources(LAYER / f"{op}.cpp", patches or {})
    flags = (*FLAGS, *(TRACING if tracing else SANITIZERS if sanitized() else ()))
    key = hashlib.sha256(repr((sources, flags, _compiler_version())).encode()).hexdigest()[:24]
    program = BUILDS / f"{op}-{key}"
    if program.exists():
        os.utime(program)
        return program
    BUILDS.mkdir(parents=True, exist_ok=True)
    _forget_old_programs()
    with tempfile.TemporaryDirectory(dir=BUILDS) as folder:
        tree = Path(folder)
        for path, text in sources.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        compiling = [_compiler(), *flags, "-c", f"{LAYER}/{op}.cpp", "-o", "object"]
        linking = [_compiler(), *(() if tracing else flags), "object", "-o", "program"]
        for command in (compiling, linking):
            done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:8000]
        (tree / "program").replace(program)
    return program


def run(
    program: Path,
    *,
    tensors: Mapping[str, Tensor | None],
    outputs: Mapping[str, torch.dtype],
    order: str = "ascending",
    seed: int = 0,
    **values: int | float | str,
) -> dict[str, Tensor]:
    """The outputs of one case, flat; raises HostError when the program fails."""
    given = {name: raw(tensor) for name, tensor in tensors.items() if tensor is not None}
    lines = [_line(name, value) for name, value in values.items()]
    lines += [_line("order", order), _line("seed", seed)]
    lines += [f"tensor {name} {len(data)}" for name, data in given.items()]
    case = "\n".join([*lines, "end", ""]).encode() + b"".join(given.values())
    # Leaks are none of a kernel's; looking for them needs rights that a container may lack.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    try:
        done = subprocess.run(
            [program], input=case, capture_output=True, env=environment, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise HostError(f"no end within {SECONDS} s") from None
    if done.returncode != 0:
        raise HostError(f"exit {done.returncode}: {done.stderr.decode()[:4000]}")
    head, _, body = done.stdout.partition(b"end\n")
    results, start = {}, 0
    for line in head.decode().splitlines():
        _, name, size = line.split()
        data = numpy.frombuffer(body, numpy.uint8, int(size), start).copy()
        results[name] = torch.from_numpy(data).view(outputs[name])
        start += int(size)
    assert results.keys() == outputs.keys(), f"{sorted(results)} for {sorted(outputs)}"
    return results


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@functools.cache
def sanitized() -> bool:
    """Whether programs under AddressSanitizer can be built and run here."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program"
        command = [_compiler(), *SANITIZERS, "-x", "c++", "-", "-o", str(program)]
        built = subprocess.run(command, input=b"int main() {}", capture_output=True)
        return built.returncode == 0 and subprocess.run([program]).returncode == 0


def _line(name: str, value: int | float | str) -> str:
    if isinstance(value, str):
        assert not re.search(r"\s", value), f"{name}={value!r}: one word"
        return f"word {name} {value}"
    return f"number {name} {value!r}" if isinstance(value, float) else f"int {name} {int(value)}"


@functools.cache
def _compiler() -> str:
    if platform.machine() != "x86_64":
        pytest.skip("the threads of cuda_on_host switch stacks in x86-64 code")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return compiler


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout


def _sources(main: Path, patches: Patches) -> dict[str, str]:
    """``main`` and what it includes, by path from the root, patched."""
    sources: dict[str, str] = {}
    left = [main]
    while left:
        path = Path(os.path.normpath(left.pop()))
        if str(path) in sources or not (ROOT / path).exists():
            continue
        text = (ROOT / path).read_text()
        for old, new in patches.get(str(path), ()):
            assert old in text, f"{path} has no {old!r}"
            text = text.replace(old, new)
        sources[str(path)] = text
        left += [path.parent / name for name in re.findall(r'^ *#include "(.+)"', text, re.M)]
    missing = patches.keys() - sources.keys()
    assert not missing, f"{main} does not include {sorted(missing)}"
    return dict(sorted(sources.items()))


def _forget_old_programs() -> None:
    for old in BUILDS.iterdir():
        if time.time() - old.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
