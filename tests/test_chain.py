"""Residual stages as chains: the layers' numbers, verified, measured, and dropped on any change.

A CPU runs the op as its layers, so the walk over blocks is tested here without a GPU: chains are
allowed on the CPU, and the choice is a plan's or the test's.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import models, plan
from resnet_fast.nn import chain as chain_module
from resnet_fast.nn.blocks import Bottleneck, unfuse_
from resnet_fast.plan import binding, cache, group
from resnet_fast.plan import chain as place
from resnet_fast.plan.plan import Entry, Plan
from resnet_fast.plan.site import device_name
from resnet_fast.testing.budget import expect_within_budget, in_formats
from resnet_fast.testing.networks import randomize_batchnorm_

pytest_plugins = ("chain_support",)
pytestmark = pytest.mark.usefixtures("chains_on_the_cpu")


def network(name: str = "resnet50", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batchnorm_(getattr(models, name)(num_classes=7, **arguments)).eval()


def chained(net: nn.Module) -> Any:
    """The one kind of input that ``net`` has run as chains."""
    (found,) = net.chains._known.values()
    return found


def images(batch: int = 2, size: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {}),
        ("resnet50", {}),
        ("resnext50_32x4d", {}),
        ("wide_resnet50_2", {}),
        ("resnet50", {"replace_stride_with_dilation": (False, True, True)}),
    ],
)
@torch.no_grad()
def test_stages_match_fp64(
    chains_on_the_cpu: list[str], name: str, arguments: dict[str, Any], dtype: torch.dtype
) -> None:
    net = network(name, **arguments).to(dtype)
    x = images().to(dtype)
    plain = unfuse_(copy.deepcopy(net))
    frameworks = in_formats(plain, x)
    truth = plain.double()(x.double())
    for _ in range(2):
        expect_within_budget(net(x), frameworks, truth)
    # The second forward runs what the first decided.
    per_forward = [line for line in chained(net).lines if "residual_chain (OK)" in line]
    assert len(per_forward) == len(chained(net).lines) > 0


@torch.no_grad()
def test_forms_follow_from_the_widths(chains_on_the_cpu: list[str]) -> None:
    """ResNet-50: conv2 joins at 64 and 128 channels, the next conv1 up to 256."""
    net = network()
    net(images())
    chains_on_the_cpu.clear()
    net(images(seed=2))
    assert chains_on_the_cpu == [
        *("conv2+conv3+down+next", "conv2+conv3+next", "conv2+conv3+next"),
        *("conv2+conv3+down+next", *["conv2+conv3+next"] * 3),
        *("conv3+down+next", *["conv3+next"] * 4),
        # The last of these has 512 channels next; layer4 has them everywhere.
        "conv3+down",
    ]
    assert [line.split(":")[0] for line in chained(net).lines][-2:] == ["layer3.4", "layer4.0"]
    basic = network("resnet18")
    basic(images())
    chains_on_the_cpu.clear()
    basic(images())
    assert chains_on_the_cpu == ["conv2+down"] * 3


@torch.no_grad()
def test_layers_stay_where_they_are_faster(
    chains_on_the_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        group, "measure", lambda runs, device: {k: float(k != "layers") for k in runs}
    )
    net = network("resnet18")
    first = net(images())
    chains_on_the_cpu.clear()
    assert torch.equal(net(images()), first)
    assert chains_on_the_cpu == []
    assert all("layers (SLOWER)" in line for line in chained(net).lines)


@torch.no_grad()
def test_a_wrong_chain_is_rolled_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("RESNET_FAST_CACHE_DIR", str(tmp_path))
    cache.forget()
    run = place.run_chain

    def wrong(*arguments: Any) -> Any:
        y, h = run(*arguments)
        return y * 1.001, h

    monkeypatch.setattr(place, "run_chain", wrong)
    prepare = chain_module.prepare

    def spoilt(*arguments: Any) -> Any:
        call = prepare(*arguments)
        return lambda h, x: (call(h, x)[0] * 1.001, call(h, x)[1])

    monkeypatch.setattr(chain_module, "prepare", spoilt)
    net = network("resnet18")
    layers = copy.deepcopy(net)
    layers.chains = None
    assert torch.equal(net(images()), layers(images()))
    assert all("layers (MISMATCH)" in line for line in chained(net).lines)


def test_a_chain_that_raises_or_is_wrong_in_one_result_is_a_mismatch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = chain_module.ChainBlock(Bottleneck(64, 16).eval(), Bottleneck(64, 16).eval())
    x = torch.randn(2, 64, 8, 8)
    site = block.site(torch.randn(2, 16, 8, 8), x)
    assert place.verify_chain(site, torch.device("cpu")).ok
    run = place.run_chain

    def raises(*arguments: Any) -> Any:
        raise RuntimeError("no")

    def edge(which: int) -> Callable[..., Any]:
        def spoilt(*arguments: Any) -> Any:
            results = run(*arguments)
            results[which][-1, -1, -1, -1] += 0.1
            return results

        return spoilt

    for broken in (raises, edge(0), edge(1)):
        monkeypatch.setattr(place, "run_chain", broken)
        assert not place.verify_chain(site, torch.device("cpu")).ok


@torch.no_grad()
def test_changes_are_seen(chains_on_the_cpu: list[str]) -> None:
    """Whatever is done to the modules, the next forward is what the layers would give."""
    net = network()
    net(images())

    def reload(net: nn.Module) -> None:
        net.load_state_dict({k: v * 1.01 for k, v in net.state_dict().items()})

    def hook(net: nn.Module) -> None:
        net.layer2[1].conv2.register_forward_hook(lambda m, a, y: y * 2)

    def replace(net: nn.Module) -> None:
        net.layer1[1] = nn.Identity()

    changes: list[Callable[[nn.Module], Any]] = [
        lambda net: net.layer1[0].conv2.weight.mul_(1.5),
        lambda net: net.layer2[0].downsample[1].running_var.add_(1.0),
        lambda net: setattr(net.layer3[2].bn3, "eps", 0.5),
        reload,
        lambda net: setattr(net.layer4[0].relu, "forward", torch.sigmoid),
        lambda net: net.layer3[1].bn2.train(),
        hook,
        replace,
    ]
    for change in changes:
        change(net)
        layers = copy.deepcopy(net)
        for module in layers.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        layers.chains = None
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        ours, theirs = net(images()), layers(images())
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert net.chains._known == {} or chained(net) is None or not chained(net).holds()


@torch.no_grad()
def test_modes_that_chains_leave_to_the_layers(chains_on_the_cpu: list[str]) -> None:
    net = network("resnet18")
    with torch.enable_grad():
        net(images())
    with torch.autocast("cpu", torch.bfloat16):
        net(images())
    net.train()(images())
    net.eval()
    with plan.use(Plan(device_name("cpu"))):
        plan.tune(net, images())
    torch.compile(net, backend="eager")(images())
    assert chains_on_the_cpu == []
    net.double()(images().double())
    assert chains_on_the_cpu == []


@torch.no_grad()
def test_each_power_of_two_of_the_batch_decides_for_itself(chains_on_the_cpu: list[str]) -> None:
    net = network("resnet18")
    for batch in (1, 2, 3, 4):
        net(images(batch))
    assert [key[0] for key in net.chains._known] == [1, 2, 4]


@torch.no_grad()
def test_while_a_graph_is_captured_only_what_is_known_runs(
    chains_on_the_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network("resnet18")
    monkeypatch.setattr(chain_module, "is_capturing", lambda x: True)
    net(images())
    assert chains_on_the_cpu == [] and net.chains._known == {}
    monkeypatch.setattr(chain_module, "is_capturing", lambda x: False)
    net(images())
    chains_on_the_cpu.clear()
    monkeypatch.setattr(chain_module, "is_capturing", lambda x: True)
    net(images())
    assert len(chains_on_the_cpu) == 3


@torch.no_grad()
def test_a_plan_decides_and_tuning_enters_what_won(
    chains_on_the_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network("resnet18")
    into = Plan(device_name("cpu"))
    binding._state.grouping = into
    try:
        net(images())
    finally:
        binding._state.grouping = None
    names = [entry.candidate for entry in into.entries.values()]
    assert names == ["stem_pool"] + ["residual_chain"] * 3
    again = plan.parse(into.to_json(), "cpu")
    assert again.entries == into.entries
    for key in again.entries:
        again.entries[key] = Entry("layers", None, None, None, {})
    monkeypatch.setattr(group, "measure", lambda *a: pytest.fail("the plan decides"))
    with plan.use(again):
        chains_on_the_cpu.clear()
        net(images())
        assert chains_on_the_cpu == []
    with plan.use(into):
        net(images())
        assert len(chains_on_the_cpu) == 3


def test_a_plan_names_what_may_run_at_each_place() -> None:
    for key, name in (("residual_chain|x", "triton"), ("conv_bn_act|x", "layers")):
        broken = Plan(device_name("cpu"))
        broken.entries[key] = Entry(name, None, None, None, {})
        with pytest.raises(resnet_fast.PlanError, match="a candidate among"):
            plan.parse(broken.to_json(), "cpu")


@torch.no_grad()
def test_copies_and_pickles_start_afresh_and_explain_tells(chains_on_the_cpu: list[str]) -> None:
    net = network("resnet18")
    net(images())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.chains._known == {}
        assert torch.equal(other(images()), net(images()))
    text = str(resnet_fast.explain(net))
    assert "layer2.0: conv2, projection and add by residual_chain (OK), error" in text
    assert "(batch 2, 64x8x8)" in text
