"""One hand-written source, two editions: solutions/NN_topic.py -> the cells of both notebooks.

The source is a jupytext percent file. Every cell carries `id="..."`; besides that only:

    exercise="05.1"      a code cell with a solution; the student edition gets the exercise's stub
    edition="solution"   a cell that the student edition leaves out
    reveals="10.1"       its output answers that exercise: the student edition stores none
    id="card"            the cell that measured time and memory are written into

Pure: reads files, runs nothing. solutions/README.md tells authors how to use it.
"""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from course_lib.checks.registry import find
from tools.card import card, read_measurements

ROOT = Path(__file__).resolve().parent.parent
SOLUTIONS, NOTEBOOKS = ROOT / "solutions", ROOT / "notebooks"
EDITIONS = {"solution": SOLUTIONS, "student": NOTEBOOKS}
KNOWN_KEYS = {"id", "exercise", "edition", "reveals"}
METADATA = {
    # Without a kernelspec JupyterLab asks for a kernel before it runs anything.
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class SourceError(Exception):
    """A mistake in a lesson's source, told with its file and cell."""


def sources() -> list[Path]:
    """The lessons' sources, in order."""
    return sorted(SOLUTIONS.glob("[0-9][0-9]_*.py"))


def notebook_path(source: Path, edition: str) -> Path:
    """Where the edition of a source is kept."""
    return EDITIONS[edition] / f"{source.stem}.ipynb"


def make_edition(source: Path, edition: str) -> NotebookNode:
    """The notebook that `source` makes, without outputs."""
    cells = [
        made
        for cell in read_cells(source)
        if (made := _in_edition(cell, edition, source)) is not None
    ]
    if edition == "student":
        _fold_what_is_to_be_predicted(cells)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
    notebook.nbformat_minor = 5
    nbformat.validate(notebook)
    return notebook


def read_cells(source: Path) -> list[NotebookNode]:
    """The source's cells; ids checked, jupytext's own notes dropped."""
    cells = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent").cells
    seen: set[str] = set()
    for number, cell in enumerate(cells, start=1):
        keys = {key: cell.metadata[key] for key in KNOWN_KEYS if key in cell.metadata}
        unknown = (
            set(cell.metadata) - KNOWN_KEYS - {"lines_to_next_cell", "lines_to_end_of_cell_marker"}
        )
        place = f"{source.name}, cell {number} ({cell.source.strip()[:40]!r})"
        if unknown:
            raise SourceError(f"{place}: {sorted(unknown)} is unknown; use {sorted(KNOWN_KEYS)}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{1,62}", keys.get("id", "")):
            raise SourceError(f'{place}: needs id="lower-case-words", e.g. # %% id="first-step"')
        if keys["id"] in seen:
            raise SourceError(f"{place}: the id {keys['id']!r} occurs twice")
        if not cell.source.strip():
            raise SourceError(f"{place}: is empty")
        seen.add(keys["id"])
        cell.metadata = nbformat.from_dict(keys)
    return cells


def _in_edition(cell: NotebookNode, edition: str, source: Path) -> NotebookNode | None:
    keys = cell.metadata
    if keys.get("edition", edition) != edition:
        return None
    text = cell.source
    if keys["id"] == "card":
        text = card(source.stem, read_measurements())
    elif "exercise" in keys:
        exercise = find(keys["exercise"])
        if exercise is None:
            raise SourceError(f"{source.name}: there is no exercise {keys['exercise']!r}")
        text = exercise.stub if edition == "student" else text
    make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
    kept = {"exercise": keys["exercise"]} if "exercise" in keys else {}
    return make(text, id=keys["id"], metadata=kept)


def _fold_what_is_to_be_predicted(cells: list[NotebookNode]) -> None:
    """Stored outputs below a "**Predict**" are folded: a click, or running the cell, shows them."""
    predicting = False
    for cell in cells:
        if cell.cell_type == "markdown":
            predicting = "**Predict" in cell.source
        elif predicting:
            cell.metadata["jupyter"] = {"outputs_hidden": True}


def hide_answers(notebook: NotebookNode, source: Path) -> None:
    """Drop the outputs that answer an exercise: a student's own run shows them."""
    revealing = {cell.metadata["id"] for cell in read_cells(source) if "reveals" in cell.metadata}
    for cell in notebook.cells:
        if cell.id in revealing:
            cell.outputs = []


def differences(source: Path, edition: str) -> list[str]:
    """How the notebook on disk differs from what its source makes: cells, ids and metadata."""
    path = notebook_path(source, edition)
    place = path.relative_to(ROOT)
    if not path.exists():
        return [f"{place}: is missing"]
    text = path.read_text(encoding="utf-8")
    stored, made = nbformat.reads(text, as_version=4), make_edition(source, edition)
    found = []
    if text != as_text(stored):
        found.append(f"{place}: was not written by the builder (order of keys, indentation)")
    if stored.metadata != made.metadata or stored.nbformat_minor != made.nbformat_minor:
        found.append(f"{place}: notebook metadata differ")
    if [cell.id for cell in stored.cells] != [cell.id for cell in made.cells]:
        found.append(f"{place}: cells were added, removed or moved")
    ours = {cell.id: cell for cell in made.cells}
    for cell in stored.cells:
        mine = ours.get(cell.id)
        if mine is not None and any(
            cell[key] != mine[key] for key in ("cell_type", "source", "metadata")
        ):
            found.append(f"{place}: cell {cell.id!r} differs")
    return found


def as_text(notebook: NotebookNode) -> str:
    """The file's text: sorted keys, one space of indentation, one line break at the end."""
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"
