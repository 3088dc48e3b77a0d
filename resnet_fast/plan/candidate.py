"""Candidates for a convolution site: the ways to run it, and the order to try them in.

A candidate takes the parameters as they are and derives what it needs through
:mod:`resnet_fast.ops._pack`. ``aten``, the framework's own path, accepts everything; it is the
last resort of every order and the baseline of every comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fast import _library
from resnet_fast.ops import (
    _pack,
    activation,
    conv_bn_act_cuda,
    conv_bn_act_direct,
    conv_bn_act_onednn,
    conv_bn_act_triton,
    conv_bn_act_winograd,
)
from resnet_fast.ops._checks import channels_last, tf32_allowed
from resnet_fast.plan.site import DTYPES, Site

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvArgs(NamedTuple):
    """The parameters of one convolution and its batch norm, as the modules hold them."""

    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Every tensor that a derived value may depend on, the weight first."""
        return self[:6]


Run = Callable[[Tensor, ConvArgs, Tensor | None, str], Tensor]
Prepare = Callable[[Tensor, ConvArgs, str], _pack.Call]


@dataclass(frozen=True)
class Candidate:
    """One way to run a convolution site.

    ``reject(site)`` is None where the candidate can run, and a plain reason where it cannot.
    ``run`` is called eagerly; ``trace`` under a compiler or exporter. ``prepare``, where there is
    one, is ``run`` with the parameters' derived values bound, good until a parameter changes.
    ``variant``, where there is one, names the kernel that runs at the site's batch: what holds of
    one says nothing of another.
    """

    name: str
    reject: Callable[[Site], str | None]
    run: Run
    trace: Run
    prepare: Prepare | None = None
    variant: Callable[[Site], str] | None = None


def _affine(x: Tensor, args: ConvArgs) -> tuple[Tensor | None, Tensor | None]:
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return _pack.cached(
        ("affine", dtype, args.eps), args.tensors, lambda: _pack.fold(*args[1:7], dtype=dtype)
    )


def _affine_traced(x: Tensor, args: ConvArgs) -> tuple[Tensor | None, Tensor | None]:
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return _pack.fold(*args[1:7], dtype=dtype)


def _native_absence() -> str | None:
    status = _library.status().get("cpu")
    return None if status is not None and status.loaded else "the CPU op library is not loaded"


def _never(site: Site) -> str | None:
    return None


# aten: convolution, batch norm, add and activation, one op each.


def run_aten(x: Tensor, args: ConvArgs, residual: Tensor | None, act: str) -> Tensor:
    """The framework's own path, and the definition that every candidate is compared with."""
    weight = args.weight if args.weight.dtype is x.dtype else args.weight.to(x.dtype)
    bias = None if args.bias is None else args.bias.to(x.dtype)
    geometry = (args.stride, args.padding, args.dilation, args.groups)
    y = _CONV[x.dim() - 2](x, weight, bias, *geometry)
    if args.mean is not None:
        y = F.batch_norm(y, args.mean, args.var, args.bn_weight, args.bn_bias, False, 0.0, args.eps)
    if residual is not None:
        y = y + residual
    return activation.value(act, y)


def _prepare_aten(x: Tensor, args: ConvArgs, act: str) -> _pack.Call:
    return lambda x, residual: run_aten(x, args, residual, act)


# onednn: the framework's fused CPU convolution over packed weights.


def _reject_onednn(site: Site) -> str | None:
    if not site.device.startswith("cpu"):
        return "oneDNN runs on the CPU"
    if not conv_bn_act_onednn.available(DTYPES[site.dtype]):
        return f"oneDNN does not run {site.dtype} on this processor"
    if len(site.x_shape) not in (4, 5):
        return "torch's fused oneDNN convolution has two or three spatial dimensions"
    return None


# Registrations that pack weights take the parameters themselves, eagerly and traced alike.


def _packing(run: Callable[..., Tensor]) -> Run:
    return lambda x, args, residual, act: run(x, *args[:7], residual, *args[7:], act)


def _prepared(prepare: Callable[..., _pack.Call]) -> Prepare:
    return lambda x, args, act: prepare(x, *args, act)


def _packing_traced(op: str) -> Run:
    def trace(x: Tensor, args: ConvArgs, residual: Tensor | None, act: str) -> Tensor:
        return getattr(torch.ops.resnet_fast, op)(x, *args[:7], residual, *args[7:], act)

    return trace


# direct: this package's product over packed weights, fp32 and bf16.


def _reject_direct(site: Site) -> str | None:
    if not site.device.startswith("cpu") or not conv_bn_act_direct.available(DTYPES[site.dtype]):
        return "the direct convolution runs on the CPU in fp32, and in bf16 with AVX512_BF16"
    if len(site.x_shape) != 4 and (len(site.x_shape) != 5 or site.groups > 1):
        return "the direct convolution has two spatial dimensions, or three and one group"
    return _native_absence()


# winograd2 and winograd4: this package's kernels for 3x3 at stride 1, over transformed weights.


def _reject_winograd(site: Site) -> str | None:
    if not site.device.startswith("cpu") or site.dtype not in ("float32", "bfloat16"):
        return "the Winograd convolution runs on the CPU in fp32 and bf16"
    geometry = (site.weight_shape[2:], site.stride, site.dilation, site.groups)
    if geometry != ((3, 3), (1, 1), (1, 1), 1):
        return "F(m x m, 3 x 3) is for dense 3x3 kernels at stride 1"
    return _native_absence()


# native and triton: this package's kernels, weights unfolded, scale and shift in the epilogue.


def _reject_native(site: Site) -> str | None:
    if not site.device.startswith("cpu"):
        return "the C++ convolution runs on the CPU"
    if site.dtype == "float64":
        return "fp64 is the reference itself, nothing finer is there to verify against"
    return _native_absence()


def _reject_triton(site: Site) -> str | None:
    if not site.device.startswith("cuda"):
        return "Triton kernels run on CUDA devices"
    if site.dtype == "float64":
        return "the Triton convolution accumulates in fp32"
    if not hasattr(torch.ops.resnet_fast, "_conv_bn_act_triton"):
        return "Triton is not installed"
    return None


def _through(op: str, traced: bool) -> Run:
    affine = _affine_traced if traced else _affine

    def run(x: Tensor, args: ConvArgs, residual: Tensor | None, act: str) -> Tensor:
        scale, shift = affine(x, args)
        weight = args.weight.to(x.dtype) if traced else _pack.weight_like(x, args.weight)
        return getattr(torch.ops.resnet_fast, op)(x, weight, scale, shift, residual, *args[7:], act)

    return run


def _prepare_triton(x: Tensor, args: ConvArgs, act: str) -> _pack.Call:
    weight = _pack.weight_like(x, args.weight)
    scale, shift = _affine(x, args)
    return conv_bn_act_triton.prepare(weight, scale, shift, *args[7:], act)


def _triton_variant(site: Site) -> str:
    dtype = DTYPES[site.dtype]
    return conv_bn_act_triton.variant(dtype, site.out_shape, site.weight_shape, site.groups)


_NATIVE = "conv_bn_act"
_TRITON = "_conv_bn_act_triton"


# implicit_gemm: the CUDA library's own convolution, by the tile that the shape suggests or a given
# one.


def _reject_implicit_gemm(tile: str, site: Site) -> str | None:
    if not site.device.startswith("cuda"):
        return "its kernels run on CUDA devices"
    if not conv_bn_act_cuda.AVAILABLE:
        return "the CUDA op library is not loaded"
    if not _has_tensor_cores(site):
        return "its copies and products need sm_80"
    if len(site.x_shape) != 4 or max(site.weight_shape[2:]) > conv_bn_act_cuda.MAX_FILTER:
        return f"it has two spatial dimensions and filters of up to {conv_bn_act_cuda.MAX_FILTER}"
    if site.dtype == "float64":
        return "it accumulates in fp32"
    variant = _implicit_gemm_variant(tile, site)
    if not variant:
        return f"no kernel of tile {tile} for its dtype and channels"
    if site.dtype == "float32" and variant != "grouped" and not tf32_allowed():
        return "torch's flags do not allow TF32"
    return None


def _implicit_gemm_variant(tile: str, site: Site) -> str:
    return conv_bn_act_cuda.variant(
        DTYPES[site.dtype], site.out_shape, site.weight_shape, site.groups, tile
    )


def _prepare_implicit_gemm(tile: str, x: Tensor, args: ConvArgs, act: str) -> _pack.Call:
    weight = _weight_channels_last(x, args.weight)
    scale, shift = _affine(x, args)
    after = (*args[7:], act, tile)
    return lambda x, residual: conv_bn_act_cuda.run(x, weight, scale, shift, residual, *after)


def _implicit_gemm(tile: str, traced: bool) -> Run:
    affine = _affine_traced if traced else _affine

    def run(x: Tensor, args: ConvArgs, residual: Tensor | None, act: str) -> Tensor:
        scale, shift = affine(x, args)
        weight = args.weight.to(x.dtype) if traced else _weight_channels_last(x, args.weight)
        return conv_bn_act_cuda.run(x, weight, scale, shift, residual, *args[7:], act, tile)

    return run


def _weight_channels_last(x: Tensor, weight: Tensor) -> Tensor:
    """The weight as the kernels read it, kept until it changes."""
    if weight.dtype is x.dtype and weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return _pack.cached(
        ("channels_last", x.dtype),
        (weight,),
        lambda: weight.detach().to(x.dtype).contiguous(memory_format=torch.channels_last),
    )


def _implicit_gemms() -> list[Candidate]:
    return [
        Candidate(
            f"implicit_gemm:{tile}" if tile else "implicit_gemm",
            functools.partial(_reject_implicit_gemm, tile),
            _implicit_gemm(tile, False),
            _implicit_gemm(tile, True),
            functools.partial(_prepare_implicit_gemm, tile),
            functools.partial(_implicit_gemm_variant, tile),
        )
        for tile in ("", *conv_bn_act_cuda.HALF_TILES)
    ]


# conv+bn_act: the library's convolution, then one pass for all that follows it.


def _reject_epilogue(site: Site) -> str | None:
    if not site.device.startswith("cuda"):
        return "on the CPU the convolution's own post-ops move fewer bytes"
    if site.dtype == "float64":
        return "fp64 has no fused epilogue"
    status = _library.status().get("cuda")
    if (status is not None and status.loaded) or hasattr(torch.ops.resnet_fast, "_bn_act_triton"):
        return None
    return "the CUDA op library is not loaded, and Triton is not installed"


_BN_ACT = "bn_act" if _library.status()["cuda"].loaded else "_bn_act_triton"


def _then_epilogue(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    geometry: tuple[Any, ...],
    act: str,
) -> Tensor:
    y = _CONV[x.dim() - 2](x, weight, None, *geometry)
    if residual is not None:
        residual = residual.contiguous(memory_format=channels_last(y) or torch.contiguous_format)
    return getattr(torch.ops.resnet_fast, _BN_ACT)(y, scale, shift, residual, act)


def _epilogue(traced: bool) -> Run:
    affine = _affine_traced if traced else _affine

    def run(x: Tensor, args: ConvArgs, residual: Tensor | None, act: str) -> Tensor:
        weight = args.weight.to(x.dtype) if traced else _pack.weight_like(x, args.weight)
        return _then_epilogue(x, weight, *affine(x, args), residual, args[7:], act)

    return run


def _prepare_epilogue(x: Tensor, args: ConvArgs, act: str) -> _pack.Call:
    weight = _pack.weight_like(x, args.weight).detach()
    scale, shift = _affine(x, args)
    geometry = args[7:]
    return lambda x, residual: _then_epilogue(x, weight, scale, shift, residual, geometry, act)


# cudnn: the library's fused convolution, bias, add and ReLU over folded weights.


def _reject_cudnn(site: Site) -> str | None:
    if not (site.device.startswith("cuda") and torch.backends.cudnn.is_available()):
        return "cuDNN runs on CUDA devices"
    if site.act != "relu" or len(site.x_shape) != 4:
        return "cuDNN's fused call is a 2-D convolution with ReLU"
    if site.dtype not in ("float16", "float32", "bfloat16"):
        return f"cuDNN's fused call does not take {site.dtype}"
    return None


def _prepare_cudnn(x: Tensor, args: ConvArgs, act: str) -> _pack.Call:
    layout = torch.channels_last

    def build() -> tuple[Tensor, Tensor]:
        scale, shift = _pack.fold(*args[1:7])
        weight = args.weight.float()
        if scale is not None:
            weight = weight * scale.view(-1, 1, 1, 1)
        bias = weight.new_zeros(weight.shape[0]) if shift is None else shift
        return weight.to(x.dtype).contiguous(memory_format=layout), bias.to(x.dtype)

    weight, bias = _pack.cached(("cudnn", x.dtype, args.eps), args.tensors, build)
    geometry = (args.stride, args.padding, args.dilation, args.groups)

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=layout)
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        residual = residual.contiguous(memory_format=layout)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)

    return call


def _run_cudnn(x: Tensor, args: ConvArgs, residual: Tensor | None, act: str) -> Tensor:
    return _prepare_cudnn(x, args, act)(x, residual)


def _trace_cudnn(x: Tensor, args: ConvArgs, residual: Tensor | None, act: str) -> Tensor:
    scale, shift = _pack.fold(*args[1:7])
    weight = args.weight.float()
    if scale is not None:
        weight = weight * scale.view(-1, 1, 1, 1)
    bias = weight.new_zeros(weight.shape[0]) if shift is None else shift
    geometry = (args.stride, args.padding, args.dilation, args.groups)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight.to(x.dtype), bias.to(x.dtype), *geometry)
    return torch.cudnn_convolution_add_relu(
        x, weight.to(x.dtype), residual, 1.0, bias.to(x.dtype), *geometry
    )


CANDIDATES: dict[str, Candidate] = {
    c.name: c
    for c in (
        Candidate(
            "winograd4",
            _reject_winograd,
            _packing(conv_bn_act_winograd.run4),
            _packing_traced("_conv_bn_act_winograd4"),
            _prepared(functools.partial(conv_bn_act_winograd.prepare, 4)),
        ),
        Candidate(
            "winograd2",
            _reject_winograd,
            _packing(conv_bn_act_winograd.run2),
            _packing_traced("_conv_bn_act_winograd2"),
            _prepared(functools.partial(conv_bn_act_winograd.prepare, 2)),
        ),
        Candidate(
            "direct",
            _reject_direct,
            _packing(conv_bn_act_direct.run),
            _packing_traced("_conv_bn_act_direct"),
            _prepared(conv_bn_act_direct.prepare),
        ),
        Candidate(
            "onednn",
            _reject_onednn,
            _packing(conv_bn_act_onednn.run),
            _packing_traced("_conv_bn_act_onednn"),
            _prepared(conv_bn_act_onednn.prepare),
        ),
        Candidate("native", _reject_native, _through(_NATIVE, False), _through(_NATIVE, True)),
        Candidate(
            "triton",
            _reject_triton,
            _through(_TRITON, False),
            _through(_TRITON, True),
            _prepare_triton,
            _triton_variant,
        ),
        *_implicit_gemms(),
        Candidate("cudnn", _reject_cudnn, _run_cudnn, _trace_cudnn, _prepare_cudnn),
        Candidate(
            "conv+bn_act", _reject_epilogue, _epilogue(False), _epilogue(True), _prepare_epilogue
        ),
        Candidate("aten", _never, run_aten, run_aten, _prepare_aten),
    )
}


# Fewer channels make the transforms dearer than the products they save, and sums so short that
# F(4x4)'s transforms are the larger error: at 32 channels it passes its limit on some inputs.
_WINOGRAD_CHANNELS = {2: 32, 4: 64}
# Tiles that share a weight. Transformed weights are 4 (F(4x4)) or 1.8 times (F(2x2)) as many; a
# 7x7 map of one image has 4 tiles of 4x4, and reading the weights from memory then takes 1.2 ms
# where the products take 0.3 ms (ResNet-50's last stage, 2 Zen 4 cores, 32 GB/s). Beside weights in
# bf16 they are twice as many again.
_WINOGRAD_TILES = {"float32": 16, "bfloat16": 32}


def _winograd_order(site: Site) -> tuple[str, ...]:
    if _reject_winograd(site) is not None:
        return ()
    channels = min(site.weight_shape[:2])
    # One choice serves batches 2 to 15 (nn/site.py): 4 images stand for them.
    images = 1 if site.x_shape[0] == 1 else max(4, site.x_shape[0])
    rows, columns = site.out_shape[2:]
    # In fp32, where a product costs twice what one in bf16 does, F(2x2)'s 2.25 times fewer gain
    # nothing over a direct convolution in bf16.
    bf16 = site.dtype == "bfloat16"
    order = (("winograd4", 4),) if bf16 else (("winograd4", 4), ("winograd2", 2))
    return tuple(
        name
        for name, m in order
        if channels >= _WINOGRAD_CHANNELS[m]
        and images * -(-rows // m) * -(-columns // m) >= _WINOGRAD_TILES[site.dtype]
    )


# Filters of a group that fill the matrix product's register tile.
_TILE_FILTERS = 32


def _wastes_lanes(site: Site) -> bool:
    """Whether most of a vector would be idle in this package's grouped convolutions."""
    channels, filters = site.weight_shape[1], site.weight_shape[0] // site.groups
    native = _library.native()
    if site.groups == 1 or filters >= _TILE_FILTERS:
        return False
    if native is None or (native.current_isa() == "baseline" and channels > 1):
        return True
    return channels != filters or 16 % channels != 0


def default_order(site: Site) -> tuple[str, ...]:
    """Candidates to try without a measurement, best first.

    On the CPU this package's kernels run, and the fused oneDNN convolution where they do not: it
    is the library that ``aten`` calls. In fp16, which oneDNN refuses on most processors, the C++
    convolution takes from half to a fiftieth of the framework's time (ResNet's shapes, 2 Zen 4
    cores); with one spatial dimension it takes up to twice as long, and ``aten`` runs. On CUDA the
    library's convolution with one fused pass behind it can only save launches and bytes; a kernel
    that replaces the convolution moves fewer, and has to win a measurement first (``MUST_WIN``).
    """
    if site.device.startswith("cpu"):
        if site.dtype == "float16" and not conv_bn_act_onednn.has_fp16():
            return ("native", "aten")
        if site.dtype == "bfloat16" and not conv_bn_act_direct.available(torch.bfloat16):
            return ("onednn", "aten")
        if _wastes_lanes(site):
            return ("onednn", "direct", "aten")
        return (*_winograd_order(site), "direct", "onednn", "aten")
    if site.dtype in ("float16", "bfloat16") and _has_tensor_cores(site):
        return ("implicit_gemm", "triton", "conv+bn_act", "aten")
    return ("conv+bn_act", "aten")


# Candidates of the default order that no device is trusted to be faster with: where a site first
# runs, they are timed there beside each other and the next of the order.
MUST_WIN = frozenset({"implicit_gemm", "triton"})


def _has_tensor_cores(site: Site) -> bool:
    """Whether the site's CUDA device is an Ampere or later: its copies feed a Triton pipeline."""
    arch = site.device.rpartition(":sm_")[2]
    return arch.isdecimal() and int(arch) >= 80
