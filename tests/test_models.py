import copy
import gc
import inspect
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast import models
from resnet_fast.errors import ArgumentError
from resnet_fast.nn import FusedSite
from resnet_fast.testing.branch import Branch
from resnet_fast.testing.budget import in_formats, within_budget
from resnet_fast.testing.networks import randomize_batchnorm_
from resnet_fast.testing.step import Comparison, step

tv = pytest.importorskip("torchvision")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def _torchvision(name, **kwargs):
    return getattr(tv.models, name)(**kwargs)


def _twin(model, name, **kwargs):
    """torchvision's network with the weights of ``model``; not initialised, to save the time."""
    with torch.device("meta"):
        twin = _torchvision(name, **kwargs)
    twin.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return twin.train(model.training)


def _pair(name, **kwargs):
    torch.manual_seed(1)
    model = randomize_batchnorm_(models.build(name, **kwargs), seed=2)
    return model, _twin(model, name, **kwargs)


def _assert_within(what, actual, frameworks, truth):
    verdict = within_budget(actual, frameworks, truth)
    assert verdict.ok, f"{what}: {verdict}"


@pytest.fixture(autouse=True)
def _release_memory():
    yield
    gc.collect()


@pytest.mark.parametrize("name", models.TORCHVISION)
def test_same_keys_initialisation_and_round_trip(name):
    torch.manual_seed(3)
    ours = models.build(name, num_classes=7)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    theirs = _torchvision(name, num_classes=7)
    assert torch.equal(after, torch.get_rng_state())
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for key in mine:
        assert torch.equal(mine[key], other[key]), key
    assert [k for k, _ in ours.named_parameters()] == [k for k, _ in theirs.named_parameters()]
    assert [k for k, _ in ours.named_children()] == [k for k, _ in theirs.named_children()]
    randomize_batchnorm_(ours, 1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    expected = {k: v.clone() for k, v in ours.state_dict().items()}
    with torch.no_grad():
        for value in ours.state_dict().values():
            value.zero_()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert all(torch.equal(v, expected[k]) for k, v in ours.state_dict().items())


@pytest.fixture(scope="module", params=models.TORCHVISION)
def pair(request):
    return request.param, *_pair(request.param, num_classes=10)


def test_eval_matches_torchvision(pair):
    name, ours, theirs = pair
    # Copies: bf16 must not round the weights that training starts from.
    ours, theirs = copy.deepcopy(ours).eval(), copy.deepcopy(theirs).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            ours.to(dtype)
            theirs.to(dtype)
            given = x.to(dtype)
            frameworks = in_formats(theirs, given)
            # The truth rounds weights and input as the network under test does.
            truth = theirs.double()(given.double())
            theirs.to(dtype)
            for layout in LAYOUTS:
                actual = ours(given.contiguous(memory_format=layout))
                assert actual.dtype == dtype
                _assert_within(f"{name} {dtype} {layout}", actual, frameworks, truth)


def _compare_steps(name, ours, theirs, x, y):
    comparison = Comparison(theirs, x, y)
    comparison.expect(name, ours)
    ours.load_state_dict(comparison.state)
    # In fp64 there is no rounding to hide behind: a wrong formula shows at any depth.
    comparison.expect(name, ours.double())
    ours.float()


def test_training_step_matches_torchvision(pair):
    name, ours, theirs = pair
    x, y = torch.randn(4, 3, 48, 48), torch.arange(4)
    _compare_steps(name, ours.train(), theirs.train(), x, y)


@pytest.fixture(scope="module")
def deep():
    """A network of 110 layers, and what its step is held against."""
    torch.manual_seed(0)
    net = randomize_batchnorm_(models.build("cifar_resnet110"), 3).train()
    plain = models.plain_reference("cifar_resnet110").train()
    plain.load_state_dict(net.state_dict())
    return net, Comparison(plain, torch.randn(2, 3, 32, 32), torch.arange(2))


@pytest.mark.parametrize(
    "key", ["input", "layer1.0.bn1.bias", "layer2.9.conv1.weight", "fc.weight"]
)
def test_a_gradient_that_is_off_by_a_ten_thousandth_is_seen(deep, key):
    net, comparison = deep
    net.float().load_state_dict(comparison.state)
    with Branch(net) as branch:
        actual = step(net, *comparison.given)
    comparison.expect_values("right", actual, branch)
    actual[f"{key}.grad"] *= 1 + 1e-4
    with pytest.raises(AssertionError, match=f"{key}.grad"):
        comparison.expect_values("wrong", actual, branch)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-4), (torch.float64, 1.0001e-5)])
def test_a_wrong_eps_is_seen(deep, dtype, eps):
    net, comparison = deep
    wrong = copy.deepcopy(net).float()
    wrong.load_state_dict(comparison.state)
    wrong.to(dtype).layer2[9].bn1.eps = eps
    with pytest.raises(AssertionError, match="beyond"):
        comparison.expect("wrong", wrong)


def test_a_branch_is_more_than_a_rounding():
    """Imposing a branch imposes its gradients: one flipped unit shows in fp64."""
    torch.manual_seed(0)
    net = models.plain_reference("cifar_resnet20").double().train()
    x, y = torch.randn(2, 3, 32, 32), torch.arange(2)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with Branch(net) as branch:
        free = step(net, x, y)
    flipped = copy.copy(branch)
    flipped.choices = [c.clone() for c in branch.choices]
    flipped.choices[9][0, 0, 0, 0] ^= True
    assert branch != flipped
    for taken, same in ((branch, True), (flipped, False)):
        net.load_state_dict(state)
        with taken.imposed():
            imposed = step(net, x, y)
        assert torch.equal(imposed["conv1.weight.grad"], free["conv1.weight.grad"]) == same


@pytest.mark.parametrize(
    "norm",
    [
        partial(nn.BatchNorm2d, momentum=None),
        partial(nn.BatchNorm2d, track_running_stats=False),
        partial(nn.BatchNorm2d, affine=False),
        partial(nn.BatchNorm2d, eps=0.1, momentum=0.5),
        partial(nn.GroupNorm, 8),
    ],
    ids=["cumulative", "no-statistics", "no-affine", "eps", "group-norm"],
)
@pytest.mark.parametrize("training", [False, True])
def test_norm_layers(norm, training):
    if isinstance(norm, partial) and norm.keywords.get("affine") is False:
        # torchvision initialises a weight that is not there.
        with pytest.raises((AttributeError, ValueError)):
            _torchvision("resnet18", norm_layer=norm)
        models.resnet18(norm_layer=norm)
        return
    ours, theirs = _pair("resnet18", num_classes=10, norm_layer=norm)
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    _compare_steps("resnet18", ours.train(training), theirs.train(training), x, y)


def test_frozen_batch_norm():
    norm = tv.ops.FrozenBatchNorm2d
    ours, theirs = _pair("resnet18", num_classes=10, norm_layer=norm)
    x, y = torch.randn(2, 3, 64, 64), torch.arange(2)
    _compare_steps("frozen", ours.train(), theirs.train(), x, y)
    _compare_steps("frozen", ours.eval(), theirs.float().eval(), x, y)


def test_fine_tuning_with_frozen_statistics():
    ours, theirs = _pair("resnet18", num_classes=10)
    for network in (ours, theirs):
        network.train()
        for m in network.layer1.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
    x, y = torch.randn(4, 3, 64, 64), torch.arange(4)
    _compare_steps("fine-tuning", ours, theirs, x, y)


def test_gradients_in_eval():
    ours, theirs = _pair("resnet18", num_classes=10)
    x, y = torch.randn(2, 3, 64, 64), torch.arange(2)
    _compare_steps("eval", ours.eval(), theirs.eval(), x, y)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"replace_stride_with_dilation": [False, True, True]},
        {"replace_stride_with_dilation": [True, True, True]},
        {"zero_init_residual": True},
        {"groups": 2, "width_per_group": 32},
    ],
    ids=["dilated", "all-dilated", "zero-init", "groups"],
)
def test_keyword_arguments(kwargs):
    torch.manual_seed(5)
    ours = models.resnet50(num_classes=10, **kwargs).eval()
    torch.manual_seed(5)
    theirs = _torchvision("resnet50", num_classes=10, **kwargs).eval()
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    randomize_batchnorm_(ours, 1)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        frameworks = in_formats(theirs, x)
        _assert_within("resnet50", ours(x), frameworks, theirs.double()(x.double()))


@pytest.mark.parametrize("name", models.TORCHVISION)
def test_signature(name):
    def shape(function):
        return [(p.name, p.kind, p.default) for p in function.parameters.values()]

    builder = getattr(tv.models, name)
    while hasattr(builder, "__wrapped__"):
        builder = builder.__wrapped__
    ours = inspect.signature(getattr(models, name))
    assert shape(ours) == shape(inspect.signature(builder))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: models.build("resnet51"), "name"),
        (lambda: models.plain_reference("resnet51"), "name"),
        (lambda: models.input_shape("resnet51"), "name"),
        (lambda: models.resnet18(groups=2), "groups"),
        (lambda: models.resnet18(width_per_group=128), "width_per_group"),
        (lambda: models.resnext50_32x4d(groups=16), "groups"),
        (lambda: models.resnet18(replace_stride_with_dilation=[True, True, True]), "dilation"),
        (
            lambda: models.resnet50(replace_stride_with_dilation=[True]),
            "replace_stride_with_dilation",
        ),
        (lambda: models.resnet18(num_classes=-1), "num_classes"),
        (lambda: models.CifarResNet(21), "depth"),
        (lambda: models.CifarResNet(2), "depth"),
        (lambda: models.CifarResNet(20, shortcut="D"), "shortcut"),
        (lambda: models.CifarResNet(20, num_classes=0), "num_classes"),
    ],
)
def test_bad_arguments(call, argument):
    with pytest.raises(ArgumentError, match=f"argument '{argument}'"):
        call()


def test_unknown_name_suggests():
    with pytest.raises(ArgumentError, match="resnet50"):
        models.build("resnet5O")


def test_cifar_layers_and_parameters():
    # He et al. 2015, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M, 19.4M parameters.
    millions = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}
    for depth, expected in millions.items():
        with torch.device("meta"):
            net = models.build(f"cifar_resnet{depth}")
        weights = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert len(weights) == depth
        count = sum(p.numel() for p in net.parameters()) / 1e6
        assert abs(count - expected) < 0.05 * expected


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_cifar_shortcuts(shortcut):
    torch.manual_seed(0)
    net = models.cifar_resnet20(shortcut=shortcut)
    projections = [k for k, _ in net.named_parameters() if "downsample.0" in k]
    assert len(projections) == {"A": 0, "B": 2, "C": 9}[shortcut]
    _assert_fused_equals_plain(net, "cifar_resnet20", torch.randn(2, 3, 32, 32), shortcut=shortcut)


@pytest.mark.parametrize("name", ["plain20", "plain18", "cifar_resnet110"])
def test_other_networks(name):
    torch.manual_seed(0)
    net = models.build(name)
    if name.startswith("plain"):
        assert not [k for k in net.state_dict() if "downsample" in k]
    _assert_fused_equals_plain(net, name, torch.randn(models.input_shape(name, 2, 32)))


def test_one_input_channel():
    net = models.cifar_resnet20(in_channels=1)
    x = torch.randn(3, 1, 32, 32)
    _assert_fused_equals_plain(net, "cifar_resnet20", x, in_channels=1)


def _assert_fused_equals_plain(net, name, x, **kwargs):
    randomize_batchnorm_(net, 3).eval()
    plain = models.plain_reference(name, **kwargs).eval()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        frameworks = in_formats(plain, x)
        _assert_within(name, net(x), frameworks, plain.double()(x.double()))
    y = torch.arange(x.shape[0])
    _compare_steps(name, net.train(), plain.float().train(), x, y)


def test_option_a_shortcut():
    x = torch.randn(2, 16, 8, 8)
    y = models.CifarResNet(8).layer2[0].downsample(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert y.shape == (2, 32, 4, 4) and not y[:, 16:].any()


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20", "plain20"])
def test_plain_reference_has_no_site(name):
    net = models.plain_reference(name)
    assert not [m for m in net.modules() if isinstance(m, FusedSite)]
    assert list(net.state_dict()) == list(models.build(name).state_dict())


def test_plain_reference_is_torchvision():
    theirs = _torchvision("resnet50").eval()
    plain = models.plain_reference("resnet50").eval()
    plain.load_state_dict(randomize_batchnorm_(theirs, 1).state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain(x), theirs(x))


def test_activations_stay_finite_in_half():
    net = randomize_batchnorm_(models.resnet152(), 0).eval()
    with torch.no_grad():
        y = net(torch.randn(1, 3, 64, 64))
    assert y.isfinite().all() and 1e-3 < y.abs().max() < 1e3


def test_randomised_statistics_are_reproducible():
    first, second = (randomize_batchnorm_(models.CifarResNet(8), 4) for _ in range(2))
    for (key, a), b in zip(first.named_buffers(), second.buffers(), strict=True):
        assert torch.equal(a, b), key
    assert not torch.equal(first.bn1.running_var, torch.ones(16))


def test_import_needs_no_torchvision():
    code = "import resnet_fast.models, sys; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet50", {}), ("plain18", {}), ("cifar_resnet20", {"shortcut": "A"})],
)
def test_explain_has_one_row_a_convolution(name, options, sites_taken_as_verified):
    model = models.build(name, **options).eval()
    with torch.inference_mode():
        model(torch.randn(1, 3, 32, 32))
    rows = resnet_fast.explain(model).rows
    convolutions = [path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    # A projection is called by its place in the block.
    expected = [path.replace("downsample.0", "downsample") for path in convolutions]
    assert sorted(row["name"] for row in rows) == sorted(expected)
    assert {row["reason"] for row in rows} == {"OK"}


def _hook(module):
    module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        (lambda net: _hook(net.layer1[0].relu), "layer1.0.conv1", "HOOKED"),
        (lambda net: setattr(net.layer1[0], "relu", nn.SiLU()), "layer1.0.conv2", "REPLACED"),
        (lambda net: _hook(net.layer2[0].downsample), "layer2.0.downsample", "HOOKED"),
        (lambda net: net.layer2[0].downsample.append(nn.ReLU()), "layer2.0.downsample", "REPLACED"),
        (lambda net: _hook(net.relu), "conv1", "HOOKED"),
    ],
)
def test_explain_tells_of_modules_that_run_one_by_one(change, path, reason):
    model = models.resnet18().eval()
    change(model)
    with torch.inference_mode():
        model(torch.randn(1, 3, 32, 32))
    (row,) = [row for row in resnet_fast.explain(model).rows if row["name"] == path]
    assert row["reason"] == reason and not row["fused"]


def test_explain_tells_of_training():
    model = models.cifar_resnet20().train()
    model(torch.randn(2, 3, 8, 8))
    assert {row["reason"] for row in resnet_fast.explain(model)} == {"TRAINING"}


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(()), r"shape \[N, 3, H, W\], got \[\]"),
        (torch.zeros(3, 32, 32), r"shape \[N, 3, H, W\], got \[3, 32, 32\]"),
        (torch.zeros(2, 4, 32, 32), r"got \[2, 4, 32, 32\]"),
        (torch.zeros(2, 3, 32, 32).double(), "torch.float32, as the network's parameters"),
        (torch.zeros(2, 3, 32, 32, device="meta"), "a tensor on cpu"),
        ([1], "a tensor of shape"),
    ],
    ids=lambda v: "" if isinstance(v, str) else str(tuple(getattr(v, "shape", "list"))),
)
def test_bad_images(name, training, x, expected):
    with pytest.raises(ArgumentError, match=expected) as caught:
        models.build(name).train(training)(x)
    assert caught.value.argument == "x"


def test_pretrained_is_taken_as_torchvision_takes_it(monkeypatch):
    asked = []
    monkeypatch.setattr(models.resnet._weights, "resolve", lambda *a: asked.append(a))
    for pretrained, weights in ((True, "IMAGENET1K_V1"), (False, None)):
        with pytest.warns(FutureWarning, match="weights="):
            models.resnet18(pretrained=pretrained)
        assert asked.pop() == ("resnet18", weights)
    with pytest.raises(ArgumentError, match="pretrained"), pytest.warns(FutureWarning):
        models.resnet18(pretrained="yes")
