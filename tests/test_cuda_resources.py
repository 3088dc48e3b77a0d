"""The built CUDA kernels: no spills, the recorded figures, the instructions, each device's limits.

Reads the cubins in the library that was built; needs neither nvcc nor a GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_library_support import EVERY, built_library
from resnet_fast.kernels import cuda_resources

from resnet_fast import _library

LIBRARY, CUOBJDUMP = built_library()
ROWS, NVCC = cuda_resources.read(LIBRARY, CUOBJDUMP)
ARCHES = sorted({row.arch for row in ROWS})
ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "tests/data/cuda_resources.json"
REGENERATE = "python -m resnet_fast.kernels.cuda_resources --out tests/data/cuda_resources.json"

# Releases of one nvcc allocate a few registers differently. A warp's come in units of eight a
# thread: at most one unit is let pass.
REGISTERS = 8

# Bytes of local memory a thread where a block fewer on a multiprocessor would cost more: 64-bit
# indices are for tensors of 2^31 elements.
SPILLS = {
    f"channels_last_sums_kernel<bf16, 8, uint64, GradientSums<bf16>>/sm_{arch}": 8
    for arch in (100, 120)
}

# Kernels whose launcher computes their dynamic shared memory, and the most that it asks for.
SIZED_AT_LAUNCH = {
    r"(channels_last|planes)_sums_kernel": "combine_bytes of 256 threads: 18 KB",
    r"(finish|fold_moments)_kernel": "combine_bytes of 1024 threads: 24 KB",
    r"conv_grouped_kernel": "the weights of kGroupedWeights taps: 48 KB",
    r"stem_pool_kernel": "what choose_stem_tiling finds room for: half a multiprocessor's, or all",
}

# The devices that the library promises to run on.
DEVICES = ("80", "86", "89", "90a", "100", "120")


class Rule(NamedTuple):
    """Instructions that kernels must have, at least so often: both by regular expression."""

    op: str
    kernels: str
    instructions: dict[str, int]


LANES = "(?:fp16, 8|bf16, 8|fp32, 4)"  # fp64 is scalar by design
LOAD, STORE = r"LDG\.E\.128", r"STG\.E\.128"
PRODUCT = {r"HMMA\.": 1, r"LDSM\.": 1}  # matrix instruction, loads of its operands
COPY, WIDE_COPY = r"LDGSTS\.", r"LDGSTS\.E\.BYPASS\.128"  # to shared memory in the background
RULES = (
    Rule("add_act", f"add_act_kernel<{LANES}", {LOAD: 2, STORE: 1}),
    Rule("add_act", f"add_act_backward_kernel<{LANES}", {LOAD: 3, STORE: 1}),
    Rule("bn_act", rf"bn_act_\w+_kernel<{LANES}, false", {LOAD: 1, STORE: 1}),
    Rule("bn_act", rf"bn_act_\w+_kernel<{LANES}, true", {LOAD: 2, STORE: 1}),
    Rule("bn_act_train", rf"\w+_sums_kernel<{LANES}", {LOAD: 1}),
    Rule("bn_act_train", rf"\w+_map_kernel<{LANES}", {LOAD: 1, STORE: 1}),
    # A tile's last figure is the bytes of a copy, 0 for single elements.
    *(
        Rule(op, rf"{op}_kernel<\w+, ConvTile<[^>]*\b{width}>", PRODUCT | copy)
        for op in ("conv_bn_act", "conv_stats")
        for width, copy in ((16, {WIDE_COPY: 1}), (4, {COPY: 1}), (0, {}))
    ),
    # Operands are words where the image lies: 7 C units of 2 or 4 columns of filters, twice.
    Rule("stem_pool", r"stem_pool_kernel<", {r"HMMA\.": 32, WIDE_COPY: 1, STORE: 1}),
    Rule("max_pool", f"max_pool_kernel<{LANES}", {LOAD: 9, STORE: 1}),
    Rule("max_pool", f"max_pool_backward_kernel<{LANES}", {LOAD: 12, STORE: 4}),
)


def _recorded() -> dict[str, dict[str, int | None]]:
    versions = json.loads(FIGURES.read_text())
    if NVCC not in versions:
        pytest.skip(f"the figures are of nvcc {', '.join(versions)}, the library of {NVCC}")
    return versions[NVCC]


def _of_a_compared_arch(names: set[str], others: set[str]) -> set[str]:
    arches = {other.rpartition("/")[2] for other in others}
    return {name for name in names if name.rpartition("/")[2] in arches}


def test_no_kernel_spills() -> None:
    assert not [row for row in ROWS if row.local > SPILLS.get(f"{row.name}/sm_{row.arch}", 0)]


def test_launch_bounds_are_stated() -> None:
    assert not [row for row in ROWS if row.threads is None]


def test_dynamic_shared_memory_is_known() -> None:
    """A launcher gives ``allow_shared_memory`` a constant, or is named above with its bound."""
    unknown = {row.name for row in ROWS if row.dynamic_shared is None}
    assert not {name for name in unknown if not re.match("|".join(SIZED_AT_LAUNCH), name)}


def test_the_kernels_are_those_recorded() -> None:
    recorded, built = set(_recorded()), set(cuda_resources.figures(ROWS))
    assert _of_a_compared_arch(built, recorded) == _of_a_compared_arch(recorded, built), REGENERATE


def test_resources_are_as_recorded() -> None:
    recorded = _recorded()
    for name, row in cuda_resources.figures(ROWS).items():
        if kept := recorded.get(name):
            registers, limit = row.pop("registers"), kept.pop("registers")
            assert registers is not None and limit is not None
            assert registers <= limit + REGISTERS, (name, registers, limit)
            assert row == kept, name


def _code_for(device: str) -> str | None:
    """The architecture whose code a device runs: its own, an older one's of its major version, or
    the oldest as PTX."""

    def number(arch: str) -> int:
        return int(arch.rstrip("af"))

    if device in ARCHES:
        return device
    plain = [arch for arch in ARCHES if arch.isdigit() and number(arch) <= number(device)]
    native = [arch for arch in plain if number(arch) // 10 == number(device) // 10]
    return max(native, key=number, default=min(plain, key=number, default=None))


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_fit_the_device(device: str) -> None:
    """Shared memory of a block, and at least one block on a multiprocessor."""
    code = _code_for(device)
    if code is None:
        pytest.skip(f"no code for sm_{device} in a library for {', '.join(ARCHES)}")
    limit = cuda_resources.limits(device)
    assert limit is not None
    for row in ROWS:
        if row.arch == code and row.threads is not None:
            shared = row.shared + (row.dynamic_shared or 0)
            assert shared <= limit.block_shared, (row, f"{limit.block_shared} B on sm_{device}")
            assert cuda_resources.occupancy(device, row.registers, row.threads, shared), row


@cache
def _instructions(arch: str) -> dict[str, str]:
    return cuda_resources.instructions(LIBRARY, arch, CUOBJDUMP)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kernels)
def test_instructions(rule: Rule, arch: str) -> None:
    if not list(ROOT.glob(f"csrc/cuda/{rule.op}*.cu")):
        pytest.skip(f"{rule.op} has no CUDA source")
    chosen = {n: text for n, text in _instructions(arch).items() if re.match(rule.kernels, n)}
    assert chosen, f"no kernel {rule.kernels} of {rule.op}"
    for name, text in chosen.items():
        for instruction, least in rule.instructions.items():
            assert len(re.findall(rf"\b{instruction}", text)) >= least, (name, instruction)


@pytest.mark.skipif(EVERY, reason="the module lists the ordinary library")
def test_the_module_lists_what_the_library_holds() -> None:
    native = _library.native()
    assert native is not None
    if native.build_info()["cuda_resources_absence"]:
        pytest.skip(native.build_info()["cuda_resources_absence"])
    listed = [row for row in native.kernel_variants() if row["device"] == "cuda"]
    keys = ("registers", "shared", "dynamic_shared", "local", "threads", "blocks", "warps")
    built = {f"{row.name}/sm_{row.arch}": [getattr(row, key) for key in keys] for row in ROWS}
    found = {row["name"].split("/", 2)[2]: [row[key] for key in keys] for row in listed}
    assert found == built
    for row in listed:
        assert f"{row['source']}_".startswith(f"{row['op']}_")
        assert (ROOT / f"csrc/cuda/{row['source']}.cu").exists()


def test_the_command_writes_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data/figures.json"
    out.parent.mkdir()
    out.write_text('{"1.0": {"old_kernel/sm_80": {"registers": 1}}}')
    spilled = sum(row.local > 0 for row in ROWS)
    code = cuda_resources.main(["--library", str(LIBRARY), "--out", str(out)])
    assert code == (1 if spilled else 0)
    written = json.loads(out.read_text())
    assert written == {"1.0": {"old_kernel/sm_80": {"registers": 1}}} | {
        NVCC: cuda_resources.figures(ROWS)
    }
    assert f"{len(ROWS)} kernels, {spilled} with spills, nvcc {NVCC}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cuda_resources.main(["--library", str(out)])
    assert "cuobjdump" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("demangled", "name"),
    (
        ("resnet_fast::scan(float*, int)", "scan"),
        ("void resnet_fast::k<resnet_fast::fp16, 8, unsigned int>(int)", "k<fp16, 8, uint32>"),
        ("void resnet_fast::(anonymous namespace)::k<float, true>(float*)", "k<fp32, true>"),
        ("void k<(resnet_fast::Act)3, -1>(void (*)(int))", "k<Act(3), -1>"),
        ("void k<Tile<2, Pair<double> > >(long)", "k<Tile<2, Pair<fp64>>>"),
    ),
)
def test_tidy_names(demangled: str, name: str) -> None:
    assert cuda_resources.tidy(demangled) == name


OCCUPANCY = """
#include <cstdio>
#include <cstdlib>
#include <cuda_occupancy.h>
int main() {
  int major, minor, warps, shared, block_shared, registers, threads, bytes;
  while (std::scanf("%d %d %d %d %d %d %d %d", &major, &minor, &warps, &shared, &block_shared,
                    &registers, &threads, &bytes) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = major, device.computeMinor = minor, device.numSms = 1;
    device.warpSize = 32, device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = shared;
    device.sharedMemPerBlockOptin = block_shared, device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = bytes;
    cudaOccResult result;
    const cudaOccDeviceState state;
    const auto error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state,
                                                               threads, bytes);
    if (error != CUDA_OCC_SUCCESS) return 1;
    std::printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_is_that_of_the_toolkit(tmp_path: Path) -> None:
    include = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if not (include / "cuda_occupancy.h").exists():
        pytest.skip("the toolkit has no cuda_occupancy.h")
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(OCCUPANCY)
    subprocess.run(["g++", "-isystem", include, source, "-o", program], check=True)
    cases = [
        (arch, registers, threads, shared)
        for arch in cuda_resources.LIMITS
        for registers in (16, 40, 97, 128, 168, 255)
        for threads in (32, 96, 128, 256, 384, 1024)
        for shared in (0, 100, 20 << 10, 49 << 10, 99 << 10, 100 << 10, 163 << 10, 227 << 10)
    ]
    lines = []
    for arch, registers, threads, shared in cases:
        of = cuda_resources.LIMITS[arch]
        device = (int(arch) // 10, int(arch) % 10, of.warps, of.shared, of.block_shared)
        lines.append(" ".join(map(str, (*device, registers, threads, shared))))
    done = subprocess.run(
        [program], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    expected = [int(line) for line in done.stdout.split()]
    assert [cuda_resources.occupancy(*case) for case in cases] == expected
