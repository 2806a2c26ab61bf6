"""The builder makes two editions from one source, and refuses what must not be stored."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest

from course_lib.checks.registry import find
from tools import build_notebooks, card, editions
from tools.editions import SourceError, as_text, differences, make_edition
from tools.execute import BuildError, execute, lane_environment

SOURCE = """\
# %% [markdown] id="title"
# # A lesson

# %% [markdown] id="card"
# here

# %% id="first"
x = 1
print(x)

# %% id="write" exercise="05.4"
def dead_share(p, group_size):
    return p**group_size + (1 - p) ** group_size


# %% id="check"
from course_lib import check

dead_share = check("05.4", dead_share)

# %% id="remark" edition="solution"
print("only here")
"""


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """A project with one source; returns a function that writes it and gives its path."""
    for name in ("solutions", "notebooks"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(editions, "ROOT", tmp_path)
    monkeypatch.setattr(editions, "SOLUTIONS", tmp_path / "solutions")
    places = {"solution": tmp_path / "solutions", "student": tmp_path / "notebooks"}
    monkeypatch.setattr(editions, "EDITIONS", places)
    monkeypatch.setattr(build_notebooks, "EDITIONS", places)
    monkeypatch.setattr(card, "MEASURED", tmp_path / "measured.json")

    def write(text: str = SOURCE):
        path = tmp_path / "solutions" / "05_grpo.py"
        path.write_text(text)
        return path

    return write


def sources_by_id(notebook) -> dict[str, str]:
    return {cell.id: cell.source for cell in notebook.cells}


def test_students_get_the_stub_and_not_the_remark(lesson):
    source = lesson()
    solution = sources_by_id(make_edition(source, "solution"))
    student = sources_by_id(make_edition(source, "student"))
    assert solution["write"].endswith("(1 - p) ** group_size")
    assert student["write"] == find("05.4").stub
    assert set(solution) - set(student) == {"remark"}
    assert {id: text for id, text in student.items() if id != "write"}.items() <= solution.items()


def test_what_is_to_be_predicted_is_folded_for_students(lesson):
    ask, told = (
        f'# %% [markdown] id="{id}"\n# {text}\n'
        for id, text in (("ask", "**Predict** it."), ("told", "So it is."))
    )
    first, second, third = (f'# %% id="{id}"\n1\n' for id in ("first", "second", "third"))
    source = lesson(ask + first + second + told + third)
    for edition, folded in (("solution", []), ("student", ["first", "second"])):
        cells = make_edition(source, edition).cells
        assert [cell.id for cell in cells if "jupyter" in cell.metadata] == folded


def test_students_do_not_find_the_answer_of_an_exercise_printed(lesson):
    source = lesson(SOURCE + '\n# %% id="answers" reveals="05.4"\nprint("a half")\n')
    build_notebooks.build(source)
    for edition, answers in (("solution", ["a half\n"]), ("student", [])):
        notebook = nbformat.read(editions.notebook_path(source, edition), as_version=4)
        by_id = {cell.id: cell for cell in notebook.cells}
        assert [output.text for output in by_id["answers"].outputs] == answers
        assert by_id["first"].outputs[0].text == "1\n" and by_id["answers"].execution_count
        assert differences(source, edition) == []


def test_the_card_stands_where_the_source_says(lesson):
    assert "| tiny | not measured |" in sources_by_id(make_edition(lesson(), "student"))["card"]


@pytest.mark.parametrize(
    "change,complaint",
    [
        ((' id="first"', ""), "needs id="),
        (('id="first"', 'id="First Cell"'), "needs id="),
        (('id="first"', 'id="title"'), "occurs twice"),
        (('id="first"', 'id="first" colour="red"'), "'colour'"),
        (('exercise="05.4"', 'exercise="05.9"'), "no exercise '05.9'"),
        (("x = 1\nprint(x)\n", ""), "is empty"),
    ],
)
def test_a_mistake_in_a_source_is_told_with_its_cell(lesson, change, complaint):
    source = lesson(SOURCE.replace(*change))
    with pytest.raises(SourceError, match=complaint):
        make_edition(source, "student")


def stored(source, edition="solution"):
    path = editions.notebook_path(source, edition)
    path.write_text(as_text(make_edition(source, edition)))
    return path


def test_a_notebook_as_made_does_not_differ(lesson):
    source = lesson()
    stored(source)
    assert differences(source, "solution") == []


@pytest.mark.parametrize(
    "change,complaint",
    [
        ((" * ", "x * "), None),
        (('"x = 1', '"x = 2'), "cell 'first' differs"),
        (('"id": "first"', '"id": "second"'), "added, removed or moved"),
        (('"name": "python3"', '"name": "other"'), "metadata differ"),
        (('\n "nbformat_minor": 5', '\n  "nbformat_minor": 5'), "not written by the builder"),
    ],
)
def test_drift_is_found(lesson, change, complaint):
    source = lesson()
    path = stored(source)
    text = path.read_text()
    path.write_text(text.replace(*change))
    found = differences(source, "solution")
    assert (found == []) if complaint is None else any(complaint in line for line in found)


def test_outputs_are_no_drift(lesson):
    source = lesson()
    path = stored(source)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    path.write_text(as_text(notebook))
    assert differences(source, "solution") == []


def test_a_missing_notebook_is_drift(lesson):
    assert "is missing" in differences(lesson(), "student")[0]


def notebook(*cells: str):
    made = [nbformat.v4.new_code_cell(text, id=f"cell-{i}") for i, text in enumerate(cells)]
    return nbformat.v4.new_notebook(cells=made)


def test_building_runs_both_editions_and_measures_them(lesson, capsys):
    source = lesson()
    build_notebooks.build(source)
    for edition, verdict in (("solution", "passed."), ("student", "not attempted.")):
        made = nbformat.read(editions.notebook_path(source, edition), as_version=4)
        cells = {cell.id: cell for cell in made.cells}
        assert cells["first"].outputs[0].text == "1\n"
        assert [c.execution_count for c in made.cells if c.cell_type == "code"][:3] == [1, 2, 3]
        assert verdict in cells["check"].outputs[0].text
        assert "| tiny |" in cells["card"].source
        assert "not measured" not in cells["card"].source.split("tiny")[1].split("\n")[0]
        assert differences(source, edition) == []


def test_a_build_says_what_it_runs_where_it_failed_and_how_to_mend_a_difference(lesson, capsys):
    """A minute passed without a word, and an error in a build of all named a cell of no lesson."""
    lesson(SOURCE + '\n# %% id="wrong"\n1 / 0\n')
    assert build_notebooks.main([]) == 1
    said = capsys.readouterr()
    assert said.out == "05_grpo solution: running its cells\n"
    assert said.err.startswith(
        "05_grpo.py, edition solution: cell 'wrong' raised ZeroDivisionError"
    )

    assert build_notebooks.main(["05", "--check"]) == 1
    assert capsys.readouterr().out.endswith("again: python -m tools.build_notebooks 05\n")


def test_a_build_says_that_the_card_has_new_numbers(lesson, capsys):
    """A build beside other work wrote 195 s for 20 s onto the card, without a word."""
    source = lesson()
    build_notebooks.build(source)
    assert "The card has new numbers: " in capsys.readouterr().out
    build_notebooks.build(source)
    assert "The card" not in capsys.readouterr().out


def test_without_running_old_outputs_stay_where_the_source_did(lesson):
    source = lesson()
    path = stored(source)
    made = nbformat.read(path, as_version=4)
    made.cells[2].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    made.cells[2].execution_count = 1
    path.write_text(as_text(made))
    lesson(SOURCE.replace("# # A lesson", "# # The lesson"))
    build_notebooks.build(source, execute_cells=False)
    again = nbformat.read(path, as_version=4)
    assert again.cells[0].source == "# The lesson"
    assert again.cells[2].outputs[0].text == "1\n"


@pytest.mark.parametrize(
    "cell,complaint",
    [
        ("import sys; print('oh', file=sys.stderr)", "writes on stderr: oh"),
        ("import os; print(os.path.abspath('.'))", "a path of this machine"),
        ("print('http://127.0.0.1:43211')", "a port"),
        ("object()", "an address in memory"),
        ("1 / 0", "raised ZeroDivisionError"),
    ],
)
def test_what_must_not_be_stored_stops_the_build(cell, complaint, tmp_path):
    with pytest.raises(BuildError, match=complaint):
        execute(notebook(cell), tmp_path)


@pytest.mark.parametrize(
    "cell,complaint",
    [
        ("import time; time.sleep(30)", "'cell-0' took more than 1 s: give it less to do"),
        ("import os; os._exit(1)", "the kernel died in cell 'cell-0'"),
    ],
)
def test_a_cell_that_never_ends_and_a_kernel_that_dies_are_told_by_cell(
    cell, complaint, tmp_path, monkeypatch
):
    """Both came as a traceback of nbclient that named no cell."""
    monkeypatch.setattr("tools.execute.CELL_S", 1)
    with pytest.raises(BuildError, match=complaint):
        execute(notebook(cell), tmp_path)


def test_a_live_widget_is_stored_as_its_picture(tmp_path):
    made = notebook("from course_lib.widgets import group_explorer\ngroup_explorer().show()")
    execute(made, tmp_path)
    (output,) = made.cells[0].outputs
    assert set(output.data) == {"image/png", "text/plain"}
    assert output.metadata["image/png"]["alt"]


def test_a_kernel_of_the_lanes_has_no_key_and_no_progress_of_the_learner(tmp_path, monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-secret")
    monkeypatch.setenv("COURSE_PROGRESS", "/home/ada/progress.json")
    environment = lane_environment(tmp_path)
    assert "TINKER_API_KEY" not in environment
    assert environment["COURSE_PROGRESS"].startswith(str(tmp_path))
    assert environment["COURSE_ENV_FILE"] == ""


def test_a_kernel_of_the_lanes_has_the_library_beside_its_notebooks(tmp_path, monkeypatch):
    """The environment may lead to another checkout, whose outputs were stored here."""
    other = tmp_path / "other" / "course_lib"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(other.parent))
    root = Path(__file__).resolve().parents[1]
    made = notebook(f"import course_lib\ncourse_lib.__file__.startswith({str(root)!r})")
    execute(made, tmp_path)
    assert made.cells[0].outputs[0].data["text/plain"] == "True"
    assert lane_environment(tmp_path)["PYTHONPATH"].split(os.pathsep)[1] == str(other.parent)
