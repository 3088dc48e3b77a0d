"""A residual block's training step by ``conv_stats``: what it is, and how it is verified."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fast import ops
from resnet_fast.ops import activation
from resnet_fast.testing.budget import Verdict, in_formats, within_budget

#: The kernel's name in plans and in ``explain()``.
NAME = "conv_stats"


class TrainConv(NamedTuple):
    """A convolution under training batch norm, in the dtypes that the ops take."""

    weight: Tensor
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    eps: float
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        return self.stride, self.padding, self.dilation, self.groups


class TrainBlock(NamedTuple):
    """The convolutions of a block in order, and its projection shortcut, None where there is none.

    ``act`` follows each convolution but the projection, the last one behind the addition.
    """

    convs: tuple[TrainConv, ...]
    down: TrainConv | None
    act: str

    @property
    def parameters(self) -> list[Tensor]:
        """Every tensor that takes a gradient."""
        every = (*self.convs, *(() if self.down is None else (self.down,)))
        return [t for conv in every for t in conv[:3] if t is not None]

    def with_parameters(self, tensors: Sequence[Tensor]) -> TrainBlock:
        """The same with other tensors in the order of :attr:`parameters`."""
        left = iter(tensors)

        def taken(conv: TrainConv) -> TrainConv:
            weight = next(left)
            gamma, beta = (None if t is None else next(left) for t in conv[1:3])
            return conv._replace(weight=weight, bn_weight=gamma, bn_bias=beta)

        convs = tuple(map(taken, self.convs))
        return TrainBlock(convs, None if self.down is None else taken(self.down), self.act)


class Measured(NamedTuple):
    """A convolution's output with its batch statistics, for the running ones."""

    z: Tensor
    mean: Tensor
    rstd: Tensor


# A block's output, alone or with what was measured.
Run = Callable[[Tensor, TrainBlock], Any]


class Front(NamedTuple):
    """The batch norm and activation in front of a convolution; nothing by default."""

    mean: Tensor | None = None
    rstd: Tensor | None = None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    bn_eps: float = 0.0
    act: str = "none"


def run_fused(x: Tensor, block: TrainBlock) -> tuple[Tensor, list[Measured]]:
    """The block by its ops: ``conv_stats`` a convolution, and ``norm_act`` for its output.

    Returns:
        The output, and what was measured: the convolutions' in order, the projection's last.
    """
    found: list[Measured] = []
    z, front = x, Front()
    for conv in block.convs:
        found.append(_convolved(z, conv, front))
        z = found[-1].z
        front = Front(*found[-1][1:], conv.bn_weight, conv.bn_bias, conv.eps, block.act)
    residual = x
    if block.down is not None:
        down = block.down
        found.append(_convolved(x, down, Front()))
        affine = (down.bn_weight, down.bn_bias)
        residual = ops.norm_act(*found[-1], *affine, None, down.eps, "none")
    last = found[len(block.convs) - 1]
    y = ops.norm_act(*last, front.bn_weight, front.bn_bias, residual, front.bn_eps, block.act)
    return y, found


def _convolved(z: Tensor, conv: TrainConv, front: Front) -> Measured:
    geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    return Measured(*ops.conv_stats(z, conv.weight, *front, *geometry, conv.eps))


def run_layers(x: Tensor, block: TrainBlock) -> Tensor:
    """The block by the framework's ops: the definition, and what the kernels have to beat."""

    def layer(x: Tensor, conv: TrainConv) -> Tensor:
        z = F.conv2d(x, conv.weight, None, *conv.geometry)
        return F.batch_norm(z, None, None, conv.bn_weight, conv.bn_bias, True, 0.0, conv.eps)

    y = x
    for conv in block.convs[:-1]:
        y = activation.value(block.act, layer(y, conv))
    residual = x if block.down is None else layer(x, block.down)
    return activation.value(block.act, layer(y, block.convs[-1]) + residual)


def step(run: Run, x: Tensor, block: TrainBlock, grad: Tensor) -> list[Tensor]:
    """Output and gradients of x and of every parameter, of tensors that nothing else knows."""
    x = x.detach().requires_grad_()
    parameters = [p.detach().requires_grad_() for p in block.parameters]
    with torch.enable_grad():
        result = run(x, block.with_parameters(parameters))
        y = result[0] if isinstance(result, tuple) else result
        return [y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)]


def key_of(x: Tensor, block: TrainBlock, device: str) -> str:
    """Identity of the block without the batch, for the cache and for plans."""
    dtype = str(x.dtype).removeprefix("torch.")
    every = (*block.convs, *(() if block.down is None else (block.down,)))
    shapes = [
        "-".join(map(str, (*conv.weight.shape, *conv.stride, *conv.padding, *conv.dilation)))
        + ("" if conv.groups == 1 else f"g{conv.groups}")
        for conv in every
    ]
    form = f"{'+down' if block.down is not None else ''}"
    size = "x".join(map(str, x.shape[1:]))
    return f"{NAME}|{size}|{'|'.join(shapes)}{form}|{block.act}|{dtype}|{device}"


def verify_training(x: Tensor, block: TrainBlock) -> Verdict:
    """Compare output and gradients with fp64, on random numbers of these shapes at two images.

    With SiLU for the activation, and the output with the block's own as well: a gradient that a
    rounding sends to the other side of a kink says nothing of the kernels. A block that raises is a
    mismatch.

    Returns:
        The verdict of whichever result is nearest to its limit.
    """
    with torch.inference_mode(False):
        x, drawn = _draw(x, block)
        smooth = drawn._replace(act="silu")
        grad = torch.randn_like(run_layers(x, smooth))
        try:
            ours = step(run_fused, x, smooth, grad) + step(run_fused, x, drawn, grad)[:1]
        except (RuntimeError, ValueError, TypeError):
            return Verdict(False, math.inf, 0.0)
        given = in_formats(
            lambda a, b: step(run_layers, a, smooth, b) + step(run_layers, a, drawn, b)[:1], x, grad
        )
        wide = (smooth.with_parameters([p.double() for p in smooth.parameters]), grad.double())
        truth = step(run_layers, x.double(), *wide)
        truth += step(run_layers, x.double(), wide[0]._replace(act=drawn.act), wide[1])[:1]
        verdicts = [
            within_budget(mine, [g[i] for g in given], exact)
            for i, (mine, exact) in enumerate(zip(ours, truth, strict=True))
        ]
    return max(verdicts, key=lambda v: math.inf if not v.ok else v.error / (v.limit or 1.0))


def _draw(x: Tensor, block: TrainBlock) -> tuple[Tensor, TrainBlock]:
    """Random numbers of their shapes, the same at every call; weights that keep the variance."""
    generator = torch.Generator().manual_seed(sum(x.shape[1:]))

    def like(t: Tensor, deviation: float = 1.0) -> Tensor:
        values = torch.randn(t.shape, generator=generator) * deviation
        return values.to(t.device, t.dtype)

    images = torch.randn((2, *x.shape[1:]), generator=generator).to(x.device, x.dtype)
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    drawn = [like(p, math.prod(p.shape[1:]) ** -0.5) for p in block.parameters]
    return images.contiguous(memory_format=layout), block.with_parameters(drawn)
