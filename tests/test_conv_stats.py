"""conv_stats and norm_act: values and gradients by the layers they stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fast import ops
from resnet_fast.errors import ArgumentError, DTypeError
from resnet_fast.ops import activation
from resnet_fast.testing.budget import expect_within_budget as check

pytestmark = pytest.mark.skipif(
    not ops.conv_stats.__module__ or not hasattr(torch.ops.resnet_fast, "conv_stats"),
    reason="the native library is not loaded",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EPS = 1e-3


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x.to(wide(x.dtype)), dims, correction=0)
    return mean, torch.rsqrt(var + EPS)


class Bottleneck(nn.Module):
    """Three convolutions under training batch norm and a shortcut: layer by layer, or fused."""

    def __init__(self, channels: int = 16, mid: int = 8, stride: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(channels + mid)

        def drawn(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*sizes, generator=generator) * 0.5)

        self.weights = nn.ParameterList(
            [drawn(mid, channels, 1, 1), drawn(mid, mid, 3, 3), drawn(channels, mid, 1, 1)]
        )
        self.gammas = nn.ParameterList([drawn(n) for n in (mid, mid, channels)])
        self.betas = nn.ParameterList([drawn(n) for n in (mid, mid, channels)])
        self.stride, self.act = stride, "relu"

    def norm(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.gammas[index].to(wide(dtype)), self.betas[index].to(wide(dtype))

    def by_layers(self, x: Tensor, residual: Tensor) -> Tensor:
        strides, pads = (1, self.stride, 1), (0, 1, 0)
        for index in range(3):
            z = F.conv2d(x, self.weights[index], None, strides[index], pads[index])
            x = F.batch_norm(z, None, None, *self.norm(index, z.dtype), True, 0.0, EPS)
            if index == 2:
                x = x + residual
            x = activation.value(self.act, x)
        return x

    def fused(self, x: Tensor, residual: Tensor) -> Tensor:
        w, kind = self.weights, x.dtype
        z, *stats = ops.conv_stats(x, w[0], eps=EPS)
        front = (*self.norm(0, kind), EPS, self.act)
        z, *stats = ops.conv_stats(z, w[1], *stats, *front, self.stride, 1, eps=EPS)
        front = (*self.norm(1, kind), EPS, self.act)
        z, *stats = ops.conv_stats(z, w[2], *stats, *front, eps=EPS)
        return ops.norm_act(z, *stats, *self.norm(2, kind), residual, EPS, self.act)


def step(
    block: Bottleneck, forward: str, x: Tensor, residual: Tensor, grad: Tensor
) -> list[Tensor]:
    """The output, and every gradient."""
    block = copy.deepcopy(block)
    x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    y = getattr(block, forward)(x, residual)
    y.backward(grad)
    return [y.detach(), x.grad, residual.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize("act", ["relu", "silu", "none"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_bottleneck_and_its_gradients_in_fp64(stride: int, act: str) -> None:
    """Beside the framework's autograd of the layers, to fp64's last digits."""
    torch.manual_seed(0)
    block = Bottleneck(stride=stride).double()
    block.act = act
    x = torch.randn(3, 16, 7, 5, dtype=torch.float64)
    residual = torch.randn(3, 16, -(-7 // stride), -(-5 // stride), dtype=torch.float64)
    grad = torch.randn_like(residual)
    ours, theirs = (step(block, way, x, residual, grad) for way in ("fused", "by_layers"))
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_bottleneck_and_its_gradients_within_the_budget(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    block = Bottleneck().to(dtype)
    block.act = "silu"  # no kink that a rounding could cross
    x, residual, grad = (torch.randn(4, 16, 7, 5).to(dtype) for _ in range(3))
    exact = step(
        copy.deepcopy(block).double(), "by_layers", x.double(), residual.double(), grad.double()
    )
    ours, theirs = (step(block, way, x, residual, grad) for way in ("fused", "by_layers"))
    flipped = [t.flip(0) for t in (x, residual, grad)]
    other = step(block, "by_layers", *flipped)
    other[:3] = [t.flip(0) for t in other[:3]]
    for actual, one, two, truth in zip(ours, theirs, other, exact, strict=True):
        check(actual, [one, two], truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_values_layout_and_dtype(dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(2)
    x = (torch.randn(2, 6, 7, 5) + 1).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(10, 3, 3, 3).to(dtype)
    gamma, beta = (torch.randn(6, dtype=wide(dtype)) for _ in range(2))
    mean, rstd = statistics(x)
    z, mean_z, rstd_z = ops.conv_stats(
        x, weight, mean, rstd, gamma, beta, EPS, "relu", 2, 1, groups=2, eps=EPS
    )
    assert z.dtype == dtype and z.shape == (2, 10, 4, 3) and z.is_contiguous(memory_format=layout)

    def reference(kind: torch.dtype) -> Tensor:
        affine = (gamma.to(wide(kind)), beta.to(wide(kind)))
        normal = F.batch_norm(x.to(kind), None, None, *affine, True, 0.0, EPS)
        return F.conv2d(torch.relu(normal), weight.to(kind), None, 2, 1, 1, 2)

    # In fp64 the framework's fp32 error is the standard.
    check(
        z, reference(torch.float32 if dtype == torch.float64 else dtype), reference(torch.float64)
    )
    for actual, framework, truth in zip(
        (mean_z, rstd_z), statistics(z.float()), statistics(z.double()), strict=True
    ):
        assert actual.dtype == wide(dtype) and not actual.requires_grad
        check(actual, framework, truth)


def arguments(dtype: torch.dtype = torch.float64, **changed: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    x = torch.randn(2, 4, 4, 3, dtype=dtype)
    mean, rstd = statistics(x)
    gamma, beta = (torch.randn(4, dtype=wide(dtype)) for _ in range(2))
    weight = torch.randn(6, 2, 3, 3, dtype=dtype)
    given = {"x": x, "weight": weight, "mean": mean, "rstd": rstd, "bn_weight": gamma,
             "bn_bias": beta, "bn_eps": EPS, "act": "silu", "stride": [1, 1], "padding": [1, 1],
             "dilation": [1, 1], "groups": 2, "eps": EPS}  # fmt: skip
    return given | changed


def test_derivatives_and_their_derivatives() -> None:
    """By finite differences; mean and rstd follow x, as a training step has it."""
    given = arguments()

    def run(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        mean, rstd = (t.detach() for t in statistics(x))
        own = {"mean": mean, "rstd": rstd, "bn_weight": gamma, "bn_bias": beta}
        z, *stats = ops.conv_stats(**given | own | {"x": x, "weight": weight})
        return ops.norm_act(z, *stats, None, None, None, EPS, "silu")

    names = ("x", "weight", "bn_weight", "bn_bias")
    leaves = [given[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("norm", [True, False])
def test_opcheck(norm: bool) -> None:
    given = arguments(torch.float32)
    if not norm:
        given |= {"mean": None, "rstd": None, "bn_weight": None, "bn_bias": None, "act": "none"}
    for name in ("x", "weight", "bn_weight", "bn_bias"):
        if given[name] is not None:
            given[name].requires_grad_()
    torch.library.opcheck(torch.ops.resnet_fast.conv_stats.default, tuple(given.values()))
    x, mean, rstd = (arguments(torch.float32)[name] for name in ("x", "mean", "rstd"))
    rest = (x.requires_grad_(), mean, rstd, None, None, torch.randn_like(x), EPS, "relu")
    torch.library.opcheck(torch.ops.resnet_fast.norm_act.default, rest)


def test_compiled_whole() -> None:
    block = Bottleneck()
    x, residual = torch.randn(2, 16, 7, 5), torch.randn(2, 16, 7, 5)
    torch._dynamo.reset()
    compiled = torch.compile(block.fused, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, residual), block.fused(x, residual))


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"rstd": None}, ArgumentError, "rstd"),
        ({"mean": None, "rstd": None}, ArgumentError, "mean"),
        ({"mean": torch.zeros(3, dtype=torch.float64)}, ArgumentError, "mean"),
        ({"rstd": torch.zeros(4)}, DTypeError, "rstd"),
        ({"eps": -1.0}, ArgumentError, "eps"),
        ({"groups": 3}, ArgumentError, "groups"),
        ({"act": "softmax"}, ArgumentError, "act"),
        ({"x": torch.randn(1, 4, 3, 3, dtype=torch.float64), "padding": 0}, ArgumentError, "x"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_hostile_arguments(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ops.conv_stats(**arguments(**changed))


def test_statistics_with_a_gradient_are_refused() -> None:
    """They would have to be differentiated, and are taken for those of x."""
    x = torch.randn(2, 4, 3, 3)
    mean, rstd = statistics(x)
    with pytest.raises(ArgumentError, match="mean"):
        ops.norm_act(x, mean.requires_grad_(), rstd)
