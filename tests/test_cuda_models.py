"""Networks on a device, whole: evaluation, training, plans, compilation, graph capture."""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resnet_fast import models, plan
from resnet_fast.nn.site import FusedSite
from resnet_fast.plan import cache
from resnet_fast.plan.candidate import CANDIDATES
from resnet_fast.plan.site import Site
from resnet_fast.plan.verify import verify
from resnet_fast.testing.budget import expect_within_budget, in_formats
from resnet_fast.testing.networks import randomize_batchnorm_
from resnet_fast.testing.step import Comparison

tv = pytest.importorskip("torchvision")

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
NETWORKS = ("resnet18", "resnet50")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# This package's kernels. cuDNN's fused call may round its folded weights beyond the budget, and is
# then not used.
OURS = ("implicit_gemm", "triton", "conv+bn_act", "native")
FORCED = ("cudnn", "conv+bn_act", "triton", "implicit_gemm")


@pytest.fixture(autouse=True)
def own_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Verdicts are of this run, and memory is given back after it."""
    monkeypatch.setenv("RESNET_FAST_CACHE_DIR", str(tmp_path / "cache"))
    cache.forget()
    yield
    cache.forget()
    gc.collect()


class Pair:
    """A network, torchvision's of the same weights, and an input, in one dtype."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, batch: int = 4) -> None:
        torch.manual_seed(1)
        ours = randomize_batchnorm_(models.build(name, num_classes=10), seed=2)
        theirs = getattr(tv.models, name)(num_classes=10)
        theirs.load_state_dict(ours.state_dict())
        self.name, self.dtype = name, dtype
        self.ours = ours.to(DEVICE, dtype).eval()
        self.theirs = theirs.to(DEVICE, dtype).eval()
        self.x = self.images(batch)

    def images(self, batch: int) -> Tensor:
        return torch.randn(batch, 3, 64, 64).to(DEVICE, self.dtype)

    @torch.no_grad()
    def expect(self, actual: Tensor, x: Tensor) -> None:
        """``actual`` is the network's answer to ``x``, within budget."""
        assert actual.dtype == self.dtype and actual.device.type == torch.device(DEVICE).type
        frameworks = in_formats(self.theirs, x)
        wide = copy.deepcopy(self.theirs).double()
        expect_within_budget(actual, frameworks, wide(x.double()))


def sites(model: nn.Module) -> dict[str, Site]:
    """The sites that ``model`` has run, by key."""
    fused = [module for module in model.modules() if isinstance(module, FusedSite)]
    return {site.key: site for f in fused for _, site in f._bindings.values()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_matches_torchvision(
    name: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    pair = Pair(name, dtype)
    ours = pair.ours.to(memory_format=layout)
    x = pair.x.contiguous(memory_format=layout)
    with torch.inference_mode():
        for _ in range(2):  # the second call is prepared by the first
            pair.expect(ours(x), x)
    rows = plan.model_rows(ours)
    assert rows and all(row["reason"] in ("OK", "NO_CANDIDATE") for row in rows), rows


@pytest.mark.parametrize("name", NETWORKS)
def test_training_step_matches_torchvision(name: str) -> None:
    pair = Pair(name)
    x, y = pair.images(8), torch.arange(8, device=DEVICE)
    Comparison(pair.theirs.train(), x, y).expect(name, pair.ours.train())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_candidate_of_every_site(name: str, dtype: torch.dtype) -> None:
    """Tuned; what the plan chose held, and so does every kernel of this package, chosen or not."""
    pair = Pair(name, dtype)
    model = pair.ours.to(memory_format=torch.channels_last)
    x = pair.x.contiguous(memory_format=torch.channels_last)
    tuned = plan.tune(model, x)
    found = sites(model)
    assert set(found) <= set(tuned.entries) and len(found) > 8
    for key in found:
        entry = tuned.entries[key]
        assert "aten" in entry.measured
        assert entry.microseconds == min(entry.measured.values()) > 0
        assert entry.candidate == "aten" or entry.error <= entry.limit, (key, entry)
    tried = set()
    for key, site in found.items():
        for candidate in CANDIDATES.values():
            if candidate.name == "aten" or candidate.reject(site) is not None:
                continue
            tried.add(candidate.name)
            verdict = verify(site, candidate, DEVICE)
            assert math.isfinite(verdict.error), f"{candidate.name} raised at {key}"
            assert verdict.ok or candidate.name.split(":")[0] not in OURS, (
                candidate.name,
                key,
                verdict,
            )
    assert tried & set(OURS)
    with plan.use(tuned), torch.inference_mode():
        pair.expect(model(x), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("candidate", FORCED)
@pytest.mark.parametrize("name", NETWORKS)
def test_forced_candidate(name: str, candidate: str, dtype: torch.dtype) -> None:
    """A plan that names one candidate wherever that accepts the site, and is obeyed."""
    pair = Pair(name, dtype)
    model = pair.ours.to(memory_format=torch.channels_last)
    x = pair.x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        model(x)
        found = sites(model)
        accepting = {k for k, s in found.items() if CANDIDATES[candidate].reject(s) is None}
        if not accepting:
            pytest.skip(CANDIDATES[candidate].reject(next(iter(found.values()))) or "")
        entries = {key: plan.Entry(candidate) for key in accepting}
        forced = plan.Plan(plan.device_name(torch.device(DEVICE)), entries)
        with plan.use(forced), warnings.catch_warnings():
            # Beyond the budget cuDNN's call gives way, with a warning.
            warnings.simplefilter("error" if candidate in OURS else "ignore")
            for _ in range(2):  # the second call is prepared by the first
                pair.expect(model(x), x)
            chosen = [row["candidate"] for row in plan.model_rows(model)]
    assert chosen.count(candidate) >= (len(accepting) if candidate in OURS else 1), chosen


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_whole(name: str, dtype: torch.dtype) -> None:
    """One graph of a warmed model, for two batches."""
    torch._dynamo.reset()
    pair = Pair(name, dtype)
    with torch.inference_mode():
        pair.ours(pair.x)
    with torch.no_grad():
        compiled = torch.compile(pair.ours, fullgraph=True)
        for x in (pair.x, pair.images(6)):
            pair.expect(compiled(x), x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_graph_capture(name: str, dtype: torch.dtype) -> None:
    """A warmed forward is captured, and replays on what its input then holds."""
    if torch.device(DEVICE).type != "cuda":
        pytest.skip("only CUDA has graphs")
    pair = Pair(name, dtype)
    x, other = pair.x, pair.images(len(pair.x))
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                pair.ours(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = pair.ours(x)
        y.fill_(math.nan)
        x.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        pair.expect(y.clone(), x)
