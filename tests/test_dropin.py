"""The model stays the model: every habit of a torch user, after the fused path has run once."""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fast import models, plan
from resnet_fast.nn import BasicBlock
from resnet_fast.testing.budget import expect_within_budget, in_formats, within_budget
from resnet_fast.testing.networks import randomize_batchnorm_
from resnet_fast.testing.step import Comparison, step

tv = pytest.importorskip("torchvision")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


LAYERS = (2, 1, 1, 1)


def _net(seed=0):
    torch.manual_seed(seed)
    network = models.ResNet(BasicBlock, LAYERS, num_classes=10)
    return randomize_batchnorm_(network, seed).eval()


def _twin(net):
    """torchvision's network with the weights of ``net``."""
    with torch.device("meta"):
        twin = tv.models.ResNet(tv.models.resnet.BasicBlock, list(LAYERS), num_classes=10)
    state = {k: v.detach().clone() for k, v in net.state_dict().items()}
    twin.load_state_dict(state, assign=True)
    return twin.train(net.training)


@torch.no_grad()
def _assert_right(net, x, actual=None):
    """``net(x)`` against torchvision's network with the weights that ``net`` has now."""
    twin = _twin(net)
    actual = net(x) if actual is None else actual
    frameworks = in_formats(twin, x)
    verdict = within_budget(actual, frameworks, twin.double()(x.double()))
    assert verdict.ok, verdict


@pytest.fixture
def x():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def net(x):
    """A network whose caches are warm."""
    net = _net()
    with torch.no_grad():
        net(x)
        net(x)
    return net


def _load(net):
    net.load_state_dict(_net(1).state_dict())


def _load_assign(net):
    net.load_state_dict(_net(1).state_dict(), assign=True)


def _optimiser_step(net):
    optimiser = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    net.train()
    F.cross_entropy(net(torch.randn(4, 3, 48, 48)), torch.arange(4)).backward()
    optimiser.step()
    net.eval()


def _optimiser_step_in_eval(net):
    optimiser = torch.optim.AdamW(net.parameters(), 0.01)
    with torch.enable_grad():
        F.cross_entropy(net(torch.randn(2, 3, 48, 48)), torch.arange(2)).backward()
    optimiser.step()


def _training_forward(net):
    net.train()
    net(torch.randn(4, 3, 48, 48))
    net.eval()


@torch.no_grad()
def _in_place(net):
    net.layer2[0].conv1.weight.mul_(1.5)
    net.layer1[0].bn2.running_var.add_(0.5)
    net.layer3[0].bn1.bias.add_(0.5)


def _data(net):
    net.layer1[0].conv1.weight.data.mul_(-1.5)
    net.layer1[1].bn1.weight.data.add_(0.5)
    net.layer2[0].downsample[0].weight.data.mul_(2)
    net.layer2[0].downsample[1].running_mean.data.add_(0.5)
    net.layer4[0].bn2.running_var.data.mul_(2)


def _data_swapped(net):
    weight = net.layer1[0].conv1.weight
    weight.data = weight.data * -1.5


@torch.no_grad()
def _slice(net):
    net.conv1.weight[0].zero_()
    net.layer4[0].conv2.weight[5, :, 1, 1] = 3.0


def _numpy(net):
    net.bn1.running_mean.numpy()[:] += 0.25
    net.layer1[0].conv2.weight.detach().numpy()[:] *= 2


def _new_parameter(net):
    old = net.layer1[0].conv1.weight
    net.layer1[0].conv1.weight = nn.Parameter(old.detach() * -1)


def _new_module(net):
    net.layer1[0].conv1 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    net.layer1[1].bn2 = nn.BatchNorm2d(64).eval()


def _averaged(net):
    other = _net(2)
    with torch.no_grad():
        torch._foreach_lerp_(list(net.parameters()), list(other.parameters()), 0.5)


@pytest.mark.parametrize(
    "change",
    [
        _load,
        _load_assign,
        _optimiser_step,
        _optimiser_step_in_eval,
        _training_forward,
        _in_place,
        _data,
        _data_swapped,
        _slice,
        _numpy,
        _new_parameter,
        _new_module,
        _averaged,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_next_forward_sees_the_change(net, x, change):
    with torch.no_grad():
        before = net(x)
    change(net)
    with torch.no_grad():
        assert not torch.equal(net(x), before)
    _assert_right(net, x)


def test_eps_change(net, x):
    # eps is no part of a state dict: the twin gets it too.
    twin = _twin(net)
    for network in (net, twin):
        network.bn1.eps = 0.5
    with torch.no_grad():
        truth = copy.deepcopy(twin).double()(x.double())
        assert within_budget(net(x), twin(x), truth).ok


@pytest.mark.parametrize(
    "target",
    [torch.bfloat16, torch.float64, torch.float16],
    ids=["bf16", "fp64", "fp16"],
)
def test_to_dtype_and_back(net, x, target):
    net.to(target)
    _assert_right(net, x.to(target))
    net.float()
    _assert_right(net, x)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_to_memory_format(net, x, layout):
    net.to(memory_format=layout)
    for given in LAYOUTS:
        _assert_right(net, x.contiguous(memory_format=given))


def test_input_shapes_change(net):
    for shape in ((1, 3, 48, 48), (3, 3, 49, 37), (5, 3, 32, 64), (1, 3, 48, 48)):
        _assert_right(net, torch.randn(shape))


def test_empty_batch(net):
    with torch.no_grad():
        assert net(torch.randn(0, 3, 48, 48)).shape == (0, 10)


def test_non_contiguous_input(net):
    _assert_right(net, torch.randn(2, 3, 48, 96)[..., ::2])


@pytest.mark.parametrize("bad", ["rank", "channels", "dtype"])
def test_bad_input(net, x, bad):
    given = {"rank": x[0, 0], "channels": x[:, :2], "dtype": x.double()}[bad]
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError, TypeError)):
        net(given)
    _assert_right(net, x)


def test_deepcopy(net, x):
    twin = copy.deepcopy(net)
    _assert_right(twin, x)
    _in_place(twin)
    _assert_right(twin, x)
    _assert_right(net, x)


def test_pickle_holds_no_caches(net, x):
    data = pickle.dumps(net)
    parameters = sum(t.nbytes for t in net.state_dict().values())
    assert len(data) < 1.05 * parameters
    _assert_right(pickle.loads(data), x)


def test_torch_save_of_the_model(net, x):
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    _in_place(loaded)
    _assert_right(loaded, x)


def test_torch_save_of_the_state(net, x):
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other = _net(3)
    with torch.no_grad():
        other(x)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(x), net(x))


def test_inference_mode(net, x):
    with torch.inference_mode():
        y = net(x)
    _assert_right(net, x, y.clone())
    _assert_right(net, x)
    # Inference tensors have no version counter.
    with torch.inference_mode():
        built = _net(4)
        built(x)
        built.layer1[0].conv1.weight.mul_(2)
        y = built(x)
        _assert_right(built, x, y)


def test_gradients_after_inference(net, x):
    with torch.inference_mode():
        net(x)
    net.train()
    F.cross_entropy(net(torch.randn(4, 3, 48, 48)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_two_threads(x):
    net = _net()
    inputs = [torch.randn(1 + i % 3, 3, 48, 48) for i in range(12)]
    barrier = threading.Barrier(2)

    def work(part):
        barrier.wait()
        with torch.no_grad():
            return [net(given) for given in part]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, (inputs[:6], inputs[6:])))
    for given, y in zip(inputs, results[0] + results[1], strict=True):
        _assert_right(net, given, y)


def test_threads_and_a_writer(net, x):
    """Readers during an in-place edit may see either weights; afterwards only the new ones."""
    stop = threading.Event()

    def read():
        with torch.no_grad():
            while not stop.is_set():
                assert net(x).isfinite().all()

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for _ in range(5):
            _in_place(net)
        stop.set()
        reader.result()
    _assert_right(net, x)


def _all_hooks(network, calls):
    for name, module in network.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: calls.append(name))


def test_hooks_on_every_module(net, x):
    """Every hook fires, as often and in torchvision's order."""
    twin, ours, theirs = _twin(net), [], []
    names = dict(twin.named_modules())
    _all_hooks(twin, theirs)
    _all_hooks(net, ours)
    with torch.no_grad():
        net(x)
        twin(x)
    assert sorted(n for n in ours if n in names) == sorted(theirs)


@pytest.mark.parametrize(
    "path",
    [
        "conv1",
        "bn1",
        "relu",
        "layer1",
        "layer2.0",
        "layer2.0.conv1",
        "layer2.0.bn2",
        "layer2.0.relu",
        "layer2.0.downsample",
        "layer2.0.downsample.0",
        "layer2.0.downsample.1",
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_hook_changes_the_result(net, x, path, training):
    twin = _twin(net)
    for network in (net.train(training), twin.train(training)):
        network.get_submodule(path).register_forward_hook(lambda m, i, o: o * 1.5)
    with torch.no_grad():
        state = {k: v.clone() for k, v in twin.state_dict().items()}
        framework = twin(x)
        twin.load_state_dict(state)
        truth = twin.double()(x.double())
        assert within_budget(net(x), framework, truth).ok


def test_global_hooks(net, x):
    twin, calls = _twin(net), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: calls.append(type(m)))
    try:
        with torch.no_grad():
            net(x)
            ours = [kind for kind in calls if kind.__module__.startswith("torch.")]
            calls.clear()
            twin(x)
            theirs = [kind for kind in calls if kind.__module__.startswith("torch.")]
    finally:
        handle.remove()
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
        assert ours.count(kind) == theirs.count(kind)


def test_a_hook_removed(net, x):
    handle = net.layer1[0].conv1.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    with torch.no_grad():
        changed = net(x)
    handle.remove()
    with torch.no_grad():
        assert not torch.equal(net(x), changed)
    _assert_right(net, x)


def test_backward_hooks(net):
    seen = []
    for module in (net.layer1[0], net.layer2[0].conv1, net.layer2[0].bn2):
        module.register_full_backward_hook(lambda m, gi, go: seen.append(type(m).__name__))
    net.train()
    F.cross_entropy(net(torch.randn(2, 3, 48, 48)), torch.arange(2)).backward()
    assert sorted(seen) == ["BasicBlock", "BatchNorm2d", "Conv2d"]


def test_replaced_activation(net, x):
    twin = _twin(net)
    for network in (net, twin):
        network.relu = nn.SiLU()
        network.layer2[0].relu = nn.SiLU()
    with torch.no_grad():
        framework = twin(x)
        assert within_budget(net(x), framework, twin.double()(x.double())).ok


def test_pruned_and_parametrised_weights(net, x):
    from torch.nn.utils import parametrize, prune

    class Twice(nn.Module):
        def forward(self, weight):
            return weight * 2

    twin = _twin(net)
    for network in (net, twin):
        prune.l1_unstructured(network.layer1[0].conv1, "weight", 0.5)
        parametrize.register_parametrization(network.layer1[0].conv2, "weight", Twice())
    with torch.no_grad():
        framework = twin(x)
        assert within_budget(net(x), framework, twin.double()(x.double())).ok


def test_sync_batch_norm(net, x):
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    with torch.no_grad():
        _assert_right(_restored(converted), x, converted(x))


def _restored(net):
    other = _net(5)
    other.load_state_dict(net.state_dict())
    return other


def test_autocast(net, x):
    twin = _twin(net)
    with torch.no_grad():
        truth = copy.deepcopy(twin).double()(x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, framework = net(x), twin(x)
        assert ours.dtype == framework.dtype
        assert within_budget(ours, framework, truth).ok
    _assert_right(net, x)


def test_autocast_training(net):
    def autocast_step(network, *given):
        if network.conv1.weight.dtype is torch.float64:
            return step(network, *given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = step(network, *given)
        # What is under test is what the convolutions compute in.
        return {k: v.bfloat16() if v.is_floating_point() else v for k, v in found.items()}

    given, labels = torch.randn(4, 3, 48, 48), torch.arange(4)
    comparison = Comparison(_twin(net.train()), given, labels, autocast_step)
    comparison.expect("autocast", net)
    assert all(p.grad.dtype is torch.float32 for p in net.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_compile_aot_eager(net, x, training):
    compiled = torch.compile(net.train(training), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        _assert_right(net, x, compiled(x))
        _in_place(net)
        _assert_right(net, x, compiled(x))


def test_compile_training_step():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = randomize_batchnorm_(models.CifarResNet(8), 0).train()
    eager = copy.deepcopy(net)
    given, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    ours, theirs = step(compiled, given, labels), step(eager, given, labels)
    for a, (key, b) in zip(ours.values(), theirs.items(), strict=True):
        assert torch.equal(a, b), key


def _cifar8():
    torch.manual_seed(0)
    return models.CifarResNet(8)


def _plain_copy(net):
    from resnet_fast.nn.blocks import unfuse_

    return unfuse_(copy.deepcopy(net))


def test_compile_inductor():
    torch._dynamo.reset()
    net = randomize_batchnorm_(_cifar8(), 0).eval()
    plain = _plain_copy(net)
    given = torch.randn(2, 3, 32, 32)
    targets = []

    def inductor(graph, inputs):
        targets.extend(n.target for n in graph.graph.nodes if n.op == "call_function")
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)

    @torch.no_grad()
    def expect_right():
        truth = copy.deepcopy(plain).double()(given.double())
        expect_within_budget(compiled(given), in_formats(plain, given), truth)

    # Verification is no part of a graph: a site that never ran is compiled as the framework's path.
    with torch.inference_mode():
        net(given)
    chosen = [row["candidate"] for row in plan.model_rows(net) if row["reason"] == "OK"]
    compiled = torch.compile(net, fullgraph=True, backend=inductor)
    expect_right()
    fused = [str(t) for t in targets if str(t).startswith("resnet_fast.")]
    assert len(fused) == len(chosen) == 7
    assert all(name in op for name, op in zip(chosen, fused, strict=True))
    assert not {torch.conv2d, F.conv2d, F.batch_norm}.intersection(targets)
    with torch.no_grad():
        net.layer1[0].conv1.weight.mul_(1.5)
    plain.load_state_dict(net.state_dict())
    expect_right()


def test_export(net, x):
    with torch.no_grad():
        program = torch.export.export(net, (x,))
        _assert_right(net, x, program.module()(x))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        _assert_right(net, x, torch.export.load(buffer).module()(x))


def test_export_with_a_dynamic_batch(net, x):
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
        for n in (1, 2, 5):
            given = torch.randn(n, 3, 48, 48)
            _assert_right(net, given, program.module()(given))


def _ddp_rank(rank, folder):
    """One of two processes: its half of a batch, by both networks."""
    dist = torch.distributed
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    limit = timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)

    def ddp_step(network, *given):
        return step(nn.parallel.DistributedDataParallel(network), *given)

    class Collective(Comparison):
        def truth_on(self, branch):
            # Computed on every rank, whether or not this one has it: the others may wait for it.
            self.branch = None
            return super().truth_on(branch)

    net = _net().train()
    given = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(7))
    half = slice(2 * rank, 2 * rank + 2)
    comparison = Collective(_twin(net), given[half], torch.arange(4)[half], ddp_step)
    comparison.expect(f"rank {rank}", net)
    for key, p in net.named_parameters():
        other = [torch.empty_like(p.grad) for _ in range(2)]
        dist.all_gather(other, p.grad)
        assert torch.equal(*other), key
    torch.optim.SGD(net.parameters(), 0.1).step()
    _assert_right(net.eval(), given)
    dist.destroy_process_group()


def test_ddp(tmp_path):
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    torch.multiprocessing.spawn(_ddp_rank, (str(tmp_path),), nprocs=2)


def _traced_features(network):
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(network, {"layer2": "a", "layer4": "b"})


def _child_features(network):
    from torchvision.models._utils import IntermediateLayerGetter

    return IntermediateLayerGetter(network, {"layer2": "a", "layer4": "b"})


def _headless(network):
    body = nn.Sequential(*list(network.children())[:-1])
    return lambda x: {"pooled": body(x)}


@pytest.mark.parametrize("extract", [_traced_features, _child_features, _headless])
def test_feature_extractors(net, x, extract):
    twin = _twin(net)
    with torch.no_grad():
        ours, theirs = extract(net)(x), extract(twin)(x)
        truth = extract(twin.double())(x.double())
        for key, value in truth.items():
            assert within_budget(ours[key], theirs[key], value).ok, key


def test_symbolic_trace(net, x):
    graph = torch.fx.symbolic_trace(net)
    assert {type(m) for m in graph.modules()} >= {nn.Conv2d, nn.BatchNorm2d}
    with torch.no_grad():
        _assert_right(net, x, graph(x))


def test_checkpointed_layers(net):
    from torch.utils.checkpoint import checkpoint

    plain = copy.deepcopy(net).train()
    net.train()
    given, labels = torch.randn(4, 3, 48, 48), torch.arange(4)
    F.cross_entropy(plain(given), labels).backward()
    layer = net.layer2.forward
    net.layer2.forward = lambda x: checkpoint(layer, x, use_reentrant=False)
    F.cross_entropy(net(given), labels).backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_ema_model(net, x):
    from torch.optim.swa_utils import AveragedModel

    averaged = AveragedModel(net)
    averaged.update_parameters(_net(1))
    averaged.update_parameters(_net(2))
    _assert_right(averaged.module.eval(), x)
