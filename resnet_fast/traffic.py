"""The traffic of a network on a device, beside what other ways of running it would move.

Nothing runs: :mod:`resnet_fast.plan.traffic` counts on meta tensors. The yardsticks are the
framework's network module by module, every site as one kernel, and the minimum: each residual block
as one kernel that reads its input and writes its output, the stem up to the first block and the
head as one each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import verify
from resnet_fast._version import __version__
from resnet_fast.errors import ArgumentError, LibraryError
from resnet_fast.ops._work import Work, base, nbytes
from resnet_fast.plan import devices, model_rows, traffic
from resnet_fast.plan.devices import Device
from resnet_fast.plan.plan import GROUPS
from resnet_fast.plan.reasons import REASONS
from resnet_fast.plan.traffic import Launch


@dataclass(frozen=True)
class Question:
    """What is asked: a network, what it is given, where and how it is to run."""

    model: str
    dtype: str
    batch: int
    size: int
    device: Device
    plan: str

    def totals(self, launches: Iterable[Launch]) -> dict[str, Any]:
        """Sums an image, in MB (10⁶ bytes), GFLOP and microseconds at the roofline.

        ``roof`` is the one that takes the larger part of the time, ``roof_share`` that part.
        """
        launches = list(launches)
        times = {"memory": 0.0, "compute": 0.0}
        for launch in launches:
            seconds, roof = self.time(launch)
            times[roof] += seconds
        roof, total = max(times, key=times.__getitem__), sum(times.values())

        def megabytes(name: str) -> float:
            return sum(getattr(launch.work, name) for launch in launches) / self.batch / 1e6

        read, written = megabytes("read"), megabytes("written")
        return {
            "launches": sum(launch.launches for launch in launches),
            "mb_per_image": read + written,
            "mb_read_per_image": read,
            "mb_written_per_image": written,
            "mb_parameters_per_image": megabytes("parameters"),
            "gflop_per_image": sum(launch.work.flops for launch in launches) / self.batch / 1e9,
            "us_per_image": total / self.batch * 1e6,
            "images_per_second": self.batch / total if total else None,
            "roof": roof,
            "roof_share": times[roof] / total if total else None,
        }

    def time(self, launch: Launch) -> tuple[float, str]:
        """Seconds of ``launch`` at the roofline, and the roof."""
        work = launch.work
        return self.device.seconds(work.read + work.written, work.flops, launch.arithmetic)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        asked = {name: getattr(self, name) for name in ("model", "dtype", "batch", "size", "plan")}
        return {
            **asked,
            "device": vars(self.device),
            "versions": {"resnet_fast": __version__, "torch": str(torch.__version__)},
        }


@dataclass(frozen=True)
class Way:
    """One way to run the network: its launches, or why it has none.

    ``notes`` say what a reader of the figures has to know.
    """

    name: str
    launches: list[Launch] = field(default_factory=list)
    absence: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Traffic:
    """The answer: the plan's launches, and the yardsticks."""

    question: Question
    plan: Way
    yardsticks: tuple[Way, ...]

    def totals(self, launches: Iterable[Launch]) -> dict[str, Any]:
        """:meth:`Question.totals`."""
        return self.question.totals(launches)

    def time(self, launch: Launch) -> tuple[float, str]:
        """:meth:`Question.time`."""
        return self.question.time(launch)

    def stages(self) -> dict[str, list[Launch]]:
        """The plan's launches by stage: stem, the network's layers, head."""
        found: dict[str, list[Launch]] = {}
        for stage, launch in zip(stages(self.plan.launches), self.plan.launches, strict=True):
            found.setdefault(stage, []).append(launch)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One row a launch, bytes and operations of the whole batch."""
        rows = []
        for stage, launch in zip(stages(self.plan.launches), self.plan.launches, strict=True):
            seconds, roof = self.time(launch)
            rows.append(
                {
                    "op": launch.op,
                    "path": launch.path,
                    "stage": stage,
                    "launches": launch.launches,
                    **launch.work._asdict(),
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
        return {
            **self.question.to_dict(),
            **self.totals(self.plan.launches),
            "notes": self.plan.notes,
            "stages": {stage: self.totals(found) for stage, found in self.stages().items()},
            "yardsticks": {
                way.name: {**self.totals(way.launches), "notes": way.notes}
                if way.launches
                else {"absence": way.absence}
                for way in self.yardsticks
            },
            "rows": self.rows(),
        }


def count(
    model: str,
    dtype: str = "fp16",
    batch: int = 1,
    size: int | None = None,
    device: str = "H100",
    plan: str = "default",
) -> Traffic:
    """Count network ``model`` under ``plan`` (:data:`resnet_fast.plan.traffic.PLANS`).

    ``device`` is one of :data:`resnet_fast.plan.devices.DEVICES`. Raises ``ArgumentError`` for
    names and numbers that there are none of, ``LibraryError`` where the plan's kernels are missing.
    """
    question = ask(model, dtype, batch, size, device, plan)
    counted = _planned(question, plan)
    layers = counted
    if plan != "layers":
        try:
            layers = _planned(question, "layers")
        except LibraryError as missing:
            layers = Way("layers", absence=str(missing))
    eager, minimum = _references(question)
    return Traffic(question, counted, (eager, layers, minimum))


def ask(model: str, dtype: str, batch: int, size: int | None, device: str, plan: str) -> Question:
    """The question as :func:`count` takes it, with the network's size where none is given."""
    verify.check_model_name(model)
    verify.dtype_from_name(dtype)
    chosen = devices.named(device)
    if plan not in traffic.PLANS:
        raise ArgumentError("plan", f"one of {', '.join(traffic.PLANS)}", repr(plan))
    if batch < 1:
        raise ArgumentError("batch", "at least 1", str(batch))
    side = verify.default_size(model) if size is None else size
    return Question(model, dtype, batch, side, chosen, plan)


def _planned(question: Question, plan: str) -> Way:
    with torch.device("meta"):
        model = verify.build_model(question.model)
    model.to(verify.dtype_from_name(question.dtype))
    with traffic.planned(plan, question.device):
        launches = traffic.account(model, images(question))
        rows = model_rows(model)
    # Sites of layers that a kernel of several took in have not run.
    inside = sum(row["reason"] == "NOT_RUN" for row in rows)
    groups = sum(base(launch.op.rpartition("::")[2]) in GROUPS for launch in launches)
    ran = [row for row in rows if row["reason"] != "NOT_RUN"]
    sites = Counter((row["candidate"], row["reason"]) for row in ran)
    notes = [f"{inside} sites within {groups} kernels of several layers"] if groups else []
    notes += [
        f"{number} sites by {candidate}: {REASONS[reason]}"
        for (candidate, reason), number in sites.most_common()
    ]
    notes += dict.fromkeys(row["notes"] for row in rows if row["notes"])
    return Way(plan, launches, notes=(*notes, *unknown(launches)))


def _references(question: Question) -> tuple[Way, Way]:
    with torch.device("meta"):
        model, source = verify.build_reference(question.model)
    model.to(verify.dtype_from_name(question.dtype))
    x = images(question)
    launches = traffic.account(model, x)
    eager = Way("eager", launches, notes=(source, *unknown(launches)))
    return eager, Way("minimum", _whole_blocks(model, x, launches))


def images(question: Question) -> Tensor:
    """A batch of them, on the meta device."""
    # The layout that every way of running prefers on a GPU, so that none pays for a conversion.
    shape = (question.batch, 3, question.size, question.size)
    dtype = verify.dtype_from_name(question.dtype)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def unknown(launches: Sequence[Launch]) -> tuple[str, ...]:
    """A note for each op that the account does not know."""
    found = Counter(launch.op for launch in launches if not launch.known)
    return tuple(
        f"{number} launches of {op} are counted by their inputs and outputs: it is unknown"
        for op, number in found.items()
    )


def stages(launches: Sequence[Launch]) -> list[str]:
    """The stage of each launch of a forward: stem, the network's layers, head."""
    found: list[str] = []
    for launch in launches:
        first = launch.path.partition(".")[0]
        if first.startswith("layer"):
            found.append(first)
        elif not found or found[-1] in ("stem", "head") or not first:
            found.append(found[-1] if found else "stem")
        else:
            found.append("head")
    return found


def _whole_blocks(model: nn.Module, x: Tensor, launches: Sequence[Launch]) -> list[Launch]:
    """One launch a block, and one for what is before them and for what is behind."""
    blocks = {
        f"{layer}.{name}": block
        for layer, module in model.named_children()
        if layer.startswith("layer")
        for name, block in module.named_children()
    }
    ends: dict[str, tuple[Tensor, Tensor]] = {}

    def note(path: str) -> Any:
        return lambda module, args, y: ends.__setitem__(path, (args[0], y))

    handles = [block.register_forward_hook(note(path)) for path, block in blocks.items()]
    try:
        with torch.no_grad():
            logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    first, last = ends[next(iter(blocks))][0], ends[list(blocks)[-1]][1]
    ends = {"stem": (x, first), **ends, "head": (last, logits)}

    def owner(path: str, stage: str) -> str:
        return ".".join(path.split(".")[:2]) if stage.startswith("layer") else stage

    flops: Counter[str] = Counter()
    arithmetic: dict[str, str] = {}
    for stage, launch in zip(stages(launches), launches, strict=True):
        flops[owner(launch.path, stage)] += launch.work.flops
        arithmetic.setdefault(owner(launch.path, stage), launch.arithmetic)
    weights: Counter[str] = Counter()
    for path, module in model.named_modules():
        # In the order of their names the head's comes last: what is no layer's is the stem's first.
        stage = path.partition(".")[0]
        stage = stage if stage.startswith("layer") else "head" if path == "fc" else "stem"
        weights[owner(path, stage)] += _parameters(module)
    return [
        Launch(
            "block",
            path,
            1,
            Work(nbytes(taken) + weights[path], nbytes(given), flops[path], weights[path]),
            arithmetic[path],
            True,
            (tuple(taken.shape),),
            (tuple(given.shape),),
        )
        for path, (taken, given) in ends.items()
    ]


def _parameters(module: nn.Module) -> int:
    """Bytes that a fused kernel reads of ``module``: a norm is a scale and a shift in fp32."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return 2 * 4 * module.num_features
    return nbytes(*module.parameters(recurse=False))
