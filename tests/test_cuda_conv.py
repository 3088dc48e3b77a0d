"""The CUDA library's own convolution as an op and as a candidate; its device code is in
tests/test_cuda_host_conv.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_cuda_ops import DEVICE, DTYPES, FORMATS, compare, needs_memory, normalised
from torch import Tensor

from resnet_fast.errors import ArgumentError, DTypeError
from resnet_fast.ops import conv_bn_act_cuda
from resnet_fast.plan.candidate import CANDIDATES, default_order
from resnet_fast.plan.site import Site
from resnet_fast.testing.cases import CASES, ConvCase, case, make

needs_library = pytest.mark.skipif(
    not conv_bn_act_cuda.AVAILABLE, reason="the CUDA library is not loaded"
)
TWO_D = [
    entry for entry in CASES["conv_bn_act"] if isinstance(entry, ConvCase) and len(entry.x) == 4
]
# Beside the cases of the contract: channels of whole vectors, for every tile and for groups.
WIDE = [
    ConvCase("wide_3x3", (2, 64, 9, 7), (136, 64, 3, 3), 1, 1, act="relu", residual=True),
    ConvCase("wide_1x1", (3, 256, 7, 7), (64, 256, 1, 1), act="silu"),
    ConvCase("deep_3x3", (1, 512, 7, 7), (96, 512, 3, 3), 1, 1, act="relu"),
    ConvCase("wide_groups", (2, 64, 9, 9), (64, 16, 3, 3), 2, 1, groups=4, act="relu"),
    *(
        ConvCase(f"group_of_{n}", (2, 32, 9, 7), (32, n, 3, 3), 1, 1, groups=32 // n, act="relu6")
        for n in (1, 2, 4, 8)
    ),
]


def op(**arguments: Any) -> Tensor:
    return conv_bn_act_cuda.run(**arguments)


def variant(entry: ConvCase, dtype: torch.dtype, tile: str = "") -> str:
    weight = entry.weight
    return conv_bn_act_cuda.variant(dtype, (2, weight[0], 7, 7), weight, entry.groups, tile)


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entry", [*TWO_D, *WIDE], ids=lambda entry: entry.name)
def test_every_tile_matches_the_reference(
    entry: ConvCase, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    tiles = [tile for tile in ("", *conv_bn_act_cuda.HALF_TILES) if variant(entry, dtype, tile)]
    assert tiles[0] == ""
    for tile in tiles:
        for splits in (0, 1, 3) if tile != "grouped" else (0,):
            run = lambda tile=tile, splits=splits, **arguments: op(  # noqa: E731
                **arguments, tile=tile, splits=splits
            )
            compare("conv_bn_act", run, entry, dtype, layout)


@pytest.mark.gpu
@needs_library
def test_the_same_bits_in_every_run_and_in_a_captured_graph() -> None:
    arguments = normalised(
        "conv_bn_act", make(WIDE[2], torch.float16, DEVICE, torch.channels_last, 0)
    )
    assert variant(WIDE[2], torch.float16).split("/")[1] != "1"  # in parts
    with torch.cuda.stream(torch.cuda.Stream()):
        first = op(**arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(**arguments)
    captured.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, first) and torch.equal(op(**arguments), first)


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_views_that_start_inside_a_storage(offset: int) -> None:
    """Copies as narrow as the address allows."""
    entry = WIDE[0]
    given = normalised("conv_bn_act", make(entry, torch.float16, DEVICE, torch.channels_last, 0))
    expected = op(**given, tile="128x64x3", splits=1)
    for name in ("x", "weight", "residual"):
        dense = given[name].contiguous(memory_format=torch.channels_last)
        store = torch.empty(dense.numel() + offset, dtype=dense.dtype, device=DEVICE)
        view = store[offset:].as_strided(dense.shape, dense.stride())
        view.copy_(dense)
        assert torch.equal(op(**{**given, name: view}, tile="128x64x3", splits=1), expected), name


@pytest.mark.gpu
@pytest.mark.slow
@needs_library
def test_more_than_two_to_the_31_elements() -> None:
    needs_memory(24)
    x = torch.full((129, 16, 1024, 1024), 1.0, device=DEVICE, dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    x[-1] = torch.randint(-3, 4, x.shape[1:], device=DEVICE).half()
    weight = torch.randint(-1, 2, (16, 16, 3, 3), device=DEVICE).half()

    def run(x: Tensor) -> Tensor:
        return op(x=x, weight=weight, scale=None, shift=None, residual=None, stride=[1, 1],
                  padding=[1, 1], dilation=[1, 1], groups=1, act="none")  # fmt: skip

    whole = run(x)
    for image in (0, 64, 128):
        assert torch.equal(whole[image], run(x[image : image + 1])[0]), image


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_opcheck(layout: torch.memory_format) -> None:
    given = normalised("conv_bn_act", make(WIDE[0], torch.float16, DEVICE, layout))
    overload = torch.ops.resnet_fast._conv_bn_act_cuda.default
    torch.library.opcheck(overload, (*given.values(), "", 0))


def meta(entry: ConvCase, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, Any]:
    given = normalised("conv_bn_act", make(entry, dtype, "cpu", layout))
    return {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in given.items()
    }


@needs_library
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_the_fake_allocates_as_the_contract_says(layout: torch.memory_format) -> None:
    given = meta(case("conv_bn_act", "3x3_odd"), torch.float16, layout)
    y = torch.ops.resnet_fast._conv_bn_act_cuda(**given, tile="", splits=0)
    assert y.shape == (2, 19, 7, 7) and y.is_contiguous(memory_format=layout)
    with pytest.raises(ArgumentError, match="residual"):
        wrong = {**given, "residual": given["residual"][:1]}
        torch.ops.resnet_fast._conv_bn_act_cuda(**wrong, tile="", splits=0)


@needs_library
def test_which_kernel_a_shape_takes() -> None:
    """Tile, parts of k and bytes of a copy: ResNet's layers, a stem, ResNeXt's groups."""
    half, single = torch.float16, torch.float32
    for dtype, out, weight, groups, expected in (
        (half, (128, 64, 56, 56), (64, 64, 3, 3), 1, "128x64x3/1/16"),
        (half, (128, 256, 56, 56), (256, 64, 1, 1), 1, "128x128x3/1/16"),
        (half, (1, 64, 56, 56), (64, 64, 3, 3), 1, "64x64x4/2/16"),
        (half, (1, 512, 7, 7), (512, 512, 3, 3), 1, "64x64x4/16/16"),
        (half, (1, 2048, 7, 7), (2048, 512, 1, 1), 1, "64x64x4/2/16"),
        (half, (128, 64, 112, 112), (64, 3, 7, 7), 1, "128x64x3/1/0"),
        (single, (128, 64, 112, 112), (64, 3, 7, 7), 1, "128x64x3/1/4"),
        (single, (128, 256, 56, 56), (256, 64, 1, 1), 1, "128x64x3/1/16"),
        (half, (128, 128, 56, 56), (128, 4, 3, 3), 32, "grouped"),
        (half, (128, 512, 14, 14), (512, 16, 3, 3), 32, "128x32x4/1/16"),
        (single, (128, 256, 28, 28), (256, 8, 3, 3), 32, "128x32x4/1/16"),
    ):
        assert conv_bn_act_cuda.variant(dtype, out, weight, groups, "") == expected
    for tile in conv_bn_act_cuda.HALF_TILES:
        single_too = tile in conv_bn_act_cuda.FLOAT_TILES and tile != "grouped"
        known = conv_bn_act_cuda.variant(single, (1, 64, 7, 7), (64, 64, 1, 1), 1, tile)
        assert bool(known) == single_too


SITE = Site(
    "conv_bn_act", (2, 64, 9, 9), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1, "relu",
    True, False, "float16", "channels_last", "cuda:Imaginary:sm_90",
)  # fmt: skip


@needs_library
def test_what_the_candidate_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = CANDIDATES["implicit_gemm"]
    assert candidate.reject(SITE) is None and default_order(SITE)[0] == "implicit_gemm"
    for change, words in (
        ({"device": "cpu"}, "CUDA"),
        ({"device": "cuda:Imaginary:sm_75"}, "sm_80"),
        ({"dtype": "float64"}, "fp32"),
        ({"weight_shape": (64, 64, 1, 33)}, "filters of up to"),
        ({"x_shape": (2, 64, 9, 9, 9), "weight_shape": (64, 64, 3, 3, 3)}, "two spatial"),
    ):
        assert words in (candidate.reject(replace(SITE, **change)) or ""), change
    assert CANDIDATES["implicit_gemm:128x128x3"].reject(SITE) is None
    single = replace(SITE, dtype="float32")
    assert "128x128x3" in (CANDIDATES["implicit_gemm:128x128x3"].reject(single) or "")
    assert "grouped" in (CANDIDATES["implicit_gemm:grouped"].reject(SITE) or "")
    depthwise = replace(single, weight_shape=(64, 1, 3, 3), groups=64)
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert (candidate.reject(single) is None) == allowed
        assert candidate.reject(depthwise) is None  # in fp32 whatever the flags say


@needs_library
def test_tf32_runs_only_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    given = meta(WIDE[0], torch.float32, torch.channels_last)
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        if allowed:
            assert op(**given).shape == given["residual"].shape
        else:
            with pytest.raises(DTypeError, match="TF32"):
                op(**given)
