"""A site's call with every choice made, and the test that each of them still holds.

Deciding how a convolution runs takes longer in Python than a small convolution takes to run. What
was decided depends on the modules' tensors and attributes, on the input's kind and on the global
modes; all of that is compared at each call, by identity and version, which is much less work than
deciding again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fast.ops import _pack
from resnet_fast.plan import binding as _binding

# Shapes that a site or a network remembers: the oldest make room, and are decided again.
_SHAPES = 64


def keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """Enter ``value``, and let the oldest entry go beyond ``_SHAPES``."""
    kept[key] = value
    if len(kept) > _SHAPES:
        for oldest in list(kept)[:1]:
            kept.pop(oldest, None)


def hooks_of(module: Any) -> tuple[dict[Any, Any], ...]:
    """The dictionaries that hold the hooks of ``module``: empty ones mean that it has none."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def is_transforming() -> bool:
    """Whether a call now means more than its numbers: under vmap or with forward-mode tangents."""
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def is_autocasting(device: torch.device) -> bool:
    """Whether autocast is on for ``device``; torch's own test raises for meta, which has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


# A tensor's place in a module, the tensor, and the version and address that it had.
Source = tuple[dict[str, Any], str, Tensor | None, int, int]


def sources_of(
    places: Sequence[tuple[dict[str, Any], str]], used: Sequence[Tensor | None]
) -> tuple[Source, ...]:
    """What to compare later, to know that ``used`` are still there and as they are now."""
    return tuple(
        (where, name, t, 0 if t is None else t._version, 0 if t is None else t.data_ptr())
        for (where, name), t in zip(places, used, strict=True)
    )


def are_current(sources: Sequence[Source]) -> bool:
    """Whether every source is the same tensor, unwritten, at the same place."""
    for where, name, tensor, version, pointer in sources:
        if where.get(name) is not tensor:
            return False
        if tensor is not None and (tensor._version != version or tensor.data_ptr() != pointer):
            return False
    return True


def norm_places(bn: Any) -> list[tuple[dict[str, Any], str]]:
    """Where a batch norm holds its weight, bias, mean and variance."""
    where = bn._parameters if "weight" in bn._parameters else bn._buffers
    statistics = [(bn._buffers, "running_mean"), (bn._buffers, "running_var")]
    return [(where, "weight"), (where, "bias"), *statistics]


def batch_class(x: Tensor) -> tuple[bool, bool]:
    """Torch's CPU convolution picks its algorithm by whether the batch is 1 and, at one thread,
    below 16; a candidate is verified against the one that it replaces."""
    return x.shape[0] == 1, x.shape[0] >= 16


def batch_kind(x: Tensor) -> Any:
    """Batches that one choice of a candidate serves, on the device of ``x``.

    A GPU's kernels are picked by how many tiles there are: each power of two is decided anew.
    """
    return batch_class(x) if x.device.type == "cpu" else (x.shape[0] - 1).bit_length()


class Prepared:
    """One call of a site in ``eval()`` without recorded gradients.

    Args:
        x: the input that it was decided for; those that follow differ in batch and content alone.
        conv, bn: the modules whose parameters ``call`` holds derived values of.
        used: the tensors that ``make`` derives values from, as :meth:`held` lists them.
        out: shape of the output without the batch.
        make: what gives the call to run.
    """

    __slots__ = (
        "bn",
        "bn_type",
        "call",
        "contiguous",
        "conv",
        "conv_type",
        "device",
        "dtype",
        "epoch",
        "eps",
        "generation",
        "geometry",
        "hooks",
        "modal",
        "out",
        "sources",
        "watch",
    )

    def __init__(
        self,
        x: Tensor,
        conv: Any,
        bn: Any,
        used: Sequence[Tensor | None],
        out: tuple[int, ...],
        make: Callable[[], _pack.Call],
    ) -> None:
        self.conv, self.conv_type = conv, type(conv)
        self.bn, self.bn_type = bn, type(bn)
        self.eps = getattr(bn, "eps", None)
        self.modal = isinstance(bn, _BatchNorm)  # a frozen norm is the same in train()
        self.geometry = self._geometry(conv)
        self.dtype, self.device, self.contiguous = x.dtype, x.device, x.is_contiguous()
        self.out = out
        self.generation = _binding.generation()
        self.epoch = _pack.epoch()
        self.hooks = tuple(d for m in (conv, bn) if m is not None for d in hooks_of(m))
        places = self.places(conv, bn)
        self.sources = sources_of(places, used[: len(places)])
        self.watch = _pack.watch(used)
        # Last: what is written to a parameter from here on shows in what was noted above.
        self.call = make()

    @staticmethod
    def places(conv: Any, bn: Any) -> list[tuple[dict[str, Any], str]]:
        """Where the modules hold the tensors of a call, in the order of ``ConvArgs``; without a
        norm its tensors, None, have no place."""
        found = [(conv._parameters, "weight"), (conv._parameters, "bias")]
        return found if bn is None else found + norm_places(bn)

    @classmethod
    def held(cls, conv: Any, bn: Any, used: Sequence[Tensor | None]) -> bool:
        """Whether ``used`` are the modules' own tensors, not ones computed at each look
        (``torch.nn.utils.parametrize``), whose sources nothing here would see change."""
        places = cls.places(conv, bn)
        return all(
            where.get(name) is t for (where, name), t in zip(places, used, strict=False)
        ) and all(t is None for t in used[len(places) :])

    @staticmethod
    def _geometry(conv: Any) -> tuple[Any, ...]:
        return (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)

    def holds(self, x: Tensor, conv: Any, bn: Any, residual: Tensor | None) -> bool:
        """Whether ``call(x, residual)`` is what deciding afresh would come to."""
        if (
            torch.is_grad_enabled()
            or is_transforming()
            or conv is not self.conv
            or bn is not self.bn
            or type(conv) is not self.conv_type
            or type(bn) is not self.bn_type
            or type(x) is not Tensor
            or x.dtype is not self.dtype
            or x.device != self.device
            or x.is_contiguous() is not self.contiguous
            or self.generation != _binding.generation()
            or self.epoch != _pack.epoch()
            or _binding.tuning() is not None
            or is_autocasting(self.device)
            or self._geometry(conv) != self.geometry
        ):
            return False
        if "forward" in conv.__dict__:
            return False
        if bn is not None and (
            (self.modal and bn.training) or bn.eps != self.eps or "forward" in bn.__dict__
        ):
            return False
        for hooks in self.hooks:
            if hooks:
                return False
        if residual is not None and (
            type(residual) is not Tensor
            or residual.dtype is not self.dtype
            or residual.device != self.device
            or residual.shape != (x.shape[0], *self.out)
        ):
            return False
        return are_current(self.sources) and (self.watch is None or self.watch.unchanged())
