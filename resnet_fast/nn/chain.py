"""A network's residual stages as a run of chains, where a GPU has their kernel.

Layer by layer a bottleneck's activations cross memory at each of its three convolutions. A chain
(:mod:`resnet_fast.ops.residual_chain`) takes a block from wherever its inner activation is, to its
output and on into the first convolution of the block behind it, so the stages run as

    conv1 | conv2 conv3 add conv1' | conv2 conv3 add conv1' | ... | conv2 conv3 add

one kernel between two bars. Which of the layers around a block join in follows from their widths;
whether they do, from verification and a measurement (:mod:`resnet_fast.plan.group`). The modules
stay what they are: what a chain derives from them is dropped as soon as any of it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from resnet_fast import _library, ops
from resnet_fast.nn.blocks import BasicBlock, Bottleneck
from resnet_fast.nn.guarded import guard_of, is_capturing, is_regular
from resnet_fast.nn.prepared import is_autocasting, is_transforming, keep
from resnet_fast.nn.sequence import Structure, global_hooks
from resnet_fast.nn.site import FusedSite
from resnet_fast.nn.stem import Stems
from resnet_fast.ops import _pack
from resnet_fast.ops._several import prepare
from resnet_fast.plan import binding as _binding
from resnet_fast.plan.chain import (
    MAX_CONV2,
    MAX_NEXT,
    NAME,
    ChainArgs,
    ChainSite,
    verify_chain,
)
from resnet_fast.plan.group import Choice, choose
from resnet_fast.plan.plan import LAYERS
from resnet_fast.plan.site import Site, device_name, dtype_name

# A convolution and its norm, None where there is no such.
Pair = tuple[Any, Any] | None
# From a block's inner activation and its input to its output, and the first convolution's output of
# the block behind, None where that is yet to be computed.
_Rest = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def runs_on(x: Tensor) -> bool:
    """Whether the device of ``x`` has the chain's kernel for its dtype."""
    return device_name(x.device).startswith("cuda") and ops.module(NAME).runs(x)


def may_run(x: Any) -> bool:
    """Whether a forward of ``x`` may be anything else than its layers one by one."""
    return (
        type(x) is Tensor
        and x.dim() == 4
        and x.shape[0] > 0
        and not torch.is_grad_enabled()
        and not is_autocasting(x.device)
        and not is_transforming()
        and _binding.tuning() is None
        and not torch.jit.is_tracing()
        and not torch.onnx.is_in_onnx_export()
        and not global_hooks()
        and runs_on(x)
    )


class Place:
    """A chain's convolutions with their norms, by role; None where it has no such."""

    def __init__(self, conv2: Pair, conv3: Pair, down: Pair, following: Pair) -> None:
        self.conv2, self.conv3, self.down, self.following = conv2, conv3, down, following

    @property
    def saves(self) -> bool:
        """Whether a chain stores less than the layers, which fuse what follows a convolution."""
        parts = (None if self.conv3 is None else self.conv2, self.down, self.following)
        return any(part is not None for part in parts)

    def roles(self) -> list[Pair]:
        """Convolution and norm by role, in the order of the op's arguments."""
        return [self.conv2, self.conv3, self.down, self.following]

    def args(self) -> ChainArgs:
        """The parameters as the modules hold them."""
        return ChainArgs(*(None if r is None else FusedSite.args(*r) for r in self.roles()))

    def site(self, inner: Tensor, x: Tensor) -> ChainSite:
        """The chain's place in a plan, from the inner activation and the shortcut's source."""
        place: list[Site | None] = []
        size = tuple(inner.shape[2:])
        for index, role in enumerate(self.roles()):
            if role is None:
                place.append(None)
                continue
            conv, norm = role
            shape = tuple(x.shape) if index == 2 else (inner.shape[0], conv.in_channels, *size)
            last = index == 1 or (index == 0 and self.conv3 is None)
            site = Site(
                op="conv_bn_act",
                x_shape=shape,
                weight_shape=tuple(conv.weight.shape),
                stride=tuple(conv.stride),
                padding=tuple(conv.padding),
                dilation=tuple(conv.dilation),
                groups=conv.groups,
                act="none" if index == 2 else "relu",
                affine=norm is not None,
                residual=last,
                dtype=dtype_name(x.dtype),
                layout="channels_last",
                device=device_name(x.device),
            )
            place.append(site)
            if index < 2:
                size = site.out_shape[2:]
        return ChainSite(*place)

    def fits(self, inner: Any, x: Any) -> bool:
        """Whether the two are what the op takes here: a site's residual may broadcast, or be no
        tensor."""
        for value in (inner, x):
            if type(value) is not Tensor or value.dim() != 4 or value.dtype is not inner.dtype:
                return False
        first = self.conv2 or self.conv3
        last = self.conv3 or self.conv2
        assert first is not None and last is not None
        stride = 1 if self.conv2 is None else self.conv2[0].stride[0]
        size = [(n - 1) // stride + 1 for n in inner.shape[2:]]
        channels, step = last[0].out_channels, 1
        if self.down is not None:
            channels, step = self.down[0].in_channels, self.down[0].stride[0]
        found = [x.shape[0], x.shape[1], *((n - 1) // step + 1 for n in x.shape[2:])]
        return inner.shape[1] == first[0].in_channels and found == [inner.shape[0], channels, *size]

    def decide(
        self, inner: Tensor, x: Tensor, layers: Callable[[], Any]
    ) -> tuple[Choice, Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]]:
        """What runs here, the chain or ``layers``, and the chain as a call of ``inner`` and ``x``.

        Verified and measured on these tensors; the call holds what it needs of the parameters.
        """
        site = self.site(inner, x)
        operands = _pack.derived(lambda: self.args().operands())

        prepared = prepare(NAME, inner, *operands, *site.strides, "relu")
        follows = self.following is not None

        def chain(inner: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
            y, h = prepared(inner, x)
            return y, h if follows else None

        choice = choose(
            site.key,
            x.device,
            {NAME: lambda: verify_chain(site, x.device)},
            {NAME: lambda: chain(inner, x), LAYERS: layers},
            variant=f"b{site.batch}",
        )
        return choice, chain

    def describe(self, choice: Choice) -> str:
        """A line of ``explain()``: what the chain takes in, and what became of it."""
        parts = [
            "conv2" if self.conv2 is not None else "",
            "conv3" if self.conv3 is not None else "",
            "add" if self.down is None else "projection and add",
            "the next conv1" if self.following is not None else "",
        ]
        return f"{', '.join(filter(None, parts))} by {choice}"


def is_joinable(conv: Any, most: int | None = MAX_CONV2) -> bool:
    """Whether a 3x3 convolution can be a chain's: dense, and of ``most`` filters where given."""
    dense = (conv.kernel_size, conv.padding, conv.dilation, conv.groups)
    return (
        dense == ((3, 3), (1, 1), (1, 1), 1)
        and conv.stride in ((1, 1), (2, 2))
        and (most is None or conv.out_channels <= most)
    )


class ChainBlock(Place):
    """One block of this package, and the first convolution of the block behind it."""

    def __init__(self, block: Any, behind: Any) -> None:
        self.block, self.behind = block, behind
        self.bottleneck = type(block) is Bottleneck
        down = block.downsample
        joins = not self.bottleneck or is_joinable(block.conv2)
        follows = type(behind) is Bottleneck and behind.conv1.out_channels <= MAX_NEXT
        super().__init__(
            _pair(block, 2) if joins else None,
            _pair(block, 3) if self.bottleneck else None,
            None if down is None else (down[0], down[1]),
            _pair(behind, 1) if self.bottleneck and follows else None,
        )

    def inner(self, x: Tensor, h: Tensor | None) -> Tensor:
        """What the chain starts from: the first convolution's output, or the second's."""
        h = self.block.start(x) if h is None else h
        return h if self.conv2 is not None else self.block.middle(h)

    def finish(self, x: Tensor, inner: Tensor) -> Tensor:
        """The block's output by its layers, from where the chain starts."""
        joined = self.bottleneck and self.conv2 is not None
        return self.block.finish(x, self.block.middle(inner) if joined else inner)

    def layers(self, x: Tensor, inner: Tensor) -> tuple[Tensor, Tensor | None]:
        """The chain's results by its layers."""
        y = self.finish(x, inner)
        return y, None if self.following is None else self.behind.start(y)


def _pair(block: Any, number: int) -> tuple[Any, Any]:
    return getattr(block, f"conv{number}"), getattr(block, f"bn{number}")


def chain_blocks(stages: Sequence[nn.Module], paths: Sequence[str]) -> list[tuple[str, ChainBlock]]:
    """Every block of ``stages`` with its path, and what a chain of it would take in."""
    named: list[tuple[str, Any]] = [
        (f"{path}.{i}", block)
        for path, stage in zip(paths, stages, strict=True)
        for i, block in enumerate(cast(Any, stage))
    ]
    behind = [block for _, block in named[1:]] + [None]
    return [(name, ChainBlock(b, n)) for (name, b), n in zip(named, behind, strict=True)]


class Chained:
    """The stages of one network for inputs of one kind, decided at their first forward.

    Attributes:
        lines: what was chosen for each block, for ``explain()``.
    """

    def __init__(self, stages: Sequence[nn.Module], paths: Sequence[str]) -> None:
        self.generation, self.epoch = _binding.generation(), _pack.epoch()
        self.blocks = chain_blocks(stages, paths)
        self._guard = guard_of(*stages)
        self._rests: list[_Rest] = []
        self.lines: list[str] = []

    def holds(self) -> bool:
        """Whether the modules, their parameters and the plan are what they were."""
        return (
            self.generation == _binding.generation()
            and self.epoch == _pack.epoch()
            and self._guard.holds()
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The last block's output; the first call decides on the way."""
        rests: list[_Rest] = []
        h: Tensor | None = None
        for i, (name, block) in enumerate(self.blocks):
            inner = block.inner(x, h)
            if not self._rests:
                rests.append(self._decide(name, block, x, inner))
            x, h = (self._rests or rests)[i](inner, x)
        self._rests = self._rests or rests
        return x

    def _decide(self, name: str, block: ChainBlock, x: Tensor, inner: Tensor) -> _Rest:
        if block.saves:
            choice, chain = block.decide(inner, x, lambda: block.layers(x, inner))
            self.lines.append(f"{name}: {block.describe(choice)}")
            if choice.name == NAME:
                return chain
        return lambda inner, x: (block.finish(x, inner), None)


class Chains:
    """The chained stages of one network, by kind of input. Copies and pickles start empty.

    Attributes:
        stems: the same for what is before them.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Chained] = {}
        self.stems = Stems()

    def __reduce__(self) -> tuple[type[Chains], tuple[()]]:
        return Chains, ()

    def lines(self) -> Iterator[str]:
        """What was chosen, for ``explain()``."""
        yield from self.stems.lines()
        for key, chained in list(self._known.items()):
            if chained.holds():
                size = "x".join(map(str, key[1]))
                for line in chained.lines:
                    yield f"{line} (batch {key[0]}, {size})"

    def forward(self, stages: Sequence[nn.Module], paths: Sequence[str], x: Tensor) -> Tensor:
        """``stages`` one after the other."""
        # What wins at one image may lose at a hundred: each power of two is measured once.
        key = (1 << (x.shape[0] - 1).bit_length(), tuple(x.shape[1:]), x.dtype, x.device)
        found = self._known.get(key)
        if found is None or not found.holds():
            found = None if is_capturing(x) else self._build(stages, paths)
            if found is None:
                return _by_layers(stages, x)
            keep(self._known, key, found)
        return found(x.contiguous(memory_format=torch.channels_last))

    @staticmethod
    def _build(stages: Sequence[nn.Module], paths: Sequence[str]) -> Chained | None:
        if _library.native() is None or not all(_is_chainable(stage) for stage in stages):
            return None
        return Chained(stages, paths) if Structure.below(*stages).is_plain() else None


def _by_layers(stages: Sequence[nn.Module], x: Tensor) -> Tensor:
    for stage in stages:
        x = stage(x)
    return x


def _is_chainable(stage: nn.Module) -> bool:
    """Whether the stage is blocks of this package's, in eval, as their classes made them."""
    if type(stage) is not nn.Sequential:
        return False
    return all(type(b) in (BasicBlock, Bottleneck) and _is_regular(b) for b in stage)


def _is_regular(block: Any) -> bool:
    numbers = (1, 2, 3) if type(block) is Bottleneck else (1, 2)
    pairs = [_pair(block, number) for number in numbers]
    if type(block.relu) is not nn.ReLU:
        return False
    if block.downsample is not None:
        down = block.downsample
        if block.site_downsample is None or type(down) is not nn.Sequential or len(down) != 2:
            return False
        geometry = (down[0].kernel_size, down[0].padding, down[0].groups)
        if geometry != ((1, 1), (0, 0), 1) or down[0].stride not in ((1, 1), (2, 2)):
            return False
        pairs.append((down[0], down[1]))
    pointwise = [pairs[0], pairs[2]] if type(block) is Bottleneck else []
    for conv, norm in pairs:
        if not is_regular(conv, norm):
            return False
    for conv, _ in pointwise:
        if (conv.kernel_size, conv.stride, conv.padding) != ((1, 1), (1, 1), (0, 0)):
            return False
        if conv.groups != 1:
            return False
    if type(block) is BasicBlock:
        conv = block.conv2
        last = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        return last == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    return True
