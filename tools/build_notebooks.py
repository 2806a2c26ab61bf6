"""Make both executed editions of the lessons from their sources.

python -m tools.build_notebooks            all of them
python -m tools.build_notebooks 00 05      some of them
python -m tools.build_notebooks --check    say what differs from the sources, run nothing
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.card import keep_measurement
from tools.editions import (
    EDITIONS,
    SourceError,
    as_text,
    differences,
    hide_answers,
    make_edition,
    notebook_path,
    sources,
)
from tools.execute import BuildError, execute

COMMAND = "python -m tools.build_notebooks"
ALL_WELL = "The notebooks are what their sources make."
NEW_CARD = (
    "The card has new numbers: {seconds} s, {cores} cores busy. If this machine was not quiet: "
    "git checkout solutions/measured.json, and build again with --no-execute."
)


def main(arguments: list[str] | None = None) -> int:
    """Build or check; 0 if all is well."""
    options = _parser().parse_args(arguments)
    chosen = [source for source in sources() if _wanted(source, options.lessons)]
    if not chosen:
        print(f"no lesson matches {' '.join(options.lessons)}", file=sys.stderr)
        return 2
    try:
        if options.check:
            found = [
                line
                for source in chosen
                for edition in EDITIONS
                for line in differences(source, edition)
            ]
            numbers = " ".join(options.lessons)
            remedy = f"Make them again: {COMMAND} {numbers}".rstrip()
            print("\n".join([*found, remedy] if found else [ALL_WELL]))
            return 1 if found else 0
        for source in chosen:
            build(source, options.preset, execute_cells=not options.no_execute)
    except (SourceError, BuildError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def build(source: Path, preset: str = "tiny", execute_cells: bool = True) -> None:
    """Both editions of one lesson. Only preset tiny is stored; another is run to be measured."""
    for edition, folder in EDITIONS.items():
        notebook = make_edition(source, edition)
        began = time.monotonic()
        if not execute_cells:
            _take_over_outputs(notebook, notebook_path(source, edition))
        else:
            print(f"{source.stem} {edition}: running its cells", flush=True)  # a minute or more
            try:
                measured = execute(notebook, folder, preset)
            except BuildError as error:
                raise BuildError(f"{source.name}, edition {edition}: {error}") from None
            if edition == "solution" and keep_measurement(source.stem, preset, measured):
                print(NEW_CARD.format(**measured), flush=True)
        if preset != "tiny":
            return
        _refresh_card(notebook, source, edition)
        if edition == "student":
            hide_answers(notebook, source)
        notebook_path(source, edition).write_text(as_text(notebook), encoding="utf-8")
        print(f"{source.stem} {edition}: {time.monotonic() - began:.0f} s", flush=True)


def _refresh_card(notebook: NotebookNode, source: Path, edition: str) -> None:
    """The card shows the measurement of this very run."""
    fresh = {
        cell.id: cell.source for cell in make_edition(source, edition).cells if cell.id == "card"
    }
    for cell in notebook.cells:
        cell.source = fresh.get(cell.id, cell.source)


def _take_over_outputs(notebook: NotebookNode, old: Path) -> None:
    """Keep the outputs of code cells whose source has not changed."""
    if not old.exists():
        return
    stored = {cell.id: cell for cell in nbformat.read(old, as_version=4).cells}
    for cell in notebook.cells:
        before = stored.get(cell.id)
        if cell.cell_type == "code" and before is not None and before.source == cell.source:
            cell.outputs, cell.execution_count = before.outputs, before.execution_count


def _wanted(source: Path, lessons: list[str]) -> bool:
    return not lessons or any(source.stem.startswith(lesson) for lesson in lessons)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("lessons", nargs="*", help="numbers of lessons, e.g. 05; none: all")
    parser.add_argument(
        "--check", action="store_true", help="compare with the sources, run nothing"
    )
    parser.add_argument(
        "--no-execute", action="store_true", help="keep the old outputs where possible"
    )
    parser.add_argument("--preset", default="tiny", help="another preset: measured, not stored")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
