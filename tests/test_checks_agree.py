"""What an exercise calls right is what the library does: two hands wrote them, one answer.

The references in course_lib/checks are written for a learner's plain lists, the library's functions
for tensors and clients. Where both exist they must agree.
"""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch

from course_lib.advantages import dead_group_probability, group_advantages
from course_lib.batches import epoch_batches
from course_lib.checks import lesson_01, lesson_03, lesson_04, lesson_05, lesson_06, lesson_07
from course_lib.checks.compare import close
from course_lib.checks.exercise import FIRST_SEED
from course_lib.checks.registry import find
from course_lib.config import SFTConfig
from course_lib.conversations import Conversation, Message
from course_lib.losses import LOSSES
from course_lib.metrics import kl_k3, pass_at_k
from course_lib.preferences import bradley_terry_loss, dpo_loss
from course_lib.rewards import stated_answer
from course_lib.rl_metrics import ratio_metrics
from course_lib.rollouts import Turn


def cases(id: str) -> list[tuple]:
    return find(id).cases_from(FIRST_SEED)


def test_advantages():
    for (rewards_P_G,) in cases("05.1"):
        expected = [group_advantages(rewards_G) for rewards_G in rewards_P_G]
        assert close(lesson_05.group_advantages(rewards_P_G), expected)


def test_dead_groups():
    assert all(close(lesson_05.dead_share(*c), dead_group_probability(*c)) for c in cases("05.4"))


def test_the_weighted_loss():
    for logprobs, weights in cases("03.1"):
        flat, trained_on = (torch.tensor([*chain(*each)]) for each in (logprobs, weights))
        summed = LOSSES["cross_entropy"](flat, {"weights": trained_on}, {}).sum()
        assert close(lesson_03.weighted_nll(logprobs, weights), (summed / trained_on.sum()).item())


def test_the_batches_of_an_epoch():
    for case in cases("03.2"):
        assert lesson_03.epoch_batches(*case) == epoch_batches(*case)


def test_pass_at_k():
    assert all(close(find("08.1").reference(*case), pass_at_k(*case)) for case in cases("08.1"))


def test_kl():
    for policy, reference in cases("07.1"):
        values = kl_k3(policy, reference)
        assert close(lesson_07.kl_k3(policy, reference), sum(values) / len(values))


def test_the_importance_sampling_loss():
    for target, sampled, advantages, mask in cases("06.1"):
        masked = torch.tensor(advantages) * torch.tensor(mask)
        inputs = {"logprobs": torch.tensor(sampled), "advantages": masked}
        loss = LOSSES["importance_sampling"](torch.tensor(target), inputs, {}).sum().item()
        assert close(lesson_06.is_loss(target, sampled, advantages, mask), loss)


def test_the_ppo_loss_and_which_tokens_have_a_gradient():
    for ratio, advantage, low, high in cases("06.3"):
        target = torch.tensor([ratio]).log().requires_grad_()
        inputs = {"logprobs": torch.zeros(1), "advantages": torch.tensor([advantage])}
        clip = {"clip_low_threshold": low, "clip_high_threshold": high}
        loss = LOSSES["ppo"](target, inputs, clip).sum()
        (gradient,) = torch.autograd.grad(loss, target)
        assert close(lesson_06.ppo_loss(ratio, advantage, low, high), loss.item())
        assert lesson_06.ppo_learns(ratio, advantage, low, high) == bool(gradient.abs() > 0)


def test_the_effective_sample_size():
    for (ratios,) in cases("06.2"):
        logs = torch.tensor(ratios, dtype=torch.float64).log().tolist()
        turn = Turn([0], [0] * len(ratios), [0.0] * len(ratios))
        share = ratio_metrics([turn], [1.0], [logs], (0.8, 1.2))["ratio/ess"]
        assert close(lesson_06.effective_sample_size(ratios), share * len(ratios))


def test_bradley_terry():
    for (margins,) in cases("04.2"):
        loss = bradley_terry_loss(torch.tensor(margins), torch.zeros(len(margins)))
        assert close(lesson_04.bradley_terry_loss(margins), loss.mean().item())


def test_dpo():
    for policy, reference, beta in cases("07.4"):
        gains = [torch.tensor([p - r]) for p, r in zip(policy, reference, strict=True)]
        expected = dpo_loss(gains[0], gains[1], beta).mean().item()
        assert close(lesson_07.dpo_loss(policy, reference, beta), expected)


def test_the_stated_answer_where_both_know_the_rule():
    """The lesson's grader is the simpler one: digits only; the library also reads 1,024 and 5.0."""
    plain = [text for (text,) in cases("04.1") if not any(c in text for c in ",.5")]
    for text in [*plain, "The answer is 12.", "The answer is -12.", "The answer is", ""]:
        said, _ = stated_answer(text)
        assert lesson_04.read_answer(text) == (int(said) if said is not None else None)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    from course_lib.config import find_file

    return AutoTokenizer.from_pretrained(find_file("data/base-model"))


def test_the_mask_of_a_real_conversation(tokenizer):
    from course_lib.rendering import render_conversation

    turns = [("user", "2 + 3?"), ("assistant", "It is 5."), ("user", "And?"), ("assistant", "9.")]
    messages = tuple(Message(*turn) for turn in turns)
    rendered = render_conversation(Conversation(messages, "test"), tokenizer)
    parts = []
    for role, text in turns:
        parts += [(role, "header"), *[(role, "text")] * len(tokenizer.encode(text)), (role, "end")]
    assert lesson_01.last_assistant_weights(parts) == rendered.weights


def test_the_shift_is_the_datums(tokenizer):
    from course_lib.batches import make_datum
    from course_lib.rendering import Rendered

    rng = random.Random(0)
    tokens, weights = [rng.randrange(100) for _ in range(6)], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    datum = make_datum(Rendered(tokens, weights), SFTConfig().max_length)
    inputs, targets, shifted = lesson_01.shift(tokens, weights)
    assert datum.model_input.to_ints() == inputs
    assert list(datum.loss_fn_inputs["target_tokens"].data) == targets
    assert list(datum.loss_fn_inputs["weights"].data) == shifted
