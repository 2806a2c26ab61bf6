"""How good is it? Held-out accuracy with its interval, and the NLL of held-out conversations.

One accuracy is a draw of luck; the interval (bootstrap over problems) says how large that luck may
be.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from course_lib.environments import Environment, is_worked
from course_lib.metrics import bootstrap_interval
from course_lib.rewards import BatchReward, Problem, Reward
from course_lib.rollouts import sample_groups, score_groups

if TYPE_CHECKING:
    import tinker


@dataclass(frozen=True)
class Record:
    """One problem's completions and verdicts."""

    id: str
    prompt: str
    answer: str | None
    completions: list[str]
    correct: list[float]  # 0 or 1 each; empty where nothing can be checked
    rewards: list[float]
    reasons: list[str]
    worked: list[bool]
    tokens: list[int]  # completion lengths, stop token included


@dataclass(frozen=True)
class Evaluation:
    """A model on a set of problems."""

    accuracy: float | None  # mean of correct; None where nothing can be checked
    interval: tuple[float, float] | None  # 95 % bootstrap interval of the accuracy, over problems
    mean_reward: float | None  # None where neither a verdict nor a reward was asked
    worked_share: float  # of completions that show a step of their working
    mean_tokens: float
    temperature: float
    samples: int  # completions per problem
    records: list[Record]

    def summary(self) -> dict[str, Any]:
        """Everything but the records, as plain data."""
        values = {name: value for name, value in vars(self).items() if name != "records"}
        values["interval"] = list(self.interval) if self.interval else None
        return {**values, "problems": len(self.records)}


def evaluate(
    sampling_client: tinker.SamplingClient,
    tokenizer: Any,
    environment: Environment,
    problems: list[Problem],
    *,
    temperature: float = 1.0,
    max_tokens: int = 64,
    samples: int = 1,
    seed: int = 0,
    reward: Reward | BatchReward | None = None,
    one_at_a_time: bool = False,
) -> Evaluation:
    """Sample `samples` completions of each problem (temperature 0 = greedy) and judge them.

    `correct` is the environment's verdict, which no reward can bend; `rewards` are those of
    `reward`, or the verdict again.
    """
    groups = sample_groups(
        sampling_client,
        problems,
        tokenizer,
        group_size=samples,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        reply=environment.reply,
        one_at_a_time=one_at_a_time,
    )
    if reward or environment.checkable:
        groups = score_groups(groups, reward or environment.grade)
    records = []
    for group in groups:
        texts = [rollout.text for rollout in group.rollouts]
        verdicts = [
            environment.grade(group.problem, text) for text in texts if environment.checkable
        ]
        scores = [rollout.score for rollout in group.rollouts if rollout.score]
        records.append(
            Record(
                id=group.problem.id,
                prompt=group.problem.messages[-1].content,
                answer=group.problem.answer,
                completions=texts,
                correct=[float(verdict.value >= 1) for verdict in verdicts],
                rewards=[score.value for score in scores],
                reasons=[score.reason for score in scores],
                worked=[is_worked(text) for text in texts],
                tokens=[len(rollout.completion_tokens) for rollout in group.rollouts],
            )
        )
    per_problem = [_mean(record.correct) for record in records] if environment.checkable else []
    rewards = [value for record in records for value in record.rewards]
    return Evaluation(
        accuracy=_mean(per_problem) if per_problem else None,
        interval=bootstrap_interval(per_problem) if per_problem else None,
        mean_reward=_mean(rewards) if rewards else None,
        worked_share=_mean([float(value) for record in records for value in record.worked]),
        mean_tokens=_mean([float(value) for record in records for value in record.tokens]),
        temperature=temperature,
        samples=samples,
        records=records,
    )


def nll(training_client: tinker.TrainingClient, datums: list[tinker.Datum]) -> float:
    """Mean negative log-likelihood in nats per trained-on token, without a training step."""
    result = training_client.forward(datums, "cross_entropy").result()
    return result.metrics["loss:sum"] / token_weight(datums)


def token_weight(datums: list[tinker.Datum]) -> float:
    """The sum of the weights of a batch: how many tokens are trained on."""
    return float(sum(sum(datum.loss_fn_inputs["weights"].data) for datum in datums))


def record_dicts(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The records as plain data, for a JSONL file."""
    return [asdict(record) for record in evaluation.records]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
