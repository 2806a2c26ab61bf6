"""All cores while they answer at once, else one, and nobody else's setting changes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from course_lib.engine import cores
from course_lib.engine.cores import (
    ALONE_S,
    FAIR,
    HUGE,
    LARGE,
    LOOK_S,
    Cores,
    apart,
    cores_answer,
    cores_for,
)


@pytest.fixture
def two_allowed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Seconds of the short operation by number of cores; the answer is asked for anew."""
    seconds = {1: 20e-6, 2: 10e-6}
    monkeypatch.setattr(cores, "short_operation_s", lambda: seconds[torch.get_num_threads()])
    monkeypatch.setattr(cores, "seen", Cores())
    return seconds


class Machine:
    """A clock, and the share of all cores' time that work on all of them is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.cpu_s, self.trials = 100.0, 0.0, 0
        self.share = 1.0
        self.luck: float | None = None  # what a trial is given, where that differs
        clocks = {"monotonic": lambda: self.now, "perf_counter": lambda: self.now}
        clocks["process_time"] = lambda: self.cpu_s
        monkeypatch.setattr(cores, "time", SimpleNamespace(**clocks))  # other threads keep theirs
        monkeypatch.setattr(cores, "trial_share", self.trial)

    def trial(self) -> float:
        self.trials += 1
        return self.share if self.luck is None else self.luck

    def work(self, size: float = 1e8, seconds: float = 1.5 * LOOK_S) -> int:
        """On how many cores is a piece of work of this size done?"""
        with cores_for(1_000_000, int(size / 1_000_000)):
            used = torch.get_num_threads()
            self.now += seconds
            self.cpu_s += self.share * used * seconds
        return used


@pytest.fixture
def machine(timed: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.usefixtures("two_allowed")
def test_all_cores_work_while_they_answer_at_once(timed: dict[int, float]):
    with cores_for(1_000_000, 100):
        assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_allowed")
def test_one_core_works_where_the_others_are_waited_for_and_gives_them_back(
    timed: dict[int, float],
):
    timed[2] = 60e-6
    with cores_for(1_000_000, 100):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), cores_for(1_000_000, 100):
        _ = 1 / 0
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_allowed")
def test_large_work_takes_all_that_torch_may_use(timed: dict[int, float]):
    timed[2] = 60e-6
    with cores_for(1_000_000, int(LARGE / 1_000_000)):
        assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_allowed")
def test_a_yes_holds_for_a_second_and_a_no_for_a_moment(
    timed: dict[int, float], monkeypatch: pytest.MonkeyPatch
):
    now = 100.0
    clocks = {**vars(time), "monotonic": lambda: now}
    monkeypatch.setattr(cores, "time", SimpleNamespace(**clocks))
    assert cores_answer()
    timed[2] = 60e-6
    now += 0.9
    assert cores_answer()
    now += 0.2
    assert not cores_answer()
    timed[2] = 10e-6
    now += 0.05
    assert not cores_answer()
    now += 0.06
    assert cores_answer()


@pytest.mark.usefixtures("two_allowed")
def test_one_core_works_while_other_programs_have_them_and_all_when_they_are_back(
    machine: Machine,
):
    assert machine.work() == machine.work() == 2
    machine.share = FAIR - 0.1
    assert machine.work() == 2  # seen in this work, so after it
    assert machine.work() == machine.work(LARGE) == 1
    assert machine.work(HUGE) == 2
    machine.now += ALONE_S[0]
    assert machine.work() == 1
    assert machine.trials == 1
    machine.share = 1.0
    assert machine.work() == 1  # for longer than the first time
    machine.now += 2 * ALONE_S[0]
    assert machine.work() == 2
    assert machine.trials == 2


@pytest.mark.usefixtures("two_allowed")
def test_all_cores_are_tried_less_often_the_longer_others_have_them(machine: Machine):
    machine.share, machine.luck = FAIR - 0.1, 1.0  # each trial finds the cores free by chance
    waited = []
    for _ in range(7):
        assert machine.work() == 2
        began = machine.now
        while cores.seen.taken():
            machine.now += 0.25
        waited.append(machine.now - began)
    assert waited == [0.5, 1, 2, 4, 8, 8, 8]
    machine.share = 1.0
    assert machine.work() == machine.work() == 2
    machine.share = FAIR - 0.1
    assert machine.work() == 2
    machine.now += ALONE_S[0]
    assert machine.work() == 2


@pytest.mark.usefixtures("two_allowed")
def test_a_moment_without_the_cores_says_nothing(machine: Machine):
    machine.share = 0.1
    assert [machine.work(seconds=LOOK_S / 4) for _ in range(2)] == [2, 2]
    machine.share = 1.0
    assert [machine.work(seconds=LOOK_S) for _ in range(3)] == [2, 2, 2]


def test_work_on_all_cores_is_given_little_time_where_other_programs_want_them():
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(3 * (os.cpu_count() or 1))
    ]
    try:
        assert min(cores.trial_share() for _ in range(20)) < FAIR
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.usefixtures("two_allowed")
def test_waiting_for_pythons_lock_is_not_taken_for_slow_cores(monkeypatch: pytest.MonkeyPatch):
    waits = iter([0.0, 5e-3, 0.0, 22e-6, *[0.0, 5e-3] * 5])  # one of seven undisturbed
    clock = 0.0

    def tick() -> float:
        nonlocal clock
        clock += next(waits)
        return clock

    monkeypatch.setattr(cores, "time", SimpleNamespace(perf_counter=tick))
    assert cores.short_operation_s() == pytest.approx(22e-6)


@pytest.mark.usefixtures("two_allowed")
def test_the_real_operation_is_timed_and_changes_no_setting():
    assert 0 < cores.short_operation_s() < 0.1
    assert cores_answer() in (True, False)
    assert torch.get_num_threads() == 2


def test_work_done_apart_leaves_no_thread_and_passes_its_error_on():
    before = threading.active_count()
    assert apart(lambda name: (name, threading.current_thread().name), "x")[0] == "x"
    assert apart(threading.current_thread) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 / 0)
    assert threading.active_count() == before
