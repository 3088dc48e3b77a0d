"""Triton kernels, one file per op, and their launchers.

Nothing here imports Triton until a kernel module is imported, so that a torch without
Triton (CPU builds) can import this package and ask `available()`.
"""

from __future__ import annotations

import importlib.util

__all__ = ["available"]


def available() -> tuple[bool, str]:
    """Whether the Triton kernels can be imported, and if not, why, in plain words.

    The package is looked up, not imported: importing Triton takes about a third of a second.
    """
    if importlib.util.find_spec("triton") is None:
        return False, "the triton package is not installed (CPU builds of torch come without it)"
    return True, "triton is installed"
