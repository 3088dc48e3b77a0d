"""What the activations of a model are like: observed on a user's inputs, to choose their grids.

While a calibration runs, each site of a program is computed in fp32 and looked at: the range of
what it makes and reads, and the mean of each of its input's channels. The grid of a value is the
one that loses least to rounding and to clipping together, in mean square, over what was seen
(Banner et al. 2019, "Post training 4-bit quantization of convolutional networks", weigh the two in
the same way).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.errors import AccelerateError, ArgumentError
from resnet_fast.fuse.capture import mode, untouched_rng
from resnet_fast.fuse.program import Program, run_site
from resnet_fast.fuse.steps import Ref, SiteTarget, Step, reads_of
from resnet_fast.ops.conv_bn_act_int8 import Grid

_BINS = 4096
_SAMPLES = 1 << 18  # values of a tensor that enter its histogram: every n-th
_CANDIDATES = 64  # ends of the range that are tried on either side


class Histogram:
    """Values over ``[-reach, reach]``, in bins; the reach doubles when a value lies beyond it.

    Zeros are left out: every grid holds 0 exactly.
    """

    def __init__(self) -> None:
        self.low, self.high, self.reach = 0.0, 0.0, 2.0**-16
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Enter the values of ``x``.

        Raises:
            AccelerateError: if one is infinite or NaN.
        """
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise AccelerateError(
                f"calibration: activations from {low} to {high}; expected finite ones"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        while self.reach < max(-self.low, self.high):
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros(_BINS, dtype=torch.float64)
            self.counts[_BINS // 4 : 3 * _BINS // 4] = merged
            self.reach *= 2
        flat = _flat(x)
        step = max(1, flat.numel() // _SAMPLES)
        while math.gcd(step, x.shape[1]) > 1:  # or some channels would not be seen
            step += 1
        flat = flat[::step]
        flat = flat[flat != 0]
        self.counts += torch.histc(flat, _BINS, -self.reach, self.reach).double()

    def grid(self) -> Grid:
        """The grid that loses least."""
        if self.low == self.high:
            return Grid.over(0, 0)
        width = 2 * self.reach / _BINS
        at = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width - self.reach
        steps = torch.linspace(1 / _CANDIDATES, 1, _CANDIDATES, dtype=torch.float64)
        highs = steps * self.high if self.high > 0 else torch.zeros(1, dtype=torch.float64)
        lows = steps * self.low if self.low < 0 else torch.zeros(1, dtype=torch.float64)
        beyond = (at[None] - highs[:, None]).clamp(min=0).square() @ self.counts
        below = (lows[:, None] - at[None]).clamp(min=0).square() @ self.counts
        step = (highs[None] - lows[:, None]) / 255
        # A uniform error of one step has a variance of a twelfth of its square.
        loss = beyond[None] + below[:, None] + self.counts.sum() * step.square() / 12
        best = divmod(int(loss.argmin()), highs.numel())
        return Grid.over(float(lows[best[0]]), float(highs[best[1]]))


def _flat(x: Tensor) -> Tensor:
    dense = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()
    return (dense.permute(0, 2, 3, 1) if x.dim() == 4 else dense).detach().reshape(-1)


@dataclass
class Observed:
    """What one program showed: by slot the values, by path of the convolution its input's means."""

    values: dict[int, Histogram] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    pixels: dict[str, int] = field(default_factory=dict)

    def means(self, path: str) -> Tensor:
        """The mean of each channel of a site's input, or of a linear layer's features, fp32."""
        return (self.sums[path] / self.pixels[path]).float()

    def add_means(self, path: str, x: Tensor) -> None:
        """Enter the input of a site (N C H W) or of a linear layer (N C)."""
        total = x.detach().sum([d for d in range(x.dim()) if d != 1], dtype=torch.float64)
        self.sums[path] = self.sums.get(path, 0) + total
        self.pixels[path] = self.pixels.get(path, 0) + x.numel() // x.shape[1]


def linear_path(step: Step) -> str:
    """What the linear layer of ``step`` is known by among the means: no module's path."""
    return f"#{step.out}"


class Observer:
    """Stands in for the sites of ``program`` while it runs on a user's inputs.

    Args:
        program: the program.
        same: slots whose values are those of another slot: what lies between keeps the grid.
    """

    def __init__(self, program: Program, same: dict[int, int]) -> None:
        self.found = Observed()
        self._same = same
        self._steps = {step.target.path: step for step in program.steps if step.kind == "site"}
        self._made = {step.out for step in self._steps.values()}
        # A step that is no site may write to what it reads: such values are looked at when they
        # are read, too.
        others = (step for step in program.steps if step.kind != "site" and step.out not in same)
        self._made -= {same.get(slot, slot) for step in others for slot in reads_of(step)}

    def __call__(
        self, target: SiteTarget, conv: Any, bn: Any, act: Any, x: Tensor, residual: Any
    ) -> Tensor:
        """Compute the site in fp32, and note what it read and made."""
        y = run_site(target, conv, bn, act, x, residual)
        step: Step = self._steps[target.path]
        for ref, value in zip(step.args, (x, residual), strict=True):
            if isinstance(ref, Ref) and self._same.get(ref.slot, ref.slot) not in self._made:
                self._note(ref.slot, value)
        self._note(step.out, y)
        if x.dim() == 4:
            self.found.add_means(target.path, x)
        return y

    def linear(self, step: Step) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A hook before the linear layer of ``step``, which notes its features."""

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if isinstance(x, Tensor) and x.dim() == 2 and x.dtype is torch.float32:
                self._note(step.args[0].slot, x)
                self.found.add_means(linear_path(step), x)

        return note

    def _note(self, slot: int, value: Tensor) -> None:
        if value.numel():
            home = self._same.get(slot, slot)
            self.found.values.setdefault(home, Histogram()).add(value)


def observe(
    model: nn.Module,
    observers: list[tuple[Program, Observer]],
    linears: list[tuple[nn.Module, Step, Observer]],
    calibration: Iterable[Any],
) -> int:
    """Run ``model`` in eval on every batch, the sites of the programs by their observers.

    Args:
        model: the accelerated model.
        observers: of each of its programs.
        linears: their linear layers, with the step and the observer of each.
        calibration: batches: a tensor, a dict of keyword arguments, or a tuple or list of
            positional ones, of which those that ``forward`` has no parameter for (labels) are left
            out.

    Returns:
        How many batches there were.

    Raises:
        ArgumentError: if there is none.
        AccelerateError: if the model fails on one, or an activation is not finite.
    """
    count = 0
    with untouched_rng(), torch.no_grad(), mode(model, False):
        for program, observer in observers:
            program.observe = observer
        hooks = [m.register_forward_pre_hook(seen.linear(step)) for m, step, seen in linears]
        try:
            for batch in calibration:
                args, kwargs = _call(model, batch)
                try:
                    model(*args, **kwargs)
                except AccelerateError:
                    raise
                except Exception as error:
                    raise AccelerateError(
                        f"the model fails on calibration batch {count}: "
                        f"{type(error).__name__}: {error}"
                    ) from error
                count += 1
        finally:
            for hook in hooks:
                hook.remove()
            for program, _ in observers:
                program.observe = None
    if count == 0:
        raise ArgumentError("calibration", "at least one batch", "none")
    return count


def _call(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, dict):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch)[: _positional(model)], {}
    return (batch,), {}


def _positional(model: nn.Module) -> int:
    """How many positional arguments ``forward`` needs."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)
