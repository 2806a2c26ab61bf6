"""Checkpoints: a crash can tear a line, never a checkpoint."""

import errno
import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from course_lib.checkpoints import (
    Checkpoint,
    CheckpointLog,
    one_line,
    save_checkpoint,
    training_client_from,
)
from course_lib.errors import CourseError


def point(step: int, phase: str = "sft") -> Checkpoint:
    return Checkpoint(
        phase, step, f"tinker://r/weights/{step}", f"tinker://r/sampler_weights/{step}"
    )


def test_the_last_checkpoint_of_a_phase_is_the_one_to_go_on_from(tmp_path):
    log = CheckpointLog(tmp_path / "run")
    assert log.last() is None
    for checkpoint in (point(5), point(10), point(2, "rl")):
        log.append(checkpoint)
    assert log.last() == point(2, "rl")
    assert log.last("sft") == point(10)
    assert log.read() == [point(5), point(10), point(2, "rl")]


@pytest.mark.parametrize(
    "line",
    [
        "garbage",
        "[]",
        '{"phase": "rl", "steps": 2, "state_path": "a", "sampler_path": "b"}',
        '{"phase": "rl", "step": "2", "state_path": "a", "sampler_path": "b"}',
    ],
)
def test_a_line_that_no_crash_explains_is_named(tmp_path, line):
    log = CheckpointLog(tmp_path)
    log.append(Checkpoint("rl", 1, "tinker://a/weights/b", "tinker://a/sampler_weights/b"))
    with open(log.path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(CourseError, match=r"checkpoints.jsonl:2: is no checkpoint"):
        log.last("rl")


def test_a_full_disk_is_told_with_the_file_that_had_no_room(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        CheckpointLog(tmp_path).append(point(1))
    assert caught.value.filename == str(tmp_path / "checkpoints.jsonl")


def test_a_disk_with_room_for_half_a_line_is_told(tmp_path):
    """The half was written, and the run went on without its checkpoint."""
    resource = pytest.importorskip("resource")
    log = CheckpointLog(tmp_path)
    log.append(point(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 20, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            log.append(point(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(log.path)
    log.append(point(3))
    assert log.read() == [point(1), point(3)]


def test_a_line_torn_by_a_crash_is_skipped_and_the_next_one_is_whole(tmp_path):
    log = CheckpointLog(tmp_path)
    log.append(point(5))
    with open(log.path, "a") as handle:
        handle.write('{"phase": "sft", "step": 10, "state_pa')
    assert log.last() == point(5)
    log.append(point(10))
    assert log.read() == [point(5), point(10)]


class Future:
    def __init__(self, value=None, error=None):
        self.value, self.error = value, error

    def result(self):
        if self.error:
            raise self.error
        return self.value


def test_a_save_that_fails_is_not_logged_and_names_the_remedy(tmp_path):
    saved = SimpleNamespace(path="tinker://r/sampler_weights/x")
    client = SimpleNamespace(
        save_state=lambda name: Future(error=RuntimeError("No space left\non device")),
        save_weights_for_sampler=lambda name: Future(saved),
    )
    log = CheckpointLog(tmp_path)
    with pytest.raises(CourseError, match=r"No space left on device.*free disk space"):
        save_checkpoint(client, "sft", 3, log)
    assert log.read() == []


class Saving:
    """A training client that notes what it is asked for, and when its results are waited for."""

    def __init__(self, broken=False):
        self.names, self.events, self.broken = [], [], broken

    def save(self, kind, name):
        self.names.append(name)
        self.events.append(f"save {kind}")

        def result():
            self.events.append(f"await {kind}")
            if self.broken:
                raise RuntimeError("no room")
            return SimpleNamespace(path=f"tinker://r/{kind}/{name}")

        return SimpleNamespace(result=result)

    def save_state(self, name):
        return self.save("weights", name)

    def save_weights_for_sampler(self, name):
        return self.save("sampler_weights", name)


def test_a_checkpoint_names_both_saves_and_no_name_twice(tmp_path):
    client, log = Saving(), CheckpointLog(tmp_path)
    found = save_checkpoint(client, "rl", 3, log)
    save_checkpoint(client, "rl", 3, log)
    first, _, second, _ = client.names
    assert first.startswith("rl-00003-") and first != second
    assert found.state_path == f"tinker://r/weights/{first}"
    assert found.sampler_path == f"tinker://r/sampler_weights/{first}"
    assert log.read()[0] == found


@pytest.mark.parametrize("broken", [False, True])
def test_both_saves_are_sent_before_either_is_awaited_and_both_are_over_after_a_failure(broken):
    client = Saving(broken)
    with pytest.raises(CourseError) if broken else nullcontext():
        save_checkpoint(client, "sft", 1)
    kinds = ["weights", "sampler_weights"]
    assert client.events == [f"{verb} {kind}" for verb in ("save", "await") for kind in kinds]


@pytest.mark.parametrize("given", [point(3), point(3).state_path])
def test_training_goes_on_from_the_state_with_or_without_its_optimizer(given):
    service = SimpleNamespace(
        create_training_client_from_state_with_optimizer=lambda path: Future(("with", path)),
        create_training_client_from_state=lambda path: Future(("without", path)),
    )
    assert training_client_from(service, given) == ("with", "tinker://r/weights/3")
    found = training_client_from(service, given, optimizer=False)
    assert found == ("without", "tinker://r/weights/3")


def test_what_a_back_end_says_is_one_line_of_a_readable_length():
    assert one_line(ValueError("a\n  b " + "x" * 500)) == "a b " + "x" * 196
    told = RuntimeError("Error code: 400")
    told.body = {"error": "no such model"}
    assert one_line(told) == "no such model"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_sampler_weights_are_no_place_to_go_on_training_from():
    with pytest.raises(CourseError, match="is no training checkpoint"):
        training_client_from(SimpleNamespace(), "tinker://r/sampler_weights/3")
