"""One training step of a network, held against the framework's step and against the truth.

The criterion is the one for gradients through a deep network in :mod:`.budget`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fast.testing.branch import Branch
from resnet_fast.testing.budget import error, limit, limit_in_fp64

_FORMATS = (torch.contiguous_format, torch.channels_last)

Step = Callable[..., dict[str, Tensor]]


def step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, Tensor]:
    """Loss, gradients (``input.grad``, ``<parameter>.grad``) and buffers of one step, by name."""
    model.zero_grad(set_to_none=True)
    dtype = next(model.parameters()).dtype
    given = x.detach().to(dtype, memory_format=memory_format, copy=True).requires_grad_()
    loss = F.cross_entropy(model(given), y)
    loss.backward()
    result: dict[str, Any] = {"loss": loss.detach(), "input.grad": given.grad}
    result |= {f"{k}.grad": p.grad.clone() for k, p in model.named_parameters()}  # type: ignore[union-attr]
    return result | {k: b.clone() for k, b in model.named_buffers()}


class Comparison:
    """One training step of ``theirs`` in both formats and in fp64: what a step is held against.

    Values are compared with the truth, gradients with the truth on the branch that each run took
    (:mod:`.branch`). ``theirs`` is in fp64 afterwards. ``run`` takes the step.
    """

    def __init__(self, theirs: nn.Module, x: Tensor, y: Tensor, run: Step = step) -> None:
        self.state = {k: v.clone() for k, v in theirs.state_dict().items()}
        self.theirs, self.given, self.run = theirs, (x, y), run
        branches, frameworks = [], []
        for memory_format in _FORMATS:
            with Branch(theirs) as branch:
                frameworks.append(run(theirs, x, y, memory_format))
            branches.append(branch)
            theirs.load_state_dict(self.state)
        theirs.double()
        with Branch(theirs) as self.branch:
            self.truth = run(theirs, x, y)
        truths = [self.truth_on(branch) for branch in branches]
        self.errors = {
            key: max(
                error(framework[key], (truth if _is_gradient(key) else self.truth)[key])
                for framework, truth in zip(frameworks, truths, strict=True)
            )
            for key in self.truth
        }
        sizes = {key: _size(self.truth[key]) for key in self.truth if _is_gradient(key)}
        self.worst = max(self.errors[key] / size for key, size in sizes.items() if size > 0)

    def truth_on(self, branch: Branch) -> dict[str, Tensor]:
        """The step in fp64 on ``branch``."""
        if branch == self.branch:
            return self.truth
        self.theirs.load_state_dict(self.state)
        with branch.imposed():
            return self.run(self.theirs, *self.given)

    def expect(self, name: str, ours: nn.Module) -> None:
        """A step of ``ours`` in its own dtype, fp32 or fp64, is within budget."""
        with Branch(ours) as branch:
            actual = self.run(ours, *self.given)
        self.expect_values(name, actual, branch)

    def expect_values(self, name: str, actual: dict[str, Tensor], branch: Branch) -> None:
        """What a step on ``branch`` came to is within budget."""
        assert list(actual) == list(self.truth)
        own = self.truth_on(branch)
        beyond = []
        for key, value in actual.items():
            truth = own[key] if _is_gradient(key) else self.truth[key]
            if not value.is_floating_point():
                assert torch.equal(value, truth), key
                continue
            found = error(value, truth)
            level = self.worst * _size(truth)
            if value.dtype == torch.float64:
                allowed = limit_in_fp64(max(level, self.errors[key]), truth)
            else:
                single = limit(self.errors[key], value.dtype, truth)
                allowed = limit(level, value.dtype, truth) if _is_gradient(key) else single
                if found > single:
                    beyond.append(key)
            assert found <= allowed, f"{name} {key} {value.dtype}: error {found} beyond {allowed}"
        assert len(beyond) <= len(actual) / 20, f"{name}: beyond their own limits: {beyond}"


def _is_gradient(key: str) -> bool:
    return key.endswith(".grad")


def _size(tensor: Tensor) -> float:
    return tensor.abs().max().item()
