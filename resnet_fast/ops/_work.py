"""What a call of an op moves and computes, said by the op itself: the traffic account's source.

Each contract file ``ops/<op>.py`` has a function ``work`` with the op's own parameters, in the op's
own order, which returns a :class:`Work`, or a list of them, one a kernel. It serves the op and its
private registrations ``_<op>_triton`` and ``_<op>_cuda``; a ``work_backward`` beside it serves the
op ``_<op>_backward`` in the same way. They find their tensors on the meta device: they may look at
shapes, dtypes and strides, never at data. :func:`of` finds them by the op's name, so that a new op
enters the account with its file and nothing else.

The rules of counting, the same for every op:

- a kernel's on-chip memory and L2 are large enough to read nothing twice, and nothing is left there
  for the next kernel;
- ``read`` holds every element that the result depends on, once, in whole lines of memory
  (:func:`window`); a tensor that is passed as two arguments and read once counts once;
- ``written`` holds every output once; what stays on chip is neither;
- ``parameters`` is the part of ``read`` that belongs to the layer and not to an image;
- ``flops`` are two for each multiply-add of a product. Scale, shift, addition and activation of the
  outputs are not counted: half a percent of it in ResNet-50.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from resnet_fast.ops import _checks


class Work(NamedTuple):
    """Bytes read and written and floating-point operations of one call."""

    read: int
    written: int
    flops: int = 0
    parameters: int = 0


def total(works: Work | list[Work]) -> tuple[int, Work]:
    """How many kernels there are, and the work of them all."""
    if isinstance(works, Work):
        return 1, works
    return len(works), Work(*map(sum, zip(*works, strict=True)))


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors that are there."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@functools.cache
def _touched(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    """How many of ``size`` places a window of ``taps`` reads as it moves along them."""
    outputs = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    places = {p * stride + r * dilation - padding for p in range(outputs) for r in range(taps)}
    return sum(0 <= place < size for place in places)


def window(
    x: Tensor,
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> int:
    """Bytes of ``x`` that a window reads as it moves over all but its first two dimensions.

    A strided 1×1 convolution reads the pixels it lands on. In channels-last these are lines of
    memory of their own; else the pixels of a row share their lines, and a row is read whole.
    """
    sizes = list(x.shape[2:])
    read = [_touched(*place) for place in zip(sizes, taps, stride, padding, dilation, strict=True)]
    if _checks.channels_last(x) is None and all(read):
        read[-1] = sizes[-1]
    return math.prod(read) * x.shape[0] * x.shape[1] * x.element_size()


def product_flops(weight: Tensor, shape: Sequence[int]) -> int:
    """Floating-point operations of the convolution with ``weight`` [K, C / groups, R...] whose
    output is of ``shape``."""
    return 2 * math.prod(shape) * math.prod(weight.shape[1:])


def base(name: str) -> str:
    """The op that a registration is one of: ``_conv_bn_act_triton`` is ``conv_bn_act``."""
    return name.removeprefix("_").removesuffix("_triton").removesuffix("_cuda")


def of(name: str) -> Callable[..., Work | list[Work]] | None:
    """``work`` or ``work_backward`` that ``resnet_fast::name`` is a registration of, or None."""
    from resnet_fast import ops

    called = base(name)
    op = called.removesuffix("_backward")
    # What has a backward is public, the backward itself is not.
    plain = op if op == called else f"_{called}"
    listed = (*ops.OPS, *ops.FUSED, *ops.TRAINING)
    if name not in (plain, f"_{called}_triton", f"_{called}_cuda") or op not in listed:
        return None
    work = getattr(ops.module(op), "work" if op == called else "work_backward", None)
    if work is None or name == plain:
        return work
    # A registration may take more than its op does: which of its kernels runs.
    taken = len(inspect.signature(work).parameters)
    return lambda *arguments: work(*arguments[:taken])
