"""The traffic of a training step, against counts by hand and from the geometry."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fast import cli, kernels, traffic_step, traffic_step_report
from resnet_fast.errors import ArgumentError, LibraryError
from resnet_fast.nn import Bottleneck
from resnet_fast.ops import _work
from resnet_fast.plan import devices
from resnet_fast.plan import traffic as accounting
from resnet_fast.plan.traffic import Launch, Step
from resnet_fast.testing import shapes
from resnet_fast.traffic_step import StepTraffic

needs_triton = pytest.mark.skipif(not kernels.available()[0], reason="no Triton")


@functools.cache
def counted(model: str = "resnet50", **question: Any) -> StepTraffic:
    return traffic_step.count_step(model, **{"dtype": "fp16", "batch": 128, **question})


def steps(told: StepTraffic) -> dict[str, Step]:
    found = {way.name: way.step for way in (told.plan, *told.yardsticks)}
    return {name: step for name, step in found.items() if step is not None}


def ops_of(launches: list[Launch]) -> set[str]:
    return {launch.op for launch in launches}


def moved(launches: list[Launch]) -> int:
    return sum(launch.work.read + launch.work.written for launch in launches)


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


class Net(nn.Module):
    """A block between a convolution, so that its input takes a gradient, and logits."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 32, 1, bias=False)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x)).mean((2, 3))


def step_of(model: nn.Module, x: Tensor, plan: str = "default") -> Step:
    model.to("meta", torch.float16, memory_format=torch.channels_last).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    with accounting.planned(plan, devices.named("H100")):
        return accounting.account_step(model, x)


# By hand: a bottleneck of 32 and 8 channels on 2 images of 6 x 6.

IMAGES, SIDE, WIDE, NARROW = 2, 6, 32, 8


def block_step(kind: Any, stride: int, plan: str = "default") -> Step:
    down = None
    if stride != 1:
        down = nn.Sequential(nn.Conv2d(WIDE, WIDE, 1, stride, bias=False), nn.BatchNorm2d(WIDE))
    return step_of(Net(kind(WIDE, NARROW, stride, down)), empty(IMAGES, 8, SIDE, SIDE), plan)


def framework_step(source: str, stride: int) -> Step:
    if source == "torchvision":
        kind = pytest.importorskip("torchvision").models.resnet.Bottleneck
        return block_step(kind, stride)
    if not kernels.available()[0]:
        pytest.skip("no Triton")
    return block_step(Bottleneck, stride, "layers")


def of_activations(launches: list[Launch]) -> list[Launch]:
    """The block's launches but for those of its running statistics."""
    return [
        launch
        for launch in launches
        if launch.path.startswith("block")
        and any(len(shape) == 4 for shape in (*launch.inputs, *launch.outputs))
        and launch.op not in ("aten::mean", "aten::div")
    ]


def maps(stride: int) -> tuple[int, int, int, int]:
    """Bytes in fp16 of the maps x, conv1's, conv2's and the output's."""
    before, behind = 2 * IMAGES * SIDE**2, 2 * IMAGES * (SIDE // stride) ** 2
    return before * WIDE, before * NARROW, behind * NARROW, behind * WIDE


# Weights of conv1, conv2, conv3 and the projection, and the channels of the norms behind them.
W1, W2, W3, WD = (2 * n for n in (WIDE * NARROW, 9 * NARROW**2, NARROW * WIDE, WIDE * WIDE))
CHANNELS = 2 * NARROW + WIDE


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("source", ("torchvision", "layers"))
def test_a_bottleneck_layer_by_layer(source: str, stride: int) -> None:
    x, a, b, y = maps(stride)
    project = stride != 1
    # A strided 1 x 1 convolution reads the pixels that it lands on: as many as y has.
    convs = (x + W1 + a) + (a + W2 + b) + (b + W3 + y) + project * (2 * y + WD)
    normalised = a + b + y + project * y
    channels = CHANNELS + project * WIDE
    # Measured, normalised and written; two running and two measured vectors, read or written twice
    # each, and gamma and beta.
    norms = 3 * normalised + 4 * channels * (2 * 2 + 2 * 2 + 2)
    relus, add = 2 * (a + b + y), 3 * y
    # Reads and writes as in the forward, and the weight once for each of two products.
    products = 2 * (x + W1 + a + a + W2 + b + b + W3 + y)
    # The projection's grad_x is written whole, x is read where it was.
    products += project * (y + WD + x + 2 * y + WD)
    # A pass reads grad and x, the next both and writes; each the two measured vectors; gamma's and
    # beta's gradients are written and read again, gamma is read.
    norms_back = 5 * normalised + 4 * channels * (2 + 2 + 2 + 2 + 1)
    relus_back, joined = 3 * (a + b + y), 3 * x
    step = framework_step(source, stride)
    forward, backward = of_activations(step.forward), of_activations(step.backward)
    assert moved(forward) == convs + norms + relus + add
    assert moved(backward) == products + norms_back + relus_back + joined
    count = 4 if project else 3
    assert sum(launch.launches for launch in forward) == 3 * count + 3 + 1
    assert sum(launch.launches for launch in backward) == 4 * count + 3 + 1
    # Each convolution's input and output, but not what the addition took in.
    kept = 2 * IMAGES * 8 * SIDE**2 + x + 2 * (a + b + y) + project * y
    assert step.kept == kept + 2 * 4 * channels + loss_kept()


def loss_kept() -> int:
    """The logarithms of the probabilities, the classes, and the sum of their weights."""
    return 2 * IMAGES * WIDE + 8 * IMAGES + 2


@pytest.mark.parametrize("stride", (1, 2))
def test_a_bottleneck_by_conv_stats(stride: int) -> None:
    x, a, b, y = maps(stride)
    project = stride != 1
    channels = CHANNELS + project * WIDE
    # Fewer than 128 pixels: one moment of 16 bytes a filter, written, read, and two figures of it.
    convs = (x + W1 + a) + (a + W2 + b) + (b + W3 + y) + project * (2 * y + WD)
    convs += (16 + 16 + 2 * 4) * channels
    # Four vectors of each norm in front, or of the one that norm_act applies.
    applied = 4 * 4 * channels + 3 * y + project * 2 * y
    step = block_step(Bottleneck, stride)
    forward, backward = of_activations(step.forward), of_activations(step.backward)
    assert moved(forward) == convs + applied
    count = 4 if project else 3
    assert sum(launch.launches for launch in forward) == 2 * count + 1 + project

    products = 2 * (x + W1 + a + a + W2 + b + b + W3 + y)
    products += project * (y + WD + x + 2 * y + WD)
    # What conv2 and conv3 multiplied, computed again.
    again = 2 * (a + b) + 4 * 4 * 2 * NARROW
    # Two passes read grad and the convolution's output, the last one's the residual too; grad_x and
    # grad_z are written. Four vectors twice; four sums written and two of them read. No activation
    # follows the projection, so that its beta is not read.
    norms = 6 * (a + b + project * y) + 8 * y + 4 * channels * (4 + 4 + 4 + 2)
    norms -= project * 2 * 4 * WIDE
    assert moved(backward) == products + again + norms + 3 * x
    assert sum(launch.launches for launch in backward) == 5 * count + 2 + 1
    # The residual of a projection is a tensor of its own.
    kept = 2 * IMAGES * 8 * SIDE**2 + x + a + b + y + project * 2 * y
    assert step.kept == kept + 2 * 4 * channels + loss_kept()


def test_a_convolution_s_gradients_are_counted_where_they_are_asked_for() -> None:
    step = step_of(nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten()), empty(1, 8, 3, 3))
    (back,) = (launch for launch in step.backward if launch.op == "aten::convolution_backward")
    grad, x, weight, bias = 2 * 16, 2 * 8 * 9, 2 * 16 * 8 * 9, 2 * 16
    assert back.launches == 2 and back.work.flops == 2 * 16 * 8 * 9
    assert (back.work.read, back.work.written) == (2 * grad + x, weight + bias)


def test_pooling_backward_fills_and_writes() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.MaxPool2d(2), nn.Flatten())
    step = step_of(net, empty(1, 8, 4, 4))
    (back,) = (launch for launch in step.backward if "max_pool" in launch.op)
    assert back.launches == 2 and back.known
    assert (back.work.read, back.work.written) == (8 * 4 * (2 + 8), 2 * 2 * 8 * 16)


def test_ops_say_their_own_training_work() -> None:
    x, vector = empty(2, 8, 5, 5), torch.empty(8, device="meta")
    size, vectors = 2 * 2 * 8 * 25, 4 * 8

    def work(name: str, *arguments: Any) -> tuple[int, _work.Work]:
        found = _work.of(name)
        assert found is not None
        return _work.total(found(*arguments))

    launches, total = work("bn_act_train", x, vector, vector, x, 1e-5, "relu")
    assert (launches, total.read, total.written) == (3, 3 * size + 4 * vectors, size + 2 * vectors)
    arguments = (x, x, vector, vector, x, vector, vector)
    launches, total = work("_bn_act_train_backward", *arguments, "relu")
    assert (launches, total.read) == (3, 2 * (3 * size + 4 * vectors) + 2 * vectors)
    assert total.written == 2 * size + 4 * vectors
    _, linear = work("_bn_act_train_backward", *arguments, "none")
    assert total.read - linear.read == 2 * size
    for name in ("_add_act_backward", "_add_act_backward_triton"):
        assert work(name, x, x, x, "relu") == (1, (3 * size, size, 0, 0))


def test_moments_are_joined_sixty_four_at_a_time() -> None:
    """128 images of 56 x 56: 3136 moments of each filter, then 49, then the statistics."""
    work = _work.of("conv_stats")
    assert work is not None
    norm = (None, None, None, None, 1e-5, "none")
    found = work(empty(128, 8, 56, 56), empty(16, 8, 1, 1), *norm, [1, 1], [0, 0], [1, 1], 1, 1e-5)
    pixels = 128 * 56 * 56
    assert isinstance(found, list)
    assert [one[:2] for one in found] == [
        (2 * (pixels * 8 + 16 * 8), 2 * pixels * 16 + 16 * 16 * 3136),
        (16 * 16 * 3136, 16 * 16 * 49),
        (16 * 16 * 49, 2 * 4 * 16),
    ]


# Whole networks.


@needs_triton
@pytest.mark.parametrize(
    "question",
    (
        {"model": "resnet50"},
        {"model": "resnet18"},
        {"model": "resnet18", "dtype": "bf16", "batch": 2},
        {"model": "resnet18", "dtype": "fp32", "batch": 2},
        {"model": "resnext50_32x4d", "batch": 2},
        {"model": "cifar_resnet20", "batch": 2},
        {"model": "plain20", "batch": 2},
    ),
    ids=lambda question: "-".join(map(str, question.values())),
)
def test_nothing_is_unknown(question: dict[str, Any]) -> None:
    for name, step in steps(counted(**question)).items():
        assert step.forward and step.backward
        assert {launch.op for launch in step.launches if not launch.known} == set(), name


@needs_triton
@pytest.mark.parametrize("network", ("resnet18", "resnet50"))
def test_two_products_a_convolution_but_the_first(network: str) -> None:
    stem = 2 * 128 * 64 * 3 * 49 * 112**2
    once = 2 * 128 * shapes.macs(network)
    for name, step in steps(counted(network)).items():
        assert sum(launch.work.flops for launch in step.forward) == once, name
        assert sum(launch.work.flops for launch in step.backward) == 2 * once - stem, name


@needs_triton
def test_the_plan_decides_what_is_counted() -> None:
    told = counted()
    found = steps(told)
    own = {"resnet_fast::conv_stats", "resnet_fast::norm_act"}
    assert own <= ops_of(found["default"].forward)
    assert "resnet_fast::_bn_act_train_backward" in ops_of(found["default"].backward)
    for name in ("eager", "layers"):
        assert not any(op.startswith("resnet_fast::") for op in ops_of(found[name].launches))
    assert told.plan.notes[0].startswith("16 of 16 residual blocks train by conv_stats")
    assert moved(found["layers"].launches) == moved(found["eager"].launches)
    layers = counted(plan="layers")
    assert layers.plan.notes[0].startswith("0 of 16") and layers.plan is layers.yardsticks[1]


@needs_triton
def test_blocks_that_the_kernels_do_not_take_are_counted_layer_by_layer() -> None:
    """A batch norm in front takes 16 bytes of a group's channels: the first stage's have 8."""
    told = counted("resnext50_32x4d", batch=2)
    assert told.plan.notes[0].startswith("13 of 16")
    assert told.plan.step is not None
    stages = told.stages(told.plan.step)
    assert "resnet_fast::conv_stats" not in ops_of(stages["layer1"]["forward"])
    assert "resnet_fast::conv_stats" in ops_of(stages["layer2"]["forward"])
    # A network without residual blocks has none to train so.
    plain = counted("plain20", batch=2)
    assert plain.plan.notes == ("0 of 0 residual blocks train by conv_stats",)
    assert not any("compute again" in note for note in traffic_step_report.notes(plain))


@needs_triton
def test_the_forward_saves_and_the_backward_does_not() -> None:
    """What docs/traffic.md says of ResNet-50 in fp16 at 128 images."""
    told = counted()
    ours, eager = (told.figures(steps(told)[name]) for name in ("default", "eager"))
    assert ours["forward"]["mb_per_image"] < 0.55 * eager["forward"]["mb_per_image"]
    assert ours["backward"]["mb_per_image"] == pytest.approx(
        eager["backward"]["mb_per_image"], rel=0.02
    )
    assert ours["mb_again_per_image"] > 10 and eager["mb_again_per_image"] == 0
    assert ours["mb_kept_per_image"] < eager["mb_kept_per_image"]


@needs_triton
def test_statistics_take_no_gradient_that_is_filled() -> None:
    found = steps(counted())["default"]
    assert "aten::zeros" not in ops_of(found.backward)


@needs_triton
def test_sums_are_of_their_parts() -> None:
    told = counted("resnet18")
    step = told.plan.step
    assert step is not None
    figures = told.figures(step)
    for key in ("launches", "mb_per_image", "gflop_per_image", "us_per_image"):
        parts = [figures[phase][key] for phase in ("forward", "backward")]
        assert figures[key] == pytest.approx(sum(parts)), key
        stages = [
            told.totals(launches)[key]
            for phases in told.stages(step).values()
            for launches in phases.values()
        ]
        assert figures[key] == pytest.approx(sum(stages)), key
    rows = told.rows(step)
    assert sum(row["read"] + row["written"] for row in rows) == moved(step.launches)
    assert figures["images_per_second"] == pytest.approx(1e6 / figures["us_per_image"])


@needs_triton
@pytest.mark.parametrize("name", ("default", "eager"))
def test_paths_and_stages(name: str) -> None:
    told = counted("resnet18")
    step = steps(told)[name]
    stages = told.stages(step)
    assert list(stages) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    for stage in ("layer1", "layer4"):
        for launches in stages[stage].values():
            assert all(launch.path.startswith(stage) for launch in launches)
    # A projection shortcut has a third convolution, in each stage but the first.
    convolutions = [f"layer2.{block}.conv{n}" for block in (0, 1) for n in (1, 2)]
    for launches in stages["layer2"].values():
        products = sorted(launch.path for launch in launches if launch.work.flops)
        assert products == sorted([*convolutions, "layer2.0.downsample.0"])


@needs_triton
def test_frozen_statistics_are_no_training_norm() -> None:
    """A norm in eval() has another backward, which nobody has counted: it is marked."""
    net = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Flatten())
    net.to("meta").train()[1].eval()
    step = accounting.account_step(net, empty(2, 8, 4, 4, dtype=torch.float32))
    unknown = {launch.op for launch in step.launches if not launch.known}
    assert unknown == {"aten::native_batch_norm_backward"}


def test_refused_models() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4)).to("meta")
    x = torch.empty(2, 8, device="meta")
    assert accounting.account_step(net.train(), x).backward
    with pytest.raises(ArgumentError, match=r"train\(\)"):
        accounting.account_step(net.eval(), x)
    with pytest.raises(ArgumentError, match="meta"):
        accounting.account_step(net.train(), torch.empty(2, 8))
    with pytest.raises(ArgumentError, match="takes a gradient"):
        accounting.account_step(net.requires_grad_(False), x)
    with pytest.raises(ArgumentError, match=r"logits of shape .* \[2, 8, 2, 2\]"):
        accounting.account_step(nn.Conv2d(8, 8, 1).to("meta"), empty(2, 8, 2, 2).float())


# The command.


@needs_triton
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["traffic", "resnet18", "--batch", "8", "--size", "64", "--train"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    for word in ("one training step, plan default, as if on H100", "layer4", "network", "kept"):
        assert word in out
    for word in ("forward", "backward", "this plan", "eager", "layers", "resnet_fast::conv_stats"):
        assert word in out
    assert "8 of 8 residual blocks train by conv_stats" in out
    assert "against eager: forward -" in out and "compute again" in out


@needs_triton
def test_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["traffic", "resnet18", "--batch", "8", "--size", "64", "--train"]
    assert cli.main([*arguments, "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["train"] is True and told["plan"] == "default" and told["batch"] == 8
    rows = told["rows"]
    for phase in ("forward", "backward"):
        sums = sum(row["read"] + row["written"] for row in rows if row["phase"] == phase)
        assert told[phase]["mb_per_image"] == pytest.approx(sums / 8 / 1e6)
    assert told["launches"] == sum(row["launches"] for row in rows)
    assert set(told["yardsticks"]) == {"eager", "layers"}
    assert told["mb_kept_per_image"] < told["yardsticks"]["eager"]["mb_kept_per_image"]
    assert set(told["stages"]) == {row["stage"] for row in rows}
    file = tmp_path / "step.json"
    assert cli.main([*arguments, "--json", str(file)]) == 0
    assert "network" in capsys.readouterr().out
    assert json.loads(file.read_text()) == told


def test_no_plot_beside_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["traffic", "resnet18", "--train", "--plot", "roofline.svg"]) == 2
    assert "'plot': expected no plot beside --train" in capsys.readouterr().err


@needs_triton
def test_without_the_layers_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: devices.Device) -> Any:
        raise LibraryError("Triton is not there")

    monkeypatch.setitem(accounting.PLANS, "layers", refuse)
    told = traffic_step.count_step("resnet18", batch=1, size=64)
    assert told.to_dict()["yardsticks"]["layers"] == {"absence": "Triton is not there"}
    assert "layers: Triton is not there" in traffic_step_report.notes(told)
    traffic_step_report.yardstick_table(told)
