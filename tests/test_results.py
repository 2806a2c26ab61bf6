"""The published tables are what the stored measurements say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from course_lib.plots.run import describe_accuracy
from course_lib.plots.seeds import seeds_figure
from course_lib.plots.words import description

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "data" / "experiments" / "tables.py"
spec = importlib.util.spec_from_file_location("tables", SCRIPT)
assert spec and spec.loader
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def test_the_tables_are_those_of_the_stored_results(tmp_path: Path):
    text, card = tables.make(tmp_path)
    remedy = "run python data/experiments/tables.py"
    assert (tables.RESULTS / "README.md").read_text(encoding="utf-8") == text, remedy
    assert card in tables.CARD.read_text(encoding="utf-8"), remedy
    for figure in tmp_path.glob("*.png"):
        assert (tables.RESULTS / figure.name).exists(), remedy


def test_the_readmes_table_and_picture_are_those_of_the_stored_run():
    """Nothing said where its numbers came from."""
    report = json.loads((tables.RESULTS / "quick.json").read_text(encoding="utf-8"))
    remedy = "run python data/experiments/tables.py"
    assert (report["preset"], report["seed"]) == ("quick", 0)
    assert tables.quick(report) in tables.FRONT.read_text(encoding="utf-8"), remedy
    with Image.open(tables.RESULTS / "quick.png") as picture:
        assert picture.info["Description"] == describe_accuracy(report), remedy


@pytest.mark.parametrize("name", tables.SECTIONS)
def test_every_experiment_was_run_for_five_seeds(name: str):
    found = json.loads((tables.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert sorted(row["seed"] for row in found["seeds"]) == [0, 1, 2, 3, 4]
    assert (ROOT / found["command"].split()[1]).exists()


def test_discovery_is_as_large_as_the_course_says():
    found = json.loads((tables.RESULTS / "discovery.json").read_text(encoding="utf-8"))
    assert found["problems"] >= 500
    for row in found["seeds"]:
        assert row["base"]["accuracy"] <= 0.05
        assert row["rl"]["accuracy"] - row["sft"]["accuracy"] >= 0.25
        assert row["rl"]["worked_share"] - row["sft"]["worked_share"] >= 0.4
    assert sum(row["rl"]["accuracy"] for row in found["seeds"]) / 5 >= 0.9


def test_a_long_title_beside_long_names_is_drawn_whole():
    arms = {"an arm whose name takes half of the width": [0.1, 0.5, 0.3]}
    figure = seeds_figure(arms, "A title about as wide as the names are long, or longer", "share")
    figure.draw_without_rendering()  # runs the layout
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height


def test_a_dot_for_every_seed_and_a_bar_at_the_median():
    figure = seeds_figure({"one arm": [0.1, 0.5, 0.3], "other": [1.0, 1.0, 0.9]}, "T", "share")
    axes = figure.axes[0]
    assert [sorted(dots.get_offsets()[:, 0]) for dots in axes.collections] == [
        [0.1, 0.3, 0.5],
        [0.9, 1.0, 1.0],
    ]
    assert [line.get_xdata()[0] for line in axes.lines] == [0.3, 1.0]
    assert "one arm 0.3 (0.1 to 0.5)" in description(figure)
