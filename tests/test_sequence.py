"""A network's layers as one native call: the same bits, and never after anything has changed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fast
from resnet_fast import _library, models, plan
from resnet_fast.nn.blocks import Bottleneck
from resnet_fast.nn.recorder import KINDS
from resnet_fast.nn.sequence import Sequenced, plain
from resnet_fast.ops import _checks, _pack
from resnet_fast.testing.budget import expect_within_budget
from resnet_fast.testing.networks import randomize_batchnorm_

pytestmark = pytest.mark.skipif(
    not _checks.has_op("_run_sequence"), reason="the CPU op library is not loaded"
)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def network(name: str = "resnet18", seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    kwargs = {"num_classes": 10} | kwargs
    return randomize_batchnorm_(getattr(models, name)(**kwargs), seed).eval()


def images(batch: int = 2, size: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def by_layer(net: Any, x: Tensor) -> Tensor:
    return net._head(net._trunk(x))


def ready(net: Any, x: Tensor) -> Any:
    """The sequence of ``net`` for ``x``, made by running it as often as that takes."""
    for _ in range(3):
        net(x)
    found = [sequence for _, sequence in net.sequences]
    assert found, "no sequence was made"
    return found[-1]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "plain18"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_bits_as_layer_by_layer(name: str, batch: int) -> None:
    net, x = network(name), images(batch)
    first = net(x)
    assert ready(net, x).whole
    assert torch.equal(net(x), by_layer(net, x))
    assert torch.equal(net(x), first)
    assert torch.equal(net(x.contiguous(memory_format=torch.channels_last)), first)


def test_against_fp64() -> None:
    net, x = network("resnet50"), images(2)
    ready(net, x)
    reference = resnet_fast.nn.unfuse_(copy.deepcopy(net))
    expect_within_budget(net(x), reference(x), reference.double()(x.double()))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    net, x = network(), images()
    expected = by_layer(net, x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ready(net, x)
        for _ in range(5):
            assert torch.equal(net(x), expected)
    finally:
        torch.set_num_threads(before)


def test_what_was_in_the_memory_does_not_show() -> None:
    """The first run leaves NaN in every activation that the second one writes over."""
    net, x = network("resnet50"), images()
    ready(net, x)
    expected = by_layer(net, x)
    assert net(torch.full_like(x, torch.nan)).isnan().all()
    assert torch.equal(net(x), expected)


def test_two_threads_at_once() -> None:
    net = network()
    inputs = [images(seed=seed) for seed in (1, 2)]
    expected = [by_layer(net, x) for x in inputs]
    ready(net, inputs[0])
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(net(inputs[index]), expected[index]):
                    wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def _write_in_place(net: Any) -> None:
    net.layer2[0].conv1.weight.mul_(2)


def _write_through_data(net: Any) -> None:
    net.layer2[0].conv1.weight.data.mul_(2)


def _swap_data(net: Any) -> None:
    net.layer3[0].conv2.weight.data = net.layer3[0].conv2.weight.data * 2


def _load(net: Any) -> None:
    net.load_state_dict(network(seed=5).state_dict())


def _assign_parameter(net: Any) -> None:
    net.layer1[1].conv2.weight = nn.Parameter(net.layer1[1].conv2.weight * 2)


def _write_statistics(net: Any) -> None:
    net.layer4[1].bn2.running_mean.add_(1)


def _write_head(net: Any) -> None:
    net.fc.weight.data.mul_(2)


def _replace_head_bias(net: Any) -> None:
    net.fc.bias = nn.Parameter(net.fc.bias + 1)


def _change_eps(net: Any) -> None:
    net.layer1[0].bn1.eps = 0.5


def _change_stride(net: Any) -> None:
    net.layer4[0].conv1.stride = (1, 1)
    net.layer4[0].downsample[0].stride = (1, 1)


def _replace_pool(net: Any) -> None:
    net.maxpool = nn.Identity()


def _change_pool(net: Any) -> None:
    net.maxpool.kernel_size = 5
    net.maxpool.padding = 2


def _replace_block(net: Any) -> None:
    net.layer1[1] = nn.Identity()


def _append_block(net: Any) -> None:
    net.layer1.append(copy.deepcopy(net.layer1[1]))


def _replace_activation(net: Any) -> None:
    net.layer2[1].relu = nn.SiLU()


def _patch_forward(net: Any) -> None:
    block = net.layer3[1]
    original = block.forward
    block.forward = lambda x: original(x) * 2


def _hook(net: Any) -> None:
    net.layer2.register_forward_hook(lambda module, args, y: y * 2)


def _hook_head(net: Any) -> None:
    net.fc.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _train_one_norm(net: Any) -> None:
    net.layer1[0].bn1.train()


def _replace_head(net: Any) -> None:
    net.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 4)).eval()


EDITS: tuple[Callable[[Any], None], ...] = (
    _write_in_place,
    _write_through_data,
    _swap_data,
    _load,
    _assign_parameter,
    _write_statistics,
    _write_head,
    _replace_head_bias,
    _change_eps,
    _change_stride,
    _replace_pool,
    _change_pool,
    _replace_block,
    _append_block,
    _replace_activation,
    _patch_forward,
    _hook,
    _hook_head,
    _train_one_norm,
    _replace_head,
)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__.strip("_"))
def test_edits_show_in_the_next_forward(edit: Callable[[Any], None]) -> None:
    net, x = network(), images()
    ready(net, x)
    before = net(x)
    edited = network()
    edit(edited)
    edit(net)
    statistics = [copy.deepcopy(m.state_dict()) for m in (net, edited)]
    y = net(x)
    assert not torch.equal(y, before) if y.shape == before.shape else True
    for module, state in zip((net, edited), statistics, strict=True):
        module.load_state_dict(state)  # a norm in training moves its statistics
    if edit is not _replace_head:  # its linear layer is drawn anew
        assert torch.equal(y, by_layer(edited, x))
    for _ in range(4):
        net.load_state_dict(statistics[0])
        assert torch.equal(net(x), y)


def test_sequences_of_other_sizes_do_not_keep_old_weights() -> None:
    net = network()
    for size in (64, 96):
        ready(net, images(size=size))
    assert len(list(net.sequences)) == 2
    net.conv1.weight.mul_(2)
    net(images(size=64))
    assert not net.sequences._known
    for size in (64, 96):
        assert torch.equal(net(images(size=size)), by_layer(net, images(size=size)))


def test_a_hook_that_has_gone_leaves_nothing() -> None:
    net, x = network(), images()
    sequence = ready(net, x)
    expected = net(x)
    net.fc.register_forward_hook(lambda module, args, y: y * 2).remove()
    assert torch.equal(net(x), expected) and ready(net, x) is sequence
    handle = net.fc.register_forward_hook(lambda module, args, y: y * 2)
    assert not torch.equal(net(x), expected)
    handle.remove()
    assert torch.equal(net(x), expected)


def test_a_lazily_negated_input() -> None:
    net, x = network(), images()
    ready(net, x)
    assert torch.equal(net(torch._neg_view(x)), net(-x))


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize("channels", [1, 3])
def test_cifar_networks(shortcut: str, channels: int) -> None:
    torch.manual_seed(0)
    made = models.CifarResNet(20, shortcut=shortcut, in_channels=channels)
    net: Any = randomize_batchnorm_(made).eval()
    x = torch.randn(3, channels, 28, 28)
    first = net(x)
    ready(net, x)
    assert torch.equal(net(x), first)
    assert torch.equal(net(x), by_layer(net, x))


def test_a_shortcut_of_zeros_is_watched() -> None:
    torch.manual_seed(0)
    net: Any = randomize_batchnorm_(models.CifarResNet(20)).eval()
    x = torch.randn(2, 3, 32, 32)
    ready(net, x)
    expected = net(x)
    net.layer2[0].downsample.forward = lambda x: torch.zeros(2, 32, 16, 16)
    assert not torch.equal(net(x), expected)


def test_global_hooks_run() -> None:
    net, x = network(), images()
    ready(net, x)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: seen.append(type(module))
    )
    try:
        net(x)
    finally:
        handle.remove()
    assert nn.Linear in seen


def test_a_plan_and_refresh_end_it() -> None:
    net, x = network(), images()
    sequence = ready(net, x)
    with plan.use(plan.Plan("cpu")):
        assert not sequence.holds()
    sequence = ready(net, x)
    _pack.clear()
    assert not sequence.holds()
    assert ready(net, x) is not sequence


def test_gradients_and_training_run_layer_by_layer() -> None:
    net, x = network(), images()
    ready(net, x)
    with torch.enable_grad():
        net(x).sum().backward()
        assert net.conv1.weight.grad is not None
    net.train()(x)
    assert net.bn1.num_batches_tracked == 1


def test_autocast_runs_layer_by_layer() -> None:
    net, x = network(), images()
    ready(net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x).dtype is torch.bfloat16


def test_a_head_of_ones_own() -> None:
    net, x = network(), images()
    net.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 4)).eval()
    assert not ready(net, x).whole
    assert torch.equal(net(x), by_layer(net, x))


def test_a_subclass_with_another_forward_is_not_recorded() -> None:
    class Scaled(Bottleneck):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.0

    torch.manual_seed(0)
    net = models.ResNet(Scaled, (1, 1, 1, 1), num_classes=10).eval()
    for _ in range(6):
        net(images())
    assert not list(net.sequences)


def test_state_that_decides_is_not_recorded() -> None:
    """A block that makes the recorded calls but may make others the next time."""

    class Moody(Bottleneck):
        skip = False

        def forward(self, x: Tensor) -> Tensor:
            return x if self.skip else super().forward(x)

    torch.manual_seed(0)
    net = models.resnet50(num_classes=10).eval()
    net.layer1[1].__class__ = Moody
    x = images()
    for _ in range(4):
        before = net(x)
    net.layer1[1].skip = True
    assert not torch.equal(net(x), before)


def test_a_subclass_that_adds_no_code_is_recorded() -> None:
    class Named(models.ResNet):
        def describe(self) -> str:
            return "mine"

    torch.manual_seed(0)
    net = Named(Bottleneck, (1, 1, 1, 1), num_classes=10).eval()
    assert ready(net, images()).whole


def test_copies_and_pickles_start_empty() -> None:
    net, x = network(), images()
    ready(net, x)
    expected = net(x)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(buffer, weights_only=False),
    ):
        assert not list(other.sequences)
        assert torch.equal(other(x), expected)
    shallow = copy.copy(net)
    assert torch.equal(shallow(x), expected)
    assert torch.equal(net(x), expected)


def test_sizes_are_told_apart() -> None:
    net = network()
    for size in (64, 96, 33):
        x = images(size=size)
        ready(net, x)
        assert torch.equal(net(x), by_layer(net, x))
    assert {shape for shape, _ in net.sequences} == {(3, 64, 64), (3, 96, 96), (3, 33, 33)}


def test_empty_batch() -> None:
    assert network()(images(0)).shape == (0, 10)


def test_inference_mode() -> None:
    with torch.inference_mode():
        net = network()  # parameters without version counters: nothing derived may be kept
        x = images()
        for _ in range(4):
            y = net(x)
        net.fc.weight.mul_(2)
        assert not torch.equal(net(x), y)


def test_plain_is_asked_of_classes() -> None:
    @plain
    class Fine(nn.Module):
        pass

    assert plain(Fine) is Fine and issubclass(models.ResNet, Sequenced)


# The ops themselves, by lists of steps.

OPS = torch.ops.resnet_fast


def step(kind: str, read: int, made: int, **fields: Any) -> list[int]:
    window = fields.get("window", (1, 1, 1, 1, 0, 0, 1, 1))
    return [
        KINDS[kind],
        read,
        fields.get("residual", -1),
        made,
        fields.get("constants", -1),
        fields.get("act", 0),
        fields.get("filters", 0),
        *window,
    ]


def run(x: Tensor, constants: list[Tensor], steps: list[int], watched: Any = ()) -> Tensor:
    handle = OPS._make_sequence(constants, steps, list(watched))
    try:
        return OPS._run_sequence(x.contiguous(memory_format=torch.channels_last), handle)
    finally:
        OPS._free_sequence(handle)


@pytest.mark.parametrize("channels", [1, 7, 16, 40])
@pytest.mark.parametrize(
    "kernel, stride, padding, dilation",
    [(3, 2, 1, 1), (2, 2, 0, 1), (5, 1, 2, 1), (3, 1, 1, 2), (1, 3, 0, 1), (4, 3, 2, 3)],
)
def test_max_pool(channels: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
    x = torch.randn(2, channels, 13, 17, generator=torch.Generator().manual_seed(0))
    x[0, 0, 3, 4], x[1, -1, 0, 0], x[1, 0, 6:] = torch.nan, torch.inf, -torch.inf
    window = (kernel, kernel, stride, stride, padding, padding, dilation, dilation)
    y = run(x, [], step("max_pool", 0, 1, window=window))
    expected = F.max_pool2d(x, kernel, stride, padding, dilation)
    assert torch.equal(y.nan_to_num(1e9), expected.nan_to_num(1e9))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("filters", [5, 7, 64])
def test_pad_channels(stride: int, filters: int) -> None:
    x = torch.randn(2, 5, 7, 9, generator=torch.Generator().manual_seed(0))
    window = (1, 1, stride, stride, 0, 0, 1, 1)
    y = run(x, [], step("pad_channels", 0, 1, filters=filters, window=window))
    assert torch.equal(y, F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, filters - 5)))


@pytest.mark.parametrize("channels", [1, 16, 130])
def test_mean(channels: int) -> None:
    x = torch.randn(3, channels, 7, 5, generator=torch.Generator().manual_seed(0))
    y = run(x, [], step("mean", 0, 1))
    given = F.adaptive_avg_pool2d(x, 1)
    expect_within_budget(y, given, x.double().mean((2, 3), keepdim=True))


def convolution(filters: int = 32, channels: int = 32, kernel: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(filters, channels, kernel, kernel, generator=generator)
    packed = torch.ops.resnet_fast._direct_weight(weight)
    return [packed, weight, torch.ones(filters), torch.zeros(filters)]


@pytest.mark.parametrize("filters", [32, 33])
@pytest.mark.parametrize("act", [0, 1, 3])
def test_a_residual_is_written_over_only_where_that_is_the_same(filters: int, act: int) -> None:
    """Three convolutions that add the value before them: at its last use, and before it."""
    constants = convolution(filters, filters)
    x = torch.randn(2, filters, 6, 5, generator=torch.Generator().manual_seed(1))
    made = {"constants": 0, "filters": filters, "act": act}
    steps = [
        *step("direct", 0, 1, **made),
        *step("direct", 1, 2, **made),
        *step("direct", 2, 3, residual=1, **made),
        *step("direct", 3, 4, residual=2, **made),
        *step("direct", 4, 5, residual=3, **made),
        *step("direct", 5, 6, residual=5, **made),
        *step("direct", 6, 7, residual=0, **made),
    ]
    values = [x]
    for i, residual in enumerate([None, None, 1, 2, 3, 5, 0]):
        added = None if residual is None else values[residual]
        name = resnet_fast.ops.activation.ACTIVATIONS[act]
        values.append(
            torch.ops.resnet_fast._direct_conv(
                values[i], *constants, added, [1, 1], [0, 0], [1, 1], name
            )
        )
    assert torch.equal(run(x, constants, steps), values[-1])


def test_the_arena_is_smaller_than_the_values() -> None:
    constants = convolution()
    x = torch.randn(4, 32, 9, 9).contiguous(memory_format=torch.channels_last)
    made = {"constants": 0, "filters": 32}
    steps = [n for i in range(8) for n in step("direct", i, i + 1, **made)]
    handle = OPS._make_sequence(constants, steps, [])
    size = OPS._sequence_bytes(x, handle)
    OPS._free_sequence(handle)
    assert size == 2 * x.numel() * 4  # the one that is read and the one that is written


HOSTILE: dict[str, list[int]] = {
    "no steps": [],
    "half a step": [0] * 14,
    "channels of a window": step("pad_channels", 0, 1, filters=64, window=(3, 3, 1, 1, 2, 2, 1, 1)),
    "fewer channels": step("pad_channels", 0, 1, filters=31),
    "unknown kind": [9, *step("mean", 0, 1)[1:]],
    "reads the future": step("mean", 1, 1),
    "reads below": step("mean", -1, 1),
    "makes another value": step("mean", 0, 2),
    "no constants": step("direct", 0, 1, filters=32),
    "constants beyond": step("direct", 0, 1, filters=32, constants=1),
    "constants far beyond": step("direct", 0, 1, filters=32, constants=2**62),
    "no filters": step("direct", 0, 1, constants=0),
    "other filters": step("direct", 0, 1, constants=0, filters=31),
    "unknown activation": step("direct", 0, 1, constants=0, filters=32, act=99),
    "pool with an activation": step("mean", 0, 1, act=1),
    "residual of another shape": step(
        "direct", 0, 1, constants=0, filters=32, residual=0, window=(1, 1, 2, 2, 0, 0, 1, 1)
    ),
    "window of nothing": step("max_pool", 0, 1, window=(0, 1, 1, 1, 0, 0, 1, 1)),
    "window too large": step("max_pool", 0, 1, window=(99, 1, 1, 1, 0, 0, 1, 1)),
    "padding too large": step("max_pool", 0, 1, window=(2, 2, 1, 1, 2, 2, 1, 1)),
    "negative padding": step("max_pool", 0, 1, window=(2, 2, 1, 1, -1, 0, 1, 1)),
    "huge stride": step("max_pool", 0, 1, window=(2, 2, 2**62, 1, 0, 0, 1, 1)),
    "Winograd of a 1x1 kernel": step("winograd4", 0, 1, constants=0, filters=32),
}


@pytest.mark.parametrize("steps", HOSTILE.values(), ids=HOSTILE)
def test_hostile_steps(steps: list[int]) -> None:
    with pytest.raises(RuntimeError, match=r"steps|constants"):
        run(torch.randn(1, 32, 8, 8), convolution(), steps)


def test_hostile_tensors() -> None:
    steps = step("direct", 0, 1, constants=0, filters=32)
    x = torch.randn(1, 32, 8, 8)
    for index in range(4):
        for wrong in (torch.zeros(3), torch.zeros(32).double(), torch.zeros(64)[::2]):
            if index == 1 and wrong.dtype is torch.float32:
                continue  # the weight itself is for Winograd's kernels
            constants = convolution()
            constants[index] = wrong
            with pytest.raises(RuntimeError, match="constants"):
                run(x, constants, steps)
    for bad in (x.double(), x[0], x.bfloat16()):
        handle = OPS._make_sequence(convolution(), steps, [])
        with pytest.raises(RuntimeError, match="x: "):
            OPS._run_sequence(bad, handle)
        OPS._free_sequence(handle)


def test_unknown_numbers() -> None:
    steps = step("mean", 0, 1)
    handle = OPS._make_sequence([], steps, [])
    OPS._free_sequence(handle)
    OPS._free_sequence(handle)  # twice is nothing
    for number in (handle, 0, -1, 2**62):
        with pytest.raises(RuntimeError, match="sequence: "):
            OPS._run_sequence(torch.randn(1, 4, 4, 4), number)


@pytest.mark.parametrize("shape", [(3,), (5000,), (700, 40)])
def test_what_is_watched_ends_it(shape: tuple[int, ...]) -> None:
    x, watched = torch.randn(1, 4, 4, 4), torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last)
    transposed = torch.randn(shape).T if len(shape) > 1 else torch.randn(2 * shape[0])[::2]
    handle = OPS._make_sequence([], step("mean", 0, 1), [watched, transposed])
    assert OPS._run_sequence(x, handle).shape == (1, 4, 1, 1)
    for tensor in (watched, transposed):
        tensor.data.mul_(2)
        assert OPS._run_sequence(x, handle).shape == (0,)
        tensor.data.div_(2)
        assert OPS._run_sequence(x, handle).shape == (1, 4, 1, 1)
    OPS._free_sequence(handle)


def test_a_discarded_network_gives_its_memory_back() -> None:
    net, x = network(), images()
    sequence = ready(net, x)
    handle, weight = sequence._handle, weakref.ref(net.layer1[0].conv1.weight)
    del net, sequence
    gc.collect()
    assert weight() is None
    with pytest.raises(RuntimeError, match="sequence: "):
        OPS._sequence_bytes(x, handle)


def test_the_guard_sees_what_it_is_told_to() -> None:
    native = _library.native()
    assert native is not None

    class Thing:
        pass

    thing, tensor, places = Thing(), torch.zeros(3), {"a": 1.5, "b": None}

    def edits() -> Iterator[Callable[[], None]]:
        yield lambda: None
        yield lambda: places.update(a=2.5)
        yield lambda: places.update(c=1)
        yield lambda: hooks.update(one=1)
        yield lambda: children.update(z=0)
        yield lambda: children.update(x=2)
        yield lambda: (children.pop("x"), children.update(x=one))
        yield lambda: setattr(thing, "__class__", type("Other", (Thing,), {}))
        yield lambda: tensor.add_(1)
        yield lambda: setattr(tensor, "data", torch.ones(3))

    one = object()
    for index, edit in enumerate(edits()):
        thing, tensor, places = Thing(), torch.zeros(3), {"a": 1.5, "b": None}
        hooks: dict[str, Any] = {}
        children: dict[str, Any] = {"x": one, "y": object()}
        guard = native.Guard()
        guard.same(places, "a", places["a"])
        guard.same(places, "b", None)
        guard.absent(places, "c")
        guard.empty(hooks)
        guard.items(children)
        guard.type(thing)
        guard.tensor(tensor)
        assert guard.holds()
        edit()
        assert guard.holds() is (index == 0), index
