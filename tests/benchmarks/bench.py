"""How fast is the engine, beside TRL? Every row of the table in tests/benchmarks/README.md.

    python tests/benchmarks/bench.py                          # all rows, some 30 minutes
    python tests/benchmarks/bench.py --rows sft,grpo --rounds 9
    python tests/benchmarks/bench.py --rows big_grpo --add    # more rounds for a stored row

Contenders work in turn, in processes of their own (duel.py); a row's numbers are medians of rounds.
What a row gave replaces what results/bench.json holds of it; table and figure are drawn from there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Contenders end without ado, and Python's keeper of shared resources would remark on it.
os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
for name in ("COURSE_BACKEND", "TINKER_BASE_URL", "TINKER_API_KEY"):
    os.environ.pop(name, None)

import report  # noqa: E402
import single  # noqa: E402
from duel import Contender, run  # noqa: E402
from rows import DUELS, Row  # noqa: E402

ROUNDS = 15
BUDGET_S = 240.0  # of one row: then it ends, with five rounds at least (duel.FEWEST)


def duel(row: Row, rounds: int, budget_s: float) -> dict[str, Any]:
    """Measure one row: what each contender needed."""
    contenders = [
        Contender(name, target, row.options | own, row.laps_of.get(name, row.laps))
        for name, (target, own) in row.sides.items()
    ]
    run(contenders, rounds, row.warm_ups, budget_s)
    sides = {
        each.name: {
            "rounds_s": each.rounds,
            "cpu_s": sum(each.cpu_s) / len(each.cpu_s),
            "peak_mib": round(each.peak_mib),
        }
        for each in contenders
    }
    return {"sides": sides, "flops": row.flops() if row.flops else None}


def main() -> None:
    names = [*DUELS, *single.ROWS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for one row")
    parser.add_argument("--add", action="store_true", help="keep the rounds of earlier runs")
    parser.add_argument("--show", action="store_true", help="measure nothing, draw what is stored")
    asked = parser.parse_args()
    chosen = [] if asked.show else asked.rows.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(names)}")
    results, failed = report.load(), []
    if chosen:
        results["machine"] = report.machine(results.get("machine"))
    for name in chosen:
        began = time.monotonic()
        try:
            if name in DUELS:
                found = duel(DUELS[name], asked.rounds, asked.budget)
            else:
                found = single.measure(name, asked.rounds, asked.budget)
        except RuntimeError as error:  # a row that cannot be measured must not cost the others
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
            continue
        report.keep(results, name, found, add=asked.add)
        took = time.monotonic() - began
        print(f"{name}: {took:.0f} s; {report.summary(name, results)}", flush=True)
    report.write(results)
    print(report.table(results))
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    # Stores and output folders of all contenders, who end too abruptly to clear up themselves.
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as scratch:
        os.environ["TMPDIR"] = scratch
        main()
