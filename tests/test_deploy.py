"""deploy() as a whole: with the real SDK and engine, and with a power cut at any moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tinker
import torch
from deploy_models import save_adapter, save_base
from download_double import FileServer, ServiceDouble
from filelock import FileLock
from loopback import serving
from own_engine import own_engine
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from course_lib import deploy as deploy_module
from course_lib.cli import main
from course_lib.config import DeployConfig
from course_lib.deploy import deploy
from course_lib.errors import CourseError
from course_lib.export import versions
from course_lib.serve import ServedModel

TRAINED = "tinker://run:train:0/weights/final"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("deploy") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_adapter(tmp_path_factory.mktemp("deploy") / "adapter", base)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


@pytest.fixture
def service(adapter: Path, base: Path):
    with serving(FileServer(adapter).app()) as url:
        yield ServiceDouble(url, adapter, "course/base", base)


# --- the real SDK, the real engine ----------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory):
    """A few steps of SFT on the embedded engine, saved both ways."""
    store = tmp_path_factory.mktemp("store")
    with own_engine(base, store) as service:
        client = service.create_lora_training_client(base_model=service.base_model, rank=8).result()
        tokens = client.get_tokenizer().encode("What is 23 + 45 + 61? The answer is 129.")
        inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
        read = tinker.ModelInput.from_ints(tokens[:-1])
        datum = tinker.Datum(model_input=read, loss_fn_inputs=inputs)
        for _ in range(4):
            client.forward_backward([datum], "cross_entropy").result()
            client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        state = client.save_state("final").result().path
        sampler = client.save_weights_for_sampler("final").result().path
        yield service, state, sampler


def greedy(service, checkpoint: str, prompt: list[int]) -> list[int]:
    sampling = service.create_sampling_client(model_path=checkpoint).result()
    params = tinker.SamplingParams(max_tokens=16, temperature=0.0, stop=[])
    result = sampling.sample(tinker.ModelInput.from_ints(prompt), 1, params).result()
    return list(result.sequences[0].tokens)


@pytest.mark.parametrize("kind", ["training", "sampler"])
def test_a_checkpoint_of_the_engine_becomes_a_model_that_answers_the_same(
    tmp_path, trained, base, kind
):
    service, state, sampler = trained
    checkpoint = state if kind == "training" else sampler
    done = deploy(service, checkpoint, tmp_path / "sums", runs=tmp_path)
    proof = done.record["verification"]
    assert proof["service_error_nats"] < 1e-4 and proof["error"] < 1e-3 < proof["effect"]
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    prompt = tokenizer.encode("What is 23 + 45")
    model = AutoModelForCausalLM.from_pretrained(done.model)
    ours = model.generate(
        torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None
    )
    assert ours[0, len(prompt) :].tolist() == greedy(service, sampler, prompt)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(done.adapter))
    ids = torch.tensor([prompt])
    with torch.no_grad():
        assert torch.allclose(peft(ids).logits, model(ids).logits, atol=1e-4)


def test_a_second_deploy_of_the_same_finds_the_finished_version(tmp_path, trained):
    service, state, _ = trained
    first = deploy(service, state, tmp_path / "sums", runs=tmp_path)
    second = deploy(service, state, tmp_path / "sums", runs=tmp_path)
    assert (first.reused, second.reused) == (False, True) and second.version == first.version
    assert deploy(service, state, tmp_path / "sums", DeployConfig(gpu="cpu")).version.name == "v2"


def test_the_engine_on_another_base_than_the_one_merged_into_is_refused(tmp_path, trained):
    service, state, _ = trained
    stale = save_base(tmp_path / "stale", seed=11)
    with pytest.raises(CourseError, match="differ from the service's by"):
        deploy(service, state, tmp_path / "sums", base=str(stale), runs=tmp_path)
    with pytest.raises(CourseError, match="was begun here and not finished"):
        versions.current_version(tmp_path / "sums")


# --- one step at a time ---------------------------------------------------------------------------


def test_a_finished_version_holds_everything_and_nothing_is_written_elsewhere(tmp_path, service):
    out = tmp_path / "place" / "sums"
    done = deploy(service, TRAINED, out, runs=tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place"]
    assert sorted(path.name for path in out.iterdir()) == [".work", "current.json", "v1"]
    assert sorted(path.name for path in (out / ".work").iterdir()) == ["lock"]
    assert {"adapter", "model", "deploy.json", "modal_app.py", "modal_client.py"} == {
        path.name for path in done.version.iterdir()
    }
    assert all(rule["kept"] for rule in done.record["serving_rules"])
    assert ServedModel.load(out).name == "sums"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_whoever_may_read_the_config_may_read_the_weights(tmp_path, service):
    """A container's user could not: safetensors writes for its owner only."""
    before = os.umask(0o022)
    try:
        done = deploy(service, TRAINED, tmp_path / "sums")
    finally:
        os.umask(before)
    for file in (path for path in done.version.rglob("*") if path.is_file()):
        assert file.stat().st_mode & 0o777 == 0o644, file


def test_the_card_tells_the_run_that_saved_the_checkpoint(tmp_path, service):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    stage = {"accuracy": 0.9, "interval": [0.8, 0.95], "worked_share": 0.5}
    report = {"checkpoints": {"rl": TRAINED}, "rl": stage, "sft": None, "base": None}
    (run / "report.json").write_text(json.dumps(report))
    done = deploy(service, TRAINED, tmp_path / "sums", runs=tmp_path / "runs")
    assert "| after GRPO | 90.0% |" in (done.model / "README.md").read_text()


def test_a_base_that_changed_since_is_merged_anew(tmp_path, service, base):
    first = deploy(service, TRAINED, tmp_path / "sums")
    weights = base / "model.safetensors"
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    second = deploy(service, TRAINED, tmp_path / "sums")
    assert (first.version.name, second.version.name, second.reused) == ("v1", "v2", False)


def test_a_model_that_fails_the_smoke_test_never_becomes_a_version(tmp_path, service, monkeypatch):
    def fails(folder):
        raise CourseError(str(folder), "does not answer", "deploy it again")

    monkeypatch.setattr(deploy_module, "smoke_test", fails)
    with pytest.raises(CourseError, match="does not answer"):
        deploy(service, TRAINED, tmp_path / "sums")
    assert not list((tmp_path / "sums").glob("v*"))
    monkeypatch.undo()
    assert deploy(service, TRAINED, tmp_path / "sums").version.name == "v1"


def test_a_merge_that_is_not_the_adapter_never_becomes_a_version(tmp_path, service, monkeypatch):
    from course_lib.export import merge

    right = merge.lora_delta
    monkeypatch.setattr(merge, "lora_delta", lambda pair, adapter: 2 * right(pair, adapter))
    with pytest.raises(CourseError, match=r"is not base \+ adapter"):
        deploy(service, TRAINED, tmp_path / "sums")
    assert not list((tmp_path / "sums").glob("v*"))


def test_two_deploys_into_one_folder_do_not_meet(tmp_path, service):
    (tmp_path / "sums" / ".work").mkdir(parents=True)
    with (
        FileLock(tmp_path / "sums" / ".work" / "lock"),
        pytest.raises(CourseError, match="another deploy is at work"),
    ):
        deploy(service, TRAINED, tmp_path / "sums")


def test_a_full_disk_is_said_before_the_merge_starts(tmp_path, service, monkeypatch):
    from course_lib.export import merge

    usage = merge.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CourseError, match=r"needs 0\.\d MB and 0\.0 MB are free"):
        deploy(service, TRAINED, tmp_path / "sums")


def test_a_wrong_path_leaves_no_folder_behind(tmp_path, service):
    with pytest.raises(CourseError, match="is not a checkpoint path"):
        deploy(service, "runs/final", tmp_path / "sums")
    assert not (tmp_path / "sums").exists()


@pytest.mark.parametrize("before", ["nothing", "a folder", "a version"])
def test_a_checkpoint_that_is_not_there_is_one_sentence_and_leaves_no_folder_behind(
    tmp_path, trained, monkeypatch, capsys, before
):
    """The SDK's "Error code: 400 - {...}" was shown, and an empty .work made `serve` say that a
    deploy was begun here.
    """
    service, state, _ = trained
    out = tmp_path / "deploys" / "sums"
    if before == "a folder":
        out.mkdir(parents=True)
    elif before == "a version":
        deploy(service, state, out, runs=tmp_path)
    there = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("course_lib.client.connect", lambda *args, **kwargs: service)
    missing = ["--checkpoint", "tinker://x/weights/y", "--backend", "embedded"]
    assert main(["deploy", *missing, "--out", str(out)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("tinker://x/weights/y: the service answers: 'x' is not a training run")
    assert "Error code" not in line and "{" not in line
    assert sorted(tmp_path.rglob("*")) == there


def test_a_deploy_that_fails_removes_nothing_of_another_at_work_nor_what_it_can_go_on_from(
    tmp_path,
):
    work = tmp_path / ".work"
    (work / "mine" / "files").mkdir(parents=True)
    with (
        FileLock(work / "lock"),
        pytest.raises(ValueError),
        versions.leaving_no_empty_work(tmp_path),
    ):
        raise ValueError
    assert (work / "mine" / "files").exists()
    (work / "mine" / "download.json").write_text("{}")
    with pytest.raises(ValueError), versions.leaving_no_empty_work(tmp_path):
        raise ValueError
    assert [path.name for path in (work / "mine").iterdir()] == ["download.json"]


def test_rollback_serves_the_version_before(tmp_path, service):
    config = DeployConfig()
    deploy(service, TRAINED, tmp_path / "sums", config)
    deploy(service, TRAINED, tmp_path / "sums", replace(config, gpu="cpu"))
    assert versions.rollback(tmp_path / "sums").name == "v1"
    assert versions.model_folder(tmp_path / "sums").parent.name == "v1"


@pytest.mark.parametrize("harm", ["lost", "changed", "unlisted"])
def test_rollback_to_a_version_that_is_not_whole_is_refused(tmp_path, service, harm):
    """It said that v1 was current, and there was nothing to serve."""
    out = tmp_path / "sums"
    first = deploy(service, TRAINED, out, DeployConfig())
    deploy(service, TRAINED, out, DeployConfig(gpu="cpu"))
    weights = first.model / "model.safetensors"
    if harm == "lost":
        weights.unlink()
    elif harm == "changed":
        weights.write_bytes(b"short")
    else:
        (first.version / versions.RECORD).write_text("{}")
    said = "deploy.json: does not list" if harm == "unlisted" else "model.safetensors: is not the"
    with pytest.raises(CourseError, match=said):
        versions.rollback(out)
    assert versions.current_version(out).name == "v2"


# --- killed at any moment -------------------------------------------------------------------------


def kill(tmp_path: Path, adapter: Path, base: Path, points: int) -> dict:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]),
        "PYTHONWARNINGS": "ignore",
    }
    script = Path(__file__).with_name("kill_deploy.py")
    with serving(FileServer(adapter, chunk_bytes=4096).app()) as url:
        arguments = [url, str(adapter), str(base), str(tmp_path / "sums"), str(points), "0"]
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            capture_output=True,
            text=True,
            timeout=100 + 40 * points,
            env=environment,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_anywhere_nothing_looks_finished_that_is_not(tmp_path, adapter, base):
    found = kill(tmp_path, adapter, base, points=3)
    assert found["killed"] >= 2 and "nothing" in found["found"]


@pytest.mark.slow
@pytest.mark.timeout(2600)
def test_killed_at_sixty_points_nothing_looks_finished_that_is_not(tmp_path, adapter, base):
    found = kill(tmp_path, adapter, base, points=60)
    assert found["killed"] >= 50, found


# --- the shipped model ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_served_model_answers_every_heldout_question_as_the_engine_does(tmp_path):
    """Trained a little on the shipped data, so that the answers differ from the base's."""
    import openai

    from course_lib.batches import make_datum
    from course_lib.conversations import load_conversations
    from course_lib.environments import sums_environment
    from course_lib.evaluation import evaluate
    from course_lib.rendering import render_conversation
    from course_lib.serve import create_app

    data = Path(__file__).parents[1] / "data"
    environment = sums_environment()
    problems = environment.heldout(400, 0)
    with own_engine(data / "base-model", tmp_path / "store") as service:
        client = service.create_lora_training_client(
            base_model=service.base_model, rank=16
        ).result()
        tokenizer = client.get_tokenizer()
        rows = load_conversations(str(data / "conversations.jsonl"), limit=320)
        datums = [make_datum(render_conversation(each, tokenizer)) for each in rows]
        for step in range(20):
            client.forward_backward(datums[step * 16 : step * 16 + 16], "cross_entropy").result()
            client.optim_step(tinker.AdamParams(learning_rate=2e-3)).result()
        checkpoint = client.save_state("final").result().path
        sampler = client.save_weights_for_sampler("final").result().path
        engine = evaluate(
            service.create_sampling_client(model_path=sampler).result(),
            tokenizer,
            environment,
            problems,
            temperature=0.0,
            max_tokens=48,
        )
        deploy(service, checkpoint, tmp_path / "sums", runs=tmp_path)
    model = ServedModel.load(tmp_path / "sums")
    try:
        with (
            serving(create_app(model, "a-key-for-tests")) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="a-key-for-tests") as caller,
        ):
            answers = [
                caller.chat.completions.create(
                    model="sums",
                    messages=[{"role": "user", "content": problem.messages[-1].content}],
                    temperature=0,
                    max_tokens=48,
                )
                .choices[0]
                .message.content
                for problem in problems
            ]
    finally:
        model.stop()
    assert answers == [record.completions[0] for record in engine.records]
    served = sum(
        environment.grade(problem, answer).value >= 1
        for problem, answer in zip(problems, answers, strict=True)
    )
    assert served / len(problems) == engine.accuracy
    assert len(set(answers)) > 20
