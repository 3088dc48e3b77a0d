"""Offline compilation of every kernel configuration, without a GPU.

    python -m resnet_fast.kernels.compile [--out tests/data/triton_resources.json]

compiles each variant for sm_80, sm_90 and sm_100 and reports registers, shared memory, spills
and matrix instructions. The variants are recorded from the launchers themselves, run on meta
tensors, so what is compiled here is what a launch would compile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import add_act, bn_act, chain_tiles, conv_bn_act, conv_tiles, residual_chain, stem_pool

ARCHITECTURES = (80, 90, 100)

# PTX opcode of each generation's matrix instruction, newest first.
_MATRIX = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync.aligned"}

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
}
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Variant:
    """One kernel as one launch would compile it: a name, and how to make that launch."""

    name: str
    launch: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    architectures: tuple[int, ...] = ARCHITECTURES
    # Which of the launch's kernels.
    index: int = 0


@dataclass(frozen=True)
class Resources:
    """What one variant takes on one architecture; spill is local memory in bytes a thread."""

    registers: int
    shared: int
    spill: int
    matrix: str


def _meta(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> torch.Tensor:
    fmt = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=fmt)


def _conv(dtype: torch.dtype, c: int, k: int, taps: int, stride: int, size: int) -> tuple[Any, ...]:
    x = _meta(32, c, size, size, dtype=dtype, last=True)
    w = _meta(k, c, taps, taps, dtype=dtype, last=True)
    out = (size + 2 * (taps // 2) - taps) // stride + 1
    residual = _meta(32, k, out, out, dtype=dtype, last=True)
    pad = [taps // 2] * 2
    return x, w, _meta(k), _meta(k), residual, [stride] * 2, pad, [1, 1], 1, "relu"


# Forms of the residual chain in ResNet-50 and ResNet-18: channels of h2 and of the next convolution
# (0: none), conv2 and conv3 in the chain, a projection's stride (0: none), pixels a side.
_CHAINS = {
    "first": (64, 64, True, True, 1, 56),
    "identity64": (64, 64, True, True, 0, 56),
    "widening64": (64, 128, True, True, 0, 56),
    "projection128": (128, 128, True, True, 2, 28),
    "identity128": (128, 128, True, True, 0, 28),
    "widening128": (128, 256, True, True, 0, 28),
    "tail_projection256": (256, 256, False, True, 2, 14),
    "tail256": (256, 256, False, True, 0, 14),
    "last_projection512": (512, 0, False, True, 2, 7),
    "basic_projection": (128, 0, True, False, 2, 28),
}


def _chain(
    dtype: torch.dtype, mid: int, following: int, conv2: bool, conv3: bool, down: int, size: int
) -> tuple[Any, ...]:
    outputs = 4 * mid if conv3 else mid
    inputs = mid if mid == 64 else 2 * mid if conv3 else mid // 2
    # conv2 carries the stride of a bottleneck.
    stride = max(1, down) if conv2 and conv3 else 1

    def convolution(filters: int, channels: int, taps: int, there: bool) -> tuple[Any, ...]:
        if not there:
            return None, None, None
        weight = _meta(filters, channels, taps, taps, dtype=dtype, last=True)
        return weight, _meta(filters), _meta(filters)

    side = size * max(1, down)
    residual = (32, inputs, side, side) if down else (32, outputs, size, size)
    return (
        _meta(32, mid, size * stride, size * stride, dtype=dtype, last=True),
        _meta(*residual, dtype=dtype, last=True),
        *convolution(mid, mid, 3, conv2),
        *convolution(outputs, mid, 1, conv3),
        *convolution(outputs, inputs, 1, down > 0),
        *convolution(following, outputs, 1, following > 0),
        *(stride, max(1, down), "relu"),
    )


def _chains() -> list[Variant]:
    """Each form with the configs that the architectures choose for it."""
    found = []
    for dtype, label in (
        (torch.float16, "fp16"),
        (torch.bfloat16, "bf16"),
        (torch.float32, "tf32"),
    ):
        for form, sizes in _CHAINS.items():
            mid, following, conv2, conv3, down, _ = sizes
            chosen: dict[chain_tiles.Config, list[int]] = {}
            for arch in ARCHITECTURES:
                config = chain_tiles.choose_config(
                    dtype, arch, mid, following, conv2 and conv3, down > 0
                )
                chosen.setdefault(config, []).append(arch)
            if form == "identity64" and label == "fp16":
                chosen[chain_tiles.UNROLLED] = [90]
                # What an unknown GPU gets, on the architecture that has its own.
                chosen[chain_tiles.SMALL] = list(ARCHITECTURES)
            for config, architectures in chosen.items():
                options = {"config": config, "allow_tf32": True}
                name = f"residual_chain/{form}/{config.name}/{label}"
                launch = residual_chain.launch_residual_chain
                args = _chain(dtype, *sizes)
                found.append(Variant(name, launch, args, options, tuple(architectures)))
    return found


def variants() -> list[Variant]:
    """Every kernel x config x dtype, with the whole epilogue, on ResNet-50's shapes.

    Those of single layers with 32-bit and with 64-bit offsets: a graph for any batch runs the
    latter.
    """
    found: list[Variant] = []

    def add(name: str, launch: Callable[..., torch.Tensor], *args: Any, **options: Any) -> None:
        tile, label = name.rsplit("/", 1)
        found.append(Variant(name, launch, args, {**options, "wide": False}))
        found.append(Variant(f"{tile}-wide/{label}", launch, args, {**options, "wide": True}))

    for dtype, label in (*_NAMES.items(), (torch.float32, "tf32")):
        conv = conv_bn_act.launch_conv_bn_act
        for config in conv_tiles.configs(dtype):
            options = {"config": config, "allow_tf32": label == "tf32", "splits": 1}
            if config.packed:
                c = {16: 1, 32: 3, 64: 8}[config.block_c]
                sites = {"conv7x7": _conv(dtype, c, 64, 7, 2, 224)}
            else:
                sites = {
                    "gemm": _conv(dtype, 256, 128, 1, 1, 28),
                    "conv3x3": _conv(dtype, 128, 128, 3, 1, 28),
                }
            for site, args in sites.items():
                add(f"conv_bn_act/{site}/{config.name}/{label}", conv, *args, **options)
        if label == "tf32":
            continue
        if dtype != torch.float32:
            tile = conv_tiles.HALF_CONFIGS[2]
            options = {"config": tile, "allow_tf32": False, "splits": 4}
            for site, size in (("gemm", (2048, 512, 1, 1, 7)), ("conv3x3", (512, 512, 3, 1, 7))):
                args = _conv(dtype, *size)
                name = f"conv_bn_act/{site}/{tile.name}/split/{label}"
                found.append(Variant(name, conv, args, {**options, "wide": False}))
            found.append(Variant(f"conv_bn_act/sum/{label}", conv, args, options, index=1))
        x, vector = _meta(32, 256, 28, 28, dtype=dtype), _meta(256)
        for tile in bn_act.CONFIGS:
            for layout, fmt in (("nchw", torch.contiguous_format), ("nhwc", torch.channels_last)):
                xl = x.contiguous(memory_format=fmt)
                name = f"bn_act/{layout}/{tile[0]}x{tile[1]}w{tile[2]}/{label}"
                add(name, bn_act.launch_bn_act, xl, vector, vector, xl, "gelu", config=tile)
        for flat in add_act.CONFIGS:
            name = f"{flat[0]}w{flat[1]}/{label}"
            add(f"add_act/{name}", add_act.launch_add_act, x, x, "gelu", config=flat)
            backward = add_act.launch_add_act_backward
            add(f"add_act_backward/{name}", backward, x, x, x, "gelu", config=flat)
    return found + _chains() + _stems()


def _stems() -> list[Variant]:
    """The stem on images in both layouts, and on raw ones of three channels and of four."""
    found: list[Variant] = []
    for dtype, label in (*_NAMES.items(), (torch.float32, "tf32")):
        tf32 = label == "tf32"
        images = {
            "nhwc": _meta(32, 3, 224, 224, dtype=dtype, last=True),
            "nchw": _meta(32, 3, 224, 224, dtype=dtype),
            "uint8": _meta(32, 3, 224, 224, dtype=torch.uint8, last=True),
            "uint8x4": _meta(32, 4, 224, 224, dtype=torch.uint8, last=True),
        }
        for site, x in images.items():
            c = x.shape[1]
            vectors = [_meta(c), _meta(c)] if x.dtype == torch.uint8 else [None, None]
            args = (x, _meta(64, c, 7, 7, dtype=dtype), _meta(64), _meta(64), *vectors, "relu")
            for config in stem_pool.configs(dtype, tf32):
                name = f"stem_pool/{site}/{config.name}/{label}"
                options = {"config": config, "allow_tf32": tf32}
                found.append(Variant(name, stem_pool.launch_stem_pool, args, options))
    return found


class Recorder:
    """Stands in for wrap_triton: keeps a kernel and its arguments instead of launching.

    `index` counts the launches; the last up to it is kept.
    """

    def __init__(self, index: int = 0) -> None:
        self.kernel: Any = None
        self.arguments: dict[str, Any] = {}
        self._left = index + 1

    def __call__(self, kernel: Any) -> Recorder:
        self._left -= 1
        if self._left >= 0:
            self.kernel = kernel
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*args: Any, **kwargs: Any) -> None:
            if self._left >= 0:
                self.arguments = {**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs}

        return record


def source(variant: Variant) -> tuple[ASTSource, dict[str, int]]:
    """The Triton source of a variant, specialised as a launch specialises it, and its options."""
    recorder = Recorder(variant.index)
    variant.launch(*variant.args, **variant.options, wrap_triton=recorder)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(recorder.kernel.params):
        value = recorder.arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
        else:
            signature[parameter.name] = "i32" if value <= _INT32_MAX else "i64"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    keys = ("num_warps", "num_stages")
    options = {k: recorder.arguments[k] for k in keys if k in recorder.arguments}
    return ASTSource(recorder.kernel, signature, constants, attributes), options


def _local_memory(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (stack frame) a thread, as cuobjdump reads them."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run(
            [tool, "-res-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    if match is None:
        raise RuntimeError(f"no resource usage in the output of {tool}")
    registers, stack, local = (int(v) for v in match.groups())
    return registers, stack + local


def compile_variant(variant: Variant, arch: int) -> Resources:
    """Compiles one variant for sm_<arch> and reads its resources from PTX and cubin."""
    ast, options = source(variant)
    kernel = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spill = _local_memory(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    matrix = next((name for name, opcode in _MATRIX.items() if opcode in ptx), "none")
    return Resources(registers, kernel.metadata.shared, spill, matrix)


def _compile_named(job: tuple[str, int]) -> tuple[str, dict[str, Any]]:
    name, arch = job
    variant = next(v for v in variants() if v.name == name)
    try:
        return f"{name}/sm_{arch}", asdict(compile_variant(variant, arch))
    except Exception as error:
        return f"{name}/sm_{arch}", {"error": f"{type(error).__name__}: {error}"}


def compile_jobs(
    jobs: Iterable[tuple[str, int]],
    processes: int = 2,
    report: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Resources of (variant's name, architecture) pairs, by "op/kernel/config/dtype/sm_XX".

    A variant that does not compile has the single entry "error".
    """
    table: dict[str, dict[str, Any]] = {}
    # Spawned: forking a process that has run torch's threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for name, row in pool.map(_compile_named, jobs):
            table[name] = row
            if report is not None:
                report(name, row)
    return dict(sorted(table.items()))


def main(argv: list[str] | None = None) -> int:
    """Command line: compiles everything, writes the figures, fails on a spill or an error."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel variant offline.")
    parser.add_argument("--out", type=Path, help="JSON file to write; other versions are kept")
    parser.add_argument("--only", default="", help="compile only variants containing this text")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    chosen = [v for v in variants() if options.only in v.name]
    table = compile_jobs(
        [(v.name, arch) for v in chosen for arch in v.architectures],
        processes=options.processes,
        report=lambda name, row: print(f"{name}: {row}", flush=True),
    )
    bad = sum("error" in row or row["spill"] > 0 for row in table.values())
    if options.out is not None:
        kept = json.loads(options.out.read_text()) if options.out.exists() else {}
        kept[triton.__version__] = dict(
            sorted({**kept.get(triton.__version__, {}), **table}.items())
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f'  "{version}": {{\n'
            + ",\n".join(f'    "{n}": {json.dumps(r)}' for n, r in rows.items())
            + "\n  }"
            for version, rows in sorted(kept.items())
        ]
        options.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(table)} compiled, {bad} with spills or errors", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
