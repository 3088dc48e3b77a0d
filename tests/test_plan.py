"""The plan: sites, verification before use, JSON, the cache file."""

from __future__ import annotations

import json
import multiprocessing
import warnings

import pytest
import torch
from torch import nn

from resnet_fast import PlanError, plan
from resnet_fast.nn.site import FusedSite
from resnet_fast.plan import binding as binding_module
from resnet_fast.plan import cache
from resnet_fast.plan.candidate import CANDIDATES, Candidate, default_order, run_aten
from resnet_fast.plan.site import Site, device_name
from resnet_fast.plan.verify import framework_batch, framework_path, random_inputs, verify
from resnet_fast.testing.budget import Verdict

SITE = Site(
    op="conv_bn_act",
    x_shape=(1, 16, 9, 7),
    weight_shape=(24, 16, 3, 3),
    stride=(2, 1),
    padding=(1, 0),
    dilation=(1, 2),
    groups=1,
    act="relu",
    affine=True,
    residual=True,
    dtype="float32",
    layout="channels_last",
    device=device_name("cpu"),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_CACHE_DIR", str(tmp_path / "cache"))
    cache.forget()
    yield
    cache.forget()


def network() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(8)
            self.site1 = FusedSite("relu")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.site1(x, self.conv1, self.bn1, x)

    return Block().eval()


def test_site_shape_bytes_and_key():
    x, args, residual = random_inputs(SITE, "cpu", batch=3)
    y = run_aten(x, args, residual, SITE.act)
    assert tuple(y.shape[1:]) == SITE.out_shape[1:]
    elements = x.numel() // 3 + args.weight.numel() + 2 * y.numel() // 3
    assert SITE.bytes == 4 * elements
    other = Site(**{**vars(SITE), "x_shape": (64, 16, 9, 7)})
    assert other.key == SITE.key, "the batch is no part of the key"
    assert Site(**{**vars(SITE), "act": "none"}).key != SITE.key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("act", ["none", "relu", "silu", "relu6"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", list(CANDIDATES))
def test_every_candidate_that_accepts_a_site_is_right_there(name, dtype, act, residual, affine):
    site = Site(
        **{**vars(SITE), "dtype": dtype, "act": act, "residual": residual, "affine": affine}
    )
    refusal = CANDIDATES[name].reject(site)
    if refusal is not None:
        assert len(refusal) > 10, "a refusal says why"
        return
    verdict = verify(site, CANDIDATES[name], "cpu")
    assert verdict.ok, verdict


@pytest.mark.parametrize(
    ("x_shape", "weight_shape"), [((1, 6, 11), (8, 3, 3)), ((1, 6, 5, 4, 7), (8, 3, 3, 1, 3))]
)
@pytest.mark.parametrize("name", ["onednn", "native", "direct"])
def test_one_and_three_dimensions(name, x_shape, weight_shape):
    rank = len(x_shape) - 2
    site = Site(
        **{
            **vars(SITE),
            "x_shape": x_shape,
            "weight_shape": weight_shape,
            "stride": (1,) * rank,
            "padding": (1,) * rank,
            "dilation": (1,) * rank,
            "groups": 2,
            "layout": "contiguous",
        }
    )
    if CANDIDATES[name].reject(site) is None:
        assert verify(site, CANDIDATES[name], "cpu").ok


def test_a_wrong_candidate_is_rolled_back_and_says_so(monkeypatch):
    def wrong(x, args, residual, act):
        return run_aten(x, args, residual, act) * 1.001

    for name in default_order(SITE)[:-1]:
        monkeypatch.setitem(CANDIDATES, name, Candidate(name, lambda site: None, wrong, wrong))
    with pytest.warns(UserWarning, match="left the error budget"):
        binding = plan.resolve(SITE, torch.device("cpu"))
    assert binding.candidate.name == "aten"
    assert binding.reason == "MISMATCH"


def test_a_candidate_that_raises_or_misshapes_is_a_mismatch():
    def broken(x, args, residual, act):
        raise RuntimeError("no")

    def misshapen(x, args, residual, act):
        return run_aten(x, args, residual, act)[:, :1]

    def poisoned(x, args, residual, act):
        y = run_aten(x, args, residual, act)
        y[0, 0, 0, 0] = float("nan")
        return y

    for run in (broken, misshapen, poisoned):
        assert not verify(SITE, Candidate("x", lambda site: None, run, run), "cpu").ok


def test_verification_is_paid_once(monkeypatch):
    calls = []
    original = binding_module.verify
    monkeypatch.setattr(binding_module, "verify", lambda *a: calls.append(a) or original(*a))
    plan.resolve(SITE, torch.device("cpu"))
    first = len(calls)
    assert first >= 1
    cache.forget()
    plan.resolve(SITE, torch.device("cpu"))
    assert len(calls) == first, "the second process-life reads the verdict from the file"


def test_a_verdict_by_another_criterion_is_not_reused(monkeypatch):
    current = cache.REVISION
    monkeypatch.setattr(cache, "REVISION", current - 1)
    cache.put("k", "onednn", ok=True, error=0.0, limit=1.0)
    cache.forget()
    assert cache.get("k", "onednn") is not None
    monkeypatch.setattr(cache, "REVISION", current)
    assert cache.get("k", "onednn") is None


# At one image of no more than 20480 values torch's convolution leaves oneDNN.
SMALL = Site(
    **{
        **vars(SITE),
        "x_shape": (1, 128, 8, 8),
        "weight_shape": (128, 128, 3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "residual": False,
    }
)


def at_batch(site, batch):
    return Site(**{**vars(site), "x_shape": (batch, *site.x_shape[1:])})


def paths_differ():
    return framework_path(SMALL, "cpu", 1) != framework_path(SMALL, "cpu", 2)


def test_few_images_verify_where_the_framework_runs_the_same_algorithm():
    for batch in (1, 2, 3, 40):
        path, images = framework_batch(at_batch(SMALL, batch), "cpu")
        assert path == framework_path(SMALL, "cpu", batch) == framework_path(SMALL, "cpu", images)
        assert images <= 2
    large = Site(**{**vars(SMALL), "x_shape": (1, 128, 56, 56)})
    assert framework_batch(large, "cpu") == framework_batch(at_batch(large, 2), "cpu")


@pytest.mark.skipif("not paths_differ()", reason="one algorithm serves both batches here")
def test_a_verdict_holds_for_the_algorithm_that_is_replaced(monkeypatch):
    seen = []

    def judged(site, candidate, device):
        seen.append(site.x_shape[0])
        return Verdict(site.x_shape[0] > 1, 1.0, 2.0)

    monkeypatch.setattr(binding_module, "verify", judged)
    names = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in (2, 1, 5, 1, 2):
            names.append(plan.resolve(at_batch(SMALL, batch), torch.device("cpu")).candidate.name)
    first = names[0]
    assert first != "aten" and names == [first, "aten", first, "aten", first]
    fused = [name for name in default_order(SMALL) if name != "aten"]
    accepting = [name for name in fused if CANDIDATES[name].reject(SMALL) is None]
    assert seen == [2, *[1] * len(accepting)], "paid once an algorithm"


@pytest.mark.skipif("not paths_differ()", reason="one algorithm serves both batches here")
def test_a_model_binds_one_image_apart(monkeypatch):
    def judged(site, candidate, device):
        return Verdict(site.x_shape[0] > 1, 1.0, 2.0)

    monkeypatch.setattr(binding_module, "verify", judged)
    model = network()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in (2, 3, 1, 20, 1):
            model(torch.randn(batch, 8, 6, 6))
    rows = plan.model_rows(model)
    assert sorted((row["x_shape"][0], row["reason"]) for row in rows) == [
        (1, "MISMATCH"),
        (2, "OK"),
    ]


def test_tune_chooses_the_fastest_and_the_plan_is_obeyed():
    model = network()
    x = torch.randn(2, 8, 12, 12)
    tuned = plan.tune(model, x)
    assert len(tuned.entries) == 1
    (entry,) = tuned.entries.values()
    assert entry.microseconds == min(entry.measured.values())
    assert "aten" in entry.measured, "the framework's own path is always among the candidates"
    for name in entry.measured:
        (key,) = tuned.entries
        forced = plan.Plan(tuned.device, {key: plan.Entry(name)})
        with plan.use(forced), torch.inference_mode():
            model(x)
            (row,) = [r for r in plan.model_rows(model) if r["reason"] != "NOT_RUN"]
            assert row["candidate"] == name
    assert not model.training


def test_plan_round_trip(tmp_path):
    model = network()
    tuned = plan.tune(model, torch.randn(1, 8, 6, 6))
    file = tmp_path / "plan.json"
    plan.save_plan(tuned, file)
    again = plan.load_plan(file)
    assert again == tuned


GOOD = {
    "format": "resnet_fast plan 1",
    "device": device_name("cpu"),
    "batch": 1,
    "sites": {"k": {"candidate": "aten"}},
}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"device": 3},
        {"device": "cuda:Imaginary:sm_90"},
        {"batch": 0},
        {"batch": True},
        {"sites": []},
        {"sites": {"k": 1}},
        {"sites": {"k": {"candidate": "__import__('os')"}}},
        {"sites": {"k": {"candidate": ["aten"]}}},
        {"sites": {"k": {"candidate": "aten", "run": "x"}}},
        {"sites": {"k": {"candidate": "aten", "error": float("nan")}}},
        {"sites": {"k": {"candidate": "aten", "microseconds": -1}}},
        {"sites": {"k": {"candidate": "aten", "microseconds": 10**400}}},
        {"sites": {"k": {"candidate": "aten", "measured": {"aten": 10**400}}}},
        {"sites": {"k": {"candidate": "aten", "measured": {"other": 1.0}}}},
    ],
)
def test_a_wrong_or_hostile_plan_is_refused(change):
    assert plan.parse(json.dumps(GOOD), "cpu").entries["k"].candidate == "aten"
    with pytest.raises(PlanError, match=r"expected .* got"):
        plan.parse(json.dumps({**GOOD, **change}), "cpu")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\x00"])
def test_a_plan_that_is_no_json_is_refused(text):
    with pytest.raises(PlanError):
        plan.parse(text)


def test_a_missing_plan_file_is_a_plan_error(tmp_path):
    with pytest.raises(PlanError, match="readable file"):
        plan.load_plan(tmp_path / "none.json")


def test_a_damaged_cache_is_rebuilt_with_a_warning():
    cache.put("k", "onednn", ok=True, error=0.0, limit=1.0)
    for damage in ("", "{", '{"format": 1, "verdicts": {"k": {"ok": true}}}', "[" * 100_000):
        cache.path().write_text(damage)
        cache.forget()
        with pytest.warns(UserWarning, match="damaged"):
            assert cache.get("k", "onednn") is None
        cache.put("k", "onednn", ok=True, error=0.0, limit=1.0)
        cache.forget()
        assert cache.get("k", "onednn") == {"ok": True, "error": 0.0, "limit": 1.0}


def test_a_cached_success_must_carry_figures_that_support_it():
    cache.put("k", "onednn", ok=True, error=0.0, limit=1.0)
    text = cache.path().read_text().replace('"error": 0.0', '"error": 5.0')
    cache.path().write_text(text)
    cache.forget()
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.get("k", "onednn") is None


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("field", ["error", "limit"])
def test_a_cached_figure_beyond_every_float_is_damage(ok, field):
    cache.put("k", "onednn", ok=ok, error=0.5, limit=0.75)
    text = cache.path().read_text()
    text = text.replace({"error": "0.5", "limit": "0.75"}[field], str(10**400))
    cache.path().write_text(text)
    cache.forget()
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.get("k", "onednn") is None


def test_without_a_home_folder_verdicts_last_as_long_as_the_process(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    for name in ("RESNET_FAST_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache.Path, "home", nowhere)
    monkeypatch.setattr(cache, "_warned_unwritable", False)
    cache.forget()
    assert cache.path() is None and cache.get("k", "onednn") is None
    with pytest.warns(UserWarning, match="no home folder.* as long as this process"):
        cache.put("k", "onednn", ok=True, error=0.0, limit=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put("l", "onednn", ok=True, error=0.0, limit=1.0)
    assert cache.get("k", "onednn") == cache.get("l", "onednn") is not None


def test_an_unwritable_cache_costs_the_memory_and_not_the_run(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("RESNET_FAST_CACHE_DIR", str(blocked))
    monkeypatch.setattr(cache, "_warned_unwritable", False)
    cache.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache.put("k", "onednn", ok=True, error=0.0, limit=1.0)
        assert cache.get("k", "onednn") is not None


def _write(first: int) -> None:
    for i in range(first, first + 20):
        cache.put(f"site{i}", "onednn", ok=True, error=0.0, limit=1.0)


def test_concurrent_writers_lose_nothing():
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(20 * i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    cache.forget()
    for i in range(80):
        assert cache.get(f"site{i}", "onednn") is not None


def test_few_tiles_are_enough_for_winograd_in_fp32() -> None:
    """ResNet-50's last two stages at one image: 16 tiles of 4x4, and of 2x2."""
    for size, channels, name in ((14, 256, "winograd4"), (7, 512, "winograd2")):
        shape = (1, channels, size, size)
        site = Site(
            "conv_bn_act", shape, (channels, channels, 3, 3), (1, 1), (1, 1), (1, 1), 1, "relu",
            True, False, "float32", "channels_last", "cpu",
        )  # fmt: skip
        assert default_order(site)[0] == name


HALF = Site(
    "conv_bn_act", (2, 8, 6, 6), (8, 8, 3, 3), (1, 1), (1, 1), (1, 1), 1, "relu",
    True, False, "float16", "channels_last", "cuda:Imaginary:sm_90",
)  # fmt: skip


@pytest.fixture
def imaginary(monkeypatch):
    """The candidates of a GPU, all of them right, as far as the order goes."""
    for name in ("implicit_gemm", "triton", "conv+bn_act"):
        candidate = Candidate(name, lambda site: None, run_aten, run_aten)
        monkeypatch.setitem(CANDIDATES, name, candidate)
    cpu = torch.device("cpu")
    monkeypatch.setattr(
        binding_module, "verified", lambda site, candidate, device: (True, 0.0, 1.0)
    )
    return lambda call=None: plan.resolve(HALF, cpu, call)


def test_kernels_in_the_librarys_place_have_to_win_on_the_device(imaginary, monkeypatch):
    contenders = ["implicit_gemm", "triton", "conv+bn_act"]
    assert default_order(HALF) == (*contenders, "aten")
    for device, dtype in (
        ("cuda:Old:sm_75", "float16"),
        (HALF.device, "float32"),
        ("cuda", "float16"),
    ):
        site = Site(**{**vars(HALF), "device": device, "dtype": dtype})
        assert default_order(site) == ("conv+bn_act", "aten")
    unmeasured = imaginary()
    assert unmeasured.candidate.name == "conv+bn_act"
    assert ["not measured" in note for note in unmeasured.notes] == [True, True]
    asked = []
    for own, triton, library, winner in (
        (1.0, 3.0, 2.0, "implicit_gemm"),
        (3.0, 1.0, 2.0, "triton"),
        (2.0, 3.0, 1.0, "conv+bn_act"),
        (1.0, 1.0, 1.0, "conv+bn_act"),
        (1.0, 1.0, 2.0, "triton"),
    ):
        times = dict(zip(contenders, (own, triton, library), strict=True))

        def measured(runs, device, times=times):
            for run in runs.values():
                run()
            return {name: times[name] for name in runs}

        monkeypatch.setattr(binding_module, "measure", measured)
        found = imaginary(asked.append)
        assert found.candidate.name == winner
        beaten = contenders[: contenders.index(winner)]
        assert len(found.notes) == len(beaten)
        for name, note in zip(beaten, found.notes, strict=True):
            assert f"{name}: slower here" in note
        assert found.microseconds == (None if winner == "conv+bn_act" else times[winner])
    assert [candidate.name for candidate in asked] == contenders * 5


def test_a_plan_needs_no_second_measurement(imaginary, monkeypatch):
    monkeypatch.setattr(binding_module, "measure", lambda *a: pytest.fail("the plan decides"))
    for name in ("triton", "conv+bn_act"):
        with plan.use(plan.Plan(HALF.device, {HALF.key: plan.Entry(name, microseconds=3.0)})):
            assert imaginary().candidate.name == name


def test_the_kernel_that_runs_is_the_one_verified(monkeypatch):
    """A candidate that picks a kernel by the batch is compared at a batch that picks the same."""
    seen = []

    def run(x, args, residual, act):
        seen.append(x.shape[0])
        y = run_aten(x, args, residual, act)
        return y if x.shape[0] < 8 else y * 1.001

    def variant(site):
        return "many" if site.x_shape[0] >= 8 else "few"

    candidate = Candidate("triton", lambda site: None, run, run, variant=variant)
    monkeypatch.setitem(CANDIDATES, "triton", candidate)
    for batch, images, ok in (
        (1, 1, True),
        (4, 2, True),
        (7, 2, True),
        (8, 8, False),
        (64, 8, False),
    ):
        seen.clear()
        assert (
            binding_module.verified(at_batch(SITE, batch), candidate, torch.device("cpu"))[0] is ok
        )
        assert not seen or set(seen) == {images}
    seen.clear()
    assert not binding_module.verified(at_batch(SITE, 32), candidate, torch.device("cpu"))[0]
    assert seen == [], "kept, by the kernel"
