"""torch.compile and torch.export see through the Triton ops; traced on fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from resnet_fast import kernels

AVAILABLE, REASON = kernels.available()
if not AVAILABLE:
    pytest.skip(REASON, allow_module_level=True)

import triton  # noqa: E402
from torch._functorch.aot_autograd import aot_export_module  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

import resnet_fast.ops.add_act_triton  # noqa: E402
import resnet_fast.ops.bn_act_triton  # noqa: E402
import resnet_fast.ops.conv_bn_act_triton  # noqa: E402, F401

TRITON_OPS = {
    "_conv_bn_act_triton": "conv_bn_act",
    "_bn_act_triton": "bn_act",
    "_add_act_triton": "add_act",
    "_add_act_backward_triton": "_add_act_backward",
}


class _Driver:
    """The target that torch asks Triton for when it looks which arguments a kernel writes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def _target(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
    yield


class Block(torch.nn.Module):
    """All the ops, one after the other."""

    def forward(self, x: torch.Tensor, w: torch.Tensor, p: torch.Tensor, s: torch.Tensor) -> Any:
        ops = torch.ops.resnet_fast
        y = ops._conv_bn_act_triton(x, w, s, s, None, [2, 2], [1, 1], [1, 1], 1, "relu")
        z = ops._conv_bn_act_triton(y, p, s, s, y, [1, 1], [0, 0], [1, 1], 1, "none")
        z = ops._bn_act_triton(z, s, s, None, "silu")
        g = ops._add_act_backward_triton(z, y, z, "relu")
        return (ops._add_act_triton(g, y, "relu"),)


def _inputs() -> tuple[torch.Tensor, ...]:
    x = torch.empty(4, 64, 14, 14, device="cuda", dtype=torch.half)
    w = torch.empty(128, 64, 3, 3, device="cuda", dtype=torch.half)
    p = torch.empty(128, 128, 1, 1, device="cuda", dtype=torch.half)
    return x.contiguous(memory_format=torch.channels_last), w, p, torch.empty(128, device="cuda")


@pytest.mark.parametrize("name, op", TRITON_OPS.items())
def test_schema_is_the_ops_own(name: str, op: str) -> None:
    if not hasattr(torch.ops.resnet_fast, op):
        pytest.skip("the CPU op library is not loaded")
    theirs = str(getattr(torch.ops.resnet_fast, op).default._schema)
    ours = str(getattr(torch.ops.resnet_fast, name).default._schema)
    assert ours.replace(name, op) == theirs


def test_fake_output_layout() -> None:
    with FakeTensorMode():
        x, w, _, s = _inputs()
        op = torch.ops.resnet_fast._conv_bn_act_triton
        y = op(x, w, s, s, None, [2, 2], [1, 1], [1, 1], 1, "relu")
        assert y.shape == (4, 128, 7, 7) and y.stride() == (6272, 1, 896, 128)
        y = op(x.contiguous(), w, s, s, None, [2, 2], [1, 1], [1, 1], 1, "relu")
        assert y.is_contiguous()


def test_aot_graph_holds_the_kernels(_target: None) -> None:
    """What torch.compile's backend receives: Triton nodes, each writing its output only."""
    with FakeTensorMode():
        graph, _ = aot_export_module(Block(), _inputs(), trace_joint=False)
    nodes = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert len(nodes) == 5
    for node in nodes:
        (written,) = node.kwargs["tensors_to_clone"]
        assert written in ("y_ptr", "grad_ptr")


def test_export_keeps_the_ops_for_any_batch(_target: None) -> None:
    with FakeTensorMode():
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(
            Block(), _inputs(), dynamic_shapes=({0: batch}, None, None, None)
        )
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert sum("_triton" in n for n in names) == 5


def test_a_cpu_tensor_is_refused_in_words() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="GPU"):
        torch.ops.resnet_fast._add_act_triton(x, x, "relu")
