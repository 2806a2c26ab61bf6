"""The clinic's recordings are real runs, say what they are, and are small; so is their score."""

import json

import numpy as np
import pytest

from course_lib.config import PROJECT
from course_lib.diagnosis import diagnose
from course_lib.plots.clinic import PANELS, clinic_figure, curve
from course_lib.plots.words import description
from course_lib.recordings import HEALTHY, KINDS, recording, ward

FOLDER = PROJECT / "data" / "recordings"
RESULT = json.loads((PROJECT / "data" / "results" / "diagnosis.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_each_recording_says_how_it_was_made_and_is_named_rightly(kind):
    found = recording(kind)
    assert found.kind == kind and found.how
    assert found.command.startswith("python data/experiments/broken_runs.py --kinds " + kind)
    assert len(found.rows) == 30
    assert diagnose(found.rows)[0].kind == kind


def test_the_healthy_recording_is_not_accused_and_learns():
    rows = recording(HEALTHY).rows
    assert diagnose(rows) == []
    assert rows[-1]["env/correct"] > rows[0]["env/correct"] + 0.3


def test_the_recordings_are_small():
    assert sum(file.stat().st_size for file in FOLDER.glob("*.jsonl")) < 300_000


def test_a_ward_holds_every_kind_once_in_an_order_of_its_seed():
    first, second = ward(1), ward(2)
    assert sorted(run.kind for run in first.values()) == sorted(KINDS)
    assert [run.kind for run in first.values()] != [run.kind for run in second.values()]
    assert [run.kind for run in first.values()] == [run.kind for run in ward(1).values()]


def test_the_sheet_draws_what_was_recorded_and_says_where_nothing_was():
    dead, healthy = recording("dead_groups").rows, recording(HEALTHY).rows
    figure = clinic_figure(dead, healthy, "Run A")
    assert len(figure.axes) == len(PANELS)
    assert np.asarray(figure.axes[2].lines[1].get_ydata()).tolist() == [1.0] * 30
    assert curve(dead, "ratio/max_deviation") == ([], [])
    assert "no data" in figure.axes[3].texts[0].get_text()
    assert "dead groups (share) from 1 to 1" in description(figure)


def test_the_score_counts_its_own_runs():
    unseen = [row for row in RESULT["runs"] if row["seed"] != 0]
    sick = [row for row in unseen if row["kind"] in KINDS]
    well = [row for row in unseen if row["kind"] not in KINDS]
    assert RESULT["unseen"]["broken_runs"] == len(sick)
    assert RESULT["unseen"]["named_right"] == sum(row["named"] == row["kind"] for row in sick)
    assert RESULT["unseen"]["accused"] == sum(row["named"] != "healthy" for row in well)
