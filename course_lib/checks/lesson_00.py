"""Exercises of lesson 00: the first loss, one training step, the sampler left behind."""

from __future__ import annotations

import math
import random
from typing import Any

from course_lib.checks.compare import plain, within
from course_lib.checks.exercise import Exercise, Mutant, Property
from course_lib.checks.recording_client import RecordingClient, what_happened


def uniform_loss(vocab_size: int) -> float:
    """Nats per token of a model that gives every token the same probability."""
    return math.log(vocab_size)


FIRST_LOSS = Exercise(
    id="00.1",
    title="The loss of a model that knows nothing",
    kind="predict",
    answers="value",
    reference=uniform_loss,
    same=within(0.02),
    cases=lambda rng: [(rng.randrange(300, 150_000),) for _ in range(4)],
    mutants={
        "bits": Mutant(
            lambda vocab_size: math.log2(vocab_size),
            "That is in bits (log base 2). The SDK counts in nats: use the natural logarithm.",
        ),
        "ten": Mutant(
            lambda vocab_size: math.log10(vocab_size),
            "That is a logarithm to base 10. The SDK counts in nats: use the natural logarithm.",
        ),
        "probability": Mutant(
            lambda vocab_size: 1 / vocab_size,
            "That is the probability of one token. The loss is minus the logarithm of it.",
        ),
        "zero": Mutant(
            lambda vocab_size: 0.0,
            "A loss of zero belongs to a model that is always right and always sure.",
        ),
        "one in all": Mutant(
            lambda vocab_size: float(vocab_size),
            "That is the number of tokens. First the probability of one of them, then minus its "
            "logarithm.",
        ),
        "sign": Mutant(
            lambda vocab_size: -math.log(vocab_size),
            "That is the log-probability. The loss is minus that: a positive number.",
        ),
    },
    hints=(
        "If all tokens are equally likely, how likely is the one that comes next?",
        "The loss of one token is minus the natural logarithm of the probability it was given.",
        "Minus the logarithm of one in V is the same as the logarithm of V. Python: the math "
        "module.",
    ),
    stub="predicted_loss = ...  # nats per token; vocab_size is defined above",
)


def train_step(client: Any, data: Any, learning_rate: float) -> Any:
    """One pipelined step: both calls are on their way before the first wait."""
    forward = client.forward_backward(data, "cross_entropy")
    step = client.optim_step(_adam(learning_rate))
    result = forward.result()
    step.result()
    return result


def _adam(learning_rate: float) -> Any:
    import tinker

    return tinker.AdamParams(learning_rate=learning_rate)


def _steps(rng: random.Random) -> list[tuple]:
    import tinker  # noqa: F401 (now, so that its import does not count against the time limit)

    rates = [rng.choice([1e-4, 5e-4, 1e-3]) for _ in range(3)]
    return [
        (RecordingClient(), [f"datum {rng.randrange(100)}" for _ in range(size)], rate)
        for size, rate in enumerate(rates, start=1)
    ]


def _one_after_the_other(client: Any, data: Any, learning_rate: float) -> Any:
    result = client.forward_backward(data, "cross_entropy").result()
    client.optim_step(_adam(learning_rate)).result()
    return result


def _step_first(client: Any, data: Any, learning_rate: float) -> Any:
    step = client.optim_step(_adam(learning_rate))
    forward = client.forward_backward(data, "cross_entropy")
    step.result()
    return forward.result()


def _no_step(client: Any, data: Any, learning_rate: float) -> Any:
    return client.forward_backward(data, "cross_entropy").result()


def _returns_the_future(client: Any, data: Any, learning_rate: float) -> Any:
    forward = client.forward_backward(data, "cross_entropy")
    client.optim_step(_adam(learning_rate))
    return forward


def _never_waits_for_the_step(client: Any, data: Any, learning_rate: float) -> Any:
    forward = client.forward_backward(data, "cross_entropy")
    client.optim_step(_adam(learning_rate))
    return forward.result()


def _returns_the_step(client: Any, data: Any, learning_rate: float) -> Any:
    forward = client.forward_backward(data, "cross_entropy")
    step = client.optim_step(_adam(learning_rate))
    forward.result()
    return step.result()


def _returns_a_future_late(client: Any, data: Any, learning_rate: float) -> Any:
    forward = client.forward_backward(data, "cross_entropy")
    client.optim_step(_adam(learning_rate)).result()
    return forward


def _returns_both(client: Any, data: Any, learning_rate: float) -> Any:
    forward = client.forward_backward(data, "cross_entropy")
    step = client.optim_step(_adam(learning_rate))
    return forward.result(), step.result()


def _returns_nothing(client: Any, data: Any, learning_rate: float) -> None:
    train_step(client, data, learning_rate)


def _fixed_rate(client: Any, data: Any, learning_rate: float) -> Any:
    return train_step(client, data, 2e-3)


def _one_by_one(client: Any, data: Any, learning_rate: float) -> Any:
    return [train_step(client, [datum], learning_rate) for datum in data][-1]


def _torchs_name_for_the_rate(client: Any, data: Any, learning_rate: float) -> Any:
    import tinker

    return client.optim_step(tinker.AdamParams(**{"lr": learning_rate}))


def _calls(f: Any, client: Any, data: Any, learning_rate: float) -> RecordingClient:
    f(client, data, learning_rate)
    return client


def _calls_before_a_wait(log: list[str]) -> bool:
    """Whether every call was sent before the first wait."""
    return sorted(log, key=lambda event: event.startswith("wait")) == log


RATE_IS_LOST = "The learning rate that was asked for does not reach optim_step."
WAITS_IN_BETWEEN = (
    "The result is right, but the engine idles while your code waits: submit both calls first, "
    "then wait for both. On a hosted cluster each such pause costs time in every step."
)
STEP_FIRST = (
    "The optimizer steps before there is a gradient: calls are carried out in the order they were "
    "submitted, so forward_backward comes first."
)

TRAIN_STEP = Exercise(
    id="00.2",
    title="One training step",
    kind="code",
    reference=train_step,
    cases=_steps,
    observe=what_happened,
    mutants={
        "waits in between": Mutant(_one_after_the_other, WAITS_IN_BETWEEN),
        "step before gradient": Mutant(_step_first, STEP_FIRST),
        "no step": Mutant(
            _no_step,
            "The gradient is computed and never used: without optim_step no weight moves.",
        ),
        "returns the future": Mutant(
            _returns_the_future,
            "It hands back a future, which is a promise and not yet a result, and waits for "
            "nothing: ask both futures for their result.",
        ),
        "step not awaited": Mutant(
            _never_waits_for_the_step,
            "It returns before the step is known to be done: an error in optim_step would pass "
            "unseen. Wait for both futures.",
        ),
        "gives the step": Mutant(
            _returns_the_step,
            "It returns what optim_step gives. The loss is in the result of forward_backward: "
            "return that one.",
        ),
        "gives the first future": Mutant(
            _returns_a_future_late,
            "It waits for the step and hands back the future of forward_backward. Ask that one "
            "for its result, too.",
        ),
        "gives both": Mutant(
            _returns_both,
            "It returns both results. Return only the first, the one of forward_backward.",
        ),
        "gives nothing": Mutant(
            _returns_nothing, "The step is right, but its result is lost: the `return` is missing."
        ),
        "fixed rate": Mutant(_fixed_rate, RATE_IS_LOST),
        "lr": Mutant(
            _torchs_name_for_the_rate,
            "AdamParams refuses one of the names or values that it was given. torch calls the rate "
            "lr; here its name is learning_rate.",
        ),
        "one by one": Mutant(
            _one_by_one,
            "It takes one step for each datum. One call of forward_backward takes the whole list, "
            "and one step follows it.",
        ),
    },
    properties=(
        Property(
            lambda f, *case: all(
                "cross_entropy" in event
                for event in _calls(f, *case).log
                if "submit forward" in event
            ),
            'The loss has another name: give forward_backward "cross_entropy".',
        ),
        Property(
            lambda f, client, data, rate: _calls(f, client, data, rate).data == [data],
            "forward_backward should be called once, with the whole list of data as it came.",
        ),
        Property(
            lambda f, *case: len(_calls(f, *case).learning_rates) <= 1,
            "It calls optim_step more than once: one step follows one gradient.",
        ),
        Property(
            lambda f, client, data, rate: (
                _calls(f, client, data, rate).learning_rates in ([rate], [])
            ),
            RATE_IS_LOST,
        ),
        Property(
            lambda f, *case: len({e for e in _calls(f, *case).log if e.startswith("wait")}) >= 2,
            "It does not wait for both calls: ask each of the two futures for its result().",
        ),
        Property(
            lambda f, client, data, rate: f(client, data, rate) == f"result of {data}",
            "It returns something else than what forward_backward gives: return the result of its "
            "future, as it is.",
        ),
        Property(
            lambda f, *case: _calls(f, *case).log[0].startswith("submit forward_backward"),
            STEP_FIRST,
        ),
        Property(lambda f, *case: _calls_before_a_wait(_calls(f, *case).log), WAITS_IN_BETWEEN),
    ),
    hints=(
        "Two calls, and both give a future at once. Nothing forces you to wait before making the "
        "second.",
        "Keep the two futures in two variables, and call .result() only when both exist.",
        'forward_backward takes the data and the name of the loss, here "cross_entropy"; '
        "optim_step takes tinker.AdamParams with the learning rate. Return what the first gives.",
    ),
    stub='''def train_step(client, data, learning_rate):
    """Submit forward_backward (loss "cross_entropy") and optim_step, then wait for both.

    Return what the first one gives."""
    return ...''',
)


def trained_logprob(before: float, trained: float) -> float:
    """What a sampling client made after the steps gives: the trainer's number, not the old one."""
    return trained


def _about(left: Any, right: Any) -> bool:
    left, right = plain(left), plain(right)
    if not isinstance(left, int | float) or not isinstance(right, int | float):
        return False
    return abs(left - right) <= 0.05


def _facts(rng: random.Random) -> list[tuple]:
    before = [-rng.uniform(4, 40) for _ in range(4)]
    return [(old, old / 2 - 1.0) for old in before]


STALE_SAMPLER = Exercise(
    id="00.3",
    title="The sampler that did not hear of the training",
    kind="find the bug",
    answers="value",
    reference=trained_logprob,
    same=_about,
    cases=_facts,
    mutants={
        "stale": Mutant(
            lambda before, trained: before,
            "Still the old number. A sampling client is a photograph of the weights at the "
            "moment it was made; take a new one after the steps.",
        ),
        "sign": Mutant(
            lambda before, trained: -trained,
            "That is a loss (positive). Sum the log-probabilities themselves.",
        ),
        "gain": Mutant(
            lambda before, trained: trained - before,
            "That is the gain. Give the log-probability after the training.",
        ),
    },
    hints=(
        "Training changed the adapter inside the training client. Who told the sampling client?",
        "Look at the line that makes the sampling client: does it stand before or after the steps?",
        "Ask the training client for a fresh one after the steps "
        "(save_weights_and_get_sampling_client), and measure with that.",
    ),
    stub="logprob_after = ...  # of the same answer, from a sampler that knows the trained weights",
)

EXERCISES = [FIRST_LOSS, TRAIN_STEP, STALE_SAMPLER]
