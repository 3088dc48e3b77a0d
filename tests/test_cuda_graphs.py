"""``accelerate(cuda_graph=True)``: what is recorded, when it is replayed, and when not.

On the CPU a recorder stands in whose replay is the recorded call once more, on the recorded places:
what surrounds a recording is the same for both. The GPU tests at the end have the real one.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast.errors import ArgumentError
from resnet_fast.fuse.capture import STATE
from resnet_fast.nn import graphs
from resnet_fast.nn.graphs import Replays
from resnet_fast.testing.budget import expect_within_budget, in_formats
from resnet_fast.testing.networks import randomize_batchnorm_

tv = pytest.importorskip("torchvision").models


class Recorder:
    """Records on the CPU, and counts."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.recorded = self.replayed = self.finished = 0
        self.failure: Exception | None = None

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
        if self.failure is not None:
            raise self.failure
        self.recorded += 1
        result = run()

        places = list(result.values()) if isinstance(result, dict) else [result]

        def replay() -> None:
            self.replayed += 1
            with torch.inference_mode(False), torch.no_grad():
                new = run()
                values = list(new.values()) if isinstance(new, dict) else [new]
                for place, value in zip(places, values, strict=True):
                    place.copy_(value)

        for place in places:
            place.fill_(float("nan"))  # nothing is there until it is replayed
        return replay, result

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        yield

    def finish(self) -> None:
        self.finished += 1


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize_batchnorm_(tv.resnet18(num_classes=7)).eval()


def images(batch: int = 2, seed: int = 1, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def recording(model: nn.Module) -> Recorder:
    """Have the accelerated ``model`` record on the CPU."""
    recorder = Recorder()
    model.__dict__[STATE].graphs = Replays(recorder)
    return recorder


@pytest.fixture
def fused() -> nn.Module:
    return resnet_fast.accelerate(network(), cuda_graph=True)


def test_a_shape_is_recorded_once_and_replayed_on_what_is_given(
    fused: nn.Module, no_grad: None
) -> None:
    plain = resnet_fast.accelerate(network())
    recorder = recording(fused)
    first = fused(images())
    kept = first.clone()
    other = fused(images(seed=2))
    assert torch.equal(first, kept) and not torch.equal(first, other)
    assert torch.equal(first, plain(images())) and torch.equal(other, plain(images(seed=2)))
    assert (recorder.recorded, recorder.replayed) == (1, 2)
    assert torch.equal(fused(images(3)), plain(images(3))) and recorder.recorded == 2
    fused(images().contiguous(memory_format=torch.channels_last))
    fused(x=images())
    assert recorder.recorded == 4
    told = str(resnet_fast.explain(fused))
    assert told.count("the forward of 2x3x32x32 runs as one CUDA graph") == 3, told


def test_results_belong_to_the_mode_of_the_call(fused: nn.Module) -> None:
    recorder = recording(fused)
    with torch.inference_mode():
        assert fused(images()).is_inference()
    with torch.no_grad():
        assert not fused(images()).is_inference()
        with torch.inference_mode():
            x = images()
        fused(x)
    assert recorder.recorded == 1


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a weight in place": lambda m: m.conv1.weight.mul_(2),
    "a weight replaced": lambda m: setattr(m.conv1, "weight", nn.Parameter(m.conv1.weight * 2)),
    "statistics": lambda m: m.layer1[0].bn1.running_mean.add_(1),
    "state_dict": lambda m: m.load_state_dict(
        {k: v * 2 if v.is_floating_point() else v for k, v in m.state_dict().items()}
    ),
    "a layer replaced": lambda m: setattr(m, "layer4", nn.Conv2d(256, 512, 1).eval()),
    "to another dtype": lambda m: m.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_has_it_recorded_again(fused: nn.Module, change: str, no_grad: None) -> None:
    recorder = recording(fused)
    x = images()
    before = fused(x)
    CHANGES[change](fused)
    another = change == "to another dtype"
    x = x.double() if another else x
    after = fused(x)
    # The old recording goes, once what it runs has run; one of another kind of input stays.
    assert (recorder.recorded, recorder.finished) == (2, 0 if another else 1)
    state = fused.__dict__[STATE]
    state.graphs, kept = None, state.graphs
    assert torch.equal(after, fused(x)) and not torch.equal(after.float(), before.float())
    state.graphs = kept


CASES = ["grad", "train", "part in train", "hook", "autocast", "patched", "inference tensors"]


@pytest.mark.parametrize("case", CASES)
def test_what_a_recording_would_not_mean_is_not_recorded(fused: Any, case: str) -> None:
    recorder = recording(fused)
    seen: list[Any] = []
    if case == "train":
        fused.train()
    if case == "part in train":
        fused.layer1.train()
    if case == "hook":
        fused.layer1[0].conv1.register_forward_hook(lambda *_: seen.append(1))
    if case == "patched":
        forward = fused.layer1.forward
        fused.layer1.forward = lambda x: seen.append(1) or forward(x)
    if case == "inference tensors":
        with torch.inference_mode():
            fused.fc.weight = nn.Parameter(fused.fc.weight.clone(), requires_grad=False)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast")
    with torch.set_grad_enabled(case == "grad"), cast:
        y = fused(images())
        fused(images())
    assert recorder.recorded == 0
    assert len(seen) == (2 if case in ("hook", "patched") else 0)
    assert y.requires_grad == (case == "grad")


def test_a_failure_is_told_once_and_runs_without(fused: nn.Module, no_grad: None) -> None:
    recorder = recording(fused)
    recorder.failure = RuntimeError("operation not permitted when stream is capturing\nmore")
    with pytest.warns(UserWarning, match="cannot be a CUDA graph: operation not permitted"):
        y = fused(images())
    assert torch.equal(fused(images()), y) and torch.isfinite(y).all()
    told = str(resnet_fast.explain(fused))
    assert "the forward of 2x3x32x32 is no CUDA graph: operation not permitted when" in told


def test_the_oldest_kinds_make_room(
    fused: nn.Module, no_grad: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_KINDS", 2)
    recorder = recording(fused)
    for batch in (1, 2, 3, 2, 3):
        fused(images(batch))
    assert (recorder.recorded, recorder.finished) == (3, 1)
    fused(images(1))
    assert recorder.recorded == 4


def test_copies_record_for_themselves(fused: nn.Module, no_grad: None) -> None:
    recorder = recording(fused)
    y = fused(images())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        own = other.__dict__[STATE].graphs
        assert isinstance(own, Replays) and not own._known
        assert torch.equal(other(images()), y)  # records on CUDA alone
    assert recorder.recorded == 1


def test_other_results_and_arguments(no_grad: None) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, scale: float = 1.0, more: Any = None) -> dict[str, Tensor]:
            y = self.conv(x)
            return {"y": y, "z": y * scale}

    fused = resnet_fast.accelerate(Two().eval(), cuda_graph=True)
    recorder = recording(fused)
    for scale in (2.0, 3.0, 2.0):
        out = fused(images(), scale=scale)
        assert torch.equal(out["z"], out["y"] * scale)
    assert (recorder.recorded, recorder.replayed) == (2, 3)
    fused(images(), more=[images()])  # nothing to tell the kind by
    assert recorder.recorded == 2


def test_threads_take_turns(fused: nn.Module) -> None:
    recording(fused)
    with torch.no_grad():
        expected = {seed: fused(images(seed=seed)) for seed in range(4)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(fused(images(seed=seed)), expected[seed]):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_arguments() -> None:
    with pytest.raises(ArgumentError, match="cuda_graph"):
        resnet_fast.accelerate(network(), cuda_graph="yes")  # type: ignore[arg-type]
    assert resnet_fast.accelerate(network()).__dict__[STATE].graphs is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_on_a_device(dtype: torch.dtype) -> None:
    plain = network().to("cuda", dtype)
    fused = resnet_fast.accelerate(copy.deepcopy(plain), cuda_graph=True)
    exact = copy.deepcopy(plain).double()
    with torch.inference_mode():
        for batch, seed in ((2, 1), (2, 2), (3, 3), (2, 4)):
            x = images(batch, seed, 64).to("cuda", dtype)
            expect_within_budget(fused(x), in_formats(plain, x), exact(x.double()))
    assert str(resnet_fast.explain(fused)).count("runs as one CUDA graph") == 2
    with torch.no_grad():
        fused.fc.weight.mul_(2)
        x = images(2, 1, 64).to("cuda", dtype)
        expected = fused.__dict__[STATE].origin(x)
        assert (fused(x) - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.gpu
def test_streams_and_threads_on_a_device() -> None:
    fused = resnet_fast.accelerate(network().cuda().half(), cuda_graph=True)
    given = [images(2, seed, 64).cuda().half() for seed in range(4)]
    with torch.inference_mode():
        expected = [fused(x) for x in given]
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for _ in range(20):
                if not torch.equal(fused(given[index]), expected[index]):
                    wrong.append(index)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_a_forward_that_waits_for_the_device_is_refused_in_words() -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y * float(y.max())

    fused = resnet_fast.accelerate(Waits().cuda().eval(), cuda_graph=True)
    x = images().cuda()
    with torch.no_grad():
        with pytest.warns(UserWarning, match="cannot be a CUDA graph"):
            y = fused(x)
        assert torch.equal(fused(x), y)
