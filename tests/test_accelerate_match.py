"""accelerate(): what is matched, what is refused, and by what reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate_support import (
    ConvBN,
    Reflecting,
    assert_same_numbers,
    has_residual,
    images,
    narrow,
    network,
    notes,
    reports,
    site_targets,
    tiny,
)
from torch import nn

from resnet_fast.errors import AccelerateError
from resnet_fast.fuse import REASONS, accelerate, explain

torchvision = pytest.importorskip("torchvision")
from torchvision.models.resnet import Bottleneck  # noqa: E402

pytestmark = pytest.mark.usefixtures("sites_taken_as_verified")


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("resnet18", 20),
        ("resnet50", 53),
        ("resnext50_32x4d", 53),
        ("wide_resnet50_2", 53),
        ("vgg11_bn", 8),
        ("mobilenet_v2", 52),
    ],
)
def test_every_convolution_is_matched(name, fused):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    accelerated = accelerate(model)
    assert list(reports(accelerated).values()) == ["FUSED"] * fused
    assert list(accelerated.state_dict()) == list(model.state_dict())


def short(**options):
    return torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1], **options)


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.resnet18(weights=None),
        short,
        lambda: short(groups=32, width_per_group=4),
        lambda: short(width_per_group=128),
        lambda: short(replace_stride_with_dilation=[False, True, True]),
        lambda: torchvision.models.vgg11_bn(weights=None).features,
        lambda: torchvision.models.mobilenet_v2(weights=None),
    ],
    ids=["resnet18", "bottleneck", "resnext", "wide", "dilated", "vgg11_bn", "mobilenet_v2"],
)
def test_numbers_are_the_same(build):
    torch.manual_seed(0)
    model = tiny(build())
    accelerated = accelerate(model)
    assert_same_numbers(accelerated, model, images())
    rows = explain(accelerated).rows
    assert [row["name"] for row in rows] == list(reports(accelerated))
    assert {row["reason"] for row in rows} == {"OK"}


@pytest.mark.parametrize("name", ["densenet121", "googlenet"])
def test_other_networks_work_and_every_convolution_has_a_reason(name):
    model, x = network(name), images(size=64)
    accelerated = accelerate(model)
    assert_same_numbers(accelerated, model, x)
    convs = [path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    rows = explain(accelerated).rows
    assert [row["name"] for row in rows] == convs
    assert all(row["reason"] and row["meaning"] for row in rows)
    assert "FUSED" in reports(accelerated).values()
    text = str(explain(accelerated))
    assert all(path in text for path in convs)


def test_residual_goes_to_the_main_branch():
    accelerated = accelerate(narrow())
    assert has_residual(accelerated, "layer2.0.conv2")
    assert not has_residual(accelerated, "layer2.0.downsample.0")
    acts = {path: target.act for path, (_, target) in site_targets(accelerated).items()}
    assert acts["layer2.0.downsample.0"] == "none"
    assert acts["layer2.0.conv2"] == "relu"


class Auxiliary(ConvBN):
    def combine(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return (y, self.bn2(self.conv2(y))) if self.training else y


def test_one_program_a_mode_where_forward_asks_for_the_mode():
    model, x = tiny(Auxiliary()), images()
    accelerated = accelerate(model)
    programs = accelerated._acceleration.programs
    assert programs[True] is not programs[False]
    assert reports(accelerated) == {"conv": "FUSED", "conv2": "FUSED"}
    assert_same_numbers(accelerated, model, x)
    assert_same_numbers(accelerated.train(), copy.deepcopy(model).train(), x)
    accelerated.conv.eval()
    assert len(accelerated(x)) == 2
    assert_same_numbers(accelerated.eval(), model, x)


def test_functional_dropout_follows_the_mode():
    class Net(ConvBN):
        def combine(self, x):
            return F.dropout(self.relu(self.bn(self.conv(x))), 0.5, self.training)

    model = tiny(Net())
    accelerated, x = accelerate(model), images()
    assert_same_numbers(accelerated, model, x)
    model.train()
    accelerated.train()
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    actual = accelerated(x)
    assert torch.equal(actual == 0, expected == 0)
    assert (actual == 0).float().mean() > 0.4


def add_operator(a, b):
    return a + b


def add_inplace(a, b):
    a += b
    return a


def add_torch(a, b):
    return torch.add(a, b)


def add_method(a, b):
    return a.add(b)


def add_method_inplace(a, b):
    return a.add_(b)


def add_reversed(a, b):
    return b + a


@pytest.mark.parametrize(
    "add", [add_operator, add_inplace, add_torch, add_method, add_method_inplace, add_reversed]
)
def test_residual_add_is_matched(add):
    class Net(ConvBN):
        def combine(self, x):
            return self.relu(add(self.bn(self.conv(x)), x))

    model = tiny(Net())
    accelerated = accelerate(model)
    assert has_residual(accelerated, "conv")
    assert site_targets(accelerated)["conv"][1].act == "relu"
    assert_same_numbers(accelerated, model, images())


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU6(inplace=True), "relu6"),
        (nn.SiLU(), "silu"),
        (nn.Hardswish(), "hardswish"),
        (nn.GELU(), "gelu"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.Sigmoid(), "sigmoid"),
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (torch.sigmoid, "sigmoid"),
        (F.silu, "silu"),
        (F.gelu, "gelu"),
        (lambda y: F.relu(y, inplace=True), "relu"),
        (lambda y: F.leaky_relu(y, 0.01), "leaky_relu"),
        (lambda y: y.relu_(), "relu"),
        (lambda y: F.leaky_relu(y, 0.2), "none"),
        (lambda y: F.gelu(y, approximate="tanh"), "none"),
        (nn.LeakyReLU(0.2), "none"),
        (nn.GELU(approximate="tanh"), "none"),
        (nn.Tanh(), "none"),
    ],
)
def test_activation_is_matched(act, name):
    class Net(ConvBN):
        def combine(self, x):
            return self.act(self.bn(self.conv(x)))

    model = Net()
    model.act = act
    model = tiny(model)
    accelerated = accelerate(model)
    assert site_targets(accelerated)["conv"][1].act == name
    assert_same_numbers(accelerated, model, images())


def test_convolution_with_bias_and_activation_is_a_site():
    model = tiny(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    accelerated = accelerate(model)
    assert reports(accelerated) == {"0": "FUSED", "2": "ALONE"}
    assert notes(accelerated)["2"] == "NO_BN"
    assert_same_numbers(accelerated, model, images())


@pytest.mark.parametrize("dims", [1, 3])
def test_other_ranks(dims):
    conv = (nn.Conv1d, None, nn.Conv3d)[dims - 1](3, 4, 3, padding=1)
    norm = (nn.BatchNorm1d, None, nn.BatchNorm3d)[dims - 1](4)
    model = tiny(nn.Sequential(conv, norm, nn.ReLU()))
    accelerated = accelerate(model)
    assert reports(accelerated) == {"0": "FUSED"}
    assert_same_numbers(accelerated, model, torch.randn(2, 3, *[6] * dims))


class ActBeforeNorm(ConvBN):
    def combine(self, x):
        return self.bn(self.relu(self.conv(x)))


class UsedTwice(ConvBN):
    def combine(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class NormUsedTwice(ConvBN):
    def combine(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y + x) + y.sum()


class SharedConv(ConvBN):
    def combine(self, x):
        return self.bn(self.conv(x)) + self.bn2(self.conv(x + 1))


class SharedNorm(ConvBN):
    def combine(self, x):
        return self.bn(self.conv(x)) + self.bn(self.conv2(x))


class GroupNormed(ConvBN):
    def __init__(self):
        super().__init__()
        self.bn = nn.GroupNorm(1, 3)

    def combine(self, x):
        return self.relu(self.bn(self.conv(x)))


class BatchStats(ConvBN):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3, track_running_stats=False)

    def combine(self, x):
        return self.relu(self.bn(self.conv(x)))


class FunctionalNorm(ConvBN):
    def combine(self, x):
        b = self.bn
        return F.batch_norm(self.conv(x), b.running_mean, b.running_var, b.weight, b.bias)


class WeightOnly(ConvBN):
    def combine(self, x):
        return self.bn(F.conv2d(x, self.conv.weight))


class OtherForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * 2)


class CustomConv(ConvBN):
    def __init__(self):
        super().__init__()
        self.conv = OtherForward(3, 3, 1)

    def combine(self, x):
        return self.bn(self.conv(x))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (SharedConv, "SHARED_MODULE"),
        (SharedNorm, "SHARED_MODULE"),
        (GroupNormed, "UNKNOWN_NORM"),
        (BatchStats, "BATCH_STATS"),
        (FunctionalNorm, "UNKNOWN_NORM"),
        (WeightOnly, "NOT_REACHED"),
        (CustomConv, "NOT_REACHED"),
        (Reflecting, "PADDING_MODE"),
    ],
)
def test_traps_are_refused_with_their_reason(kind, expected):
    model = tiny(kind())
    accelerated = accelerate(model)
    assert reports(accelerated)["conv"] == expected
    assert torch.equal(accelerated(images()), model(images()))
    row = next(row for row in explain(accelerated).rows if row["name"] == "conv")
    assert row["reason"] == expected and row["meaning"] == REASONS[expected]
    assert not row["fused"]


def test_a_convolution_whose_result_is_used_twice_is_a_site_alone():
    model = tiny(UsedTwice())
    accelerated = accelerate(model)
    assert reports(accelerated)["conv"] == "ALONE"
    assert_same_numbers(accelerated, model, images())
    row = next(row for row in explain(accelerated).rows if row["name"] == "conv")
    assert row["reason"] in ("OK", "FRAMEWORK") and row["notes"] == REASONS["MULTIPLE_USERS"]
    with pytest.raises(AccelerateError, match=r"ALONE \(1\)"):
        accelerate(tiny(nn.Sequential(nn.Conv2d(3, 4, 1))), strict=True)


def test_norm_behind_the_activation_stays_outside():
    model = tiny(ActBeforeNorm())
    accelerated = accelerate(model)
    target = site_targets(accelerated)["conv"][1]
    assert target.bn is None and target.act == "relu"
    assert_same_numbers(accelerated, model, images())


def test_value_used_behind_the_norm_ends_the_site_there():
    model = tiny(NormUsedTwice())
    accelerated = accelerate(model)
    assert not has_residual(accelerated, "conv")
    assert site_targets(accelerated)["conv"][1].act == "none"
    assert_same_numbers(accelerated, model, images())


class ScaledAdd(ConvBN):
    def combine(self, x):
        return torch.add(self.bn(self.conv(x)), x, alpha=2)


class AddIntoInput(ConvBN):
    def combine(self, x):
        x = x * 1
        y = self.bn(self.conv(x))
        view = x.view(-1)
        x += y
        return x, view


class InputOverwritten(ConvBN):
    def combine(self, x):
        x = x * 1
        y = self.bn(self.conv(x))
        return y + self.relu(x)


class ViewOverwritten(ConvBN):
    def combine(self, x):
        x = x * 1
        view = x.view(x.size(0), -1)
        y = self.bn(self.conv(x))
        view.mul_(2)
        return y + x


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (ScaledAdd, "ADD_ALPHA"),
        (AddIntoInput, "ADD_INPLACE"),
        (InputOverwritten, "ADD_HAZARD"),
        (ViewOverwritten, "ADD_HAZARD"),
    ],
)
def test_add_that_cannot_move_stays_outside(kind, expected):
    model = tiny(kind())
    accelerated, x = accelerate(model), images()
    assert reports(accelerated)["conv"] == "FUSED"
    assert notes(accelerated)["conv"] == expected
    assert not has_residual(accelerated, "conv")
    # A view is one of the format that was given.
    assert_same_numbers(accelerated, model, x, either_format=False)
    assert REASONS[expected] in str(explain(accelerated))


class Broadcast(ConvBN):
    def combine(self, x):
        return self.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))


def test_broadcast_add_is_right_at_run_time_and_ruled_out_by_examples():
    model, x = tiny(Broadcast()), images()
    assert_same_numbers(accelerate(model), model, x)
    accelerated = accelerate(model, x)
    assert notes(accelerated)["conv"] == "ADD_BROADCAST"
    assert not has_residual(accelerated, "conv")
    assert_same_numbers(accelerated, model, x)


def test_views_of_a_site_work_as_before():
    class Viewing(ConvBN):
        def combine(self, x):
            return self.relu(self.bn(self.conv(x))).view(x.size(0), -1)

    model = tiny(Viewing())
    accelerated, x = accelerate(model), images()
    assert_same_numbers(accelerated, model, x, either_format=False)
    maps = accelerate(tiny(ActBeforeNorm()))
    with torch.no_grad():
        assert maps(x).is_contiguous()
        nhwc = x.contiguous(memory_format=torch.channels_last)
        assert maps(nhwc).is_contiguous(memory_format=torch.channels_last)
