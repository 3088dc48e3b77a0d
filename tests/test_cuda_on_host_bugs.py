"""The layer that runs CUDA kernels on the host: planted bugs of each kind are caught.

A toy product through copies, ldmatrix and mma, and a toy sum that blocks hand over, are right in
every order of blocks, warps and lanes; with a bug they end with the message for it.
"""

from __future__ import annotations

import re

import pytest
import torch
from host_support import ROOT, HostError, driver, run, sanitized
from torch import Tensor

ORDERS = ("ascending", "descending", "shuffled")


def pipeline(bug: str, order: str, *, depth: int = 56, tracing: bool = False) -> bool:
    """Whether the toy product, with a bug planted, is right."""
    generator = torch.Generator().manual_seed(7)
    rows = 45
    a, b = (
        torch.randint(-4, 5, (n, depth), generator=generator, dtype=torch.int8).half()
        for n in (rows, 8)
    )
    program = driver("layer_pipeline", tracing=tracing)
    words = {"bug": bug.replace(" ", "_"), "order": order}
    outputs = {"y": torch.float32}
    out = run(
        program, tensors={"a": a, "b": b}, outputs=outputs, rows=rows, depth=depth, seed=3, **words
    )
    return torch.equal(out["y"].view(rows, 8), a.float() @ b.float().T)


@pytest.mark.parametrize("tracing", [False, True], ids=["sanitized", "traced"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_correct_kernel_passes(order: str, tracing: bool) -> None:
    for depth in (8, 16, 56):
        assert pipeline("none", order, depth=depth, tracing=tracing)


RACE = r"race: {} by thread \d+ at shared \+\d+, {}"
CAUGHT = {
    "late wait": RACE.format("ldmatrix's read", r"where a cp.async of thread \d+ is under way"),
    "no barrier before reading": RACE.format(
        "ldmatrix's read", r"which thread \d+ wrote, and no barrier"
    ),
    "no barrier before overwriting": RACE.format(
        "cp.async's issue", r"which thread \d+ read, and no barrier"
    ),
    "copies past the end": r"copies: the thread exits and has not waited for \d of its copies",
    "a short buffer": r"out of range: a cp.async of 16 bytes at shared \+2544, of 2544 bytes",
    "a misaligned chunk": r"misaligned: a cp.async of 16 bytes at shared \+\d+",
    "half a warp multiplies": r"divergence: .*(mma of fp16.*ldmatrix|ldmatrix.*mma of fp16)",
    "a lane short": r"divergence: ldmatrix needs all lanes of the warp, and lane 31 does not exist",
    "a lane leaves": r"divergence: (ldmatrix needs all lanes of the warp, and lane 9 has exited|"
    r"the thread exits, and lane \d+ of its warp waits at ldmatrix)",
    "an early exit": r"barrier: .*(exits.*waits at sync_block|needs all threads.*has exited)",
    "barriers of two kinds": r"deadlock: everybody waits: threads 0 to 4 at sync_warp, "
    r"threads 5 to 31 at sync_block, threads 32 to 36 at sync_warp, threads 37 to 63 at sync_block",
    "a warp goes ahead": "race: ",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bug", CAUGHT)
def test_a_planted_bug_is_caught(bug: str, order: str) -> None:
    with pytest.raises(HostError, match="exit 4: cuda_on_host: " + CAUGHT[bug]):
        pipeline(bug, order)


def test_a_row_of_another_size_is_misaligned_in_global_memory() -> None:
    with pytest.raises(HostError, match=r"misaligned: cp\.async of 16 bytes from global"):
        pipeline("none", "ascending", depth=12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bug", ["another swizzle", "no barrier after staging"])
def test_a_planted_bug_gives_wrong_numbers(bug: str, order: str) -> None:
    assert not pipeline(bug, order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("a row too many", r"out of range: cp.async of 16 bytes from global .*outside every"),
        ("a row too many is stored", "AddressSanitizer.*use-after-poison.*WRITE of size 4"),
        ("staging behind the end", "AddressSanitizer.*use-after-poison.*WRITE of size 4"),
    ],
)
def test_a_planted_access_outside_is_caught(bug: str, message: str, order: str) -> None:
    if not sanitized():
        pytest.skip("no AddressSanitizer")
    with pytest.raises(HostError, match="(?s)" + message):
        pipeline(bug, order)


@pytest.mark.parametrize("order", ORDERS)
def test_a_write_to_the_guards_is_caught_without_sanitizers(order: str) -> None:
    with pytest.raises(HostError, match="out of range: a write outside y, of 1440 bytes"):
        pipeline("a row too many is stored", order, tracing=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bug", ["no barrier after staging", "staging over a stage"])
def test_a_race_of_plain_accesses_is_traced(bug: str, order: str) -> None:
    with pytest.raises(HostError, match=RACE.format("a write", r"which thread \d+ read")):
        pipeline(bug, order, tracing=True)


HANDOVERS = {
    "no fence before": "race: a read .* at partial .* of another block wrote, and no handover",
    "no barrier before": "race: a read .* at partial .* of another block wrote, and no handover",
    "no fence after": "race: a read .* at partial .* of another block wrote, and no handover",
    "no barrier after": r"race: a (read|write) .* at shared \+0",
    "two blocks in one place": "race: a write .* at partial .* of another block wrote",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bug", [None, *HANDOVERS])
def test_what_blocks_hand_over_is_traced(bug: str | None, order: str) -> None:
    x = torch.arange(320.0).view(5, 64)
    program = driver("layer_handover", tracing=True)
    words = {"bug": (bug or "none").replace(" ", "_"), "order": order}

    def total() -> Tensor:
        return run(program, tensors={"x": x}, outputs={"y": torch.float32}, blocks=5, **words)["y"]

    if bug is None:
        assert torch.equal(total(), x.sum(0))
    else:
        with pytest.raises(HostError, match=HANDOVERS[bug]):
            total()


KERNELS = "tests/cuda_on_host/layer_instructions.cuh"


def test_a_warp_barrier_orders_a_warp_and_no_more() -> None:
    patches = {KERNELS: [("  sync_warp();\n", ""), ("  sync_block();\n", "  sync_warp();\n")]}
    program = driver("layer_instructions", patches, tracing=True)
    words = torch.zeros(256, dtype=torch.int32)
    outputs = {"out": torch.int32}
    # Without a barrier a lane may not read what another has written, ldmatrix or not.
    for order in ORDERS:
        with pytest.raises(HostError, match=RACE.format("ldmatrix's read", "which thread")):
            given = {"in": words[:32], "data": words}
            run(
                program,
                tensors=given,
                outputs=outputs,
                order=order,
                kernel="load",
                words=128,
                bytes=1024,
            )
        # Lanes 31 and 63 read from the other warp.
        with pytest.raises(
            HostError, match=r"race: a (read|write) by thread (31|32|63|0) at shared"
        ):
            given = {"in": words[:64]}
            run(
                program,
                tensors=given,
                outputs=outputs,
                order=order,
                kernel="synchronise",
                words=65,
                bytes=0,
            )


def test_a_launch_has_the_limits_of_the_device() -> None:
    main = "tests/cuda_on_host/layer_handover.cpp"
    for old, new, message in (
        ("launch(blocks, kThreads, 16", "launch(blocks, 1025, 16", "launch: "),
        ("launch(blocks, kThreads, 16", "launch(blocks, kThreads, 232449", "launch: "),
    ):
        program = driver("layer_handover", {main: [(old, new)]}, tracing=True)
        x = torch.zeros(64)
        with pytest.raises(HostError, match=message):
            run(program, tensors={"x": x}, outputs={"y": torch.float32}, blocks=1, bug="none")


def test_patches_must_apply_and_cases_must_be_complete() -> None:
    main = "tests/cuda_on_host/layer_handover.cpp"
    with pytest.raises(AssertionError, match="has no 'no such text'"):
        driver("layer_handover", {main: [("no such text", "")]})
    with pytest.raises(AssertionError, match="does not include"):
        driver("layer_handover", {"csrc/cuda/add_act.cuh": [("a", "b")]})
    program = driver("layer_handover", tracing=True)
    assert program == driver("layer_handover", {main: [("add", "add")]}, tracing=True)
    with pytest.raises(HostError, match="case: no int blocks"):
        run(program, tensors={}, outputs={"y": torch.float32}, bug="none")
    with pytest.raises(HostError, match="case: order sideways"):
        run(program, tensors={}, outputs={}, order="sideways", bug="none", blocks=1)


def test_only_one_header_speaks_ptx() -> None:
    """What a kernel says outside ptx.cuh runs on the host as it is."""
    words = r"\basm\b|__shared__|__shfl|__sync|__cvta|__ldg|__threadfence|\batomic[A-Z]|__ballot"
    for source in sorted((ROOT / "csrc/cuda").iterdir()):
        if source.name != "ptx.cuh":
            found = re.search(words, source.read_text())
            assert found is None, f"{source.name}: {found and found[0]}"
