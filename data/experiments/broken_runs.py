"""Break RL in eight ways, for real, and see whether `diagnose` names what was done.

    python data/experiments/broken_runs.py                  # six minutes a seed on two cores
    python data/experiments/broken_runs.py --seeds 7 --kinds kl_runaway

Every run starts from an SFT checkpoint of its own seed and takes 30 steps of 8 problems x 8
completions. Seed 0 is the one that the thresholds were looked at with: its metrics are kept in
data/results/broken_runs/KIND.jsonl, the clinic lesson's recordings. Seeds 1 to 5 are unseen:
data/results/diagnosis.json counts how often the rules are right.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from course_lib.checkpoints import training_client_from, write_whole
from course_lib.client import connect
from course_lib.config import RLConfig, preset
from course_lib.diagnosis import diagnose
from course_lib.environments import sums_environment
from course_lib.grpo import train_grpo
from course_lib.pipeline import run_sft
from course_lib.rewards import Problem, Reward, Score, reward_from_name

RESULTS = Path(__file__).parent.parent / "results"
COMMAND = "python data/experiments/broken_runs.py"
SOUND = RLConfig(steps=30, prompts_per_step=8, group_size=8, save_every=0)


@dataclass(frozen=True)
class Broken:
    """What was done to a sound run."""

    how: str
    config: RLConfig = SOUND
    reward: Reward | None = None  # None: right or wrong
    after_sft: bool = True


def coin(problem: Problem, completion: str) -> Score:
    """A grader that looks at neither question nor answer."""
    heads = random.Random(f"{problem.id} {completion}").random() < 0.5
    return Score(float(heads), {}, "a coin")


def first_row(problem: Problem, completion: str) -> Score:
    """A grader that compares every answer with the first row's, 129, and pays for coming near."""
    said = re.findall(r"answer is ([0-9]{1,6})", completion)
    distance = abs(int(said[-1]) - 129) if said else 1000
    return Score(1 / (1 + distance / 5), {}, f"{distance} from 129")


def characters(problem: Problem, completion: str) -> Score:
    """A grader that pays for every character."""
    return Score(len(completion) / 100, {}, f"{len(completion)} characters")


def brief(problem: Problem, completion: str) -> Score:
    """A grader that wants short answers and takes the right ones for granted."""
    score = reward_from_name("length")(problem, completion)  # type: ignore[operator]
    return Score(1 - score.value, {}, score.reason)


KINDS = {
    "ratio_off": Broken("sampled at temperature 0.5", replace(SOUND, temperature=0.5)),
    "dead_groups": Broken("RL straight from the base model", after_sft=False),
    "length_explosion": Broken(
        "every character is paid for",
        replace(SOUND, max_tokens=96, learning_rate=2e-3, schedule="constant"),
        characters,
    ),
    "entropy_collapse": Broken(
        "every answer is compared with the first row's, at a high rate",
        replace(SOUND, learning_rate=3e-3, schedule="constant"),
        first_row,
    ),
    "hacked_reward": Broken("short answers are paid for, right or wrong", reward=brief),
    "kl_runaway": Broken(
        "a learning rate of 1e-2", replace(SOUND, learning_rate=1e-2, schedule="constant")
    ),
    "tiny_rate": Broken("a learning rate of 1e-8", replace(SOUND, learning_rate=1e-8)),
    "flat_reward": Broken("the grader tosses a coin", reward=coin),
    "healthy": Broken("nothing was done"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        service = connect("embedded", store=str(Path(folder) / "store"))
        for seed in args.seeds:
            config = replace(preset("quick"), seed=seed)
            sft = run_sft(service, config, Path(folder) / f"sft-{seed}").checkpoints[-1]
            for kind in args.kinds:
                broken = KINDS[kind]
                if broken.after_sft:
                    client = training_client_from(service, sft, optimizer=False)
                else:
                    client = service.create_lora_training_client(
                        service.base_model, rank=16, seed=seed
                    ).result()
                result = train_grpo(
                    client,
                    sums_environment(),
                    broken.config,
                    tokenizer=client.get_tokenizer(),
                    reward=broken.reward,
                    reference=client.save_weights_and_get_sampling_client().result(),
                    seed=seed,
                )
                found = [each.kind for each in diagnose(result.metrics)]
                named = found[0] if found else "healthy"
                rows.append({"kind": kind, "seed": seed, "named": named, "also": found[1:]})
                print(f"{kind:16} seed {seed}: {named} {found[1:] or ''}", flush=True)
                if seed == 0:
                    lines = [json.dumps(row) + "\n" for row in result.metrics]
                    write_whole(args.out / "broken_runs" / f"{kind}.jsonl", "".join(lines))
    unseen = [row for row in rows if row["seed"] != 0]
    right = sum(row["named"] == row["kind"] for row in unseen)
    report = {
        "command": COMMAND,
        "how": {kind: broken.how for kind, broken in KINDS.items()},
        "unseen_runs": len(unseen),
        "unseen_right": right,
        "runs": rows,
    }
    write_whole(args.out / "diagnosis.json", json.dumps(report, indent=1) + "\n")
    print(f"{right} of {len(unseen)} unseen runs named right")


if __name__ == "__main__":
    main()
