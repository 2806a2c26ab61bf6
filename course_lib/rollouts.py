"""Sample groups of completions with their logprobs: what the policy does when asked.

Suffixes of ragged lists: P problems, G completions of one problem, T tokens. A multi-turn episode
is sampled turn by turn; each turn is a prompt and a completion of its own, and all of them share
the episode's score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from course_lib.checkpoints import one_line
from course_lib.conversations import Message
from course_lib.environments import derive_seed
from course_lib.errors import CourseError
from course_lib.rendering import parse_completion, render_prompt, stop_token_ids
from course_lib.rewards import BatchReward, Problem, Reward, Score, score_completions

if TYPE_CHECKING:
    import tinker

Reply = Callable[[Problem, list[str]], Message | None]


@dataclass(frozen=True)
class Turn:
    """What the policy saw, what it said (stop token included), and the sampling logprobs."""

    prompt_tokens: list[int]
    completion_tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Rollout:
    """One completion of one problem; in a multi-turn episode the last, after `earlier_turns`."""

    problem: Problem
    prompt_tokens: list[int]
    completion_tokens: list[int]
    logprobs: list[float]
    text: str
    score: Score | None = None
    stop_reason: str = "stop"  # stop | length
    earlier_turns: tuple[Turn, ...] = ()
    earlier_texts: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()  # everything said before `text`

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Every turn of the episode, in order."""
        last = Turn(self.prompt_tokens, self.completion_tokens, self.logprobs)
        return (*self.earlier_turns, last)


@dataclass(frozen=True)
class Group:
    """The completions of one problem, to be compared with one another."""

    problem: Problem
    rollouts: list[Rollout]

    @property
    def rewards_G(self) -> list[float]:
        """The rewards of a scored group."""
        scores = [rollout.score for rollout in self.rollouts]
        assert all(scores), "score the group first"
        return [score.value for score in scores if score]


def sample_groups(
    sampling_client: tinker.SamplingClient,
    problems: list[Problem],
    tokenizer: Any,
    *,
    group_size: int,
    max_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    grade: Reward | BatchReward | None = None,
    reply: Reply | None = None,
    one_at_a_time: bool = False,
) -> list[Group]:
    """`group_size` completions of every problem, all sample calls in flight at once.

    `one_at_a_time` waits for each call before the next: the engine's decode batches are then always
    the same, and so is the last bit of every logprob.
    """

    def ask(problem: Problem, messages: tuple[Message, ...], count: int, *parts: object) -> _Asked:
        import tinker

        params = tinker.SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            stop=stop_token_ids(tokenizer),
            seed=derive_seed(seed, *parts),
        )
        prompt_tokens = render_prompt(messages, tokenizer)
        prompt = tinker.ModelInput.from_ints(prompt_tokens)
        future = sampling_client.sample(prompt, num_samples=count, sampling_params=params)
        asked = _Asked(problem, messages, prompt_tokens, future)
        if one_at_a_time:
            asked.response()
        return asked

    asked_P = [ask(problem, problem.messages, group_size, p) for p, problem in enumerate(problems)]
    groups = [Group(asked.problem, asked.rollouts(tokenizer)) for asked in asked_P]
    live = [(p, g) for p, group in enumerate(groups) for g in range(len(group.rollouts))]
    while reply and live:
        again = []
        for p, g in live:
            before = groups[p].rollouts[g]
            texts = (*before.earlier_texts, before.text)
            message = reply(before.problem, list(texts))
            if message:
                messages = (*before.messages, Message("assistant", before.text), message)
                again.append((p, g, ask(before.problem, messages, 1, p, g, len(texts))))
        for p, g, asked in again:
            before = groups[p].rollouts[g]
            texts = (*before.earlier_texts, before.text)
            after = asked.rollouts(tokenizer)[0]
            groups[p].rollouts[g] = replace(after, earlier_turns=before.turns, earlier_texts=texts)
        live = [(p, g) for p, g, _ in again]
    return score_groups(groups, grade) if grade else groups


def score_groups(groups: list[Group], reward: Reward | BatchReward) -> list[Group]:
    """The same groups with every rollout scored."""
    problems = [group.problem for group in groups]
    texts_P_G = [[rollout.text for rollout in group.rollouts] for group in groups]
    scored = []
    for group, scores_G in zip(groups, score_completions(reward, problems, texts_P_G), strict=True):
        pairs = zip(group.rollouts, scores_G, strict=True)
        scored.append(Group(group.problem, [replace(each, score=score) for each, score in pairs]))
    return scored


@dataclass(frozen=True)
class _Asked:
    """A sample call in flight."""

    problem: Problem
    messages: tuple[Message, ...]
    prompt_tokens: list[int]
    future: Any

    def response(self) -> tinker.SampleResponse:
        try:
            return self.future.result()
        except Exception as error:
            place = f"sampling {self.messages[-1].content[:40]!r}"
            remedy = "if it is about the context window, shorten the prompt or lower max_tokens"
            raise CourseError(place, one_line(error), remedy) from error

    def rollouts(self, tokenizer: Any) -> list[Rollout]:
        return [
            Rollout(
                problem=self.problem,
                prompt_tokens=self.prompt_tokens,
                completion_tokens=list(sequence.tokens),
                logprobs=list(sequence.logprobs or []),
                text=parse_completion(list(sequence.tokens), tokenizer),
                stop_reason=str(sequence.stop_reason),
                messages=self.messages,
            )
            for sequence in self.response().sequences
        ]
