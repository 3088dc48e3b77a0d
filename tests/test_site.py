"""FusedSite: the framework's numbers in every mode, and fresh parameters at every call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from resnet_fast import ArgumentError, plan, refresh
from resnet_fast.nn.site import FusedSite
from resnet_fast.ops import _pack
from resnet_fast.testing.budget import within_budget


class Cell(nn.Module):
    def __init__(self, act="relu", fused=True, bias=False, norm=nn.BatchNorm2d, **conv):
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, padding=1, bias=bias, **conv)
        self.bn = norm(12)
        self.site = FusedSite(act)
        self.fused = fused

    def forward(self, x, residual=None):
        if self.fused:
            return self.site(x, self.conv, self.bn, residual)
        y = self.bn(self.conv(x))
        y = y if residual is None else y + residual
        return torch.relu(y) if self.site.act == "relu" else y


def randomised(cell: Cell) -> Cell:
    with torch.no_grad():
        if isinstance(cell.bn, nn.BatchNorm2d):
            cell.bn.weight.uniform_(0.5, 1.5)
            cell.bn.bias.normal_()
            cell.bn.running_mean.normal_()
            cell.bn.running_var.uniform_(0.5, 2)
    return cell


def pair(**kwargs):
    ours = randomised(Cell(**kwargs))
    plain = copy.deepcopy(ours)
    plain.fused = False
    return ours, plain


def assert_same(ours, plain, x, residual=None):
    wide = copy.deepcopy(plain).double()
    with torch.inference_mode():
        truth = wide(x.double(), None if residual is None else residual.double())
        verdict = within_budget(ours(x, residual), plain(x, residual), truth)
    assert verdict.ok, verdict


def candidate(cell: Cell) -> str:
    return cell.site.rows()[-1]["candidate"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation(bias, residual, layout, dtype):
    ours, plain = pair(bias=bias)
    ours, plain = ours.to(dtype).eval(), plain.to(dtype).eval()
    x = torch.randn(3, 8, 7, 5).to(dtype).contiguous(memory_format=layout)
    r = torch.randn(3, 12, 7, 5).to(dtype) if residual else None
    assert_same(ours, plain, x, r)
    assert ours.site.rows()[0]["reason"] in ("OK", "NO_CANDIDATE", "FRAMEWORK")


def edits():
    def in_place(c):
        with torch.no_grad():
            c.conv.weight.mul_(1.5)

    def one_statistic_through_data(c):
        c.bn.running_mean.data[3] += 2

    def weight_through_data(c):
        c.conv.weight.data.mul_(0.5)

    def gamma(c):
        with torch.no_grad():
            c.bn.weight[1] = 7

    def load(c):
        c.load_state_dict({k: v * 1.25 for k, v in c.state_dict().items()})

    def new_parameter(c):
        c.conv.weight = nn.Parameter(c.conv.weight.detach() * 2)

    def to_double_and_back(c):
        c.double()
        with torch.no_grad():
            c.conv.weight.add_(0.1)
        c.float()

    def memory_format(c):
        c.to(memory_format=torch.channels_last)

    def optimiser(c):
        opt = torch.optim.SGD(c.parameters(), 0.1)
        for p in c.parameters():
            p.grad = torch.ones_like(p)
        opt.step()

    return [v for v in locals().values() if callable(v)]


@pytest.mark.parametrize("edit", edits(), ids=lambda f: f.__name__)
def test_the_next_forward_after_an_edit_is_right(edit):
    ours, _ = pair()
    ours.eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.inference_mode():
        before = ours(x).clone()
    edit(ours)
    plain = copy.deepcopy(ours)
    plain.fused = False
    assert_same(ours, plain, x)
    with torch.inference_mode():
        if edit.__name__ != "memory_format":
            assert not torch.equal(before, ours(x)), "the edit must be one that shows"


class Wide(Cell):
    """A weight beyond what the fingerprint reads whole."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 128, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(128)


def test_refresh_shows_an_edit_that_nothing_else_sees():
    ours = randomised(Wide()).eval()
    x = torch.randn(1, 8, 6, 6)
    with torch.inference_mode():
        before = ours(x)
        flat = ours.conv.weight.data.view(-1)
        flat[3] += 50
        assert torch.equal(ours(x), before), "a sampled element: this test needs another one"
    refresh()
    plain = copy.deepcopy(ours)
    plain.fused = False
    assert_same(ours, plain, x)


def plain_of(cell: Cell) -> Cell:
    plain = copy.deepcopy(cell)
    plain.fused = False
    return plain


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def conv_subclass(cell):
    conv = Doubling(8, 12, 3, padding=1, bias=False)
    conv.load_state_dict(cell.conv.state_dict())
    cell.conv = conv


def conv_patched(cell):
    inner = cell.conv.forward
    cell.conv.forward = lambda x: 2 * inner(x)


def norm_patched(cell):
    inner = cell.bn.forward
    cell.bn.forward = lambda x: inner(x) + 1


@pytest.mark.parametrize("change", [conv_subclass, conv_patched, norm_patched])
@pytest.mark.parametrize("warm", [False, True])
def test_a_forward_of_the_users_own_is_called(change, warm):
    ours = randomised(Cell()).eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.inference_mode():
        before = ours(x) if warm else None
        change(ours)
        y = torch.relu(ours.bn(ours.conv(x)))
        assert torch.equal(ours(x), y)
        assert before is None or not torch.equal(before, y)
    assert ours.site.rows()[-1]["reason"] in ("UNKNOWN_CONV", "UNKNOWN_NORM")


@pytest.mark.parametrize("which", ["conv", "bn"])
def test_parametrised_weights_stay_fresh(which):
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    ours = randomised(Cell()).eval()
    parametrize.register_parametrization(getattr(ours, which), "weight", Twice())
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        for _ in range(2):
            y = ours(x)
        getattr(ours, which).parametrizations.weight.original.mul_(3)
        truth = torch.relu(ours.bn(ours.conv(x)))
        wide = torch.relu(
            copy.deepcopy(ours.bn).double()(copy.deepcopy(ours.conv).double()(x.double()))
        )
        assert within_budget(ours(x), truth, wide).ok
        assert not torch.equal(ours(x), y)


@pytest.mark.parametrize("name", ["conv.bias", "bn.bias", "bn.weight"])
def test_one_trainable_parameter_gets_its_gradient_in_eval(name):
    ours, plain = pair(bias=True)
    x = torch.randn(2, 8, 6, 6)
    for cell in (ours, plain):
        cell.eval().requires_grad_(False)
        cell.get_parameter(name).requires_grad_()
        cell(x).square().sum().backward()
    assert torch.equal(ours.get_parameter(name).grad, plain.get_parameter(name).grad)
    assert ours.site.rows()[-1]["reason"] == "GRAD"


@pytest.mark.parametrize(
    "change", [{"stride": (2, 2)}, {"dilation": (2, 2)}, {"padding": (0, 0)}], ids=str
)
def test_geometry_is_the_modules_at_each_call(change):
    ours = randomised(Cell())
    # Wide enough for Winograd's algorithm, which knows one stride and dilation.
    ours.conv, ours.bn = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
    ours.eval()
    x = torch.randn(4, 32, 16, 16)
    assert_same(ours, plain_of(ours), x)
    assert candidate(ours).startswith("winograd")
    for name, value in change.items():
        setattr(ours.conv, name, value)
    assert_same(ours, plain_of(ours), x)


def test_what_is_written_while_values_are_derived_is_seen():
    source = torch.zeros(5)

    def build():
        copied = source.clone()
        source.add_(1)
        return copied

    assert torch.equal(_pack.cached("written meanwhile", (source,), build), torch.zeros(5))
    assert torch.equal(_pack.cached("written meanwhile", (source,), build), torch.ones(5))


def test_a_weight_tied_as_a_transposed_view():
    a, b = (nn.Conv2d(12, 12, 3, padding=1, bias=False) for _ in range(2))
    b.weight = nn.Parameter(a.weight.detach().transpose(0, 1))
    x = torch.randn(2, 12, 6, 6)
    with torch.inference_mode():
        for conv in (a, b, a):
            truth = copy.deepcopy(conv).double()(x.double())
            assert within_budget(FusedSite("none")(x, conv, None), conv(x), truth).ok


def test_fp64_stays_fp64_under_autocast():
    ours, plain = pair()
    ours, plain = ours.double().eval(), plain.double().eval()
    x = torch.randn(2, 8, 6, 6).double()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
        assert y.dtype is torch.float64
        assert torch.equal(y, plain(x))


def test_transforms_see_the_framework():
    ours, plain = pair()
    ours.eval().requires_grad_(False), plain.eval().requires_grad_(False)
    x = torch.randn(3, 2, 8, 6, 6)
    with torch.no_grad():
        ours(x[0])
        assert torch.equal(torch.func.vmap(ours)(x), torch.func.vmap(plain)(x))
    tangents = torch.ones_like(x[0])
    for a, b in zip(
        torch.func.jvp(ours, (x[0],), (tangents,)),
        torch.func.jvp(plain, (x[0],), (tangents,)),
        strict=True,
    ):
        assert torch.equal(a, b) and a.abs().max() > 0
    assert ours.site.rows()[-1]["reason"] == "TRANSFORMED"


def traced_ops(cell: Cell, x: torch.Tensor, **options) -> set[str]:
    found: set[str] = set()

    def backend(graph, inputs):
        found.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(cell, fullgraph=True, backend=backend, **options)(x)
    return {name for name in found if "resnet_fast" in name}


def test_a_trace_runs_what_was_verified_at_its_size():
    ours = randomised(Cell()).eval()
    seen, other = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 9, 9)
    assert not traced_ops(ours, seen), "nothing has been verified yet"
    with torch.no_grad():
        ours(seen)
    assert traced_ops(ours, seen) and traced_ops(ours, torch.randn(5, 8, 6, 6))
    assert not traced_ops(ours, other), "verified at another size"
    assert not traced_ops(ours, seen[:1]), "one image is verified apart"
    assert traced_ops(ours, other, dynamic=True), "an open size takes what held so far"
    with plan.use(plan.Plan(plan.device_name("cpu"))):
        assert not traced_ops(ours, seen), "bindings of another plan"


def test_sizes_without_end_are_not_all_kept():
    ours = randomised(Cell()).eval()
    with torch.inference_mode():
        for size in range(3, 103):
            ours(torch.randn(1, 8, 3, size))
    assert len(ours.site.rows()) <= 64


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("residual", [False, True])
def test_training_step(momentum, residual):
    ours, plain = pair()
    for c in (ours, plain):
        c.bn.momentum = momentum
        c.train()
    wide = copy.deepcopy(plain).double()
    x = torch.randn(4, 8, 7, 5)
    r = torch.randn(4, 12, 7, 5) if residual else None
    g = torch.randn(4, 12, 7, 5)
    results = []
    for cell, dtype in ((ours, torch.float32), (plain, torch.float32), (wide, torch.float64)):
        xi = x.detach().clone().to(dtype).requires_grad_()
        ri = None if r is None else r.detach().clone().to(dtype).requires_grad_()
        for _ in range(2):
            y = cell(xi, ri)
        y.backward(g.to(dtype))
        tensors = {"y": y.detach(), "grad_x": xi.grad}
        if ri is not None:
            tensors["grad_residual"] = ri.grad
        tensors |= {f"grad_{k}": p.grad for k, p in cell.named_parameters()}
        tensors |= dict(cell.named_buffers())
        results.append(tensors)
    for key, value in results[0].items():
        if value.is_floating_point():
            verdict = within_budget(value, results[1][key], results[2][key])
            assert verdict.ok, (key, verdict)
        else:
            assert torch.equal(value, results[1][key]), key


def test_reasons():
    x = torch.randn(2, 8, 6, 6)

    def reason(cell, call=None):
        with torch.inference_mode():
            (call or (lambda: cell(x)))()
        return cell.site.rows()[-1]["reason"]

    cell = Cell().eval()
    assert cell.site.rows()[0]["reason"] == "NOT_RUN"
    cell(x)
    assert cell.site.rows()[-1]["reason"] == "GRAD"
    cell = Cell().eval()
    fired = []
    cell.conv.register_forward_hook(lambda *a: fired.append(1))
    assert reason(cell) == "HOOKED" and fired
    assert reason(Cell(norm=lambda c: nn.GroupNorm(3, c)).eval()) == "UNKNOWN_NORM"
    assert reason(Cell(padding_mode="reflect").eval()) == "PADDING_MODE"
    norm = lambda c: nn.BatchNorm2d(c, track_running_stats=False)  # noqa: E731
    assert reason(Cell(norm=norm).eval()) == "BATCH_STATS"
    cell = Cell().eval()
    assert reason(cell, lambda: cell(x, torch.randn(1, 12, 1, 1))) == "RESIDUAL_SHAPE"


def test_unknown_activation():
    with pytest.raises(ArgumentError, match="act"):
        FusedSite("swish")


def test_copies_and_pickles_plan_afresh():
    cell = randomised(Cell()).eval()
    x = torch.randn(1, 8, 6, 6)
    with torch.inference_mode():
        y = cell(x)
        for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
            assert other.site.rows()[0]["reason"] == "NOT_RUN"
            assert torch.equal(other(x), y)


def test_autocast_and_inference_parameters():
    ours, plain = pair()
    ours.eval(), plain.eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y, z = ours(x), plain(x)
    assert y.dtype == z.dtype == torch.bfloat16
    wide = copy.deepcopy(plain).double()
    with torch.inference_mode():
        assert within_budget(y, z, wide(x.double())).ok
        made_inside = randomised(Cell()).eval()
        before = made_inside(x)
        made_inside.conv.weight[0, 0, 0, 0] += 100
        assert not torch.equal(before, made_inside(x))


@pytest.mark.parametrize("planned", [False, True])
def test_compile_sees_one_graph(planned):
    ours, plain = pair()
    ours.eval(), plain.eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        if planned:
            ours(x)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        truth = copy.deepcopy(plain).double()(x.double())
        assert within_budget(compiled(x), plain(x), truth).ok
        ours.conv.weight.mul_(2)
        plain.conv.weight.mul_(2)
        truth = copy.deepcopy(plain).double()(x.double())
        assert within_budget(compiled(x), plain(x), truth).ok, "stale packed weights"


def test_training_in_bf16_keeps_the_parameters_dtype():
    ours, plain = pair()
    ours, plain = ours.to(torch.bfloat16).train(), plain.to(torch.bfloat16).train()
    x = torch.randn(4, 8, 7, 5).bfloat16()
    wide = copy.deepcopy(plain).double()
    y, z, truth = ours(x), plain(x), wide(x.double())
    assert within_budget(y.detach(), z.detach(), truth.detach()).ok
    y.sum().backward()
    assert ours.bn.weight.grad.dtype is torch.bfloat16
    for (name, a), (_, b) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
        assert a.dtype is b.dtype, name


def test_a_new_eps_is_seen():
    ours, plain = pair()
    ours.eval(), plain.eval()
    x = torch.randn(2, 8, 6, 6)
    assert_same(ours, plain, x)
    ours.bn.eps = plain.bn.eps = 0.5
    assert_same(ours, plain, x)


def test_onnx_gets_the_frameworks_operators(monkeypatch):
    ours, plain = pair()
    ours.eval(), plain.eval()
    x = torch.randn(2, 8, 6, 6)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with torch.inference_mode():
        assert torch.equal(ours(x), plain(x))
    assert ours.site.rows()[-1]["reason"] == "ONNX"
