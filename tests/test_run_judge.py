"""Which judge a run trains, on which pairs, and when it trains none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from course_lib import run_judge as module
from course_lib.checkpoints import Checkpoint, CheckpointLog, StopTraining
from course_lib.config import load_config
from course_lib.conversations import Message
from course_lib.environments import derive_seed, sums_environment
from course_lib.errors import CourseError
from course_lib.preferences import Pair
from course_lib.rewards import Problem
from course_lib.run_data import RunData
from course_lib.run_judge import judge_pairs, needs_judge, reward_spec, run_judge, run_reward

DATA = RunData([], [], sums_environment())
OPEN = RunData([], [], SimpleNamespace(checkable=False, grade=None))  # type: ignore[arg-type]
CONFIG = load_config("tiny")


@pytest.mark.parametrize(
    ("reward", "data", "spec", "judged"),
    [
        ("auto", DATA, "correct", False),
        ("auto", OPEN, "tournament", True),
        ("correct", OPEN, "correct", False),
        ("length + 0.5 * preference", DATA, "length + 0.5 * preference", True),
        ("0.1*tournament+format", DATA, "0.1*tournament+format", True),
        ("rewards.py:preference", DATA, "rewards.py:preference", False),
    ],
)
def test_a_judge_is_trained_for_rewards_that_ask_one(reward, data, spec, judged):
    config = load_config("tiny", [f"rl.reward={reward}"])
    assert (reward_spec(config, data), needs_judge(config, data)) == (spec, judged)


def test_the_judges_names_are_known_once_there_is_one():
    config = load_config("tiny", ["rl.reward=preference"])
    with pytest.raises(CourseError, match="preference"):
        run_reward(config, DATA, None)
    strengths = lambda replies: [-0.5 * len(text) for _, text in replies]  # noqa: E731
    problem = Problem((Message("user", "?"),), "1", "", "")
    scores = run_reward(config, DATA, strengths).score([problem], [["", "ab"]])
    assert [score.value for score in scores[0]] == pytest.approx([1.0, 0.36788], abs=1e-5)
    config = load_config("tiny", ["rl.reward=tournament"])
    scores = run_reward(config, DATA, strengths).score([problem], [["", "ab"]])
    assert scores[0][0].value > 0.7 > 0.3 > scores[0][1].value


def test_held_out_pairs_train_no_judge_unless_there_are_no_others(monkeypatch):
    heldout = {
        "some": (False, True),
        "all": (True,),
        "none": (),
        module.SHIPPED_PAIRS: (True, False),
    }

    def load(path: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(chosen=f"{path} {held}", heldout=held) for held in heldout[path]]

    monkeypatch.setattr(module, "load_pairs", load)

    def chosen(path: str) -> list[str]:
        config = load_config("tiny", [f"preference.data_path={path}"])
        return [pair.chosen for pair in judge_pairs(config, DATA, None)]

    assert chosen("some") == ["some False"]
    assert chosen("all") == ["all True"]
    assert chosen("auto") == [f"{module.SHIPPED_PAIRS} False"]
    with pytest.raises(CourseError, match=r"preference.data_path: no pair of different replies"):
        chosen("none")


def test_own_answers_are_preferred_to_the_policys_where_they_differ(monkeypatch):
    problems = [
        Problem((Message("user", name),), None, "", name, {"reference": text})
        for name, text in (("a", "good"), ("b", "same "), ("c", ""))
    ]
    asked = []

    def sample(count: int, seed: int) -> list[Problem]:
        asked.append((count, seed))
        return problems

    def groups(policy, problems, tokenizer, **options):
        asked.append((policy.name, [each.id for each in problems], tokenizer, options))
        return [
            SimpleNamespace(problem=each, rollouts=[SimpleNamespace(text=f" {text}")])
            for each, text in zip(problems, ("bad", "same"), strict=True)
        ]

    monkeypatch.setattr(module, "sample_groups", groups)
    config = load_config("tiny", ["seed=3", "sft.data_path=mine.jsonl", "rl.max_tokens=7"])
    policy = SimpleNamespace(name="policy", get_tokenizer=lambda: "tokenizer")
    data = RunData([], [], SimpleNamespace(sample=sample))  # type: ignore[arg-type]
    assert judge_pairs(config, data, policy) == [Pair(problems[0].messages, "good", " bad")]
    seed = derive_seed(3, "pairs")
    options = {"group_size": 1, "max_tokens": 7, "seed": seed}
    assert asked == [(256, seed), ("policy", ["a", "b"], "tokenizer", options)]


class FakeService:
    """Remembers which clients were asked for."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def create_lora_training_client(self, model: str, **options: object) -> SimpleNamespace:
        self.asked.append((model, options))
        client = SimpleNamespace(get_tokenizer=lambda: "tokenizer")
        return SimpleNamespace(result=lambda: client)

    def create_sampling_client(self, path: str) -> SimpleNamespace:
        self.asked.append(path)
        return SimpleNamespace(result=lambda: SimpleNamespace(get_tokenizer=lambda: "tokenizer"))


def test_a_judge_is_trained_once_in_a_runs_folder(tmp_path, monkeypatch):
    config = load_config("tiny", ["seed=3", "preference.lora_rank=4", "preference.strength=reply"])
    service, trained = FakeService(), []
    checkpoint = Checkpoint("preference", 4, "tinker://state", "tinker://sampler")

    def train(client, pairs, settings, *, out, **options):
        trained.append((pairs, settings, out, options))
        CheckpointLog(out).append(checkpoint)
        return SimpleNamespace(stopped=False, checkpoints=[None, checkpoint])

    monkeypatch.setattr(module, "train_reward_model", train)
    monkeypatch.setattr(module, "judge_pairs", lambda *arguments: [*arguments])
    monkeypatch.setattr(module, "reward_model", lambda *arguments: arguments[1:])
    for _ in range(2):
        found = run_judge(service, config, tmp_path, DATA, "policy", "model", print)
        assert found == ("tokenizer", "reply")
    options = {"tokenizer": "tokenizer", "seed": 3, "on_step": print}
    assert trained == [([config, DATA, "policy"], config.preference, tmp_path, options)]
    made = ("model", {"rank": 4, "seed": 3})
    assert service.asked == [made, "tinker://sampler", "tinker://sampler"]


def test_half_a_judge_judges_nothing(tmp_path, monkeypatch):
    stopped = SimpleNamespace(stopped=True, checkpoints=[])
    monkeypatch.setattr(module, "train_reward_model", lambda *a, **k: stopped)
    monkeypatch.setattr(module, "judge_pairs", lambda *arguments: [])
    with pytest.raises(StopTraining):
        run_judge(FakeService(), CONFIG, tmp_path, DATA, None, "model")
