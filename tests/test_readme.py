"""README.md tells the truth: its lines run, its commands and targets exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

from resnet_fast import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_lines_of_use_fuse_both_networks(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # Neither a download nor the full size is needed to see that the lines hold.
    code = code.replace('weights="DEFAULT"', "weights=None").replace("224, 224", "64, 64")
    my_model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    names = {"my_model": my_model}
    exec(code + "\nprint(resnet_fast.explain(model).summary)", names)
    *table, network = capsys.readouterr().out.splitlines()
    assert table[-1] == "1 of 1 sites fused" and network == "53 of 53 sites fused"


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"resnet-fast ([a-z]+)", README))
    assert named >= {"info", "verify", "bench", "explain", "demo"}
    for command in named:
        assert cli.main([command, "--help"]) == 0
    capsys.readouterr()


def test_make_targets_exist() -> None:
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`(?:[A-Z]+=\S+ )*make ([a-z-]+)", text))
    assert named and named <= targets


def test_what_is_typed_by_hand_is_what_make_runs() -> None:
    """The table's third column beside the recipe of its second, `make`'s own words replaced."""
    makefile = (ROOT / "Makefile").read_text()
    rows = re.findall(r"\| `make ([a-z-]+)` \| `(.*?)` \|", README)
    assert {target for target, _ in rows} >= {"demo", "test", "bench", "lint", "wheel"}
    for target, by_hand in rows:
        (recipe,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
        for word, typed in (
            (r"\t\$\(pip\) .*\n", ""),  # installs are in the column's heading
            (r"\$\(python\) -m resnet_fast\b", "resnet-fast"),
            (r"\$\(python\) (?=-m pytest\b)", "python "),
            (r"\$\(python\) -m |\$\(VENV\)/bin/|--quiet ", ""),
            (r"\$\(cpp\)", "$(git ls-files csrc)"),
        ):
            recipe = re.sub(word, typed, recipe)
        assert re.split(r"\s*(?:&&|\n)\s*", recipe.strip()) == by_hand.split(" && ")


def test_no_install_fetches_a_torch_of_its_own() -> None:
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    built = re.findall(r"pip (?:install|wheel)[^`\n]* (?:-e )?'?\.(?=[\[`\s])[^`\n]*", text)
    assert len(built) >= 3 and all("--no-build-isolation" in line for line in built)
