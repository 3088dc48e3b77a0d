"""Large batches of a sequence: all layers of some images, then of the next, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sequence_support import OPS, convolution, needs_sequences, run, step, threads_set
from torch import Tensor

import resnet_fast

pytestmark = needs_sequences

BOUND = 64 << 20  # csrc/cpu/sequence.cpp, kArenaBytes
IMAGE = 64 * 128 * 128 * 4  # bytes of the one value that is neither input nor result
CONSTANTS = [*convolution(64, 8), *convolution(16, 64)]
STEPS = [
    *step("direct", 0, 1, constants=0, filters=64, act=1),
    *step("direct", 1, 2, constants=4, filters=16, window=(1, 1, 4, 4, 0, 0, 1, 1)),
]


@pytest.fixture(params=[1, 2, 6])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with threads_set(request.param) as count:
        yield count


def images(batch: int) -> Tensor:
    return torch.randn(batch, 8, 128, 128, generator=torch.Generator().manual_seed(batch))


def held(x: Tensor, watched: list[Tensor]) -> int:
    handle = OPS._make_sequence(CONSTANTS, STEPS, watched)
    try:
        return OPS._sequence_bytes(x, handle)
    finally:
        OPS._free_sequence(handle)


@pytest.mark.parametrize("batch", [15, 16, 17, 33])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pieces_give_what_single_images_give(
    batch: int, layout: torch.memory_format, threads: int
) -> None:
    x = images(batch).contiguous(memory_format=layout)
    expected = torch.cat([run(image, CONSTANTS, STEPS) for image in x.split(1)])
    resnet_fast.release_memory()
    # What the pool hands out next has been written to.
    run(torch.full_like(x, torch.nan), CONSTANTS, STEPS)
    assert torch.equal(run(x, CONSTANTS, STEPS), expected)


def test_memory_does_not_grow_with_the_batch(threads: int) -> None:
    least = 4 * max(threads, 2) * IMAGE  # images that share the weights they read
    assert held(images(3), []) == 3 * IMAGE
    for batch in (15, 17, 64):
        whole = batch * IMAGE
        assert min(whole, BOUND // 2) <= held(images(batch), []) <= min(whole, max(BOUND, least))


def test_a_changed_parameter_is_seen_before_the_first_piece() -> None:
    x, watched = images(33), torch.zeros(300)
    handle = OPS._make_sequence(CONSTANTS, STEPS, [watched])
    assert OPS._run_sequence(x, handle).shape == (33, 16, 32, 32)
    watched[299] = 1
    assert OPS._run_sequence(x, handle).numel() == 0
    OPS._free_sequence(handle)
