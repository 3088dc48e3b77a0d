"""The traffic of a training step as tables."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from resnet_fast.traffic_report import heading_of, rich_table, roof_of

if TYPE_CHECKING:
    from resnet_fast.plan.traffic import Launch, Step
    from resnet_fast.traffic_step import StepTraffic


def heading(told: StepTraffic) -> str:
    """What the figures are of, and the roofs."""
    return heading_of(told.question, _step(told).launches, "one training step")


def stage_table(told: StepTraffic) -> Any:
    """One line a stage and phase, an image's figures."""
    headings = ("stage", "phase", "launches", "MB read", "MB written", "GFLOP", "us", "roof")
    table = rich_table(headings)
    step = _step(told)
    lines = [
        (stage, phase, launches)
        for stage, phases in told.stages(step).items()
        for phase, launches in phases.items()
        if launches
    ]
    lines += [("network", phase, launches) for phase, launches in told.phases(step).items()]
    for index, (stage, phase, launches) in enumerate(lines, start=1):
        sums = told.totals(launches)
        table.add_row(
            stage,
            phase,
            str(sums["launches"]),
            f"{sums['mb_read_per_image']:.2f}",
            f"{sums['mb_written_per_image']:.2f}",
            f"{sums['gflop_per_image']:.3f}",
            f"{sums['us_per_image']:.2f}",
            roof_of(sums),
            end_section=index == len(lines) - 3,
        )
    return table


def op_table(told: StepTraffic) -> Any:
    """What moves a thousandth of the plan's bytes or more, by op and phase; the most first."""
    table = rich_table(("op", "phase", "launches", "MB", "of all"))
    step = _step(told)
    groups: dict[tuple[str, str], list[Launch]] = defaultdict(list)
    for phase in ("forward", "backward"):
        for launch in told.phases(step)[phase]:
            groups[launch.op, phase].append(launch)
    moved = {key: told.totals(launches) for key, launches in groups.items()}
    everything = told.totals(step.launches)["mb_per_image"]
    for (op, phase), sums in sorted(moved.items(), key=lambda one: -one[1]["mb_per_image"]):
        share = sums["mb_per_image"] / everything
        if share >= 0.001:
            figures = (str(sums["launches"]), f"{sums['mb_per_image']:.1f}", f"{share:.1%}")
            table.add_row(op, phase, *figures)
    return table


def yardstick_table(told: StepTraffic) -> Any:
    """The plan beside each yardstick, with the ratio of the bytes and of the time."""
    headings = ["an image", "launches", "MB forward", "backward", "both", "kept", "us", "images/s"]
    table = rich_table([*headings, "x MB", "x us", "x kept"])
    ours = told.figures(_step(told))
    for way in (told.plan, *told.yardsticks):
        name = "this plan" if way is told.plan else way.name
        if way.step is None:
            table.add_row(name, *["-"] * 10)
            continue
        sums = told.figures(way.step)
        ratios = [
            sums[figure] / ours[figure]
            for figure in ("mb_per_image", "us_per_image", "mb_kept_per_image")
        ]
        table.add_row(
            name,
            str(sums["launches"]),
            f"{sums['forward']['mb_per_image']:.1f}",
            f"{sums['backward']['mb_per_image']:.1f}",
            f"{sums['mb_per_image']:.1f}",
            f"{sums['mb_kept_per_image']:.1f}",
            f"{sums['us_per_image']:.2f}",
            f"{sums['images_per_second']:.0f}",
            *(f"{ratio:.2f}" for ratio in ratios),
        )
    return table


def notes(told: StepTraffic) -> list[str]:
    """Lines below the tables."""
    lines = [f"{told.question.plan}: {note}" for note in told.plan.notes]
    for way in told.yardsticks:
        if way is not told.plan:
            lines += [f"{way.name}: {note}" for note in (*way.notes, way.absence) if note]
    lines += _balance(told)
    return [
        *lines,
        "kept: what autograd holds between forward and backward, without the parameters",
        "Counted, not run: forward in train(), cross-entropy, gradients; no optimizer.",
    ]


def _balance(told: StepTraffic) -> list[str]:
    """What the plan saves against eager, phase by phase, and what it spends on doing without."""
    (eager,) = (way for way in told.yardsticks if way.name == "eager")
    if eager.step is None:
        return []
    ours, theirs = told.figures(_step(told)), told.figures(eager.step)
    less = [
        f"{phase} {ours[phase]['mb_per_image'] - theirs[phase]['mb_per_image']:+.1f} MB, "
        f"{ours[phase]['launches'] - theirs[phase]['launches']:+d} launches"
        for phase in ("forward", "backward")
    ]
    lines = [f"against eager: {'; '.join(less)}"]
    if ours["mb_again_per_image"]:
        lines.append(
            f"of the backward {ours['mb_again_per_image']:.1f} MB compute again (norm_act) what "
            "conv_stats did not store"
        )
    return lines


def _step(told: StepTraffic) -> Step:
    assert told.plan.step is not None
    return told.plan.step
