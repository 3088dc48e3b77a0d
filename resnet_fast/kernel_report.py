"""The compiled kernels as text: a line an algorithm or an op, or a row a CUDA kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def summary(kernels: Sequence[dict[str, Any]]) -> list[str]:
    """One line an algorithm on the CPU, and one an op on CUDA, which has kernels by the hundred."""
    cpu: dict[str, list[str]] = {}
    cuda: dict[str, list[dict[str, Any]]] = {}
    for row in kernels:
        if row["device"] == "cuda":
            cuda.setdefault(row["op"], []).append(row)
        else:
            cpu.setdefault(row["name"].rpartition("/")[0], []).append(row["isa"])
    lines = [f"{name}: {', '.join(isas)}" for name, isas in cpu.items()]
    return lines + [f"cuda/{op}: {_resources(rows)}" for op, rows in cuda.items()]


def _resources(rows: Sequence[dict[str, Any]]) -> str:
    arches = ", ".join(dict.fromkeys(row["isa"] for row in rows))
    names = {row["name"].rpartition("/")[0] for row in rows}
    shared = max(row["shared"] + (row["dynamic_shared"] or 0) for row in rows)
    parts = [f"{len(names)} kernels for {arches}"]
    parts += [f"at most {max(row['registers'] for row in rows)} registers"]
    parts += [f"{shared / 1024:.4g} KB shared"] if shared else []
    local = max(row["local"] for row in rows)
    return ", ".join([*parts, f"{local} B spilled" if local else "none spilled"])


def table_of_variants(
    kernels: Sequence[dict[str, Any]] | None, build: dict[str, Any] | None
) -> Any:
    """The CUDA kernels as nvcc has made them, or why there are none.

    Shared memory in bytes a block, local memory in bytes a thread; blocks and warps are what a
    multiprocessor holds at once.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("kernel", "registers", "shared", "local", "threads", "blocks", "warps"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right", no_wrap=True)
    for row in kernels or ():
        if row["device"] == "cuda":
            known = row["dynamic_shared"] is not None
            shared = row["shared"] + row["dynamic_shared"] if known else None
            figures = [row["registers"], shared, row["local"]]
            figures += [row[key] for key in ("threads", "blocks", "warps")]
            table.add_row(row["name"], *("?" if f is None else str(f) for f in figures))
    if table.row_count:
        return table
    if build is None:
        return "no CUDA kernels: the native library is absent"
    return f"no CUDA kernels: {build['cuda_absence'] or build['cuda_resources_absence']}"
