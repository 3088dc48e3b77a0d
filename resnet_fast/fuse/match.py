"""Sites found by dataflow: ``conv [-> batch norm] [-> add residual] [-> activation]``.

A value between two of these has one user, so that nobody misses it. A convolution that nothing of
this follows is a site by itself, and ``batch norm [-> activation]`` behind something else a step of
its own. Names of attributes and of classes outside ``torch.nn`` play no part.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fast.fuse.capture import (
    Graph,
    is_batch_norm,
    is_conv,
    is_fused_already,
    is_hooked,
    is_plain_conv,
)
from resnet_fast.nn.norms import is_norm_act
from resnet_fast.ops.activation import LEAKY_SLOPE

#: Why a convolution was not fused, or not as far as it might be.
REASONS: dict[str, str] = {
    "FUSED": "fused at this site",
    "ALONE": "nothing is fused with the convolution, which runs as the plan chose",
    "INT8": "runs on 8-bit operands, as was asked for",
    # Why it is alone.
    "NO_BN": "neither batch norm, residual nor activation follows the convolution",
    "MULTIPLE_USERS": "the convolution's result is used more than once",
    "SHARED_MODULE": "the convolution or its norm is called more than once",
    "HOOKED": "hooks or a replaced forward would be skipped by a fused call",
    "UNKNOWN_CONV": "the convolution is not a plain torch.nn convolution",
    "UNKNOWN_NORM": "the norm that follows is not a batch norm with the framework's own forward",
    "BATCH_STATS": "the norm that follows uses batch statistics in eval()",
    "PADDING_MODE": "the convolution pads with something else than zeros",
    "NOT_REACHED": "the traced forward does not call the convolution as a module",
    "TRACE_FAILED": "no forward that calls the convolution can be traced",
    "ALREADY_FUSED": "the network calls fused sites of its own here",
    "NOT_ACCELERATED": "the model has not been accelerated",
    "REPLACED": "a module on the way was replaced, added or removed after accelerate()",
    "GLOBAL_HOOKS": "torch.nn global module hooks are registered",
    "MODE_MIX": "modules are in another mode than the model and its forward depends on it",
    "VERIFY_FAILED": "the result left the error budget on example_inputs and was rolled back",
    # The residual stays a separate add, the rest of the site is fused.
    "ADD_ALPHA": "the add scales an operand or writes to a given tensor",
    "ADD_BROADCAST": "the residual is not of the output's shape",
    "ADD_INPLACE": "the add writes into a residual that others may see",
    "ADD_HAZARD": "the convolution's input is modified in place before the add",
}

#: Of a convolution that runs as the plan chose.
SITES = ("FUSED", "ALONE")

_ACT_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
    nn.LeakyReLU: "leaky_relu",
    nn.Sigmoid: "sigmoid",
}
_ACT_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
}
_ACT_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid"}
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_INPLACE_OPERATORS = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.imatmul,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
    operator.setitem,
)
_FRESH_FUNCTIONS: tuple[Any, ...] = (
    operator.add,
    operator.mul,
    operator.sub,
    operator.truediv,
    torch.add,
    torch.cat,
    torch.mul,
    torch.relu,
    torch.sigmoid,
    F.conv2d,
)
_ADD_METHODS = ("add", "add_", "__add__", "__iadd__")
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
_NORM_FUNCTIONS = (F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm, torch.batch_norm)


def module_activation(module: nn.Module | None) -> str | None:
    """The name of the activation that calling ``module`` computes, or None."""
    act = _ACT_MODULES.get(type(module))  # type: ignore[arg-type]
    if module is None or act is None or is_hooked(module):
        return None
    if act == "gelu" and module.approximate != "none":
        return None
    if act == "leaky_relu" and module.negative_slope != LEAKY_SLOPE:
        return None
    return act


def norm_refusal(bn: Any, channels: int, alone: bool) -> str | None:
    """The reason code that keeps ``bn`` from being part of a site, or None.

    ``alone``: of a norm with an activation of its own the site takes the norm alone.
    """
    if is_hooked(bn):
        return "HOOKED"
    if not is_batch_norm(bn) and not (alone and is_norm_act(bn)):
        return "UNKNOWN_NORM"
    if getattr(bn, "running_mean", None) is None or getattr(bn, "running_var", None) is None:
        return "BATCH_STATS"
    if bn.running_mean.numel() != channels:
        return "UNKNOWN_NORM"
    return None


@dataclass
class Match:
    """One site: the nodes it stands for, and where its step goes."""

    conv: fx.Node
    bn: fx.Node | None = None
    add: fx.Node | None = None
    residual: fx.Node | None = None
    act_node: fx.Node | None = None
    act: str = "none"
    #: Why the add that follows stayed outside, or why nothing is fused with the convolution.
    note: str = ""

    @property
    def x(self) -> fx.Node:
        return self.conv.args[0] if self.conv.args else self.conv.kwargs["input"]  # type: ignore

    @property
    def tail(self) -> fx.Node:
        """The node whose value the site computes."""
        return self.act_node or self.add or self.bn or self.conv

    @property
    def place(self) -> fx.Node:
        """The node at whose position the site runs.

        Without a residual that is the convolution's, where its input is read in any case. A
        residual has to be there first, and is read at the add.
        """
        return self.add or self.conv

    @property
    def nodes(self) -> list[fx.Node]:
        chain = (self.conv, self.bn, self.add, self.act_node)
        return [node for node in chain if node is not None]

    @property
    def fuses(self) -> bool:
        return self.bn is not None or self.add is not None or self.act_node is not None


@dataclass
class NormMatch:
    """A batch norm that is part of no site, and the activation behind it."""

    bn: fx.Node
    act_node: fx.Node | None = None
    act: str = "none"

    @property
    def tail(self) -> fx.Node:
        """The node whose value the step computes."""
        return self.act_node or self.bn


def call_counts(graphs: list[Graph], roots: list[nn.Module]) -> Counter[int]:
    """How often each module is called over the graphs of one mode, by id."""
    counts: Counter[int] = Counter()
    for graph, root in zip(graphs, roots, strict=True):
        for node in graph.graph.nodes:
            if node.op == "call_module":
                counts[id(root.get_submodule(str(node.target)))] += 1
    return counts


class Matcher:
    """Finds the sites of one graph.

    Args:
        captured: the graph.
        root: the module that it was traced from.
        calls: how often each module is called in this mode, by id.
        without_add: targets of convolutions whose add has been ruled out, with the reason code.
    """

    def __init__(
        self,
        captured: Graph,
        root: nn.Module,
        calls: Counter[int],
        without_add: dict[str, str] | None = None,
    ) -> None:
        self.graph, self.root, self.calls = captured.graph, root, calls
        self.without_add = without_add or {}
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.modules = {
            node: root.get_submodule(str(node.target))
            for node in self.graph.nodes
            if node.op == "call_module"
        }
        self._alias: dict[fx.Node, frozenset[fx.Node]] = {}
        self._depth: dict[fx.Node, int] = {}
        for node in self.graph.nodes:
            inputs = node.all_input_nodes
            sources = [node] if self._is_fresh(node) or not inputs else inputs
            self._alias[node] = frozenset({node}).union(*(self._alias.get(n, ()) for n in sources))
            self._depth[node] = max((self._depth[n] for n in inputs), default=0) + self._is_conv(
                node
            )

    def find(self) -> tuple[list[Match], dict[str, str]]:
        """The sites, and the reason code of every other convolution that is called, by target."""
        refused: dict[str, str] = {}
        chains: dict[fx.Node, Match] = {}  # by the last node so far
        for node in self.graph.nodes:
            if self._is_conv(node):
                match = Match(node)
                reason = self._start(match)
                if reason is None:
                    chains[match.tail] = match
                else:
                    refused[str(node.target)] = reason
        for node in self.graph.nodes:
            if _is_add(node):
                self._take_add(node, chains)
        matches = []
        for match in chains.values():
            self._take_activation(match)
            if not match.fuses:
                match.note = match.note or "NO_BN"
            matches.append(match)
        return matches, refused

    def norms(self, sites: list[Match]) -> list[NormMatch]:
        """The batch norms that ``sites`` leave, with their activations."""
        taken = {node for site in sites for node in site.nodes}
        found = []
        for node, module in self.modules.items():
            plain = (is_batch_norm(module) or is_norm_act(module)) and not is_hooked(module)
            if node in taken or not plain or len(node.args) != 1 or node.kwargs:
                continue
            match = NormMatch(node)
            user = _only_user(node)
            act = None if user is None else self._activation(user, node)
            if act is not None:
                match.act_node, match.act = user, act
            found.append(match)
        return found

    def _is_conv(self, node: fx.Node) -> bool:
        return node.op == "call_module" and is_conv(self.modules[node])

    def _start(self, match: Match) -> str | None:
        node = match.conv
        conv: Any = self.modules[node]
        if is_hooked(conv):
            return "HOOKED"
        if not is_plain_conv(conv):
            return "UNKNOWN_CONV"
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return "PADDING_MODE"
        arguments = (*node.args, *node.kwargs.values())
        if len(arguments) != 1 or not isinstance(arguments[0], fx.Node):
            return "UNKNOWN_CONV"
        if self.calls[id(conv)] != 1:
            return "SHARED_MODULE"
        if len(node.users) > 1:
            match.note = "MULTIPLE_USERS"
        user = _only_user(node)
        if user is None:
            return None
        if user.op == "call_module":
            norm = self.modules[user]
            if is_batch_norm(norm) or isinstance(norm, _NORMS):
                if user.args != (node,) or user.kwargs:
                    return "UNKNOWN_NORM"
                reason = norm_refusal(norm, conv.out_channels, alone=True)
                if reason is None and self.calls[id(norm)] != 1:
                    reason = "SHARED_MODULE"
                if reason is None:
                    match.bn = user
                return reason
        elif user.op == "call_function" and user.target in _NORM_FUNCTIONS:
            return "UNKNOWN_NORM"
        return None

    def _take_add(self, add: fx.Node, chains: dict[fx.Node, Match]) -> None:
        a, b = add.args[:2] if len(add.args) > 1 else (add.args[0], add.kwargs.get("other"))
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
            return
        owners = [
            (chains[tail], other)
            for tail, other in ((a, b), (b, a))
            if tail in chains and chains[tail].add is None and _only_user(tail) is add
        ]
        # Of two branches that end in a convolution the deeper one takes the add: the other is
        # the projection of the shortcut.
        owners.sort(key=lambda o: (self._depth[o[0].conv], self.order[o[0].conv]), reverse=True)
        for match, residual in owners:
            reason = self._add_refusal(add, match, residual)
            if reason is None:
                del chains[match.tail]
                match.add, match.residual, match.note = add, residual, ""
                chains[match.tail] = match
                return
            match.note = reason

    def _add_refusal(self, add: fx.Node, match: Match, residual: fx.Node) -> str | None:
        forced = self.without_add.get(str(match.conv.target))
        if forced is not None:
            return forced
        extra = {k: v for k, v in add.kwargs.items() if k != "other"}
        if len(add.args) > 2 or extra.pop("alpha", 1) != 1 or extra:
            return "ADD_ALPHA"
        if _is_inplace_add(add) and add.args[0] is residual:
            # `residual += y` is also seen by whoever shares the residual's memory.
            alone = len(residual.users) == 1 and self._alias[residual] == {residual}
            if not alone or residual.op != "call_module":
                return "ADD_INPLACE"
        # The convolution moves down to the add, so its input must be as it was until there.
        x = self._alias[match.x]
        for node in self.graph.nodes:
            if self.order[match.conv] < self.order[node] < self.order[add]:
                written = self._written(node)
                if any(self._alias[value] & x for value in written):
                    return "ADD_HAZARD"
        return None

    def _take_activation(self, match: Match) -> None:
        if match.note and match.add is None:
            return
        user = _only_user(match.tail)
        act = None if user is None else self._activation(user, match.tail)
        if act is not None:
            match.act_node, match.act = user, act

    def _activation(self, node: fx.Node, value: fx.Node) -> str | None:
        if not node.args or node.args[0] is not value:
            return None
        if node.op == "call_module":
            simple = len(node.args) == 1 and not node.kwargs
            return module_activation(self.modules[node]) if simple else None
        if node.op == "call_method":
            simple = len(node.args) == 1 and not node.kwargs
            return _ACT_METHODS.get(str(node.target)) if simple else None
        if node.op != "call_function":
            return None
        act = _ACT_FUNCTIONS.get(node.target)
        if act is None:
            return None
        options = dict(node.kwargs)
        options.pop("inplace", None)
        rest = list(node.args[1:])
        if act == "gelu":
            return act if not rest and options.get("approximate", "none") == "none" else None
        if act == "leaky_relu":
            slope = rest.pop(0) if rest else options.pop("negative_slope", LEAKY_SLOPE)
            return act if slope == LEAKY_SLOPE and not options else None
        return act if not options and all(isinstance(value, bool) for value in rest) else None

    # Memory: which values share it, and which calls write to it.

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether the value has memory of its own. Doubt means no."""
        if node.op == "call_module":
            module = self.modules[node]
            return _is_pure(module) and not isinstance(
                module, (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
            )
        if node.op == "call_function":
            return node.target in _FRESH_FUNCTIONS or (
                node.target in _ACT_FUNCTIONS and not self._written(node)
            )
        return False

    def _written(self, node: fx.Node) -> list[fx.Node]:
        """The values that the call may write to. Doubt means all of its inputs."""
        inputs = list(node.all_input_nodes)
        if node.op == "call_module":
            return [] if _is_pure(self.modules[node]) else inputs
        if node.op == "call_method":
            name = str(node.target)
            return (
                inputs
                if name.endswith("_") and not name.endswith("__")
                else (inputs if name.startswith("__i") or name == "__setitem__" else [])
            )
        if node.op != "call_function":
            return []
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        home = getattr(target, "__module__", None) or ""
        name = getattr(target, "__name__", "")
        known = home.startswith(("torch", "_operator", "operator", "math", "builtins")) or (
            getattr(torch, name, None) is target
        )
        if not known or "out" in node.kwargs or node.kwargs.get("inplace") or name == "setitem":
            return inputs
        if is_inplace_function(target):
            return inputs
        if any(arg is True for arg in node.args) and _takes_inplace(target):
            return inputs
        return []


def _is_pure(module: nn.Module) -> bool:
    """Whether calling a leaf neither writes to its input nor can run a user's code."""
    return (
        (
            type(module).__module__.startswith("torch.nn.modules")
            or is_batch_norm(module)
            or is_norm_act(module)
        )
        and not getattr(module, "inplace", False)
        and not is_hooked(module)
        and not is_fused_already(module)
    )


def _takes_inplace(target: Callable[..., Any]) -> bool:
    try:
        return "inplace" in inspect.signature(target).parameters
    except (TypeError, ValueError):
        return True


def is_inplace_function(target: Any) -> bool:
    """Whether ``target`` writes to its first argument by its very name."""
    name = getattr(target, "__name__", "")
    return (name.endswith("_") and not name.startswith("_")) or target in _INPLACE_OPERATORS


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_add(node: fx.Node) -> bool:
    if not node.args:
        return False
    if node.op == "call_function":
        return node.target in _ADD_FUNCTIONS
    return node.op == "call_method" and node.target in _ADD_METHODS


def _is_inplace_add(node: fx.Node) -> bool:
    return node.target is operator.iadd or node.target in ("add_", "__iadd__")
