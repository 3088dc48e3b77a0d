"""The traffic account: bytes, FLOPs and launches, against counts by hand and from the geometry."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fast import cli, kernels, plan, traffic, traffic_report
from resnet_fast.errors import ArgumentError, LibraryError, PlanError
from resnet_fast.ops import _pack, _work, conv_bn_act_cuda
from resnet_fast.plan import devices, framework_work
from resnet_fast.plan import traffic as accounting
from resnet_fast.plan.traffic import Launch
from resnet_fast.testing import shapes

needs_triton = pytest.mark.skipif(not kernels.available()[0], reason="no Triton")
BATCH = 128


@functools.cache
def counted(model: str = "resnet50", **question: Any) -> traffic.Traffic:
    return traffic.count(model, **{"dtype": "fp16", "batch": BATCH, "plan": "layers", **question})


def ways(told: traffic.Traffic) -> dict[str, list[Launch]]:
    return {way.name: way.launches for way in (told.plan, *told.yardsticks)}


def activations(launches: list[Launch], batch: int = BATCH) -> float:
    """Bytes an image without parameters."""
    works = [launch.work for launch in launches]
    return sum(work.read + work.written - work.parameters for work in works) / batch


def empty(*shape: int, dtype: torch.dtype = torch.float16, last: bool = True) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def account(module: nn.Module, *inputs: Tensor) -> list[Launch]:
    return accounting.account(module.to("meta", torch.float16).eval(), *inputs)


class Calls(nn.Module):
    """A module that calls ``function``."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


# By hand.


def test_one_convolution() -> None:
    (launch,) = account(nn.Conv2d(8, 16, 3, padding=1, bias=False), empty(2, 8, 10, 12))
    pixels, weight = 2 * 10 * 12, 16 * 8 * 9
    work = _work.Work(
        2 * (pixels * 8 + weight), 2 * pixels * 16, 2 * pixels * 16 * 8 * 9, 2 * weight
    )
    assert launch.work == work and launch.launches == 1 and launch.known
    assert (launch.op, launch.arithmetic) == ("aten::convolution", "fp16")
    assert launch.inputs == ((2, 8, 10, 12), (16, 8, 3, 3)) and launch.outputs == ((2, 16, 10, 12),)


@pytest.mark.parametrize(("last", "pixels"), ((True, 5 * 4), (False, 5 * 7)))
def test_a_strided_1x1_convolution_reads_the_pixels_it_lands_on(last: bool, pixels: int) -> None:
    """Of 9 x 7 it lands on 5 x 4; rows that are contiguous are read whole."""
    conv = nn.Conv2d(8, 16, 1, stride=2, bias=False)
    (launch,) = account(conv, empty(3, 8, 9, 7, last=last))
    assert launch.work.read == 2 * (3 * 8 * pixels + 16 * 8)
    assert launch.work.written == 2 * 3 * 16 * 5 * 4


def test_a_bias_is_a_pass_of_its_own() -> None:
    (launch,) = account(nn.Conv2d(8, 16, 1), empty(1, 8, 4, 4))
    y = 2 * 16 * 16
    assert launch.launches == 2 and launch.work.written == 2 * y
    assert launch.work.read == 2 * 8 * 16 + 2 * 16 * 8 + y + 2 * 16


def test_pooling_writes_its_indices() -> None:
    (launch,) = account(nn.MaxPool2d(3, 2, 1), empty(2, 8, 8, 8))
    assert launch.work == _work.Work(2 * 2 * 8 * 64, 2 * 8 * 16 * (2 + 8))
    # Windows of 2 at stride 3 leave every third row and column alone.
    (launch,) = account(nn.MaxPool2d(2, 3), empty(2, 8, 8, 8))
    assert launch.work.read == 2 * 2 * 8 * 6 * 6


def test_cudnn_fused_convolutions() -> None:
    def run(x: Tensor) -> Tensor:
        weight, bias = empty(16, 8, 3, 3), torch.empty(16, dtype=x.dtype, device="meta")
        y = torch.cudnn_convolution_relu(x, weight, bias, [1, 1], [1, 1], [1, 1], 1)
        geometry = ([1, 1], [1, 1], [1, 1], 1)
        return torch.cudnn_convolution_add_relu(x, weight, y, 1.0, bias, *geometry)

    first, second = account(Calls(run), empty(2, 8, 6, 6))
    assert first.known and first.work.written == 2 * 2 * 16 * 36
    assert second.work.read - first.work.read == first.work.written
    assert first.outputs == second.outputs == ((2, 16, 6, 6),)


def test_ops_say_their_own_work() -> None:
    x, residual = empty(2, 8, 9, 9), empty(2, 16, 5, 5)
    weight, scale = empty(16, 8, 3, 3), torch.empty(16, device="meta")
    parameters = 2 * 16 * 8 * 9 + 2 * 4 * 16
    expected = _work.Work(
        2 * (2 * 8 * 81 + 2 * 16 * 25) + parameters,
        2 * 2 * 16 * 25,
        2 * 2 * 25 * 16 * 8 * 9,
        parameters,
    )
    assert conv_bn_act_work(x, weight, scale, scale, residual, 2, 1, 1, 1, "relu") == expected
    size = 2 * 2 * 16 * 25
    work = _work.of("bn_act")
    assert work is not None
    assert work(residual, scale, scale, residual, "relu") == (2 * size + 128, size, 0, 128)
    work = _work.of("_add_act_triton")
    assert work is not None and work(residual, residual) == (2 * size, size, 0, 0)


def conv_bn_act_work(*arguments: Any) -> _work.Work:
    work = _work.of("_conv_bn_act_triton")
    assert work is not None
    return work(*arguments)


def test_only_an_op_and_its_launcher_have_its_work() -> None:
    for name in ("_conv_bn_act_direct", "add_act_backward", "conv_bn_act_triton", "nothing"):
        assert _work.of(name) is None
    for name in ("_conv_bn_act_backward", "bn_act_train_backward", "_add_act_backward_direct"):
        assert _work.of(name) is None


@needs_triton
def test_this_package_s_ops_in_the_account() -> None:
    """The launchers have no kernel for the meta device; their op's fake answers."""
    x, scale = empty(2, 16, 5, 5), torch.empty(16, device="meta")

    def run(x: Tensor) -> Tensor:
        y = torch.ops.resnet_fast._bn_act_triton(x, scale, scale, None, "relu")
        return torch.ops.resnet_fast._add_act_triton(y, x, "relu")

    first, second = account(Calls(run), x)
    size = 2 * 2 * 16 * 25
    assert first.work == (size + 128, size, 0, 128) and second.work == (2 * size, size, 0, 0)


def test_meta_tensors_are_not_known_by_an_address_that_they_lack() -> None:
    """Each has address 0: what is derived from one must not be taken for the other's."""
    tensors = [torch.empty(4, device="meta") for _ in range(2)]
    values = [_pack.cached("itself", (tensor,), lambda tensor=tensor: tensor) for tensor in tensors]
    assert values[0] is tensors[0] and values[1] is tensors[1]
    assert not _pack.is_deriving()


def test_an_unknown_op_is_counted_and_marked() -> None:
    (launch,) = account(Calls(lambda x: torch.cumsum(x, 1)), empty(2, 8, 4, 4))
    assert not launch.known and launch.work == (512, 512, 0, 0)
    assert traffic.unknown([launch, launch])[0].startswith("2 launches of aten::cumsum are")


def test_views_and_allocations_launch_nothing() -> None:
    def run(x: Tensor) -> Tensor:
        return torch.empty_like(x).view(2, -1)[:, 1:].t().detach()

    assert account(Calls(run), empty(2, 8, 4, 4, last=False)) == []


# Whole networks.


def elements(network: str, skips: bool) -> int:
    """Activations an image that convolutions, pooling and classifier move, by the geometry."""
    sites = shapes.walk(network)
    last = sites[-1]
    total = sum(site.elements for site in sites)
    if skips:
        strided = [site for site in sites if site.r == 1 and site.stride == 2]
        total -= sum((site.h**2 - site.p**2) * site.c for site in strided)
    pool = 64 * (112**2 + 56**2)
    return total + pool + last.k * (last.p**2 + 1) + last.k + 1000


# 64 x 56 x 56 int64 indices that max pooling writes on CUDA.
INDICES = 8 * 64 * 56 * 56


@needs_triton
@pytest.mark.parametrize("network", ("resnet50", "resnet18", "resnext50_32x4d"))
def test_layers_move_what_the_geometry_says(network: str) -> None:
    launches = counted(network).plan.launches
    assert activations(launches) == 2 * elements(network, True) + INDICES
    assert sum(launch.launches for launch in launches) == len(shapes.walk(network)) + 3


@needs_triton
def test_resnet50_in_published_figures() -> None:
    """56.8, 162 and 23.2 MB an image: without the indices, strided shortcuts read whole."""
    assert 2 * elements("resnet50", False) / 1e6 == pytest.approx(56.8, abs=0.05)
    whole = 2 * (elements("resnet50", False) - elements("resnet50", True)) - INDICES
    told = ways(counted())
    assert (activations(told["layers"]) + whole) / 1e6 == pytest.approx(56.8, abs=0.05)
    assert activations(told["minimum"]) / 1e6 == pytest.approx(23.2, abs=0.05)
    assert (activations(told["eager"]) + whole) / 1e6 == pytest.approx(162, abs=0.5)
    for name, figure in (("eager", 162), ("layers", 56.8), ("minimum", 23.2)):
        assert activations(told[name]) / 1e6 == pytest.approx(figure, abs=1)


def test_minimum_by_blocks() -> None:
    """ResNet-18 by hand: a map of a stage is 56² x 64 elements, halved from stage to stage."""
    (minimum,) = (way for way in counted("resnet18").yardsticks if way.name == "minimum")
    image, unit = 3 * 224 * 224, 64 * 56 * 56
    moved = image + unit  # the stem
    moved += 4 * unit
    moved += sum(4 * (unit >> stage) + (unit >> stage) for stage in (1, 2, 3))
    moved += (unit >> 3) + 1000
    assert activations(minimum.launches) == 2 * moved
    assert len(minimum.launches) == 10
    learned = sum(launch.work.parameters for launch in minimum.launches)
    with torch.device("meta"):
        model = traffic.verify.build_model("resnet18")
    norms = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    count = sum(p.numel() for p in model.parameters())
    assert learned == 2 * (count - 2 * norms) + 8 * norms


@needs_triton
@pytest.mark.parametrize(
    "network", ("resnet18", "resnet50", "resnet101", "resnet152", "resnext50_32x4d")
)
def test_flops_are_two_a_multiply_add(network: str) -> None:
    for name, launches in ways(counted(network)).items():
        flops = sum(launch.work.flops for launch in launches)
        assert flops == 2 * BATCH * shapes.macs(network), name
        assert all(launch.known for launch in launches), name
    if network == "resnet50":
        assert round(shapes.macs(network) / 1e9, 3) == 4.089


@needs_triton
def test_fp32_and_its_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    half, full = counted(), counted(dtype="fp32")
    wide = activations(full.plan.launches) - INDICES
    assert wide == 2 * (activations(half.plan.launches) - INDICES)
    kinds = {launch.op: launch.arithmetic for launch in full.plan.launches}
    assert kinds["resnet_fast::_conv_bn_act_triton"] == "tf32" and kinds["aten::addmm"] == "fp32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    full = traffic.count("resnet18", "fp32", 1, 64, plan="layers")
    assert {launch.arithmetic for launch in full.plan.launches} == {"fp32"}


@needs_triton
@pytest.mark.parametrize("network", ("cifar_resnet20", "plain20", "plain34"))
def test_other_networks(network: str) -> None:
    told = counted(network)
    assert all(launch.known for way in ways(told).values() for launch in way)
    stages = list(told.stages())
    assert stages[0] == "stem" and stages[-1] == "head"
    assert told.yardsticks[0].notes == ("resnet_fast.models.plain_reference",)


@needs_triton
@pytest.mark.parametrize("way", ("eager", "layers"))
def test_weights_are_read_once_a_launch_and_shared_by_the_batch(way: str) -> None:
    one, many = ways(counted("resnet18", batch=1))[way], ways(counted("resnet18"))[way]
    assert [x.work.parameters for x in one] == [x.work.parameters for x in many]
    assert activations(one, 1) == activations(many)
    (conv,) = (x for x in many if x.path.endswith("layer1.0.conv1"))
    norm = 0 if way == "eager" else 2 * 4 * 64
    assert conv.work.parameters == 2 * 64 * 64 * 9 + norm


@needs_triton
def test_stages_and_paths() -> None:
    told = counted()
    assert list(told.stages()) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    paths = [launch.path for launch in told.plan.launches]
    assert paths[:3] == ["conv1", "maxpool", "layer1.0.conv1"]
    assert paths[4] == "layer1.0.downsample" and paths[-2:] == ["avgpool", "fc"]
    sums = [told.totals(found)["mb_per_image"] for found in told.stages().values()]
    assert sum(sums) == pytest.approx(told.totals(told.plan.launches)["mb_per_image"])


# Plans.


@needs_triton
def test_a_plan_decides_what_is_counted() -> None:
    default, layers = counted("resnet18", plan="default"), counted("resnet18")
    assert activations(default.plan.launches) < 0.65 * activations(layers.plan.launches)
    assert [way.name for way in default.yardsticks] == ["eager", "layers", "minimum"]
    assert ways(default)["layers"] == layers.plan.launches
    # The stem's, and two in each block with a projection.
    assert default.plan.notes[0] == "7 sites within 4 kernels of several layers"
    first = "implicit_gemm" if conv_bn_act_cuda.AVAILABLE else "triton"
    assert f"13 sites by {first}" in default.plan.notes[1]
    assert "20 sites by triton" in layers.plan.notes[0]
    assert "taken as verified" in default.plan.notes[1]


@needs_triton
def test_residual_chains_move_what_their_formula_says() -> None:
    """ResNet-50 in planes of a stage's mid-channels, by hand from the forms of its chains."""
    default = counted("resnet50", batch=4, plan="default")
    assert default.totals(default.plan.launches)["launches"] == 32
    # conv1 of the first block, then chains: h1, the shortcut, y, and the next h1.
    planes = {
        (64, 56): 2 + (1 + 1 + 4 + 1) + (1 + 4 + 4 + 1) + (1 + 4 + 4 + 2),
        (128, 28): (4 + 2 + 4 + 1) + 2 * (1 + 4 + 4 + 1) + (1 + 4 + 4 + 2),
        # conv2 of 256 channels by itself; 512 channels next are no chain's.
        (256, 14): (4 + 1) + (1 + 2 + 4 + 1) + 4 * (2 + 1 + 4 + 4 + 1) + (2 + 1 + 4 + 4),
        (512, 7): (8 + 4) + (4 + 1) + (1 + 2 + 4) + 2 * (4 + 1 + 2 + 1 + 4 + 4),
    }
    stem = 3 * 224 * 224 + 64 * 56 * 56
    # Pooled, then the classifier: its input and logits.
    head = 2048 * 7 * 7 + 2 * 2048 + 1000
    elements = stem + head + sum(n * m * size * size for (m, size), n in planes.items())
    assert activations(default.plan.launches, 4) == 2 * elements


@needs_triton
@pytest.mark.parametrize(
    ("model", "most", "share"),
    [("resnet50", 32.0, 0.57), ("resnet101", 53.0, 0.63), ("resnet152", 77.0, 0.65)],
)
def test_the_default_plan_on_an_h100(model: str, most: float, share: float) -> None:
    """Megabytes an image at batch 128, and their share of layer-wise kernels'."""
    told = counted(model, batch=128, plan="default")
    found = told.totals(told.plan.launches)["mb_per_image"]
    layers = told.totals(ways(told)["layers"])["mb_per_image"]
    assert found <= most and found <= share * layers


@needs_triton
def test_pretence_ends_with_its_block() -> None:
    with torch.device("meta"):
        model = traffic.verify.build_model("resnet18")
    x = empty(1, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        with accounting.planned("layers", devices.named("L4")):
            assert plan.device_name("meta") == "cuda:NVIDIA L4:sm_89"
            assert plan.device_name("cpu").startswith("cpu")
            assert accounting.account(model, x)
            assert {row["reason"] for row in plan.model_rows(model)} == {"ASSUMED"}
        assert plan.active_plan() is None and plan.device_name("meta") == "meta"
        model(x)
    assert {row["candidate"] for row in plan.model_rows(model)} == {"aten"}


def test_layers_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoTriton:
        def __getattr__(self, name: str) -> Any:
            if name.endswith("_triton"):
                raise AttributeError(name)
            return getattr(real, name)

    real = torch.ops.resnet_fast
    monkeypatch.setattr(torch.ops, "resnet_fast", NoTriton())
    with pytest.raises(LibraryError, match="layers"):
        traffic.count("resnet18", batch=1, size=64, plan="layers")
    told = traffic.count("resnet18", batch=1, size=64)
    (layers,) = (way for way in told.yardsticks if way.name == "layers")
    assert not layers.launches and "Triton" in layers.absence
    assert told.to_dict()["yardsticks"]["layers"] == {"absence": layers.absence}
    assert any("Triton" in line for line in traffic_report.notes(told) if line.startswith("layers"))
    traffic_report.yardstick_table(told)


def test_nothing_runs_on_a_device() -> None:
    conv = nn.Conv2d(3, 8, 3)
    with pytest.raises(ArgumentError, match="meta"):
        accounting.account(conv, torch.empty(1, 3, 8, 8))
    with pytest.raises(ArgumentError, match="meta"):
        accounting.account(conv, empty(1, 3, 8, 8))
    with pytest.raises(PlanError, match="meta"):
        account(Calls(lambda x: torch.ones(3) + 1), empty(1, 3, 8, 8))


# Devices.


def test_devices_by_name() -> None:
    assert devices.named("rtx 4090") is devices.DEVICES["RTX4090"]
    with pytest.raises(ArgumentError, match="one of H100, H200, A100, L4, RTX4090"):
        devices.named("H1000")
    for device in devices.DEVICES.values():
        assert device.plan_name.endswith("sm_{}{}".format(*device.capability))
        assert device.peaks["fp16"] == device.peaks["bf16"] > device.peaks["tf32"]
        assert device.peaks["tf32"] >= device.peaks["fp32"]
        assert 0.5 * device.bandwidth < device.memory_roof <= device.bandwidth


def test_a_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.of("cpu") is None
    name = devices.DEVICES["H200"].plan_name
    monkeypatch.setattr(devices, "device_name", lambda device: name)
    assert devices.of("cuda") is devices.DEVICES["H200"]


def test_the_roof_that_binds() -> None:
    device = devices.named("A100")
    assert device.seconds(2_039_000, 0, "fp16") == (pytest.approx(1e-6), "memory")
    assert device.seconds(1, 312_000_000, "fp16") == (pytest.approx(1e-6), "compute")
    assert devices.named("H100").seconds(3_000_000, 0, "fp16")[0] == pytest.approx(1e-6)


def test_meta_kernels_allocate_as_cudnn_does() -> None:
    conv = torch.ops.aten.convolution.default
    geometry = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    for x_last, weight_last in ((True, False), (False, True), (False, False)):
        x, weight = empty(2, 8, 4, 4, last=x_last), empty(16, 8, 3, 3, last=weight_last)
        y = framework_work.on_meta(conv, (x, weight, *geometry))
        assert y.is_contiguous(memory_format=torch.channels_last) == (x_last or weight_last)


# The command.


@needs_triton
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["traffic", "resnet18", "--batch", "8", "--size", "64", "--device", "l4"]) == 0
    out = capsys.readouterr().out
    for word in ("plan default, as if on L4", "stem", "layer4", "head", "network", "this plan"):
        assert word in out
    for word in ("eager", "layers", "minimum", "GFLOP", "images/s", "taken as verified"):
        assert word in out


@needs_triton
def test_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["traffic", "resnet18", "--batch", "8", "--size", "64", "--plan", "layers"]
    assert cli.main([*arguments, "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    moved = sum(row["read"] + row["written"] for row in told["rows"])
    assert told["mb_per_image"] == pytest.approx(moved / 8 / 1e6)
    assert told["mb_per_image"] == pytest.approx(
        told["mb_read_per_image"] + told["mb_written_per_image"]
    )
    assert told["launches"] == sum(row["launches"] for row in told["rows"]) == 23
    assert (told["model"], told["dtype"], told["batch"], told["size"]) == (
        "resnet18",
        "fp16",
        8,
        64,
    )
    assert told["plan"] == "layers" and told["device"]["name"] == "H100"
    assert set(told["yardsticks"]) == {"eager", "layers", "minimum"}
    assert told["yardsticks"]["layers"]["mb_per_image"] == told["mb_per_image"]
    assert set(told["stages"]) == {row["stage"] for row in told["rows"]}
    time = sum(row["us_per_image"] for row in told["rows"])
    assert (
        told["us_per_image"]
        == pytest.approx(time)
        == pytest.approx(1e6 / told["images_per_second"])
    )
    file = tmp_path / "traffic.json"
    assert cli.main([*arguments, "--json", str(file)]) == 0
    assert "network" in capsys.readouterr().out
    assert json.loads(file.read_text()) == told


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    (
        ("--device", "H1000", "expected one of H100, H200, A100, L4, RTX4090"),
        ("--plan", "tuned", "expected one of default, layers"),
        ("--dtype", "int8", "'dtype': expected one of fp32, bf16, fp16"),
        ("--batch", "0", "'batch': expected at least 1"),
        ("--size", "1", "'size': expected at least 16"),
        ("--json", "/nonexistent/x.json", "/nonexistent"),
        ("--plot", "/nonexistent/x.png", "/nonexistent"),
        ("--plot", "roofline.pdf", "'plot': expected a file that ends in .svg or .png"),
    ),
)
def test_refusals(
    option: str,
    value: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(traffic.verify, "build_model", lambda *_: pytest.fail("work was begun"))
    assert cli.main(["traffic", "resnet18", option, value]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and expected in captured.err


def test_a_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["traffic", "resnet18", "--plot", "roofline.svg"]) == 1
    assert "pip install 'matplotlib" in capsys.readouterr().err


@needs_triton
@pytest.mark.parametrize(("suffix", "start"), ((".png", b"\x89PNG"), (".svg", b"<?xml")))
def test_plot(suffix: str, start: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"roofline{suffix}"
    traffic_report.plot(counted("resnet18", plan="default"), file)
    assert file.read_bytes().startswith(start)
