"""The layer that runs CUDA kernels on the host: what its instructions do.

Expected values are worked out by hand from the figures of the PTX ISA manual, not by the layer's
own formulas.
"""

from __future__ import annotations

import pytest
import torch
from host_support import HostError, driver, run
from torch import Tensor

ORDERS = ("ascending", "descending", "shuffled")
POISON = -1  # 0xffffffff: NaN


def instruction(
    kernel: str, words: int, given: Tensor | None = None, *, tracing: bool = False, **more
) -> Tensor:
    """What tests/cuda_on_host/layer_instructions.cpp leaves in ``out``, as int32."""
    tensors = {"in": given, "data": more.pop("data", None)}
    more.setdefault("bytes", 0)
    program = driver("layer_instructions", tracing=tracing)
    outputs = {"out": torch.int32}
    return run(program, tensors=tensors, outputs=outputs, kernel=kernel, words=words, **more)["out"]


# Figure 104: which lane receives the element of row r, column c of an 8x8 matrix.
LDMATRIX = """
 0  0  1  1  2  2  3  3
 4  4  5  5  6  6  7  7
 8  8  9  9 10 10 11 11
12 12 13 13 14 14 15 15
16 16 17 17 18 18 19 19
20 20 21 21 22 22 23 23
24 24 25 25 26 26 27 27
28 28 29 29 30 30 31 31
"""


@pytest.mark.parametrize("order", ORDERS)
def test_ldmatrix_gives_each_lane_its_elements(order: str) -> None:
    # Row r of matrix i holds 100 i + 10 r + column, at a place of its own among 64.
    matrix, row, column = torch.meshgrid(
        torch.arange(4), torch.arange(8), torch.arange(8), indexing="ij"
    )
    rows = (100 * matrix + 10 * row + column).to(torch.int16).view(32, 8)
    place = torch.arange(32) * 5 % 64
    memory = torch.full((64, 8), -1, dtype=torch.int16)
    memory[place] = rows
    addresses = (place * 16).to(torch.int32)
    out = instruction("load", 128, addresses, data=memory, bytes=1024, order=order)
    elements = out.view(torch.int16).view(32, 4, 2)
    lanes = [[int(lane) for lane in line.split()] for line in LDMATRIX.split("\n") if line]
    for r, line in enumerate(lanes):
        for c, lane in enumerate(line):
            expected = [100 * i + 10 * r + c for i in range(4)]
            assert elements[lane, :, c % 2].tolist() == expected, f"row {r}, column {c}"


def test_ldmatrix_checks_addresses() -> None:
    addresses = torch.zeros(32, dtype=torch.int32)
    for lane, address, message in (
        (7, 1008 + 16, r"out of range: .*ldmatrix of 16 bytes at shared \+1024, of 1024"),
        (9, -16, r"out of range: .*ldmatrix of 16 bytes at shared -16"),
        (31, 8, r"misaligned: .*ldmatrix of 16 bytes at shared \+8 .*thread \(31, 0, 0\)"),
    ):
        wrong = addresses.clone()
        wrong[lane] = address
        data = torch.zeros(1024, dtype=torch.uint8)
        with pytest.raises(HostError, match=message):
            instruction("load", 128, wrong, data=data, bytes=1024)


# Lane and element of A, of B, of the sum, where their product falls (sections 9.7.14.5.7 and .8).
# The comment names row and k of A, k and column of B.
FRAGMENTS = {
    "16 bits": (
        ((0, 0), (0, 0), (0, 0)),  # 0 0, 0 0
        ((6, 2), (22, 0), (6, 3)),  # 9 4, 4 5
        ((31, 7), (31, 3), (31, 3)),  # 15 15, 15 7
        ((13, 4), (9, 2), (13, 0)),  # 3 10, 10 2
        ((20, 1), (24, 1), (23, 0)),  # 5 1, 1 6
        ((3, 6), (3, 2), (0, 2)),  # 8 14, 14 0
        ((29, 3), (13, 1), (29, 3)),  # 15 3, 3 3
        ((10, 5), (18, 3), (10, 0)),  # 2 13, 13 4
        ((0, 0), (0, 1), None),  # 0 0, 1 0
    ),
    "32 bits": (
        ((0, 0), (0, 0), (0, 0)),  # 0 0, 0 0
        ((6, 1), (22, 0), (6, 3)),  # 9 2, 2 5
        ((31, 3), (31, 1), (31, 3)),  # 15 7, 7 7
        ((13, 2), (9, 1), (13, 0)),  # 3 5, 5 2
        ((20, 0), (24, 0), (23, 0)),  # 5 0, 0 6
        ((3, 3), (3, 1), (0, 2)),  # 8 7, 7 0
        ((0, 0), (1, 0), None),  # 0 0, 1 0
    ),
}


def operands(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """A row for each lane: four words of A, two of B, the sum."""
    words = (tensor.view(torch.int32).view(32, -1) for tensor in (a, b, total))
    return torch.cat(list(words), dim=1)


@pytest.mark.parametrize("kernel", ["fp16", "bf16", "tf32"])
def test_mma_multiplies_what_the_fragments_hold(kernel: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[kernel]
    width = 4 // dtype.itemsize
    start = torch.arange(128.0).view(32, 4)
    for a_at, b_at, sum_at in FRAGMENTS["16 bits" if width == 2 else "32 bits"]:
        a, b = torch.zeros(32, 4 * width, dtype=dtype), torch.zeros(32, 2 * width, dtype=dtype)
        a[a_at], b[b_at] = 3, 5
        expected = start.clone()
        if sum_at is not None:
            expected[sum_at] += 15
        out = instruction(kernel, 128, operands(a, b, start)).view(torch.float32).view(32, 4)
        assert torch.equal(out, expected), f"A {a_at}, B {b_at}"


def test_mma_rounds_each_sum_and_cuts_tf32() -> None:
    # Row 0, column 0: 2^24 + 1 + 1 in fp32 stays 2^24, one by one.
    a, b = torch.zeros(32, 8, dtype=torch.float16), torch.zeros(32, 4, dtype=torch.float16)
    a[0, :2], b[0, :2] = 1, 1
    start = torch.zeros(32, 4)
    start[0, 0] = 2**24
    out = instruction("fp16", 128, operands(a, b, start)).view(torch.float32)
    assert out[0] == 2**24
    # A product of two odd 11-bit numbers is exact: (1 + 2^-10)^2 - 1 - 2^-9 = 2^-20.
    a[0, :2], b[0, :2] = torch.tensor([1 + 2**-10, 0]), torch.tensor([1 + 2**-10, 0])
    start[0, 0] = -1 - 2**-9
    out = instruction("fp16", 128, operands(a, b, start)).view(torch.float32)
    assert out[0] == 2**-20
    # Below its 10 bits of fraction TF32 is not read.
    a, b = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(32, 2, dtype=torch.int32)
    a[0, 0], b[0, 0] = 0x3F801FFF, 0x40003FFF
    out = instruction("tf32", 128, operands(a, b, torch.zeros(32, 4))).view(torch.float32)
    assert out[0] == 2 + 2**-9


def test_round_to_tf32() -> None:
    pairs = (
        (0x3F800000, 0x3F800000),
        (0x3F800FFF, 0x3F800000),
        (0x3F801000, 0x3F802000),  # ties go away from zero, from even
        (0x3F803000, 0x3F804000),  # and from odd
        (0xBF801000, 0xBF802000),
        (0x3FFFFFFF, 0x40000000),
        (0x00000FFF, 0x00000000),
        (0x80001000, 0x80002000),
        (0x7F7FFFFF, 0x7F800000),  # the largest finite number overflows
        (0x7F800000, 0x7F800000),
        (0xFF800000, 0xFF800000),
        (0x7FC00000, 0x7FC00000),
        (0xFFFFFFFF, 0xFFFFE000),
        (0x7F801FFF, 0x7F800000),  # a NaN whose payload is cut
    )
    given = torch.zeros(32, dtype=torch.int64)
    given[: len(pairs)] = torch.tensor([bits for bits, _ in pairs])
    out = instruction("round", 32, given.to(torch.int32)).tolist()
    rounded = [word & 0xFFFFFFFF for word in out[: len(pairs)]]
    assert [f"{word:08x}" for word in rounded] == [f"{word:08x}" for _, word in pairs]


def test_round_to_bf16() -> None:
    pairs = (
        (0x3F808000, 0x3F80),  # ties go to even
        (0x3F818000, 0x3F82),
        (0x3F808001, 0x3F81),
        (0x7F7FFFFF, 0x7F80),
        (0x00008001, 0x0001),
        (0x7FC00000, 0x7FFF),
        (0xFF800001, 0x7FFF),
    )
    given = torch.zeros(32, dtype=torch.int64)
    given[: len(pairs)] = torch.tensor([bits for bits, _ in pairs])
    out = instruction("narrow", 32, given.to(torch.int32)).tolist()
    assert out[: len(pairs)] == [rounded for _, rounded in pairs]


def test_maxima_are_nan_where_either_number_is() -> None:
    special = (1.0, -2.0, 0.0, torch.inf, -torch.inf, torch.nan)
    pairs = [(a, b) for a in special for b in special][:32]
    given = torch.tensor(pairs, dtype=torch.float32)
    out = instruction("larger", 32, given.view(torch.int32)).view(torch.float32)
    assert torch.equal(out.isnan(), given.isnan().any(1))
    assert torch.equal(out[~out.isnan()], torch.maximum(*given[~out.isnan()].unbind(1)))


def test_shared_memory_is_aligned_to_128_bytes_and_no_more_and_starts_as_nan() -> None:
    for address, pointer, last in instruction("look", 6).view(2, 3).tolist():
        assert (address % 256, pointer % 256, last) == (128, 128, POISON)


@pytest.mark.parametrize("tracing", [False, True], ids=["sanitized", "traced"])
@pytest.mark.parametrize("order", ORDERS)
def test_barriers_order_a_block(order: str, tracing: bool) -> None:
    given = torch.arange(64, dtype=torch.int32) * 3
    out = instruction("synchronise", 65, given, order=order, tracing=tracing).tolist()
    assert out == [6048, *range(3, 192, 3), 0]


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles(order: str) -> None:
    lane = torch.arange(32, dtype=torch.int32)
    value, wanted = lane * 11 + 5, lane * 7 + 1  # beyond 31 lanes repeat
    out = instruction("exchange", 192, torch.stack([value, wanted], 1), order=order).view(32, 6)
    # xor 5: 0 and 5, 1 and 4, 2 and 7, 3 and 6.
    assert out[:8, 0].tolist() == [60, 49, 82, 71, 16, 5, 38, 27]
    # down 3: the last three lanes have nobody 3 above.
    assert out[:, 1].tolist() == [*value[3:].tolist(), *value[29:].tolist()]
    # down 40: of a distance the instruction reads five bits, 8 here (seen on an H200).
    assert out[:, 2].tolist() == [*value[8:].tolist(), *value[24:].tolist()]
    assert out[:6, 3].tolist() == [16, 93, 170, 247, 324, 49]  # from 1, 8, 15, 22, 29, 36 = 4
    assert out[:, 4:].tolist() == [[11 * i + 5, i] for i in [*range(16, 32), *range(16)]]


@pytest.mark.parametrize("order", ORDERS)
def test_copies_land_when_their_group_is_waited_for(order: str) -> None:
    given = torch.arange(1, 513, dtype=torch.int32).view(32, 16) * 1000
    out = instruction("copy", 32 * 33, given, order=order).view(32, 33)
    for lane in range(32):
        words = given[lane].tolist()
        first, both, last = out[lane, :16].tolist(), out[lane, 16:32].tolist(), out[lane, 32]
        # The second group and the uncommitted copy to word 7 are still under way; word 15 is not
        # copied to.
        assert first == [*words[:7], POISON, *[POISON] * 7, 7]
        assert both == [*words[:7], POISON, *words[8:12], 0, 0, words[14], 7]
        assert last == words[0]


def test_reading_where_a_copy_is_under_way_is_a_race() -> None:
    given = torch.zeros(32, 16, dtype=torch.int32)
    with pytest.raises(
        HostError, match=r"race: a read by thread 0 at shared \+28, where a cp.async"
    ):
        instruction("copy", 32 * 33, given, tracing=True)


@pytest.mark.parametrize("order", ORDERS)
def test_atomic_addition(order: str) -> None:
    threads = 210
    out = instruction("add", 1 + threads, order=order, seed=5).tolist()
    assert out[0] == sum(range(threads))
    came = sorted(range(threads), key=lambda thread: (out[1 + thread], thread != 0))
    before = 0
    for thread in came:
        assert out[1 + thread] == before
        before += thread
    if order == "shuffled":
        assert came not in (sorted(came), sorted(came, reverse=True))


def test_the_order_of_blocks_and_threads() -> None:
    threads, block = 12 * 60, 60

    def visits(order: str, seed: int = 0) -> list[int]:
        out = instruction("visit", 1 + 2 * threads, order=order, seed=seed).tolist()
        assert out[0] == 2 * threads
        return out[1:]

    twice = [thread for thread in range(threads) for _ in range(2)]
    assert visits("ascending") == twice
    assert visits("descending") == twice[::-1]
    drawn = visits("shuffled", 1)
    assert sorted(drawn) == twice
    assert drawn == visits("shuffled", 1) != visits("shuffled", 2)
    # Blocks run one after the other, in an order of their own; their lanes mix, at an atomic too.
    each = [drawn[at : at + 2 * block] for at in range(0, 2 * threads, 2 * block)]
    came = [visited[0] // block for visited in each]
    assert came != sorted(came)
    assert all(
        {thread // block for thread in visited} == {b}
        for visited, b in zip(each, came, strict=True)
    )
    assert all(visited != sorted(visited) for visited in each)
    assert any(drawn[at] != drawn[at + 1] for at in range(0, 2 * threads, 2))
