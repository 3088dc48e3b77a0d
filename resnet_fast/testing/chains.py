"""Cases of ``residual_chain``: every form of a block's tail, at widths that divide no tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fast.testing import reordered as _reordered
from resnet_fast.testing.cases import _Draw


@dataclass(frozen=True)
class Chain:
    """One chain by shape; channels of x, h2, y and h, 0 where there is no such convolution.

    ``projected`` counts the channels of the block's own input where the shortcut is a projection,
    whose stride is ``step``: the block's stride, also where x is already at that size.
    """

    name: str
    x: tuple[int, int, int, int]
    mid: int
    outputs: int
    following: int
    projected: int = 0
    stride: int = 1
    step: int = 1
    conv2: bool = True
    conv3: bool = True
    act: str = "relu"


CHAINS = (
    Chain("identity", (2, 20, 7, 7), 24, 72, 40),
    Chain("projection", (3, 20, 7, 5), 24, 72, 40, 33),
    Chain("projection_stride2", (1, 20, 9, 7), 24, 72, 40, 33, 2, 2),
    Chain("tail", (2, 24, 7, 7), 24, 72, 40, conv2=False),
    Chain("tail_projection", (2, 24, 4, 4), 24, 72, 40, 33, step=2, conv2=False),
    Chain("last", (2, 20, 7, 7), 24, 72, 0),
    Chain("last_tail_projection", (1, 24, 4, 7), 24, 72, 0, 33, step=2, conv2=False),
    Chain("widening", (1, 64, 7, 7), 64, 256, 128),
    Chain("basic", (2, 20, 7, 7), 40, 40, 0, conv3=False),
    Chain("basic_projection", (1, 40, 7, 7), 40, 40, 0, 20, step=2, conv3=False),
    Chain("one_pixel", (1, 20, 1, 1), 24, 40, 24, 33),
    Chain("empty_batch", (0, 20, 7, 7), 24, 72, 40),
)


def make(
    chain: Chain,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    vectors: bool = True,
) -> dict[str, Any]:
    """The arguments of ``chain`` in the schema's order, with randomised batch-norm statistics.

    Without ``vectors`` there are no scales and shifts.
    """
    draw = _Draw(dtype, device, torch.channels_last, seed)
    images, channels, height, width = chain.x
    rows, columns = ((n - 1) // chain.stride + 1 for n in (height, width))

    def convolution(suffix: str, filters: int, inputs: int, taps: int = 1) -> dict[str, Any]:
        names = [part + suffix for part in ("weight", "scale", "shift")]
        if filters == 0:
            return dict.fromkeys(names)
        weight = draw.normal((filters, inputs, taps, taps), (inputs * taps * taps) ** -0.5)
        # Scales up to 4 would let the later layers' sums grow beyond what fp16 resolves.
        scale, shift = (v / 2 for v in draw.scale_shift(filters))
        values: tuple[Tensor | None, ...] = (weight, scale, shift)
        return dict(zip(names, values if vectors else (weight, None, None), strict=True))

    if chain.projected:
        size = [n if chain.step == 1 else 2 * n - 1 for n in (rows, columns)]
        residual = draw.normal((images, chain.projected, *size))
    else:
        residual = draw.normal((images, chain.outputs, rows, columns))
    return {
        "x": draw.normal(chain.x),
        "residual": residual,
        **convolution("2", chain.mid if chain.conv2 else 0, channels, 3),
        **convolution("3", chain.outputs if chain.conv3 else 0, chain.mid),
        **convolution("_d", chain.outputs if chain.projected else 0, chain.projected),
        **convolution("_n", chain.following, chain.outputs),
        "stride": chain.stride,
        "stride_d": chain.step,
        "act": chain.act,
    }


def reordered(**arguments: Any) -> tuple[Tensor, Tensor]:
    """The chain's layers, each with its axes read backwards (:mod:`.reordered`)."""

    def convolve(
        x: Tensor, suffix: str, residual: Tensor | None, stride: int, padding: int, act: str
    ) -> Tensor:
        parts = {part: arguments[part + suffix] for part in ("weight", "scale", "shift")}
        geometry = {"stride": stride, "padding": padding, "dilation": 1, "groups": 1}
        return _reordered.conv_bn_act(x=x, residual=residual, act=act, **parts, **geometry)

    x, shortcut, act = arguments["x"], arguments["residual"], arguments["act"]
    if arguments["weight_d"] is not None:
        shortcut = convolve(shortcut, "_d", None, arguments["stride_d"], 0, "none")
    if arguments["weight3"] is None:
        return convolve(x, "2", shortcut, arguments["stride"], 1, act), x.new_empty(0)
    if arguments["weight2"] is not None:
        x = convolve(x, "2", None, arguments["stride"], 1, act)
    y = convolve(x, "3", shortcut, 1, 0, act)
    if arguments["weight_n"] is None:
        return y, x.new_empty(0)
    return y, convolve(y, "_n", None, 1, 0, act)
