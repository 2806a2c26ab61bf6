"""Rollouts: all calls in flight at once, seeds that repeat, turns that go on where they should."""

import dataclasses

import pytest
from chat_templates import COURSE, byte_tokenizer
from toy_policy import ToyPolicy

from course_lib.conversations import Message
from course_lib.environments import Problem
from course_lib.errors import CourseError
from course_lib.rendering import render_prompt
from course_lib.rewards import BatchReward, Score
from course_lib.rollouts import sample_groups, score_groups

TOKENIZER = byte_tokenizer(COURSE)
PROBLEMS = [Problem((Message("user", f"Say {n}"),), "1", "toy", str(n)) for n in range(3)]


def sampler():
    return ToyPolicy(len(TOKENIZER)).save_weights_and_get_sampling_client().result()


def sample(client=None, **options):
    settings = {"group_size": 4, "max_tokens": 5, "seed": 1, **options}
    return sample_groups(client or sampler(), PROBLEMS, TOKENIZER, **settings)


class Watched:
    """A sampler that notes when a call is sent and when it is awaited."""

    def __init__(self):
        self.inner, self.events = sampler(), []

    def sample(self, prompt, num_samples, sampling_params):
        self.events.append("sent")
        done = self.inner.sample(prompt, num_samples, sampling_params)
        done.calls = self.events
        return done


def test_all_calls_are_in_flight_before_the_first_is_awaited():
    watched = Watched()
    sample(watched)
    assert watched.events == ["sent"] * 3 + ["await"] * 3


def test_one_at_a_time_waits_for_each_call():
    watched = Watched()
    sample(watched, one_at_a_time=True)
    assert watched.events[:4] == ["sent", "await", "sent", "await"]


def test_a_group_holds_its_problems_prompt_and_as_many_completions_as_logprobs():
    groups = sample()
    assert [group.problem for group in groups] == PROBLEMS
    for group in groups:
        assert len(group.rollouts) == 4
        for rollout in group.rollouts:
            assert rollout.prompt_tokens == render_prompt(group.problem.messages, TOKENIZER)
            assert len(rollout.completion_tokens) == len(rollout.logprobs) <= 5
            assert rollout.stop_reason in ("stop", "length")


def test_samples_repeat_with_their_seed_and_differ_between_siblings():
    def tokens(groups):
        return [[each.completion_tokens for each in group.rollouts] for group in groups]

    first = tokens(sample())
    assert first == tokens(sample()) != tokens(sample(seed=2))
    assert len({tuple(each) for each in first[0]}) > 1
    assert first[0] != first[1]


def test_scores_are_kept_with_their_completions():
    def rank(problems, texts_P_G):
        return [[Score(float(i), {}, text) for i, text in enumerate(texts)] for texts in texts_P_G]

    groups = score_groups(sample(), BatchReward(rank))
    assert groups[0].rewards_G == [0.0, 1.0, 2.0, 3.0]
    assert all(each.score.reason == each.text for group in groups for each in group.rollouts)


def test_an_episode_goes_on_while_the_environment_replies():
    def reply(problem, completions):
        # the first problem ends at once, the second after one reply, the third after two
        return Message("user", "again") if len(completions) <= int(problem.id) else None

    groups = sample(reply=reply)
    assert [len(group.rollouts[0].turns) for group in groups] == [1, 2, 3]
    last = groups[2].rollouts[0]
    said = [message.content for message in last.messages if message.role == "assistant"]
    assert said == list(last.earlier_texts) and len(said) == 2
    assert last.prompt_tokens == render_prompt(last.messages, TOKENIZER)
    assert last.turns[0].prompt_tokens == render_prompt(PROBLEMS[2].messages, TOKENIZER)
    assert last.turns[-1].completion_tokens == last.completion_tokens


def test_every_call_of_an_episode_has_a_seed_of_its_own():
    seeds = []

    class Noting:
        def sample(self, prompt, num_samples, sampling_params):
            seeds.append(sampling_params.seed)
            return sampler().sample(prompt, num_samples, sampling_params)

    def reply(problem, completions):
        return Message("user", "again") if len(completions) < 3 else None

    sample(Noting(), group_size=2, reply=reply)
    assert len(seeds) == len(set(seeds)) == 3 + 2 * 3 * 2  # each sibling goes on by itself


def test_a_refused_call_names_the_prompt():
    class Refuses:
        def sample(self, *args, **kwargs):
            class Future:
                def result(self):
                    raise RuntimeError("Prompt length plus max_tokens\nexceeds the window")

            return Future()

    with pytest.raises(CourseError, match=r"sampling 'Say 0': Prompt length .* lower max_tokens"):
        sample(Refuses())


def test_rollouts_are_plain_data():
    rollout = sample()[0].rollouts[0]
    assert dataclasses.replace(rollout, text="x").text == "x"
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollout.text = "x"
