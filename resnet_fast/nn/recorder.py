"""What one forward of a network computed, written down as steps of a sequence.

While a :class:`Recorder` is active in a thread, the sites and the few other layers that a sequence
knows enter their calls. Values are told apart by identity, so what anything else made of a value
between two layers is a value that the recorder does not know, and the record is refused.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.nn.prepared import Prepared, Source, norm_places, sources_of
from resnet_fast.ops import conv_bn_act_direct
from resnet_fast.ops._pack import Layer, cached, fold
from resnet_fast.ops.activation import ACTIVATIONS

# As csrc/cpu/sequence.h numbers them.
KINDS = {
    "direct": 0,
    "max_pool": 1,
    "winograd2": 2,
    "mean": 3,
    "winograd4": 4,
    "pad_channels": 5,
    "gate": 6,
    "affine": 7,
    "average_pool": 8,
    "join": 9,
}

#: Integers in a step.
STEP_FIELDS = 16

# Beside an input of bytes the weights are signed.
_WEIGHTS = {torch.uint8: torch.int8}

_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_MEAN_POOL = (
    "kernel_size",
    "stride",
    "padding",
    "ceil_mode",
    "count_include_pad",
    "divisor_override",
)
_NO_WINDOW = (1, 1, 1, 1, 0, 0, 1, 1, 1)  # the last is the number of groups
#: The steps of a sequence that takes the mean over each image, and nothing else.
MEAN = (KINDS["mean"], 0, -1, 1, -1, 0, 0, *_NO_WINDOW)
_active = threading.local()


def active() -> Recorder | None:
    """The recorder of this thread, if one is active."""
    return None if torch.compiler.is_compiling() else getattr(_active, "recorder", None)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


class Recorder:
    """The record of one forward that starts from ``x``.

    Attributes:
        steps: integers, 16 a step, as csrc/cpu/sequence.h reads them.
        constants: packed weight, weight, scale and shift of each convolution, scale and shift of
            each norm by itself.
        sites: the prepared calls of the sites, in order.
        sources: what the constants were derived from, as :func:`sources_of` lists it.
        settings: modules, and the attributes that a step was made from.
    """

    def __init__(self, x: Tensor) -> None:
        self.steps: list[int] = []
        self.constants: list[Tensor] = []
        self.sites: list[Prepared] = []
        self.sources: list[Source] = []
        self.settings: list[tuple[nn.Module, tuple[str, ...]]] = []
        self.x = x
        self._marks = [(0, 0, 0, 0)]  # lengths of the lists above after each step
        # By identity, and not kept alive: a network's activations are many.
        self._values = {id(x): (weakref.ref(x), 0)}
        self._last = weakref.ref(x)
        # By the numbers of the values that it joins, the number of each join.
        self._joined: dict[tuple[int, ...], int] = {}

    @contextmanager
    def __call__(self) -> Iterator[Recorder]:
        before, _active.recorder = active(), self
        try:
            yield self
        finally:
            _active.recorder = before

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self.steps) // STEP_FIELDS

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is the last step's result."""
        return len(self) > 0 and self._last() is value

    def cut(self, count: int) -> None:
        """Forget all steps but the first ``count``."""
        constants, sites, sources, settings = self._marks[count]
        del self.steps[count * STEP_FIELDS :], self._marks[count + 1 :]
        del self.constants[constants:], self.sites[sites:]
        del self.sources[sources:], self.settings[settings:]

    def site(
        self, prepared: Prepared, act: str, x: Tensor, residual: Tensor | None, y: Tensor
    ) -> None:
        """Enter a convolution site's call."""
        layer = getattr(prepared.call, "layer", None)
        conv = prepared.conv
        dtype = _WEIGHTS.get(self.x.dtype, self.x.dtype)
        if layer is None or layer.weight.dim() != 4 or layer.weight.dtype is not dtype:
            return  # the result stays unknown
        window = (
            *conv.kernel_size,
            *conv.stride,
            *conv.padding,
            *conv.dilation,
            conv.groups,
        )
        if self._enter(layer.kind, x, residual, y, self._fields(layer, act, window)):
            self.sites.append(prepared)
            self.settings.append((conv, _GEOMETRY))
            if prepared.eps is not None:
                self.settings.append((prepared.bn, ("eps",)))
            self.sources += prepared.sources
            self.constants += layer.constants()
            self._mark()

    def max_pool(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        """Enter the call of a plain ``torch.nn.MaxPool2d``."""
        if type(module) is not nn.MaxPool2d or module.ceil_mode or module.return_indices:
            return
        self.settings.append((module, _POOL))
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
        window = [*(n for size in sizes for n in _pair(size)), 1]
        if self._enter("max_pool", x, None, y, (-1, 0, 0, *window)):
            self._mark()

    def average_pool(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        """Enter the call of a plain ``torch.nn.AvgPool2d`` whose windows are all of one size."""
        if type(module) is not nn.AvgPool2d or module.ceil_mode or x.dtype is torch.uint8:
            return
        counts = module.count_include_pad or not any(_pair(module.padding))
        if not counts or module.divisor_override is not None or x.dim() != 4:
            return
        sizes = (module.kernel_size, module.stride, module.padding, 1)
        window = [*(n for size in sizes for n in _pair(size)), 1]
        if self._enter("average_pool", x, None, y, (-1, 0, 0, *window)):
            self.settings.append((module, _MEAN_POOL))
            self._mark()

    def affine(self, norm: Any, act: str, x: Tensor, y: Tensor) -> None:
        """Enter ``act(norm(x))`` of a batch norm in ``eval()`` that no convolution comes before."""
        if x.dim() != 4 or x.dtype is torch.uint8 or self._number(x) is None:
            return
        used = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        places = norm_places(norm)
        if norm.running_mean is None or norm.running_mean.numel() != x.shape[1]:
            return
        if any(where.get(name) is not t for (where, name), t in zip(places, used, strict=True)):
            return  # computed at each look
        if any(t is not None and t.is_inference() for t in used):
            return
        sources = sources_of(places, used)
        weight, bias, mean, var = used
        scale, shift = cached(
            ("affine", norm.eps),
            (mean, var, weight, bias),
            lambda: fold(None, weight, bias, mean, var, norm.eps),
        )
        fields = (len(self.constants), ACTIVATIONS.index(act), 0, *_NO_WINDOW)
        if self._enter("affine", x, None, y, fields):
            self.settings.append((norm, ("eps", "training")))
            self.sources += sources
            self.constants += [scale.contiguous(), shift.contiguous()]
            self._mark()

    def join(self, xs: list[Tensor], y: Tensor) -> int:
        """Enter the channels of ``xs``, side by side; what has been joined before is joined once.

        Returns how many steps that took; 1 without entering any where ``y`` is not that.
        """
        found = [self._number(x) for x in xs]
        numbers = [number for number in found if number is not None]
        shapes = [(x.shape[0], *x.shape[2:]) for x in (*xs, y)]
        fits = y.dim() == 4 and y.shape[1] == sum(x.shape[1] for x in xs)
        if None in found or len(set(shapes)) != 1 or not fits or y.dtype is torch.uint8:
            return 1
        if self._number(y) is not None:
            return 1
        known, count = numbers[0], 1
        for end in range(len(numbers), 1, -1):
            if tuple(numbers[:end]) in self._joined:
                known, count = self._joined[tuple(numbers[:end])], end
                break
        before = len(self)
        for end in range(count + 1, len(numbers) + 1):
            self.steps += [KINDS["join"], known, numbers[end - 1], len(self) + 1]
            self.steps += [-1, 0, 0, *_NO_WINDOW]
            known = self._joined[tuple(numbers[:end])] = len(self)
            self._mark()
        self._name(y, known)
        return len(self) - before

    def pad_channels(self, module: nn.Module, stride: int, x: Tensor, y: Tensor) -> None:
        """Enter a call that takes every ``stride``-th pixel of ``x`` and adds channels of zeros."""
        window = (1, 1, stride, stride, 0, 0, 1, 1, 1)
        if self._enter("pad_channels", x, None, y, (-1, 0, y.shape[1], *window)):
            self.settings.append((module, ("new_planes", "stride")))
            self._mark()

    def mean(self, x: Tensor, y: Tensor, pool: nn.Module | None = None) -> None:
        """Enter the mean ``y`` over each image of ``x``, of shape (N, C, 1, 1) or (N, C).

        Args:
            pool: the ``torch.nn.AdaptiveAvgPool2d`` that computed it, if one did.
        """
        if x.dim() != 4 or y.shape[:2] != x.shape[:2] or y.shape[2:] not in ((), (1, 1)):
            return
        if x.dtype is torch.uint8:
            return
        if self._enter("mean", x, None, y, (-1, 0, 0, *_NO_WINDOW)):
            if pool is not None:
                self.settings.append((pool, ("output_size",)))
            self._mark()

    def gate(self, x: Tensor, by: Tensor, y: Tensor) -> None:
        """Enter the product ``y`` of ``x`` and one value a channel, of shape (N, C, 1, 1)."""
        if x.dim() != 4 or by.shape != (*x.shape[:2], 1, 1) or x.dtype is torch.uint8:
            return
        if y.shape == x.shape and self._enter("gate", x, by, y, (-1, 0, 0, *_NO_WINDOW)):
            self._mark()

    def same(self, x: Tensor, y: Tensor, flatten: nn.Module | None = None) -> None:
        """Enter that ``y`` holds the values of ``x``, of one pixel an image, in another shape.

        Args:
            flatten: the ``torch.nn.Flatten`` that gave it that shape, if one did.
        """
        number = self._number(x)
        if number is None or self._number(y) is not None:
            return
        self._name(y, number)
        if flatten is not None:
            self.settings.append((flatten, ("start_dim", "end_dim")))
            self._marks.pop()  # they belong to the last step
            self._mark()

    def linear(self, linear: nn.Module, x: Tensor, y: Tensor) -> None:
        """Enter the call of a plain ``torch.nn.Linear``.

        Args:
            x: of shape (N, C) or (N, C, 1, 1).
            y: its result.
        """
        if self._number(x) is None:
            return
        made = self._linear_layer(linear, x.reshape(*x.shape[:2], 1, 1))
        if made is None:
            return
        layer, sources = made
        if self._enter("direct", x, None, y, self._fields(layer, "none", _NO_WINDOW)):
            self.sources += sources
            self.constants += layer.constants()
            self._mark()

    def head(self, pool: nn.Module, linear: nn.Module, x: Tensor) -> bool:
        """Enter the mean over an image and the linear layer that follows: both, or neither.

        :meth:`result` names their result.
        """
        if (
            self._number(x) is None
            or type(pool) is not nn.AdaptiveAvgPool2d
            or pool.output_size not in (1, (1, 1))
        ):
            return False
        made = self._linear_layer(linear, x)
        if made is None:
            return False
        layer, sources = made
        self.settings.append((pool, ("output_size",)))
        pooled, y = x.new_empty(0), x.new_empty(0)
        self._enter("mean", x, None, pooled, (-1, 0, 0, *_NO_WINDOW))
        self._mark()
        self._enter("direct", pooled, None, y, self._fields(layer, "none", _NO_WINDOW))
        self.sources += sources
        self.constants += layer.constants()
        self._mark()
        return True

    @staticmethod
    def _linear_layer(linear: nn.Module, x: Tensor) -> tuple[Layer, tuple[Source, ...]] | None:
        """The packed layer of a plain linear module, and what it was derived from.

        ``x``: (N, C, H, W), in the dtype and with the channels of the module's input.
        """
        if (
            type(linear) is not nn.Linear
            or linear.weight.dtype is not x.dtype
            or linear.weight.shape[1] != x.shape[1]
            or not conv_bn_act_direct.available(x.dtype)
        ):
            return None
        used = (linear.weight, linear.bias)
        places = [(linear._parameters, "weight"), (linear._parameters, "bias")]
        if any(where.get(name) is not t for (where, name), t in zip(places, used, strict=True)):
            return None  # computed at each look
        if any(t is not None and t.is_inference() for t in used):
            return None
        sources = sources_of(places, used)
        # A linear layer is a 1x1 convolution of one pixel.
        call = conv_bn_act_direct.prepare(
            x,
            linear.weight.detach()[:, :, None, None],
            None if linear.bias is None else linear.bias.detach(),
            *(None, None, None, None, 0.0),
            *([1, 1], [0, 0], [1, 1], 1, "none"),
        )
        layer = getattr(call, "layer", None)
        return None if layer is None else (layer, sources)

    def result(self, y: Tensor) -> None:
        """Name the last step's result."""
        self._last = weakref.ref(y)
        self._values[id(y)] = (self._last, len(self))

    def _name(self, y: Tensor, number: int) -> None:
        """Know ``y`` as value ``number``, which may have another name already."""
        self._values[id(y)] = (weakref.ref(y), number)
        if number == len(self):
            self._last = weakref.ref(y)

    def _mark(self) -> None:
        lists: tuple[list[Any], ...] = (self.constants, self.sites, self.sources, self.settings)
        constants, sites, sources, settings = map(len, lists)
        self._marks.append((constants, sites, sources, settings))

    def _fields(self, layer: Layer, act: str, window: tuple[int, ...]) -> tuple[int, ...]:
        return (len(self.constants), ACTIVATIONS.index(act), layer.weight.shape[0], *window)

    def _enter(
        self, kind: str, x: Tensor, residual: Tensor | None, y: Tensor, fields: tuple[int, ...]
    ) -> bool:
        read = self._number(x)
        added = -1 if residual is None else self._number(residual)
        if read is None or added is None or self._number(y) is not None:
            return False
        self.steps += [KINDS[kind], read, added, len(self) + 1, *fields]
        self.result(y)
        return True

    def _number(self, value: Tensor) -> int | None:
        found = self._values.get(id(value))
        return None if found is None or found[0]() is not value else found[1]
