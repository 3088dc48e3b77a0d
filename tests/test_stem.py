"""The stem as one kernel: the layers' numbers, verified, measured, and dropped on any change.

A CPU runs the op as its layers, so what decides about it is tested here without a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import models, ops
from resnet_fast.nn import chain as chain_module
from resnet_fast.nn import stem as stem_module
from resnet_fast.ops import _work, stem_pool_cuda
from resnet_fast.plan import Plan, binding, cache, group, parse, use
from resnet_fast.plan import stem as place
from resnet_fast.testing.budget import expect_within_budget, in_formats
from resnet_fast.testing.networks import randomize_batchnorm_


@pytest.fixture(autouse=True)
def stems_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[Tensor]]:
    """Lets the stem's kernel run here, win every measurement, and note what it is given."""
    calls: list[Tensor] = []
    prepare = place.prepare_stem

    def noted(x: Tensor, *rest: Any) -> Any:
        call = prepare(x, *rest)

        def run(x: Tensor) -> Tensor:
            calls.append(x)
            return call(x)

        return run

    monkeypatch.setenv("RESNET_FAST_CACHE_DIR", str(tmp_path))
    cache.forget()
    monkeypatch.setattr(chain_module, "runs_on", lambda x: True)
    monkeypatch.setattr(stem_module, "prepare_stem", noted)
    monkeypatch.setattr(chain_module.Chains, "forward", lambda self, stages, paths, x: x.flatten(1))
    monkeypatch.setattr(
        group, "measure", lambda runs, device: {k: float(k == "layers") for k in runs}
    )
    yield calls
    cache.forget()


def network() -> nn.Module:
    torch.manual_seed(0)
    net = randomize_batchnorm_(models.resnet18()).eval()
    net.avgpool, net.fc = nn.Identity(), nn.Identity()
    return net


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 33, 30, generator=torch.Generator().manual_seed(seed))


def layers(net: Any, x: Tensor) -> Tensor:
    return net.maxpool(net.relu(net.bn1(net.conv1(x)))).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_stem_matches_fp64(stems_on_the_cpu: list[Tensor], dtype: torch.dtype) -> None:
    net, x = network().to(dtype), images().to(dtype)
    plain = copy.deepcopy(net)
    frameworks = in_formats(lambda x: layers(plain, x), x)
    truth = layers(plain.double(), x.double())
    for _ in range(2):
        y = net(x).view(2, 64, 9, 8)
        expect_within_budget(y.flatten(1), frameworks, truth)
    assert len(stems_on_the_cpu) == 2, "once a forward: the first decides on figures of its own"
    assert "stem: conv1 and maxpool by stem_pool (OK), error" in str(resnet_fast.explain(net))


@torch.no_grad()
def test_changes_are_seen(stems_on_the_cpu: list[Tensor]) -> None:
    net = network()
    net(images())
    changes: list[Callable[[Any], Any]] = [
        lambda net: net.conv1.weight.mul_(1.5),
        lambda net: net.bn1.bias.add_(1.0),
        lambda net: setattr(net.bn1, "eps", 0.5),
        lambda net: net.load_state_dict({k: v * 1.01 for k, v in net.state_dict().items()}),
    ]
    for change in changes:
        change(net)
        stems_on_the_cpu.clear()
        ours, theirs = net(images(1)), layers(net, images(1))
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert stems_on_the_cpu, "decided afresh"


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "maxpool", nn.MaxPool2d(2, 2)),
        lambda net: setattr(net.maxpool, "ceil_mode", True),
        lambda net: setattr(net.maxpool, "padding", 0),
        lambda net: setattr(net, "relu", nn.SiLU()),
        lambda net: setattr(net, "conv1", nn.Conv2d(3, 64, 7, 2, 2, bias=False)),
        lambda net: net.maxpool.register_forward_hook(lambda m, a, y: y * 2),
        lambda net: net.conv1.register_forward_hook(lambda m, a, y: y * 2),
        lambda net: net.bn1.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    ],
)
@torch.no_grad()
def test_another_stem_runs_by_its_layers(
    stems_on_the_cpu: list[Tensor], change: Callable[[Any], Any]
) -> None:
    net = network()
    net(images())
    change(net)
    stems_on_the_cpu.clear()
    ours, theirs = net(images(1)), layers(net, images(1))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert stems_on_the_cpu == []


@pytest.mark.parametrize("why", ["SLOWER", "MISMATCH"])
@torch.no_grad()
def test_layers_stay_where_the_kernel_is_slower_or_wrong(
    monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "SLOWER":
        measured = {"stem_pool": 2.0, "layers": 1.0}
        monkeypatch.setattr(group, "measure", lambda runs, device: measured)
    else:
        run = place.run_stem
        monkeypatch.setattr(place, "run_stem", lambda *a: run(*a) * 1.001)
    net = network()
    assert torch.equal(net(images()), net(images()))
    assert f"layers ({why})" in str(resnet_fast.explain(net))


@torch.no_grad()
def test_what_is_measured_are_both_ways_to_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(runs: Any, device: torch.device) -> dict[str, float]:
        one, other = (run() for run in runs.values())
        assert set(runs) == {"stem_pool", "layers"}
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
        return dict.fromkeys(runs, 1.0)

    monkeypatch.setattr(group, "measure", measure)
    network()(images())


def test_the_op_runs_where_its_kernel_does() -> None:
    x = torch.empty(1, 3, 8, 8)
    assert ops.module("stem_pool").runs(x) and "stem_pool" in place.kernels(x)
    assert place.kernels(x.double()) == ()


@pytest.fixture
def native_stem(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The CUDA library's kernel as the layers, noting its calls."""
    called: list[str] = []
    module = ops.module("stem_pool")
    library = torch.library.Library("resnet_fast", "IMPL")

    def run(x: Tensor, *rest: Any) -> Tensor:
        called.append(str(x.dtype))
        return module._layers(x, *rest)

    library.impl("_stem_pool_cuda", run, "CPU")
    monkeypatch.setattr(stem_pool_cuda, "AVAILABLE", True)
    yield called
    library._destroy()


def arguments(dtype: torch.dtype, image: torch.dtype) -> list[Any]:
    x = (torch.rand(1, 3, 9, 9) * 255).to(image)
    vectors = [torch.rand(5), torch.rand(5), torch.rand(3) / 99, torch.rand(3)]
    return [x, torch.randn(5, 3, 7, 7).to(dtype), *vectors, "silu"]


def on_cuda(given: list[Any]) -> Tensor:
    """The registration for CUDA, on CPU tensors."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return torch.ops.resnet_fast.stem_pool.default.redispatch(keys, *given)


@pytest.mark.parametrize("image", [torch.uint8, torch.float16, torch.float32], ids=str)
@torch.no_grad()
def test_without_triton_the_cuda_library_runs(
    native_stem: list[str], monkeypatch: pytest.MonkeyPatch, image: torch.dtype
) -> None:
    module = ops.module("stem_pool")
    monkeypatch.setattr(module._several, "AVAILABLE", False)
    given = arguments(torch.float16, image)
    assert torch.equal(on_cuda(given), module._layers(*given))
    assert native_stem == ["torch.uint8" if image is torch.uint8 else "torch.float16"]
    assert place.kernels(torch.empty(1, 3, 8, 8)) == ("stem_pool_cuda",)


@torch.no_grad()
def test_what_the_cuda_library_does_not_run_are_the_layers(
    native_stem: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ops.module("stem_pool")
    monkeypatch.setattr(module._several, "AVAILABLE", False)
    wide = [v.double() if isinstance(v, Tensor) else v for v in arguments(torch.half, torch.half)]
    narrow = arguments(torch.float32, torch.float32)
    monkeypatch.setattr(stem_pool_cuda, "tf32_allowed", lambda: False)
    for given in (wide, narrow):
        assert torch.equal(on_cuda(given), module._layers(*given))
    assert native_stem == [] and place.kernels(torch.empty(1, 3, 8, 8)) == ()


def times(**known: float) -> Callable[..., dict[str, float]]:
    return lambda runs, device: {name: known[name] for name in runs}


@torch.no_grad()
def test_kernels_are_measured_against_each_other(
    native_stem: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slower = {"stem_pool": 2.0, "stem_pool_cuda": 3.0, "layers": 4.0}
    for winner in slower:
        monkeypatch.setattr(group, "measure", times(**{**slower, winner: 1.0}))
        net = network()
        ours, theirs = net(images()), layers(net, images())
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        told = str(resnet_fast.explain(net))
        reason = "SLOWER" if winner == "layers" else "OK"
        assert f"by {winner} ({reason})" in told and f"{winner} 1 us" in told
        native_stem.clear()
        net(images())
        assert len(native_stem) == (winner == "stem_pool_cuda")


@torch.no_grad()
def test_a_kernel_that_is_wrong_is_out_of_the_running(
    native_stem: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place.run_stem
    for wrong, other in (("stem_pool_cuda", "stem_pool"), ("stem_pool", "stem_pool_cuda")):
        cache.forget()
        monkeypatch.setenv("RESNET_FAST_CACHE_DIR", f"{cache.path()}.{wrong}")

        def mistaken(x: Tensor, held: Any, act: str, kernel: str, wrong: str = wrong) -> Tensor:
            return run(x, held, act, kernel) * (1.001 if kernel == wrong else 1)

        monkeypatch.setattr(place, "run_stem", mistaken)
        monkeypatch.setattr(group, "measure", times(**{wrong: 1.0, other: 2.0, "layers": 3.0}))
        net = network()
        net(images())
        told = str(resnet_fast.explain(net))
        assert f"by {other} (OK)" in told and f"{wrong} MISMATCH: error" in told


@torch.no_grad()
def test_a_plan_names_the_kernel(native_stem: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "measure", times(stem_pool=2.0, stem_pool_cuda=1.0, layers=3.0))
    net, plan = network(), Plan("cpu")
    monkeypatch.setattr(binding._state, "grouping", plan, raising=False)
    net(images())
    monkeypatch.setattr(binding._state, "grouping", None)
    plan = parse(plan.to_json())
    assert [entry.candidate for entry in plan.entries.values()] == ["stem_pool_cuda"]

    def unmeasured(runs: Any, device: torch.device) -> dict[str, float]:
        raise AssertionError("measured in spite of the plan")

    monkeypatch.setattr(group, "measure", unmeasured)
    with use(plan):
        native_stem.clear()
        net(images())
        net(images())
        assert len(native_stem) == 2
        assert "by stem_pool_cuda (OK)" in str(resnet_fast.explain(net))


def test_the_account_knows_the_kernel() -> None:
    given = [v.to("meta") if isinstance(v, Tensor) else v for v in arguments(*[torch.half] * 2)]
    work = _work.of("_stem_pool_cuda")
    assert work is not None and work(*given) == ops.module("stem_pool").work(*given)
    assert torch.ops.resnet_fast._stem_pool_cuda(*given).shape == (1, 5, 3, 3)
