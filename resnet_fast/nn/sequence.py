"""A whole network as one native call, once every layer of it has been decided and verified.

Between two layers the interpreter looks at modules, parameters and shapes, an allocation is made
and threads are forked and joined: a tenth of a ResNet-50's time at one image, half of a CIFAR
network's. The layers of a network that are all kernels of this package's are therefore written
down once (:mod:`resnet_fast.nn.recorder`) and run by csrc/cpu/sequence.h, activations in one
arena. The modules stay what they were: at each call they are compared with what was recorded, and
where anything differs the network runs layer by layer, and is recorded again.
"""

from __future__ import annotations

import functools
import weakref
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _nn_module

from resnet_fast import _library
from resnet_fast.nn import recorder as _recorder
from resnet_fast.nn.norms import is_norm_act_type
from resnet_fast.nn.prepared import are_current, batch_class, hooks_of, is_transforming, keep
from resnet_fast.nn.recorder import MEAN, Recorder
from resnet_fast.nn.site import FusedSite
from resnet_fast.ops import _pack
from resnet_fast.plan import binding as _binding
from resnet_fast.testing.budget import within_budget

# Modules whose forward is what the recorder saw: those of torch, and those that say so.
_PLAIN: set[type] = {
    nn.AdaptiveAvgPool2d,
    nn.AvgPool2d,
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.Dropout,
    nn.Flatten,
    nn.Hardswish,
    nn.Identity,
    nn.Linear,
    nn.MaxPool2d,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Sequential,
    nn.Sigmoid,
    FusedSite,
}
# Attributes of a module that would run in place of its class's.
_PATCHES = ("forward", "_conv_forward")
_BODIES = ("forward", "__call__", "_trunk", "_head", "_conv_forward", "start", "middle", "finish")
# The dtypes that a sequence runs in, each with integers of its size.
_BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.uint8: torch.uint8,  # on the grids of an 8-bit network
}
_GLOBAL_HOOKS = (
    _nn_module._global_forward_hooks,
    _nn_module._global_forward_pre_hooks,
    _nn_module._global_backward_hooks,
    _nn_module._global_backward_pre_hooks,
)


def plain(kind: type) -> type:
    """Class decorator: the forward of ``kind`` is its layers' calls and nothing else."""
    _PLAIN.add(kind)
    return kind


def _is_plain(kind: type) -> bool:
    """Whether ``kind`` is a plain module, or adds nothing that runs to one."""
    if is_norm_act_type(kind):
        return True  # what a record shows of it is the norm alone
    for base in kind.__mro__:
        if base in _PLAIN:
            return True
        if any(name in vars(base) for name in _BODIES):
            return False
    return False


def max_pool(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, entered in the record where there is one."""
    y = module(x)
    recorder = _recorder.active()
    if recorder is not None and y is not x:
        recorder.max_pool(module, x, y)
    return y


class Structure:
    """The modules that a record is of, and the places where they were found.

    Args:
        modules: those whose forward was recorded: none may be hooked, patched or replaced.
        parents: those whose children have to stay.
        containers: those whose forward was traced through, and has to stay out of it; their mode
            counts where ``modal``.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        parents: Iterable[nn.Module],
        containers: Iterable[nn.Module] = (),
        modal: bool = False,
    ) -> None:
        self.modules, self.parents = tuple(modules), tuple(parents)
        self.containers, self.modal = tuple(containers), modal

    @classmethod
    def below(cls, *roots: nn.Module, without: tuple[nn.Module, ...] = ()) -> Structure:
        """``roots`` and what is below them; of ``without``, only the place counts."""
        outside = {m for module in without for m in module.modules()}
        inside = [m for root in roots for m in root.modules() if m not in outside]
        return cls(inside, inside)

    def is_plain(self) -> bool:
        """Whether the modules do nothing but what a record shows."""
        if any(m.training for m in self.modules if isinstance(m, nn.Dropout)):
            return False
        return all(_is_plain(type(m)) and not any(hooks_of(m)) for m in self.modules) and not any(
            name in m.__dict__ for m in self.modules for name in _PATCHES
        )

    def watch(self, guard: Any) -> None:
        """Have ``guard`` note all of it."""
        for m in self.modules:
            guard.type(m)
            if isinstance(m, nn.Dropout):
                guard.same(m.__dict__, "training", False)
            for hooks in hooks_of(m):
                guard.empty(hooks)
            for name in _PATCHES:
                if hasattr(type(m), name):
                    guard.absent(m.__dict__, name)
        for m in self.containers:
            for hooks in hooks_of(m):
                guard.empty(hooks)
            guard.absent(m.__dict__, "forward")
            if self.modal:
                guard.same(m.__dict__, "training", m.training)
        for m in self.parents:
            if m._modules:
                guard.items(m._modules)


class Sequence:
    """Recorded layers, for inputs of one size.

    Args:
        structure: the modules that were recorded.
        record: what they computed.
        whole: whether the last step is a head's, and gives N rows of logits.
    """

    def __init__(self, structure: Structure, record: Recorder, whole: bool) -> None:
        self.structure, self.whole, self.dtype = structure, whole, record.x.dtype
        self.count = len(record)
        self.generation = _binding.generation()
        self.epoch = _pack.epoch()
        native = _library.native()
        assert native is not None
        self._guard = native.Guard()
        structure.watch(self._guard)
        for module, names in record.settings:
            for name in names:
                self._guard.same(module.__dict__, name, module.__dict__[name])
        for site in record.sites:
            if site.modal:
                self._guard.same(site.bn.__dict__, "training", False)
        watched = []
        for where, name, tensor, _, _ in record.sources:
            self._guard.same(where, name, tensor)
            if tensor is not None:
                self._guard.tensor(tensor)
                watched.append(tensor.detach())
        ops = torch.ops.resnet_fast
        self._handle = ops._make_sequence(record.constants, record.steps, watched)
        weakref.finalize(self, ops._free_sequence.default, self._handle)
        self._run = ops._run_sequence.default

    def __call__(self, x: Tensor) -> Tensor | None:
        """The last step's result; None where a parameter was written to unnoticed (``.data``)."""
        y = self._run(x, self._handle)
        if y.dim() == 1:
            return None
        return y.flatten(1) if self.whole else y

    def describe(self, shape: tuple[int, ...]) -> str:
        """One line for ``explain()``; ``shape`` is an image's."""
        x = torch.empty(1, *shape, dtype=self.dtype, memory_format=torch.channels_last)
        held = torch.ops.resnet_fast._sequence_bytes(x, self._handle)
        size = "x".join(map(str, shape))
        return f"{self.count} layers run as one native call at {size}, {held / 1e6:.1f} MB an image"

    def holds(self) -> bool:
        """Whether a call is what running layer by layer would come to, but for what was written
        to parameters unnoticed, which the call itself sees."""
        return (
            self.generation == _binding.generation()
            and self.epoch == _pack.epoch()
            and self._guard.holds()
        )


def global_hooks() -> bool:
    """Whether hooks of all modules are set, which a call of several layers would skip."""
    return any(_GLOBAL_HOOKS)


def may_run(x: Any) -> bool:
    """Whether the one native call would be all that a forward of ``x`` does."""
    return (
        type(x) is Tensor
        and x.dtype in _BITS
        and x.is_cpu
        and x.layout is torch.strided
        and x.dim() == 4
        and x.shape[0] > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_transforming()
        and _binding.tuning() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch.jit.is_tracing()
        and not torch.onnx.is_in_onnx_export()
        and not global_hooks()
    )


def image_mean(x: Any) -> Tensor | None:
    """The mean over each image of ``x``, of shape (N, C, 1, 1), to the bit as in a sequence.

    None where ``x`` is not of a kind that sequences take, or not channels-last.
    """
    if torch.compiler.is_compiling() or _library.native() is None or not may_run(x):
        return None
    if x.dtype is torch.uint8 or x.numel() == 0:
        return None
    if not x.is_contiguous(memory_format=torch.channels_last):
        return None
    return cast(Tensor, torch.ops.resnet_fast._run_sequence(x, _mean_alone()))


@functools.cache
def _mean_alone() -> int:
    return cast(int, torch.ops.resnet_fast._make_sequence([], list(MEAN), []))


def sequence_key(x: Tensor) -> Any:
    """What a sequence is known by; the second entry is an image's shape."""
    return batch_class(x), x.shape[1:], x.dtype


class Attempts:
    """When to record: the first few forwards of a kind, then ever more rarely, until it works."""

    _PATIENCE = 4

    def __init__(self) -> None:
        self._made: dict[Any, int] = {}

    def due(self, key: Any) -> bool:
        """Count a forward; whether to record it."""
        made = self._made.get(key, 0)
        keep(self._made, key, made + 1)
        return made < self._PATIENCE or not made & (made - 1)

    def succeeded(self, key: Any) -> None:
        """Forget the forwards that could not be recorded."""
        self._made.pop(key, None)


class Sequences:
    """The sequences of one network, by input size. Copies and pickles of it start empty."""

    def __init__(self) -> None:
        self._known: dict[Any, Sequence] = {}
        self._heads: dict[Any, tuple[Any, Sequence | None]] = {}
        self._attempts = Attempts()

    def __reduce__(self) -> tuple[type[Sequences], tuple[()]]:
        return Sequences, ()

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], Sequence]]:
        """Image shape and sequence of each that holds."""
        known = list(self._known.items())
        return iter([(tuple(key[1]), found) for key, found in known if found.holds()])

    def forward(self, network: Any, x: Tensor) -> Tensor:
        """``network`` of ``x``: by a sequence where one holds, else layer by layer."""
        key = sequence_key(x)
        found = self._known.get(key)
        if found is not None:
            if found.structure.modules[0] == network and found.holds():
                y = found(x)
                if y is not None:
                    return y if found.whole else network._head(y)
            # Sequences of other sizes may hold the same old weights.
            self._known = {k: s for k, s in list(self._known.items()) if s.holds() and k != key}
        if not self._attempts.due(key):
            return network._head(network._trunk(x))
        # Sites convert their input once for the whole network; done here, it is the same tensor.
        x = x.contiguous(memory_format=torch.channels_last)
        _library.release_memory()  # what verification has left
        recorder = Recorder(x)
        with recorder():
            trunk = network._trunk(x)
            recorded = recorder.holds(trunk)
            y = network._head(trunk)
        built = None
        if recorded:
            whole = recorder.holds(y)
            without = () if whole else (network.avgpool, network.fc)
            built = build(Structure.below(network, without=without), recorder, whole)
            last = y if whole else trunk
            del trunk  # its memory is the arena's, where it is not compared
            if built is not None and not agrees(built, x, last):
                built = None
        if built is not None:
            keep(self._known, key, built)
            self._attempts.succeeded(key)
        return y

    def head(self, pool: Any, linear: Any, x: Tensor) -> Tensor:
        """``linear(flatten(pool(x)))``, by a sequence of two steps where that is verified.

        The same steps end a network's sequence, so that its result does not depend, to the last
        bit, on whether it ran layer by layer.
        """
        roots, key = (pool, linear), sequence_key(x)
        known_roots, found = self._heads.get(key, (None, None))
        y = found(x) if found is not None and known_roots == roots and found.holds() else None
        stale = found is not None or known_roots != roots
        if y is None and (stale or self._attempts.due(("head", *key))):
            found = self._verified_head(pool, linear, x)
            keep(self._heads, key, (roots, found))
            y = None if found is None else found(x)
        if y is None:
            return linear(torch.flatten(pool(x), 1))
        recorder = _recorder.active()
        if recorder is not None and recorder.head(pool, linear, x):
            recorder.result(y)
        return y

    @staticmethod
    def _verified_head(pool: Any, linear: Any, x: Tensor) -> Sequence | None:
        recorder = Recorder(x)
        if not recorder.head(pool, linear, x):
            return None
        built = build(Structure.below(pool, linear), recorder, True)
        if built is None:
            return None
        generator = torch.Generator().manual_seed(zlib.crc32(repr(x.shape[1:]).encode()))
        images = torch.randn(min(2, x.shape[0]), *x.shape[1:], generator=generator).to(x.dtype)
        bias = None if linear.bias is None else linear.bias.double()
        truth = F.linear(images.double().mean((2, 3)), linear.weight.double(), bias)
        given = linear(torch.flatten(pool(images), 1))
        y = built(images)
        return built if y is not None and within_budget(y, given, truth).ok else None


def build(structure: Structure, record: Recorder, whole: bool) -> Sequence | None:
    """The sequence of a record, or None where more might have run than was recorded."""
    if not structure.is_plain() or _library.native() is None:
        return None
    if any(name not in m.__dict__ for m, names in record.settings for name in names):
        return None  # computed at each look
    with torch.inference_mode(False), torch.no_grad():
        built = Sequence(structure, record, whole)
    # What the steps were made from may have been written to since they were.
    fresh = are_current(record.sources) and all(
        site.watch is None or site.watch.unchanged() for site in record.sites
    )
    return built if fresh and built.holds() else None


def agrees(sequence: Sequence, x: Tensor, value: Tensor) -> bool:
    """Whether ``sequence`` gives ``value`` for ``x``, to the last bit."""
    # Layer by layer, memory was kept for each layer's output: the arena takes its place.
    _library.release_memory()
    y = sequence(x)
    if y is None:
        return False
    bits = _BITS[x.dtype]
    return torch.equal(y.contiguous().view(bits), value.contiguous().view(bits))


class Sequenced(nn.Module):
    """A network of two parts, ``_trunk`` and ``_head``, that runs as a sequence where it can.

    Attributes:
        sequences: those of this network; None where it is to run layer by layer, by torch's own
            head.
        chains: how its residual stages run on a GPU (:mod:`resnet_fast.nn.chain`); None where
            every layer is to run by itself.
    """

    chains: Any = None
    avgpool: nn.Module
    fc: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.sequences: Sequences | None = Sequences()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or self.sequences is None or not may_run(x):
            return self._head(self._trunk(x))
        return self.sequences.forward(self, x)

    def _trunk(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _head(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or self.sequences is None or not may_run(x):
            return self.fc(torch.flatten(self.avgpool(x), 1))
        return self.sequences.head(self.avgpool, self.fc, x)
