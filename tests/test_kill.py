"""kill -9 at any moment loses nothing that was acknowledged, and leaves nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


def killed(tmp_path: Path, rounds: int, seed: int, timeout_s: float) -> dict:
    """What crash_child.py reports after so many kills."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    script = Path(__file__).with_name("crash_child.py")
    arguments = [str(tmp_path / "store"), str(tmp_path / "model"), str(rounds), str(seed)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(report: dict, rounds: int) -> None:
    assert report["faults"] == []
    assert report["acknowledged"] >= rounds // 2  # the kills met an engine at work
    assert report["resumed"] >= rounds // 4  # and the next start went on from what it had saved
    assert report["scratch_after_start"] == 1


def test_killed_a_few_times_nothing_acknowledged_is_lost(tmp_path: Path):
    check(killed(tmp_path, rounds=5, seed=0, timeout_s=110), 5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_two_hundred_times_nothing_acknowledged_is_lost(tmp_path: Path):
    check(killed(tmp_path, rounds=200, seed=1, timeout_s=3500), 200)
