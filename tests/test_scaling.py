"""The scaling table: which points are run, what a cliff is, what is drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import scaling
from benchmarks.scaling import Point
from resnet_fast.errors import ArgumentError

PEERS = ("eager_nhwc", "openvino")


def rows_of(
    engine: str, times: dict[tuple[int, int], float], threads: int = 2
) -> list[dict[str, Any]]:
    """Rows of (batch, size): milliseconds."""
    return [
        {
            "model": "resnet50",
            "dtype": "fp32",
            "engine": engine,
            "threads": threads,
            "batch": batch,
            "size": size,
            "median_ms": ms,
        }
        for (batch, size), ms in times.items()
    ]


def level(ms: float) -> dict[tuple[int, int], float]:
    """Times in proportion to the pixels, ``ms`` for one image of 100²."""
    where = ((1, 100), (2, 100), (4, 100), (1, 50), (1, 200))
    return {(batch, size): ms * batch * (size / 100) ** 2 for batch, size in where}


def network(**changed: float) -> list[dict[str, Any]]:
    """This package beside two peers; keyword ``b4=ms`` or ``s200=ms`` replaces a time of its."""
    ours = level(10)
    for at, ms in changed.items():
        ours[(int(at[1:]), 100) if at[0] == "b" else (1, int(at[1:]))] = ms
    return [
        *rows_of(scaling.OUR, ours),
        *rows_of("eager_nhwc", level(30)),
        *rows_of("openvino", level(12)),
    ]


def test_points_are_run_once() -> None:
    found = scaling.points([1, 2], [1, 4], [64, 224], 224)
    assert found == [
        Point(1, 1, 224),
        Point(1, 4, 224),
        Point(1, 1, 64),
        Point(2, 1, 224),
        Point(2, 4, 224),
        Point(2, 1, 64),
    ]


def test_axes_are_sorted_and_hold_the_shared_point() -> None:
    found = {axis: line for _, axis, line in scaling.axes_of(network())}
    assert [row["batch"] for row in found["batch"] if row["engine"] == "openvino"] == [1, 2, 4]
    assert [row["size"] for row in found["size"] if row["engine"] == "openvino"] == [50, 100, 200]


def test_level_lines_have_no_cliff() -> None:
    assert [factor for factor, _ in scaling.cliffs(network())] == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(
    ("changed", "step"), [({"b4": 80.0}, "batch 2 to 4"), ({"s200": 80.0}, "size 100 to 200")]
)
def test_a_cliff_is_found(changed: dict[str, float], step: str) -> None:
    factor, where = scaling.cliffs(network(**changed))[0]
    assert factor == pytest.approx(2.0)
    assert where == f"{step}, 2 threads"


def test_a_cliff_that_a_peer_has_is_none() -> None:
    steep = level(12) | {(4, 100): 96.0}
    rows = [*network(b4=80.0), *rows_of("onnxruntime", steep)]
    assert scaling.cliffs(rows)[0][0] == pytest.approx(1.0)


def test_the_table_says_what_is_missing() -> None:
    rows = network()
    del rows[-1]["median_ms"]
    rows[0]["vs_best_peer"] = 1.2
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(scaling.table(rows))
    text = [line.split() for line in console.export_text().splitlines()]
    assert ["2", "1", "100", "10", "30", "12", "1.20"] in text
    assert ["2", "1", "200", "40", "120", "-", "-"] in text


def test_the_plot_names_engines_and_axes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import matplotlib as mpl

    path = tmp_path / "scaling.svg"
    result = {
        "environment": {"cpu": "a CPU"},
        "rows": [*network(), *rows_of("openvino", level(20), threads=1)],
    }
    with mpl.rc_context({"svg.fonttype": "none"}):
        scaling.plot(result, path)
    text = path.read_text()
    for words in ("resnet_fast", "openvino", "2 threads", "1 thread<", "images of 100", "a CPU"):
        assert words in text


def test_every_point_is_inside_the_plot() -> None:
    pytest.importorskip("matplotlib")
    steep = level(20) | {(1, 50): 4000.0}
    figure = scaling.draw({"environment": {"cpu": "a CPU"}, "rows": network(s50=90.0)})
    beside = [*network(), *rows_of("onnxruntime", steep), *rows_of("openvino", level(9), 1)]
    for drawn in (figure, scaling.draw({"environment": {"cpu": "a CPU"}, "rows": beside})):
        for panel in drawn.axes:
            low, high = panel.get_ylim()
            points = [y for line in panel.lines for y in line.get_ydata()]
            assert points and low == 0 and max(points) < high


def test_another_kind_of_plot_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="plot"):
        scaling.main(["--plot", str(tmp_path / "scaling.gif")])


def test_points_are_measured_and_written(tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    result = scaling.measure(
        "resnet18",
        [Point(1, 1, 32), Point(1, 2, 32)],
        engines=(scaling.OUR, "eager_nhwc"),
        out=out,
        reps=1,
        turn_seconds=0.001,
        isolate=False,
    )
    rows = result["rows"]
    assert [(row["engine"], row["batch"]) for row in rows] == [
        (scaling.OUR, 1),
        ("eager_nhwc", 1),
        (scaling.OUR, 2),
        ("eager_nhwc", 2),
    ]
    assert all(row["median_ms"] > 0 for row in rows) and rows[0]["within_budget"]
    assert out.stat().st_size > 0
    assert len(scaling.cliffs(rows)) == 1
