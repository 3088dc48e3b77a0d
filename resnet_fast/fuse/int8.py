"""A program on 8-bit operands: which of its values are bytes, and the loop that runs it.

Between two sites a value is a :class:`Bytes`, on the grid that calibration chose; a step that is
no site gets it in fp32, and a site puts what such a step made on its grid again. One form of a
value exists at a time, so that a step that writes in place leaves no other behind. Max pooling and
steps that pass their input on keep bytes as they are. As in fp32, the first steps run as one
native call once they have been recorded (:mod:`resnet_fast.fuse.prefix`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.fuse.capture import is_hooked
from resnet_fast.fuse.match import module_activation, norm_refusal
from resnet_fast.fuse.prefix import Prefix
from resnet_fast.fuse.steps import Ref, SiteTarget, Step, leaves_of, reads_of
from resnet_fast.nn import recorder as _recorder
from resnet_fast.nn.prepared import Prepared, batch_kind, keep
from resnet_fast.nn.recorder import Recorder
from resnet_fast.nn.sequence import may_run
from resnet_fast.nn.site import FusedSite
from resnet_fast.ops import conv_bn_act_int8 as int8
from resnet_fast.ops.conv_bn_act_int8 import Grid

if TYPE_CHECKING:
    from resnet_fast.fuse.program import Program

#: Modules that hand their input on in eval().
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d)
#: Images of the first call of a kind that a site is verified on.
_IMAGES = 2


class Bytes(NamedTuple):
    """A value on its grid."""

    q: Tensor
    grid: Grid
    #: The real values that it was made from, where they are still there: the network's input.
    source: Tensor | None = None

    def real(self) -> Tensor:
        """What it stands for, in fp32."""
        return int8.dequantize(self.q, self.grid) if self.source is None else self.source


@dataclass
class Int8:
    """What makes a program an 8-bit one; the program keeps it, and it pickles with it.

    Attributes:
        grids: by slot, of every value that is made or read as bytes.
        means: by path of the convolution, of its input's channels.
        linears: by the slot of its result, of a linear layer's features.
        batches: how many the calibration had.
        refused: by path, why a site runs in fp32 all the same.
    """

    grids: dict[int, Grid]
    means: dict[str, Tensor]
    batches: int
    refused: dict[str, str]
    linears: dict[int, Tensor] = field(default_factory=dict)
    _known: dict[str, dict[Any, Prepared]] = field(default_factory=dict)
    _ran: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _prefix: Prefix = field(default_factory=Prefix)
    #: By slot, the constants that a linear layer was verified with.
    _checked: dict[int, int8.Linear] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": {}, "_ran": {}, "_prefix": Prefix(), "_checked": {}}

    def shape(self, path: str) -> tuple[int, ...] | None:
        """The input's shape that a site last ran on as bytes with, or None."""
        return self._ran.get(path)

    @property
    def prefix(self) -> Prefix:
        """The sequences of the first steps."""
        return self._prefix

    def run(self, program: Program, root: nn.Module, inputs: list[Any]) -> tuple[bool, list[Any]]:
        """The program's slots after a run on bytes; False where this call is not for bytes."""
        if torch.compiler.is_compiling() or root.training:
            return False, []
        if not inputs or not all(map(_may_run, inputs)):
            return False, []
        slots: list[Any] = [*inputs, *([None] * (program.size - len(inputs)))]
        layout = all(value.is_contiguous() for value in inputs)
        first = None
        if program.cuts and 0 in self.grids:
            grid = self.grids[0]
            first = Bytes(int8.quantize(inputs[0], grid), grid, inputs[0])
            taken = self._prefix.run([first.q])
            if taken is not None:
                count, q = taken
                out = program.steps[count - 1].out
                slots[out] = Bytes(q, self.grids[out])
                modules = program.guarded_modules(root)
                self._steps(program, program.steps[count:], modules, slots, layout)
                return True, slots
        modules, refusal = program.enter(root)
        if refusal is not None:
            return False, []
        recorder = None
        if first is not None:
            slots[0] = first
            recorder = self._prefix.recorder([first.q])
        if recorder is None:
            self._steps(program, program.steps, modules, slots, layout)
        else:
            self._record(program, recorder, modules, slots, layout)
        return True, slots

    def _record(
        self,
        program: Program,
        recorder: Recorder,
        modules: list[nn.Module],
        slots: list[Any],
        layout: bool,
    ) -> None:
        """Run all steps, and keep as many of the first ones as a sequence can stand for."""
        slots[0] = slots[0]._replace(q=recorder.x)
        ran, count, value = 0, 0, None
        with recorder():
            for step in program.steps[: program.cuts[-1]]:
                passes = self.passes(step, modules)
                before = len(recorder)
                self._steps(program, [step], modules, slots, layout)
                ran += 1
                made = slots[step.out]
                if not isinstance(made, Bytes) or (not passes and len(recorder) != before + 1):
                    break
                if ran in program.cuts and recorder.holds(made.q):
                    count, value, steps = ran, made.q, len(recorder)
        self._steps(program, program.steps[ran:], modules, slots, layout)
        if value is not None:
            called: list[Any] = [
                modules[leaf.container]._modules[leaf.name]
                for step in program.steps[:count]
                for leaf in leaves_of(step)
            ]
            recorder.cut(steps)
            modal = program.training is not None
            self._prefix.keep(recorder, count, value, called, modules, modal)

    def _steps(
        self,
        program: Program,
        steps: list[Step],
        modules: list[nn.Module],
        slots: list[Any],
        layout: bool,
    ) -> None:
        for step in steps:
            if step.kind == "site" and step.target.path not in self.refused:
                if self._site(step, modules, slots):
                    _drop(step, slots)
                    continue
            elif self.passes(step, modules) and step.args[0].slot in step.free:
                # One that is read again shares memory with what is handed on: both in fp32.
                slots[step.out] = slots[step.args[0].slot]
                _drop(step, slots)
                continue
            elif (
                self._pools(step, modules, slots)
                or self._means(step, modules, slots)
                or self._linear(step, modules, slots)
            ):
                _drop(step, slots)
                continue
            for slot in reads_of(step):
                if isinstance(slots[slot], Bytes):
                    slots[slot] = slots[slot].real()
            program._run_steps([step], modules, slots, layout)

    @staticmethod
    def passes(step: Step, modules: list[nn.Module]) -> bool:
        """Whether a step hands bytes on as they are."""
        if step.kind != "module" or len(step.args) != 1 or step.kwargs:
            return False
        module = modules[step.target.container]._modules[step.target.name]
        return type(module) in _PASSING and not module.training and not is_hooked(module)

    @staticmethod
    def _pools(step: Step, modules: list[nn.Module], slots: list[Any]) -> bool:
        """Run a plain max pooling on bytes."""
        if step.kind != "module" or len(step.args) != 1 or step.kwargs:
            return False
        module: Any = modules[step.target.container]._modules[step.target.name]
        x = slots[step.args[0].slot] if isinstance(step.args[0], Ref) else None
        if type(module) is not nn.MaxPool2d or not isinstance(x, Bytes) or is_hooked(module):
            return False
        if module.return_indices:
            return False
        # Of bytes torch pools small images alone; as floats they are as exact.
        y = module(x.q.to(torch.float32)).to(torch.uint8)
        recorder = _recorder.active()
        if recorder is not None:
            recorder.max_pool(module, x.q, y)
        slots[step.out] = Bytes(y, x.grid)
        return True

    @staticmethod
    def _means(step: Step, modules: list[nn.Module], slots: list[Any]) -> bool:
        """Run an average pooling to one pixel on bytes; its result is in fp32."""
        x = slots[step.args[0].slot] if step.args and isinstance(step.args[0], Ref) else None
        if not isinstance(x, Bytes) or step.kwargs:
            return False
        if step.kind == "module":
            module: Any = modules[step.target.container]._modules[step.target.name]
            if type(module) is not nn.AdaptiveAvgPool2d or is_hooked(module):
                return False
            size = module.output_size if len(step.args) == 1 else None
        elif step.kind == "function" and step.target is F.adaptive_avg_pool2d:
            size = step.args[1] if len(step.args) == 2 else None
        else:
            return False
        if size != 1 and (not isinstance(size, (tuple, list)) or tuple(size) != (1, 1)):
            return False
        slots[step.out] = int8.mean(x.q, x.grid)
        return True

    def _linear(self, step: Step, modules: list[nn.Module], slots: list[Any]) -> bool:
        """Run a linear layer on the features that were calibrated."""
        means = self.linears.get(step.out)
        x = None if means is None else slots[step.args[0].slot]
        if means is None or not isinstance(x, Tensor) or x.dim() != 2:
            return False
        module: Any = modules[step.target.container]._modules[step.target.name]
        if not _is_plain_linear(module, x) or module.in_features != means.numel():
            return False
        grid = self.grids[step.args[0].slot]
        constants = int8.linear_constants(module.weight, module.bias, grid, means)
        if self._checked.get(step.out) is not constants:
            if not int8.linear_deviation(x[:_IMAGES], grid, constants) <= 1:
                del self.linears[step.out]  # explain() counts one less
                return False
            self._checked[step.out] = constants
        slots[step.out] = int8.linear(x, grid, constants)
        return True

    def _site(self, step: Step, modules: list[nn.Module], slots: list[Any]) -> bool:
        """Run a site on bytes; False where it is no longer what was calibrated."""
        target: SiteTarget = step.target
        conv, bn, act = (
            None if leaf is None else modules[leaf.container]._modules[leaf.name]
            for leaf in (target.conv, target.bn, target.act_module)
        )
        if not _is_as_matched(target, conv, bn, act) or (bn is not None and bn.training):
            return False
        x, residual = (self._bytes(ref, slots) for ref in step.args)
        assert x is not None
        r = None if residual is None else residual.q
        calls = self._known.setdefault(target.path, {})
        key = (batch_kind(x.q), x.q.shape[1:], residual is None)
        known = calls.get(key)
        if known is None or not known.holds(x.q, conv, bn, r):
            known = self._prepare(step, conv, bn, x, residual)
            if known is None:
                return False
            keep(calls, key, known)
        y = known.call(x.q, r)
        self._ran[target.path] = tuple(x.q.shape)
        recorder = _recorder.active()
        if recorder is not None:
            recorder.site(known, target.act, x.q, r, y)
        slots[step.out] = Bytes(y, self.grids[step.out])
        return True

    def _bytes(self, ref: Any, slots: list[Any]) -> Bytes | None:
        if ref is None:
            return None
        value = slots[ref.slot]
        if isinstance(value, Bytes):
            return value
        grid = self.grids[ref.slot]
        return Bytes(int8.quantize(value, grid), grid)

    def _prepare(
        self, step: Step, conv: Any, bn: Any, x: Bytes, residual: Bytes | None
    ) -> Prepared | None:
        """The site's call, verified on this input against fp64."""
        target: SiteTarget = step.target
        args = FusedSite.args(conv, bn)
        if not Prepared.held(conv, bn, args.tensors) or any(
            t is not None
            and (t.is_inference() or t.device.type != "cpu" or t.dtype != torch.float32)
            for t in args.tensors
        ):
            return None
        call = int8.prepare(
            args[:6],
            args.eps,
            *(args.stride, args.padding, args.dilation, args.groups, target.act),
            *(x.grid, None if residual is None else residual.grid, self.grids[step.out]),
            self.means[target.path],
        )
        few = x.q[:_IMAGES]
        added = None if residual is None else residual.q[:_IMAGES]
        y = call(few, added)
        off = int8.deviation(call, few, added, y)
        if not off <= 1:
            self.refused[target.path] = f"VERIFY_FAILED: {off:.3g} times what rounding allows"
            return None
        return Prepared(x.q, conv, bn, args.tensors, tuple(y.shape[1:]), lambda: call)


def _may_run(value: Any) -> bool:
    return may_run(value) and value.dtype is torch.float32


def _drop(step: Step, slots: list[Any]) -> None:
    for slot in step.free:
        slots[slot] = None


def _is_as_matched(target: SiteTarget, conv: Any, bn: Any, act: Any) -> bool:
    return (
        conv is not None
        and target.child in conv._modules
        and not is_hooked(conv)
        and (bn is None) == (target.bn is None)
        and (bn is None or norm_refusal(bn, conv.out_channels, target.norm_alone) is None)
        and (act is None or module_activation(act) == target.act)
    )


def _is_plain_linear(module: Any, x: Tensor) -> bool:
    return (
        type(module) is nn.Linear
        and not is_hooked(module)
        and all(
            t is None or (t.device.type == "cpu" and t.dtype is torch.float32)
            for t in (x, module.weight, module.bias)
        )
    )
