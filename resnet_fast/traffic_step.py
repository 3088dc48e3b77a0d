"""The traffic of a training step, forward and backward, beside the framework's module by module.

Nothing runs, as in :mod:`resnet_fast.traffic`. A step is the model in ``train()``, the
cross-entropy of its logits, and the gradients of its parameters; the optimizer is none of it. In
fp16 and bf16 the batch norms' parameters stay fp32, as mixed precision has them. Everything is
channels-last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fast import verify
from resnet_fast.errors import LibraryError
from resnet_fast.nn import BasicBlock, Bottleneck
from resnet_fast.plan import traffic
from resnet_fast.plan.traffic import Launch, Step
from resnet_fast.plan.training import NAME
from resnet_fast.traffic import Question, ask, images, stages, unknown

PHASES = ("forward", "backward")


@dataclass(frozen=True)
class StepWay:
    """One way to train the network: its step, or why there is none.

    ``notes`` say what a reader of the figures has to know.
    """

    name: str
    step: Step | None
    absence: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepTraffic:
    """The answer: the plan's step, and the yardsticks."""

    question: Question
    plan: StepWay
    yardsticks: tuple[StepWay, ...]

    def phases(self, step: Step) -> dict[str, list[Launch]]:
        """The launches of ``step`` by phase, and all of them as ``step``."""
        return {"forward": step.forward, "backward": step.backward, "step": step.launches}

    def figures(self, step: Step) -> dict[str, Any]:
        """Sums an image by phase (:meth:`resnet_fast.traffic.Question.totals`).

        ``mb_kept_per_image`` is what the forward leaves for the backward, ``mb_again_per_image``
        the part of the backward that computes again what a kernel of the forward has not stored.
        """
        found = {name: self.totals(launches) for name, launches in self.phases(step).items()}
        return {
            **found.pop("step"),
            "mb_kept_per_image": step.kept / self.question.batch / 1e6,
            "mb_again_per_image": self.totals(again(step))["mb_per_image"],
            **found,
        }

    def totals(self, launches: list[Launch]) -> dict[str, Any]:
        """Sums of ``launches``; parameters, which a gradient may take for an image's, apart."""
        found = self.question.totals(launches)
        del found["mb_parameters_per_image"]
        return found

    def stages(self, step: Step) -> dict[str, dict[str, list[Launch]]]:
        """Launches by stage and phase, in the order of the forward."""
        found: dict[str, dict[str, list[Launch]]] = {}
        for stage, phase, launch in _staged(step):
            found.setdefault(stage, {name: [] for name in PHASES})[phase].append(launch)
        return found

    def rows(self, step: Step) -> list[dict[str, Any]]:
        """One row a launch, bytes and operations of the whole batch."""
        rows = []
        for stage, phase, launch in _staged(step):
            seconds, roof = self.question.time(launch)
            rows.append(
                {
                    "op": launch.op,
                    "path": launch.path,
                    "stage": stage,
                    "phase": phase,
                    "launches": launch.launches,
                    "read": launch.work.read,
                    "written": launch.work.written,
                    "flops": launch.work.flops,
                    "arithmetic": launch.arithmetic,
                    "known": launch.known,
                    "us_per_image": seconds / self.question.batch * 1e6,
                    "roof": roof,
                    "inputs": launch.inputs,
                    "outputs": launch.outputs,
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        assert self.plan.step is not None
        ways = {way.name: self._way(way) for way in self.yardsticks}
        return {
            **self.question.to_dict(),
            "train": True,
            **self._way(self.plan),
            "yardsticks": ways,
            "rows": self.rows(self.plan.step),
        }

    def _way(self, way: StepWay) -> dict[str, Any]:
        if way.step is None:
            return {"absence": way.absence}
        staged = {
            stage: {phase: self.totals(launches) for phase, launches in found.items()}
            for stage, found in self.stages(way.step).items()
        }
        return {**self.figures(way.step), "stages": staged, "notes": way.notes}


def again(step: Step) -> list[Launch]:
    """The launches of the backward that belong to no gradient."""
    return [launch for launch in step.backward if launch.op == "resnet_fast::norm_act"]


def count_step(
    model: str,
    dtype: str = "fp16",
    batch: int = 1,
    size: int | None = None,
    device: str = "H100",
    plan: str = "default",
) -> StepTraffic:
    """Count a training step of network ``model``; takes and raises what
    :func:`resnet_fast.traffic.count` does."""
    question = ask(model, dtype, batch, size, device, plan)
    counted = _planned(question, plan)
    layers = counted
    if plan != "layers":
        try:
            layers = _planned(question, "layers")
        except LibraryError as missing:
            layers = StepWay("layers", None, absence=str(missing))
    eager, source = _trained(question, lambda: verify.build_reference(question.model))
    step = traffic.account_step(eager, images(question))
    reference = StepWay("eager", step, notes=(source, *unknown(step.launches)))
    return StepTraffic(question, counted, (reference, layers))


def _trained(question: Question, build: Callable[[], tuple[nn.Module, str]]) -> tuple[Any, str]:
    """The network that ``build`` gives on the meta device, as it trains, and its source."""
    with torch.device("meta"):
        model, source = build()
    dtype = verify.dtype_from_name(question.dtype)
    model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.float()
    return model.train(), source


def _planned(question: Question, plan: str) -> StepWay:
    model, _ = _trained(question, lambda: (verify.build_model(question.model), ""))
    with traffic.planned(plan, question.device):
        step = traffic.account_step(model, images(question))
    blocks = [path for path, m in model.named_modules() if type(m) in (BasicBlock, Bottleneck)]
    ran = Counter(
        ".".join(launch.path.split(".")[:2])
        for launch in step.forward
        if launch.op == f"resnet_fast::{NAME}"
    )
    fused = sum(path in ran for path in blocks)
    notes = [f"{fused} of {len(blocks)} residual blocks train by {NAME}"]
    if fused:
        notes[0] += ", taken as verified and faster"
    return StepWay(plan, step, notes=(*notes, *unknown(step.launches)))


def _staged(step: Step) -> list[tuple[str, str, Launch]]:
    forward = zip(stages(step.forward), step.forward, strict=True)
    # The other way round a backward goes through the stages as a forward does.
    backward = step.backward[::-1]
    turned = list(zip(stages(backward), backward, strict=True))[::-1]
    return [
        *((stage, "forward", launch) for stage, launch in forward),
        *((stage, "backward", launch) for stage, launch in turned),
    ]
