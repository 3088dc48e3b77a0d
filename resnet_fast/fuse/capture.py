"""A structural copy of a module tree, and the graphs of the parts of it that can be traced."""

from __future__ import annotations

import functools
import inspect
import operator
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as _nn_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from resnet_fast.nn.norms import AFTER_NORM, is_frozen_norm, is_norm_act

#: The child under which a convolution of the copy carries its site. Sites have no parameters, so
#: ``state_dict`` keys stay what they were, and calling the convolution alone stays a convolution.
SITE_CHILD = "fused_site"
#: The attribute that an accelerated module keeps its programs under.
STATE = "_acceleration"

_PLAIN_CONVS = {
    nn.Conv1d.forward: (nn.Conv1d, nn.Conv1d._conv_forward),
    nn.Conv2d.forward: (nn.Conv2d, nn.Conv2d._conv_forward),
    nn.Conv3d.forward: (nn.Conv3d, nn.Conv3d._conv_forward),
}
_CONSTANTS = (type(None), bool, int, float, str)


# Questions about one module.


def is_conv(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution that explain() owes a row."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def is_plain_conv(module: nn.Module) -> bool:
    """Whether calling ``module`` is exactly ``torch.nn``'s convolution of its own parameters."""
    kind = type(module)
    known = _PLAIN_CONVS.get(kind.forward)
    return (
        known is not None
        and isinstance(module, known[0])
        and getattr(kind, "_conv_forward", None) is known[1]
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and "bias" in module._parameters
    )


def is_batch_norm(module: nn.Module) -> bool:
    """Whether calling ``module`` is exactly ``torch.nn``'s batch norm, or the frozen one."""
    if is_frozen_norm(module):
        return True
    return (
        isinstance(module, _BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        and type(module).forward is _BatchNorm.forward
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` runs more than its class's ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def has_global_hooks() -> bool:
    """Whether ``torch.nn`` calls hooks around every module at present."""
    return bool(
        _nn_module._global_forward_hooks
        or _nn_module._global_forward_pre_hooks
        or _nn_module._global_backward_hooks
        or _nn_module._global_backward_pre_hooks
    )


def is_site(module: nn.Module) -> bool:
    """Whether ``module`` is a fused site."""
    return bool(getattr(module, "is_site", False))


def is_fused_already(module: nn.Module) -> bool:
    """Whether ``module`` calls fused sites in a ``forward`` of its own."""
    if any(is_site(child) for child in module._modules.values() if child is not None):
        return True
    ours = any(kind.__module__.startswith("resnet_fast.") for kind in type(module).__mro__)
    return ours and any(is_site(child) for child in module.modules())


# The copy.


def copy_tree(root: nn.Module) -> tuple[nn.Module, list[tuple[nn.Module, nn.Module]]]:
    """A copy of every module below ``root`` that shares each parameter and buffer object.

    Returns the copy and the (original, copy) pairs. Accelerated modules are copied as the class
    that they were made from, without sites. Attributes that refer to modules of the tree, in
    lists or as bound methods too, refer to the copies afterwards; other values are shared.
    """
    memo: dict[int, Any] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def shell(module: nn.Module) -> None:
        if id(module) in memo:
            return
        if isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = module  # its attributes live in C++: there is no shell to copy
            return
        kind = getattr(type(module), "accelerated_from", type(module))
        new = kind.__new__(kind)
        memo[id(module)] = new
        pairs.append((module, new))
        for child in module._modules.values():
            if child is not None and not _carried_site(module, child):
                shell(child)

    shell(root)
    for old, new in pairs:
        for key, value in old.__dict__.items():
            if key == STATE:
                continue
            if key in ("_parameters", "_buffers"):
                new.__dict__[key] = type(value)(value)
            elif key == "_modules":
                new.__dict__[key] = type(value)(
                    (name, None if child is None else memo[id(child)])
                    for name, child in value.items()
                    if child is None or not _carried_site(old, child)
                )
            elif key == "_compiled_call_impl":
                new.__dict__[key] = None  # compiled for the original
            else:
                new.__dict__[key] = _remap(value, memo)
    return memo[id(root)], pairs


def _carried_site(parent: nn.Module, child: nn.Module) -> bool:
    return is_conv(parent) and is_site(child)


def _remap(value: Any, memo: dict[int, Any]) -> Any:
    known = memo.get(id(value))
    if known is not None:
        return known
    kind = type(value)
    if kind is list:
        new: Any = memo.setdefault(id(value), [])
        new.extend(_remap(item, memo) for item in value)
        return new
    if kind in (dict, OrderedDict):
        new = memo.setdefault(id(value), kind())
        for key, item in value.items():
            new[key] = _remap(item, memo)
        return new
    if kind in (tuple, set):
        return kind(_remap(item, memo) for item in value)
    if kind is MethodType:
        return MethodType(value.__func__, _remap(value.__self__, memo))
    if kind is functools.partial:
        keywords = {key: _remap(item, memo) for key, item in value.keywords.items()}
        args = (_remap(item, memo) for item in value.args)
        return functools.partial(_remap(value.func, memo), *args, **keywords)
    return value


# The graphs.


class CaptureError(Exception):
    """A forward that a graph would not reproduce."""


@dataclass
class Signature:
    """How ``forward``'s parameters map to a graph's placeholders.

    Parameters with a default are not traced: the graph holds for their default alone.
    """

    positional: tuple[str, ...]
    dynamic: tuple[str, ...]
    static: dict[str, Any]


@dataclass
class Graph:
    """One traced graph: modules called as leaves, and the containers traced through."""

    graph: fx.Graph
    signature: Signature
    through: list[str]


@dataclass
class Unit:
    """A module of the copy with graphs of its own: the whole model, or a part that traces."""

    path: str
    module: nn.Module
    #: By ``training``. One and the same object where both modes give the same graph.
    graphs: dict[bool, Graph] = field(default_factory=dict)

    @property
    def mode_dependent(self) -> bool:
        return len(self.graphs) < 2 or self.graphs[False] is not self.graphs[True]


@dataclass
class Capture:
    """What was traced, and why the rest was not."""

    units: list[Unit] = field(default_factory=list)
    #: Path of a module that does not trace: (reason code, detail).
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)


class _Proxy(fx.Proxy):
    """A proxy that keeps ``a += b`` apart from ``a = a + b``: others may hold ``a`` too."""


def _record_inplace(name: str) -> None:
    function = getattr(operator, name)

    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(_Proxy, f"__{name}__", method)


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"):
    _record_inplace(_name)
for _name in ("iand", "ior", "ixor", "ilshift", "irshift"):
    _record_inplace(_name)


class _Tracer(fx.Tracer):
    # A buffer that forward writes to is written at each call, and not while tracing.
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.through: list[str] = []
        self.opaque: list[str] = []
        self.signature: Signature | None = None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, torch.jit.ScriptModule) or is_plain_conv(m) or is_batch_norm(m):
            return True
        # A hook must not see the tracer's proxies: the module is called as it is, and is a unit
        # of its own.
        if is_hooked(m) or is_fused_already(m):
            if module_qualified_name not in self.opaque:
                self.opaque.append(module_qualified_name)
            return True
        if super().is_leaf_module(m, module_qualified_name):
            return True
        if module_qualified_name not in self.through:
            self.through.append(module_qualified_name)
        return False

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A norm that carries its activation is a norm, and then its children's calls."""
        if not is_norm_act(m) or is_hooked(m) or len(args) != 1 or kwargs:
            return super().call_module(m, forward, args, kwargs)
        y = self.create_proxy("call_module", self.path_of_module(m), args, {})
        for name in AFTER_NORM:
            y = m._modules[name](y)  # type: ignore[misc]
        return y

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        dynamic: list[str] = []
        static: dict[str, Any] = {}
        positional: list[str] = []
        by_name: dict[str, Any] = {}
        by_position: list[Any] = []
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue  # the graph holds where nothing is passed
            if parameter.default is parameter.empty:
                dynamic.append(parameter.name)
                value: Any = self.create_proxy("placeholder", parameter.name, (), {})
            elif isinstance(parameter.default, _CONSTANTS):
                static[parameter.name] = value = parameter.default
            else:
                raise CaptureError(f"parameter {parameter.name!r} has a default of its own kind")
            if parameter.kind is parameter.KEYWORD_ONLY:
                by_name[parameter.name] = value
            else:
                positional.append(parameter.name)
                by_position.append(value)
        self.signature = Signature(tuple(positional), tuple(dynamic), static)

        def call(*args: Any) -> Any:
            return root_fn(*args, **by_name)

        return call, [self.root, *by_position]

    def create_arg(self, a: Any) -> Any:
        arg = super().create_arg(a)
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            name = str(arg.target).rpartition(".")[2]
            if name.startswith("_tensor_constant"):
                raise CaptureError("forward creates a tensor that does not depend on its input")
        return arg


@contextmanager
def untouched_rng() -> Iterator[Callable[[], bool]]:
    """Restore every random state on leaving; yields a question: was any drawn from by now?"""
    numpy = sys.modules.get("numpy")

    def state() -> tuple[Any, ...]:
        drawn = (random.getstate(), torch.get_rng_state().numpy().tobytes())
        return (*drawn, repr(numpy.random.get_state()) if numpy else None)

    python, cpu = random.getstate(), torch.get_rng_state()
    legacy = numpy.random.get_state() if numpy else None
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    before = state()
    try:
        yield lambda: state() != before
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy:
            numpy.random.set_state(legacy)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set ``training`` below ``module`` without calling ``train()``, which a class may override."""
    flags = [(m, m.training) for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    for m, _ in flags:
        m.training = training
    try:
        yield
    finally:
        for m, flag in flags:
            m.training = flag


def _trace(module: nn.Module, training: bool) -> tuple[Graph, list[str]]:
    tracer = _Tracer()
    before = [(m, dict(m.__dict__)) for m in module.modules()]
    with untouched_rng() as drew, mode(module, training):
        flagged = [(m, dict(m.__dict__)) for m in module.modules()]
        try:
            graph = tracer.trace(module)
            if drew():
                raise CaptureError("forward draws random numbers outside of modules")
            if any(_changed(m, old) for m, old in flagged):
                raise CaptureError("forward sets attributes of the module")
        finally:
            for m, old in before:
                m.__dict__.clear()
                m.__dict__.update(old)
    assert tracer.signature is not None
    tracer.through += _pass_over_identities(graph, module)
    return Graph(graph, tracer.signature, tracer.through), tracer.opaque


def _pass_over_identities(graph: fx.Graph, root: nn.Module) -> list[str]:
    """Take out what hands on the result of a convolution or a norm; the paths of such modules.

    Networks leave an ``nn.Identity`` where a block could drop values or paths, and stochastic
    depth drops none in ``eval()``. The paths are to be held on to: what is put in an identity's
    place later has to run.
    """
    paths: list[str] = []
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        above = root.get_submodule(str(source.target))
        if not (is_conv(above) or is_batch_norm(above) or is_norm_act(above)):
            continue
        if _is_identity(node, root):
            paths.append(str(node.target))
        elif not _keeps_all_paths(node):
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    return list(dict.fromkeys(paths))


def _is_identity(node: fx.Node, root: nn.Module) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    module = root.get_submodule(str(node.target))
    return type(module) is nn.Identity and not is_hooked(module)


def _keeps_all_paths(node: fx.Node) -> bool:
    """Whether the call is torchvision's stochastic depth outside of training: its first argument.

    Told by where it comes from: torchvision is optional.
    """
    if node.op != "call_function" or node.kwargs or len(node.args) != 4:
        return False
    home = getattr(node.target, "__module__", "") or ""
    name = getattr(node.target, "__name__", "")
    known = name == "stochastic_depth" and home.startswith("torchvision.ops")
    return known and node.args[3] is False


def _changed(module: nn.Module, before: dict[str, Any]) -> bool:
    now = module.__dict__
    if now.keys() != before.keys() or any(now[key] is not before[key] for key in now):
        return True
    return any(_holds_proxy(value) for value in now.values())


def _holds_proxy(value: Any) -> bool:
    if isinstance(value, fx.Proxy):
        return True
    if type(value) is dict:
        value = list(value.values())
    return type(value) in (list, tuple, set) and any(isinstance(v, fx.Proxy) for v in value)


def _fingerprint(graph: fx.Graph) -> list[Any]:
    index = {node: f"%{i}" for i, node in enumerate(graph.nodes)}

    def text(arg: Any) -> str:
        return repr(fx.map_arg(arg, lambda node: _Name(index[node])))

    return [(n.op, n.target, text(n.args), text(n.kwargs)) for n in graph.nodes]


class _Name(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def capture(root: nn.Module) -> Capture:
    """Trace ``root``, or where that fails its children, each in eval and in training mode."""
    found = Capture()
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> None:
        if id(module) in seen or not any(is_conv(m) for m in module.modules()):
            return
        seen.add(id(module))
        if is_fused_already(module):
            found.failures[path] = ("ALREADY_FUSED", "")
            return
        if is_conv(module) or isinstance(module, torch.jit.ScriptModule):
            return
        unit = Unit(path, module)
        inner: list[str] = []
        errors: list[str] = []
        for training in (False, True) if _has_forward(module) else ():
            try:
                _refuse(module)
                unit.graphs[training], opaque = _trace(module, training)
                inner += [name for name in opaque if name not in inner]
            except Exception as error:  # user code runs under the tracer: anything can be raised
                errors.append(f"{type(error).__name__}: {error}".split("\n")[0][:200])
        if unit.graphs:
            # A forward may ask for self.training, or hand it to a functional dropout or norm:
            # such a module has one graph a mode, and both call the same convolutions.
            if len(unit.graphs) == 2:
                one, other = unit.graphs[False], unit.graphs[True]
                if _fingerprint(one.graph) == _fingerprint(other.graph):
                    unit.graphs[True] = one
            found.units.append(unit)
            for name in inner:
                visit(_join(path, name), module.get_submodule(name))
            return
        if errors:
            found.failures[path] = ("TRACE_FAILED", errors[0])
        for name, child in module.named_children():
            visit(_join(path, name), child)

    visit("", root)
    return found


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _refuse(module: nn.Module) -> None:
    home = type(module).__module__
    if "forward" in module.__dict__:
        raise CaptureError("forward is replaced on the instance")
    if home.startswith(("torch.nn.parallel", "torch.distributed", "torch._dynamo")):
        raise CaptureError(f"{home} wraps the model; accelerate the module inside it")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def conv_paths(root: nn.Module) -> dict[str, _ConvNd]:
    """Every convolution below ``root`` by its first path."""
    return {path: m for path, m in root.named_modules() if is_conv(m)}  # type: ignore[misc]
