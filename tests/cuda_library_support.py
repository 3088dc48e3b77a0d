"""The built CUDA library and its disassembler, for tests that read what nvcc has made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from resnet_fast import _library
from resnet_fast.kernels import cuda_resources

# That of `make cuda-arches` has code for every architecture that is checked.
EVERY = os.environ.get("RESNET_FAST_CUDA") == "all"


def built_library() -> tuple[Path, Path]:
    """The library and cuobjdump; the module is skipped where one of them is absent."""
    path = cuda_resources.library("_C_cuda_all" if EVERY else "_C_cuda")
    if path is None:
        if EVERY:
            raise RuntimeError("RESNET_FAST_CUDA=all python setup.py build_ext --inplace")
        reason = _library.status()["cuda"].reason
        pytest.skip(f"the CUDA library: {reason}", allow_module_level=True)
    try:
        return path, cuda_resources.find_cuobjdump()
    except cuda_resources.ResourceError as error:
        pytest.skip(str(error), allow_module_level=True)
