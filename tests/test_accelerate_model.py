"""accelerate() and undo(): the model stays the model."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate_support import (
    ConvBN,
    NarrowResNet,
    Optional,
    assert_same_numbers,
    images,
    narrow,
    reports,
    tiny,
)
from torch import nn

from resnet_fast.errors import AccelerateError
from resnet_fast.fuse import accelerate, explain, undo
from resnet_fast.nn.site import FusedSite
from resnet_fast.testing.budget import expect_within_budget
from resnet_fast.testing.step import Comparison

pytestmark = pytest.mark.usefixtures("sites_taken_as_verified")


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
        assert torch.equal(
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
    x, target = images(4, 48), torch.tensor([1, 2, 3, 4])
    Comparison(reference.train(), x, target).expect("accelerated", accelerated)
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
    assert_same_numbers(compiled, model, x)


def test_compile_in_training():
    model, x = tiny(Optional()), images()
    accelerated = accelerate(model).train()
    torch._dynamo.reset()
    compiled = torch.compile(accelerated, fullgraph=True, backend="aot_eager")
    twin = copy.deepcopy(model).train()
    exact = copy.deepcopy(twin).double()
    truth, framework = exact(x.double()), twin(x)
    expect_within_budget(compiled(x), framework, truth)
    for name in ("running_mean", "running_var"):
        ours, theirs, truth = (getattr(network.bn, name) for network in (model, twin, exact))
        expect_within_budget(ours, theirs, truth)


def test_export():
    model, x = narrow(), images()
    accelerated = accelerate(model)
    with torch.no_grad():
        accelerated(x)
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(accelerated, (x,), dynamic_shapes={"x": {0: batch}})
    assert_same_numbers(exported.module(), model, images(5, seed=2))
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
    assert_same_numbers(accelerated, model, x.double())


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
        assert_same_numbers(accelerated, twin, x)
        rows = {row["name"]: row["reason"] for row in explain(accelerated).rows}
        assert rows["layer1.0.conv1"] == "REPLACED"
        accelerated.layer1 = nn.Conv2d(64, 8, 1)
        twin.layer1 = accelerated.layer1
        assert_same_numbers(accelerated, twin, x)
    assert "REPLACED" in {row["reason"] for row in explain(accelerated).rows}
