"""How often may one batch of answers be used? Lesson 06's training runs, from five starts.

    python data/experiments/reuse.py              # about five minutes on two cores
    python data/experiments/reuse.py --seeds 1    # a look

Six batches of 64 answers each. "gentle": learning rate 4e-4; "fast": four times that, the control
for four uses; "hard": 1e-3 and eight steps on each batch. Writes data/results/reuse.json and prints
the mean reward of the last three batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from course_lib.client import connect
from course_lib.config import RLConfig
from course_lib.environments import sums_environment
from course_lib.grpo import train_grpo
from course_lib.lessons import quick_sft

RESULTS = Path(__file__).parent.parent / "results" / "reuse.json"
COMMON = RLConfig(
    steps=6, prompts_per_step=8, group_size=8, max_tokens=40, schedule="constant", save_every=0
)
GENTLE, HARD = replace(COMMON, learning_rate=4e-4), replace(COMMON, learning_rate=1e-3, substeps=8)
RUNS = {
    "gentle, used 1x": GENTLE,
    "gentle, used 4x": replace(GENTLE, substeps=4),
    "fast, used 1x": replace(GENTLE, learning_rate=4 * GENTLE.learning_rate),
    "hard, importance_sampling": HARD,
    "hard, ppo": replace(HARD, loss_fn="ppo"),
    "hard, cispo": replace(HARD, loss_fn="cispo"),
}


def run_seed(service, seed: int) -> dict[str, list[float]]:
    """The rewards of every batch of every run, all from one start."""
    client, tokenizer, _ = quick_sft(service, seed=seed)
    start = client.save_state(f"start-{seed}").result().path
    rewards = {}
    for name, config in RUNS.items():
        learner = service.create_training_client_from_state(start).result()
        result = train_grpo(learner, sums_environment(), config, tokenizer=tokenizer, seed=seed)
        rewards[name] = [round(reward, 4) for reward in result.rewards]
    return rewards


def table(rows: list[dict[str, list[float]]]) -> str:
    """Mean reward of the last three batches: one line per run, one column per start, the median."""
    columns = [str(seed) for seed in range(len(rows))]
    lines = ["| run | " + " | ".join(columns) + " | median |", "| --- " * (len(rows) + 2) + "|"]
    for name in RUNS:
        late = [statistics.fmean(row[name][-3:]) for row in rows]
        cells = [f"{value:.2f}" for value in (*late, statistics.median(late))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        service = connect("embedded", store=store, quiet=True)
        rows = [run_seed(service, seed) for seed in range(options.seeds)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"command": "python data/experiments/reuse.py", "starts": rows}
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
