"""A residual block's training step with fewer passes over memory, where a GPU has the kernels.

Layer by layer a convolution's output crosses memory four times on its way through batch norm: it
is written, read to be measured, read to be normalised, and written again for the next convolution.
By :mod:`resnet_fast.ops.conv_stats` the convolution measures its own output, and the next one
normalises it while it loads: a block stores its convolutions' outputs and its own, nothing else.

The modules stay what they are, and their running statistics are kept as torch keeps them. A block
runs so only once it has been verified, gradients included, and has won against its layers on the
tensors at hand (:mod:`resnet_fast.plan.group`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.nn.prepared import hooks_of, is_autocasting, is_transforming, keep
from resnet_fast.nn.sequence import global_hooks
from resnet_fast.nn.site import FusedSite
from resnet_fast.ops.conv_stats import has_kernel, takes
from resnet_fast.plan import binding as _binding
from resnet_fast.plan.group import Choice, choose
from resnet_fast.plan.plan import LAYERS
from resnet_fast.plan.site import device_name
from resnet_fast.plan.training import (
    NAME,
    Measured,
    TrainBlock,
    TrainConv,
    key_of,
    run_fused,
    run_layers,
    step,
    variant_of,
    verify_training,
)


class BlockTraining:
    """How one block trains, by kind of input. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[int, Choice]] = {}

    def __reduce__(self) -> tuple[type[BlockTraining], tuple[()]]:
        return BlockTraining, ()

    def lines(self) -> Iterator[str]:
        """What was chosen, for ``explain()``."""
        for key, (generation, choice) in list(self._known.items()):
            if generation == _binding.generation():
                yield f"training by {choice} (batch {key[0]}, {'x'.join(map(str, key[1]))})"

    def forward(self, block: Any, x: Any) -> Tensor | None:
        """The block's output, None where its layers have to run one by one."""
        if not _may_run(x) or not _is_trainable(block):
            return None
        if is_autocasting(x.device):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        _, norms = _pairs(block)
        place = _place(block, x)
        if not has_kernels(x, place):
            return None
        # What wins at one image may lose at a hundred: each power of two is measured once.
        key = (1 << (x.shape[0] - 1).bit_length(), tuple(x.shape[1:]), x.dtype, x.device)
        generation, choice = self._known.get(key, (-1, None))
        if choice is None or generation != _binding.generation():
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            choice = _decide(x, place, norms)
            keep(self._known, key, (_binding.generation(), choice))
        if choice.name != NAME:
            return None
        y, measured = run_fused(x, place)
        update_running(norms, measured)
        return y


@torch.no_grad()
def update_running(norms: Sequence[Any], measured: Sequence[Measured]) -> None:
    """Keep the running statistics of ``norms`` as torch keeps them.

    Norms of one momentum, as networks have them, in six launches together rather than nine each.
    """
    tracked = [
        (norm, found)
        for norm, found in zip(norms, measured, strict=True)
        if norm.track_running_stats and norm.running_mean is not None
    ]
    kinds = {(norm.momentum, norm.running_mean.dtype) for norm, _ in tracked}
    if len(kinds) != 1 or next(iter(kinds))[0] is None or next(iter(kinds))[1] is torch.bfloat16:
        for norm, found in tracked:
            FusedSite._update_running(norm, *found)
        return
    ((momentum, dtype),) = kinds
    counts = [found.z.numel() // found.z.shape[1] for _, found in tracked]
    variances = torch._foreach_pow([found.rstd for _, found in tracked], -2.0)
    torch._foreach_sub_(variances, [norm.eps for norm, _ in tracked])
    torch._foreach_clamp_min_(variances, 0.0)
    torch._foreach_mul_(variances, [count / (count - 1) for count in counts])
    running = [norm.running_mean for norm, _ in tracked] + [norm.running_var for norm, _ in tracked]
    batch = [found.mean for _, found in tracked] + list(variances)
    torch._foreach_lerp_(running, [value.to(dtype) for value in batch], momentum)
    seen = [n.num_batches_tracked for n, _ in tracked if n.num_batches_tracked is not None]
    if seen:
        torch._foreach_add_(seen, 1)


def runs_on(x: Tensor) -> bool:
    """Whether the device of ``x`` may have the kernels."""
    return device_name(x.device).startswith("cuda")


def _may_run(x: Any) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dim() == 4
        and x.shape[0] > 0
        and runs_on(x)
        and x.is_contiguous(memory_format=torch.channels_last)
        and torch.is_grad_enabled()
        and not is_transforming()
        and _binding.tuning() is None
        and not torch.jit.is_tracing()
        and not global_hooks()
        and not torch.onnx.is_in_onnx_export()
    )


def _pairs(block: Any) -> tuple[list[Any], list[Any]]:
    """Convolutions and norms in order, the projection's last."""
    numbers = [n for n in (1, 2, 3) if hasattr(block, f"conv{n}")]
    convs = [getattr(block, f"conv{n}") for n in numbers]
    norms = [getattr(block, f"bn{n}") for n in numbers]
    if block.downsample is not None:
        convs.append(block.downsample[0])
        norms.append(block.downsample[1])
    return convs, norms


def _is_trainable(block: Any) -> bool:
    """Whether the block is convolutions and batch norms of torch's, in ``train()``, unhooked."""
    down = block.downsample
    if down is not None and (
        block.site_downsample is None
        or type(down) is not nn.Sequential
        or len(down) != 2
        or "forward" in down.__dict__
        or any(hooks_of(down))
    ):
        return False
    relu = block.relu
    if type(relu) is not nn.ReLU or "forward" in relu.__dict__ or any(hooks_of(relu)):
        return False
    return all(map(_is_plain, *_pairs(block)))


def _is_plain(conv: Any, norm: Any) -> bool:
    if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
        return False
    if conv.bias is not None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__ or "forward" in norm.__dict__:
        return False
    return norm.training and not any(hooks_of(conv)) and not any(hooks_of(norm))


def _place(block: Any, x: Tensor) -> TrainBlock:
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32

    def entry(conv: Any, norm: Any) -> TrainConv:
        gamma, beta = (None if t is None else t.to(wide) for t in (norm.weight, norm.bias))
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return TrainConv(conv.weight.to(x.dtype), gamma, beta, norm.eps, *geometry)

    entries = [entry(*pair) for pair in zip(*_pairs(block), strict=True)]
    down = None if block.downsample is None else entries.pop()
    return TrainBlock(tuple(entries), down, "relu")


def has_kernels(x: Tensor, place: TrainBlock) -> bool:
    """Whether each of the block's convolutions has one; where nothing runs, it is taken so."""
    if place.convs[0].weight.device != x.device:
        return False
    # On the meta device nothing runs: it is counted as where the kernels are.
    known = takes if x.is_meta else has_kernel
    first, *rest = place.convs
    if not known(x, first.weight, False) or not all(known(x, conv.weight, True) for conv in rest):
        return False
    return place.down is None or known(x, place.down.weight, False)


def _decide(x: Tensor, place: TrainBlock, norms: Sequence[Any]) -> Choice:
    """Verified and measured, forward and backward, on these tensors.

    The layers' norms update running statistics in their kernels, so ours are measured with them.
    """
    key, verify = key_of(x, place, device_name(x.device)), {NAME: lambda: verify_training(x, place)}
    if x.is_meta:
        return choose(key, x.device, verify, {})
    with torch.no_grad():
        grad = torch.randn_like(run_layers(x, place))
    scratch = copy.deepcopy(norms)

    def fused(x: Tensor, place: TrainBlock) -> tuple[Tensor, list[Measured]]:
        y, measured = run_fused(x, place)
        update_running(scratch, measured)
        return y, measured

    runs = {
        name: functools.partial(step, run, x, place, grad)
        for name, run in ((NAME, fused), (LAYERS, run_layers))
    }
    return choose(key, x.device, verify, runs, variant=variant_of(x, place, x.shape[0]))
