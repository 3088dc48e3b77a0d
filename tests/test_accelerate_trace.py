"""accelerate(): tracing, hooks, verification on examples, refusals."""

import dataclasses
import operator
import pickle
import random
import warnings

import pytest
import torch
from accelerate_support import (
    ConvBN,
    Optional,
    Reflecting,
    assert_same_numbers,
    images,
    narrow,
    reports,
    tiny,
)
from torch import nn

from resnet_fast import models, plan
from resnet_fast.errors import AccelerateError, ArgumentError
from resnet_fast.fuse import accelerate, explain, undo
from resnet_fast.fuse.capture import SITE_CHILD
from resnet_fast.fuse.program import Program
from resnet_fast.nn.site import FusedSite
from resnet_fast.plan.candidate import CANDIDATES
from resnet_fast.testing.networks import randomize_batchnorm_

pytestmark = pytest.mark.usefixtures("sites_taken_as_verified")


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


def test_arguments_with_defaults():
    model, x = tiny(Optional()), images()
    accelerated = accelerate(model)
    assert reports(accelerated)["conv"] == "FUSED"
    with torch.no_grad():
        for options in ({}, {"twice": True}, {"scale": torch.tensor(3.0)}, {"twice": False}):
            assert_same_numbers(accelerated, model, x, **options)
            assert torch.equal(accelerated(x=x, **options), accelerated(x, **options))
        with pytest.raises(TypeError):
            accelerated(x, nonsense=1)
        with pytest.raises(TypeError):
            accelerated()


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
        model.get_submodule(where).register_forward_hook(hook)

    class Watched(nn.Sequential):
        def forward(self, x):
            calls.clear()
            return super().forward(x), *calls

    assert_same_numbers(Watched(accelerated), Watched(model), x)
    assert calls
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


def run_verified(monkeypatch, cache):
    """Rows of a run that verifies its sites, without a verdict from elsewhere."""
    monkeypatch.undo()  # what sites_taken_as_verified did
    monkeypatch.setenv("RESNET_FAST_CACHE_DIR", str(cache))
    model = narrow()
    accelerated = accelerate(model)
    assert_same_numbers(accelerated, model, images())
    return explain(accelerated).rows


def test_sites_are_verified_before_they_run(monkeypatch, tmp_path):
    rows = run_verified(monkeypatch, tmp_path)
    assert {(row["reason"], row["candidate"]) for row in rows} == {("OK", "direct")}
    assert all(0 < row["error"] <= row["limit"] for row in rows)


def test_wrong_candidate_is_found_before_it_runs(monkeypatch, tmp_path):
    direct = CANDIDATES["direct"]
    wrong = dataclasses.replace(direct, run=lambda *args: direct.run(*args) * 1.01, prepare=None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(CANDIDATES, "direct", wrong)
        rows = run_verified(monkeypatch, tmp_path)
    assert {(row["reason"], row["candidate"]) for row in rows} == {("OK", "onednn")}
    assert all("direct: error" in row["notes"] for row in rows)
    assert all(0 < row["error"] <= row["limit"] for row in rows)


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
    assert reports(accelerated) == {"conv": "FUSED", "conv2": "NOT_REACHED"}


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
    reasons = [row["reason"] for row in explain(accelerated).rows]
    assert reasons.count("ALREADY_FUSED") == reasons.count("OK") == 19
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
