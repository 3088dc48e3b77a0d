"""Tensors derived from parameters (folded scale and shift, packed weights), kept and kept fresh.

Parameters are the only truth. An entry is used only while every source tensor is the same view of
the same memory at the same version, and on the CPU while a content fingerprint still agrees.
Anything else rebuilds the entry. Entries live outside the modules, so ``deepcopy``, pickling and
``state_dict`` never see them.

The fingerprint is for edits through ``.data``, which leave the version counter alone. It reads
tensors up to 16 KiB whole and 128 words of larger ones: an edit of a whole weight shows, one of a
few elements may not, and on other devices none does. :func:`clear` is for those.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from resnet_fast import _library

# A convolution with everything but input and residual bound.
Call = Callable[[Tensor, Tensor | None], Tensor]


class Layer(NamedTuple):
    """What the native kernels need of a convolution in fp32 or bf16 (csrc/cpu/sequence.h).

    ``kind`` names the kernel; an absent scale is 1, an absent shift 0; both are fp32.
    """

    kind: str
    packed: Tensor
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None

    def constants(self) -> list[Tensor]:
        """Packed weight, weight, scale and shift, each of them there."""
        weight = self.weight.detach()
        filters = weight.shape[0]
        scale = torch.ones(filters) if self.scale is None else self.scale
        shift = torch.zeros(filters) if self.shift is None else self.shift
        return [self.packed, weight, scale.contiguous(), shift.contiguous()]


class PackedCall:
    """A :data:`Call` of an op over packed weights.

    ``op(x, *before, residual, *after)``; ``layer`` is what a sequence runs in its place.
    """

    __slots__ = ("after", "before", "layer", "op")

    def __init__(
        self,
        op: Callable[..., Tensor],
        before: tuple[Any, ...],
        after: tuple[Any, ...],
        layer: Layer,
    ) -> None:
        self.op, self.before, self.after, self.layer = op, before, after, layer

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self.op(x, *self.before, residual, *self.after)


# Sweep for dead entries after this many insertions: rare enough to be free, frequent enough that
# a discarded model gives its packed weights back.
_SWEEP_EVERY = 64


class _Entry:
    __slots__ = ("sources", "value", "watch")

    def __init__(self, tensors: Sequence[Tensor | None], build: Callable[[], Any]):
        # Before the value is built: what is written meanwhile makes the entry stale, never wrong.
        self.sources = tuple(
            None if t is None else (_view(t), t._version, StorageWeakRef(t.untyped_storage()))
            for t in tensors
        )
        self.watch = watch(tensors)
        self.value = build()

    def matches(self, tensors: Sequence[Tensor | None]) -> bool:
        for source, tensor in zip(self.sources, tensors, strict=True):
            if source is None or tensor is None:
                if source is not tensor:
                    return False
            elif source[0] != _view(tensor) or source[1] != tensor._version or source[2].expired():
                return False
        # Last: it reads the memory, which the tests above have shown to be there.
        return self.watch is None or self.watch.unchanged()

    def dead(self) -> bool:
        return any(source is not None and source[2].expired() for source in self.sources)


def _view(t: Tensor) -> tuple[Any, ...]:
    """What a tensor reads of its memory: a transposed view is other numbers."""
    return t.data_ptr(), t.dtype, t.shape, t.stride()


_entries: dict[Hashable, _Entry] = {}
_lock = threading.Lock()
_insertions = 0
_epoch = 0


def epoch() -> int:
    """Changes whenever every derived value, wherever it is held, has to be derived again."""
    return _epoch


def watch(tensors: Sequence[Tensor | None]) -> Any:
    """The content fingerprint of the CPU tensors among ``tensors``, for ``unchanged()`` to compare.

    Edits through ``.data`` leave the version counter alone; this sees them. ``unchanged()`` reads
    the memory, so the tensors must still be where they were. None without the native module.
    """
    native = _library.native()
    if native is None:
        return None
    spans = [
        (t.data_ptr(), t.untyped_storage().nbytes() - t.storage_offset() * t.element_size())
        if not t.is_contiguous()
        else (t.data_ptr(), t.numel() * t.element_size())
        for t in tensors
        if t is not None and t.device.type == "cpu"
    ]
    return native.Watch(spans) if spans else None


_deriving = threading.local()


def is_deriving() -> bool:
    """Whether this thread is inside a ``build`` of :func:`cached`: work that is paid once."""
    return bool(getattr(_deriving, "depth", 0))


def derived(build: Callable[[], Any]) -> Any:
    """``build()``, as work that is paid once for a parameter (:func:`is_deriving`)."""
    # Outside inference mode: a cached value made inside it could not be used by a later traced
    # or differentiated call.
    _deriving.depth = getattr(_deriving, "depth", 0) + 1
    try:
        with torch.inference_mode(False), torch.no_grad():
            return build()
    finally:
        _deriving.depth -= 1


def cached(kind: Hashable, tensors: Sequence[Tensor | None], build: Callable[[], Any]) -> Any:
    """Return ``build()``, remembered for as long as ``tensors`` stay what they are.

    Args:
        kind: what is derived; part of the key, hashable.
        tensors: every tensor that ``build`` reads; the first is required.
        build: computes the derived value.

    Inference tensors carry no version counter, so nothing derived from them is kept; nor is what
    is derived from meta tensors, which have no address to be known by.
    """
    global _insertions
    first = tensors[0]
    assert first is not None
    if any(t is not None and t.is_inference() for t in tensors):
        return build()
    if first.is_meta:
        return derived(build)
    key = (kind, _view(first))
    entry = _entries.get(key)
    if entry is not None and entry.matches(tensors):
        return entry.value
    entry = derived(lambda: _Entry(tensors, build))
    with _lock:
        _entries[key] = entry
        _insertions += 1
        if _insertions % _SWEEP_EVERY == 0:
            for dead in [k for k, e in _entries.items() if e.dead()]:
                del _entries[dead]
    return entry.value


def clear() -> None:
    """Forget every derived tensor; the next call derives it again from the parameters."""
    global _epoch
    with _lock:
        _entries.clear()
        _epoch += 1


def weight_like(x: Tensor, weight: Tensor) -> Tensor:
    """The weight in the input's dtype; they differ under autocast alone."""
    if weight.dtype is x.dtype:
        return weight
    return cached(("cast", x.dtype), (weight,), lambda: weight.to(x.dtype))


def fold(
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of ``BN(conv + bias)`` in evaluation, computed in ``dtype`` (fp32 or fp64).

    ``scale = γ / sqrt(var + eps)``, ``shift = β + (bias − mean) · scale`` (Ioffe and Szegedy
    2015, algorithm 2). Without statistics the scale is None and the shift is the bias.
    """
    if mean is None or var is None:
        return None, None if bias is None else bias.to(dtype)
    scale = torch.rsqrt(var.to(dtype) + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.to(dtype)
    centred = -mean.to(dtype) if bias is None else bias.to(dtype) - mean.to(dtype)
    shift = centred * scale
    if bn_bias is not None:
        shift = shift + bn_bias.to(dtype)
    return scale, shift


def like_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
) -> Tensor:
    """The fake of every registration that packs weights: a channels-last convolution output."""
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    out = [
        (n + 2 * p - d * (r - 1) - 1) // s + 1
        for n, p, d, r, s in zip(
            x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    ]
    return x.new_empty((x.shape[0], weight.shape[0], *out)).to(memory_format=layout)
