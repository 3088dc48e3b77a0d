"""The benchmark of what 8 bits cost: weights, photographs and figures."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sequence_support import needs_sequences
from torch import nn

from benchmarks import int8_accuracy as accuracy
from resnet_fast.errors import WeightsError


def tiny(count: int, _: Path) -> accuracy.Case:
    network = nn.Sequential(*accuracy.layer(3, 8, 3, 2), nn.ReLU6(), nn.Flatten()).eval()
    calibration, images = torch.randn(count, 3, 8, 8), torch.randn(2 * count, 3, 8, 8)
    return accuracy.Case(network, [calibration], images, torch.zeros(2 * count).long())


def test_no_photograph_is_in_both_halves() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    names = (*accuracy.CALIBRATING, *accuracy.MEASURED)
    images = [accuracy.photograph(name) for name in names]
    assert all(image.dtype is torch.uint8 and image.shape[0] == 3 for image in images)
    # Names do not tell: scikit-image's cat is its chelsea.
    assert len({hashlib.sha256(image.numpy().tobytes()).digest() for image in images}) == len(names)


def test_crops_are_drawn_from_their_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    drawn = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    monkeypatch.setattr(accuracy, "photograph", lambda name: drawn)
    how = (("a", "b"), 3, ((0.5,) * 3, (0.5,) * 3))
    first, again, other = (accuracy.crops(*how, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (3, 3, 224, 224) and -1 <= first.min() < 0 < first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("kernel", "stride"), ((3, 2), (5, 2), (3, 1), (5, 1), (1, 1)))
def test_padding_is_tensorflows(kernel: int, stride: int) -> None:
    """The output at 0 starts (kernel - stride) // 2 before the image."""
    conv: Any
    *padding, conv, _ = accuracy.layer(1, 1, kernel, stride)
    nn.init.ones_(conv.weight)
    y = nn.Sequential(*padding, conv)(torch.ones(1, 1, 8, 8))
    assert y.shape[2:] == (8 // stride, 8 // stride)
    low = (kernel - stride) // 2
    high = kernel - stride - low
    assert y[0, 0, 0, 0] == (kernel - low) ** 2 and y[0, 0, -1, -1] == (kernel - high) ** 2


def test_efficientnet_lite0_is_the_files() -> None:
    network = accuracy.efficientnet_lite0().eval()
    assert len(network.state_dict()) == 296
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_tensors_are_taken_in_order_where_they_fit() -> None:
    network = nn.Sequential(*accuracy.layer(3, 4, 1))
    state = {f"other.{key}": torch.ones_like(t) for key, t in network.state_dict().items()}
    loaded = accuracy.load_in_order(network, state, "file")
    assert all(bool((t == 1).all()) for t in loaded.state_dict().values())
    with pytest.raises(WeightsError, match="file does not list"):
        accuracy.load_in_order(network, dict(reversed(state.items())), "file")
    with pytest.raises(WeightsError, match="has shape"):
        accuracy.load_in_order(nn.Sequential(*accuracy.layer(3, 5, 1)), state, "file")


def test_a_file_is_kept_and_an_unknown_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w.pth").write_bytes(b"weights")
    monkeypatch.setattr(accuracy.subprocess, "run", lambda *_: pytest.fail("downloads"))
    file = accuracy.WeightFile("p==1", "p/w.pth", hashlib.sha256(b"weights").hexdigest(), ((), ()))
    assert file.fetch(tmp_path) == tmp_path / "w.pth"
    with pytest.raises(WeightsError, match=r"w\.pth: expected sha256 0"):
        file._replace(sha256="0").fetch(tmp_path)


def test_figures() -> None:
    expected = torch.eye(10)[:4] + 0.01 * torch.arange(10)
    y = expected.clone()
    y[0] = expected[0].flip(0)
    case = accuracy.Case(nn.Identity(), [], y, torch.arange(4))
    found = accuracy.compared(y, expected, case)
    assert found["top1_same"] == found["accuracy"] == 0.75
    # Of the reversed one, 9 0 1 2 3 against 0 9 8 7 6.
    assert found["top5_shared"] == pytest.approx((3 * 5 + 2) / 20)
    assert found["error"] == pytest.approx(float((y - expected).norm() / expected.norm()))
    features = accuracy.compared(y, expected, case._replace(classifies=False, labels=None))
    assert features.keys() == {"error", "cosine"}


@needs_sequences
def test_rows_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "CASES", {"tiny": tiny})
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    out = tmp_path / "accuracy.json"
    assert accuracy.main(["--images", "16", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["command"].endswith(f"--images 16 --out {out}") and result["environment"]["cpu"]
    exact, ours, peer = result["rows"]
    assert exact["error"] == 0 and exact["top1_same"] == 1 and exact["calibrated_on"] == 8
    assert 0 < ours["error"] < 0.1 and ours["on_8_bits"] == "1/1"
    assert "onnxruntime" in peer["unavailable"] and "error" not in peer
    assert "not installed" in capsys.readouterr().out
