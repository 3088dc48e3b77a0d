"""The call that every block makes: convolution, batch norm, residual and activation as one site.

A :class:`FusedSite` has no parameters. It reads those of the convolution and the norm at each call,
so ``state_dict``, optimisers, ``.to()`` and edits in place act on the one truth there is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fast import _library, ops
from resnet_fast.errors import ArgumentError
from resnet_fast.nn import recorder as _recorder
from resnet_fast.nn.norms import is_frozen_norm, is_norm_act_type, normalise
from resnet_fast.nn.prepared import (
    Prepared,
    batch_kind,
    hooks_of,
    is_autocasting,
    is_transforming,
    keep,
)
from resnet_fast.ops import activation
from resnet_fast.ops.activation import ACTIVATIONS
from resnet_fast.plan import binding as _binding
from resnet_fast.plan.candidate import CANDIDATES, Candidate, ConvArgs
from resnet_fast.plan.reasons import REASONS
from resnet_fast.plan.site import DTYPES, Site, device_name, dtype_name

# What a plain convolution or norm calls; a fused call stands for nothing else.
_PLAIN_CONV = {kind.forward: kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_PLAIN_NORM = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_PLANNED_DTYPES = frozenset(DTYPES.values())
# Read once: a tracer would follow the look-up into the file system.
_CPU_OPS = _library.status()["cpu"].loaded


def _hooked(module: nn.Module) -> bool:
    return any(hooks_of(module))


def _is_plain_conv(conv: Any) -> bool:
    kind = type(conv)
    plain = _PLAIN_CONV.get(kind.forward)
    patched = "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__
    return plain is not None and kind._conv_forward is plain and not patched


def _autocasts(x: Tensor) -> bool:
    """Whether autocast takes ``x`` for a convolution: it leaves fp64 alone."""
    return is_autocasting(x.device) and x.dtype is not torch.float64


class FusedSite(nn.Module):
    """``act(bn(conv(x)) + residual)`` by the plan's candidate.

    In ``eval()`` without recorded gradients the verified candidate of the plan runs. In
    ``train()`` the convolution is followed by :func:`resnet_fast.ops.bn_act_train`, and the running
    statistics are updated here as ``torch.nn.BatchNorm2d`` updates them. Whatever the fused calls
    do not cover runs on the framework's own path, with a reason in :meth:`rows`.

    Args:
        act: activation, one of :data:`resnet_fast.ops.ACTIVATIONS`.
        name: what ``explain()`` calls the site; its path in the model where empty.

    Raises:
        ArgumentError: for an unknown activation.
    """

    is_site = True
    #: Whether of a norm with an activation of its own the site takes the norm alone. A caller that
    #: hands over such a norm as a norm has it called as it is.
    norm_alone = False

    def __init__(self, act: str = "relu", name: str = "") -> None:
        super().__init__()
        if act not in ACTIVATIONS:
            raise ArgumentError("act", f"one of {', '.join(ACTIVATIONS)}", repr(act))
        self.act = act
        self.name = name
        self._forget()

    def _forget(self) -> None:
        self._generation = -1
        self._bindings: dict[Any, tuple[_binding.Binding, Site]] = {}
        # By what a tracer can know: for a dtype, residual and device, which candidate runs at
        # which image size.
        self._traced: dict[Any, dict[tuple[int, ...], str]] = {}
        self._framework: dict[str, tuple[Any, ...]] = {}
        self._prepared: dict[Any, Prepared] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Bindings belong to this process; a copy or an unpickled site plans afresh.
        state = self.__dict__.copy()
        for key in ("_bindings", "_traced", "_framework", "_prepared"):
            state[key] = {}
        state["_generation"] = -1
        return state

    def extra_repr(self) -> str:
        return f"act={self.act!r}" + (f", name={self.name!r}" if self.name else "")

    def forward(
        self, x: Tensor, conv: nn.Module, bn: nn.Module | None, residual: Tensor | None = None
    ) -> Tensor:
        """Run the site.

        Args:
            x: N C H W (or the 1-D or 3-D kin), the convolution's dtype or autocast.
            conv: ``torch.nn.Conv1d``, ``Conv2d`` or ``Conv3d``.
            bn: a batch norm over the convolution's channels, or None.
            residual: added before the activation, of the output's shape.
        """
        if not torch.compiler.is_compiling():
            prepared = self._prepared.get((batch_kind(x), x.shape[1:], residual is None))
            if prepared is not None and prepared.holds(x, conv, bn, residual):
                y = prepared.call(x, residual)
                recorder = _recorder.active()
                if recorder is not None:
                    recorder.site(prepared, self.act, x, residual, y)
                return y
        reason = self._why_not(x, conv, bn)
        if reason == "TRAINING":
            return self._train(x, conv, bn, residual)
        if reason is None:
            reason = self._why_not_now(x, conv, bn, residual)
        if reason is not None:
            return self._plain(x, conv, bn, residual, reason)
        if _autocasts(x):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            residual = None if residual is None else residual.to(dtype)
        args = self.args(conv, bn)
        if torch.compiler.is_compiling():
            return self._trace(x, args, residual)
        candidate = self._planned(x, args, residual)
        y = candidate.run(x, args, residual, self.act)
        self._prepare(candidate, x, args, conv, bn, residual, y)
        return y

    def skipped(self, reason: str) -> None:
        """Note that a block ran this site's modules one by one, for ``explain()``."""
        if not torch.compiler.is_compiling():
            self._framework[reason] = (None, None, None)

    # What the fused calls do not cover.

    def _why_not(self, x: Tensor, conv: Any, bn: Any) -> str | None:
        if not _is_plain_conv(conv):
            return "UNKNOWN_CONV"
        if bn is None or (is_frozen_norm(bn) and "forward" not in bn.__dict__):
            return None
        plain = type(bn).forward in _PLAIN_NORM or (self.norm_alone and is_norm_act_type(type(bn)))
        if not plain or "forward" in bn.__dict__ or not isinstance(bn, _BatchNorm):
            return "UNKNOWN_NORM"
        if not bn.training:
            return "BATCH_STATS" if bn.running_mean is None or bn.running_var is None else None
        if isinstance(bn, nn.SyncBatchNorm):
            return "UNKNOWN_NORM"
        if _hooked(conv) or _hooked(bn):
            return "HOOKED"
        return "TRAINING"

    def _why_not_now(self, x: Tensor, conv: Any, bn: Any, residual: Tensor | None) -> str | None:
        if (bn is not None and _hooked(bn)) or _hooked(conv):
            return "HOOKED"
        if torch.onnx.is_in_onnx_export():
            return "ONNX"
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return "PADDING_MODE"
        tensors = [t for t in (x, residual, *self.args(conv, bn).tensors) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return "GRAD"
        if not torch.compiler.is_compiling() and (
            is_transforming() or any(type(t) not in _PLAIN_TENSORS for t in tensors)
        ):
            return "TRANSFORMED"
        if x.dim() != conv.weight.dim() or x.shape[1] != conv.in_channels:
            return "SHAPE_MIX"
        if any(t.device != x.device for t in tensors):
            return "DEVICE_MIX"
        autocast = _autocasts(x) and conv.weight.dtype is not torch.float64
        if x.dtype not in _PLANNED_DTYPES or (x.dtype is not conv.weight.dtype and not autocast):
            return "DTYPE_MIX"
        if residual is not None:
            out = [
                (n + 2 * p - d * (r - 1) - 1) // s + 1
                for n, p, d, r, s in zip(
                    x.shape[2:],
                    conv.padding,
                    conv.dilation,
                    conv.kernel_size,
                    conv.stride,
                    strict=True,
                )
            ]
            if list(residual.shape) != [x.shape[0], conv.out_channels, *out]:
                return "RESIDUAL_SHAPE"
            if residual.dtype is not x.dtype and not autocast:
                return "DTYPE_MIX"
        return None

    def _plain(self, x: Tensor, conv: Any, bn: Any, residual: Tensor | None, reason: str) -> Tensor:
        if not torch.compiler.is_compiling():
            self._framework[reason] = (tuple(x.shape), tuple(conv.weight.shape), x.dtype)
        y = conv(x)
        if bn is not None:
            y = self._normalise(bn, y)
        if residual is not None:
            y = y + residual
        return activation.value(self.act, y)

    # Training.

    def _train(self, x: Tensor, conv: Any, bn: Any, residual: Tensor | None) -> Tensor:
        y = conv(x)
        fuses = self._fuses_training(y, bn, residual)
        if not torch.compiler.is_compiling():
            reason = "TRAINING" if fuses else "TRAINING_UNFUSED"
            self._framework[reason] = (tuple(x.shape), tuple(conv.weight.shape), x.dtype)
        if not fuses:
            return self._plain_train(y, bn, residual)
        if residual is not None and residual.dtype is not y.dtype:
            residual = residual.to(y.dtype)
        # The op takes its parameters in the accumulator's dtype; a bf16 model holds them in bf16.
        wide = torch.float64 if y.dtype is torch.float64 else torch.float32
        weight = None if bn.weight is None else bn.weight.to(wide)
        bias = None if bn.bias is None else bn.bias.to(wide)
        out, mean, rstd = ops.bn_act_train(y, weight, bias, residual, bn.eps, self.act)
        if bn.track_running_stats and bn.running_mean is not None:
            self._update_running(bn, y, mean, rstd)
        return out

    @staticmethod
    def _fuses_training(y: Tensor, bn: Any, residual: Tensor | None) -> bool:
        if y.device.type != "cpu" or not _CPU_OPS:
            return False
        if y.dim() < 2 or y.numel() <= y.shape[1]:
            return False  # the framework's own error about one value per channel
        return residual is None or residual.shape == y.shape

    def _plain_train(self, y: Tensor, bn: Any, residual: Tensor | None) -> Tensor:
        y = self._normalise(bn, y)
        if residual is not None:
            y = y + residual
        return activation.value(self.act, y)

    def _normalise(self, bn: Any, y: Tensor) -> Tensor:
        return normalise(bn, y) if self.norm_alone else bn(y)

    @staticmethod
    def _update_running(bn: Any, y: Tensor, mean: Tensor, rstd: Tensor) -> None:
        with torch.no_grad():
            count = y.numel() // y.shape[1]
            variance = rstd.pow(-2).sub_(bn.eps).clamp_(min=0).mul_(count / (count - 1))
            if bn.num_batches_tracked is not None:
                bn.num_batches_tracked.add_(1)
            momentum = bn.momentum
            if momentum is None:  # the cumulative average
                momentum = 1.0 / float(bn.num_batches_tracked)
            bn.running_mean.mul_(1 - momentum).add_(mean.to(bn.running_mean.dtype), alpha=momentum)
            bn.running_var.mul_(1 - momentum).add_(
                variance.to(bn.running_var.dtype), alpha=momentum
            )

    # Evaluation.

    @staticmethod
    def args(conv: Any, bn: Any) -> ConvArgs:
        """The parameters and geometry of a convolution and its norm."""
        geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
        if bn is None:
            return ConvArgs(conv.weight, conv.bias, None, None, None, None, 0.0, *geometry)
        return ConvArgs(
            conv.weight,
            conv.bias,
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            bn.eps,
            *geometry,
        )

    def _trace(self, x: Tensor, args: ConvArgs, residual: Tensor | None) -> Tensor:
        # Here, where a tracer has imported sympy already: it takes half a second.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        name = None
        if self._generation == _binding.generation():
            kind = (x.dtype, residual is None, x.device.type)
            one = statically_known_true(x.shape[0] == 1)
            name = self._candidate_for(x.shape[2:], self._traced.get((*kind, one), {}))
            if name is None and not one:
                # At one image torch's own convolution is at its most exact: what held there holds.
                name = self._candidate_for(x.shape[2:], self._traced.get((*kind, True), {}))
        return CANDIDATES[name or "aten"].trace(x, args, residual, self.act)

    @staticmethod
    def _candidate_for(size: Any, sizes: dict[tuple[int, ...], str]) -> str | None:
        """What runs at ``size``; at a size left open, what runs at each that was verified."""
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        open_to = set()
        for known, name in sizes.items():
            pairs = list(zip(size, known, strict=True))
            if all(statically_known_true(n == m) for n, m in pairs):
                return name
            if not any(statically_known_true(n != m) for n, m in pairs):
                open_to.add(name)
        return open_to.pop() if len(open_to) == 1 else None

    def _planned(self, x: Tensor, args: ConvArgs, residual: Tensor | None) -> Candidate:
        if self._generation != _binding.generation():
            # New dictionaries: another thread may be reading the old ones.
            self._bindings, self._traced, self._prepared = {}, {}, {}
            self._generation = _binding.generation()
        key = self._key(x, args, residual)
        found = self._bindings.get(key)
        if found is None or _binding.tuning() is not None:
            found = self._bind(key, x, args, residual)
        return found[0].candidate

    def _prepare(
        self,
        candidate: Candidate,
        x: Tensor,
        args: ConvArgs,
        conv: Any,
        bn: Any,
        residual: Tensor | None,
        y: Tensor,
    ) -> None:
        prepare = candidate.prepare
        if (
            prepare is None
            or is_autocasting(x.device)
            or not Prepared.held(conv, bn, args.tensors)
            or any(t is not None and t.is_inference() for t in args.tensors)
        ):
            return
        ready = Prepared(
            x, conv, bn, args.tensors, tuple(y.shape[1:]), lambda: prepare(x, args, self.act)
        )
        key = (batch_kind(x), x.shape[1:], residual is None)
        keep(self._prepared, key, ready)

    @staticmethod
    def _key(x: Tensor, args: ConvArgs, residual: Tensor | None) -> Any:
        return (
            batch_kind(x),
            x.shape[1:],
            x.dtype,
            x.is_contiguous(),
            residual is None,
            args.mean is None,
            args.weight.shape,
            *(tuple(geometry) for geometry in (args.stride, args.padding, args.dilation)),
            args.groups,
            x.device,
        )

    def _bind(
        self, key: Any, x: Tensor, args: ConvArgs, residual: Tensor | None
    ) -> tuple[_binding.Binding, Site]:
        channels_last = (
            x.dim() > 3
            and not x.is_contiguous()
            and x.is_contiguous(
                memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            )
        )
        site = Site(
            op="conv_bn_act",
            x_shape=tuple(x.shape),
            weight_shape=tuple(args.weight.shape),
            stride=tuple(args.stride),
            padding=tuple(args.padding),
            dilation=tuple(args.dilation),
            groups=args.groups,
            act=self.act,
            affine=args.mean is not None,
            residual=residual is not None,
            dtype=dtype_name(x.dtype),
            layout="channels_last" if channels_last else "contiguous",
            device=device_name(x.device),
        )
        plan = _binding.tuning()
        if plan is not None:
            _binding.tune_site(plan, site, x, args, residual)
        found = (
            _binding.resolve(site, x.device, lambda c: c.run(x, args, residual, self.act)),
            site,
        )
        keep(self._bindings, key, found)
        kind = (x.dtype, residual is None, x.device.type, x.shape[0] == 1)
        sizes = self._traced.setdefault(kind, {})
        size, name = tuple(x.shape[2:]), found[0].candidate.name
        # A trace serves few images and many, which may be bound to different candidates.
        keep(sizes, size, name if sizes.get(size, name) == name else "aten")
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One row for each shape the site has run with, framework runs with their reason."""
        rows: list[dict[str, Any]] = []
        told = set()
        for binding, site in list(self._bindings.values()):
            # Batches that are bound alike are one row.
            if (site.key, binding.candidate.name) in told:
                continue
            told.add((site.key, binding.candidate.name))
            rows.append(
                {
                    "name": self.name,
                    "op": site.op,
                    "x_shape": site.x_shape,
                    "weight_shape": site.weight_shape,
                    "dtype": site.dtype,
                    "layout": site.layout,
                    "act": site.act,
                    "residual": site.residual,
                    "candidate": binding.candidate.name,
                    "reason": binding.reason,
                    "meaning": REASONS[binding.reason],
                    "error": binding.error,
                    "limit": binding.limit,
                    "microseconds": binding.microseconds,
                    "bytes": site.bytes,
                    "notes": "; ".join(binding.notes),
                }
            )
        for reason, (x_shape, weight_shape, dtype) in list(self._framework.items()):
            rows.append(self._bare_row(reason, x_shape, weight_shape, dtype))
        if not rows:
            rows.append(self._bare_row("NOT_RUN", None, None, None))
        return rows

    def _bare_row(self, reason: str, x_shape: Any, weight_shape: Any, dtype: Any) -> dict[str, Any]:
        return {
            "name": self.name,
            "op": "conv_bn_act",
            "x_shape": x_shape,
            "weight_shape": weight_shape,
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            "layout": None,
            "act": self.act,
            "residual": None,
            "candidate": None if reason == "NOT_RUN" else "aten",
            "reason": reason,
            "meaning": REASONS[reason],
            "error": None,
            "limit": None,
            "microseconds": None,
            "bytes": None,
            "notes": "",
        }
