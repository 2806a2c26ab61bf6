"""SFT: the numbers that the loop reports, and that a resumed run repeats them."""

import math

import pytest
from chat_templates import COURSE, byte_tokenizer
from toy_policy import ToyPolicy

from course_lib.batches import plan_batches
from course_lib.checkpoints import StopTraining
from course_lib.config import SFTConfig
from course_lib.conversations import Conversation, Message
from course_lib.errors import CourseError
from course_lib.metrics import read_metrics
from course_lib.sft import scheduled_rate, sft_datums, train_sft

TOKENIZER = byte_tokenizer(COURSE)


def talk(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), "test:1")


DATA = [talk(f"What is {n}?", f"The answer is {n}.") for n in range(20)]
CONFIG = SFTConfig(batch_size=4, epochs=2, learning_rate=0.05, save_every=3, eval_every=5)


def train(client, config=CONFIG, **options):
    return train_sft(client, DATA, config, tokenizer=TOKENIZER, **options)


def test_a_uniform_model_starts_at_the_log_of_the_vocabulary():
    result = train(ToyPolicy(len(TOKENIZER), scale=0.0))
    assert result.losses[0] == pytest.approx(math.log(len(TOKENIZER)), abs=1e-6)
    assert result.losses[-1] < result.losses[0] - 0.4


def test_only_the_answer_is_trained_on():
    client = ToyPolicy(len(TOKENIZER), scale=0.0)
    before = client.table.detach().clone()
    train(client, SFTConfig(batch_size=20, max_steps=1))
    moved = (client.table.detach() - before).abs().sum(dim=1) > 0
    question_mark = TOKENIZER.encode("0?")[-1]  # only ever inside the question
    assert not moved[question_mark]
    assert moved[TOKENIZER.convert_tokens_to_ids("<|assistant|>")]


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [("last_assistant", "no<|end|>"), ("all_assistant", "yes<|end|>no<|end|>")],
)
def test_which_answers_are_trained_on_is_configured(train_on, trained):
    said = [("user", "a?"), ("assistant", "yes"), ("user", "b?"), ("assistant", "no")]
    conversation = Conversation(tuple(Message(*each) for each in said))
    (datum,) = sft_datums([conversation], SFTConfig(train_on=train_on), TOKENIZER)
    targets, weights = (datum.loss_fn_inputs[name].data for name in ("target_tokens", "weights"))
    counted = [token for token, weight in zip(targets, weights, strict=True) if weight]
    assert TOKENIZER.decode(counted) == trained


def test_both_calls_of_a_step_are_sent_before_either_is_awaited():
    client = ToyPolicy(len(TOKENIZER))
    train(client, SFTConfig(batch_size=4, max_steps=2, eval_path=None))
    assert client.calls == ["forward_backward", "optim_step", "await", "await"] * 2


def test_metrics_and_checkpoints_are_logged(tmp_path):
    result = train(ToyPolicy(len(TOKENIZER)), heldout=DATA[:3], out=tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert {row["phase"] for row in rows} == {"sft"}
    assert [row["step"] for row in rows if "test/nll" in row] == [5, 10]
    assert [point.step for point in result.checkpoints] == [3, 6, 9, 10]
    assert rows[0]["optim/lr"] == 0.05 and "optim/grad_norm" in rows[0]
    assert rows[-1]["progress/epoch"] == 2 and rows[-1]["progress/done_frac"] == 1


def test_the_last_step_is_evaluated_and_saved_when_no_other_is():
    config = SFTConfig(batch_size=4, max_steps=3, eval_every=0, save_every=0)
    result = train(ToyPolicy(len(TOKENIZER)), config, heldout=DATA[:3])
    assert [row["step"] for row in result.metrics if "test/nll" in row] == [3]
    assert [point.step for point in result.checkpoints] == [3]


@pytest.mark.parametrize(("batch_size", "epoch"), [(4, 1 / 5), (6, 1 / 3), (50, 1.0)])
def test_a_run_cut_short_has_not_seen_every_epoch(batch_size, epoch):
    """With max_steps the last step counted as the end of the last epoch."""
    config = SFTConfig(batch_size=batch_size, epochs=3, max_steps=1)
    [row] = train(ToyPolicy(len(TOKENIZER)), config).metrics
    assert row["progress/epoch"] == pytest.approx(epoch)


def test_a_resumed_run_gives_the_metrics_of_an_uninterrupted_one(tmp_path):
    whole = train(ToyPolicy(len(TOKENIZER)), seed=5)

    class Killed(Exception):
        pass

    def kill(step, total, metrics):
        if step == 8:
            raise Killed

    client = ToyPolicy(len(TOKENIZER))
    with pytest.raises(Killed):
        train(client, seed=5, out=tmp_path, on_step=kill)
    from course_lib.checkpoints import CheckpointLog

    last = CheckpointLog(tmp_path).last("sft")
    assert last.step == 6  # steps 7 and 8 are done again
    rest = train(client.restore(last.state_path), seed=5, out=tmp_path, resume=last)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["train/nll"] for row in rows] == pytest.approx(whole.losses, abs=1e-9)
    assert [row["step"] for row in rest.metrics] == [7, 8, 9, 10]


def test_without_the_optimizer_the_resumed_run_is_another_one():
    # The reason why state_path is more than weights: Adam's momentum is part of where a run is.
    whole = train(ToyPolicy(len(TOKENIZER)), seed=5)
    client = ToyPolicy(len(TOKENIZER))
    half = train(client, seed=5)
    assert half.losses == whole.losses
    third = next(point for point in half.checkpoints if point.step == 3)
    bare = client.restore(third.state_path)
    bare.adam.state.clear()
    rest = train(bare, seed=5, resume=third)
    assert rest.losses[0] == pytest.approx(whole.losses[3])  # the weights are the same
    assert abs(rest.losses[-1] - whole.losses[-1]) > 1e-3


def test_a_hook_can_stop_the_run_after_a_checkpoint():
    def stop(step, total, metrics):
        if step == 4:
            raise StopTraining

    result = train(ToyPolicy(len(TOKENIZER)), on_step=stop)
    assert result.stopped and len(result.metrics) == 4
    assert result.checkpoints[-1].step == 4


def test_schedules_start_at_the_peak_and_fall_towards_zero():
    def rates(schedule):
        config = SFTConfig(learning_rate=1.0, schedule=schedule)
        return [scheduled_rate(step, 4, config) for step in (1, 2, 3, 4)]

    assert rates("linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates("constant") == [1.0] * 4
    assert rates("cosine") == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_every_epoch_sees_every_conversation_in_another_order():
    batches = plan_batches(20, CONFIG, seed=0)
    first, second = batches[:5], batches[5:]
    assert all(
        sorted(i for batch in epoch for i in batch) == list(range(20)) for epoch in (first, second)
    )
    assert first != second
    assert plan_batches(20, CONFIG, seed=0) == batches != plan_batches(20, CONFIG, seed=1)
    assert len(plan_batches(3, CONFIG, seed=0)) == 2  # smaller than a batch: one batch an epoch


def test_a_conversation_over_max_length_is_an_error_that_names_its_place():
    config = SFTConfig(max_length=100)
    assert len(sft_datums(DATA[:2], config, TOKENIZER)) == 2
    with pytest.raises(CourseError, match="test:1: the conversation has"):
        sft_datums([talk("word " * 100, "yes")], config, TOKENIZER)
