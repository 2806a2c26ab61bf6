"""All cores while they answer at once, else one, and nobody else's setting changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from course_lib.engine import cores
from course_lib.engine.cores import LARGE, apart, cores_answer, cores_for


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
    monkeypatch.setattr(cores, "_asked", threading.local())
    return seconds


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
    monkeypatch.setattr(cores.time, "monotonic", lambda: now)
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
def test_waiting_for_pythons_lock_is_not_taken_for_slow_cores(monkeypatch: pytest.MonkeyPatch):
    waits = iter([0.0, 5e-3, 0.0, 22e-6, *[0.0, 5e-3] * 5])  # one of seven undisturbed
    clock = 0.0

    def tick() -> float:
        nonlocal clock
        clock += next(waits)
        return clock

    monkeypatch.setattr(cores.time, "perf_counter", tick)
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
