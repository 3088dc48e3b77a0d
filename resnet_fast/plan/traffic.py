"""The traffic account: what a network's launches move and compute, counted without running them.

The network runs on meta tensors, where an op yields shapes and nothing else, under a dispatch mode
that notes every op. An op of this package says itself what it moves (:mod:`resnet_fast.ops._work`),
one of the framework's is in :mod:`resnet_fast.plan.framework_work`, and any other is counted by its
inputs and outputs and marked as such. Real tensors, and not fake ones: those are a subclass, for
which a site would take the framework's path.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from resnet_fast import ops
from resnet_fast.errors import ArgumentError, LibraryError, PlanError
from resnet_fast.ops import _pack, _work
from resnet_fast.ops._work import Work
from resnet_fast.plan import binding, framework_work, model_sites
from resnet_fast.plan.devices import Device
from resnet_fast.plan.plan import GROUPS, LAYERS, Entry, Plan


@dataclass(frozen=True)
class Launch:
    """One dispatcher op of a forward, for the whole batch.

    Attributes:
        op: its name, ``resnet_fast::conv_bn_act``.
        path: the module that called it; the convolution's, for a site.
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


def account(model: nn.Module, *inputs: Tensor) -> list[Launch]:
    """Every launch of ``model(*inputs)`` in ``eval()``, in order; all of it on the meta device.

    Work that is paid once for a parameter (folding, packing) is left out. Raises ``ArgumentError``
    for a model or an input on another device.
    """
    tensors = [*inputs, *model.parameters(), *model.buffers()]
    for tensor in tensors:
        if not tensor.is_meta:
            raise ArgumentError("model", "tensors on the meta device", f"one on {tensor.device}")
    # Not in inference mode, where composite ops reach a mode whole, before they are taken apart.
    with torch.no_grad(), _Account(model) as noted:
        model(*inputs)
    return noted.launches


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
                self._path() or self._home(taken) or "",
                launches,
                work,
                framework_work.arithmetic(func, dtype),
                known,
                tuple(tuple(tensor.shape) for tensor in taken),
                tuple(tuple(tensor.shape) for tensor in given),
            )
        )
        return result

    def _home(self, tensors: Sequence[Tensor]) -> str | None:
        return next((self._homes[t] for t in tensors if t in self._homes), None)

    def _path(self) -> str:
        """The innermost module on the stack: hooks, which would tell, switch fusion off."""
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_varnames[:1] == ("self",):
                path = self._paths.get(id(frame.f_locals.get("self")))
                if path:
                    return path
            frame = frame.f_back  # type: ignore[assignment]
        return ""


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)]


def _result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    namespace, _, name = func._schema.name.partition("::")
    if namespace == "resnet_fast" and name.endswith("_triton"):
        # A Triton launcher has no kernel for the meta device; it allocates as its op does.
        op = _work.base(name)
        if op in ops.OPS:
            return ops.module(op)._fake(*args, **kwargs)
    result = framework_work.on_meta(func, args)
    return func(*args, **kwargs) if result is NotImplemented else result


def _counted(
    func: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, Work, bool]:
    """Launches, work, and whether both are known."""
    qualified = func._schema.name
    namespace, _, name = qualified.partition("::")
    work = _work.of(name) if namespace == "resnet_fast" else None
    if work is not None:
        return 1, work(*args, **kwargs), True
    framework = framework_work.WORK.get(qualified)
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
