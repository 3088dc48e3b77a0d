"""Layers without a convolution, each as a sequence of one step: linear layers and norms.

The same steps are part of a whole network's sequence, so that a result does not depend, to the last
bit, on whether the network ran layer by layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fast.nn import recorder as _recorder
from resnet_fast.nn.norms import normalise
from resnet_fast.nn.prepared import keep
from resnet_fast.nn.recorder import Recorder
from resnet_fast.nn.sequence import Attempts, Sequence, Structure, build, may_run, sequence_key
from resnet_fast.ops import activation
from resnet_fast.testing.budget import within_budget


class Alone:
    """The layers of one network, by place and input size. Copies and pickles of it start empty."""

    def __init__(self) -> None:
        self._known: dict[int, dict[Any, tuple[nn.Module, Sequence | None]]] = {}
        self._attempts: dict[int, Attempts] = {}

    def __reduce__(self) -> tuple[type[Alone], tuple[()]]:
        return type(self), ()

    def _run(
        self, place: int, module: nn.Module, x: Tensor, make: Callable[[], Sequence | None]
    ) -> Tensor | None:
        """``module(x)`` by the sequence that ``make`` verifies, or None where it finds none."""
        kinds, key = self._known.setdefault(place, {}), sequence_key(x)
        known, found = kinds.get(key, (None, None))
        y = found(x) if found is not None and known is module and found.holds() else None
        stale = found is not None or known is not module
        if y is None and (stale or self._attempts.setdefault(place, Attempts()).due(key)):
            found = make()
            keep(kinds, key, (module, found))
            y = None if found is None else found(x)
        return y


class Linears(Alone):
    """The linear layers behind a mean over each image."""

    def __call__(self, place: int, linear: Any, x: Any) -> Tensor | None:
        """``linear(x)``, entered in the record where there is one.

        None where it is no plain ``torch.nn.Linear`` of N rows, where sequences do not run, or
        where the step misses the error budget.

        Args:
            place: in the network, a number of its own.
            linear: the module.
            x: (N, C).
        """
        if torch.compiler.is_compiling() or type(linear) is not nn.Linear or type(x) is not Tensor:
            return None
        if x.dim() != 2:
            return None
        pixels = x[:, :, None, None]
        if not may_run(pixels) or x.dtype is torch.uint8:
            return None
        y = self._run(place, linear, pixels, lambda: _verified_linear(linear, pixels))
        recorder = _recorder.active()
        if y is not None and recorder is not None:
            recorder.linear(linear, x, y)
        return y


class Norms(Alone):
    """Batch norms that no convolution comes before, with the activation behind them."""

    def __call__(self, place: int, norm: Any, act: str, x: Any) -> Tensor | None:
        """``act(norm(x))`` of a norm in ``eval()``, entered in the record where there is one.

        None where ``norm`` is no plain batch norm with statistics, where sequences do not run, for
        an ``x`` that is not channels-last, or where the step misses the error budget.

        Args:
            place: in the network, a number of its own.
            norm: the module; of one with an activation of its own the norm alone.
            act: one of ``resnet_fast.ops.activation.ACTIVATIONS``.
            x: (N, C, H, W).
        """
        if torch.compiler.is_compiling() or not isinstance(norm, _BatchNorm) or norm.training:
            return None
        if not may_run(x) or x.dtype is torch.uint8 or x.numel() == 0:
            return None
        if not x.is_contiguous(memory_format=torch.channels_last):
            return None
        y = self._run(place, norm, x, lambda: _verified_norm(norm, act, x))
        recorder = _recorder.active()
        if y is not None and recorder is not None:
            recorder.affine(norm, act, x, y)
        return y


def _images(x: Tensor) -> Tensor:
    """Some images like those of ``x``, the same ones at every call."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(x.shape[1:]).encode()))
    images = torch.randn(min(2, x.shape[0]), *x.shape[1:], generator=generator)
    return images.contiguous(memory_format=torch.channels_last)


def _verified_linear(linear: nn.Linear, pixels: Tensor) -> Sequence | None:
    recorder = Recorder(pixels)
    recorder.linear(linear, pixels, pixels.new_empty(0))
    built = build(Structure.below(linear), recorder, whole=True) if len(recorder) else None
    if built is None:
        return None
    images = _images(pixels).to(pixels.dtype)
    rows = images[:, :, 0, 0]
    bias = None if linear.bias is None else linear.bias.double()
    y = built(images)
    truth = F.linear(rows.double(), linear.weight.double(), bias)
    return built if y is not None and within_budget(y, linear(rows), truth).ok else None


def _verified_norm(norm: Any, act: str, x: Tensor) -> Sequence | None:
    recorder = Recorder(x)
    recorder.affine(norm, act, x, x.new_empty(0))
    built = build(Structure([norm], [norm]), recorder, whole=False) if len(recorder) else None
    if built is None:
        return None
    # As the norm expects them, so that the activation sees both of its sides.
    mean, var = (t.float()[:, None, None] for t in (norm.running_mean, norm.running_var))
    images = (_images(x) * (var + norm.eps).sqrt() + mean).to(x.dtype)
    m, v, w, b = (
        None if t is None else t.double()
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    truth = F.batch_norm(images.double(), m, v, w, b, eps=norm.eps)
    y = built(images)
    given = activation.value(act, normalise(norm, images))
    truth = activation.value(act, truth)
    return built if y is not None and within_budget(y, given, truth).ok else None
