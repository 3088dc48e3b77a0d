"""accelerate(), explain(), undo(): what is matched, what is refused, and a model stays a model."""

import copy
import io
import operator
import pickle
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fast import models, plan
from resnet_fast.errors import AccelerateError, ArgumentError
from resnet_fast.fuse import REASONS, accelerate, explain, undo
from resnet_fast.fuse.capture import SITE_CHILD
from resnet_fast.fuse.program import Program
from resnet_fast.nn.site import FusedSite
from resnet_fast.plan import binding
from resnet_fast.testing.budget import within_budget
from resnet_fast.testing.networks import randomize_batchnorm_

torchvision = pytest.importorskip("torchvision")
from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:resnet_fast. candidate:UserWarning")


@pytest.fixture(autouse=True)
def _sites_are_taken_as_verified(monkeypatch):
    """Verifying candidates is tested with the plan; here it would take most of the time."""
    monkeypatch.setattr(binding, "verified", lambda *_: (True, 0.0, 0.0))
    monkeypatch.setattr(binding, "_generation", binding.generation() + 1)


class NarrowResNet(torchvision.models.ResNet):
    """torchvision's ResNet with an eighth of the width, to keep tests short."""

    def __init__(self):
        super().__init__(BasicBlock, [2, 1, 1, 1])
        self.fc = nn.Linear(64, 10)

    def _make_layer(self, block, planes, *args, **options):
        return super()._make_layer(block, planes // 8, *args, **options)


def narrow(seed=0):
    torch.manual_seed(seed)
    return randomize_batchnorm_(NarrowResNet(), seed).eval()


def network(name, **options):
    torch.manual_seed(0)
    if name == "googlenet":
        options.setdefault("init_weights", False)
    return randomize_batchnorm_(torchvision.models.get_model(name, weights=None, **options)).eval()


def tiny(module):
    """``module`` with random batch-norm statistics, in eval."""
    return randomize_batchnorm_(module).eval()


def images(batch=2, size=32, channels=3, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_same_numbers(accelerated, model, x):
    """The output of ``accelerated`` is within the budget that ``model`` sets in either layout."""
    truth = copy.deepcopy(model).double()(x.double())
    actual = accelerated(x)
    verdicts = [within_budget(actual, model(x), truth)]
    if not verdicts[0].ok and x.dim() == 4:
        again = model(x.contiguous(memory_format=torch.channels_last))
        verdicts.append(within_budget(actual, again, truth))
    assert any(verdict.ok for verdict in verdicts), verdicts


def reports(accelerated):
    return {path: report.reason for path, report in accelerated._acceleration.reports.items()}


def notes(accelerated):
    return {path: report.note for path, report in accelerated._acceleration.reports.items()}


def site_targets(accelerated, training=False):
    program = accelerated._acceleration.programs[training]
    return {s.target.path: (s, s.target) for s in program.steps if s.kind == "site"}


def has_residual(accelerated, path):
    return site_targets(accelerated)[path][0].args[1] is not None


class ConvBN(nn.Module):
    """Two convolutions with norms, and a ``combine`` that subclasses define."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 1)
        self.bn2 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.combine(x)


# Networks.


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
    assert {row["reason"] for row in rows} <= {"OK", "NO_CANDIDATE", "MISMATCH"}


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
    twin = copy.deepcopy(model).train()
    accelerated.train()
    for a, b in zip(accelerated(x), twin(x), strict=True):
        torch.testing.assert_close(a, b)
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


# What is matched, by dataflow.


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
    assert reports(accelerated) == {"0": "FUSED", "2": "NO_BN"}
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


class Reflecting(ConvBN):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")

    def combine(self, x):
        return self.bn(self.conv(x))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (UsedTwice, "MULTIPLE_USERS"),
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
    assert torch.equal(accelerated(images()), model(images())) or kind is SharedNorm
    row = next(row for row in explain(accelerated).rows if row["name"] == "conv")
    assert row["reason"] == expected and row["meaning"] == REASONS[expected]
    assert not row["fused"]


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
    with torch.no_grad():
        for a, b in zip(_tuple(accelerated(x)), _tuple(model(x)), strict=True):
            torch.testing.assert_close(a, b)
    assert REASONS[expected] in str(explain(accelerated))


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


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
    assert_same_numbers(accelerated, model, x)
    maps = accelerate(tiny(ActBeforeNorm()))
    with torch.no_grad():
        assert maps(x).is_contiguous()
        nhwc = x.contiguous(memory_format=torch.channels_last)
        assert maps(nhwc).is_contiguous(memory_format=torch.channels_last)


# Tracing.


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))])
        self.own = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.block(x)
        if y.mean() > 1e6:
            return y
        for stage in self.stages:
            y = stage(y)
        return self.own(y)


def test_untraceable_model_with_traceable_parts():
    model, x = tiny(Untraceable()), images()
    accelerated = accelerate(model, x)
    assert reports(accelerated) == {
        "block.0": "FUSED",
        "stages.0.0": "FUSED",
        "own": "TRACE_FAILED",
    }
    row = explain(accelerated).rows[-1]
    assert "TraceError" in row["notes"]
    assert_same_numbers(accelerated, model, x)
    again = pickle.loads(pickle.dumps(accelerated))
    assert torch.equal(again(x), accelerated(x))


class Drawing(ConvBN):
    def combine(self, x):
        y = self.bn(self.conv(x))
        return y * 2 if random.random() < 0.5 else y + torch.randn(1)


class Remembering(ConvBN):
    def combine(self, x):
        self.last = self.bn(self.conv(x))
        return self.last


class Constant(ConvBN):
    def combine(self, x):
        return self.bn(self.conv(x)) * torch.arange(3).view(1, 3, 1, 1)


@pytest.mark.parametrize("kind", [Drawing, Remembering, Constant])
def test_forward_that_a_graph_would_not_reproduce_is_not_traced(kind):
    model = tiny(kind())
    before = {key: id(value) for key, value in vars(model).items()}
    random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), torch.get_rng_state()
    accelerated = accelerate(model)
    assert states[0] == random.getstate() and torch.equal(states[1], torch.get_rng_state())
    assert reports(accelerated)["conv"] == "TRACE_FAILED"
    assert {key: id(value) for key, value in vars(model).items()} == before
    with torch.no_grad():
        random.seed(7)
        torch.manual_seed(7)
        expected = model(images())
        random.seed(7)
        torch.manual_seed(7)
        assert torch.equal(accelerated(images()), expected)


class Optional(ConvBN):
    def forward(self, x, *, scale=None, twice: bool = False):
        y = self.relu(self.bn(self.conv(x)))
        if scale is not None:
            y = y * scale
        return y * 2 if twice else y


def test_arguments_with_defaults():
    model, x = tiny(Optional()), images()
    accelerated = accelerate(model)
    assert reports(accelerated)["conv"] == "FUSED"
    with torch.no_grad():
        for options in ({}, {"twice": True}, {"scale": torch.tensor(3.0)}, {"twice": False}):
            torch.testing.assert_close(accelerated(x, **options), model(x, **options))
            torch.testing.assert_close(accelerated(x=x, **options), model(x, **options))
        with pytest.raises(TypeError):
            accelerated(x, nonsense=1)
        with pytest.raises(TypeError):
            accelerated()


# The model stays the model.


def test_it_is_the_class_it_was():
    model = narrow()
    accelerated = accelerate(model)
    assert isinstance(accelerated, type(model))
    assert accelerated is not model
    children = [name for name, _ in accelerated.named_children()]
    assert children == [name for name, _ in model.named_children()]
    assert type(accelerated.layer1[0].conv1) is nn.Conv2d
    assert accelerated.fc.weight is model.fc.weight
    assert accelerated.bn1.running_mean is model.bn1.running_mean
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(
            accelerated.layer1(accelerated.maxpool(accelerated.conv1(x))),
            model.layer1(model.maxpool(model.conv1(x))),
        )


def test_original_is_left_as_it_was():
    model, x = narrow(), images()
    model.layer1.train()
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        before = copy.deepcopy(model)(x)
    attributes = [sorted(vars(m)) for m in model.modules()]
    kinds = [type(m) for m in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    accelerated = accelerate(model, x)
    assert [m.training for m in model.modules()] == modes
    with torch.no_grad():
        accelerated.eval()(x)
    assert undo(accelerated) is model
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_undo_refuses_anything_else():
    with pytest.raises(AccelerateError, match="Conv2d"):
        undo(nn.Conv2d(1, 1, 1))
    with pytest.raises(AccelerateError):
        undo(None)


def test_accelerating_twice_is_accelerating_once():
    model = narrow()
    once = accelerate(model)
    twice = accelerate(once)
    assert undo(twice) is model
    assert reports(twice) == reports(once)
    assert list(twice.state_dict()) == list(once.state_dict())
    assert len([m for m in twice.modules() if isinstance(m, FusedSite)]) == len(reports(once))


def test_accelerating_a_changed_accelerated_model_keeps_the_change():
    model = narrow()
    once = accelerate(model)
    once.fc = nn.Linear(64, 7)
    twice = accelerate(once)
    assert undo(twice) is once
    with torch.no_grad():
        assert twice(images()).shape == (2, 7)


def test_accelerated_model_inside_another():
    inner = accelerate(narrow())
    model = nn.Sequential(inner, nn.Unflatten(1, (10, 1, 1)), nn.Conv2d(10, 4, 1), nn.ReLU())
    accelerated = accelerate(model.eval())
    assert set(reports(accelerated).values()) == {"FUSED"}
    assert_same_numbers(accelerated, model, images())
    assert undo(accelerated) is model and model[0] is inner


def test_training_gives_the_reference_gradients_and_statistics():
    reference = narrow()
    model = copy.deepcopy(reference)
    accelerated = accelerate(model).train()
    reference.train()
    x, target = images(4, 48), torch.tensor([1, 2, 3, 4])
    losses = []
    for candidate in (reference, accelerated):
        loss = F.cross_entropy(candidate(x), target)
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses)
    for (name, a), b in zip(accelerated.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)
    for a, b in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert not accelerated.layer1[0].bn1.num_batches_tracked.eq(0).any()
    torch.optim.SGD(accelerated.parameters(), 0.1).step()
    assert_same_numbers(accelerated.eval(), model.eval(), x)


def test_pickling_and_saving():
    accelerated, x = accelerate(narrow()), images()
    buffer = io.BytesIO()
    torch.save(accelerated, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is type(accelerated)
    with torch.no_grad():
        assert torch.equal(loaded(x), accelerated(x))
    origin = undo(loaded)
    assert type(origin) is NarrowResNet
    assert loaded.fc.weight is origin.fc.weight
    assert loaded.conv1.weight is not accelerated.conv1.weight


def test_deepcopy_is_consistent():
    model = narrow()
    accelerated, x = accelerate(model), images()
    twin = copy.deepcopy(accelerated)
    origin = undo(twin)
    assert origin is not model
    assert twin.conv1.weight is origin.conv1.weight
    assert twin.bn1.running_mean is origin.bn1.running_mean
    with torch.no_grad():
        expected = accelerated(x)
        origin.conv1.weight.mul_(2)
        assert torch.equal(accelerated(x), expected)
        assert not torch.equal(twin(x), expected)
    assert_same_numbers(twin, origin, x)
    assert set(reports(twin).values()) == {"FUSED"}
    assert explain(twin).rows[0]["reason"] != "REPLACED"


def test_pickled_functions_are_found_by_name():
    class_ = Pooling()
    accelerated = accelerate(tiny(class_))
    again = pickle.loads(pickle.dumps(accelerated))
    assert torch.equal(again(images()), accelerated(images()))


class Pooling(ConvBN):
    def combine(self, x):
        y = F.max_pool2d(self.relu(self.bn(self.conv(x))), 2)
        return torch.cat([y[:, 1:], y[..., : x.size(2)]], 1).flatten(1)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compile_without_graph_breaks(backend):
    model, x = narrow(), images()
    accelerated = accelerate(model)
    with torch.no_grad():
        accelerated(x)
        torch._dynamo.reset()
        compiled = torch.compile(accelerated, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), model(x))


def test_compile_in_training():
    model, x = tiny(Optional()), images()
    accelerated = accelerate(model).train()
    torch._dynamo.reset()
    compiled = torch.compile(accelerated, fullgraph=True, backend="aot_eager")
    twin = copy.deepcopy(model).train()
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(model.bn.running_var, twin.bn.running_var)


def test_export():
    model, x = narrow(), images()
    accelerated = accelerate(model)
    with torch.no_grad():
        accelerated(x)
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(accelerated, (x,), dynamic_shapes={"x": {0: batch}})
        y = images(5, seed=2)
        torch.testing.assert_close(exported.module()(y), model(y))
    assert set(exported.state_dict) == set(model.state_dict())


def test_conversion_keeps_both_consistent():
    model, x = narrow(), images()
    accelerated = accelerate(model)
    assert accelerated.to(torch.bfloat16) is accelerated
    assert accelerated.bn1.running_mean.dtype == torch.bfloat16
    for (name, a), b in zip(accelerated.named_buffers(), model.buffers(), strict=True):
        assert a is b, name
    for a, b in zip(accelerated.parameters(), model.parameters(), strict=True):
        assert a is b and a.dtype == torch.bfloat16
    assert_same_numbers(accelerated, model, x.bfloat16())
    accelerated.float().to(memory_format=torch.channels_last)
    assert model.bn1.running_mean is accelerated.bn1.running_mean
    assert_same_numbers(accelerated, model, x)
    nn.Sequential(accelerated).double()
    assert model.bn1.running_mean.dtype == accelerated.bn1.running_mean.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(accelerated(x.double()), model(x.double()))


def test_conversion_reaches_what_was_added_later():
    model = narrow()
    accelerated = accelerate(model)
    accelerated.fc = nn.Linear(64, 7)
    accelerated.to(torch.bfloat16)
    assert accelerated.fc.weight.dtype == model.fc.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert accelerated(images().bfloat16()).shape == (2, 7)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign):
    model, x = narrow(), images()
    accelerated = accelerate(model)
    with torch.no_grad():
        accelerated(x)
    other = narrow(9)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    accelerated.load_state_dict(state, assign=assign)
    assert_same_numbers(accelerated, other, x)
    with torch.no_grad():
        assert torch.equal(undo(accelerated)(x), other(x))
    model.load_state_dict(accelerated.state_dict())


def test_edits_in_place_are_seen():
    model, x = narrow(), images()
    accelerated = accelerate(model)
    with torch.no_grad():
        accelerated(x)
        model.layer2[0].conv1.weight.mul_(1.5)
        accelerated.layer3[0].bn1.running_var.mul_(2)
        accelerated.bn1.weight.data.add_(0.25)
    assert_same_numbers(accelerated, model, x)


def test_replaced_modules_are_the_ones_that_run():
    model, x = narrow(), images()
    accelerated = accelerate(model)
    accelerated.fc = nn.Identity()
    with torch.no_grad():
        assert accelerated(x).shape == (2, 64)
        accelerated.layer1[0].conv1 = nn.Conv2d(64, 8, 1)
        twin = copy.deepcopy(model)
        twin.fc = nn.Identity()
        twin.layer1[0].conv1 = accelerated.layer1[0].conv1
        torch.testing.assert_close(accelerated(x), twin(x))
        rows = {row["name"]: row["reason"] for row in explain(accelerated).rows}
        assert rows["layer1.0.conv1"] == "REPLACED"
        accelerated.layer1 = nn.Conv2d(64, 8, 1)
        twin.layer1 = accelerated.layer1
        torch.testing.assert_close(accelerated(x), twin(x))
    assert "REPLACED" in {row["reason"] for row in explain(accelerated).rows}


# Hooks.


@pytest.mark.parametrize("where", ["conv1", "bn1", "relu", "layer2", "layer2.0.conv1"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_are_called_as_often_as_before(where, when):
    model, x = narrow(), images()
    calls = []

    def hook(module, args, output):
        calls.append(output.detach().clone())

    if when == "before":
        model.get_submodule(where).register_forward_hook(hook)
        accelerated = accelerate(model)
        assert calls == []
    else:
        accelerated = accelerate(model)
        accelerated.get_submodule(where).register_forward_hook(hook)
    with torch.no_grad():
        y = accelerated(x)
        seen = list(calls)
        calls.clear()
        if when == "after":
            model.get_submodule(where).register_forward_hook(hook)
        torch.testing.assert_close(y, model(x))
    assert len(seen) == len(calls) > 0
    for a, b in zip(seen, calls, strict=True):
        torch.testing.assert_close(a, b)
    if where == "layer2" and when == "before":
        assert set(reports(accelerated).values()) == {"FUSED"}
    elif where != "relu" or when == "after":
        assert "HOOKED" in {row["reason"] for row in explain(accelerated).rows}


def test_global_hooks_see_every_module():
    model, x = tiny(Optional()), images()
    accelerated = accelerate(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        accelerated(x)
    finally:
        handle.remove()
    assert nn.BatchNorm2d in seen and nn.ReLU in seen


# Verification.


def test_examples_verify_site_by_site(monkeypatch):
    model, x = narrow(), images()
    forward = FusedSite.forward

    def wrong(self, x, conv, bn, residual=None):
        y = forward(self, x, conv, bn, residual)
        return y * 1.01 if self.name == "layer2.0.conv1" else y

    monkeypatch.setattr(FusedSite, "forward", wrong)
    accelerated = accelerate(model, (x,))
    assert reports(accelerated)["layer2.0.conv1"] == "VERIFY_FAILED"
    assert SITE_CHILD not in accelerated.layer2[0].conv1._modules
    row = next(r for r in explain(accelerated).rows if r["name"] == "layer2.0.conv1")
    assert "beyond the limit" in row["notes"]
    assert reports(accelerated)["conv1"] == "FUSED"
    assert_same_numbers(accelerated, model, x)
    assert set(reports(accelerate(model, x, verify=False)).values()) == {"FUSED"}


def test_wrong_graph_is_found_by_examples(monkeypatch):
    class Deceived(ConvBN):
        def combine(self, x):
            y = self.relu(self.bn(self.conv(x)))
            return y if isinstance(x, torch.Tensor) else y * 2

    model, x = tiny(Deceived()), images()
    accelerated = accelerate(model, x)
    assert reports(accelerated)["conv"] == "VERIFY_FAILED"
    assert torch.equal(accelerated(x), model(x))


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_forms_of_example_inputs(form):
    accelerated = accelerate(tiny(Optional()), form(images()))
    assert reports(accelerated)["conv"] in ("FUSED", "VERIFY_FAILED")


def test_examples_leave_no_trace():
    class Writing(ConvBN):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.register_buffer("calls", torch.zeros(1))

        def combine(self, x):
            self.calls.add_(1)
            return self.drop(self.relu(self.bn(self.conv(x.mul_(2)))))

    model, x = tiny(Writing()).train(), images()
    kept, state = x.clone(), torch.get_rng_state()
    statistics = model.bn.running_mean.clone()
    accelerate(model, x)
    assert torch.equal(x, kept)
    assert torch.equal(model.calls, torch.zeros(1))
    assert torch.equal(model.bn.running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())


def test_failing_examples_are_named():
    with pytest.raises(AccelerateError, match="fails on example_inputs"):
        accelerate(tiny(Optional()), images(channels=5))


# Refusals.


def test_strict():
    with pytest.raises(AccelerateError, match="no convolution"):
        accelerate(nn.Linear(3, 3), strict=True)
    with pytest.raises(AccelerateError, match="PADDING_MODE"):
        accelerate(Reflecting(), strict=True)
    model = nn.Linear(3, 3)
    accelerated = accelerate(model)
    x = torch.randn(2, 3)
    assert torch.equal(accelerated(x), model(x)) and undo(accelerated) is model
    assert len(explain(accelerated)) == 0
    accelerate(tiny(Optional()), strict=True)


def test_wrong_arguments():
    with pytest.raises(ArgumentError, match="model"):
        accelerate("resnet18")
    with pytest.raises(ArgumentError, match="plan"):
        accelerate(nn.Conv2d(1, 1, 1), plan={})
    with pytest.raises(ArgumentError, match="model"):
        explain(3)
    with pytest.raises(AccelerateError, match="compile"):
        accelerate(torch.compile(nn.Conv2d(1, 1, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.ReLU())
    with pytest.raises(AccelerateError, match="script"):
        accelerate(scripted)


def test_plan_is_set_for_the_process():
    before = plan.active_plan()
    mine = plan.Plan(plan.device_name(torch.device("cpu")))
    try:
        accelerated = accelerate(tiny(Optional()), plan=mine)
        assert plan.active_plan() is mine
        with torch.no_grad():
            accelerated(images())
    finally:
        plan.set_plan(before)


def test_networks_of_this_package_are_fused_already():
    torch.manual_seed(0)
    model, x = randomize_batchnorm_(models.cifar_resnet20()).eval(), images()
    accelerated = accelerate(model)
    assert set(reports(accelerated).values()) == {"ALREADY_FUSED"}
    with torch.no_grad():
        assert torch.equal(accelerated(x), model(x))
    rows = explain(accelerated).rows
    assert {"ALREADY_FUSED", "OK"} & {row["reason"] for row in rows}
    assert undo(accelerated) is model
    assert [row["name"] for row in explain(model).rows]
    assert {row["reason"] for row in explain(narrow()).rows} == {"NOT_ACCELERATED"}


def test_explanation_prints(capsys):
    rich = pytest.importorskip("rich.console")
    accelerated = accelerate(tiny(Optional()))
    explanation = explain(accelerated)
    assert explanation.rows[0]["reason"] == "NOT_RUN"
    with torch.no_grad():
        accelerated(images())
    rich.Console().print(explain(accelerated))
    assert "conv" in capsys.readouterr().out
    assert "sites fused" in str(explain(accelerated))


def test_programs_are_plain_data():
    accelerated = accelerate(narrow())
    program = accelerated._acceleration.programs[False]
    assert isinstance(program, Program)
    kinds = {step.kind for step in program.steps}
    assert kinds <= {"site", "module", "function", "method", "attr", "layout", "output"}
    assert operator.add not in {step.target for step in program.steps if step.kind == "function"}
