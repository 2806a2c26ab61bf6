"""Do two remarks of the lessons hold for other orders of the rows? Runs their cells once for each.

    python data/experiments/orders.py optimizers     # lesson 02: how wide is a full fine-tune's
                                                     # change, by Adam and by SGD? half a minute
    python data/experiments/orders.py schedules      # lesson 03: which schedule ends lowest?
                                                     # a minute

The cells are those of solutions/02_lora.py and 03_sft.py; only the order changes, and the
optimizer. Writes data/results/optimizers.json or schedules.json.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, Lesson, seeds_parser

from course_lib.files import write_whole
from tools.execute import lane_environment

ADAM = "torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.95))"
SGD = "torch.optim.SGD(parameters, lr=rate, momentum=0.9)"
RATES = {ADAM: 2e-3, SGD: 0.05}  # Adam's is the lesson's
NAMES = {ADAM: "Adam", SGD: "SGD with momentum"}


def optimizers(seed: int) -> dict[str, Any]:
    """How much of a full fine-tune's change, and of what it gained, sixteen ranks keep."""
    lesson = Lesson("02_lora")
    lesson.run_up_to("plain-train")
    random.Random(seed).shuffle(lesson.names["rows"])
    runs = {}
    for optimizer, name in NAMES.items():
        lesson.run("plain-train", instead=(ADAM, optimizer))
        lesson.run("full-fine-tune", instead=("rate=2e-3", f"rate={RATES[optimizer]}"))
        for cell in ("size-of-change", "spectrum", "truncate", "truncate-figure"):
            lesson.run(cell)
        found = lesson.names
        runs[name] = {
            "loss": found["full_loss"],
            "energy": found["energy"],
            "gained": found["gained"],
        }
    return {"cuts": list(lesson.names["CUTS"]), "base": lesson.names["base_loss"], "runs": runs}


def schedules(seed: int) -> dict[str, Any]:
    """The held-out loss after each schedule, on the same batches."""
    lesson = Lesson("03_sft")
    lesson.run_up_to("run-schedules")
    lesson.run("run-schedules", instead=("epoch=0", f"epoch={seed}"))
    nll, heldout, runs = (lesson.names[name] for name in ("nll", "heldout_datums", "runs"))
    return {"runs": {name: nll(client, heldout) for name, (_, client) in runs.items()}}


EXPERIMENTS = {"optimizers": optimizers, "schedules": schedules}


def main() -> None:
    parser = seeds_parser(__doc__, None)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(lane_environment(Path(folder)))
        for seed in args.seeds:
            began = time.monotonic()
            found = EXPERIMENTS[args.experiment](seed)
            rows.append({"seed": seed, **found, "seconds": round(time.monotonic() - began, 1)})
            print(json.dumps(rows[-1]), flush=True)
    out = args.out or RESULTS / f"{args.experiment}.json"
    command = f"python data/experiments/orders.py {args.experiment}"
    write_whole(out, json.dumps({"command": command, "seeds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
