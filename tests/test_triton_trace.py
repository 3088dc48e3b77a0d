"""torch.compile and torch.export see through the Triton ops; traced on fake CUDA tensors."""

from __future__ import annotations

import subprocess
import sys
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
from triton.runtime.errors import OutOfResources  # noqa: E402

import resnet_fast.ops.add_act_triton  # noqa: E402
import resnet_fast.ops.bn_act_triton  # noqa: E402
import resnet_fast.ops.conv_bn_act_triton  # noqa: E402, F401
from resnet_fast import ops  # noqa: E402
from resnet_fast.errors import DTypeError, LibraryError  # noqa: E402
from resnet_fast.ops import _triton  # noqa: E402

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


PUBLIC = [*TRITON_OPS.values(), "bn_act_train", "_bn_act_train_backward"]


@pytest.mark.parametrize("op", PUBLIC)
def test_every_op_answers_on_cuda(op: str) -> None:
    """By a kernel or by a typed error, never by the dispatcher's NotImplementedError."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fast::{op}", "CUDA")


def test_public_ops_on_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        x, w, _, s = _inputs()
        y = ops.conv_bn_act(x, w, s, s, None, stride=2, padding=1, act="relu")
        assert y.shape == (4, 128, 7, 7) and y.stride() == (6272, 1, 896, 128)
        for z in (
            ops.bn_act(y, s, s, y, "silu"),
            ops.add_act(y, y, "relu"),
            ops.bn_act_train(y, s, s, None, 1e-5, "relu")[0],
        ):
            assert (z.shape, z.stride(), z.dtype) == (y.shape, y.stride(), x.dtype)
            assert z.device == x.device


def _on_cuda(op: str, *args: Any) -> Any:
    """Calls the CUDA kernel of an op itself; on CPU tensors, so that it must refuse them."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.resnet_fast, op).default.redispatch(keys, *args)


def test_what_no_cuda_kernel_runs_is_refused_in_words() -> None:
    x = torch.zeros(2, 3, 4)
    x, w = x.double(), torch.zeros(3, 3, 1).double()
    with pytest.raises(DTypeError, match=r"float16.*torch\.nn.*float64"):
        _on_cuda("conv_bn_act", x, w, None, None, None, [1], [0], [1], 1, "relu")
    with pytest.raises(ValueError, match="GPU"):
        w = w.float()
        _on_cuda("conv_bn_act", x.float(), w, None, None, None, [1], [0], [1], 1, "relu")


def test_a_kernel_that_a_device_cannot_run_is_a_library_error() -> None:
    """Triton's errors are no RuntimeErrors; whoever verifies a candidate expects those."""

    def launch_nothing(*args: Any, **options: Any) -> torch.Tensor:
        raise OutOfResources(65552, 65536, "shared memory")

    with pytest.raises(LibraryError, match=r"launch_nothing.*shared memory"):
        _triton._Traceable(launch_nothing)(torch.zeros(1))


# A process in which the CUDA library cannot be loaded.
WITHHELD = """
import sys, torch
if "no-triton" in sys.argv:
    sys.modules["triton"] = None
load = torch.ops.load_library
def withhold(path):
    if "_C_cuda" in str(path):
        raise OSError("withheld")
    load(path)
torch.ops.load_library = withhold
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from resnet_fast import _library, ops
from resnet_fast.errors import DTypeError, LibraryError
from resnet_fast.plan.candidate import CANDIDATES, ConvArgs
from resnet_fast.plan.site import Site
assert not _library.status()["cuda"].loaded
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
x, w = torch.zeros(2, 3, 4, dtype=torch.double), torch.zeros(3, 3, 1, dtype=torch.double)
c = torch.zeros(3, dtype=torch.double)
for op, args in {
    "conv_bn_act": (x, w, None, None, None, [1], [0], [1], 1, "relu"),
    "bn_act": (x, None, None, None, "relu"),
    "add_act": (x, x, "relu"),
    "_add_act_backward": (x, x, x, "relu"),
    "bn_act_train": (x, None, None, None, 1e-5, "relu"),
    "_bn_act_train_backward": (x, x, None, None, None, c, c, "relu"),
}.items():
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fast::{op}", "CUDA"), op
    try:
        getattr(torch.ops.resnet_fast, op).default.redispatch(keys, *args)
    except (DTypeError, LibraryError) as error:
        print(op, type(error).__name__, error)
site = Site("conv_bn_act", (2, 3, 5, 5), (4, 3, 1, 1), (1, 1), (0, 0), (1, 1), 1, "relu",
            True, False, "float16", "contiguous", "cuda")
print("rejected:", CANDIDATES["conv+bn_act"].reject(site))
class Names(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        print("called:", func)
        return func(*args, **(kwargs or {}))
if "no-triton" not in sys.argv:
    with FakeTensorMode(), Names():
        x = torch.empty(2, 3, 5, 5, device="cuda", dtype=torch.half)
        w, v = x.new_empty(4, 3, 1, 1), x.new_empty(4)
        args = ConvArgs(w, None, v, v, v, v, 1e-5, [1, 1], [0, 0], [1, 1], 1)
        for call in (CANDIDATES["conv+bn_act"].trace, CANDIDATES["conv+bn_act"].run):
            assert call(x, args, None, "relu").shape == (2, 4, 5, 5)
"""


def _withheld(*argv: str) -> str:
    command = [sys.executable, "-c", WITHHELD, *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_without_the_cuda_library_triton_stands_in() -> None:
    """For training batch norm there is no Triton kernel: the framework's is named."""
    out = _withheld()
    assert out.count("DTypeError") == 4
    refused = [line for line in out.splitlines() if "LibraryError" in line]
    assert [line.split()[0] for line in refused] == ["bn_act_train", "_bn_act_train_backward"]
    for line in refused:
        assert "withheld" in line and "Use torch.nn.functional.batch_norm" in line
    assert "rejected: None" in out
    assert out.count("called: resnet_fast._bn_act_triton") == 2, out
    assert "resnet_fast.bn_act." not in out


def test_with_neither_the_error_names_both() -> None:
    lines = _withheld("no-triton").splitlines()
    errors = [line for line in lines if "LibraryError" in line]
    assert len(errors) == 6
    for line in errors:
        assert "withheld" in line and "Use torch." in line
        assert "triton" in line or "bn_act_train" in line
    assert "rejected: the CUDA op library is not loaded, and Triton is not installed" in lines
