"""The traffic account: what a network's launches move and compute, counted without running them.

The network runs on meta tensors, where an op yields shapes and nothing else, under a dispatch mode
that notes every op, those of a backward too. An op of this package says itself what it moves
(:mod:`resnet_fast.ops._work`), one of the framework's is in
:mod:`resnet_fast.plan.framework_work` or :mod:`resnet_fast.plan.framework_training`, and any other
is counted by its inputs and outputs and marked as such. Real tensors, and not fake ones: those are
a subclass, for which a site would take the framework's path.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from resnet_fast import ops
from resnet_fast.errors import ArgumentError, LibraryError, PlanError
from resnet_fast.ops import _pack, _work
from resnet_fast.ops._work import Work
from resnet_fast.plan import binding, framework_training, framework_work, model_sites
from resnet_fast.plan.devices import Device
from resnet_fast.plan.plan import GROUPS, LAYERS, Entry, Plan


@dataclass(frozen=True)
class Launch:
    """One dispatcher op, for the whole batch.

    Attributes:
        op: its name, ``resnet_fast::conv_bn_act``.
        path: the module that called it, or whose derivative it is; the convolution's, for a site.
        launches: kernels that it starts.
        work: bytes and operations.
        arithmetic: what its products are computed in, as :class:`Device` lists the peaks.
        known: False where it was counted by inputs and outputs for want of better.
        inputs, outputs: shapes.
    """

    op: str
    path: str
    launches: int
    work: Work
    arithmetic: str
    known: bool
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Step:
    """The launches of a training step without the optimizer.

    Attributes:
        forward: those of the model and the loss, in order.
        backward: those of the gradients, in order.
        kept: bytes that the forward leaves for the backward: each storage that autograd holds when
            the loss is there, but for parameters and buffers. The images are among them.
    """

    forward: list[Launch]
    backward: list[Launch]
    kept: int

    @property
    def launches(self) -> list[Launch]:
        """All of them."""
        return [*self.forward, *self.backward]


def account(model: nn.Module, *inputs: Tensor) -> list[Launch]:
    """Every launch of ``model(*inputs)`` in ``eval()``, in order; all of it on the meta device.

    Work that is paid once for a parameter (folding, packing) is left out. Raises ``ArgumentError``
    for a model or an input on another device.
    """
    _check_meta(model, *inputs)
    # Not in inference mode, where composite ops reach a mode whole, before they are taken apart.
    with torch.no_grad(), _Account(model) as noted:
        model(*inputs)
    return noted.launches


def account_step(model: nn.Module, x: Tensor) -> Step:
    """Every launch of one training step of ``model`` on ``x``; all of it on the meta device.

    The loss is the cross-entropy of the model's logits [N, classes]; gradients are those of the
    parameters that take one. Raises ``ArgumentError`` for a model that is in ``eval()``, has no
    such parameter or gives no logits, and for a model or an input on another device.
    """
    _check_meta(model, x)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not model.training:
        raise ArgumentError("model", "a model in train()", "one in eval()")
    if not learned:
        raise ArgumentError("model", "a parameter that takes a gradient", "none")
    noted = _StepAccount(model)
    with torch.enable_grad(), noted:
        with torch.autograd.graph.saved_tensors_hooks(noted.pack, noted.unpack):
            logits = model(x)
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                raise ArgumentError("model", "logits of shape [N, classes]", _described(logits))
            target = torch.empty(logits.shape[0], dtype=torch.int64, device="meta")
            loss = F.cross_entropy(logits, target)
        forward, kept = len(noted.launches), noted.kept
        # Not backward(), which would also give each gradient the layout of its parameter.
        torch.autograd.grad(loss, learned, allow_unused=True)
    return Step(noted.launches[:forward], noted.launches[forward:], kept)


def _check_meta(model: nn.Module, *inputs: Tensor) -> None:
    for tensor in (*inputs, *model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            raise ArgumentError("model", "tensors on the meta device", f"one on {tensor.device}")


def _described(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


class _Account(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._paths |= {id(site): path for path, site in model_sites(model)}
        # Where a parameter, or what was derived from one, is from.
        self._homes = WeakTensorKeyDictionary()
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            self._homes[parameter] = name.rpartition(".")[0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = _result(func, args, kwargs)
        taken, given = _tensors((args, kwargs)), _tensors(result)
        if not all(tensor.is_meta for tensor in (*taken, *given)):
            raise PlanError(f"account: expected meta tensors alone, got others at {func}")
        if _pack.is_deriving() or framework_work.launches_nothing(func):
            home = self._home(taken)
            for tensor in given:
                if home is not None and tensor not in self._homes:
                    self._homes[tensor] = home
            return result
        dtype = (taken or given)[0].dtype if taken or given else torch.float32
        launches, work, known = _counted(func, result, args, kwargs)
        self.launches.append(
            Launch(
                func._schema.name,
                self._place(taken),
                launches,
                work,
                framework_work.arithmetic(func, dtype),
                known,
                tuple(tuple(tensor.shape) for tensor in taken),
                tuple(tuple(tensor.shape) for tensor in given),
            )
        )
        return result

    def _place(self, taken: Sequence[Tensor]) -> str:
        return self._path() or self._home(taken) or ""

    def _home(self, tensors: Sequence[Tensor]) -> str | None:
        return next((self._homes[t] for t in tensors if t in self._homes), None)

    def _path(self) -> str:
        """The innermost module on the stack: hooks, which would tell, switch fusion off."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_varnames[:1] == ("self",):
                path = self._paths.get(id(frame.f_locals.get("self")))
                if path:
                    return path
            frame = frame.f_back  # type: ignore[assignment]
        return ""


class _StepAccount(_Account):
    """Also what autograd keeps, and by it the module that a node of the backward belongs to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._own = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        # The tensors are held: the address of a storage that is gone may be another's.
        self._kept: dict[int, Tensor] = {}
        self._node: str | None = None

    @property
    def kept(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())

    def pack(self, tensor: Tensor) -> tuple[str, Tensor]:
        tensor = tensor.detach()
        if _storage(tensor) not in self._own:
            self._kept[_storage(tensor)] = tensor
        return self._path(), tensor

    def unpack(self, kept: tuple[str, Tensor]) -> Tensor:
        # A node asks for what it kept before it launches anything; one that kept nothing, as the
        # sum of two gradients, counts to the node before it.
        self._node, tensor = kept
        return tensor

    def _place(self, taken: Sequence[Tensor]) -> str:
        # A block that trains as a whole runs its convolutions itself: their weights tell.
        path = super()._path() if self._node is None else self._node
        home = self._home(taken) or ""
        return home if not path or home.startswith(f"{path}.") else path


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)]


def _result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    namespace, _, name = func._schema.name.partition("::")
    if namespace == "resnet_fast" and name.endswith("_triton"):
        # A Triton launcher has no kernel for the meta device; it allocates as its op does.
        op = _work.base(name)
        if op in ops.OPS:
            return ops.module(op)._fake(*args, **kwargs)
    for framework in (framework_work, framework_training):
        result = framework.on_meta(func, args)
        if result is not NotImplemented:
            return result
    return func(*args, **kwargs)


def _counted(
    func: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, Work, bool]:
    """Launches, work, and whether both are known."""
    qualified = func._schema.name
    namespace, _, name = qualified.partition("::")
    work = _work.of(name) if namespace == "resnet_fast" else None
    if work is not None:
        return *_work.total(work(*args, **kwargs)), True
    for known in (framework_work.WORK, framework_training.WORK):
        framework = known.get(qualified)
        counted = None if framework is None else framework(result, *args, **kwargs)
        if counted is not None:
            return *counted, True
    read, written = _work.nbytes(*_tensors((args, kwargs))), _work.nbytes(*_tensors(result))
    return 1, Work(read, written), False


# What runs: by name, the plan that is in force while the launches are counted.


class _Everywhere(dict[str, Entry]):
    """One entry for every site, and none for a kernel that stands for several."""

    def __init__(self, candidate: str) -> None:
        super().__init__()
        self._entry = Entry(candidate)

    def get(self, key: str, default: Any = None) -> Entry:  # type: ignore[override]
        return Entry(LAYERS) if key.split("|", 1)[0] in GROUPS else self._entry


@contextmanager
def _layers(device: Device) -> Iterator[None]:
    if not hasattr(torch.ops.resnet_fast, "_conv_bn_act_triton"):
        raise LibraryError("plan layers: its kernels are Triton's, which is not installed")
    with binding.use(Plan(device.plan_name, _Everywhere("triton"))):
        yield


def _default(device: Device) -> AbstractContextManager[None]:
    return binding.use(None)


# ``default``: what runs there untuned. ``layers``: every site as one kernel.
PLANS: dict[str, Callable[[Device], AbstractContextManager[None]]] = {
    "default": _default,
    "layers": _layers,
}


@contextmanager
def planned(plan: str, device: Device) -> Iterator[None]:
    """Within the block, sites of meta tensors are bound by the plan called ``plan``, on ``device``.

    Raises ``ArgumentError`` for a name that is not in :data:`PLANS`, ``LibraryError`` where the
    plan's kernels are not installed.
    """
    if plan not in PLANS:
        raise ArgumentError("plan", f"one of {', '.join(PLANS)}", repr(plan))
    with binding.as_if_on(device.plan_name), PLANS[plan](device):
        yield
