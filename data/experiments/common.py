"""What several experiments need: their options, and a lesson's own cells."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "data" / "results"
sys.path.insert(0, str(ROOT))  # tools/ is not installed

from tools.editions import SOLUTIONS, read_cells  # noqa: E402


def seeds_parser(description: str | None, out: Path | None) -> argparse.ArgumentParser:
    """`--seeds`, five of them by default, and `--out`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=out)
    return parser


class Lesson:
    """A lesson's code cells, run one by one, and the names that they and `given` have made."""

    def __init__(self, stem: str, given: Mapping[str, Any] | None = None) -> None:
        cells = [c for c in read_cells(SOLUTIONS / f"{stem}.py") if c.cell_type == "code"]
        self.sources = {cell.metadata["id"]: cell.source for cell in cells}
        self.names = dict(given or {})

    def run(self, cell: str, instead: tuple[str, str] = ("", "")) -> None:
        """Run one cell, with one text in the place of another."""
        assert instead[0] in self.sources[cell], f"the cell {cell} has changed"
        exec(self.sources[cell].replace(*instead), self.names)

    def run_up_to(self, cell: str) -> None:
        """Run all cells before this one."""
        for each in takewhile(lambda each: each != cell, self.sources):
            self.run(each)
