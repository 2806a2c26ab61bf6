"""Checkpoints: a crash can tear a line, never a checkpoint."""

import errno
import os
from types import SimpleNamespace

import pytest

from course_lib.checkpoints import (
    Checkpoint,
    CheckpointLog,
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


def test_sampler_weights_are_no_place_to_go_on_training_from():
    with pytest.raises(CourseError, match="is no training checkpoint"):
        training_client_from(SimpleNamespace(), "tinker://r/sampler_weights/3")
