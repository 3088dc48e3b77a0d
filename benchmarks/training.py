"""A training step, this package's network beside torchvision's, in turns.

    python -m benchmarks.training --model resnet50 --batch 128 --out training.json

One step is forward under autocast, cross entropy, backward; no optimizer, which is the same for
all. Engines: torchvision's network eager and under ``torch.compile``, both in channels-last, and
this package's, whose blocks say how they train. Before anything is timed the gradients of a step on
a few images are compared with torchvision's in fp64: this package's may be off by twice what the
eager engine's are, and one rounding.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fast
from benchmarks.chains import interleaved
from resnet_fast.bench.report import environment, save_json
from resnet_fast.testing.networks import randomize_batchnorm_
from resnet_fast.verify import build_reference, dtype_from_name

# Images of the step that is compared: fp64 takes four times the memory.
_COMPARED = 16
ENGINES = ("resnet_fast", "eager_nhwc", "compile")


def step(model: Any, x: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Loss of one step, whose gradients are left in the parameters."""
    for parameter in model.parameters():
        parameter.grad = None
    with torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
        logits = model(x)
    loss = F.cross_entropy(logits if logits.dtype is torch.float64 else logits.float(), labels)
    loss.backward()
    return loss.detach()


def engines(names: Sequence[str], model: str, device: str) -> dict[str, nn.Module]:
    """The networks by name, of the same weights, in ``train()`` and channels-last."""
    torch.manual_seed(0)
    ours = randomize_batchnorm_(getattr(resnet_fast, model)())
    found: dict[str, nn.Module] = {}
    for name in names:
        network: Any = ours
        if name != "resnet_fast":
            network, _ = build_reference(model)
            network.load_state_dict(ours.state_dict())
        network = network.to(device).to(memory_format=torch.channels_last).train()
        found[name] = torch.compile(network) if name == "compile" else network
    return found


def difference(model: Any, exact: dict[str, Tensor]) -> float:
    """The largest relative difference of a parameter's gradient, by its norm."""
    worst = 0.0
    for name, parameter in model.named_parameters():
        truth = exact[name.removeprefix("_orig_mod.")]
        off = (parameter.grad.double() - truth).norm() / truth.norm().clamp(1e-12)
        worst = max(worst, off.item())
    return worst


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where a gradient of ours is further off than twice eager's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", default="fp16", help="of autocast")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--reps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    dtype, device = dtype_from_name(options.dtype), torch.device(options.device)
    shape = (options.batch, 3, options.size, options.size)
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(options.batch, device=device) % 1000
    networks = engines(options.engines.split(","), options.model, options.device)

    few = slice(0, min(options.batch, _COMPARED))
    reference = engines(["eager_nhwc"], options.model, options.device)["eager_nhwc"].double()
    step(reference, x[few].double(), labels[few], torch.float32)
    exact = {k: p.grad.clone() for k, p in reference.named_parameters() if p.grad is not None}
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], Any]] = {}
    for name, network in networks.items():
        step(network, x[few], labels[few], dtype)
        rows.append({"engine": name, "gradient_difference": difference(network, exact)})
        runs[name] = lambda network=network: step(network, x, labels, dtype)  # type: ignore[misc]
    off = {row["engine"]: row["gradient_difference"] for row in rows}
    allowed = 2 * (off.get("eager_nhwc", float("inf")) + torch.finfo(dtype).eps)
    held = off.get("resnet_fast", 0.0) <= allowed
    if held:
        for name, samples in interleaved(runs, device, options.reps).items():
            low, median, high = statistics.quantiles([*samples, *samples], n=4)
            row = next(row for row in rows if row["engine"] == name)
            row |= {"median_us": median, "quartiles_us": [low, high]}
            row["images_per_second"] = options.batch / median * 1e6
    told = ""
    if "resnet_fast" in networks:
        told = str(resnet_fast.explain(networks["resnet_fast"]))
    result = {
        "schema": 1,
        "command": "python -m benchmarks.training " + " ".join(argv or sys.argv[1:]),
        "environment": environment(torch.get_num_threads()),
        "model": options.model,
        "dtype": options.dtype,
        "batch": options.batch,
        "size": options.size,
        "held": held,
        "rows": rows,
        "blocks": [line for line in told.splitlines() if "training by" in line],
    }
    if options.out is not None:
        save_json(result, options.out)
    print(f"{'engine':<14} {'ms a step':>10} {'images/s':>9} {'gradients off by':>17}")
    for row in rows:
        ms = row.get("median_us", float("nan")) / 1e3
        rate = row.get("images_per_second", float("nan"))
        print(f"{row['engine']:<14} {ms:>10.2f} {rate:>9.0f} {row['gradient_difference']:>17.1e}")
    if not held:
        print("gradients further off than twice eager's: not timed")
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
