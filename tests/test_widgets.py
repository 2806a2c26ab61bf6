"""A widget is displayed once, then only its traits change; a stored notebook loses nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from course_lib.checkpoints import StopTraining
from course_lib.config import find_file
from course_lib.conversations import Conversation, Message
from course_lib.errors import CourseError
from course_lib.plots.groups import dead_groups_figure
from course_lib.plots.words import description
from course_lib.widgets import (
    LiveTraining,
    clip_explorer,
    group_explorer,
    kl_sampler,
    lora_explorer,
    luck_explorer,
    mask_viewer,
    reward_designer,
    show,
    show_source,
)
from course_lib.widgets.chat import Chat
from course_lib.widgets.display import WIDGET_VIEW
from course_lib.widgets.explorers import loss_curves


@pytest.fixture
def shown(monkeypatch):
    """Everything that is displayed: (bundle, metadata)."""
    displayed: list[tuple[dict, dict]] = []

    def display(bundle, raw=False, metadata=None):
        displayed.append((bundle, metadata or {}))

    monkeypatch.setattr("IPython.display.display", display)
    return displayed


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(find_file("data/base-model"))


ASK, ANSWER = Message("user", "What is 2 + 3?"), Message("assistant", "The answer is 5.")
MORE = (Message("user", "And 4 more?"), Message("assistant", "The answer is 9."))
CONVERSATIONS = [
    Conversation((ASK, ANSWER), "test:1"),
    Conversation((ASK, Message("assistant", "It is 5."), *MORE), "test:2"),
]
RUNS = {(r, 16.0, lr): [2.0, lr / r] for r in (1, 4, 16) for lr in (0.1, 0.5)}
RUNS |= {(r, 32.0, lr): [2.0, lr / r] for r in (1, 4, 16) for lr in (0.1, 0.5)}
PARTS = {"correct": [1.0, 0.0], "polite": [0.0, 1.0]}
EXPLORERS: dict[str, Callable[[], Any]] = {
    "group": group_explorer,
    "clip": clip_explorer,
    "kl": kl_sampler,
    "luck": lambda: luck_explorer([0.0] * 20, [1.0, 0.0] * 10),
    "lora": lambda: lora_explorer(RUNS),
    "reward": lambda: reward_designer(["The answer is 5.", "Thanks!"], PARTS, {"correct": 1.0}),
}


# --- figures and sources


def test_a_figure_is_shown_with_alt_text_and_with_the_same_words_below(shown):
    figure = dead_groups_figure(0.05, 8)
    show(figure)
    (picture, metadata), (caption, _) = shown
    assert picture["image/png"].startswith("iVBOR")  # the first bytes of every PNG, in base64
    assert metadata["image/png"]["alt"] == description(figure)
    assert picture["text/plain"] == f"Figure: {description(figure)}"
    assert description(figure) in caption["text/plain"]


def test_captions_cannot_become_markup(shown):
    show(dead_groups_figure(0.05, 8), "<|end|> & <b>")
    assert "&lt;|end|&gt; &amp; &lt;b&gt;" in shown[1][0]["text/html"]


def test_a_figure_without_words_is_refused(shown):
    figure = dead_groups_figure(0.05, 8)
    figure.set_label("")
    with pytest.raises(ValueError, match="needs words"):
        show(figure)


def test_show_source_shows_what_runs(shown):
    show_source(dead_groups_figure)
    assert shown[0][0]["text/plain"].startswith("# course_lib/plots/groups.py\ndef dead_groups")


# --- explorers


@pytest.mark.parametrize("name", EXPLORERS)
def test_an_explorer_is_displayed_once_with_a_picture_for_those_who_see_no_widgets(name, shown):
    EXPLORERS[name]().show()
    ((bundle, metadata),) = shown
    assert set(bundle) == {WIDGET_VIEW, "image/png", "text/plain"}
    assert metadata["image/png"]["alt"]


@pytest.mark.parametrize("name", EXPLORERS)
def test_moving_any_control_changes_the_picture_and_displays_nothing(name, shown):
    explorer = EXPLORERS[name]()
    for control in explorer.controls.values():
        before = explorer.picture.value
        control.value = other_value(control)
        assert explorer.picture.value != before
    assert shown == []


def other_value(control: Any) -> Any:
    """A value where the control does not stand."""
    if hasattr(control, "options"):
        values = [option[1] if isinstance(option, tuple) else option for option in control.options]
        return next(value for value in values if value != control.value)
    return control.min if control.value != control.min else control.max


@pytest.mark.parametrize("name", EXPLORERS)
def test_the_picture_in_a_widget_has_alt_text(name):
    explorer = EXPLORERS[name]()
    assert '<img alt="' in explorer.picture.value
    assert "<figcaption>" in explorer.picture.value


def test_the_mask_viewer_shows_right_and_wrong_masks(tokenizer):
    explorer = mask_viewer(CONVERSATIONS, tokenizer)
    explorer.controls["conversation"].value = 2
    words = {}
    for mask in explorer.controls["mask"].options:
        explorer.controls["mask"].value = mask
        words[mask] = description(explorer.figure()).split("trained on: ")[1]
    assert words["last_assistant"].startswith("The")
    assert words["last_assistant"].endswith("<|end|>.")
    assert words["all_assistant"].startswith("I t")
    assert words["everything"].startswith("<|user|>")
    assert words["header too"].startswith("<|assistant|>")
    assert not words["end missing"].endswith("<|end|>.")


def test_the_clip_explorer_draws_the_engines_own_losses():
    curves = loss_curves([0.5, 1.0, 2.0], 1.0, 0.8, 1.2)
    assert curves["importance_sampling"][0] == pytest.approx([-0.5, -1.0, -2.0])
    assert curves["ppo"][0] == pytest.approx([-0.5, -1.0, -1.2])
    assert curves["ppo"][1] == pytest.approx([-0.5, -1.0, 0.0])  # no gradient above the clip
    assert curves["cispo"][0] is None  # its gradient is not its slope
    assert curves["cispo"][1] == pytest.approx([-0.8, -1.0, -1.2])  # clipped, and still a gradient


def test_a_setting_that_makes_no_sense_is_told_in_the_picture():
    explorer = group_explorer()

    def refuse(**_: Any):
        raise CourseError("p", "is no chance", "use 0 to 1")

    explorer.draw = refuse
    explorer.controls["p"].value = 0.9
    assert "p: is no chance; use 0 to 1" in explorer.picture.value


# --- the live dashboard


def slow_training(steps: int, *, on_step: Any, fourth: threading.Event | None = None) -> int:
    """A stand-in for train_sft: the number of steps it made. The fourth one may have to wait."""
    for step in range(1, steps + 1):
        time.sleep(0.02)
        if step == 4 and fourth is not None:
            assert fourth.wait(20)
        try:
            on_step(step, steps, {"train/nll": 1.0 / step})
        except StopTraining:
            return step
    return steps


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until something is so (at most 20 s)."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_the_dashboard_shows_every_step_and_hands_the_result_on(shown):
    dashboard = LiveTraining()
    assert asyncio.run(dashboard.run(slow_training, 5)) == 5
    assert [row["step"] for row in dashboard.rows] == [1, 2, 3, 4, 5]
    assert dashboard.bar.value == 5
    assert "step 5 of 5, loss 0.200" in dashboard.status.value


def test_the_dashboard_is_displayed_once_and_leaves_a_picture(shown):
    asyncio.run(LiveTraining().run(slow_training, 5))
    kinds = [set(bundle) for bundle, _ in shown]
    assert kinds[0] == {WIDGET_VIEW, "text/plain"}
    assert "image/png" in kinds[1]
    assert len(kinds) == 3  # the dashboard, the final picture, its caption


def test_stop_holds_the_training_and_resume_goes_on_while_the_cell_awaits(shown):
    dashboard, pressed = LiveTraining(), threading.Event()
    seen: list[int] = []

    async def cell() -> int:
        running = asyncio.create_task(dashboard.run(slow_training, 12, fourth=pressed))
        await until(lambda: len(dashboard.rows) >= 3)
        dashboard.stop.click()
        pressed.set()
        for _ in range(2):
            await asyncio.sleep(0.25)
            seen.append(len(dashboard.rows))
        assert dashboard.stop.disabled
        assert not dashboard.resume.disabled
        assert f"{dashboard.rows[-1]['step']} of 12" in dashboard.picture.value  # not an older one
        dashboard.resume.click()
        return await running

    assert asyncio.run(cell()) == 12
    assert seen[0] == seen[1] < 12


def test_finish_ends_the_training_through_its_own_checkpoint(shown):
    dashboard = LiveTraining()

    async def cell() -> int:
        running = asyncio.create_task(dashboard.run(slow_training, 500))
        await until(lambda: len(dashboard.rows) >= 2)
        dashboard.stop.click()
        dashboard.finish.click()
        return await running

    assert asyncio.run(cell()) < 500
    assert dashboard.finish.disabled
    assert dashboard.status.value.endswith(", ended here by Finish")


def test_an_interrupted_dashboard_says_what_the_weights_are(shown):
    dashboard = LiveTraining()

    async def cell() -> None:
        running = asyncio.create_task(dashboard.run(slow_training, 500))
        await until(lambda: len(dashboard.rows) >= 2)
        running.cancel()
        await running

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cell())
    assert "of 500" in dashboard.status.value
    assert dashboard.status.value.endswith(", interrupted: the weights keep these steps")


def test_a_dashboard_that_was_interrupted_runs_again_from_its_beginning(shown):
    """It ended after one step, as if by Finish, and drew both runs as one: "8 of 3 steps"."""
    dashboard = LiveTraining()
    left: list[int] = []

    def watched(steps: int, *, on_step: Any) -> None:
        left.append(slow_training(steps, on_step=on_step))

    async def cell() -> int:
        running = asyncio.create_task(dashboard.run(watched, 500))
        await until(lambda: len(dashboard.rows) >= 2)
        dashboard.stop.click()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return await dashboard.run(slow_training, 5)

    assert asyncio.run(cell()) == 5
    assert [row["step"] for row in dashboard.rows] == [1, 2, 3, 4, 5]
    assert left and left[0] < 500  # the first run's thread has ended
    assert dashboard.status.value == "step 5 of 5, loss 0.200"


def test_traits_change_on_the_thread_of_the_cell_only(shown):
    dashboard = LiveTraining()
    threads = set()
    dashboard.status.observe(lambda _: threads.add(threading.get_ident()), "value")
    asyncio.run(dashboard.run(slow_training, 3))
    assert threads == {threading.get_ident()}


def test_an_error_in_training_reaches_the_cell(shown):
    def broken(*, on_step: Any) -> None:
        raise CourseError("data", "is empty", "add rows")

    with pytest.raises(CourseError, match="is empty"):
        asyncio.run(LiveTraining().run(broken))


# --- chat


class Answering:
    """A sampling client whose every answer is the same."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.temperatures = tokens, []

    def sample(self, *, prompt, num_samples, sampling_params):
        from concurrent.futures import Future
        from types import SimpleNamespace

        self.temperatures.append(sampling_params.temperature)
        future: Future = Future()
        sequence = SimpleNamespace(tokens=self.tokens)
        future.set_result(SimpleNamespace(sequences=[sequence]))
        return future


def test_the_chat_asks_every_model_and_shows_their_answers_side_by_side(tokenizer, shown):
    models = {
        "base": Answering(tokenizer.encode("no idea")),
        "SFT": Answering(tokenizer.encode("The answer is <5>.<|end|>")),
    }
    chat = Chat(models, tokenizer, "What is 2 + 3?")
    assert chat.answers == {"base": "no idea", "SFT": "The answer is <5>."}
    assert "The answer is &lt;5&gt;." in chat.table.value
    chat.greedy.value = False
    chat.send.click()
    chat.question.value = "What is 3 < 4?"  # Enter, or leaving the box
    assert models["base"].temperatures == [0.0, 1.0, 1.0]
    assert "What is 3 &lt; 4?" in chat.table.value
    chat.question.value = " "
    assert models["base"].temperatures == [0.0, 1.0, 1.0]
    assert "Write a question" in chat.table.value
    chat.question.value = "What is 2 + 3?"
    chat.show()
    assert len(shown) == 1
    assert "'The answer is <5>.'" in shown[0][1]["image/png"]["alt"]
