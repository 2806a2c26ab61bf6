"""Do the lessons' claims hold for other seeds? Runs lessons again with another seed in every cell.

    python data/experiments/lesson_claims.py 01 02 03 --seeds 1 2 3 4 5

A claim is a line that a lesson prints with `band`: it holds if its verdict is the one in the stored
notebook. Prints a Markdown table and keeps it, with all others, in data/results/lesson_claims.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # tools/ is not installed

from tools.editions import SOLUTIONS, make_edition, notebook_path, sources  # noqa: E402
from tools.execute import execute  # noqa: E402

RESULTS = ROOT / "data" / "results" / "lesson_claims.json"
BAND = re.compile(r"^(.+): (yes|no)$", re.MULTILINE)


def claims(notebook: NotebookNode) -> dict[str, str]:
    """Every band that an executed notebook printed: its words -> yes or no."""
    texts = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    ]
    return dict(BAND.findall("\n".join(texts)))


def with_seed(notebook: NotebookNode, seed: int) -> NotebookNode:
    """The notebook with `seed=0` and `manual_seed(0)` changed in all its code cells."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"\bseed=0\b", f"seed={seed}", cell.source)
            cell.source = cell.source.replace("manual_seed(0)", f"manual_seed({seed})")
    return notebook


def main() -> None:
    """Run, count, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="+", help="numbers of lessons, e.g. 01 02")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--preset", default="tiny")
    options = parser.parse_args()
    for source in sources():
        if source.stem[:2] not in options.lessons:
            continue
        stored = claims(nbformat.read(notebook_path(source, "solution"), as_version=4))
        held = dict.fromkeys(stored, 0)
        for seed in options.seeds:
            notebook = with_seed(make_edition(source, "solution"), seed)
            execute(notebook, SOLUTIONS, options.preset)
            found = claims(notebook)
            for claim, verdict in stored.items():
                held[claim] += found.get(claim) == verdict
            missed = [claim for claim in stored if found.get(claim) != stored[claim]]
            print(f"{source.stem}, seed {seed}: {missed or 'all hold'}", flush=True)
        keep(source.stem, {"seeds": options.seeds, "preset": options.preset, "held": held})
    print(table(known()))


def known() -> dict:
    """What is counted already, by lesson."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def keep(lesson: str, counted: dict) -> None:
    """Put a lesson's counts beside the others', which another process may just have written."""
    RESULTS.parent.mkdir(exist_ok=True)
    every = known() | {lesson: counted}
    RESULTS.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def table(kept: dict) -> str:
    """One line for each claim: how many of the seeds it held for."""
    lines = ["| lesson | claim | held |", "| --- | --- | --- |"]
    for lesson, found in sorted(kept.items()):
        for claim, count in found["held"].items():
            lines.append(f"| {lesson[:2]} | {claim} | {count} of {len(found['seeds'])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
