"""Every op has all its parts, every room keeps to what belongs there."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import resnet_fast
from resnet_fast import _library, models, ops
from resnet_fast.ops import activation
from resnet_fast.testing import cases, reordered, shapes

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "resnet_fast"
PRIVATE = {"add_act": "_add_act_backward", "bn_act_train": "_bn_act_train_backward"}
# Parts of the registrations that pack weights (resnet_fast/ops/conv_bn_act_<algorithm>.py).
PARTS = {"_direct_weight", "_direct_conv", "_winograd_weight", "_winograd_conv"}
PARTS |= {"_int8_weight", "_int8_conv", "_int8_quantize", "_int8_dequantize"}
# What serves all ops: the memory of their outputs, and a network's layers as one call.
SHARED = {
    "_release_memory": "pool",
    "_make_sequence": "sequence",
    "_run_sequence": "sequence",
    "_sequence_bytes": "sequence",
    "_free_sequence": "sequence",
    "_int8_mean": "int8_head",
    "_int8_linear": "int8_head",
    "_max_pool": "max_pool",
    "_max_pool_backward": "max_pool",
}
# Backends of an op beyond the CPU's.
KERNELS = {"conv_bn_act", "add_act", "bn_act"}
CUDA = {"add_act", "bn_act", "bn_act_train"}
# Ops whose CUDA kernel is a registration of its own: the plan chooses it, or another.
CUDA_FORMS = {"conv_bn_act", "stem_pool"}
# Ops with C++ sources.
OWNERS = {*ops.OPS, *ops.TRAINING, *CUDA_FORMS}
# The kernel of an op of training, which the op runs where it takes the tensors.
TRAINING_KERNELS = {"_conv_stats_cuda"}
# The algorithms of the sources that are named for their op alone.
UNNAMED = {
    "conv_bn_act": ["panel_gemm", "depthwise"],
    "bn_act": ["affine"],
    "add_act": ["affine"],
    "bn_act_train": ["two_pass"],
}


def read(path: str) -> str:
    file = ROOT / path
    assert file.is_file(), f"{path} is missing"
    return file.read_text()


def schemas() -> dict[str, str]:
    """Schema by op name, as csrc/ops.cpp declares them."""
    found = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', read("csrc/ops.cpp"))
    texts = ["".join(re.findall(r'"([^"]*)"', text)) for text in found]
    return {text.split("(", 1)[0]: text for text in texts}


def argument_names(schema: str) -> list[str]:
    inside = schema.split("(", 1)[1].rsplit(") ->", 1)[0]
    return [argument.split("=")[0].split()[-1] for argument in inside.split(", ")]


def imports(path: Path) -> list[str]:
    """Absolute names of all modules that a file imports, from-imports with the name appended."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = ".".join(package[: len(package) - node.level])
                base = f"{parent}.{base}" if base else parent
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def test_schemas_are_the_listed_ops_their_backwards_and_parts() -> None:
    listed = {*ops.OPS, *ops.FUSED, *ops.TRAINING}
    forms = {f"_{op}_cuda" for op in CUDA_FORMS}
    private = set(PRIVATE.values()) | PARTS | TRAINING_KERNELS
    assert set(schemas()) == listed | private | set(SHARED) | forms


@pytest.mark.parametrize("op", sorted(CUDA_FORMS))
def test_an_ops_cuda_form_has_its_parts(op: str) -> None:
    assert f'm.impl("_{op}_cuda"' in read(f"csrc/cuda/{op}.cu")
    assert f'register_fake("resnet_fast::_{op}_cuda"' in read(f"resnet_fast/ops/{op}_cuda.py")
    read(f"tests/cuda_on_host/{op}.cpp")
    taken, added = argument_names(schemas()[op]), argument_names(schemas()[f"_{op}_cuda"])
    assert added[: len(taken)] == taken


@pytest.mark.parametrize("algorithm", ["direct", "winograd", "onednn"])
def test_packing_registrations(algorithm: str) -> None:
    text = read(f"resnet_fast/ops/conv_bn_act_{algorithm}.py")
    assert f"_conv_bn_act_{algorithm}" in text and "like_convolution" in text
    if algorithm != "onednn":
        assert f'"_{algorithm}_conv"' in read(f"csrc/cpu/conv_bn_act_{algorithm}.cpp")


@pytest.mark.parametrize("op", ops.FUSED)
def test_an_op_of_several_layers_is_made_of_ops_and_has_a_kernel(op: str) -> None:
    text = read(f"resnet_fast/ops/{op}.py")
    assert f'_several.implement("{op}", ' in text and "resnet_fast.conv_bn_act" in text
    assert f"def launch_{op}(" in read(f"kernels/{op}.py")
    read(f"tests/interpreted/{op}.py")
    read(f"tests/test_{op}.py")
    name = f"resnet_fast::{op}"
    for key in ("CPU", "CUDA", "Autograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None


@pytest.mark.parametrize("op", [*ops.OPS, *ops.FUSED])
def test_contract_is_whole(op: str) -> None:
    module = ops.module(op)
    function = getattr(ops, op)
    assert function is getattr(module, op)
    expected = argument_names(schemas()[op])
    for part in (function, module.check, module.reference):
        assert list(inspect.signature(part).parameters) == expected
    doc = inspect.getdoc(function) or ""
    for heading in ("``y = ", "et al." if op != "bn_act_train" else "Szegedy", "Args:"):
        assert heading in doc
    for heading in ("Returns:", "Raises:", "ArgumentError", "DTypeError", "LibraryError"):
        assert heading in doc
    for name in expected:
        assert re.search(rf"\b{name}\b", doc.split("Args:")[1]), f"{name} is not documented"
    assert module.reference.__doc__ and module.check.__doc__


@pytest.mark.parametrize("op", [*ops.OPS, *ops.FUSED])
def test_ops_say_their_work(op: str) -> None:
    """What inference runs is in the traffic account (resnet_fast/ops/_work.py)."""
    if op == "bn_act_train":
        return
    work = ops.module(op).work
    assert list(inspect.signature(work).parameters) == argument_names(schemas()[op])
    assert work.__doc__


@pytest.mark.parametrize("op", [*ops.OPS, *ops.FUSED, *PRIVATE.values()])
def test_registrations(op: str) -> None:
    name = f"resnet_fast::{op}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None
    if op in (*ops.OPS, *ops.FUSED):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd")
    if op in ops.FUSED:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


@pytest.mark.parametrize("op", ops.OPS)
def test_sources(op: str) -> None:
    assert f'"{op}"' in read(f"csrc/cpu/{op}.cpp")
    assert (PACKAGE / "ops" / f"{op}.py").is_file()
    if op in PRIVATE:
        assert f'"{PRIVATE[op]}"' in read(f"csrc/cpu/{op}.cpp")
    if op in CUDA:
        for name in (op, *([PRIVATE[op]] if op in PRIVATE else ())):
            assert f'"{name}"' in read(f"csrc/cuda/{op}.cu")
    if op in KERNELS:
        assert f"def launch_{op}(" in read(f"kernels/{op}.py")
        assert f"_{op}_triton" in read(f"resnet_fast/ops/{op}_triton.py")


@pytest.mark.parametrize("op", ops.FUSED)
def test_sources_of_several_layers(op: str) -> None:
    assert (PACKAGE / "ops" / f"{op}.py").is_file()
    assert f"def launch_{op}(" in read(f"kernels/{op}.py")
    assert f"launch_{op}" in read(f"tests/interpreted/{op}.py")
    assert f'"{op}/' in read("tests/data/triton_resources.json")


def test_no_source_without_an_op() -> None:
    """A file whose stem is no op's is shared code, and registers what is listed as such."""
    for file in [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")]:
        owned = any(file.stem == op or file.stem.startswith(f"{op}_") for op in OWNERS)
        if not owned and file.stem not in SHARED.values():
            assert "STABLE_TORCH_LIBRARY" not in file.read_text(), file.name


def included(path: str) -> str:
    """A source with the headers of its own folder, one level deep."""
    text = read(path)
    headers = re.findall(r'#include "(\w+\.h)"', text)
    return text + "".join(read(f"csrc/cpu/{name}") for name in headers if name != "isa.h")


def sets_by_kernel() -> dict[tuple[str, str], set[str]]:
    """Instruction sets by op and algorithm, as the file names and dispatches of csrc/cpu say."""
    enum = re.search(r"enum class Isa \{(.*?)\}", read("csrc/cpu/isa.h"))
    assert enum is not None
    all_sets = set(re.findall(r"\w+", enum[1]))
    found: dict[tuple[str, str], set[str]] = {}
    for file in sorted(ROOT.glob("csrc/cpu/*.cpp")):
        op = max((op for op in ops.OPS if file.stem.startswith(op)), key=len, default=None)
        if op is None:
            continue
        text = included(f"csrc/cpu/{file.name}")
        algorithm, *own = re.split(r"_(?=avx)", file.stem.removeprefix(op))
        sets = set(own) or (all_sets if "run_on_isa(" in text else all_sets - {"avx512"})
        tiles = re.findall(r"convolve<(\d), ", text) or [""]
        names = [algorithm[1:] + tile for tile in tiles] if algorithm else UNNAMED[op]
        for name in names:
            found.setdefault((op, name), set()).update(sets)
    return found


def test_kernel_variants_are_those_of_the_sources() -> None:
    """``resnet-fast info`` lists each source's kernels, for the sets it is compiled for."""
    native = _library.native()
    assert native is not None
    listed: dict[tuple[str, str], set[str]] = {}
    for row in native.kernel_variants():
        if row["device"] == "cpu":
            key = row["op"], row["name"].split("/")[2]
            assert row["isa"] not in listed.setdefault(key, set())
            listed[key].add(row["isa"])
    assert listed == sets_by_kernel()
    build = native.build_info()
    if build["cuda_arch_list"] and not build["cuda_resources_absence"]:
        cuda = {row["source"] for row in native.kernel_variants() if row["device"] == "cuda"}
        assert cuda == {file.stem for file in ROOT.glob("csrc/cuda/*.cu")}


@pytest.mark.parametrize("op", ops.OPS)
def test_cases(op: str) -> None:
    entries = cases.CASES[op]
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names)
    assert {entry.act for entry in entries} >= set(activation.ACTIVATIONS)
    assert {len(entry.x) for entry in entries} >= {3, 4, 5}
    if op != "bn_act_train":
        assert any(0 in entry.x for entry in entries)
    assert op in reordered.REORDERED
    assert type(entries[0]).__name__ in read("benchmarks/test_bench_ops.py")


def test_every_network_is_exported() -> None:
    for name in models.list_models():
        assert name in resnet_fast.__all__
        assert getattr(resnet_fast, name) is getattr(models, name)


def test_activations_have_one_order() -> None:
    """The Python table, the native one and Triton's count alike."""
    header = read("csrc/math/activation.h")
    names = re.search(r"kActNames\[\w+\]\s*=\s*\{(.*?)\}", header, re.DOTALL)
    assert names is not None
    assert tuple(re.findall(r'"(\w+)"', names[1])) == activation.ACTIVATIONS
    enum = re.search(r"enum class Act[^{]*\{(.*?)\}", header, re.DOTALL)
    assert enum is not None
    assert tuple(re.findall(r"\w+", enum[1])) == activation.ACTIVATIONS


PYTHON = sorted(PACKAGE.rglob("*.py"))
# A room imports from the rooms before it, never from one after it.
ROOMS = ("kernels", "ops", "plan", "nn", "models", "fuse", "bench", "cli")


def test_triton_stays_in_kernels() -> None:
    for file in PYTHON:
        for name in imports(file):
            assert not inside(name, "triton"), f"{file.relative_to(ROOT)} imports {name}"


def test_kernels_stand_alone() -> None:
    for file in sorted((ROOT / "kernels").glob("*.py")):
        text = file.read_text()
        assert "torch.library" not in text, file.name
        for name in imports(file):
            allowed = not inside(name, "resnet_fast") or inside(name, "resnet_fast.kernels")
            assert allowed, f"kernels/{file.name} imports {name}"


def test_arrows_point_down() -> None:
    for file in PYTHON:
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room not in ROOMS:
            continue
        for later in ROOMS[ROOMS.index(room) + 1 :]:
            for name in imports(file):
                wrong = inside(name, f"resnet_fast.{later}")
                assert not wrong, f"{file.relative_to(ROOT)} imports {name}"


def test_testing_is_not_imported_by_the_product() -> None:
    """Cases and shapes are for tests, benchmarks and commands; plan shares the budget alone."""
    for file in PYTHON:
        room = file.relative_to(PACKAGE).parts[0]
        if room in ("ops", "nn", "models", "fuse"):
            for name in imports(file):
                ok = not inside(name, "resnet_fast.testing") or "budget" in name
                assert ok, f"{file.relative_to(ROOT)} imports {name}"
        for name in imports(file):
            assert not inside(name, "tests"), f"{file.relative_to(ROOT)} imports {name}"


def test_torch_headers_stay_in_one_file() -> None:
    sources = [f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    for file in sources:
        if file.name in ("stable.h", "native.cpp"):
            continue
        found = re.findall(r"#\s*include\s*[<\"](?:torch|ATen|c10)/[^>\"]*", file.read_text())
        assert not found, f"{file.relative_to(ROOT)}: {found}"


def test_shared_arithmetic_knows_neither_torch_nor_the_runtime() -> None:
    for file in sorted((ROOT / "csrc" / "math").glob("*.h")):
        text = file.read_text()
        assert not re.search(r"#\s*include\s*[<\"](?:torch|ATen|c10|cuda_runtime)", text), file.name


@pytest.mark.parametrize("network", shapes.NETWORKS)
def test_shapes_count_the_published_multiply_adds(network: str) -> None:
    """torchvision states each network's multiply-adds at 224² beside its weights, in 10⁹."""
    models = pytest.importorskip("torchvision.models")
    weights = models.get_model_weights(network).IMAGENET1K_V1
    assert round(shapes.macs(network) / 1e9, 3) == weights.meta["_ops"]


@pytest.mark.parametrize("network", ["resnet18", "resnext50_32x4d"])
def test_shapes_are_those_of_the_model(network: str) -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.get_model(network, weights=None)
    found: list[tuple[int, ...]] = []

    def note(conv: torch.nn.Conv2d, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        height = args[0].shape[2]
        entry = (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0])
        found.append((*entry, conv.groups, height))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(note)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    walked = [(s.c, s.k, s.r, s.stride, s.groups, s.h) for s in shapes.walk(network)]
    assert sorted(walked) == sorted(found)
    assert sum(shapes.conv_sites(network).values()) == len(found)
