"""A network's layers as one native call: the same bits, and never after anything has changed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sequence_support import needs_sequences
from torch import Tensor, nn

import resnet_fast
from resnet_fast import models, plan
from resnet_fast.nn.blocks import Bottleneck
from resnet_fast.nn.sequence import Sequenced, plain
from resnet_fast.ops import _pack, conv_bn_act_direct
from resnet_fast.testing.budget import expect_within_budget
from resnet_fast.testing.networks import randomize_batchnorm_

needs_bf16 = pytest.mark.skipif(
    not conv_bn_act_direct.available(torch.bfloat16),
    reason="this CPU, or this process, has no AVX512_BF16",
)
pytestmark = [needs_sequences, pytest.mark.usefixtures("no_grad")]


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


@needs_bf16
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet20"])
@pytest.mark.parametrize("batch", [1, 3])
def test_bf16(name: str, batch: int) -> None:
    """The same bits as layer by layer, and those within the budget."""
    net, x = network(name).bfloat16(), images(batch).bfloat16()
    assert ready(net, x).whole
    y = net(x)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, by_layer(net, x))
    assert torch.equal(y, net(x.contiguous(memory_format=torch.channels_last)))
    reference = resnet_fast.nn.unfuse_(copy.deepcopy(net))
    expect_within_budget(y, reference(x), reference.double()(x.double()))


@needs_bf16
def test_a_network_that_changes_its_dtype() -> None:
    net, x = network(), images()
    ready(net, x)
    half = copy.deepcopy(net).bfloat16()
    expected = by_layer(half, x.bfloat16())
    net.bfloat16()
    for _ in range(4):
        assert torch.equal(net(x.bfloat16()), expected)
    net.float()
    assert net(x).dtype is torch.float32


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


def test_threads_and_sizes_that_change_from_call_to_call() -> None:
    """More of them than a recording keeps sequences for."""
    net, x = network(), images(14)
    expected = by_layer(net, x)
    ready(net, x)
    before = torch.get_num_threads()
    try:
        for turn in range(2):
            for batch in range(2, 15):
                torch.set_num_threads(1 + (batch + turn) % 3)
                assert torch.equal(net(x[:batch]), expected[:batch])
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


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_autocast_runs_layer_by_layer(name: str) -> None:
    net, x = network(name), images()
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


def test_a_discarded_network_gives_its_memory_back() -> None:
    net, x = network(), images()
    sequence = ready(net, x)
    handle, weight = sequence._handle, weakref.ref(net.layer1[0].conv1.weight)
    del net, sequence
    gc.collect()
    assert weight() is None
    with pytest.raises(RuntimeError, match="sequence: "):
        torch.ops.resnet_fast._sequence_bytes(x, handle)
