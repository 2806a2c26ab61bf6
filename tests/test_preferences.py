"""Preferences: the two losses by hand, and both methods learning on a one-table policy."""

import json
import math
from dataclasses import replace

import pytest
import torch
from chat_templates import COURSE, byte_tokenizer
from toy_policy import ToyPolicy

from course_lib.batches import make_datum
from course_lib.checkpoints import StopTraining
from course_lib.config import PreferenceConfig
from course_lib.conversations import Message
from course_lib.errors import CourseError
from course_lib.preferences import (
    Pair,
    bradley_terry_loss,
    calibration,
    dpo_loss,
    judgement,
    load_pairs,
    train_dpo,
    train_reward_model,
)

TOKENIZER = byte_tokenizer(COURSE)


def pair(number):
    return Pair((Message("user", f"Say {number}"),), "aaa", "zzz")


PAIRS = [pair(number) for number in range(16)]
CONFIG = PreferenceConfig(batch_size=8, epochs=4, learning_rate=0.1)


def test_bradley_terry_is_the_share_of_strength():
    chosen, rejected = torch.tensor([0.6, 0.9]).log(), torch.tensor([0.2, 0.9]).log()
    # P = 0.6 / 0.8 = 0.75 and 0.9 / 1.8 = 0.5
    expected = -(math.log(0.75) + math.log(0.5)) / 2
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected)
    assert bradley_terry_loss(rejected, chosen).item() > expected  # the sign: the chosen one first


def test_dpo_by_hand_and_its_gradient():
    chosen = torch.tensor([1.0], requires_grad=True)
    rejected = torch.tensor([-1.0], requires_grad=True)
    loss = dpo_loss(chosen, rejected, beta=0.5)
    loss.backward()
    # margin 0.5 * (1 - -1) = 1; -log sigmoid(1); d/dchosen = -0.5 * sigmoid(-1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    slope = 0.5 / (1 + math.e)
    assert chosen.grad.item() == pytest.approx(-slope)
    assert rejected.grad.item() == pytest.approx(slope)


def test_the_judged_token_is_yes_after_the_question():
    rendered = judgement((Message("user", "Who?"),), "Mira.", TOKENIZER)
    tokens = rendered.tokens
    assert [at for at, weight in enumerate(rendered.weights) if weight] == [len(tokens) - 1]
    text = TOKENIZER.decode(tokens)
    assert text.endswith("Is this a good reply?<|end|><|assistant|>y")
    assert "<|user|>Who?<|end|><|assistant|>Mira.<|end|>" in text


class SeesTheReply(ToyPolicy):
    """A table looks one token back, so all judgements end alike: let the reply's letter show
    through.
    """

    def _target_logprobs(self, datum):
        tokens = datum.model_input.to_ints()
        said = "z" if "zzz" in TOKENIZER.decode(tokens) else "a"
        rows = self.logprobs([*tokens[:-1], TOKENIZER.encode(said)[0]])
        targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].data)
        return rows.gather(1, targets[:, None])[:, 0]


def test_dpo_raises_the_chosen_reply_over_the_rejected_one():
    client = ToyPolicy(len(TOKENIZER))
    result = train_dpo(client, PAIRS, CONFIG, tokenizer=TOKENIZER)
    first, last = result.metrics[0], result.metrics[-1]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)  # policy = reference
    assert first["preference/chosen_gain"] == pytest.approx(0, abs=1e-5)
    assert last["train/loss"] < 0.5 and last["preference/accuracy"] == 1.0
    assert last["preference/chosen_gain"] > 0 > last["preference/rejected_gain"]


def test_a_dpo_margin_is_beta_times_the_difference_of_the_gains():
    config = replace(CONFIG, dpo_beta=0.3, max_steps=2)
    row = train_dpo(ToyPolicy(len(TOKENIZER)), PAIRS, config, tokenizer=TOKENIZER).metrics[-1]
    difference = row["preference/chosen_gain"] - row["preference/rejected_gain"]
    assert difference > 0.1
    assert row["preference/margin"] == pytest.approx(0.3 * difference)


def test_the_first_step_has_the_full_rate_and_the_last_one_still_moves():
    config = replace(CONFIG, learning_rate=0.1, max_steps=4)
    rows = train_dpo(ToyPolicy(len(TOKENIZER)), PAIRS, config, tokenizer=TOKENIZER).metrics
    assert [row["optim/lr"] for row in rows] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_the_order_of_the_pairs_follows_from_the_seed():
    pairs = [replace(each, chosen="a" * n) for n, each in enumerate(PAIRS[:8], start=1)]

    def losses(seed):
        client, config = ToyPolicy(len(TOKENIZER)), replace(CONFIG, batch_size=1, epochs=1)
        rows = train_dpo(client, pairs, config, tokenizer=TOKENIZER, seed=seed).metrics
        return [row["preference/chosen_nll"] for row in rows]

    assert losses(0) == losses(0) != losses(1)


def test_the_chosen_replies_own_loss_is_added_per_token():
    pairs = [replace(each, rejected="zzzzzz") for each in PAIRS]  # its length does not matter
    plain, both = (
        train_dpo(
            ToyPolicy(len(TOKENIZER)),
            pairs,
            replace(CONFIG, max_steps=1, dpo_nll=weight),
            tokenizer=TOKENIZER,
        ).metrics[0]
        for weight in (0.0, 0.5)
    )
    datum = make_datum(judgement(PAIRS[0].prompt, "aaa", TOKENIZER, "reply"))
    untrained = ToyPolicy(len(TOKENIZER)).forward([datum], "cross_entropy").result()
    *_, a, b, c, end = untrained.loss_fn_outputs[0]["logprobs"].data  # of "aaa" and the end
    expected = -(a + b + c + end) / 4
    assert both["preference/chosen_nll"] == pytest.approx(expected, rel=1e-4)
    assert both["train/loss"] == pytest.approx(plain["train/loss"] + 0.5 * expected, rel=1e-4)


def test_with_their_own_loss_the_chosen_replies_do_not_lose_what_they_share_with_the_rejected():
    """Plain DPO left alone what chosen and rejected had in common; this teaches it, too."""
    pairs = [Pair((Message("user", "Say"),), "mmma", "mmmz")] * 8
    gains = [
        train_dpo(
            ToyPolicy(len(TOKENIZER)), pairs, replace(CONFIG, dpo_nll=weight), tokenizer=TOKENIZER
        ).metrics[-1]["preference/chosen_gain"]
        for weight in (0.0, 1.0)
    ]
    assert gains[1] > gains[0] + 1


def test_the_reward_model_learns_to_say_yes_to_the_better_reply():
    client = SeesTheReply(len(TOKENIZER))
    result = train_reward_model(client, PAIRS, CONFIG, tokenizer=TOKENIZER)
    assert result.metrics[-1]["preference/margin"] > 1
    assert result.metrics[-1]["preference/accuracy"] == 1.0
    assert result.metrics[-1]["train/loss"] < result.metrics[0]["train/loss"]
    assert client.calls[:2] == ["forward_backward_custom", "optim_step"]  # both before waiting


def test_as_strength_of_a_reply_counts_the_reply_alone():
    rendered = judgement((Message("user", "Who?"),), "Mira.", TOKENIZER, "reply")
    counted = [t for t, w in zip(rendered.tokens, rendered.weights, strict=True) if w]
    assert TOKENIZER.decode(counted) == "Mira.<|end|>"


def test_a_reward_model_by_replies_finds_the_better_reply_likelier():
    client = ToyPolicy(len(TOKENIZER))
    config = replace(CONFIG, strength="reply")
    result = train_reward_model(client, PAIRS, config, tokenizer=TOKENIZER)
    assert result.metrics[-1]["preference/margin"] > 1
    assert result.metrics[-1]["preference/accuracy"] == 1.0


def test_a_stopped_judge_is_no_judge():
    def stop(step, total, metrics):
        raise StopTraining

    result = train_dpo(ToyPolicy(len(TOKENIZER)), PAIRS, CONFIG, tokenizer=TOKENIZER, on_step=stop)
    assert result.stopped and not result.checkpoints


def test_calibration_by_hand():
    # confidences 0.9, 0.9, 0.6, 0.6; right, right, right, wrong
    assert calibration([0.9, 0.9, 0.6, 0.4], bins=2) == [
        (pytest.approx(0.6), 0.5, 2),
        (pytest.approx(0.9), 1.0, 2),
    ]
    assert calibration([1.0, 0.0]) == [(1.0, 0.5, 2)]
    assert calibration([0.5, 0.5]) == [(0.5, 0.5, 2)]  # who does not know is right half the time


def test_pairs_come_from_jsonl_and_faults_are_told_by_line(tmp_path):
    file = tmp_path / "pairs.jsonl"
    good = {"prompt": "Who?", "chosen": "Mira.", "rejected": "Odo.", "why": "true"}
    file.write_text(json.dumps(good) + "\n\n")
    assert load_pairs(str(file)) == [Pair((Message("user", "Who?"),), "Mira.", "Odo.", "true")]
    for bad, said in [
        ("{", ":2: not JSON"),
        ("[]", ":2: is no preference pair"),
        ('{"prompt": "a", "chosen": "b"}', ":2: is no preference pair"),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', "empty or non-text"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "chosen equals rejected"),
    ]:
        file.write_text(json.dumps(good) + "\n" + bad)
        with pytest.raises(CourseError, match=said):
            load_pairs(str(file))
    with pytest.raises(CourseError, match="No such file"):
        load_pairs(str(tmp_path / "nowhere.jsonl"))


def test_pairs_are_read_as_other_lines_are(tmp_path):
    """U+2028 cut a pair in two; Latin-1, deep nesting and half a character ended in a traceback."""
    file = tmp_path / "pairs.jsonl"
    good = {"prompt": "Who?", "chosen": "Mira.\u2028Odo.", "rejected": "Odo.\x85"}
    file.write_text(json.dumps(good, ensure_ascii=False), encoding="utf-8-sig")
    assert [each.chosen for each in load_pairs(str(file))] == ["Mira.\u2028Odo."]
    rest = b'", "chosen": "b", "rejected": "c"}'
    for bad, said in [
        (b'{"prompt": "\xfc' + rest, ":1: byte 13 .* is not UTF-8"),
        (b"[" * 100_000, ":1: .*nested too deep"),
        (b'{"prompt": "\\ud800' + rest, ":1: holds half a character"),
    ]:
        file.write_bytes(bad)
        with pytest.raises(CourseError, match=said):
            load_pairs(str(file))


def test_the_shipped_pairs_have_a_held_out_side_of_its_own_prompts():
    pairs = load_pairs("data/preferences.jsonl")
    held = {each.prompt for each in pairs if each.heldout}
    train = {each.prompt for each in pairs if not each.heldout}
    assert len(pairs) >= 400 and held and train and not held & train


@pytest.mark.parametrize("train", [train_dpo, train_reward_model])
def test_without_pairs_there_is_nothing_to_train_on(train):
    """A RuntimeError from torch, or the name of a function that nobody had called."""
    with pytest.raises(
        CourseError, match=r"^pairs: there is none to learn from; give at least one"
    ):
        train(ToyPolicy(len(TOKENIZER)), [], CONFIG, tokenizer=TOKENIZER)
