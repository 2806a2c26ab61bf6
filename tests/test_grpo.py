"""GRPO on a one-table policy: what is paid rises, dead groups teach nothing, resuming repeats."""

import dataclasses
import math
import string
from types import SimpleNamespace

import pytest
from chat_templates import COURSE, byte_tokenizer
from toy_policy import Done, ToyPolicy

from course_lib.advantages import group_advantages
from course_lib.checkpoints import CheckpointLog, StopTraining
from course_lib.config import LOSS_FNS, RLConfig
from course_lib.conversations import Message
from course_lib.environments import Environment, Problem, derive_seed, second_try
from course_lib.errors import CourseError
from course_lib.evaluation import evaluate
from course_lib.grpo import (
    credited,
    named_reward,
    reference_kl,
    rl_datum,
    step_ratios,
    train_grpo,
)
from course_lib.metrics import read_metrics
from course_lib.rewards import Score
from course_lib.rollouts import Group, Rollout, Turn, sample_groups

TOKENIZER = byte_tokenizer(COURSE)
CONFIG = RLConfig(
    steps=6, prompts_per_step=4, group_size=8, learning_rate=0.3, max_tokens=3, save_every=2
)


def problems(n, seed):
    return [
        Problem((Message("user", f"Say {seed} {i}"),), "1", "toy", f"{seed}/{i}") for i in range(n)
    ]


def letters(problem, completion):
    """The share of ASCII letters: something that a table can learn to say."""
    value = sum(char.isascii() and char.isalpha() for char in completion) / max(1, len(completion))
    return Score(value, {"letters": value}, "")


TOY = Environment("toy", problems, problems, letters)


def policy(seed=0):
    return ToyPolicy(len(TOKENIZER), seed=seed)


def letters_begin(client):
    """The probability that a reply begins with a letter."""
    (first,) = client.logprobs([TOKENIZER.convert_tokens_to_ids("<|assistant|>")]).exp().tolist()
    return sum(first[token] for token in TOKENIZER.convert_tokens_to_ids([*string.ascii_letters]))


def train(client=None, config=CONFIG, environment=TOY, **options):
    return train_grpo(client or policy(), environment, config, tokenizer=TOKENIZER, **options)


def changed(**fields):
    return dataclasses.replace(CONFIG, **fields)


@pytest.mark.parametrize("loss_fn", LOSS_FNS)
def test_what_is_rewarded_happens_more_often_with_every_loss(loss_fn):
    """By the policy's own probabilities: rewards of a few samples leave it to luck."""
    client = policy()
    before = letters_begin(client)
    train(client, changed(loss_fn=loss_fn, steps=10))
    assert letters_begin(client) > before + 0.08


def test_a_negated_reward_is_unlearnt():
    def minus(problem, completion):
        return Score(-letters(problem, completion).value, {}, "")

    result = train(config=changed(steps=25), reward=minus)
    assert sum(result.rewards[-3:]) > sum(result.rewards[:3]) + 0.15
    assert result.metrics[-1]["env/completion_tokens"] > 0


def test_before_the_first_update_of_a_batch_the_ratio_is_one():
    for row in train().metrics:
        assert row["ratio/max_deviation"] < 1e-5  # logprobs travel as float32
        assert row["ratio/ess"] == pytest.approx(1)
        assert row["kl/sample_train_k1"] == pytest.approx(0, abs=1e-6)


def test_a_sampling_temperature_other_than_one_shows_in_the_ratio():
    row = train(config=changed(temperature=0.5, steps=1)).metrics[0]
    assert row["ratio/max_deviation"] > 0.1


def test_substeps_go_off_policy_on_purpose():
    client = policy()
    row = train(client, changed(steps=1, substeps=3)).metrics[0]
    assert client.calls == ["sampler", *["forward_backward", "optim_step"] * 3, *["await"] * 6]
    assert row["ratio/max_deviation"] < 1e-5 < 0.05 < row["ratio/max_deviation_late"]
    assert row["ratio/ess_late"] < 1


def test_dead_groups_are_dropped_and_counted_and_change_nothing():
    client = policy()
    before = client.table.detach().clone()
    result = train(client, reward=lambda problem, completion: Score(1.0, {}, "all the same"))
    assert all(row["env/dead_groups"] == row["env/groups"] == 4 for row in result.metrics)
    assert "forward_backward" not in client.calls
    assert (client.table.detach() == before).all()


def test_the_losss_settings_go_with_every_call():
    client, clip = policy(), {"clip_high_threshold": 1.1}
    train(client, changed(steps=1, substeps=2, loss_fn="ppo", loss_fn_config=clip))
    assert [given for _, given in client.trained_on] == [clip, clip]


@pytest.mark.parametrize("kind", ["centred", "normalised", "leave_one_out"])
def test_each_completion_is_trained_with_the_advantage_of_the_configured_kind(kind):
    client = policy()
    (group,) = train(client, changed(steps=1, prompts_per_step=1, advantages=kind)).groups
    ((data, _),) = client.trained_on
    found_G = [datum.loss_fn_inputs["advantages"].data[-1] for datum in data]
    assert found_G == pytest.approx(group_advantages(group.rewards_G, kind), abs=1e-6)


def test_a_kl_penalty_holds_the_policy_near_its_start():
    config = changed(steps=12, schedule="constant")
    free = train(config=dataclasses.replace(config, kl_penalty=1e-9)).metrics[-1]
    held = train(config=dataclasses.replace(config, kl_penalty=0.5)).metrics[-1]
    assert 0 < held["kl/reference"] < free["kl/reference"] / 2


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_first_step_is_at_no_distance_from_its_reference(estimator):
    row = train(config=changed(steps=1, kl_penalty=0.1, kl_estimator=estimator)).metrics[0]
    assert row["kl/reference"] == pytest.approx(0, abs=1e-6)
    assert row["reward/after_kl"] == pytest.approx(row["reward/total"], abs=1e-6)


class Flat:
    """A reference that gives every token a logprob of -2."""

    def compute_logprobs(self, prompt):
        return Done([None, *[-2.0] * (prompt.length - 1)])


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 3.0), ("k2", 1.5)])
def test_the_kl_of_a_completion_is_summed_over_its_tokens(estimator, expected):
    group = Group(problems(1, 0)[0], [rollout(3, 0.0)])  # logprobs of -1: 1 or 1/2 for each token
    config = changed(kl_penalty=1.0, kl_estimator=estimator)
    assert reference_kl(Flat(), [group], config) == [[expected]]


def test_the_penalty_is_charged_to_each_completions_reward():
    client, config = policy(), changed(steps=1, prompts_per_step=1, kl_penalty=0.5)
    result = train(client, config, reference=Flat())
    row, ((data, _),) = result.metrics[0], client.trained_on
    (group,), ((*kl_G,),) = result.groups, reference_kl(Flat(), result.groups, config)
    charged_G = [value - 0.5 * kl for value, kl in zip(group.rewards_G, kl_G, strict=True)]
    found_G = [datum.loss_fn_inputs["advantages"].data[-1] for datum in data]
    assert found_G == pytest.approx(group_advantages(charged_G), abs=1e-5)
    assert row["reward/after_kl"] == pytest.approx(row["reward/total"] - 0.5 * row["kl/reference"])


def test_equal_rewards_at_different_distances_from_the_reference_are_no_dead_group():
    reward = lambda problem, completion: Score(1.0, {}, "all the same")  # noqa: E731
    row = train(config=changed(steps=1, kl_penalty=0.5), reward=reward, reference=Flat()).metrics[0]
    assert row["env/dead_groups"] == 0


@pytest.mark.parametrize("kl_penalty", [0.0, 0.1])
def test_a_resumed_run_gives_the_metrics_of_an_uninterrupted_one(tmp_path, kl_penalty):
    config = changed(kl_penalty=kl_penalty, deterministic=True)
    whole = train(config=config, seed=3)

    def kill(step, total, metrics):
        if step == 5:
            raise KeyboardInterrupt

    client = policy()
    with pytest.raises(KeyboardInterrupt):
        train(client, config, seed=3, out=tmp_path, on_step=kill)
    last = CheckpointLog(tmp_path).last("rl")
    assert last.step == 4
    train(client.restore(last.state_path), config, seed=3, out=tmp_path, resume=last)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, expected in zip(rows, whole.metrics, strict=True):
        numbers = {name: value for name, value in expected.items() if name[:5] != "time/"}
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, abs=1e-6)


def test_resuming_with_a_kl_penalty_needs_the_starting_policy(tmp_path):
    client = policy()
    first = train(client, changed(steps=2), out=tmp_path)
    config = changed(kl_penalty=0.1)
    with pytest.raises(CourseError, match="no RL checkpoint of step 0"):
        train(client, config, out=tmp_path, resume=first.checkpoints[-1])


def test_a_hook_can_stop_the_run_after_a_checkpoint():
    def stop(step, total, metrics):
        if step == 3:
            raise StopTraining

    result = train(on_step=stop)
    assert result.stopped and [point.step for point in result.checkpoints] == [2, 3]


def test_held_out_problems_are_evaluated_on_the_way():
    rows = train(config=changed(eval_every=4, eval_problems=5)).metrics
    assert [row["step"] for row in rows if "test/accuracy" in row] == [4, 6]


def test_a_held_out_evaluation_samples_and_pays_as_training_does(monkeypatch):
    asked = []

    def noting(*arguments, **options):
        asked.append(options)
        return evaluate(*arguments, **options)

    monkeypatch.setattr("course_lib.grpo.evaluate", noting)
    config = changed(steps=2, temperature=0.7, eval_every=1, eval_problems=2, deterministic=True)
    train(config=config, reward=letters, seed=5)
    expected = {
        "temperature": 0.7,
        "max_tokens": 3,
        "seed": derive_seed(5, "eval"),  # none of a step's own
        "reward": letters,
        "one_at_a_time": True,
    }
    assert asked == [expected, expected]


def test_every_step_asks_problems_of_its_own_and_of_its_seed():
    def asked(seed):
        seen = []
        noting = dataclasses.replace(TOY, sample=lambda n, s: seen.append(s) or problems(n, s))
        train(environment=noting, config=changed(steps=3), seed=seed)
        return seen

    assert len(set(asked(0))) == 3 and asked(0) == asked(0)
    assert not set(asked(0)) & set(asked(1))


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_deterministic_run_awaits_each_call_before_the_next(monkeypatch, deterministic):
    events = []

    class Reference:
        def compute_logprobs(self, tokens):
            events.append("sent")
            return Done([-1.0] * len(tokens.to_ints()), events)

    def noting(*arguments, **options):
        assert options["one_at_a_time"] == deterministic
        return sample_groups(*arguments, **options)

    monkeypatch.setattr("course_lib.grpo.sample_groups", noting)
    monkeypatch.setattr("course_lib.evaluation.sample_groups", noting)
    config = changed(steps=1, eval_every=1, deterministic=deterministic)
    train(config=config, reference=Reference())
    assert events[:3] == (["sent", "await", "sent"] if deterministic else ["sent"] * 3)


def test_every_turn_of_an_episode_is_trained_on():
    never_right = dataclasses.replace(
        TOY, grade=lambda p, c: Score(letters(p, c).value * 0.9, {}, "")
    )
    row = train(environment=second_try(never_right), config=changed(steps=1)).metrics[0]
    assert row["env/turns"] == 2
    assert row["ratio/max_deviation"] < 1e-5


def rollout(length, reward):
    tokens = list(range(length))
    score = Score(reward, {}, "")
    return Rollout(problems(1, 0)[0], [1, 2, 3], tokens, [-1.0] * length, "", score)


def test_length_normalisation_gives_each_completion_the_same_weight():
    group = Group(problems(1, 0)[0], [rollout(2, 1.0), rollout(4, 0.0)])
    advantages_G = group_advantages(group.rewards_G)  # 0.5 and -0.5
    plain = credited(group, advantages_G, CONFIG)
    even = credited(group, advantages_G, changed(length_normalise=True))
    # summed over tokens: 2 * 0.5 and 4 * -0.5; normalised (mean length 3): 3 * 0.5 and 3 * -0.5
    assert [advantage * len(turn.logprobs) for turn, advantage in plain] == [1.0, -2.0]
    assert [advantage * len(turn.logprobs) for turn, advantage in even] == [1.5, -1.5]


def test_prompt_tokens_get_no_advantage_and_gspo_gets_its_mask():
    turn = Turn([5, 6, 7], [8, 9], [-0.5, -0.25])
    datum = rl_datum(turn, 2.0, changed(loss_fn="gspo"))
    inputs = {name: list(values.data) for name, values in datum.loss_fn_inputs.items()}
    assert datum.model_input.to_ints() == [5, 6, 7, 8]
    assert inputs["target_tokens"] == [6, 7, 8, 9]
    assert inputs["advantages"] == [0, 0, 2, 2]
    assert inputs["logprobs"] == [0, 0, -0.5, -0.25]
    assert inputs["sequence_ratio_mask"] == [0, 0, 1, 1]


def test_auto_is_the_environments_verdict_and_correct_names_it():
    assert named_reward(TOY, RLConfig()) is letters
    assert named_reward(TOY, RLConfig(reward="correct")) is letters
    with pytest.raises(CourseError, match="no checkable answers"):
        named_reward(dataclasses.replace(TOY, checkable=False), RLConfig())


def test_clipped_shares_are_counted_at_the_configured_thresholds():
    turn = Turn([1], [2], [0.0])
    samples_D = [(turn, 1.0), (turn, -1.0)]
    outputs = [{"logprobs": SimpleNamespace(data=[math.log(ratio)])} for ratio in (1.3, 0.7)]
    result = SimpleNamespace(loss_fn_outputs=outputs)

    def clipped(**thresholds):
        found = step_ratios(samples_D, result, changed(loss_fn_config=thresholds))
        return found["ratio/clipped_up"], found["ratio/clipped_down"]

    assert clipped() == (0.5, 0.5)
    assert clipped(clip_high_threshold=1.5) == (0.0, 0.5)
    assert clipped(clip_low_threshold=0.5) == (0.5, 0.0)
