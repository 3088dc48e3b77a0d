"""The rewritten graph as data, and the loop that runs it.

A :class:`Program` is a list of steps. It pickles and deep-copies with the model, and Dynamo traces
through it, since nothing is generated. Modules are looked up in the model by name at each call, so
that a replaced classifier is the one that runs; where the structure is no longer the traced one,
the program refuses, and the model's own forward runs over the unfused modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from resnet_fast.fuse.capture import (
    SITE_CHILD,
    Graph,
    Signature,
    has_global_hooks,
    is_hooked,
)
from resnet_fast.fuse.chain import ProgramChains
from resnet_fast.fuse.layout import is_layout_free
from resnet_fast.fuse.match import (
    Match,
    NormMatch,
    module_activation,
    norm_refusal,
)
from resnet_fast.fuse.prefix import Prefix, enter, follows_mean, mean_by, values_of
from resnet_fast.fuse.steps import (
    Leaf,
    Link,
    NormTarget,
    Ref,
    SiteTarget,
    Step,
    cuts_of,
    from_name,
    leaves_of,
    loaded,
    to_name,
)
from resnet_fast.nn.norms import is_norm_act, normalise
from resnet_fast.nn.recorder import Recorder
from resnet_fast.ops import activation

if TYPE_CHECKING:
    from resnet_fast.fuse.int8 import Int8

_PLANNED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Program:
    """One graph of one module, with its sites fused.

    Args:
        root: the module that the graph was traced from.
        captured: the graph.
        matches: the sites.
        norms: the batch norms that are part of none.
        path: the module's path in the model, for names.
        training: the mode that the program is for; None where it serves both.
        child: the name under which the convolutions carry their sites.
    """

    def __init__(
        self,
        root: nn.Module,
        captured: Graph,
        matches: list[Match],
        norms: list[NormMatch],
        path: str,
        training: bool | None,
        child: str = SITE_CHILD,
    ) -> None:
        self.path = path
        self.training = training
        self.signature: Signature = captured.signature
        #: Called in place of each site while a model is verified.
        self.observe: Callable[..., Tensor] | None = None
        #: What runs in its place on 8-bit operands, where that was asked for.
        self.int8: Int8 | None = None
        self.links: list[Link] = []
        #: What the links led to when the graph was traced.
        self.containers: list[nn.Module] = []
        self._index = {"": 0}
        self.root_size = len(root._modules)
        for name in captured.through:
            self._container(root, name)
        self.steps: list[Step] = []
        #: Slots of the linear layers that read the mean over each image.
        self.heads: set[int] = set()
        self.size = 0
        self.result = 0
        self._lower(root, captured.graph, matches, norms, child)
        #: Counts of first steps of whose values the later ones use the last alone.
        self.cuts = cuts_of(self.steps, len(self.signature.dynamic))
        self.prefix = Prefix()
        self.chains = ProgramChains()

    def __getstate__(self) -> dict[str, Any]:
        # Some of torch's functions are closures, and pickle only by the name they are known by.
        steps = [step._replace(target=to_name(step.target)) for step in self.steps]
        return self.__dict__ | {"steps": steps, "observe": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.steps = [step._replace(target=from_name(step.target)) for step in self.steps]

    # From graph to steps.

    def _container(self, root: nn.Module, path: str) -> int:
        if path in self._index:
            return self._index[path]
        parent, _, name = path.rpartition(".")
        above = self._container(root, parent)
        module = root.get_submodule(path)
        self.links.append(Link(above, name, len(module._modules)))
        self.containers.append(module)
        self._index[path] = len(self.containers)
        return self._index[path]

    def _leaf(self, root: nn.Module, node: fx.Node | None) -> Leaf | None:
        if node is None or node.op != "call_module":
            return None
        parent, _, name = str(node.target).rpartition(".")
        return Leaf(self._container(root, parent), name)

    def _lower(
        self,
        root: nn.Module,
        graph: fx.Graph,
        matches: list[Match],
        norms: list[NormMatch],
        child: str,
    ) -> None:
        by_place = {match.place: match for match in matches}
        by_norm = {norm.bn: norm for norm in norms}
        inside = {node for match in matches for node in match.nodes}
        inside |= {norm.tail for norm in norms}
        slot: dict[fx.Node, int] = {}
        last_use: dict[int, int] = {}
        steps: list[Step] = []

        def load(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                last_use[slot[arg]] = len(steps)
                return Ref(slot[arg])
            if isinstance(arg, tuple) and hasattr(arg, "_fields"):
                return type(arg)(*(load(item) for item in arg))
            if isinstance(arg, (tuple, list)):
                return (
                    type(arg)(load(item) for item in arg)
                    if type(arg) is tuple
                    else [load(item) for item in arg]
                )
            if isinstance(arg, dict):
                return {key: load(item) for key, item in arg.items()}
            if isinstance(arg, slice):
                return slice(load(arg.start), load(arg.stop), load(arg.step))
            return arg

        # Values that may be channels-last where the model would have had them contiguous.
        drifted: set[fx.Node] = set()

        def emit(kind: str, node: fx.Node, target: Any, args: Any, kwargs: Any) -> None:
            free = kind in ("site", "affine") or is_layout_free(kind, node, root)
            reads = args if kind == "affine" else node.all_input_nodes
            for value in reads:
                if value in drifted and not free:
                    restored = load(value)
                    slot[value] = self.size
                    self.size += 1
                    steps.append(Step("layout", slot[value], None, (restored,), {}, ()))
                    last_use.setdefault(slot[value], len(steps))
                    drifted.discard(value)
            if kind == "site" or any(value in drifted for value in reads):
                drifted.add(node)
            args, kwargs = load(args), load(kwargs)
            slot[node] = self.size
            self.size += 1
            last_use.setdefault(slot[node], len(steps))
            steps.append(Step(kind, slot[node], target, args, kwargs, ()))

        for node in graph.nodes:
            if node.op == "placeholder":
                slot[node] = self.size
                self.size += 1
        for node in graph.nodes:
            match = by_place.get(node)
            if match is not None:
                conv = self._leaf(root, match.conv)
                assert conv is not None
                target = SiteTarget(
                    conv,
                    self._leaf(root, match.bn),
                    self._leaf(root, match.act_node),
                    match.act,
                    child,
                    f"{self.path}.{match.conv.target}" if self.path else str(match.conv.target),
                    match.bn is not None and is_norm_act(root.get_submodule(str(match.bn.target))),
                )
                emit("site", match.tail, target, (match.x, match.residual), {})
            elif node in by_norm:
                norm = by_norm[node]
                bn = self._leaf(root, node)
                assert bn is not None
                alone = is_norm_act(root.get_submodule(str(node.target)))
                behind = NormTarget(bn, self._leaf(root, norm.act_node), norm.act, alone)
                emit("affine", norm.tail, behind, node.args, {})
            elif node in inside or node.op == "placeholder":
                continue
            elif node.op == "output":
                emit("output", node, None, (node.args[0],), {})
                self.result = slot[node]
            elif node.op == "call_module":
                module = root.get_submodule(str(node.target))
                emit("module", node, self._leaf(root, node), node.args, node.kwargs)
                plain = len(node.args) == 1 and not node.kwargs
                if type(module) is nn.Linear and plain and follows_mean(node, root):
                    self.heads.add(slot[node])
            elif node.op == "get_attr":
                parent, _, name = str(node.target).rpartition(".")
                leaf = Leaf(self._container(root, parent), name)
                emit("attr", node, leaf, (), {})
            else:
                kind = "method" if node.op == "call_method" else "function"
                emit(kind, node, node.target, node.args, node.kwargs)
        dead: dict[int, list[int]] = {}
        for index, step in last_use.items():
            dead.setdefault(step, []).append(index)
        self.steps = [
            step._replace(free=tuple(s for s in dead.get(i, ()) if s != self.result))
            for i, step in enumerate(steps)
        ]

    # Running.

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The placeholders' values, or None where the graph does not hold for this call."""
        signature = self.signature
        count = len(signature.dynamic)
        if not kwargs and len(args) == count and signature.positional[:count] == signature.dynamic:
            return list(args)
        if len(args) > len(signature.positional):
            return None
        values = dict(zip(signature.positional, args, strict=False))
        for name, value in kwargs.items():
            if name in values:
                return None
            values[name] = value
        for name, default in signature.static.items():
            if name in values:
                value = values.pop(name)
                if type(value) is not type(default) or value != default:
                    return None
        if len(values) != len(signature.dynamic):
            return None
        inputs = []
        for name in signature.dynamic:
            if name not in values:
                return None
            inputs.append(values[name])
        return inputs

    def modules(self, root: nn.Module) -> list[nn.Module]:
        """The containers that the steps look modules up in, as far as they are what was traced."""
        return self.enter(root)[0]

    def guarded_modules(self, root: nn.Module) -> list[nn.Module]:
        """All of them, where a sequence's guard has just seen that they are what was traced."""
        return [root, *self.containers]

    def refusal(self, root: nn.Module) -> str | None:
        """The reason code that keeps the program from running now, or None."""
        return self.enter(root)[1]

    def enter(self, root: nn.Module) -> tuple[list[nn.Module], str | None]:
        """The containers, and the reason code that keeps the program from running now, or None."""
        modules = [root]
        if len(root._modules) != self.root_size:
            return modules, "REPLACED"
        if has_global_hooks():
            return modules, "GLOBAL_HOOKS"
        for link, expected in zip(self.links, self.containers, strict=True):
            module = modules[link.parent]._modules.get(link.name)
            if module is not expected or len(module._modules) != link.size:
                return modules, "REPLACED"
            if is_hooked(module):
                return modules, "HOOKED"
            if self.training is not None and module.training != root.training:
                return modules, "MODE_MIX"
            modules.append(module)
        return modules, None

    def run(self, root: nn.Module, inputs: list[Any]) -> tuple[bool, Any]:
        """``(True, result)``, or ``(False, None)`` where ``root`` is not what was traced."""
        if self.int8 is not None and self.observe is None:
            ran, slots = self.int8.run(self, root, inputs)
            if ran:
                return True, slots[self.result]
        if self.cuts and self.observe is None:
            taken = self.prefix.run(inputs)
            if taken is not None:
                return True, self._finish(root, inputs, *taken)
        modules, refusal = self.enter(root)
        if refusal is not None:
            return False, None
        slots = [*inputs, *([None] * (self.size - len(inputs)))]
        layout = all(value.is_contiguous() for value in inputs if isinstance(value, Tensor))
        chained = self.chains.find(self, modules, inputs) if self.observe is None else None
        if chained is not None:
            chained(self, modules, slots, layout)
            return True, slots[self.result]
        recorder = None
        if self.cuts and self.observe is None:
            recorder = self.prefix.recorder(inputs)
        if recorder is None:
            self._run_steps(self.steps, modules, slots, layout)
        else:
            self._record(recorder, modules, slots, layout)
        return True, slots[self.result]

    def _finish(self, root: nn.Module, inputs: list[Any], count: int, value: Tensor) -> Any:
        """The result, once a sequence has taken ``count`` steps."""
        slots = [*inputs, *([None] * (self.size - len(inputs)))]
        slots[self.steps[count - 1].out] = value
        layout = all(x.is_contiguous() for x in inputs if isinstance(x, Tensor))
        self._run_steps(self.steps[count:], self.guarded_modules(root), slots, layout)
        return slots[self.result]

    def _record(
        self, recorder: Recorder, modules: list[nn.Module], slots: list[Any], layout: bool
    ) -> None:
        """Run all steps, and keep as many of the first ones as a sequence can stand for."""
        slots[0] = recorder.x
        ran, entered = 0, 0  # steps of the program, and of the record
        count, length, value = 0, 0, None
        with recorder():
            for step in self.steps[: self.cuts[-1]]:
                read = values_of(step.args, slots)
                self._run_steps([step], modules, slots, layout)
                ran += 1
                made = enter(recorder, step, modules, read, slots[step.out])
                entered += made
                if len(recorder) != entered or (made and not recorder.holds(slots[step.out])):
                    break
                if ran in self.cuts and recorder.holds(slots[step.out]):
                    count, length, value = ran, entered, slots[step.out]
        self._run_steps(self.steps[ran:], modules, slots, layout)
        if value is not None:
            called: list[Any] = [
                modules[leaf.container]._modules[leaf.name]
                for step in self.steps[:count]
                for leaf in leaves_of(step)
            ]
            recorder.cut(length)
            modal = self.training is not None
            self.prefix.keep(recorder, count, value, called, modules, modal)

    def _run_steps(
        self, steps: list[Step], modules: list[nn.Module], slots: list[Any], contiguous: bool
    ) -> None:
        for kind, out, target, args, kwargs, free in steps:
            if kind == "site":
                residual = args[1]
                value = self._site(
                    target,
                    modules,
                    slots[args[0].slot],
                    None if residual is None else slots[residual.slot],
                )
            elif kind == "affine":
                value = self._norm(out, target, modules, slots[args[0].slot])
            elif kind == "module":
                module = modules[target.container]._modules[target.name]
                if out in self.heads:
                    value = self.prefix.linears(out, module, slots[args[0].slot])
                else:
                    value = mean_by(module, args, kwargs, slots)
                if value is None:
                    value = module(*loaded(args, slots), **loaded(kwargs, slots))
            elif kind == "function":
                value = mean_by(target, args, kwargs, slots)
                if value is None:
                    value = target(*loaded(args, slots), **loaded(kwargs, slots))
            elif kind == "method":
                value = mean_by(target, args, kwargs, slots)
                if value is None:
                    receiver, *rest = loaded(args, slots)
                    value = getattr(receiver, target)(*rest, **loaded(kwargs, slots))
            elif kind == "layout":
                value = slots[args[0].slot]
                if contiguous and isinstance(value, Tensor):
                    value = value.contiguous()
            elif kind == "attr":
                value = getattr(modules[target.container], target.name)
            else:
                value = loaded(args[0], slots)
            slots[out] = value
            for index in free:
                slots[index] = None

    def _norm(self, place: int, target: NormTarget, modules: list[nn.Module], x: Any) -> Any:
        bn, act = _lookup(modules, target.bn), _lookup(modules, target.act_module)
        if self.observe is None and (act is None or module_activation(act) == target.act):
            y = self.prefix.norms(place, bn, target.act, x)
            if y is not None:
                return y
        y = normalise(bn, x) if target.norm_alone else bn(x)
        return activation.value(target.act, y) if act is None else act(y)

    def _site(self, target: SiteTarget, modules: list[nn.Module], x: Any, residual: Any) -> Any:
        conv = _lookup(modules, target.conv)
        bn = _lookup(modules, target.bn)
        act = _lookup(modules, target.act_module)
        if self.observe is not None:
            return self.observe(target, conv, bn, act, x, residual)
        return run_site(target, conv, bn, act, x, residual)


def run_site(target: SiteTarget, conv: Any, bn: Any, act: Any, x: Any, residual: Any) -> Any:
    """The site's value: fused where its modules are still what was matched."""
    site = conv._modules.get(target.child)
    if (
        site is None
        or (act is not None and module_activation(act) != target.act)
        or (residual is not None and not isinstance(residual, Tensor))
        or (bn is None) != (target.bn is None)
    ):
        return run_unfused(target, conv, bn, act, x, residual)
    return site(planned_layout(x), conv, bn, residual)


def planned_layout(x: Tensor) -> Tensor:
    """``x`` in channels-last where a fused candidate may run: what candidates are best at."""
    if x.dim() != 4 or torch.is_grad_enabled() or x.dtype not in _PLANNED_DTYPES:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def run_unfused(target: SiteTarget, conv: Any, bn: Any, act: Any, x: Any, residual: Any) -> Any:
    """The site's value by the modules and functions that it stands for."""
    y = conv(x)
    if target.bn is not None:
        y = normalise(bn, y) if target.norm_alone else bn(y)
    if residual is not None:
        y = y + residual
    return activation.value(target.act, y) if act is None else act(y)


def site_refusal(target: SiteTarget, program: Program, root: nn.Module) -> str | None:
    """The reason code that keeps one site from being fused now, or None."""
    modules, refusal = program.enter(root)
    if refusal is not None:
        return refusal
    conv, bn = _lookup(modules, target.conv), _lookup(modules, target.bn)
    act = _lookup(modules, target.act_module)
    if conv is None or target.child not in conv._modules:
        return "REPLACED"
    if is_hooked(conv) or (act is not None and is_hooked(act)):
        return "HOOKED"
    if act is not None and module_activation(act) != target.act:
        return "REPLACED"
    return None if bn is None else norm_refusal(bn, conv.out_channels, target.norm_alone)


def _lookup(modules: list[nn.Module], leaf: Leaf | None) -> Any:
    return None if leaf is None else modules[leaf.container]._modules[leaf.name]
