"""The judge of a run: trained once in the run's folder, then asked by rewards preference and
tournament.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.checkpoints import CheckpointLog, StepHook, StopTraining
from course_lib.config import RunConfig
from course_lib.environments import derive_seed
from course_lib.errors import CourseError
from course_lib.judges import (
    Strengths,
    judge_by_strength,
    preference_reward,
    reward_model,
    tournament_reward,
)
from course_lib.preferences import Pair, load_pairs, train_reward_model
from course_lib.rewards import BatchReward, Reward, reward_from_name
from course_lib.rollouts import sample_groups
from course_lib.run_data import SHIPPED_DATA, RunData

if TYPE_CHECKING:
    import tinker

    from course_lib.client import CourseService

SHIPPED_PAIRS = "data/preferences.jsonl"
OWN_PAIRS = 256  # at most, of a learner's answers against the model's own


def reward_spec(config: RunConfig, data: RunData) -> str:
    """`rl.reward`, with auto spelt out: correct where answers can be checked, else tournament."""
    if config.rl.reward != "auto":
        return config.rl.reward
    return "correct" if data.environment.checkable else "tournament"


def needs_judge(config: RunConfig, data: RunData) -> bool:
    """Whether the reward asks a trained judge."""
    names = [term.rpartition("*")[2].strip() for term in reward_spec(config, data).split("+")]
    return "preference" in names or "tournament" in names


def run_reward(
    config: RunConfig, data: RunData, strengths: Strengths | None
) -> Reward | BatchReward:
    """The run's reward; `strengths` is the trained judge, if `needs_judge`."""
    known: dict[str, Reward | BatchReward] = {"correct": data.environment.grade}
    if strengths:
        known["preference"] = preference_reward(strengths)
        known["tournament"] = tournament_reward(judge_by_strength(strengths))
    return reward_from_name(reward_spec(config, data), known)


def run_judge(
    service: CourseService,
    config: RunConfig,
    out: Path,
    data: RunData,
    policy: tinker.SamplingClient,
    base_model: str,
    on_step: StepHook | None = None,
) -> Strengths:
    """Train the judge in `out`, or find it there; `policy` writes the replies to judge against.

    Raises StopTraining when the hook stopped it: half a judge is none.
    """
    checkpoint = CheckpointLog(out).last("preference")
    if checkpoint is None:
        rank = config.preference.lora_rank
        client = service.create_lora_training_client(
            base_model, rank=rank, seed=config.seed
        ).result()
        result = train_reward_model(
            client,
            judge_pairs(config, data, policy),
            config.preference,
            tokenizer=client.get_tokenizer(),
            out=out,
            seed=config.seed,
            on_step=on_step,
        )
        if result.stopped:
            raise StopTraining
        checkpoint = result.checkpoints[-1]
    sampler = service.create_sampling_client(checkpoint.sampler_path).result()
    return reward_model(sampler, sampler.get_tokenizer(), config.preference.strength)


def judge_pairs(config: RunConfig, data: RunData, policy: tinker.SamplingClient) -> list[Pair]:
    """The pairs to train on: those of a file, or a learner's own answers against the policy's."""
    path = config.preference.data_path
    if path == "auto" and config.sft.data_path == SHIPPED_DATA:
        path = SHIPPED_PAIRS
    if path != "auto":
        pairs = load_pairs(path)
        train = [pair for pair in pairs if not pair.heldout] or pairs
    else:
        train = own_pairs(config, data, policy)
    if not train:
        finding = "no pair of different replies to learn a judge from"
        raise CourseError("preference.data_path", finding, "give a JSONL of chosen and rejected")
    return train


def own_pairs(config: RunConfig, data: RunData, policy: tinker.SamplingClient) -> list[Pair]:
    """What the conversations answer, preferred to what the policy answers in their place."""
    problems = data.environment.sample(OWN_PAIRS, derive_seed(config.seed, "pairs"))
    problems = [problem for problem in problems if problem.meta.get("reference")]
    groups = sample_groups(
        policy,
        problems,
        policy.get_tokenizer(),
        group_size=1,
        max_tokens=config.rl.max_tokens,
        seed=derive_seed(config.seed, "pairs"),
    )
    drafts = [
        Pair(group.problem.messages, group.problem.meta["reference"], group.rollouts[0].text)
        for group in groups
    ]
    return [pair for pair in drafts if pair.chosen.strip() != pair.rejected.strip()]
