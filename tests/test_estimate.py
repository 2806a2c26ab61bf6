"""The estimate before a hosted run: every number by hand."""

from dataclasses import replace

import pytest

from course_lib.config import RLConfig, RunConfig, SFTConfig
from course_lib.conversations import Conversation, Message
from course_lib.environments import Environment, Problem
from course_lib.estimate import TokenEstimate, estimate_tokens
from course_lib.run_data import RunData

ASKED, SAID = Message("user", "1234567"), Message("assistant", "123456")  # 3 + 6, 2 + 6 tokens
PROBLEM = Problem((ASKED,))
DATA = RunData(
    train=[Conversation((ASKED, SAID))] * 5,
    heldout=[],
    environment=Environment("nine", lambda n, seed: [PROBLEM] * n, lambda n, seed: [PROBLEM] * n),
)
SFT = SFTConfig(batch_size=2, epochs=3)  # 2 batches an epoch, the odd row is left out
RL = RLConfig(steps=10, prompts_per_step=2, group_size=4, max_tokens=20)
CONFIG = RunConfig(eval_problems=7, sft=SFT, rl=RL)
JUDGED = 3 * 2 * 7  # base, SFT, RL; sampled and greedy


def estimated(**changes) -> TokenEstimate:
    return estimate_tokens(replace(CONFIG, **changes), DATA)


def test_a_whole_run_by_hand():
    found = estimated()
    assert found.sft == 3 * 2 * 2 * 17
    assert found.rl == 10 * 2 * 4 * (9 + 20)
    assert found.sampled == (10 * 2 * 4 + JUDGED) * 20
    assert found.prompts == (10 * 2 + JUDGED) * 9
    assert "2,524 tokens trained on (SFT 204, RL 2,320), up to 2,440 sampled, 558" in str(found)


def test_a_conversation_over_the_limit_counts_up_to_it():
    assert estimated(sft=replace(SFT, max_length=10)).sft == 3 * 2 * 2 * 10


def test_every_sub_step_trains_on_the_batch_again():
    assert estimated(rl=replace(RL, substeps=3)).rl == 3 * estimated().rl


@pytest.mark.parametrize(("every", "times"), [(0, 0), (5, 2), (4, 3), (20, 1)])
def test_evaluations_on_the_way_are_counted_and_the_last_step_has_one(every, times):
    """The one after the last step was forgotten: with eval_every=20 in 10 steps there was none."""
    found = estimated(rl=replace(RL, eval_every=every, eval_problems=50))
    assert found.sampled == estimated().sampled + times * 50 * 20
    assert found.prompts == estimated().prompts + times * 50 * 9


@pytest.mark.parametrize(
    ("rl", "readers"),
    [
        (RL, 0),
        (replace(RL, kl_penalty=0.1), 1),
        (replace(RL, reward="correct+0.5*preference"), 1),
        (replace(RL, kl_penalty=0.1, reward="tournament"), 2),
    ],
)
def test_who_reads_every_completion_again_is_counted(rl, readers):
    """A judge and the reference of the KL penalty: they cost as much again as what is sampled."""
    again = readers * 10 * 2 * 4 * (9 + 20)
    assert estimated(rl=rl).prompts == estimated().prompts + again
