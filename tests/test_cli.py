"""`posttrain`, as a person types it: what it prints, what it leaves behind, how it says no."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import tinker
from rich.console import Console

from course_lib.checkpoints import Checkpoint, CheckpointLog
from course_lib.cli import main
from course_lib.cli.bars import Bars
from course_lib.doctor import _room
from course_lib.errors import CourseError

PROJECT = Path(__file__).resolve().parent.parent
SMALL = [
    "--set", "sft.max_steps=3", "--set", "sft.eval_every=0", "--set", "rl.steps=2",
    "--set", "rl.group_size=2", "--set", "rl.prompts_per_step=2", "--set", "rl.max_tokens=8",
    "--set", "rl.reward=length", "--set", "eval_problems=4",
]  # fmt: skip
GONE = tinker.APIConnectionError(request=httpx.Request("POST", "http://here:1"))


@pytest.fixture(scope="session")
def server(course_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """`posttrain engine` in a process of its own; what it tells other programs to export."""
    store = tmp_path_factory.mktemp("store")
    command = [sys.executable, "-m", "course_lib.cli", "engine"]
    process = subprocess.Popen(
        [*command, "--model", str(course_model), "--store", str(store)],
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [process.stdout.readline().strip() for _ in range(2)]
    yield dict(line.split("=", 1) for line in lines)
    process.terminate()
    process.wait(20)


@pytest.fixture
def online(server: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of this test go to the server."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "")  # connect() adds to it; put back after the test


@pytest.fixture
def embedded(course_model: Path, tmp_path: Path) -> Iterator[list[str]]:
    """Options for an engine in this process, which ends with the test."""
    from course_lib.engine import server

    options = ["--backend", "embedded", "--model", str(course_model)]
    yield [*options, "--store", str(tmp_path / "embedded-store")]
    for engine in list(server._running.values()):
        engine.stop()


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A working folder that is not the project's: nothing may depend on it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Sixteen conversations of the shipped file: a run of seconds."""
    file = tmp_path / "mine.jsonl"
    rows = (PROJECT / "data" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(rows[:16]) + "\n", encoding="utf-8")
    return file


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


# --------------------------------------------------------------------------------------------------
# The main job


@pytest.fixture
def small(mine: Path) -> list[str]:
    """Options that make a run small, on the sums environment (answers can be checked)."""
    own = ["--data", str(mine), "--set", "rl.environment=sums", "--set", f"eval_path={mine}"]
    return ["--config", "tiny", *own, *SMALL]


def test_all_prints_the_table_and_commands_that_work(online, small, capsys):
    assert main(["all", *small, "--out", "run"]) == 0
    out = capsys.readouterr().out

    for stage in ("base", "SFT", "GRPO"):
        assert re.search(rf"{stage} +\d+ % +\d+-\d+ %", out), stage
    report = json.loads(Path("run/report.json").read_text())
    for path in report["checkpoints"].values():
        assert path in out
    for figure in ("sft_loss.png", "reward.png", "accuracy.png"):
        assert (Path("run") / figure).stat().st_size > 10_000
    chat = next(line.split() for line in out.splitlines() if line.startswith("  posttrain chat"))

    assert main([*chat[1:], "--prompt", "What is 1 + 2 + 3?", "--max-tokens", "4"]) == 0
    assert re.search(r"^base: .*^rl-00002-\w+: ", capsys.readouterr().out, re.M | re.S)


def test_sft_then_rl_from_its_checkpoint(online, small, capsys):
    assert main(["sft", *small, "--out", "first"]) == 0
    out = capsys.readouterr().out
    go_on = next(line.split() for line in out.splitlines() if line.startswith("  posttrain rl"))

    assert main([*go_on[1:], *small, "--out", "second"]) == 0
    assert "reward.png" in capsys.readouterr().out


def test_own_conversations_without_checkable_answers_go_all_the_way(online, mine, capsys):
    own = [option.replace("rl.reward=length", "preference.max_steps=2") for option in SMALL]

    assert main(["all", "--data", str(mine), *own, "--out", "run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    report = json.loads(Path("run/report.json").read_text())
    assert report["base"]["accuracy"] is None
    assert report["note"] and " ".join(report["note"].split()) in out


def test_a_checkpoint_is_deployed_compared_and_rolled_back(
    online, small, course_model, tmp_path, capsys
):
    main(["sft", *small, "--out", "run"])
    saved = json.loads(Path("run/checkpoints.jsonl").read_text().splitlines()[-1])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is 1 + 2?", "answer": "3"}\n')
    ship = ["deploy", "--model", str(course_model), "--out", "deploys/mine"]
    capsys.readouterr()

    assert main([*ship, "--checkpoint", saved["state_path"]]) == 0
    assert "posttrain serve deploys/mine" in capsys.readouterr().out
    assert main([*ship, "--checkpoint", saved["sampler_path"], "--set", "gpu=cpu"]) == 0
    again = [*ship, "--checkpoint", saved["state_path"], "--upload", "ada/sums", "--dry-run"]
    assert main(again) == 0  # v1 once more, which is finished already
    out = capsys.readouterr().out
    assert "v1 was finished already" in out and "Would upload to ada/sums (private)" in out
    assert main([*ship, "--checkpoint", saved["sampler_path"], "--set", "gpu=cpu"]) == 0
    assert main(["rollback", "deploys/mine"]) == 0
    assert capsys.readouterr().out.strip().endswith("v1")

    options = ["--prompts", str(prompts), "--max-tokens", "4", "--out", "found.json"]
    assert main(["compare", "base", "deploys/mine", *options]) == 0
    assert re.search(r"B wins \d+ % \(\d+-\d+ %\): \d won", capsys.readouterr().out)
    assert json.loads(Path("found.json").read_text())["rows"][0]["prompt"] == "What is 1 + 2?"


def test_a_finished_run_resumed_changes_nothing(online, small, capsys):
    main(["all", *small, "--out", "run"])
    before = Path("run/metrics.jsonl").read_bytes()

    assert main(["all", "--resume", "run"]) == 0
    assert Path("run/metrics.jsonl").read_bytes() == before


def test_a_run_stopped_with_ctrl_c_says_how_to_go_on(online, small, monkeypatch, capsys):
    def interrupted(service, config, out, on_step, **options):
        on_step(1, 2, {"phase": "sft", "train/nll": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setattr("course_lib.pipeline.run_all", interrupted)

    assert main(["all", *small, "--out", "my run"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    how = "go on with: posttrain all --resume 'my run' (no checkpoint was saved yet)"
    assert last == f"stopped; {how}"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CourseError("my_reward.py:4", "failed", "mend it"), "my_reward.py:4: failed; mend it"),
        (GONE, "http://here:1: does not answer any more; is the server running?"),
    ],
)
def test_a_run_that_fails_after_a_checkpoint_says_how_to_go_on(
    online, small, monkeypatch, capsys, error, said
):
    def failing(service, config, out, on_step, **options):
        service.url = "http://here:1"
        CheckpointLog(out).append(Checkpoint("rl", 5, "tinker://r/weights/a", "tinker://r/s/a"))
        raise error

    monkeypatch.setattr("course_lib.pipeline.run_all", failing)
    assert main(["all", *small, "--out", "run"]) == 1
    how = "go on with: posttrain all --resume run (after rl step 5)"
    assert capsys.readouterr().err.splitlines()[-2:] == [said, how]


def test_ctrl_c_before_a_run_begins_says_so(online, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("course_lib.run_data.load_run_data", interrupted)

    assert main(["sft", "--out", "run"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"
    assert not Path("run").exists()


def test_rl_resumed_before_its_first_checkpoint_begins_where_it_began(
    online, small, monkeypatch, capsys
):
    main(["sft", *small, "--out", "start"])
    (start,) = re.findall(r"tinker://\S+/weights/sft-\S+", capsys.readouterr().out)[:1]
    began = []

    def interrupted(service, config, out, sft_checkpoint, *rest, **options):
        began.append(sft_checkpoint)
        raise KeyboardInterrupt

    monkeypatch.setattr("course_lib.pipeline.run_rl", interrupted)
    main(["rl", *small, "--sft-checkpoint", start, "--out", "run"])
    main(["rl", "--resume", "run"])
    assert began == [start, start]

    capsys.readouterr()
    assert main(["rl", "--resume", "run", "--sft-checkpoint", start + "x"]) == 1
    assert f"began with {start}" in capsys.readouterr().err
    assert main(["all", "--resume", "run"]) == 1
    told = "run: was made by posttrain rl, not by all; go on with: posttrain rl --resume run"
    assert capsys.readouterr().err.splitlines()[-1] == told


def test_two_processes_do_not_train_in_one_folder(online, small, monkeypatch, capsys):
    from filelock import FileLock

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("course_lib.pipeline.run_sft", interrupted)
    main(["sft", *small, "--out", "run"])
    with FileLock("run/.lock"):
        assert main(["sft", "--resume", "run"]) == 1
    assert "run: another process is training in it" in capsys.readouterr().err


def test_a_store_that_was_moved_is_named_when_resuming(online, small, monkeypatch, capsys):
    stores = []

    def interrupted(service, config, *_, **__):
        stores.append(config.store)
        raise KeyboardInterrupt

    monkeypatch.setattr("course_lib.pipeline.run_sft", interrupted)
    main(["sft", *small, "--out", "run"])
    main(["sft", "--resume", "run", "--store", "moved"])
    main(["sft", "--resume", "run"])
    assert stores[1:] == ["moved", "moved"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_ends_at_once_with_its_code(sent, tmp_path):
    """The process is gone with its threads; nothing is taken apart under them."""
    out = tmp_path / "run"
    command = [sys.executable, "-c", POSTTRAIN, "sft", "--config", "tiny"]
    command += ["--set", "sft.max_steps=5000", "--set", "sft.epochs=100", "--out", str(out)]
    command += ["--store", str(tmp_path / "store")]
    with started(command) as process:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(sent)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("stopped; go on with: posttrain sft --resume ")
    assert "Traceback" not in said


def test_ctrl_c_before_anything_is_imported_ends_it_without_a_traceback():
    at_the_import = """
import os, signal, sys, time
class Pressed:
    def find_spec(self, name, *_):
        if name == "course_lib.cli":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
sys.meta_path.insert(0, Pressed())
"""
    with started([sys.executable, "-c", at_the_import + POSTTRAIN, "--help"]) as process:
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (-signal.SIGINT, "")


POSTTRAIN = "from course_lib.command import main; main()"  # what the script does


def started(command: list[str]) -> subprocess.Popen[str]:
    """In the background of a shell Ctrl-C is ignored, and whoever is started there inherits it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def test_progress_is_on_stderr_and_names_step_and_loss(online, small, capsys):
    main(["sft", *small, "--out", "run"])
    shown = capsys.readouterr().err.splitlines()

    assert re.fullmatch(r"SFT 2/2 loss \d\.\d{3}", shown[-1])


def test_without_a_terminal_progress_is_told_at_tenths_at_the_end_and_every_ten_seconds(
    monkeypatch,
):
    """Only every tenth of the way was told: minutes apart in a long run, and never its end."""
    clock, log = [0.0], io.StringIO()
    clocks = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr("course_lib.cli.bars.time", clocks)
    bars = Bars(Console(file=log, width=80))
    for step in range(1, 26):
        clock[0] += 12.0 if step in (7, 13) else 1.0
        bars.on_progress("merge", step, 25)
    told = [int(line.split()[1].split("/")[0]) for line in log.getvalue().splitlines()]
    assert told == sorted({*range(2, 26, 2), 7, 13, 25})


def test_chat_remembers_what_was_said(online, monkeypatch, capsys):
    lines = iter(["first", "second", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))

    assert main(["chat", "--max-tokens", "4", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 3  # where the calls go, then two answers


def test_a_proxy_in_the_environment_does_not_swallow_calls_to_this_machine(
    online, monkeypatch, capsys
):
    # Once ServiceClient hung without a word here: httpx sent loopback calls to the proxy.
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    began = time.monotonic()

    assert main(["chat", "--prompt", "hello", "--max-tokens", "2"]) == 0
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("extra", "said"),
    [(["eval_path=none"], True), (["eval_path=none", "rl.environment=sums"], False), ([], False)],
)
def test_a_run_that_is_judged_on_what_it_trained_on_says_so(
    online, small, mine, monkeypatch, capsys, extra, said
):
    """The table spoke of held-out problems."""
    monkeypatch.setattr("course_lib.pipeline.run_all", lambda *_, **__: {})
    monkeypatch.setattr("course_lib.cli.tables.print_report", lambda *_: None)
    settings = ["rl.environment=auto", *extra]
    assert main(["all", *small, *(part for each in settings for part in ("--set", each))]) == 0
    assert ("no conversation is held out" in capsys.readouterr().err) is said


# --------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 1 or 2, nothing half-written


def no_tokenizer(course_model: Path, tmp_path: Path) -> str:
    folder = tmp_path / "no-tokenizer"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((course_model / name).read_bytes())
    return str(folder)


BAD_INPUT: dict[str, tuple[list[str], int, str]] = {
    "missing file": (["all", "--data", "missing.jsonl"], 1, r"^missing\.jsonl: No such file"),
    "missing file to validate": (["validate", "missing.jsonl"], 1, r"^missing\.jsonl: No such"),
    "address to validate": (["validate", "s3://b/a.jsonl"], 1, r"^s3://b/a\.jsonl: is an address"),
    "unknown preset": (["all", "--config", "qick"], 1, r"'qick'.*did you mean quick"),
    "missing preset file": (["all", "--config", "my.toml"], 1, r"^my\.toml: No such file"),
    "unknown field": (["sft", "--set", "stpes=3"], 1, r"'stpes' is unknown; did you mean .*steps"),
    "field without value": (["sft", "--set", "steps"], 1, r"'steps' has no '='"),
    "value of the wrong type": (["sft", "--set", "epochs=two"], 1, r"epochs.*'two'"),
    "value out of range": (["sft", "--set", "epochs=-1"], 1, r"epochs: -1 is out of range"),
    "no text to chat about": (["chat", "--prompt", "\udcff"], 1, r"^--prompt: it is not UTF-8"),
    "no temperature": (["chat", "--temperature", "nan"], 1, r"^--temperature: nan is out of range"),
    "temperature below 0": (["chat", "--temperature", "-1"], 1, r"^--temperature: -1.0 is out of"),
    "nothing to chat about": (["chat", "--prompt", " "], 1, r"^--prompt: nothing is asked"),
    "negative seed": (["all", "--seed", "-1"], 1, r"seed: -1 is out of range"),
    "run to resume is not there": (["all", "--resume", "nowhere"], 1, r"^nowhere: holds no run"),
    "run to diagnose is not there": (["diagnose", "nowhere"], 1, r"^nowhere: is no folder; give t"),
    "file to diagnose": (["diagnose", __file__], 1, r"test_cli\.py: is no folder; give the folder"),
    "folder without a run": (["diagnose", "."], 1, r"^\.: holds no RL steps; give the folder of "),
    "dry run of no upload": (["deploy", "--checkpoint", "tinker://r/weights/n", "--dry-run"], 1,
                             r"^--dry-run: it lists .*no repository is named; add --upload "),
    "resume with other settings": (["all", "--resume", "x", "--seed", "1"], 1, r"^--resume: "),
    "no key for hosted": (["all", "--backend", "hosted", "--yes"], 1, r"^TINKER_API_KEY: .*not se"),
    "no such back end": (["all", "--backend", "cloud"], 1, r"'cloud' is not a back end"),
    "engine open to others": (["engine", "--host", "0.0.0.0"], 1, r"^--host 0\.0\.0\.0: .*--keys"),
    "alias without a folder": (["engine", "--alias", "x"], 1, r"^--alias: 'x' is no alias"),
    "no length": (["validate", "x", "--max-length", "0"], 2, r"--max-length.*equal to 1;"),
    "unknown command": (["trian"], 2, r"^posttrain: No such command 'trian'.*--help"),
    "unknown option": (["all", "--sed", "1"], 2, r"^posttrain all: No such option: --sed"),
    "option without a number": (["all", "--seed", "x"], 2, r"^posttrain all: .*--seed.*integer"),
}  # fmt: skip


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the one line on stderr; nothing is left in the working folder."""
    code = main(arguments)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert files() == []
    return code, lines[0]


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line_and_leaves_nothing(case: str, capsys):
    arguments, code, line = BAD_INPUT[case]
    found = refused(arguments, capsys)

    assert found[0] == code
    assert re.search(line, found[1]), found[1]


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "rl",
            "--sft-checkpoint",
            "tinker://0123456789ab:train:0/weights/gone",
            "--config",
            "tiny",
        ],
        ["chat", "tinker://0123456789ab:train:0/sampler_weights/gone", "--prompt", "hello"],
        ["chat", "runs/quick", "--prompt", "hello"],
    ],
)
def test_a_checkpoint_that_is_not_there_is_named(online, capsys, arguments):
    code, line = refused(arguments, capsys)

    assert code == 1 and ("gone" in line or "runs/quick: is no checkpoint" in line)


def test_a_model_folder_without_a_tokenizer_is_named(course_model, tmp_path, capsys):
    folder = no_tokenizer(course_model, tmp_path)
    code, line = refused(["all", "--backend", "embedded", "--model", folder], capsys)

    assert code == 1 and line.startswith(f"{folder}: ") and "tokenizer" in line


def test_an_address_where_nobody_answers_is_given_up_within_ten_seconds(monkeypatch, capsys):
    # The SDK alone tries again for minutes, silently.
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TINKER_API_KEY", "tml-test")
    began = time.monotonic()
    code, line = refused(["all", "--config", "tiny"], capsys)

    assert code == 1 and line.startswith("http://127.0.0.1:9: no Tinker server can be reached")
    assert time.monotonic() - began < 10


def test_a_hosted_run_is_not_started_without_consent(monkeypatch, capsys):
    monkeypatch.setenv("TINKER_API_KEY", "tml-never-shown")
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    code = main(["all", "--backend", "hosted"])
    captured = capsys.readouterr()

    assert code == 1
    assert re.search(r"Estimate: about [\d,]+ tokens trained on", captured.out)
    assert "--yes" in captured.err and len(captured.err.splitlines()) == 1
    assert "tml-never-shown" not in captured.out + captured.err


def test_a_row_over_the_length_limit_is_named_by_validate(course_model, tmp_path, capsys):
    file = tmp_path / "long.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 2000}]
    file.write_text('{"messages": ' + json.dumps(turns) + "}\n")

    assert main(["validate", str(file), "--model", str(course_model)]) == 1
    assert re.search(rf"{file}:1: \d+ tokens, max_length is 1024;", capsys.readouterr().out)


def test_a_row_over_the_models_context_is_refused_in_training(online, tmp_path, capsys):
    file = tmp_path / "long.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 2000}]
    file.write_text('{"messages": ' + json.dumps(turns) + "}\n")
    options = ["--data", str(file), "--set", "max_length=4096", "--set", "eval_path=none"]
    code, line = refused(["sft", *options], capsys)

    assert code == 1 and "context" in line and "1024" in line


def test_a_setting_that_the_rl_loss_lacks_is_told_before_sft(embedded, small, capsys):
    code, line = refused(["all", *embedded, *small, "--set", "loss_fn_config={beta=1}"], capsys)

    assert code == 1
    assert line == "loss_fn_config: 'beta' is unknown; this loss takes no settings"


def test_a_full_disk_while_saving_is_one_line_and_the_run_can_go_on(
    embedded, small, tmp_path, monkeypatch, capsys
):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("safetensors.torch.save_file", full)
        assert main(["sft", *small, *embedded, "--out", "run"]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("SFT ")]

    assert len(lines) == 1 and "No space left on device" in lines[0] and "--resume" in lines[0]
    assert not list((tmp_path / "embedded-store").rglob("*.safetensors"))
    assert main(["sft", "--resume", "run"]) == 0


def test_a_disk_too_full_for_figures_costs_no_results(online, small, monkeypatch, capsys):
    """`this machine: No space left on device`, and neither the table nor a way to go on."""

    def full(path: Path, mode: str):
        if path.name.endswith(".tmp") and ".png" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(path, mode)

    with monkeypatch.context() as disk:
        disk.setattr("course_lib.files.open", full, raising=False)
        assert main(["all", *small, "--out", "run"]) == 1
    told = capsys.readouterr()

    place, again = told.err.splitlines()[-2:]
    assert re.match(r"run/\w+\.png: No space left on device; free what it needs", place)
    assert again.endswith(command := "posttrain all --resume run")
    assert re.search(r"GRPO +\d+ % +\d+-\d+ %", told.out)
    assert not list(Path("run").glob("*.png"))
    assert main([*command.split()[1:]]) == 0
    assert len(list(Path("run").glob("*.png"))) == 3


# --------------------------------------------------------------------------------------------------
# Looking, without changing


def test_every_planted_fault_is_named_at_its_line(course_model, capsys):
    broken = str(PROJECT / "data" / "broken.jsonl")
    before = Path(broken).read_bytes()

    assert main(["validate", broken, "--model", str(course_model)]) == 1
    assert len(re.findall(r"^.*broken\.jsonl:\d+: .+; .+$", capsys.readouterr().out, re.M)) > 20
    assert Path(broken).read_bytes() == before


def test_the_shipped_conversations_are_clean(course_model, capsys):
    assert main(["validate", "data/conversations.jsonl", "--model", str(course_model)]) == 0
    assert "0 errors, 0 warnings, fit to train on" in capsys.readouterr().out


def test_doctor_tells_where_calls_go_and_never_shows_the_key(online, server, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out

    assert "tinker 0.38" in out and "course/base" in out
    assert f"{server['TINKER_BASE_URL']}, because TINKER_BASE_URL is set" in out
    assert server["TINKER_API_KEY"] not in out


def test_doctor_measures_what_a_preset_takes(embedded, monkeypatch, capsys):
    monkeypatch.setattr("course_lib.doctor.PRESETS", ("tiny",))  # the others take minutes

    assert main(["doctor", *embedded]) == 0
    assert re.search(r"^  tiny +\d+ (s|min) +SFT step \d", capsys.readouterr().out, re.M)


def test_doctor_says_that_a_store_cannot_be_written_or_has_little_room(tmp_path, monkeypatch):
    """It said "0 GB free" of either, and went on as if all were well."""
    for method, value, finding in (
        ("os.access", False, "which cannot be written; name another folder"),
        ("shutil.disk_usage", SimpleNamespace(free=4e8), "0.4 GB free, which is little"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(f"course_lib.doctor.{method}", lambda *_, value=value: value)
            assert finding in _room(tmp_path / "runs" / "store")


def test_diagnose_names_what_is_wrong_and_accuses_no_healthy_run(tmp_path, capsys):
    groups = {"env/groups": 16, "reward/std_in_group": 0.0, "env/worked_share": 0.0}
    for name, dead, reward in (("stuck", 16, 0.0), ("well", 2, 0.9)):
        rows = [
            {"phase": "rl", "step": step, "reward/total": reward, "env/dead_groups": dead}
            | {"env/correct": reward, "optim/lr": 4e-4, "optim/entropy": 0.5} | groups
            for step in range(1, 41)
        ]  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    assert main(["diagnose", str(tmp_path / "stuck")]) == 0
    assert capsys.readouterr().out.startswith("dead_groups: from the start 100% of the groups")
    assert main(["diagnose", str(tmp_path / "well")]) == 0
    assert capsys.readouterr().out == "40 RL steps, nothing found that is wrong\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"phase": "rl", "step": 1, "reward/total": "x"}', "odd: holds no RL steps"),
        ('{"phase": "rl", "step": [1]}', "odd/metrics.jsonl:1: not a JSON object with a step"),
    ],
)
def test_diagnose_of_rows_that_nobody_measured_is_one_line(tmp_path, capsys, row, said):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "metrics.jsonl").write_text(row + "\n")
    code, line = refused(["diagnose", str(tmp_path / "odd")], capsys)

    assert code == 1 and said in line


def commands() -> list[str]:
    from course_lib.cli import app

    return [command.name for command in app.registered_commands if command.name]


@pytest.mark.parametrize("command", commands())
def test_each_commands_help_holds_an_example_that_parses(command: str, capsys):
    from typer.main import get_command

    from course_lib.cli import app

    assert main([command, "--help"]) == 0
    found = re.findall(rf"^ +posttrain ({command}\b.*)$", capsys.readouterr().out, re.M)
    assert found
    for example in found:
        name, *rest = example.replace('"', "").split()
        get_command(app).commands[name].make_context(name, rest)


def test_help_answers_at_once():
    """0.25 s measured on two cores; five times that is a heavy import at the top of a module."""
    command = [sys.executable, "-X", "importtime", "-m", "course_lib.cli", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)

    for heavy in ("torch", "transformers", "tinker", "numpy", "matplotlib"):
        assert not re.search(rf"\| +{heavy}$", shown.stderr, re.M), heavy
    assert "Commands:" in shown.stdout


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 0
    assert "posttrain all --config tiny" in capsys.readouterr().out


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    """One line is for what a person can mend; a bug must not hide behind it."""

    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("course_lib.pipeline.saved_config", broken)
    with pytest.raises(ZeroDivisionError):
        main(["all", "--resume", "x"])


# --------------------------------------------------------------------------------------------------
# A broken .env, a conversation that is too long


def test_env_file_that_cannot_be_read_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("COURSE_ENV_FILE", "../my.env")
    Path("../my.env").write_bytes("COURSE_BACKEND=hosted\n".encode("utf-16"))
    code, line = refused(["chat", "--prompt", "hello"], capsys)

    assert (code, line) == (1, "../my.env:1: it is not UTF-8 text; save the file as UTF-8")


def test_chat_prompt_that_is_too_long_gets_a_remedy(online, capsys):
    code, line = refused(["chat", "--prompt", "a" * 6000], capsys)

    assert code == 1
    assert re.fullmatch(
        r"base: your message is too long \(.*context window: \d+ \+ 128 > 1024\); "
        r"write less, or choose a smaller --max-tokens than 128",
        line,
    )


def test_chat_leaves_out_the_oldest_messages_and_says_so_once(online, monkeypatch, capsys):
    """The conversation only grew, and the first request over the context window ended it."""
    lines = iter(["a" * 400, "b" * 400, "c" * 400, "d" * 400, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))

    assert main(["chat", "--max-tokens", "4", "--temperature", "0"]) == 0
    out = capsys.readouterr().out
    assert out.count("(base: too long a conversation, its oldest messages are left out)") == 1


def test_chat_goes_on_after_a_message_that_is_too_long(online, monkeypatch, capsys):
    """It ended the conversation."""
    lines = iter(["a" * 6000, "hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))

    assert main(["chat", "--max-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("base: your message is too long")
    assert len(captured.out.splitlines()) >= 2  # where the calls go, then the second answer


def test_chat_goes_on_after_a_line_that_is_not_utf_8(online, monkeypatch, capsys):
    """TypeError from the tokenizer, or UnicodeDecodeError, and the conversation was gone."""
    typed = io.BytesIO(b"\xff\xfe bad\nhello\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, encoding="utf-8"))

    assert main(["chat", "--max-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("your message: it is not UTF-8 text")
    assert captured.out.count("> ") == 3  # the bad line, hello, the end


def test_chat_with_a_closed_standard_input_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    code, line = refused(["chat"], capsys)

    assert (code, line) == (1, "standard input: it is closed; ask with --prompt instead")


class ShortWindow:
    """A sampling client over the byte tokenizer: it refuses what the engine would refuse."""

    def __init__(self, tokenizer, window: int) -> None:
        self.tokenizer, self.window = tokenizer, window
        self.prompts: list[str] = []

    def sample(self, prompt, num_samples, sampling_params):
        self.prompts.append(self.tokenizer.decode(prompt.to_ints()))
        self.length = len(prompt.to_ints())
        return self

    def result(self):
        if self.length > self.window:
            raise ValueError(f"exceeds the model's context window: {self.length} > {self.window}")
        return SimpleNamespace(sequences=[SimpleNamespace(tokens=self.tokenizer.encode("yes"))])


@pytest.fixture
def speaker():
    from chat_templates import COURSE, byte_tokenizer

    from course_lib.chat import Speaker
    from course_lib.conversations import Message

    tokenizer = byte_tokenizer(COURSE)
    rules = Message("system", "Be kind.")
    return Speaker("base", ShortWindow(tokenizer, 90), tokenizer, messages=[rules])


def test_chat_keeps_the_system_message_and_the_newest_exchanges(speaker):
    for text in ("first " * 4, "second " * 4, "third " * 4):
        assert speaker.say(text) == "yes"

    said = [message.content.split()[0] for message in speaker.messages]
    assert said == ["Be", "second", "yes", "third", "yes"]
    assert "Be kind." in speaker.client.prompts[-1] and "first" not in speaker.client.prompts[-1]


def test_chat_message_that_is_too_long_is_not_remembered(speaker):
    from course_lib.chat import MessageTooLong

    speaker.say("hello")
    before = list(speaker.messages)
    with pytest.raises(MessageTooLong, match=r"> 90\); write less, or choose a smaller --max-tok"):
        speaker.say("a" * 200)

    assert speaker.messages == before and not speaker.has_forgotten
    assert speaker.say("hello again") == "yes"


def test_chat_refusals_of_another_kind_pass_unchanged(speaker, monkeypatch):
    def refuse():
        raise ValueError("max_tokens is 0; give at least 1")

    monkeypatch.setattr(speaker.client, "result", refuse)
    with pytest.raises(ValueError, match="give at least 1"):
        speaker.say("hello")
    assert len(speaker.client.prompts) == 1
