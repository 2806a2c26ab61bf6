"""Evaluation: the verdict is the environment's, whatever the reward says."""

import math
from dataclasses import replace

import pytest
from chat_templates import COURSE, byte_tokenizer
from toy_policy import ToyPolicy

from course_lib.batches import make_datum
from course_lib.conversations import Message
from course_lib.environments import Environment, Problem
from course_lib.evaluation import evaluate, nll, record_dicts, token_weight
from course_lib.metrics import bootstrap_interval
from course_lib.rendering import Rendered
from course_lib.rewards import Score

TOKENIZER = byte_tokenizer(COURSE)
PROBLEMS = [Problem((Message("user", f"Say {n}"),), "1", "toy", str(n)) for n in range(6)]


def sampler():
    return ToyPolicy(len(TOKENIZER)).save_weights_and_get_sampling_client().result()


def toy(grade, checkable=True):
    return Environment("toy", lambda n, s: [], lambda n, s: PROBLEMS[:n], grade, checkable)


def even(problem, completion):
    return Score(float(int(problem.id) % 2 == 0), {}, "even or not")


def test_accuracy_is_the_share_of_right_verdicts_and_no_reward_can_bend_it():
    found = evaluate(
        sampler(),
        TOKENIZER,
        toy(even),
        PROBLEMS,
        samples=3,
        max_tokens=4,
        reward=lambda problem, completion: Score(7.0, {}, "generous"),
    )
    assert found.accuracy == 0.5 and found.mean_reward == 7.0
    assert found.interval[0] < 0.5 < found.interval[1]
    assert [record.correct for record in found.records[:2]] == [[1.0] * 3, [0.0] * 3]
    assert found.summary()["problems"] == 6 and "records" not in found.summary()
    assert len(record_dicts(found)[0]["completions"]) == 3


def test_half_a_verdict_is_not_right():
    half = toy(lambda problem, completion: Score(0.5, {}, "half"))
    found = evaluate(sampler(), TOKENIZER, half, PROBLEMS, max_tokens=2)
    assert found.accuracy == 0.0 and found.mean_reward == 0.5


def test_the_environment_replies_in_an_evaluation_too():
    """What is judged is the last turn."""
    judged = []
    never = toy(lambda problem, completion: judged.append(completion) or Score(0.0, {}, ""))
    asked = []

    def reply(problem, completions):
        asked.append(completions[-1])
        return Message("user", "again") if len(completions) == 1 else None

    found = evaluate(sampler(), TOKENIZER, replace(never, reply=reply), PROBLEMS[:1], max_tokens=4)
    assert len(asked) == 2 and found.records[0].completions == [asked[1]] == judged[-1:]


def test_the_interval_is_over_problems_however_many_samples_each_has():
    many = evaluate(sampler(), TOKENIZER, toy(even), PROBLEMS, samples=8, max_tokens=1)
    assert many.interval == bootstrap_interval([1, 0] * 3)


def test_greedy_completions_repeat_and_sampled_ones_follow_their_seed():
    def texts(**options):
        found = evaluate(sampler(), TOKENIZER, toy(even), PROBLEMS, max_tokens=6, **options)
        return [record.completions for record in found.records]

    assert texts(temperature=0.0, seed=1) == texts(temperature=0.0, seed=2)
    assert texts(seed=1) == texts(seed=1) != texts(seed=2)


def test_without_verdict_and_reward_nothing_is_claimed():
    found = evaluate(sampler(), TOKENIZER, toy(even, checkable=False), PROBLEMS, max_tokens=4)
    assert found.accuracy is found.interval is found.mean_reward is None


def test_nll_is_per_trained_token():
    client = ToyPolicy(len(TOKENIZER), scale=0.0)
    datums = [
        make_datum(Rendered([1, 2, 3, 4], [0, 0, 1, 1])),
        make_datum(Rendered([5, 6], [0, 1])),
    ]
    assert token_weight(datums) == 3
    assert nll(client, datums) == pytest.approx(math.log(len(TOKENIZER)), abs=1e-5)
    assert client.calls == []  # nothing was trained
