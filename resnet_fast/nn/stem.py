"""A network's stem, convolution to pooling, as one kernel where a GPU has it and it wins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import _library
from resnet_fast.nn.blocks import SiteReLU, conv_bn_relu
from resnet_fast.nn.guarded import guard_of, is_capturing, is_regular
from resnet_fast.nn.prepared import keep
from resnet_fast.nn.sequence import Structure, max_pool
from resnet_fast.nn.site import FusedSite
from resnet_fast.ops import _pack
from resnet_fast.plan import binding as _binding
from resnet_fast.plan.group import Choice, choose
from resnet_fast.plan.plan import LAYERS
from resnet_fast.plan.site import Site, device_name, dtype_name
from resnet_fast.plan.stem import kernels, key_of, operands, prepare_stem, verify_stem

POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


class StemPlace:
    """The stem's convolution and norm, as a place that a kernel of several layers may take."""

    def __init__(self, conv: Any, bn: Any) -> None:
        self.conv, self.bn = conv, bn

    def decide(
        self, x: Tensor, layers: Callable[[], Any]
    ) -> tuple[Choice, Callable[[Tensor], Tensor] | None]:
        """What runs here, a kernel or ``layers``, and the kernel as a call of the image.

        Verified and measured on ``x``; the call holds what it needs of the parameters.
        """
        conv = self.conv
        args = FusedSite.args(conv, self.bn)
        held = _pack.derived(lambda: operands(args))
        site = Site(
            op="conv_bn_act",
            x_shape=tuple(x.shape),
            weight_shape=tuple(conv.weight.shape),
            stride=(2, 2),
            padding=(3, 3),
            dilation=(1, 1),
            groups=1,
            act="relu",
            affine=True,
            residual=False,
            dtype=dtype_name(x.dtype),
            layout="channels_last",
            device=device_name(x.device),
        )

        def stem(kernel: str) -> Callable[[Tensor], Tensor]:
            call = prepare_stem(x, held, "relu", kernel)
            return lambda x: call(x.contiguous(memory_format=torch.channels_last))

        stems = {name: stem(name) for name in kernels(x)}
        choice = choose(
            key_of(site),
            x.device,
            {name: partial(verify_stem, site, x.device, name) for name in stems},
            {**{name: partial(call, x) for name, call in stems.items()}, LAYERS: layers},
        )
        return choice, stems.get(choice.name)

    @staticmethod
    def describe(choice: Choice) -> str:
        """A line of ``explain()``."""
        return f"conv1 and maxpool by {choice}"


class _Decided:
    """What a stem does with inputs of one kind, for as long as ``holds``."""

    def __init__(self, x: Tensor, conv: Any, bn: Any, relu: nn.Module, pool: nn.Module) -> None:
        self.modules = (conv, bn, relu, pool)
        self.generation, self.epoch = _binding.generation(), _pack.epoch()
        self._guard = guard_of(*self.modules)
        for name in POOL:
            self._guard.same(pool.__dict__, name, pool.__dict__[name])
        place = StemPlace(conv, bn)
        choice, self._stem = place.decide(x, lambda: _by_layers(x, *self.modules))
        self.line = place.describe(choice)

    def holds(self, *modules: nn.Module) -> bool:
        """Whether these are the modules, and they, their parameters and the plan what they were."""
        return (
            all(a is b for a, b in zip(modules, self.modules, strict=True))
            and self.generation == _binding.generation()
            and self.epoch == _pack.epoch()
            and self._guard.holds()
        )

    def __call__(self, x: Tensor) -> Tensor:
        return _by_layers(x, *self.modules) if self._stem is None else self._stem(x)


class Stems:
    """The stem of one network, by kind of input. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._known: dict[Any, _Decided] = {}

    def __reduce__(self) -> tuple[type[Stems], tuple[()]]:
        return Stems, ()

    def lines(self) -> Iterator[str]:
        """What was chosen, for ``explain()``."""
        for key, decided in list(self._known.items()):
            if decided.holds(*decided.modules):
                size = "x".join(map(str, key[1]))
                yield f"stem: {decided.line} (batch {key[0]}, {size})"

    def forward(
        self, x: Tensor, conv: nn.Module, bn: nn.Module, relu: nn.Module, pool: nn.Module
    ) -> Tensor:
        """``pool(relu(bn(conv(x))))``."""
        modules = (conv, bn, relu, pool)
        key = (1 << (x.shape[0] - 1).bit_length(), tuple(x.shape[1:]), x.dtype, x.device)
        found = self._known.get(key)
        if found is None or not found.holds(*modules):
            if is_capturing(x) or not _is_stem(x, *modules):
                return _by_layers(x, *modules)
            found = _Decided(x, *modules)
            keep(self._known, key, found)
        return found(x)


def _by_layers(
    x: Tensor, conv: nn.Module, bn: nn.Module, relu: nn.Module, pool: nn.Module
) -> Tensor:
    site = relu.site if isinstance(relu, SiteReLU) else None
    return max_pool(pool, conv_bn_relu(site, x, conv, bn, relu))


def is_stem(conv: Any, pool: Any) -> bool:
    """Whether the two are the layers of the op, by their geometry."""
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return (
        type(pool) is nn.MaxPool2d
        and tuple(getattr(pool, name) for name in POOL) == (3, 2, 1, 1, False, False)
        and geometry == ((7, 7), (2, 2), (3, 3), (1, 1), 1)
        and conv.in_channels <= 4
    )


def _is_stem(x: Tensor, conv: Any, bn: Any, relu: nn.Module, pool: Any) -> bool:
    """Whether the modules are the layers that the op stands for, in eval."""
    return (
        type(relu) is SiteReLU
        and is_regular(conv, bn)
        and is_stem(conv, pool)
        and conv.weight.dtype is x.dtype
        and conv.in_channels == x.shape[1]
        and _library.native() is not None
        and bool(kernels(x))
        and Structure.below(conv, bn, relu, pool).is_plain()
    )
