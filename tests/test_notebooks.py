"""The stored notebooks are what their sources make, were run top to bottom, and hide nothing.

Nothing here runs a lesson: that is what the nbval lanes do (conftest.py in the project's root).
"""

from __future__ import annotations

import ast
import base64
import inspect
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbval.plugin import get_sanitize_patterns

from course_lib.checks.registry import LESSONS, every_exercise, exercises, find
from tools import card, editions
from tools.build_notebooks import COMMAND
from tools.editions import EDITIONS, notebook_path, read_cells, sources
from tools.execute import FORBIDDEN, WIDGET_VIEW

SOURCES = sources()
STORED = [(source, edition) for source in SOURCES for edition in EDITIONS]
BAND = re.compile(r"^.+: (?:yes|no)$", re.MULTILINE)  # what lessons.band prints
ROOT = Path(__file__).resolve().parent.parent
FIRST_CELL = "from course_lib import connect, check, hint, progress, preset\n\nservice = connect()"


def by_name(value: object) -> str:
    return value.stem if isinstance(value, Path) else str(value)


@cache
def stored(source: Path, edition: str) -> NotebookNode:
    return nbformat.read(notebook_path(source, edition), as_version=4)


def code_cells(source: Path, edition: str = "solution") -> list[NotebookNode]:
    return [cell for cell in stored(source, edition).cells if cell.cell_type == "code"]


def texts(cell: NotebookNode) -> str:
    """Everything a cell stored that can be read, without pictures."""
    found = []
    for output in cell.outputs:
        found.append(output.get("text", ""))
        data = output.get("data", {}).items()
        found += [text for kind, text in data if not kind.startswith("image/")]
    return "\n".join(found)


def test_every_lesson_has_one_source():
    assert [source.stem[:2] for source in SOURCES] == list(LESSONS)


# --- what is stored


@pytest.mark.parametrize("source,edition", STORED, ids=by_name)
def test_the_stored_notebook_is_what_its_source_makes(source, edition):
    remedy = f"make them again: {COMMAND} {source.stem[:2]}"
    assert editions.differences(source, edition) == [], remedy


@pytest.mark.parametrize("source,edition", STORED, ids=by_name)
def test_every_code_cell_was_run_once_from_top_to_bottom(source, edition):
    """nbval compares nothing in a cell without an execution count: such a cell is always green."""
    counts = [cell.execution_count for cell in code_cells(source, edition)]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("source,edition", STORED, ids=by_name)
def test_no_output_is_an_error_or_a_warning_or_of_this_machine(source, edition):
    for cell in code_cells(source, edition):
        for output in cell.outputs:
            assert output.output_type != "error", cell.id
            assert output.get("name") != "stderr", cell.id
        for what, pattern in FORBIDDEN.items():
            assert not pattern.search(texts(cell)), f"{cell.id} prints {what}"


@pytest.mark.parametrize("source,edition", STORED, ids=by_name)
def test_every_figure_has_alt_text_and_the_same_words_below_it(source, edition):
    for cell in code_cells(source, edition):
        for output in cell.outputs:
            data = output.get("data", {})
            assert WIDGET_VIEW not in data, f"{cell.id}: a stored widget shows nothing elsewhere"
            if "image/png" in data:
                assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
                words = output.metadata["image/png"]["alt"]
                assert data["text/plain"] == f"Figure: {words}", cell.id


@pytest.mark.parametrize("source,edition", STORED, ids=by_name)
def test_it_opens_without_asking_for_a_kernel_and_keeps_no_trace_of_the_run(source, edition):
    metadata = stored(source, edition).metadata
    assert metadata.kernelspec.name == "python3"
    assert set(metadata) == {"kernelspec", "language_info"}
    for cell in stored(source, edition).cells:
        assert set(cell.metadata) <= {"exercise", "jupyter"}, (
            f"{cell.id}: a tag could skip the cell"
        )
        folded = {"outputs_hidden": True} if edition == "student" else None
        assert cell.metadata.get("jupyter") in (None, folded)


@pytest.mark.parametrize("source", SOURCES, ids=by_name)
def test_every_check_passes_in_the_solutions_and_is_not_attempted_by_students(source):
    for edition, verdict in (("solution", "passed."), ("student", "not attempted.")):
        said = "\n".join(texts(cell) for cell in code_cells(source, edition))
        for exercise in exercises(source.stem[:2]):
            line = f"{exercise.id} {exercise.title}: {verdict}"
            assert line in " ".join(said.split()), f"no cell of the {edition} says: {line}"


@pytest.mark.parametrize("source", SOURCES, ids=by_name)
def test_students_read_the_same_verdicts_as_the_solutions(source):
    """The reference of an exercise may be another answer, and then a claim below it may fail."""
    verdicts = [
        [line for cell in code_cells(source, edition) for line in BAND.findall(texts(cell))]
        for edition in EDITIONS
    ]
    assert verdicts[0] == verdicts[1]


# --- what is written


@pytest.mark.parametrize("source", SOURCES, ids=by_name)
def test_the_first_code_cell_is_the_same_everywhere(source):
    first = next(cell for cell in read_cells(source) if cell.cell_type == "code")
    assert first.source == FIRST_CELL


@pytest.mark.parametrize("source", SOURCES, ids=by_name)
def test_every_exercise_of_the_lesson_is_asked_once_and_its_check_assigned(source):
    cells = read_cells(source)
    asked = [cell.metadata.exercise for cell in cells if "exercise" in cell.metadata]
    assert sorted(asked) == [exercise.id for exercise in exercises(source.stem[:2])]
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    for exercise in exercises(source.stem[:2]):
        name, call = exercise.name, f'{exercise.name} = check("{exercise.id}", {exercise.name}'
        found = re.search(rf'^{name} = check\(\s*"{exercise.id}", {name}', code, re.M)
        assert found, f"no cell of {source.name} begins a line with: {call}"


@pytest.mark.parametrize("source", SOURCES, ids=by_name)
def test_an_exercise_cell_defines_what_its_stub_defines_and_nothing_else(source):
    """In the student edition the whole cell is replaced: anything else in it would be missing."""
    for cell in read_cells(source):
        if "exercise" in cell.metadata:
            name = find(cell.metadata.exercise).name
            tree = ast.parse(cell.source)
            imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not imports, f"cell {cell.metadata.id!r} imports: do that in a cell above"
            functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
            assert functions in ([name], []), f"cell {cell.metadata.id!r} defines more than {name}"
            assert functions or re.search(rf"^{name} = ", cell.source, re.M), cell.metadata.id


@pytest.mark.parametrize("source", SOURCES, ids=by_name)
def test_students_do_not_get_the_solutions(source):
    everything = "\n".join(cell.source for cell in stored(source, "student").cells)
    squeezed = re.sub(r"\s", "", everything)
    for cell in read_cells(source):
        if "exercise" in cell.metadata:
            exercise = find(cell.metadata.exercise)
            assert exercise.stub in everything, f"{exercise.id}: its stub is not stored"
            for line in solution_lines(cell.source, exercise.stub):
                assert line not in squeezed, line


@pytest.mark.parametrize("source", SOURCES, ids=by_name)
def test_no_hint_tells_a_line_of_the_lessons_solution(source):
    for cell in read_cells(source):
        if "exercise" in cell.metadata:
            exercise = find(cell.metadata.exercise)
            told = re.sub(r"\s", "", " ".join(exercise.hints))
            for line in solution_lines(cell.source, exercise.stub):
                assert line not in told, line


def solution_lines(source: str, stub: str) -> list[str]:
    """The lines that carry the solution, without spaces; not those that the stub shows anyway."""
    lines = [re.sub(r"\s", "", line.split("#")[0]) for line in source.splitlines()]
    given = re.sub(r"\s", "", stub)
    return [
        line for line in lines if len(line) >= 24 and line not in given and line[0] not in "\"'"
    ]


@pytest.mark.parametrize("source", SOURCES, ids=by_name)
def test_no_cell_spells_a_model_name_or_skips_itself(source):
    for cell in read_cells(source):
        if cell.cell_type == "code":
            assert "course/base" not in cell.source, cell.id
            assert "NBVAL_" not in cell.source, cell.id
            assert not cell.source.lstrip().startswith(("%", "!")), cell.id


# --- the sanitize file


def sanitized(text: str) -> str:
    for regex, replacement in patterns():
        text = re.sub(regex, replacement, text)
    return text


def patterns() -> list[tuple[str, str]]:
    return get_sanitize_patterns((ROOT / "tests/nbval_sanitize.cfg").read_text(encoding="utf-8"))


def test_nbval_reads_every_pair_of_the_sanitize_file():
    """A `replace:` without the space after it would be dropped without a word."""
    text = (ROOT / "tests/nbval_sanitize.cfg").read_text(encoding="utf-8")
    assert len(patterns()) == len(re.findall(r"^regex:", text, re.M)) == 6
    assert len(patterns()) == len(re.findall(r"^replace:", text, re.M))


@pytest.mark.parametrize(
    "one,other",
    [
        ("> The answer is 5.\n", "> Oh, hello.\n> You again.\n"),
        ("measured: loss 0.31 nats\n", "measured: loss 1.2e-05 nats\n"),
        ("measured: accuracy 31.2%", "measured: accuracy 9.0%"),
        ("measured: gap -inf", "measured: gap 3"),
        ("Figure: loss from 3 to 1.", "Figure: loss from 3 to 1.1."),
        ("Calls go to A, store B (why).", "Calls go to C."),
        ("05 GRPO            1 of 4   05.1 solved", "05 GRPO            0 of 4   05.1 open"),
        ("In all 3 of 42 solved.", "In all 40 of 42 solved."),
    ],
)
def test_what_differs_between_machines_is_not_compared(one, other):
    assert sanitized(one) == sanitized(other)


@pytest.mark.parametrize(
    "one,other",
    [
        ("SFT beats base: yes", "SFT beats base: no"),
        ("measured: loss 0.31", "measured: reward 0.31"),
        ("> text\nband: yes\n", "> text\nband: no\n"),
        ("05.1 Centred advantages: passed.", "05.1 Centred advantages: not yet."),
        ("1024 tokens", "1023 tokens"),
        ("a > b", "a > c"),
    ],
)
def test_everything_else_is_compared(one, other):
    assert sanitized(one) != sanitized(other)


# --- the card


MEASURED = {
    "seconds": 31,
    "slowest_cell_s": 8,
    "peak_mb": 730,
    "cores": 1.64,
    "machine": "2-core X",
}


def test_the_card_shows_what_was_measured_and_says_what_was_not():
    text = card.card("05_grpo", {"05_grpo": {"tiny": MEASURED}})
    assert "| tiny | 31 s | 8 s | 0.7 GB | 1.6 |" in text
    assert "| full | not measured | | | |" in text
    assert "on a 2-core X." in text


def test_a_measurement_that_is_nearly_the_same_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "MEASURED", tmp_path / "measured.json")
    card.keep_measurement("05_grpo", "tiny", MEASURED)
    card.keep_measurement("05_grpo", "tiny", MEASURED | {"seconds": 36})
    assert card.read_measurements()["05_grpo"]["tiny"]["seconds"] == 31
    card.keep_measurement("05_grpo", "tiny", MEASURED | {"seconds": 90})
    assert card.read_measurements()["05_grpo"]["tiny"]["seconds"] == 90


def test_the_machine_is_named_in_general_words():
    assert re.fullmatch(r"\d+-core [\w .()-]+, \d+ GB", card.machine())


def test_every_exercise_has_its_reference_in_its_lessons_module():
    """So that a person who looks for one finds it."""
    for exercise in every_exercise():
        assert inspect.getmodule(exercise.reference).__name__.endswith(f"lesson_{exercise.id[:2]}")
