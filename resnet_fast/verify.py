"""Model-level verification: a network and each of its sites against an fp64 reference.

Weights are random and the BatchNorm statistics randomised (mean != 0, variance != 1, random
gamma and beta), because default statistics hide folding mistakes. The budget, and which error of
the framework it is measured by, is that of :mod:`resnet_fast.testing.budget`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from resnet_fast.errors import ArgumentError

if TYPE_CHECKING:
    import torch

DTYPES = ("fp32", "bf16", "fp16")
_SEED = 0
# fp64 convolutions cost seconds an image: a larger batch is checked on this many images,
# evenly spaced and including the first and the last.
MAX_TRUTH_IMAGES = 8
#: What precedes the name of a network that is timm's.
TIMM = "timm/"


def dtype_from_name(name: str) -> torch.dtype:
    """Return the torch dtype called ``name`` (fp32, bf16 or fp16)."""
    import torch

    table = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in table:
        raise ArgumentError("dtype", "one of " + ", ".join(DTYPES), repr(name))
    return table[name]


def model_names() -> tuple[str, ...]:
    """Names of every network that the command line accepts."""
    from resnet_fast import models

    return tuple(models.list_models())


def other_names() -> tuple[str, ...]:
    """Names of torchvision's classification networks that this package has no network for.

    ``resnet_fast.accelerate`` is what makes them faster. Empty without torchvision.
    """
    try:
        import torchvision
    except ImportError:
        return ()
    known = set(model_names())
    names = torchvision.models.list_models(module=torchvision.models)
    return tuple(name for name in names if name not in known)


def check_model_name(name: str, others: bool = False) -> None:
    """Raise ``ArgumentError`` with the nearest names when ``name`` is not a network.

    Args:
        others: accept :func:`other_names` too, and timm's networks behind ``timm/``.
    """
    if others and name.startswith(TIMM):
        home, names = TIMM, tuple(_timm().list_models())
    else:
        home, names = "", model_names()
        if others and name not in names:
            names += other_names()
    known = name.removeprefix(home)
    if known not in names:
        near = [home + n for n in difflib.get_close_matches(known, names, n=3, cutoff=0.4)]
        if near:
            expected = f"a known network (did you mean {' or '.join(near)}?)"
        else:
            expected = f"one of {', '.join(names)}" if not home else "one of timm.list_models()"
        raise ArgumentError("model", expected, repr(name))


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        expected = "a network of an installed package (pip install timm)"
        raise ArgumentError("model", expected, repr(TIMM)) from None
    return timm


def build_model(name: str) -> torch.nn.Module:
    """Build this package's network ``name`` with random weights, in eval mode."""
    from resnet_fast import models

    check_model_name(name)
    return models.build(name).eval()


def build_reference(name: str) -> tuple[torch.nn.Module, str]:
    """Build the reference network and say where it comes from.

    timm's behind ``timm/``; torchvision's network where it is installed and has one of that name,
    else this package's plain-PyTorch network with the same ``state_dict`` keys.
    """
    check_model_name(name, others=True)
    if name.startswith(TIMM):
        timm = _timm()
        return timm.create_model(name.removeprefix(TIMM)).eval(), f"timm {timm.__version__}"
    try:
        import torchvision
    except ImportError:
        torchvision = None
    from resnet_fast import models

    if torchvision is not None and (name in models.TORCHVISION or name not in model_names()):
        model = getattr(torchvision.models, name)(weights=None)
        return model.eval(), f"torchvision {torchvision.__version__}"
    return models.plain_reference(name).eval(), "resnet_fast.models.plain_reference"


def randomise(model: torch.nn.Module, example: torch.Tensor, seed: int = _SEED) -> None:
    """Give every BatchNorm of ``model`` random affine parameters and statistics, in place.

    Statistics are first measured on ``example``, then moved at random, so that activations keep
    a sane scale at any depth and fp16 does not overflow.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(uniform(norm.weight, 0.5, 1.5))
            norm.bias.copy_(uniform(norm.bias, -0.3, 0.3))
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        model.train()
        model(example)
        model.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            mean, var = norm.running_mean, norm.running_var
            assert mean is not None and var is not None
            mean.add_(uniform(mean, -0.5, 0.5) * var.sqrt())
            var.mul_(uniform(var, 0.7, 1.4)).clamp_(min=1e-3)


def default_size(name: str) -> int:
    """Side of the square image that network ``name`` was designed for."""
    from resnet_fast import models

    if name.startswith(TIMM):
        config = _timm().get_pretrained_cfg(name.removeprefix(TIMM))
        return 224 if config is None else int(config.input_size[-1])
    if name in other_names():
        import torchvision

        weights = torchvision.models.get_model_weights(name)
        return int(weights.DEFAULT.transforms.keywords.get("crop_size", 224))
    return models.input_shape(name)[-1]


@dataclass
class Problem:
    """A network's weights, an input and the answers it must give, all in CPU memory."""

    model: str
    dtype: str
    reference: str
    state: dict[str, torch.Tensor]
    x: torch.Tensor
    images: torch.Tensor
    truth: torch.Tensor
    # The reference network's own answers, one a memory format.
    frameworks: list[torch.Tensor]


def make_problem(
    name: str, dtype: str, batch: int, size: int, *, seed: int = _SEED, device: str = "cpu"
) -> Problem:
    """Draw weights and an input for network ``name`` and compute the fp64 truth."""
    import torch

    from resnet_fast.testing.budget import in_formats

    torch_dtype = dtype_from_name(dtype)
    if batch < 1:
        raise ArgumentError("batch", "at least 1", str(batch))
    if size < 16:
        raise ArgumentError("size", "at least 16", str(size))
    torch.manual_seed(seed)
    model, source = build_reference(name)
    x = torch.randn(batch, 3, size, size)
    with torch.random.fork_rng(devices=[]):
        randomise(model, torch.randn(4, 3, min(max(size, 32), 96), min(max(size, 32), 96)), seed)
    # The truth sees the numbers that the dtype can hold: rounding weights is not our error.
    model.to(torch_dtype)
    x = x.to(torch_dtype)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    count = min(batch, MAX_TRUTH_IMAGES)
    images = torch.linspace(0, batch - 1, count).round().long()
    with torch.inference_mode():
        outputs = in_formats(model.to(device), x.to(device))
        frameworks = [output.cpu()[images].clone() for output in outputs]
        truth = model.to(device).double()(x[images].to(device).double()).cpu().clone()
    return Problem(name, dtype, source, state, x, images, truth, frameworks)


@dataclass
class Check:
    """One tensor's verdict: ``error <= limit`` with both as maximum absolute differences."""

    name: str
    ok: bool
    error: float
    limit: float
    detail: str = ""


@dataclass
class Verification:
    """Verdict on one network: its output and each site in it."""

    model: str
    dtype: str
    batch: int
    size: int
    device: str
    reference: str
    network: Check
    sites: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when the output and every site are within budget."""
        return self.network.ok and all(site.ok for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {"ok": self.ok}


def check_output(problem: Problem, actual: torch.Tensor, name: str = "output") -> Check:
    """Check a network's whole-batch output against ``problem``'s truth."""
    from resnet_fast.testing.budget import within_budget

    verdict = within_budget(actual.cpu()[problem.images], problem.frameworks, problem.truth)
    return Check(name, bool(verdict.ok), float(verdict.error), float(verdict.limit))


#: The distance, relative to the truth, beyond which a network on 8 bits is broken, not inexact.
BROKEN = 0.5


def check_distance(problem: Problem, actual: torch.Tensor, name: str = "output") -> Check:
    """How far a network's output is from ``problem``'s truth, relative to it, both in L2 norm."""
    ours = actual.cpu()[problem.images].double()
    if ours.shape != problem.truth.shape:
        return Check(name, False, float("inf"), BROKEN, f"shape {tuple(ours.shape)}")
    distance = float((ours - problem.truth).norm() / problem.truth.norm())
    return Check(name, distance <= BROKEN, distance, BROKEN)


@contextmanager
def checked_sites(model: torch.nn.Module, checks: list[Check]) -> Iterator[None]:
    """Within the context, each call of a fused site appends its verdict to ``checks``."""
    from resnet_fast.plan import model_sites

    handles = [
        site.register_forward_hook(_site_hook(path, site, checks), with_kwargs=True)
        for path, site in model_sites(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _site_hook(path: str, site: Any, checks: list[Check]) -> Callable[..., None]:
    from resnet_fast.testing.budget import in_formats, within_budget

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: torch.Tensor) -> None:
        call = dict(zip(("x", "conv", "bn", "residual"), args, strict=False)) | kwargs
        conv, bn, residual = call["conv"], call.get("bn"), call.get("residual")

        def plain(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
            out = copy.deepcopy(conv).to(x.dtype)(x)
            if bn is not None:
                out = copy.deepcopy(bn).to(x.dtype)(out)
            if residual is not None:
                out = out + residual
            return _activate(out, site.act)

        truth = plain(call["x"].double(), None if residual is None else residual.double())
        verdict = within_budget(y, in_formats(plain, call["x"], residual), truth)
        rows = site.rows()
        detail = str(rows[-1].get("candidate", "")) if rows else ""
        checks.append(
            Check(path, bool(verdict.ok), float(verdict.error), float(verdict.limit), detail)
        )

    return hook


def _activate(x: torch.Tensor, act: str) -> torch.Tensor:
    from resnet_fast.ops import activation

    return activation.value(act, x)


def verify_model(
    name: str,
    dtype: str = "fp32",
    batch: int = 2,
    size: int | None = None,
    *,
    device: str = "cpu",
    seed: int = _SEED,
) -> Verification:
    """Verify network ``name``: output and every fused site, against fp64."""
    import torch

    check_model_name(name)
    size = default_size(name) if size is None else size
    problem = make_problem(name, dtype, batch, size, seed=seed, device=device)
    model = build_model(name).to(dtype_from_name(dtype))
    model.load_state_dict(problem.state)
    model = model.to(device).eval()
    x = problem.x.to(device)
    sites: list[Check] = []
    with torch.inference_mode():
        network = check_output(problem, model(x))
        with checked_sites(model, sites):
            model(x)
    return Verification(name, dtype, batch, size, device, problem.reference, network, sites)
