"""What does GRPO on sums cost elsewhere? True answers about the village, before and after.

    python data/experiments/forgetting.py              # 32 to 42 seconds a seed on two cores

Lesson 08's training run, with the settings and the village of its cells, from five SFT models:
alone, half as long, and with a KL penalty. Each of 60 questions about people of the village is
answered four times at temperature 1, and no reward asks for any of them; each of 120 held-out sums,
which GRPO is rewarded for, as often. Writes data/results/forgetting.json.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from dataclasses import replace
from typing import Any

from common import RESULTS, Lesson, seeds_parser

from course_lib.client import connect
from course_lib.comparison import compare
from course_lib.config import preset
from course_lib.environments import sums_environment
from course_lib.evaluation import evaluate
from course_lib.files import write_whole
from course_lib.grpo import train_grpo
from course_lib.lessons import quick_sft

COMMAND = "python data/experiments/forgetting.py"
LESSON = Lesson("08_evaluate", {"preset": lambda: preset("tiny"), "random": random})
LESSON.run("settings")
LESSON.run("village-environment")
PROBLEMS, SAMPLES, MAX_TOKENS = (LESSON.names[n] for n in ("PROBLEMS", "SAMPLES", "MAX_TOKENS"))
GRPO, VILLAGE = LESSON.names["rl_config"], LESSON.names["village"]
QUESTIONS = 60  # about the village, as there
RUNS = {
    "GRPO": GRPO,
    "GRPO, 7 steps": replace(GRPO, steps=7),
    **{f"GRPO, KL penalty {beta}": replace(GRPO, kl_penalty=beta) for beta in (0.1, 0.3, 1)},
}
SUMS = sums_environment()


def run_seed(service: Any, seed: int) -> dict[str, Any]:
    """One SFT model, and what each run made of it."""
    began = time.monotonic()
    client, tokenizer, _ = quick_sft(service, seed=seed)
    start = client.save_state(f"start-{seed}").result().path
    asked = {VILLAGE: VILLAGE.heldout(QUESTIONS, 0), SUMS: SUMS.heldout(PROBLEMS, 0)}

    def judged(learner: Any, seed: int) -> dict[str, Any]:
        sampler = learner.save_weights_and_get_sampling_client().result()
        return {
            world.name: evaluate(
                sampler,
                tokenizer,
                world,
                problems,
                max_tokens=MAX_TOKENS,
                samples=SAMPLES,
                seed=seed,
            )
            for world, problems in asked.items()
        }

    before = judged(client, 0)
    rows = {"SFT": {name: found.accuracy for name, found in before.items()}}
    for name, config in RUNS.items():
        learner = service.create_training_client_from_state(start).result()
        train_grpo(learner, SUMS, config, tokenizer=tokenizer, seed=seed)
        after = judged(learner, 1)
        rows[name] = {key: found.accuracy for key, found in after.items()}
        rows[name]["verdict"] = str(compare(before["village"], after["village"]))
    return {"seed": seed, "runs": rows, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    args = seeds_parser(__doc__, RESULTS / "forgetting.json").parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as store:
        service = connect("embedded", store=store, quiet=True)
        for seed in args.seeds:
            rows.append(run_seed(service, seed))
            print(json.dumps(rows[-1]), flush=True)
    asked = {"questions": QUESTIONS, "problems": PROBLEMS, "samples": SAMPLES}
    result = {"command": COMMAND, **asked, "steps": GRPO.steps, "seeds": rows}
    write_whole(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
