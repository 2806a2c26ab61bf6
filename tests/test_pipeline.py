"""The whole job through the real SDK and the embedded engine, on a tiny random model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from course_lib import pipeline
from course_lib.checkpoints import Checkpoint, CheckpointLog, StopTraining
from course_lib.client import connect
from course_lib.config import load_config
from course_lib.environments import sums_environment
from course_lib.errors import CourseError
from course_lib.metrics import read_metrics
from course_lib.pipeline import Command, run_all, run_rl, run_sft, saved_config, start_run
from course_lib.run_data import RunData, load_run_data
from course_lib.stages import seconds_so_far

SMALL = [
    "sft.max_steps=6",
    "sft.save_every=2",
    "sft.eval_every=0",
    "rl.steps=5",
    "rl.save_every=2",
    "rl.group_size=4",
    "rl.prompts_per_step=3",
    "rl.max_tokens=12",
    "rl.reward=length+0.1*format",
    "eval_problems=8",
]


@pytest.fixture(scope="module")
def heldout(tmp_path_factory) -> Path:
    """A few held-out conversations: 300 of them would be most of a tiny run's time."""
    file = tmp_path_factory.mktemp("data") / "heldout.jsonl"
    shipped = Path(__file__).parent.parent / "data" / "heldout.jsonl"
    file.write_text("".join(shipped.read_text().splitlines(keepends=True)[:8]))
    return file


@pytest.fixture(scope="module")
def service(course_model, tmp_path_factory):
    opened = connect(
        "embedded", model=str(course_model), store=tmp_path_factory.mktemp("store"), quiet=True
    )
    yield opened
    opened.engine.stop()


@pytest.fixture
def config(heldout):
    return load_config("tiny", [*SMALL, f"sft.eval_path={heldout}"])


def test_a_run_leaves_a_report_metrics_checkpoints_and_samples(service, config, tmp_path):
    seen = []
    report = run_all(
        service, config, tmp_path, lambda step, total, m: seen.append((m["phase"], step))
    )
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (report["preset"], report["seed"], report["note"]) == ("tiny", 0, "")
    assert report["diagnosis"] == []  # five steps are too few to accuse anybody
    rows = read_metrics(tmp_path / "metrics.jsonl")
    for stage in ("base", "sft", "rl"):
        found = report[stage]
        low, high = found["interval"]
        assert 0 <= low <= found["accuracy"] <= high <= 1
        assert {"mean_reward", "worked_share", "greedy", "heldout_nll"} <= set(found)
        assert found["greedy"]["accuracy"] is not None
        trained = [row["time/total"] for row in rows if row["phase"] == stage]
        assert found["training_s"] == pytest.approx(sum(trained))
        assert found["seconds"] == pytest.approx(found["training_s"] + found["evaluation_s"])
    assert report["seconds"] >= sum(report[stage]["seconds"] for stage in ("base", "sft", "rl"))
    assert report["sft"]["heldout_nll"] < report["base"]["heldout_nll"]
    last = {phase: CheckpointLog(tmp_path).last(phase) for phase in ("sft", "rl")}
    assert report["checkpoints"] == {
        name + suffix: getattr(point, part)
        for name, point in last.items()
        for suffix, part in (("", "state_path"), ("_sampler", "sampler_path"))
    }
    assert {phase for phase, _ in seen} == {"eval", "sft", "rl"}
    assert [step for phase, step in seen if phase == "eval"] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["phase"] == "rl"] == [1, 2, 3, 4, 5]
    assert max(row.get("ratio/max_deviation", 0) for row in rows) < 1e-3
    samples = list(map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines()))
    evaluated = json.loads((tmp_path / "evaluations" / "rl.json").read_text())["sampled"]
    assert set(samples[0]) == {"prompt", "answer", "base", "sft", "rl"}
    assert [(each["prompt"], each["answer"], each["rl"]) for each in samples] == [
        (each["prompt"], each["answer"], each["completions"][0]) for each in evaluated
    ]


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from course_lib.client import connect
from course_lib.config import load_config
from course_lib.pipeline import run_all

base, store, out, phase, step, *overrides = sys.argv[1:]
def kill(now, total, metrics):
    if (metrics["phase"], now) == (phase, int(step)):
        os.kill(os.getpid(), signal.SIGKILL)
service = connect("embedded", model=base, store=store)
run_all(service, load_config("tiny", overrides), Path(out), kill)
"""


RESUMABLE = [
    *SMALL,
    "rl.deterministic=true",
    "rl.kl_penalty=0.01",
    "rl.prompts_per_step=2",
    "rl.group_size=3",
    "eval_problems=2",
]


@pytest.fixture(scope="module")
def uninterrupted(service, heldout, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_all(service, load_config("tiny", [*RESUMABLE, f"sft.eval_path={heldout}"]), out)
    return read_metrics(out / "metrics.jsonl")


@pytest.mark.parametrize(("phase", "step"), [("sft", 5), ("rl", 3)])
def test_a_run_killed_with_kill_9_goes_on_to_the_same_metrics(
    service, course_model, heldout, uninterrupted, tmp_path, phase, step
):
    store, out = str(service.engine.rooms.store.root), tmp_path / "killed"
    command = [
        sys.executable,
        "-c",
        KILLED_RUN,
        str(course_model),
        store,
        str(out),
        phase,
        str(step),
    ]
    killed = subprocess.run(
        [*command, *RESUMABLE, f"sft.eval_path={heldout}"], timeout=100, env=dict(os.environ)
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "report.json").exists()
    run_all(service, saved_config(out), out, resume=True)
    rows = read_metrics(out / "metrics.jsonl")
    assert [(row["phase"], row["step"]) for row in rows] == [
        (row["phase"], row["step"]) for row in uninterrupted
    ]
    for row, other in zip(rows, uninterrupted, strict=True):
        for name, value in other.items():
            if not name.startswith("time/"):
                assert row[name] == pytest.approx(value, abs=1e-5), (name, row["step"])


def test_a_run_stopped_by_its_hook_has_no_report_but_can_go_on(service, config, tmp_path):
    for phase, at in (("sft", 3), ("rl", 2)):

        def stop(step, total, metrics, phase=phase, at=at):
            if (metrics["phase"], step) == (phase, at):
                raise StopTraining

        found = run_all(service, config, tmp_path, stop, resume=phase == "rl")
        last = CheckpointLog(tmp_path).last(phase)
        assert found == {"stopped": phase, "checkpoints": {phase: last.state_path}}
        assert last.step == at and not (tmp_path / "report.json").exists()
    report = run_all(service, config, tmp_path, resume=True)
    assert report["rl"]["accuracy"] is not None


def test_each_phase_goes_on_from_its_own_checkpoint_or_begins_where_it_was_told(
    tmp_path, monkeypatch
):
    asked = []

    def client(name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, get_tokenizer=lambda: f"{name}'s tokenizer")

    def fresh(model: str, **options: object) -> SimpleNamespace:
        asked.append((model, options))
        return SimpleNamespace(result=lambda: client("fresh"))

    def loaded(service, checkpoint, **options: object) -> SimpleNamespace:
        asked.append((checkpoint, options))
        return client(str(getattr(checkpoint, "step", checkpoint)))

    monkeypatch.setattr(pipeline, "training_client_from", loaded)
    monkeypatch.setattr(pipeline, "run_reward", lambda *arguments: arguments)
    for name in ("train_sft", "train_grpo"):
        monkeypatch.setattr(pipeline, name, lambda client, *given, **named: (client, given, named))
    service = SimpleNamespace(backend="embedded", base_model="m", create_lora_training_client=fresh)
    config = load_config("tiny", ["seed=3", "sft.lora_rank=4", "rl.lora_rank=2"])
    data, log = RunData(["a"], ["b"], sums_environment()), CheckpointLog(tmp_path)
    named = {"out": tmp_path, "seed": 3, "resume": None, "on_step": print}

    def sft(given: object = None) -> str:
        used, given, options = run_sft(service, config, tmp_path, print, data=data, client=given)
        assert given == (["a"], config.sft)
        tokenizer = f"{used.name}'s tokenizer"
        assert options == {**named, "tokenizer": tokenizer, "heldout": ["b"]}
        return used.name

    def rl(start: str | None) -> str:
        used, given, options = run_rl(service, config, tmp_path, start, print, data=data)
        assert given == (data.environment, config.rl)
        tokenizer = f"{used.name}'s tokenizer"
        assert options == {**named, "tokenizer": tokenizer, "reward": (config, data, None)}
        return used.name

    assert (sft(), sft(client("given")), rl(None), rl("start")) == (
        "fresh", "given", "fresh", "start",
    )  # fmt: skip
    points = {phase: Checkpoint(phase, step, "a", "b") for phase, step in (("sft", 5), ("rl", 7))}
    for point in points.values():
        log.append(point)
    named["resume"] = points["sft"]
    assert sft(client("given")) == "5"
    named["resume"] = points["rl"]
    assert rl("start") == "7"
    assert asked == [
        ("m", {"rank": 4, "seed": 3}),
        ("m", {"rank": 2, "seed": 3}),
        ("start", {"optimizer": False}),  # SFT's momentum points where SFT was going
        (points["sft"], {}),
        ("start", {"optimizer": False}),
        (points["rl"], {}),
    ]


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What every file holds, and when it was written."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def test_a_folder_holds_one_run(config, tmp_path):
    start_run(config, tmp_path, Command("all"))
    with pytest.raises(CourseError, match="holds a run already"):
        start_run(config, tmp_path, Command("all"))
    with pytest.raises(CourseError, match="was made with other settings"):
        start_run(load_config("tiny", ["seed=1"]), tmp_path, Command("all"), resume=True)
    (tmp_path / "command.json").write_text("{")
    with pytest.raises(CourseError, match=r"command.json: cannot be read; write .*name.*sft"):
        start_run(config, tmp_path, Command("all"), resume=True)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CourseError, match="holds no run"):
        saved_config(tmp_path)
    with pytest.raises(CourseError, match="holds no run"):
        saved_config(tmp_path / "nowhere")


def test_own_conversations_are_judged_by_a_tournament(service, tmp_path):
    file, out = tmp_path / "mine.jsonl", tmp_path / "run"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Greet guest {n}."},
                {"role": "assistant", "content": f"Hello, guest {n}!"},
            ]
        }
        for n in range(40)
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    small = [each for each in SMALL if not each.startswith("rl.reward")]
    config = load_config(
        "tiny", [*small, f"sft.data_path={file}", "rl.steps=2", "preference.max_steps=3"]
    )
    report = run_all(service, config, out)
    assert report["rl"]["accuracy"] is None and "no accuracy" in report["note"]
    assert 0 <= report["rl"]["win_rate_vs_sft"] <= 1
    assert report["sft"]["heldout_nll"] < report["base"]["heldout_nll"]
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows if row["phase"] == "preference"] == [1, 2, 3]
    paid = [row["reward/total"] for row in rows if row["phase"] == "rl"]
    assert paid == pytest.approx([0.5, 0.5])  # somebody wins every duel
    finished = files_of(out)
    assert run_all(service, config, out, resume=True) == report
    assert files_of(out) == finished  # it took other seconds, and everything was written anew
    (out / "report.json").unlink()
    assert run_all(service, config, out, resume=True)["rl"] == report["rl"]  # the judge is kept
    spent = sum(
        row["time/total"] for row in read_metrics(out / "metrics.jsonl")
    )  # the judge's, too
    evaluated = sum(report[stage]["evaluation_s"] for stage in ("base", "sft", "rl"))
    assert seconds_so_far(out) == pytest.approx(spent + evaluated)


def test_own_conversations_are_held_out_by_content(tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{n}"},
                {"role": "assistant", "content": f"a{n}"},
            ]
        }
        for n in range(60)
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows + rows[:20]))
    data = load_run_data(load_config("tiny", [f"sft.data_path={file}"]))
    train = {conversation.messages for conversation in data.train}
    held = {conversation.messages for conversation in data.heldout}
    assert held and not train & held and len(train | held) == 60
    assert not data.environment.checkable

    texts = {each.messages[0].content for each in data.heldout}
    alone = [row for row in rows if row["messages"][0]["content"] in texts]
    file.write_text("\n".join(map(json.dumps, alone)))
    for environment in ("auto", "sums"):  # it was "epoch_batches: 0 rows in batches of 8"
        asked = [f"sft.data_path={file}", f"rl.environment={environment}"]
        with pytest.raises(CourseError, match=r"mine.jsonl: every row stands aside for evaluation"):
            load_run_data(load_config("tiny", asked))


def test_the_problems_of_a_run_do_not_depend_on_where_it_is_started(tmp_path, monkeypatch):
    """Seeded by the file's path as found, a run resumed from another folder was asked others."""
    config = load_config("tiny", ["rl.environment=conversations"])
    here = load_run_data(config).environment.sample(4, 1)
    monkeypatch.chdir(tmp_path)
    there = load_run_data(config).environment.sample(4, 1)
    assert [each.messages for each in here] == [each.messages for each in there]


def test_held_out_conversations_come_from_a_dataset_or_from_jsonl(tmp_path):
    """Only JSONL was read: of a parquet file "NUL at byte 15; delete the NUL character"."""
    rows = [
        {"messages": [{"role": role, "content": f"{role} {n}"} for role in ("user", "assistant")]}
        for n in range(30)
    ]
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(rows))
    lines = "\n".join(map(json.dumps, rows[:3]))
    for name, text in (("held.json", json.dumps(rows[:3])), ("held.jsonl", lines)):
        (tmp_path / name).write_text(text)
        paths = [f"data_path={whole}", f"eval_path={tmp_path / name}"]
        data = load_run_data(load_config("tiny", ["dataset_type=huggingface", *paths]))
        assert (len(data.train), len(data.heldout)) == (30, 3)
