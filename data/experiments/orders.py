"""Do two remarks of the lessons hold for other orders of the rows? Runs their cells once for each.

    python data/experiments/orders.py optimizers     # lesson 02: how wide is a full fine-tune's
                                                     # change, by Adam and by SGD? half a minute
    python data/experiments/orders.py schedules      # lesson 03: which schedule ends lowest?
                                                     # a minute

The cells are those of solutions/02_lora.py and 03_sft.py; only the order changes, and the
optimizer. Writes data/results/optimizers.json or schedules.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # tools/ is not installed

from course_lib.checkpoints import write_whole  # noqa: E402
from tools.editions import SOLUTIONS, read_cells  # noqa: E402
from tools.execute import lane_environment  # noqa: E402

ADAM = "torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.95))"
SGD = "torch.optim.SGD(parameters, lr=rate, momentum=0.9)"
RATES = {ADAM: 2e-3, SGD: 0.05}  # Adam's is the lesson's
NAMES = {ADAM: "Adam", SGD: "SGD with momentum"}


class Lesson:
    """A lesson's code cells, run as far as `upto`, and the names that they have made."""

    def __init__(self, stem: str, upto: str) -> None:
        cells = [c for c in read_cells(SOLUTIONS / f"{stem}.py") if c.cell_type == "code"]
        self.sources = {cell.metadata["id"]: cell.source for cell in cells}
        self.names: dict[str, Any] = {}
        for each in takewhile(lambda each: each != upto, self.sources):
            self.run(each)

    def run(self, cell: str, instead: tuple[str, str] = ("", "")) -> None:
        """Run one cell, with one text in the place of another."""
        assert instead[0] in self.sources[cell], f"the cell {cell} has changed"
        exec(self.sources[cell].replace(*instead), self.names)


def optimizers(seed: int) -> dict[str, Any]:
    """How much of a full fine-tune's change, and of what it gained, sixteen ranks keep."""
    import torch

    lesson = Lesson("02_lora", upto="plain-train")
    random.Random(seed).shuffle(lesson.names["rows"])
    runs = {}
    for optimizer, name in NAMES.items():
        lesson.run("plain-train", instead=(ADAM, optimizer))
        lesson.run("full-fine-tune", instead=("rate=2e-3", f"rate={RATES[optimizer]}"))
        found = lesson.names
        base, tuned = found["base_layers"], found["tuned_layers"]
        found["pieces"] = pieces = {
            each: torch.linalg.svd((tuned[each].weight - base[each].weight).detach(), False)
            for each in base
        }
        lesson.run("truncate")
        squares = [piece.S**2 for piece in pieces.values()]
        runs[name] = {
            "loss": found["full_loss"],
            "energy": [
                (sum(s[:rank].sum() for s in squares) / sum(s.sum() for s in squares)).item()
                for rank in found["CUTS"]
            ],
            "gained": found["gained"],
        }
    return {"cuts": list(lesson.names["CUTS"]), "base": lesson.names["base_loss"], "runs": runs}


def schedules(seed: int) -> dict[str, Any]:
    """The held-out loss after each schedule, on the same batches."""
    lesson = Lesson("03_sft", upto="run-schedules")
    lesson.run("run-schedules", instead=("epoch=0", f"epoch={seed}"))
    nll, heldout, runs = (lesson.names[name] for name in ("nll", "heldout_datums", "runs"))
    return {"runs": {name: nll(client, heldout) for name, (_, client) in runs.items()}}


EXPERIMENTS = {"optimizers": optimizers, "schedules": schedules}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(lane_environment(Path(folder)))
        for seed in args.seeds:
            began = time.monotonic()
            found = EXPERIMENTS[args.experiment](seed)
            rows.append({"seed": seed, **found, "seconds": round(time.monotonic() - began, 1)})
            print(json.dumps(rows[-1]), flush=True)
    out = args.out or ROOT / "data" / "results" / f"{args.experiment}.json"
    command = f"python data/experiments/orders.py {args.experiment}"
    write_whole(out, json.dumps({"command": command, "seeds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
