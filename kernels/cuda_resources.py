"""Resources of the CUDA kernels, read from what nvcc has made of them, without a GPU.

    python -m resnet_fast.kernels.cuda_resources [--out tests/data/cuda_resources.json]

reads the built CUDA library with cuobjdump and reports each kernel's registers, shared and local
memory, threads a block and occupancy. setup.py reads the objects by the same functions and loads
this file by its path, before there is a package: nothing but the standard library is imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_WARP = 32
_REGISTERS = 65536  # of a multiprocessor, in four parts that serve a quarter of its warps each
_REGISTER_UNIT = 256  # registers are handed out to a warp in these
_SHARED_UNIT = 128
_SHARED_OF_SYSTEM = 1024  # bytes of each block, from compute capability 8.0 on


class ResourceError(RuntimeError):
    """The resources cannot be read; the message says why."""


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor: resident warps and blocks, bytes of shared memory, and of a block."""

    warps: int
    blocks: int
    shared: int
    block_shared: int


def _limits(warps: int, blocks: int, shared_kb: int) -> Limits:
    return Limits(warps, blocks, shared_kb << 10, (shared_kb << 10) - _SHARED_OF_SYSTEM)


# CUDA programming guide, "Technical specifications per compute capability".
LIMITS = {
    "80": _limits(64, 32, 164),
    "86": _limits(48, 16, 100),
    "87": _limits(48, 16, 164),
    "89": _limits(48, 24, 100),
    "90": _limits(64, 32, 228),
    "100": _limits(64, 32, 228),
    "103": _limits(64, 32, 228),
    "110": _limits(48, 24, 228),
    "120": _limits(48, 24, 100),
    "121": _limits(48, 24, 100),
}


def limits(arch: str) -> Limits | None:
    """Those of "80" or "90a", or None for an architecture that is not in the table."""
    return LIMITS.get(arch.rstrip("af"))


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture.

    ``shared`` is static, ``dynamic_shared`` the most that a launch asks for, None where that is
    settled at the launch; ``local`` is stack and spills in bytes a thread; ``threads`` is the
    launch bound, None without one.
    """

    name: str
    arch: str
    registers: int
    shared: int
    dynamic_shared: int | None
    local: int
    threads: int | None

    @property
    def blocks(self) -> int | None:
        """Blocks a multiprocessor holds at once, or None where a figure is unknown."""
        if self.threads is None or self.dynamic_shared is None or limits(self.arch) is None:
            return None
        return occupancy(self.arch, self.registers, self.threads, self.shared + self.dynamic_shared)

    @property
    def warps(self) -> int | None:
        """Warps a multiprocessor holds at once, or None where a figure is unknown."""
        blocks = self.blocks
        return None if blocks is None or self.threads is None else blocks * _warps(self.threads)


def _warps(threads: int) -> int:
    return -(-threads // _WARP)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: str, registers: int, threads: int, shared: int) -> int:
    """Blocks that a multiprocessor holds, as the toolkit's cuda_occupancy.h counts them."""
    limit = limits(arch)
    if limit is None:
        raise ResourceError(f"the limits of sm_{arch} are not known")
    if shared > limit.block_shared:
        return 0
    warps = _warps(threads)
    by_warp = _round_up(registers * _WARP, _REGISTER_UNIT)
    by_registers = _REGISTERS // 4 // by_warp * 4 // warps
    by_shared = limit.shared // _round_up(shared + _SHARED_OF_SYSTEM, _SHARED_UNIT)
    return min(limit.blocks, limit.warps // warps, by_registers, by_shared)


def find_cuobjdump(home: str | Path | None = None) -> Path:
    """The toolkit's cuobjdump, or the one that comes with Triton."""
    homes = [home, os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [Path(folder) / "bin/cuobjdump" for folder in homes if folder]
    if on_path := shutil.which("cuobjdump"):
        found.append(Path(on_path))
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        found.append(Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump")
    for path in found:
        if path.exists():
            return path
    raise ResourceError("cuobjdump was found neither in a CUDA toolkit nor beside Triton")


def _run(tool: str | Path, *arguments: str, text: str = "") -> str:
    path = shutil.which(tool)
    if path is None:
        raise ResourceError(f"{tool} was not found")
    done = subprocess.run([path, *arguments], input=text, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        raise ResourceError(f"{Path(tool).name} failed: {said[0]}")
    return done.stdout


_TYPES = {
    "unsigned char": "uint8",
    "unsigned short": "uint16",
    "unsigned int": "uint32",
    "unsigned long": "uint64",
    "int": "int32",
    "long": "int64",
    "float": "fp32",
    "double": "fp64",
}
_TYPE = re.compile(rf"\b(?:{'|'.join(_TYPES)})\b")


def tidy(demangled: str) -> str:
    """``add_act_kernel<fp16, 8, uint32>`` of a kernel's demangled declaration."""
    name = re.sub(r"resnet_fast::|\(anonymous namespace\)::|^void ", "", demangled)
    depth = 0
    for index in reversed(range(len(name) if name.endswith(")") else 0)):
        depth += {")": 1, "(": -1}.get(name[index], 0)
        if depth == 0:
            name = name[:index]
            break
    name = re.sub(r"> +(?=>)", ">", re.sub(r"\((\w+)\)(-?\w+)", r"\1(\2)", name))
    return _TYPE.sub(lambda match: _TYPES[match[0]], name)


def _demangle(names: list[str]) -> dict[str, str]:
    text = _run("c++filt", text="\n".join(names))
    return dict(zip(names, text.splitlines(), strict=True))


_ENTRY = re.compile(
    r"^arch = sm_(?P<arch>\w+)$"
    r"|^ Function (?P<kernel>\S+):\n"
    r"  REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)"
    r"|^\.nv\.info\.(?P<info>\S+)$"
    r"|EIATTR_(?P<barrier>NUM_BARRIERS)$"
    r"|EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s*Value:\s*(?P<block>0x\w+ 0x\w+ 0x\w+)",
    re.MULTILINE,
)
_VERSION = re.compile(r"\btoolkit=(\d\d)\.?(\d+)")  # 13.0, and 124 of older cubins
# resnet_fast::allow_shared_memory<&(KERNEL), BYTES>(int, BYTES) of csrc/cuda/launch.cuh.
_GRANT = re.compile(r"allow_shared_memory<&\((.*)\), std::integral_constant<int, (\d+)> ?>\(int")


def _granted(binary: Path) -> dict[str, int]:
    """Dynamic shared memory of the launches, by the kernel's tidy name, from the host's symbols."""
    words = (line.split()[-1] for line in _run("nm", str(binary)).splitlines() if line.strip())
    names = [word for word in words if "allow_shared_memoryIXad" in word and "." not in word]
    found: dict[str, int] = {}
    for text in _demangle(names).values() if names else ():
        if match := _GRANT.search(text):
            kernel = tidy(match[1])
            found[kernel] = max(found.get(kernel, 0), int(match[2]))
    return found


def read(binary: Path, tool: Path) -> tuple[list[Resources], str | None]:
    """The kernels of an object or a library, by name and architecture, and nvcc's version."""
    text = _run(tool, "-res-usage", "-elf", str(binary))
    rows: dict[tuple[str, str], dict[str, int]] = {}
    threads: dict[tuple[str, str], int] = {}
    waiting: set[tuple[str, str]] = set()
    arch = described = ""
    for entry in _ENTRY.finditer(text):
        if entry["arch"]:
            arch = entry["arch"]
        elif entry["kernel"]:
            figures = {key: int(entry[key]) for key in ("registers", "stack", "shared", "local")}
            if rows.setdefault((entry["kernel"], arch), figures) != figures:
                raise ResourceError(f"{binary.name} has two kernels {entry['kernel']} for {arch}")
        elif entry["info"]:
            described = entry["info"]
        elif entry["barrier"]:
            waiting.add((described, arch))
        else:
            x, y, z = (int(size, 16) for size in entry["block"].split())
            threads[described, arch] = x * y * z
    if not rows:
        raise ResourceError(f"{tool.name} lists no kernel of {binary.name}")
    names = {m: tidy(d) for m, d in _demangle(sorted({name for name, _ in rows})).items()}
    if len(set(names.values())) < len(names):
        raise ResourceError(f"{binary.name} has kernels of one name")
    dynamic = _granted(binary)
    found = []
    for (mangled, arch), row in rows.items():
        # From 9.0 on the system's part is counted where a kernel has shared memory at all.
        system = _SHARED_OF_SYSTEM if int(arch.rstrip("af")) >= 90 and row["shared"] else 0
        static = row["shared"] - system
        # The code does not say that it has dynamic memory; what threads share takes a barrier.
        asks = (mangled, arch) in waiting and static == 0
        known = dynamic.get(names[mangled], None if asks else 0)
        found.append(
            Resources(
                name=names[mangled],
                arch=arch,
                registers=row["registers"],
                shared=static,
                dynamic_shared=known,
                local=row["stack"] + row["local"],
                threads=threads.get((mangled, arch)),
            )
        )
    version = _VERSION.search(text)
    ordered = sorted(found, key=lambda row: (row.name, int(row.arch.rstrip("af"))))
    return ordered, ".".join(version.groups()) if version else None


def instructions(binary: Path, arch: str, tool: Path) -> dict[str, str]:
    """Disassembly by the kernel's tidy name."""
    text = _run(tool, "-sass", "-arch", f"sm_{arch}", str(binary))
    parts = re.split(r"\n\s*Function : (\S+)\n", text)
    names = _demangle(parts[1::2])
    return {tidy(names[name]): body for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def library(stem: str = "_C_cuda") -> Path | None:
    """The built CUDA library of this package, or None."""
    spec = importlib.util.find_spec("resnet_fast")
    folders = spec.submodule_search_locations if spec is not None else None
    found = (path for folder in folders or () for path in sorted(Path(folder).glob(f"{stem}.*so")))
    return next(found, None)


def figures(rows: list[Resources]) -> dict[str, dict[str, int | None]]:
    """What is kept of each kernel, by "name/sm_XX"."""
    keys = ("registers", "shared", "dynamic_shared", "threads")
    return {f"{row.name}/sm_{row.arch}": {key: getattr(row, key) for key in keys} for row in rows}


def main(argv: list[str] | None = None) -> int:
    """Command line: reads the library, writes the figures, fails on a spill or an error."""
    parser = argparse.ArgumentParser(description="Resources of the built CUDA kernels.")
    parser.add_argument("--library", type=Path, default=library(), help="default: the package's")
    parser.add_argument("--out", type=Path, help="JSON file to write; other versions are kept")
    options = parser.parse_args(argv)
    if options.library is None:
        parser.error("the CUDA library is not built")
    try:
        rows, version = read(options.library, find_cuobjdump())
        if version is None:
            raise ResourceError(f"nothing says which nvcc made {options.library.name}")
    except ResourceError as error:
        parser.error(str(error))
    spilled = [row for row in rows if row.local > 0]
    for row in rows:
        held = "unknown occupancy" if row.blocks is None else f"{row.blocks} blocks at once"
        print(f"{row.name}/sm_{row.arch}: {row.registers} registers, {row.local} B local, {held}")
    if options.out is not None:
        kept = json.loads(options.out.read_text()) if options.out.exists() else {}
        kept[version] = figures(rows)
        lines = [
            f'  "{key}": {{\n'
            + ",\n".join(f'    "{name}": {json.dumps(row)}' for name, row in table.items())
            + "\n  }"
            for key, table in sorted(kept.items())
        ]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(rows)} kernels, {len(spilled)} with spills, nvcc {version}", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
