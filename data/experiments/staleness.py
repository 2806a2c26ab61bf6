"""How late may rollouts be trained on? importance_sampling, ppo and cispo, 1, 4 and 16 steps late.

    python data/experiments/staleness.py              # two and a half minutes a seed on two cores

As in asynchronous RL: step t trains on the batch that the policy of step t - k sampled. All runs of
a seed begin at one SFT model, take the same problems and as many steps, and differ in loss and k;
"on time" is importance_sampling with k = 0. Measured are the held-out accuracy at temperature 1
after the last step, and over the second half of the run the effective sample size and the tokens
outside PPO's clip range, by the sign of the advantage. Writes data/results/staleness.json.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import deque
from typing import Any

import tinker
from common import RESULTS, seeds_parser

from course_lib.advantages import group_advantages, is_dead
from course_lib.client import connect
from course_lib.config import RLConfig
from course_lib.environments import derive_seed, sums_environment
from course_lib.evaluation import evaluate
from course_lib.files import write_whole
from course_lib.grpo import credited, rl_datum, step_ratios
from course_lib.lessons import quick_sft
from course_lib.rollouts import Group, sample_groups, score_groups

COMMAND = "python data/experiments/staleness.py"
SUMS = sums_environment()
STEPS, PROMPTS, LEARNING_RATE = 40, 8, 8e-4
LOSSES, DELAYS = ("importance_sampling", "ppo", "cispo"), (1, 4, 16)
RUNS = [("importance_sampling", 0), *((loss, delay) for delay in DELAYS for loss in LOSSES)]
WATCHED = ("ratio/ess", "ratio/clipped_up", "ratio/clipped_down", "kl/sample_train_k3")


def sampled(client: Any, tokenizer: Any, seed: int, step: int) -> list[Group]:
    """One batch of scored groups from the policy as it is now."""
    sampler = client.save_weights_and_get_sampling_client().result()
    problems = SUMS.sample(PROMPTS, derive_seed(seed, "problems", step))
    groups = sample_groups(
        sampler,
        problems,
        tokenizer,
        group_size=8,
        max_tokens=40,
        temperature=1.0,
        seed=derive_seed(seed, "samples", step),
        reply=SUMS.reply,
    )
    return score_groups(groups, SUMS.grade)


def train_late(
    client: Any, tokenizer: Any, loss_fn: str, delay: int, seed: int
) -> list[dict[str, float]]:
    """STEPS steps, each on the batch sampled `delay` steps before it."""
    config = RLConfig(loss_fn=loss_fn)
    waiting: deque[list[Group]] = deque(
        sampled(client, tokenizer, seed, -number) for number in range(1, delay + 1)
    )
    rows = []
    for step in range(STEPS):
        waiting.append(sampled(client, tokenizer, seed, step))
        groups = waiting.popleft()
        credits_D = [
            credit
            for group in groups
            if not is_dead(group.rewards_G)
            for credit in credited(group, group_advantages(group.rewards_G), config)
        ]
        if not credits_D:
            continue
        datums = [rl_datum(turn, advantage, config) for turn, advantage in credits_D]
        backward = client.forward_backward(datums, loss_fn)
        update = client.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
        ratios = step_ratios(credits_D, backward.result(), config)
        update.result()
        rows.append({name: round(ratios[name], 4) for name in WATCHED})
    return rows


def run_seed(service: Any, seed: int, problems: int) -> dict[str, Any]:
    """All runs of one seed, from one start."""
    began = time.monotonic()
    client, tokenizer, _ = quick_sft(service, seed=seed)
    start = client.save_state(f"start-{seed}").result().path
    heldout = SUMS.heldout(problems, seed)
    runs = []
    for loss_fn, delay in RUNS:
        learner = service.create_training_client_from_state(start).result()
        rows = train_late(learner, tokenizer, loss_fn, delay, seed)
        sampler = learner.save_weights_and_get_sampling_client().result()
        found = evaluate(sampler, tokenizer, SUMS, heldout, temperature=1.0, max_tokens=40, seed=0)
        late = rows[len(rows) // 2 :]
        means = {name: statistics.fmean(row[name] for row in late) for name in WATCHED}
        runs.append({"loss_fn": loss_fn, "delay": delay, "accuracy": found.accuracy, **means})
    return {"seed": seed, "runs": runs, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = seeds_parser(__doc__, RESULTS / "staleness.json")
    parser.add_argument("--problems", type=int, default=300)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as store:
        service = connect("embedded", store=store, quiet=True)
        for seed in args.seeds:
            rows.append(run_seed(service, seed, args.problems))
            print(json.dumps(rows[-1]), flush=True)
    result = {"command": COMMAND, "steps": STEPS, "problems": args.problems, "seeds": rows}
    write_whole(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
