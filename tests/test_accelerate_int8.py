"""``accelerate(model, dtype="int8", calibration=...)``: 8 bits where asked for, nowhere else."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from accelerate_support import images, narrow, network, tiny
from sequence_support import needs_sequences
from torch import nn

from resnet_fast import accelerate, explain
from resnet_fast.errors import AccelerateError, ArgumentError
from resnet_fast.fuse import undo
from resnet_fast.fuse.calibrate import Histogram
from resnet_fast.ops.conv_bn_act_int8 import dequantize, quantize

pytestmark = needs_sequences


def batches(count=3, batch=4, size=32, channels=3):
    return [images(batch, size, channels, seed) for seed in range(count)]


def eight(model, **options):
    return accelerate(model, dtype="int8", calibration=batches(**options))


def form(accelerated):
    return accelerated._acceleration.programs[False].int8


def loss(actual, expected):
    """The error's part of the signal: a wrong grid, zero or shift makes it near 1."""
    return float((actual - expected).norm() / expected.norm())


def close(accelerated, model, x, most=0.1):
    with torch.no_grad():
        return loss(accelerated(x), model(x)) < most


class Block(nn.Module):
    """A network of 3 channels in and 8 out; ``forward`` is the subclass's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU(inplace=True)


class Adding(Block):
    def forward(self, x):
        x = self.relu(self.norm(self.a(x)))
        return self.relu(self.c(self.relu(self.b(x))) + x)


class Joining(Block):
    def forward(self, x):
        x = self.pool(self.relu(self.norm(self.a(x))))
        y = self.relu(self.b(x))
        return self.relu(self.c(torch.cat([x[:, :4], y[:, :4]], 1)))


class Writing(Block):
    """A value that a site made is written to in place, and read again by a site."""

    def forward(self, x):
        x = self.relu(self.norm(self.a(x)))
        x.mul_(2)
        y = self.relu(self.b(x))
        x.add_(1)
        return self.relu(self.c(x) + y)


class Gated(Block):
    def forward(self, x):
        x = self.relu(self.norm(self.a(x)))
        gate = torch.sigmoid(self.b(x.mean((2, 3), keepdim=True)))
        return self.relu(self.c(x * gate))


class Passing(Block):
    def __init__(self):
        super().__init__()
        self.drop, self.same = nn.Dropout(0.5), nn.Identity()

    def forward(self, x):
        x = self.same(self.drop(self.pool(self.relu(self.norm(self.a(x))))))
        return self.relu(self.b(x)), self.relu(self.c(x))


class Viewing(Block):
    """A step that depends on how its input lies in memory."""

    def forward(self, x):
        x = self.relu(self.norm(self.a(x)))
        return self.relu(self.b(x)).view(x.shape[0], -1)


@pytest.mark.parametrize("kind", [Adding, Joining, Writing, Gated, Viewing])
def test_numbers_of_small_networks(kind):
    model = tiny(kind())
    accelerated = eight(model)
    for x in (images(2, 32, seed=9), images(1, 32, seed=10), images(3, 17, seed=11)):
        if kind is Viewing or x.shape[2] % 2 == 0 or kind is not Joining:
            assert close(accelerated, model, x, 0.05)
            with torch.no_grad():
                assert accelerated(x).dtype is torch.float32


def test_what_passes_its_input_on_keeps_bytes():
    model = tiny(Passing())
    accelerated = eight(model)
    x = images(2, 32, seed=9)
    with torch.no_grad():
        for ours, theirs in zip(accelerated(x), model(x), strict=True):
            assert loss(ours, theirs) < 0.05
    grids = form(accelerated).grids
    assert len(set(grids.values())) < len(grids)


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0", "resnext50_32x4d"])
def test_numbers_of_networks(name):
    model = network(name)
    accelerated = eight(model, count=2, size=64)
    assert form(accelerated).refused == {}
    assert close(accelerated, model, images(2, 64, seed=9), 0.25)
    rows = [row for row in explain(accelerated) if row["reason"] == "INT8"]
    assert len(rows) > 50 and all(row["candidate"] == "int8" for row in rows)


def test_the_layers_are_one_native_call_with_the_same_bits():
    model = narrow()
    accelerated = eight(model)
    x = images(2, seed=5)
    with torch.no_grad():
        first, *rest = (accelerated(x) for _ in range(4))
        assert all(torch.equal(first, y) for y in rest)
        for shape in ((1, 32), (3, 32), (2, 48)):
            x = images(*shape, seed=6)
            assert torch.equal(accelerated(x), accelerated(x))
            assert close(accelerated, model, x)
    text = str(explain(accelerated))
    assert "layers run as one native call at 3x32x32" in text
    assert "8 bits for 15 of 15 sites and 1 linear layers, calibrated on 3 batches" in text
    assert {row["reason"] for row in explain(accelerated)} == {"INT8"}


def test_the_model_stays_the_model():
    model = narrow()
    before = copy.deepcopy(model.state_dict())
    accelerated = eight(model)
    assert accelerated.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert undo(accelerated) is model
    x = images(2, seed=5)
    with torch.no_grad():
        y = accelerated(x)
        for twin in (copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
            assert torch.equal(twin(x), y)
            assert torch.equal(twin(x), y)
        # Accelerated again without it, the model is in fp32.
        assert not torch.equal(accelerate(accelerated)(x), y)


def test_weights_are_taken_as_they_are():
    model = narrow()
    accelerated = eight(model)
    x = images(2, seed=5)
    with torch.no_grad():
        for _ in range(3):
            y = accelerated(x)
        model.layer1[0].conv1.weight.mul_(0.5)
        assert not torch.equal(accelerated(x), y) and close(accelerated, model, x)
        y = accelerated(x)
        model.layer2[0].bn1.bias.data += 0.5  # unseen by the version counter
        assert not torch.equal(accelerated(x), y) and close(accelerated, model, x)
        model.layer1[0].conv1.weight.mul_(2)
        model.layer2[0].bn1.bias.data -= 0.5
        other = narrow(3)
        accelerated.load_state_dict(other.state_dict())
        assert torch.equal(accelerated(x), accelerated(x))
        assert close(accelerated, other, x, 0.3)  # on the grids of the weights before


def test_training_gradients_and_other_dtypes_run_without_bytes():
    model = narrow()
    accelerated, plain = eight(model), accelerate(model)
    x = images(2, seed=5)
    with torch.no_grad():
        bytes_, real = accelerated(x), plain(x)
    assert not torch.equal(bytes_, real)
    assert torch.equal(accelerated(x), plain(x))  # gradients are recorded
    accelerated(x).sum().backward()
    assert model.conv1.weight.grad is not None
    with torch.no_grad():
        wide = x.double()
        assert torch.equal(copy.deepcopy(accelerated).double()(wide),
                           copy.deepcopy(plain).double()(wide))  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(accelerated(x), plain(x))
        compiled = [torch.compile(net, backend="eager")(x) for net in (accelerated, plain)]
        assert torch.equal(*compiled)
        hook = accelerated.layer1[0].conv1.register_forward_hook(lambda *_: None)
        assert close(accelerated, model, x)
        hook.remove()
        accelerated.train()
        plain_train = copy.deepcopy(plain).train()
        assert torch.equal(accelerated(x), plain_train(x))
        model.eval()
        accelerated.eval()


def test_a_replaced_activation_is_not_computed_in_bytes():
    model = tiny(Adding())
    accelerated = eight(model)
    x = images(2, seed=5)
    with torch.no_grad():
        accelerated(x)
        accelerated.relu = nn.Identity()
        unfused = copy.deepcopy(model)
        unfused.relu = nn.Identity()
        assert loss(accelerated(x), unfused(x)) < 1e-5


def test_a_site_that_fails_its_verification_runs_in_fp32(monkeypatch):
    from resnet_fast.fuse import int8 as module

    model = tiny(Adding())
    accelerated = eight(model)
    real = module.int8.deviation

    def deviation(call, x, residual, y):
        return 7.0 if residual is not None else real(call, x, residual, y)

    monkeypatch.setattr(module.int8, "deviation", deviation)
    x = images(2, seed=5)
    assert close(accelerated, model, x, 0.05)
    assert list(form(accelerated).refused) == ["c"]
    row = next(row for row in explain(accelerated) if row["name"] == "c")
    assert "VERIFY_FAILED: 7 times what rounding allows" in row["notes"]
    assert row["candidate"] != "int8"


def test_batches_are_tensors_tuples_or_dicts():
    model = narrow()
    x = images(2, seed=5)
    labels = torch.zeros(4)
    results = []
    for calibration in (
        batches(),
        ((x, labels) for x in batches()),
        [[x] for x in batches()],
        [{"x": x} for x in batches()],
        itertools.islice(iter(batches(5)), 3),
    ):
        accelerated = accelerate(model, dtype="int8", calibration=calibration)
        with torch.no_grad():
            results.append(accelerated(x))
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert not any(m.training for m in accelerated.modules())


def test_sites_that_stay_in_fp32_say_why():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.deep = nn.Conv2d(3, 8, 3), nn.Conv3d(8, 8, (1, 3, 3))
            self.relu = nn.ReLU()

        def forward(self, x):
            x = self.relu(self.flat(x))
            return self.relu(self.deep(x[:, :, None]))

    model = Mixed().eval()
    accelerated = eight(model)
    with torch.no_grad():
        accelerated(images(2, seed=4))
    rows = {row["name"]: row for row in explain(accelerated)}
    assert rows["flat"]["reason"] == "INT8"
    assert "fp32: 8 bits are for two spatial dimensions" in rows["deep"]["notes"]
    only = nn.Sequential(nn.Conv3d(1, 8, 3), nn.ReLU()).eval()
    with pytest.raises(AccelerateError, match="no site can run on 8 bits: 8 bits are for two"):
        accelerate(only, dtype="int8", calibration=[torch.randn(1, 1, 5, 5, 5)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int4"}, "argument 'dtype': expected \"int8\" or None, got 'int4'"),
        ({"dtype": "int8"}, "argument 'calibration': expected an iterable of batches"),
        ({"dtype": "int8", "calibration": 3}, "argument 'calibration': expected an iterable"),
        ({"dtype": "int8", "calibration": []}, "expected at least one batch, got none"),
        ({"calibration": []}, "argument 'calibration': expected None without"),
    ],
)
def test_arguments(options, words):
    with pytest.raises(ArgumentError, match=words):
        accelerate(narrow(), **options)


def test_a_model_in_another_dtype_is_refused():
    words = "expected parameters in fp32 on the CPU .*, got conv1.weight in bfloat16 on cpu"
    with pytest.raises(ArgumentError, match=words):
        accelerate(narrow().bfloat16(), dtype="int8", calibration=batches())


def test_calibration_that_fails_says_where():
    model = narrow()
    with pytest.raises(AccelerateError, match="fails on calibration batch 1"):
        accelerate(model, dtype="int8", calibration=[images(1), images(1, channels=5)])
    with pytest.raises(AccelerateError, match="expected finite ones"):
        accelerate(model, dtype="int8", calibration=[images(1) / 0])
    with pytest.raises(AccelerateError, match="the model has no convolution"):
        accelerate(nn.Linear(3, 3), dtype="int8", calibration=[torch.randn(1, 3)])
    assert undo(accelerate(model)) is model  # nothing is half-applied


def values(kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, generator=generator)
    if kind == "outliers":
        x[:4] *= 60
    return x.relu() if kind == "relu" else x


@pytest.mark.parametrize("kind", ["normal", "relu", "outliers"])
def test_a_grid_loses_least(kind):
    """Less than the grid over the whole range, and than its neighbours."""
    x = values(kind).view(1, 1, 1, -1)
    histogram = Histogram()
    for part in x.split(10_000, 3):
        histogram.add(part)

    def lost(grid):
        return float((dequantize(quantize(x, grid), grid) - x).square().mean())

    found = histogram.grid()
    low, high = float(x.min()), float(x.max())
    assert (histogram.low, histogram.high) == (low, high)
    whole = lost(type(found).over(low, high))
    assert lost(found) <= whole * 1.02
    if kind == "outliers":
        assert lost(found) < whole
    for factor in (0.8, 1.25):
        assert lost(found) < lost(found._replace(scale=found.scale * factor)) * 1.02


def test_histograms_of_nothing_but_zeros():
    histogram = Histogram()
    histogram.add(torch.zeros(2, 3, 4, 4))
    assert histogram.grid().scale == 1 and histogram.grid().zero == 0


def test_a_histogram_sees_every_channel():
    """One channel of 64 is far larger: values are drawn from it as from the others."""
    x = torch.rand(2, 64, 112, 112)
    x[:, 37] *= 20
    histogram = Histogram()
    histogram.add(x)
    grid = histogram.grid()
    assert grid.scale * 255 > 15


def test_the_head_is_in_bytes_and_follows_its_weights():
    model = narrow()
    accelerated = eight(model)
    assert len(form(accelerated).linears) == 1
    x = images(2, seed=5)
    with torch.no_grad():
        before = accelerated(x)
        model.fc.weight.mul_(2)
        model.fc.bias.data += 1
        assert close(accelerated, model, x) and not torch.equal(accelerated(x), before)
        accelerated.fc = nn.Linear(64, 3)
        model.fc = accelerated.fc
        assert accelerated(x).shape == (2, 3) and close(accelerated, model, x)
        accelerated.fc = nn.Linear(64, 3).double()
        with pytest.raises(RuntimeError, match="dtype"):
            accelerated(x)  # as the model itself
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_linear_layer_that_fails_its_verification_runs_in_fp32(monkeypatch):
    from resnet_fast.fuse import int8 as module

    model = narrow()
    accelerated = eight(model)
    monkeypatch.setattr(module.int8, "linear_deviation", lambda *_: float("nan"))
    assert close(accelerated, model, images(2, seed=5))
    assert form(accelerated).linears == {}
    assert "and 0 linear layers" in str(explain(accelerated))


def test_what_is_handed_on_and_written_to_is_still_the_same_memory():
    class Sharing(Block):
        def __init__(self):
            super().__init__()
            self.same = nn.Identity()

        def forward(self, x):
            x = self.relu(self.norm(self.a(x)))
            y = self.same(x)
            y.add_(1)
            return self.relu(self.b(x)) + self.relu(self.c(y))

    model = tiny(Sharing())
    assert close(eight(model), model, images(2, 32, seed=9), 0.05)
