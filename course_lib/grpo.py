"""GRPO: sample a group of completions, prefer those that did better than their siblings, repeat.

One step reads: sample -> rewards -> advantages -> datums -> loss -> optimizer step. It is the
algorithm of Shao et al. 2024 (https://arxiv.org/abs/2402.03300) with the defaults of Dr. GRPO (Liu
et al. 2025, https://arxiv.org/abs/2503.20783): no division by the standard deviation, none by the
length.

All randomness of step n follows from (seed, n): a killed run goes on from its last checkpoint with
the problems and the samples that it would have drawn. `config.deterministic` also fixes the decode
batches, and so the last bit.

Suffixes of ragged lists: P problems, G completions of one problem, T tokens, D datums.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.advantages import group_advantages, is_dead
from course_lib.batches import make_rl_datum
from course_lib.checkpoints import (
    Checkpoint,
    CheckpointLog,
    StepHook,
    StopTraining,
    save_checkpoint,
)
from course_lib.config import RLConfig
from course_lib.environments import Environment, derive_seed
from course_lib.errors import CourseError
from course_lib.evaluation import evaluate
from course_lib.metrics import MetricsLog, kl_k1, kl_k2, kl_k3
from course_lib.rewards import BatchReward, Reward, reward_from_name
from course_lib.rl_metrics import mean, ratio_metrics, reward_metrics
from course_lib.rollouts import Group, Turn, sample_groups, score_groups
from course_lib.sft import renamed, scheduled_rate

if TYPE_CHECKING:
    import tinker

KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


@dataclass(frozen=True)
class RLResult:
    """What training left behind, and the last step's groups to look at."""

    checkpoints: list[Checkpoint]
    metrics: list[dict[str, Any]]
    groups: list[Group]
    stopped: bool = False

    @property
    def rewards(self) -> list[float]:
        """The mean reward of each step."""
        return [row["reward/total"] for row in self.metrics]


def train_grpo(
    client: tinker.TrainingClient,
    environment: Environment,
    config: RLConfig,
    *,
    tokenizer: Any,
    reward: Reward | BatchReward | None = None,
    reference: tinker.SamplingClient | None = None,
    out: Path | None = None,
    seed: int = 0,
    resume: Checkpoint | None = None,
    on_step: StepHook | None = None,
) -> RLResult:
    """Train `client` on the environment's problems; go on after `resume`, whose weights it holds.

    `reward` replaces the one that `config.reward` names. `reference` is what `config.kl_penalty`
    holds the policy to: by default the policy as it was at step 0.
    """
    import tinker

    reward = reward or named_reward(environment, config)
    loss_fn: Any = config.loss_fn  # the SDK's type lists the names; the config has checked it
    start = resume.step if resume else 0
    metrics_log = MetricsLog(out / "metrics.jsonl") if out else None
    checkpoint_log = CheckpointLog(out) if out else None
    checkpoints: list[Checkpoint] = [resume] if resume else []
    if config.kl_penalty and reference is None:
        reference = starting_policy(client, checkpoint_log, resumed=start > 0)
    heldout = environment.heldout(config.eval_problems, seed) if config.eval_every else []
    rows: list[dict[str, Any]] = []
    groups: list[Group] = []
    stopped = False

    for step in range(start + 1, config.steps + 1):
        began = time.monotonic()

        # 1. Sample: a group of completions for each problem, from the policy as it is now.
        sampler = client.save_weights_and_get_sampling_client().result()
        problems = environment.sample(config.prompts_per_step, derive_seed(seed, "problems", step))
        groups = sample_groups(
            sampler,
            problems,
            tokenizer,
            group_size=config.group_size,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=derive_seed(seed, "samples", step),
            reply=environment.reply,
            one_at_a_time=config.deterministic,
        )
        sampled = time.monotonic()

        # 2. Rewards, less what straying from the reference costs.
        groups = score_groups(groups, reward)
        kl_P_G = reference_kl(reference, groups, config) if reference else None
        rewards_P_G = [group.rewards_G for group in groups]
        if kl_P_G and config.kl_penalty:
            rewards_P_G = [
                [value - config.kl_penalty * kl for value, kl in zip(rewards_G, kl_G, strict=True)]
                for rewards_G, kl_G in zip(rewards_P_G, kl_P_G, strict=True)
            ]

        # 3. Advantages: better or worse than its siblings. A dead group says nothing: left out.
        alive = [not is_dead(rewards_G) for rewards_G in rewards_P_G]
        samples_D = [
            sample
            for group, rewards_G, lives in zip(groups, rewards_P_G, alive, strict=True)
            if lives
            for sample in credited(group, group_advantages(rewards_G, config.advantages), config)
        ]
        datums_D = [rl_datum(turn, advantage, config) for turn, advantage in samples_D]

        # 4. Loss and step. With several sub-steps the policy leaves its samples behind: off-policy
        #    on purpose. Every call is on its way before the first is awaited.
        learning_rate = scheduled_rate(step, config.steps, config)
        adam = tinker.AdamParams(learning_rate=learning_rate)
        calls = [
            (
                client.forward_backward(datums_D, loss_fn, config.loss_fn_config or None),
                client.optim_step(adam),
            )
            for _ in range(config.substeps if datums_D else 0)
        ]
        results = [(backward.result(), update.result()) for backward, update in calls]

        # 5. Metrics, checkpoint, hook.
        metrics: dict[str, Any] = {
            "phase": "rl",
            **reward_metrics(groups, environment),
            "env/dead_groups": alive.count(False),
            "env/groups": len(alive),
            "optim/lr": learning_rate,
            "progress/done_frac": step / config.steps,
        }
        if kl_P_G:
            metrics["kl/reference"] = mean([kl for kl_G in kl_P_G for kl in kl_G])
            metrics["reward/after_kl"] = mean([value for each in rewards_P_G for value in each])
        if results:
            first, latest = results[0][0], results[-1][0]
            metrics |= step_ratios(samples_D, first, config)
            if config.substeps > 1:  # how far the last sub-step had already moved
                late = step_ratios(samples_D, latest, config)
                metrics |= {f"{name}_late": value for name, value in late.items()}
            metrics["optim/loss"] = first.metrics["loss:sum"]
            metrics |= renamed(results[-1][1].metrics or {}, "optim/")
        last = step == config.steps
        if heldout and (last or step % config.eval_every == 0):
            metrics |= heldout_metrics(
                client, environment, heldout, config, tokenizer, reward, seed
            )
        metrics["time/sampling"] = sampled - began
        metrics["time/total"] = time.monotonic() - began
        rows.append({"step": step, **metrics})
        if metrics_log:
            metrics_log.write(step, **metrics)
        if on_step:
            try:
                on_step(step, config.steps, metrics)
            except StopTraining:
                stopped = True
        if last or stopped or (config.save_every and step % config.save_every == 0):
            checkpoints.append(save_checkpoint(client, "rl", step, checkpoint_log))
        if stopped:
            break
    return RLResult(checkpoints, rows, groups, stopped)


def named_reward(environment: Environment, config: RLConfig) -> Reward | BatchReward:
    """The reward that `config.reward` names; auto is the environment's own verdict."""
    known: dict[str, Reward | BatchReward] = {"correct": environment.grade}
    if config.reward != "auto":
        return reward_from_name(config.reward, known)
    if environment.checkable:
        return environment.grade
    finding = f"{environment.name} has no checkable answers"
    raise CourseError("rl.reward", finding, "name a reward, e.g. rewards.py:my_function")


def starting_policy(
    client: tinker.TrainingClient, log: CheckpointLog | None, *, resumed: bool
) -> tinker.SamplingClient:
    """The policy at step 0, saved so that a resumed run is held to the same one."""
    if log is None:
        return client.save_weights_and_get_sampling_client().result()
    zero = next((point for point in log.read() if (point.phase, point.step) == ("rl", 0)), None)
    if zero is None and resumed:
        finding = "the run has no RL checkpoint of step 0, so kl_penalty has no reference"
        raise CourseError(str(log.path), finding, "pass reference=, or set rl.kl_penalty=0")
    zero = zero or save_checkpoint(client, "rl", 0, log)
    return client.create_sampling_client(zero.sampler_path).result()


def reference_kl(
    reference: tinker.SamplingClient, groups: list[Group], config: RLConfig
) -> list[list[float]]:
    """Each completion's KL estimate to the reference, summed over its tokens: kl_P_G, in nats.

    It is charged to the reward. There k1 has the gradient of the KL itself; k2 and k3 are good
    estimates of its value, but not of its gradient.
    """
    import tinker

    estimate = KL_ESTIMATORS[config.kl_estimator]

    def ask(turn: Turn) -> Any:
        tokens = [*turn.prompt_tokens, *turn.completion_tokens]
        future = reference.compute_logprobs(tinker.ModelInput.from_ints(tokens))
        if config.deterministic:
            future.result()
        return future

    asked_P_G = [[[(t, ask(t)) for t in each.turns] for each in group.rollouts] for group in groups]

    def total(asked: list[tuple[Turn, Any]]) -> float:
        return sum(
            sum(estimate(turn.logprobs, future.result()[-len(turn.logprobs) :]))
            for turn, future in asked
        )

    return [[total(asked) for asked in asked_G] for asked_G in asked_P_G]


def credited(group: Group, advantages_G: list[float], config: RLConfig) -> list[tuple[Turn, float]]:
    """Every turn of a group with the advantage that each of its tokens gets.

    The losses sum over tokens, so a long completion weighs more. `length_normalise` undoes that:
    the advantage is shared out over the tokens (times the group's mean length, to keep the scale).
    """
    lengths_G = [sum(len(turn.logprobs) for turn in rollout.turns) for rollout in group.rollouts]
    credits = []
    for rollout, advantage, length in zip(group.rollouts, advantages_G, lengths_G, strict=True):
        scale = mean(list(map(float, lengths_G))) / length if config.length_normalise else 1.0
        credits += [(turn, advantage * scale) for turn in rollout.turns]
    return credits


def rl_datum(turn: Turn, advantage: float, config: RLConfig) -> tinker.Datum:
    """One turn as training data: what was sampled, with which logprobs, and how good it was."""
    advantages_T = [advantage] * len(turn.logprobs)
    datum = make_rl_datum(turn.prompt_tokens, turn.completion_tokens, turn.logprobs, advantages_T)
    if config.loss_fn != "gspo":
        return datum
    mask = [0.0] * (len(turn.prompt_tokens) - 1) + [1.0] * len(turn.logprobs)
    inputs = {**datum.loss_fn_inputs, "sequence_ratio_mask": mask}
    return replace(datum, loss_fn_inputs=inputs)


def step_ratios(
    samples_D: list[tuple[Turn, float]], result: tinker.ForwardBackwardOutput, config: RLConfig
) -> dict[str, float]:
    """`ratio_metrics` of one forward_backward."""
    target_D_T = [list(output["logprobs"].data) for output in result.loss_fn_outputs]
    low = config.loss_fn_config.get("clip_low_threshold", 0.8)
    high = config.loss_fn_config.get("clip_high_threshold", 1.2)
    turns_D, advantages_D = [turn for turn, _ in samples_D], [each for _, each in samples_D]
    return ratio_metrics(turns_D, advantages_D, target_D_T, (low, high))


def heldout_metrics(
    client: tinker.TrainingClient,
    environment: Environment,
    problems: list[Any],
    config: RLConfig,
    tokenizer: Any,
    reward: Reward | BatchReward,
    seed: int,
) -> dict[str, float]:
    """How the policy does now on problems that it is never trained on."""
    found = evaluate(
        client.save_weights_and_get_sampling_client().result(),
        tokenizer,
        environment,
        problems,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        seed=derive_seed(seed, "eval"),
        reward=reward,
        one_at_a_time=config.deterministic,
    )
    metrics = {
        "test/reward": found.mean_reward,
        "test/accuracy": found.accuracy,
        "test/worked_share": found.worked_share,
    }
    return {name: value for name, value in metrics.items() if value is not None}
