"""The engine on its own, as `posttrain engine` runs it: for programs in other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from tiny_models import tiny_model, tiny_tokenizer

from course_lib.client import connect

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
from course_lib.engine import serve_forever
model, keys = sys.argv[1:]
serve_forever(model, aliases={"org/alias": model}, store="store", keys=keys or None)
"""
WAIT_S = 30
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends Ctrl-C as a signal")


class Alone:
    """A serving process, and what its first lines said."""

    def __init__(self, folder: Path, keys: str = "") -> None:
        tiny_model().save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder / "model"), keys],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines = [self.process.stdout.readline().strip() for _ in range(5)]

    def end(self) -> str:
        """Press Ctrl-C; gives what was said on stderr."""
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=WAIT_S)
        return errors


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Alone]:
    alone = Alone(tmp_path)
    yield alone
    if alone.process.poll() is None:
        alone.process.kill()
        alone.process.wait(WAIT_S)


def test_its_first_lines_are_what_a_client_needs_and_ctrl_c_ends_it(
    alone: Alone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    url, key = (line.split("=", 1) for line in alone.lines[:2])
    assert (url[0], key[0]) == ("TINKER_BASE_URL", "TINKER_API_KEY")
    monkeypatch.setenv(*url)
    monkeypatch.setenv(*key)
    service = connect(quiet=True)
    assert (service.backend, service.base_model) == ("url", "course/base")
    assert service.models == ["course/base", "org/alias"]
    sampler = service.create_sampling_client(base_model="org/alias").result(WAIT_S)
    assert sampler.get_tokenizer().encode("hi") == tiny_tokenizer().encode("hi")
    client = service.create_lora_training_client(base_model=service.base_model, rank=2)
    assert client.result(WAIT_S).save_state("kept").result(WAIT_S).path
    assert alone.end() == ""
    assert alone.process.returncode == 0
    assert list((tmp_path / "store" / "scratch").iterdir()) == []
    home = next(line for line in alone.lines if "HF_HOME=" in line)
    hub = Path(home.split("HF_HOME=")[1].split()[0]) / "hub"
    assert {path.name for path in hub.iterdir()} == {"models--course--base", "models--org--alias"}


def test_with_a_keys_file_it_prints_no_key_and_each_learner_has_their_own(tmp_path: Path):
    key = "tml-alice-" + "a" * 20
    (tmp_path / "keys").write_text(f"alice {key}\n")
    alone = Alone(tmp_path, "keys")
    url = alone.lines[0].split("=", 1)[1]
    assert alone.lines[1] == "TINKER_API_KEY=(the key on your line of the keys file)"
    rest = tinker.RestClient(base_url=url, api_key=key)
    assert rest.list_training_runs().result(WAIT_S).training_runs == []
    with pytest.raises(tinker.AuthenticationError):
        stranger = tinker.RestClient(base_url=url, api_key="tml-stranger-" + "x" * 20)
        stranger.list_training_runs().result(WAIT_S)
    alone.end()
