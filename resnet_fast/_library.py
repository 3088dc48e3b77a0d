"""Loads the native parts and says, in plain words, why one is absent."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from .errors import LibraryError

_FOLDER = Path(__file__).resolve().parent
_SANITIZERS = {"address": "_asan", "thread": "_tsan"}
_ADVICE = "run: pip install --no-build-isolation ."


@dataclass(frozen=True)
class LibraryStatus:
    """One native part: whether it is loaded, from where, or why not."""

    name: str
    loaded: bool
    path: str | None
    reason: str | None


def _find(stem: str) -> Path | None:
    return next(iter(sorted(_FOLDER.glob(f"{stem}.*so"))), None)


def _op_defined(name: str) -> bool:
    try:
        return hasattr(torch.ops.resnet_fast, name)
    except RuntimeError:
        return False


def _load_library(name: str, stem: str) -> LibraryStatus:
    path = _find(stem)
    if path is None:
        return LibraryStatus(name, False, None, "not built")
    try:
        torch.ops.load_library(str(path))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return LibraryStatus(name, False, str(path), f"cannot be loaded: {lines[0]}")
    return LibraryStatus(name, True, str(path), None)


def _load_cpu() -> LibraryStatus:
    if _op_defined("conv_bn_act"):
        # A namespace is defined once in a process; a second copy would abort it.
        return LibraryStatus("cpu", True, None, None)
    suffix = _SANITIZERS.get(os.environ.get("RESNET_FAST_SANITIZE", ""), "")
    return _load_library("cpu", f"_C_cpu{suffix}")


def _load_cuda(cpu: LibraryStatus) -> LibraryStatus:
    path = _find("_C_cuda")
    if torch.version.cuda is None:
        where = None if path is None else str(path)
        return LibraryStatus("cuda", False, where, "needs a CUDA build of torch")
    if not cpu.loaded:
        return LibraryStatus("cuda", False, None, "needs the CPU library, which defines the ops")
    status = _load_library("cuda", "_C_cuda")
    module = native()
    if status.path is None and module is not None:
        absence = module.build_info().get("cuda_absence")
        if absence:
            return LibraryStatus("cuda", False, None, f"not built: {absence}")
    return status


@functools.cache
def _load_all() -> dict[str, LibraryStatus]:
    cpu = _load_cpu()
    module, reason = _import_native()
    native_path = None if module is None else str(module.__file__)
    return {
        "cpu": cpu,
        "cuda": _load_cuda(cpu),
        "native": LibraryStatus("native", module is not None, native_path, reason),
    }


@functools.cache
def _import_native() -> tuple[ModuleType | None, str | None]:
    try:
        from . import _native  # type: ignore[attr-defined]
    except ImportError as error:
        if _find("_native") is None:
            return None, "not built"
        return None, f"cannot be loaded: {error}"
    return _native, None


def load() -> None:
    """Loads what is there, once; never raises."""
    _load_all()


def status() -> dict[str, LibraryStatus]:
    """The native parts by name: cpu, cuda, native."""
    return dict(_load_all())


def require_cpu() -> None:
    """Raises LibraryError with the reason and the remedy when the op library is absent."""
    cpu = _load_all()["cpu"]
    if not cpu.loaded:
        raise LibraryError(f"the CPU op library is absent ({cpu.reason}); {_ADVICE}")


def native() -> ModuleType | None:
    """The pybind11 module resnet_fast._native, or None where it is not built."""
    return _import_native()[0]


def release_memory() -> int:
    """Give the memory kept for CPU layers back to the system; returns its bytes.

    Layers keep their large outputs' memory for the next forward, at most half more than was ever in
    use at once, as ``torch.cuda`` does on a GPU: page faults are a quarter of a forward otherwise.
    Tensors in use stay as they are.
    """
    return int(torch.ops.resnet_fast._release_memory()) if _op_defined("_release_memory") else 0
