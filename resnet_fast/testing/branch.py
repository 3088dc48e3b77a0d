"""The branch of a piecewise-linear network that a run took: ReLU masks and pooling maxima.

The derivative of a ReLU jumps at its kink. A pre-activation that is a rounding away from it may be
masked in one run and not in another, both right, and one such flip changes the gradients of all
earlier layers by far more than every rounding together: through a hundred layers in fp32, where
some unit flips in most runs, by parts in a hundred. On one branch the gradient is smooth. A run's
gradients are therefore compared with those of the fp64 network on the branch of that run::

    with Branch(model) as branch:
        gradients = step(model)
    with branch.imposed():
        truth = step(model64)

A branch that is wrong and not only rounded shows in the values: they are continuous, and are
compared with the truth on its own branch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from resnet_fast import ops
from resnet_fast.nn.site import FusedSite

_RELU = frozenset({torch.relu, torch.relu_, F.relu, Tensor.relu, Tensor.relu_})


class Branch(TorchFunctionMode):
    """Records, in order, which side of its kink every ReLU and max-pool of ``model`` is on.

    Within the context ``model`` is to run once; a fused site with ReLU counts as the ReLU it holds,
    as do the ops that blocks train by.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.choices: list[Tensor] = []
        self._model = model
        self._handles: list[Any] = []
        self._inside = 0

    def __enter__(self) -> Branch:
        for site in self._model.modules():
            if isinstance(site, FusedSite):
                self._handles.append(site.register_forward_pre_hook(self._enter_site))
                self._handles.append(site.register_forward_hook(self._leave_site))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter_site(self, site: nn.Module, args: Any) -> None:
        self._inside += 1

    def _leave_site(self, site: Any, args: Any, y: Tensor) -> None:
        self._inside -= 1
        if site.act == "relu":
            self.choices.append(y.detach() > 0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        if self._inside == 0 and func in _RELU:
            self.choices.append(y.detach() > 0)
        elif func is F.max_pool2d:
            options = kwargs | {"return_indices": True}
            self.choices.append(func(args[0].detach(), *args[1:], **options)[1])
        elif func is torch.ops.resnet_fast.norm_act.default and args[7] == "relu":
            self.choices.append(y.detach() > 0)
        elif func is torch.ops.resnet_fast.conv_stats.default and args[7] == "relu":
            x, _, mean, rstd, weight, bias, eps, act = args[:8]
            weight, bias = (t if t is None else t.detach() for t in (weight, bias))
            operand = ops.norm_act(x.detach(), mean, rstd, weight, bias, None, eps, act)
            self.choices.append(operand > 0)
        return y

    def imposed(self) -> TorchFunctionMode:
        """A context in which a plain network of the same structure takes this branch."""
        return _Imposed(self.choices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Branch) and all(
            torch.equal(a, b) for a, b in zip(self.choices, other.choices, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


class _Imposed(TorchFunctionMode):
    def __init__(self, choices: list[Tensor]) -> None:
        super().__init__()
        self._left = list(choices)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        super().__exit__(kind, *rest)
        if kind is None and self._left:
            raise RuntimeError(f"{len(self._left)} choices of the branch were never made")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _RELU:
            return args[0] * self._left.pop(0)
        if func is F.max_pool2d:
            index = self._left.pop(0)
            return args[0].flatten(2).gather(2, index.flatten(2)).view_as(index)
        return func(*args, **(kwargs or {}))
