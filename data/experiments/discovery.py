"""Does GRPO discover that worked answers pay? Five seeds of the quick preset, and RL without SFT.

    python data/experiments/discovery.py              # ten minutes on two cores
    python data/experiments/discovery.py --seeds 1 --problems 100   # a look

Writes data/results/discovery.json and prints the table that stands in data/base-model/README.md.
Every run is `posttrain all --config quick --seed N`; the reward is correctness and nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from course_lib.client import connect
from course_lib.config import RunConfig, preset
from course_lib.evaluation import evaluate
from course_lib.pipeline import run_all, run_rl
from course_lib.run_data import load_run_data

RESULTS = Path(__file__).parent.parent / "results" / "discovery.json"


def numbers(summary: dict) -> dict[str, float]:
    """The three figures of one stage, from its entry in report.json."""
    return {
        "accuracy": summary["accuracy"],
        "worked_share": summary["worked_share"],
        "greedy_accuracy": summary["greedy"]["accuracy"],
    }


def without_sft(service, config: RunConfig, out: Path) -> dict[str, float]:
    """GRPO straight from the base model: what there is to reinforce, it must find by chance."""
    data = load_run_data(config)
    result = run_rl(service, config, out, None, data=data)
    sampler = service.create_sampling_client(result.checkpoints[-1].sampler_path).result()
    problems = data.environment.heldout(config.eval_problems, 0)
    found = evaluate(sampler, sampler.get_tokenizer(), data.environment, problems)
    dead = [row["env/dead_groups"] / row["env/groups"] for row in result.metrics]
    return {"accuracy": found.accuracy or 0.0, "dead_groups": statistics.fmean(dead)}


def run_seed(service, seed: int, problems: int, folder: Path) -> dict:
    config = replace(preset("quick"), seed=seed, eval_problems=problems)
    report = run_all(service, config, folder / f"{seed}")
    stages = {stage: numbers(report[stage]) for stage in ("base", "sft", "rl")}
    bare = without_sft(service, config, folder / f"{seed}-without-sft")
    return {"seed": seed, "seconds": round(report["seconds"], 1), **stages, "without_sft": bare}


def table(rows: list[dict]) -> str:
    """The rows as Markdown, accuracies at temperature 1, greedy in brackets."""
    head = "| seed | base | SFT | SFT worked | GRPO | GRPO worked | GRPO without SFT | seconds |"
    lines = [head, "| --- " * 8 + "|"]
    for row in rows:
        cells = [str(row["seed"])]
        for stage in ("base", "sft", "rl"):
            part = row[stage]
            cells.append(f"{part['accuracy']:.1%} ({part['greedy_accuracy']:.1%})")
            if stage != "base":
                cells.append(f"{part['worked_share']:.1%}")
        cells += [f"{row['without_sft']['accuracy']:.1%}", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        service = connect("embedded", store=str(Path(folder) / "store"))
        for seed in range(args.seeds):
            rows.append(run_seed(service, seed, args.problems, Path(folder)))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    command = "python data/experiments/discovery.py"
    result = {"command": command, "preset": "quick", "problems": args.problems, "seeds": rows}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
