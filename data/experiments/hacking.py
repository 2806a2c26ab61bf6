"""A reward that looks sensible and is gamed, and the same run with the reward repaired.

    python data/experiments/hacking.py              # about a minute a seed on two cores

Village questions. The proxy pays for politeness, counted in polite words, and for length. The
repaired reward asks for a polite reply, too, but pays only if the fact is there, counts a courtesy
once and charges for words beyond sixteen. Both start from one SFT model with one seed; true
quality is `village_quality`, a rule that pays neither. Writes data/results/hacking.json.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, seeds_parser

from course_lib.checkpoints import training_client_from
from course_lib.client import connect
from course_lib.config import RLConfig, preset
from course_lib.diagnosis import diagnose
from course_lib.environments import village_environment
from course_lib.files import write_whole
from course_lib.grpo import train_grpo
from course_lib.pipeline import run_sft
from course_lib.rewards import Problem, Score, reward_from_name
from course_lib.world.village import POLITE_CLOSINGS, POLITE_OPENINGS

COMMAND = "python data/experiments/hacking.py"
VILLAGE = village_environment()
PROXY = "0.5*length+0.5*polite"
CONFIG = RLConfig(
    steps=40, prompts_per_step=8, group_size=8, max_tokens=64, learning_rate=1e-3, save_every=0
)


def repaired(problem: Problem, completion: str) -> Score:
    """Politeness for a reply that answers: each courtesy once, nothing for words beyond sixteen."""
    told = (problem.answer or "?") in completion
    opened = any(each in completion for each in POLITE_OPENINGS)
    closed = any(each in completion for each in POLITE_CLOSINGS)
    excess = max(0, len(completion.split()) - 16)
    value = told * (1 + 0.5 * opened + 0.5 * closed) / 2 - 0.05 * excess
    parts = {"told": float(told), "courtesy": (opened + closed) / 2, "excess": float(excess)}
    return Score(max(-1.0, value), parts, f"{excess} words too many")


def run_arm(service: Any, start: Any, reward: Any, seed: int) -> dict[str, Any]:
    """One arm: reward and true quality, step by step, and a reply from its end."""
    client = training_client_from(service, start, optimizer=False)

    def watched(problem: Problem, completion: str) -> Score:
        score = reward(problem, completion)
        truth = VILLAGE.grade(problem, completion).value
        return Score(score.value, {**score.parts, "quality": truth}, score.reason)

    result = train_grpo(
        client, VILLAGE, CONFIG, tokenizer=client.get_tokenizer(), reward=watched, seed=seed
    )
    return {
        "reward": result.rewards,
        "quality": [row["reward/quality"] for row in result.metrics],
        "correct": [row["env/correct"] for row in result.metrics],
        "diagnosis": [found.kind for found in diagnose(result.metrics)],
        "example": result.groups[0].rollouts[0].text,
    }


def main() -> None:
    parser = seeds_parser(__doc__, RESULTS / "hacking.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        service = connect("embedded", store=str(Path(folder) / "store"))
        for seed in args.seeds:
            began = time.monotonic()
            config = replace(preset("quick"), seed=seed)
            start = run_sft(service, config, Path(folder) / f"sft-{seed}").checkpoints[-1]
            arms = {
                "proxy": run_arm(service, start, reward_from_name(PROXY), seed),
                "repaired": run_arm(service, start, repaired, seed),
            }
            rows.append({"seed": seed, **arms, "seconds": round(time.monotonic() - began, 1)})
            for name, arm in arms.items():
                ends = [f"{arm[key][0]:.2f} -> {arm[key][-1]:.2f}" for key in ("reward", "quality")]
                print(
                    f"seed {seed} {name:8} reward {ends[0]}, quality {ends[1]}, {arm['diagnosis']}"
                )
    result = {"command": COMMAND, "proxy": PROXY, "seeds": rows}
    write_whole(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
