"""Diagnosis: each rule on a run drawn by hand, its own kind first, and silence on healthy ones."""

import pytest

from course_lib.diagnosis import ENOUGH, RULES, diagnose

STEPS = 30


def line(start, end):
    return [start + (end - start) * step / (STEPS - 1) for step in range(STEPS)]


HEALTHY = {
    "reward/total": line(0.2, 0.9),
    "env/correct": line(0.2, 0.9),
    "env/completion_tokens": line(15, 30),
    "env/stop_share": line(1, 1),
    "optim/entropy": line(0.2, 0.01),
    "env/dead_groups": line(1, 6),
    "env/groups": line(8, 8),
    "ratio/max_deviation": line(1e-5, 1e-5),
    "optim/lr": line(4e-4, 4e-4),
    "kl/reference": line(0, 5),
}
BROKEN = {
    "ratio_off": {"ratio/max_deviation": line(6, 0.5)},
    "dead_groups": {
        "env/dead_groups": line(8, 8),
        "reward/total": line(0, 0),
        "env/correct": line(0, 0),
    },
    "length_explosion": {
        "env/completion_tokens": line(15, 95),
        "env/stop_share": line(1, 0),
        "env/correct": line(0.2, 0),
    },
    "entropy_collapse": {"optim/entropy": line(0.2, 0), "env/correct": line(0.2, 0)},
    "hacked_reward": {"optim/entropy": line(0.2, 0.3), "env/correct": line(0.2, 0)},
    "kl_runaway": {
        "reward/total": line(0.2, 0),
        "env/correct": line(0.2, 0),
        "optim/entropy": line(0.2, 0.3),
        "kl/reference": line(0, 150),
    },
    "tiny_rate": {
        "reward/total": [0.2, 0.25] * 15,
        "env/correct": [0.2, 0.25] * 15,
        "optim/entropy": line(0.2, 0.2),
        "optim/lr": line(1e-8, 1e-8),
        "kl/reference": line(0, 1e-6),
    },
    "flat_reward": {
        "reward/total": [0.2, 0.25] * 15,
        "env/correct": [0.2, 0.25] * 15,
        "optim/entropy": line(0.2, 0.2),
        "kl/reference": line(0, 2),
    },
}


def rows(columns, steps=STEPS):
    return [
        {
            "phase": "rl",
            "step": step + 1,
            **{name: values[step] for name, values in columns.items()},
        }
        for step in range(steps)
    ]


def kinds(columns, **options):
    return [found.kind for found in diagnose(rows(columns, **options))]


def test_there_are_eight_kinds_and_an_example_of_each():
    assert [rule.__name__ for rule in RULES] == list(BROKEN)


@pytest.mark.parametrize("kind", BROKEN)
def test_each_kind_is_named_first(kind):
    found = diagnose(rows({**HEALTHY, **BROKEN[kind]}))
    assert found[0].kind == kind
    assert str(found[0]).count("\n") == 0 and len(str(found[0])) < 220


def test_a_healthy_run_is_not_accused():
    assert kinds(HEALTHY) == []
    solved_from_the_start = {
        "reward/total": [0.95, 1.0] * 15,
        "env/correct": [0.95, 1.0] * 15,
        "env/dead_groups": line(8, 8),
        "optim/entropy": line(0.001, 0.001),
    }
    assert kinds({**HEALTHY, **solved_from_the_start}) == []


def test_without_a_reference_the_rate_tells_a_tiny_step_from_a_blind_reward():
    for kind in ("tiny_rate", "flat_reward"):
        columns = {**HEALTHY, **BROKEN[kind]}
        del columns["kl/reference"]
        assert kinds(columns) == [kind]


def test_a_tournament_is_not_called_flat_because_somebody_wins_every_duel():
    columns = {**HEALTHY, **BROKEN["flat_reward"], "reward/tournament": line(0.5, 0.5)}
    assert kinds(columns) == []


def test_a_short_run_is_not_called_flat():
    assert kinds({**HEALTHY, **BROKEN["flat_reward"]}, steps=ENOUGH - 1) == []


def flat(value):
    return [value] * STEPS


def half(before, after):
    return [before] * (STEPS // 2) + [after] * (STEPS // 2)


NEVER = {"kl/reference": [None] * STEPS}
FELL = {"reward/total": half(1.0, 0.45), "kl/reference": flat(9), "env/correct": flat(0.2)}
LIMITS = [  # a rule, a metric on its side of the limit, one on the other; and what both share
    ("ratio_off", "ratio/max_deviation", flat(0.021), flat(0.019), {}),
    ("dead_groups", "env/dead_groups", flat(91), flat(89), {"env/groups": flat(100)}),
    ("dead_groups", "env/correct", flat(0.75), flat(0.85), {}),
    ("length_explosion", "env/completion_tokens", half(20, 31), half(20, 29), {}),
    ("length_explosion", "env/stop_share", flat(0.65), flat(0.75), {}),
    ("entropy_collapse", "optim/entropy", half(0.2, 0.019), half(0.2, 0.021), {}),
    ("entropy_collapse", "optim/entropy", half(0.08, 0.015), half(0.08, 0.018), {}),
    ("entropy_collapse", "env/correct", flat(0.45), flat(0.55), {}),
    ("hacked_reward", "env/correct", half(0.5, 0.44), half(0.5, 0.46), {}),
    ("kl_runaway", "reward/total", half(1.0, 0.45), half(1.0, 0.55), FELL),
    ("kl_runaway", "kl/reference", flat(9), flat(7), FELL),
    ("kl_runaway", "env/correct", flat(0.75), flat(0.85), FELL),
    ("tiny_rate", "kl/reference", flat(0.009), flat(0.011), {}),
    ("tiny_rate", "optim/lr", flat(1.9e-5), flat(2.1e-5), NEVER),
    ("flat_reward", "env/dead_groups", flat(89), flat(91), {"env/groups": flat(100)}),
    ("flat_reward", "env/correct", flat(0.75), flat(0.85), {}),
]


@pytest.mark.parametrize(("kind", "metric", "inside", "outside", "shared"), LIMITS)
def test_each_rule_begins_at_its_limit(kind, metric, inside, outside, shared):
    """Any of these numbers could be changed by a quarter unseen, and some comparisons left out."""
    columns = {**HEALTHY, **BROKEN[kind], **shared}
    assert kind in kinds({**columns, metric: inside})
    assert kind not in kinds({**columns, metric: outside})


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("entropy_collapse", {"optim/entropy": half(0.2, 0)}),
        ("hacked_reward", {}),
        ("flat_reward", {}),
    ],
)
def test_a_slow_change_is_told_after_twenty_steps(kind, others):
    columns = {**HEALTHY, **BROKEN[kind], **others}
    assert kind in kinds(columns, steps=20) and kind not in kinds(columns, steps=19)


def test_rows_of_other_phases_and_empty_logs_say_nothing():
    assert diagnose([]) == []
    assert diagnose([{"phase": "sft", "step": 1, "train/nll": 2.0}]) == []


def test_a_reward_that_was_hacked_in_one_step_is_found():
    """The first mean over five steps hid it: one untouched step, then all was over."""
    columns = {
        **HEALTHY,
        "reward/total": [0.84, *line(0.88, 0.92)[1:]],
        "env/correct": [0.3, *[0.05, 0.07] * 14, 0.06],
        "optim/entropy": line(0.2, 0.3),
    }
    assert kinds(columns)[0] == "hacked_reward"


def test_groups_that_ruin_has_killed_were_not_dead_from_the_start():
    columns = {
        **HEALTHY,
        "env/dead_groups": [2, 7, *[8] * 28],
        "reward/total": [0.15, 0.02, *[0.0] * 28],
        "env/correct": [0.15, 0.02, *[0.0] * 28],
        "optim/entropy": line(0.2, 0.3),
        "kl/reference": [0.0, *[80.0] * 29],
    }
    assert kinds(columns)[0] == "kl_runaway"


def test_a_runaway_that_took_two_steps_is_found_where_the_kl_was_measured():
    columns = {
        **HEALTHY,
        "reward/total": [0.15, *[0.0, 0.02] * 14, 0.0],
        "env/correct": [0.15, *[0.0, 0.02] * 14, 0.0],
        "optim/entropy": line(0.2, 0.3),
        "kl/reference": [0.0, *[80.0] * 29],
    }
    assert kinds(columns)[0] == "kl_runaway"


def test_a_reward_that_costs_ten_points_of_right_answers_is_hacked():
    columns = {**HEALTHY, "env/correct": line(0.4, 0.3), "optim/entropy": line(0.2, 0.3)}
    assert kinds(columns) == ["hacked_reward"]


def test_one_step_with_a_strange_ratio_is_no_disagreement():
    assert kinds({**HEALTHY, "ratio/max_deviation": [0.5, *line(1e-5, 1e-5)[1:]]}) == []


@pytest.mark.parametrize("name", HEALTHY)
def test_a_metric_that_is_no_number_is_passed_over(name):
    """A KeyError or TypeError, where somebody else's program had written the log."""
    for value in ("x", None, True, [1], {}, 10**400):
        assert kinds({**HEALTHY, name: [value, *HEALTHY[name][1:]]}) == []
        diagnose(rows({**HEALTHY, name: [value] * STEPS}))


def test_numbers_of_any_size_and_missing_metrics_are_survived():
    assert diagnose(rows({"reward/total": ["x"] * STEPS})) == []
    for value in (0, -1.0, 1e308, float("inf"), float("nan")):
        diagnose(rows({"reward/total": [value, 0.0] * 15}))
        for name in HEALTHY:
            diagnose(rows({**HEALTHY, name: [0.0, value] * 15}))
