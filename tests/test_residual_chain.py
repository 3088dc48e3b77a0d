"""The contract of ``residual_chain``, made of layers here; tests/interpreted has its kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fast import ops
from resnet_fast.errors import ArgumentError, DTypeError
from resnet_fast.testing.budget import expect_within_budget
from resnet_fast.testing.chains import CHAINS, Chain, make, reordered

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REFERENCE = ops.module("residual_chain").reference
BY_NAME = {chain.name: chain for chain in CHAINS}


def mapped(arguments: dict[str, Any], f: Any) -> dict[str, Any]:
    return {k: f(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: c.name)
def test_values(chain: Chain, dtype: torch.dtype, vectors: bool) -> None:
    arguments = make(chain, torch.float32, vectors=vectors)
    if dtype is torch.float64:
        arguments = mapped(arguments, Tensor.double)
    else:
        arguments = mapped(arguments, lambda t: t.to(dtype) if t.dim() == 4 else t)
    before = mapped(arguments, Tensor.clone)
    narrow = mapped(arguments, lambda t: t.float() if t.dtype is torch.float64 else t)
    truth = REFERENCE(**mapped(arguments, Tensor.double))
    frameworks = REFERENCE(**narrow), reordered(**narrow)
    ours = ops.residual_chain(**arguments)
    for i, (mine, exact) in enumerate(zip(ours, truth, strict=True)):
        expect_within_budget(mine, [f[i] for f in frameworks], exact)
        assert mine.dtype is dtype
        if exact.dim() == 4:
            assert mine.is_contiguous(memory_format=torch.channels_last)
    assert all(
        v is None or not isinstance(v, Tensor) or torch.equal(v, before[k])
        for k, v in arguments.items()
    )


@pytest.mark.parametrize(
    "name", ["identity", "projection_stride2", "last_tail_projection", "basic"]
)
def test_gradients(name: str) -> None:
    """Of both results together, to every tensor, and once more for a penalty on the first."""
    chain = BY_NAME[name]
    arguments = mapped(make(chain), Tensor.double) | {"act": "silu"}
    names = [k for k, v in arguments.items() if isinstance(v, Tensor)]
    leaves = tuple(arguments[k].requires_grad_() for k in names)

    def f(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = arguments | dict(zip(names, tensors, strict=True))
        return tuple(t for t in ops.residual_chain(**given) if t.dim() == 4)

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["projection", "tail", "last", "basic_projection", "empty_batch"])
def test_opcheck(name: str) -> None:
    overload = torch.ops.resnet_fast.residual_chain.default
    arguments = make(BY_NAME[name])
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(overload, tuple(arguments.values()), test_utils=utils)
    nchw = mapped(arguments, Tensor.contiguous)
    torch.library.opcheck(overload, tuple(nchw.values()), test_utils=utils)


def test_compiled_and_exported() -> None:
    arguments = make(BY_NAME["projection"])
    names = ("x", "residual")

    class Call(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            return ops.residual_chain(**arguments | dict(zip(names, tensors, strict=True)))

    inputs = tuple(arguments[k] for k in names)
    eager = Call()(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(Call(), backend="aot_eager", fullgraph=True, dynamic=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), eager, strict=True))
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"tensors": ({0: batch}, {0: batch})}
    program = torch.export.export(Call(), inputs, dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.resnet_fast.residual_chain.default in targets
    doubled = tuple(torch.cat([t, t]) for t in inputs)
    for mine, exact in zip(program.module()(*doubled), Call()(*doubled), strict=True):
        assert torch.equal(mine, exact)


def test_a_meta_tensor_gives_shapes() -> None:
    for chain in CHAINS:
        y, h = ops.residual_chain(**mapped(make(chain), lambda t: t.to("meta")))
        truth = REFERENCE(**make(chain))
        assert (y.shape, h.shape) == (truth[0].shape, truth[1].shape)


@pytest.mark.parametrize(
    ("name", "changes", "argument"),
    [
        ("identity", {"x": torch.zeros(2, 20, 7)}, "x"),
        ("identity", {"x": torch.zeros(2, 21, 7, 7)}, "weight2"),
        ("identity", {"residual": torch.zeros(2, 72, 7, 6)}, "residual"),
        ("identity", {"residual": torch.zeros(72, 7, 7)}, "residual"),
        ("identity", {"weight2": torch.zeros(24, 20, 1, 1)}, "weight2"),
        ("identity", {"weight3": torch.zeros(72, 23, 1, 1)}, "weight3"),
        ("identity", {"weight3": torch.zeros(72, 24, 3, 3)}, "weight3"),
        ("identity", {"weight_n": torch.zeros(40, 71, 1, 1)}, "weight_n"),
        ("identity", {"scale3": torch.zeros(71)}, "scale3"),
        ("identity", {"stride": 3}, "stride"),
        ("identity", {"stride": 2}, "residual"),
        ("identity", {"stride_d": 2}, "stride_d"),
        ("identity", {"shift_d": torch.zeros(72)}, "shift_d"),
        ("identity", {"act": "swish"}, "act"),
        (
            "projection",
            {"weight_d": torch.zeros(71, 33, 1, 1), "scale_d": None, "shift_d": None},
            "weight_d",
        ),
        ("projection", {"stride_d": 2}, "residual"),
        ("projection_stride2", {"stride_d": 1}, "residual"),
        ("tail", {"stride": 2}, "stride"),
        ("tail", {"weight3": None, "scale3": None, "shift3": None}, "weight3"),
        ("basic", {"weight_n": torch.zeros(40, 40, 1, 1)}, "weight_n"),
        ("one_pixel", {"x": torch.zeros(1, 20, 0, 1)}, "x"),
    ],
)
def test_errors_name_the_argument(name: str, changes: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"argument '{argument}'"):
        ops.residual_chain(**make(BY_NAME[name]) | changes)


def test_dtypes_go_together() -> None:
    arguments = make(BY_NAME["projection"])
    for name in ("residual", "weight2", "weight3", "weight_d", "weight_n", "scale2"):
        with pytest.raises(DTypeError, match=f"argument '{name}'"):
            ops.residual_chain(**arguments | {name: arguments[name].half()})
    with pytest.raises(DTypeError, match="argument 'x'"):
        ops.residual_chain(**arguments | {"x": torch.zeros(3, 20, 7, 5, dtype=torch.int32)})
