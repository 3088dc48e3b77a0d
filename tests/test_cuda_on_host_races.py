"""The layer that runs CUDA kernels on the host: which accesses it takes for a race.

A scenario is a list of steps, one after the other: `"block"` and `"warp"` are barriers of all
threads, `"launch"` begins another one; any other step is of one thread, 0 to 63 in block 0, 100 to
163 in block 1: `(thread, what, byte)`.
"""

from __future__ import annotations

import pytest
import torch
from host_support import HostError, driver, run

ORDERS = ("ascending", "descending", "shuffled")
KINDS = ("", "reads", "writes", "reads global", "writes global", "warp", "block", "fence", "add")
Step = str | tuple[int, str, int]


def perform(steps: list[Step], order: str = "ascending") -> None:
    launches: list[list[list[int]]] = [[[] for _ in range(128)]]
    for step in steps:
        if step == "launch":
            launches.append([[] for _ in range(128)])
        elif isinstance(step, str):
            for thread in launches[-1]:
                thread.append(16 * KINDS.index(step))
        else:
            thread, what, byte = step
            launches[-1][thread // 100 * 64 + thread % 100].append(16 * KINDS.index(what) + byte)
    count = max(len(thread) for launch in launches for thread in launch)
    padded = [[thread + [0] * (count - len(thread)) for thread in launch] for launch in launches]
    run(
        driver("layer_races", tracing=True),
        tensors={"steps": torch.tensor(padded, dtype=torch.int32)},
        outputs={},
        order=order,
        launches=len(launches),
        blocks=2,
        count=count,
    )


IN_ORDER: dict[str, list[Step]] = {
    "one thread": [(3, "writes", 0), (3, "reads", 0), (3, "writes", 0)],
    "readers": [(3, "reads", 0), (4, "reads", 0), (40, "reads", 0)],
    "neighbouring bytes": [(3, "writes", 0), (4, "writes", 1), (40, "reads", 2)],
    "a warp's barrier": [(3, "writes", 0), "warp", (4, "reads", 0), "warp", (5, "writes", 0)],
    "an earlier reader of the warp": [(3, "reads", 0), "warp", (4, "reads", 0), (4, "writes", 0)],
    "a block's barrier": [(3, "writes", 0), "block", (40, "reads", 0), "block", (3, "writes", 0)],
    "shared memory of two blocks": [(3, "writes", 0), (104, "writes", 0)],
    "two launches": [(3, "writes global", 0), "launch", (104, "reads global", 0)],
    "a reader in an earlier launch": [(3, "reads global", 0), "launch", (104, "writes global", 0)],
    "blocks that read": [(3, "reads global", 0), (104, "reads global", 0)],
}

RACES: dict[str, tuple[list[Step], str]] = {
    "write, read": ([(3, "writes", 5), (4, "reads", 5)], r"shared \+5"),
    "read, write": ([(3, "reads", 5), (4, "writes", 5)], r"shared \+5"),
    "write, write": ([(3, "writes", 5), (4, "writes", 5)], r"shared \+5"),
    "a warp's barrier between warps": (
        [(3, "writes", 5), "warp", (40, "reads", 5)],
        r"shared \+5",
    ),
    "more barriers of the other warp": (
        [(3, "writes", 5), "warp", "warp", (40, "writes", 5)],
        r"shared \+5",
    ),
    "two readers, one of them writes": (
        [(3, "reads", 5), (4, "reads", 5), (4, "writes", 5)],
        r"shared \+5",
    ),
    "readers of two warps, the first writes": (
        [(3, "reads", 5), (40, "reads", 5), "warp", (3, "writes", 5)],
        r"shared \+5",
    ),
    "readers of two warps, the second writes": (
        [(3, "reads", 5), (40, "reads", 5), "warp", (40, "writes", 5)],
        r"shared \+5",
    ),
    "after a barrier again": (
        [(3, "writes", 5), "block", (4, "writes", 5), (40, "reads", 5)],
        r"shared \+5",
    ),
    "in global memory": ([(3, "writes global", 5), (40, "reads global", 5)], r"global \+5"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", IN_ORDER)
def test_what_is_in_order_passes(name: str, order: str) -> None:
    perform(IN_ORDER[name], order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", RACES)
def test_what_is_not_is_a_race(name: str, order: str) -> None:
    steps, place = RACES[name]
    with pytest.raises(
        HostError, match=f"race: a (read|write) by .* at {place}, which .* no barrier"
    ):
        perform(steps, order)


# Blocks run one after the other, here in ascending order: an access of block 0, one of block 1.
BETWEEN_BLOCKS = (("writes", "reads"), ("reads", "writes"), ("writes", "writes"))
GIVE: list[Step] = [(3, "fence", 0), "block", (7, "add", 2)]
TAKE: list[Step] = [(109, "add", 2), (109, "fence", 0)]


@pytest.mark.parametrize(("first", "second"), BETWEEN_BLOCKS)
def test_a_handover_orders_blocks(first: str, second: str) -> None:
    one: Step = (3, f"{first} global", 5)
    two: Step = (104, f"{second} global", 5)
    perform([one, *GIVE, *TAKE, "block", two])
    # The thread that fences and adds needs no barrier.
    perform([(7, f"{first} global", 5), (7, "fence", 0), (7, "add", 2), *TAKE, "block", two])
    perform([one, *GIVE, *TAKE, (109, f"{second} global", 5)])
    # The fence may follow the barrier.
    perform([one, "block", (7, "fence", 0), (7, "add", 2), *TAKE, "block", two])


INCOMPLETE: dict[str, list[Step]] = {
    "nothing": ["block"],
    "no fence before": ["block", (7, "add", 2), *TAKE, "block"],
    "no barrier before the sum": [(3, "fence", 0), (7, "add", 2), *TAKE, "block"],
    "a fence before the access is done": [(7, "fence", 0), (7, "add", 2), *TAKE, "block"],
    "nobody adds": [(3, "fence", 0), "block", (109, "fence", 0), "block"],
    "another counter": [*GIVE, (109, "add", 1), (109, "fence", 0), "block"],
    "no fence behind": [*GIVE, (109, "add", 2), "block"],
    "a fence of a thread that does not know": [*GIVE, (109, "add", 2), (104, "fence", 0), "block"],
    "no barrier behind": [*GIVE, *TAKE],
    "a fence too early": [*GIVE, (109, "fence", 0), (109, "add", 2), "block"],
}


@pytest.mark.parametrize(("first", "second"), BETWEEN_BLOCKS)
@pytest.mark.parametrize("name", INCOMPLETE)
def test_an_incomplete_handover_is_a_race(name: str, first: str, second: str) -> None:
    steps = [(3, f"{first} global", 5), *INCOMPLETE[name], (104, f"{second} global", 5)]
    with pytest.raises(
        HostError, match=r"global \+5, which thread 3 of another block .*no handover"
    ):
        perform(steps)


def test_of_the_readers_of_other_blocks_the_last_is_remembered() -> None:
    steps = [(3, "reads global", 5), "block", (104, "reads global", 5), (104, "writes global", 5)]
    with pytest.raises(HostError, match=r"race: a write .*which thread 3 of another block read"):
        perform(steps)
