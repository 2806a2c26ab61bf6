"""Preferences on the village questions: reward model, tournament GRPO and DPO, from one SFT model.

    python data/experiments/preferences.py              # two minutes a seed on two cores

For every seed: (a) two Bradley-Terry reward models, their accuracy and calibration on held-out
pairs (prompts they were not trained on); (b) GRPO paid by a tournament that the better one judges;
(c) DPO on the same pairs, plain and with the chosen replies' own loss. (b) and (c) are compared
with the SFT model on held-out questions by `village_quality`, a rule that nothing was trained on (a
draw counts half). Writes data/results/preferences.json.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, seeds_parser

from course_lib.checkpoints import training_client_from
from course_lib.client import connect
from course_lib.config import PreferenceConfig, RLConfig, preset
from course_lib.environments import village_environment
from course_lib.evaluation import evaluate
from course_lib.files import write_whole
from course_lib.grpo import train_grpo
from course_lib.judges import (
    Duel,
    Judge,
    judge_by_rule,
    judge_by_strength,
    reward_model,
    tournament_reward,
    win_rate,
)
from course_lib.pipeline import run_sft
from course_lib.preferences import (
    Pair,
    calibration,
    load_pairs,
    train_dpo,
    train_reward_model,
)
from course_lib.rewards import Problem

COMMAND = "python data/experiments/preferences.py"
VILLAGE = village_environment()
JUDGE = PreferenceConfig(batch_size=16, epochs=3, learning_rate=2e-3)
# At 2e-3 plain DPO is torn loose on one seed of five: the chosen replies lose likelihood, too.
DPO = PreferenceConfig(batch_size=16, epochs=3, learning_rate=1e-3, dpo_beta=0.1)
DPO_NLL = replace(DPO, dpo_nll=0.2)
GRPO = RLConfig(steps=40, prompts_per_step=8, group_size=8, max_tokens=48, save_every=0)


def pair_results(judge: Judge, pairs: list[Pair]) -> dict[str, Any]:
    """Accuracy, by reason too, and calibration of a judge on held-out pairs."""
    wins = judge([Duel(Problem(pair.prompt), pair.chosen, pair.rejected) for pair in pairs])
    by_reason: dict[str, list[bool]] = {}
    for pair, win in zip(pairs, wins, strict=True):
        by_reason.setdefault(pair.why, []).append(win > 0.5)
    return {
        "pairs": len(pairs),
        "accuracy": statistics.fmean(win > 0.5 for win in wins),
        "by_reason": {why: statistics.fmean(right) for why, right in sorted(by_reason.items())},
        "calibration": calibration(wins),
    }


def trained_judge(service: Any, pairs: list[Pair], strength: str, seed: int) -> Judge:
    """A reward model of its own adapter, trained on `pairs`."""
    config = replace(JUDGE, strength=strength)
    client = service.create_lora_training_client(
        service.base_model, rank=config.lora_rank, seed=seed
    ).result()
    tokenizer = client.get_tokenizer()
    train_reward_model(client, pairs, config, tokenizer=tokenizer, seed=seed)
    sampler = client.save_weights_and_get_sampling_client().result()
    return judge_by_strength(reward_model(sampler, tokenizer, strength))


def quality(
    sampler: Any, tokenizer: Any, problems: list[Problem]
) -> tuple[dict[str, float], list[str]]:
    """Mean quality by the rule, its parts, and the completions."""
    found = evaluate(sampler, tokenizer, VILLAGE, problems, max_tokens=48)
    texts = [record.completions[0] for record in found.records]
    scores = [VILLAGE.grade(problem, text) for problem, text in zip(problems, texts, strict=True)]
    parts = {
        name: statistics.fmean(score.parts[name] for score in scores) for name in scores[0].parts
    }
    return {"quality": statistics.fmean(s.value for s in scores), **parts}, texts


def run_seed(service: Any, seed: int, folder: Path, problems: list[Problem]) -> dict[str, Any]:
    began = time.monotonic()
    config = replace(preset("quick"), seed=seed)
    sft = run_sft(service, config, folder / f"sft-{seed}").checkpoints[-1]
    pairs = load_pairs("data/preferences.jsonl")
    train = [pair for pair in pairs if not pair.heldout]
    held = [pair for pair in pairs if pair.heldout]

    judges = {name: trained_judge(service, train, name, seed) for name in ("verdict", "reply")}
    trained, rule = judges["reply"], judge_by_rule(VILLAGE.grade)
    tokenizer = service.create_sampling_client(sft.sampler_path).result().get_tokenizer()

    before, sft_texts = quality(
        service.create_sampling_client(sft.sampler_path).result(), tokenizer, problems
    )
    row: dict[str, Any] = {
        "seed": seed,
        "reward_models": {name: pair_results(judge, held) for name, judge in judges.items()},
        "sft": before,
    }

    grpo_client = training_client_from(service, sft, optimizer=False)
    reward = tournament_reward(trained)
    train_grpo(grpo_client, VILLAGE, GRPO, tokenizer=tokenizer, reward=reward, seed=seed)
    clients = {"grpo": grpo_client}
    for name, how in (("dpo", DPO), ("dpo_nll", DPO_NLL)):
        clients[name] = training_client_from(service, sft, optimizer=False)
        train_dpo(clients[name], train, how, tokenizer=tokenizer, seed=seed)

    for name, client in clients.items():
        sampler = client.save_weights_and_get_sampling_client().result()
        after, texts = quality(sampler, tokenizer, problems)
        row[name] = {
            **after,
            "win_rate_by_rule": win_rate(rule, problems, texts, sft_texts),
            "win_rate_by_reward_model": win_rate(trained, problems, texts, sft_texts),
            "example": texts[0],
        }
    row["seconds"] = round(time.monotonic() - began, 1)
    return row


def main() -> None:
    parser = seeds_parser(__doc__, RESULTS / "preferences.json")
    parser.add_argument("--problems", type=int, default=100)
    args = parser.parse_args()
    problems = VILLAGE.heldout(args.problems, 0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        service = connect("embedded", store=str(Path(folder) / "store"))
        for seed in args.seeds:
            rows.append(run_seed(service, seed, Path(folder), problems))
            print(json.dumps(rows[-1]), flush=True)
    result = {"command": COMMAND, "problems": args.problems, "seeds": rows}
    write_whole(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
