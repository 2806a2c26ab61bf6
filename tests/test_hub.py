"""The card and the upload: what the Hub would be told, and what it is never told."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import yaml
from deploy_models import save_base
from hub_double import TOKEN, HubDouble
from loopback import serving

from course_lib.errors import CourseError
from course_lib.export.base import BaseFolder
from course_lib.export.card import CardFacts, run_of_checkpoint, write_model_card
from course_lib.export.hub import find_secrets, upload
from course_lib.export.verify import Verification

PROOF = Verification(2e-5, 3.5, 1e-3, tensors=21, service_error_nats=1e-5)
REPORT = {
    "preset": "quick",
    "checkpoints": {"rl": "tinker://run:train:0/weights/final"},
    "base": {"accuracy": 0.0, "interval": [0.0, 0.02], "worked_share": 0.0},
    "sft": {"accuracy": 0.42, "interval": [0.35, 0.49], "worked_share": 0.25},
    "rl": {"accuracy": 0.955, "interval": [0.92, 0.98], "worked_share": 0.99},
}
CONFIG = {
    "preset": "quick",
    "seed": 3,
    "sft": {"batch_size": 32, "data_path": "data/conversations.jsonl", "eval_path": "/elsewhere/x"},
    "rl": {"steps": 100, "loss_fn": "importance_sampling"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("hub") / "base")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    return folder


def facts(**changes) -> CardFacts:
    given = {
        "name": "ada/sums",
        "checkpoint": "tinker://run:train:0/weights/final",
        "base_model": "course/base",
        "rank": 16,
        "alpha": 32,
        "modules": ["q_proj", "lm_head"],
        "verification": PROOF,
        "report": REPORT,
        "config": CONFIG,
    }
    return CardFacts(**(given | changes))


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


@pytest.fixture
def model(tmp_path: Path, base: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    write_model_card(folder / "README.md", BaseFolder(base), facts())
    return folder


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client may use the network (which is the loopback double), by LFS instead of Xet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def test_the_card_has_metadata_that_the_hub_reads(tmp_path, base):
    data = metadata(write_model_card(tmp_path / "README.md", BaseFolder(base), facts()))
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    result = data["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == 95.5


def test_only_a_base_on_the_hub_is_named_in_the_metadata(tmp_path, base):
    folder = BaseFolder(base)
    own = metadata(write_model_card(tmp_path / "a.md", folder, facts()))
    assert "base_model" not in own
    hub = facts(base_model="meta-llama/Llama-3.2-1B")
    data = metadata(write_model_card(tmp_path / "b.md", folder, hub))
    assert data["base_model"] == "meta-llama/Llama-3.2-1B"
    assert data["base_model_relation"] == "finetune"


def test_the_card_shows_results_method_proof_and_limits(tmp_path, base):
    text = write_model_card(tmp_path / "README.md", BaseFolder(base), facts())
    assert "| after GRPO | 95.5% | 92.0% to 98.0% | 99.0% |" in text
    assert "Preset `quick`, seed 3." in text and "steps 100" in text
    assert "21 tensors compared" in text and "1.0e-05 nats" in text
    assert "not tested for safety" in text
    assert "/elsewhere" not in text, "a path of the training machine is in the card"


def test_a_card_without_a_report_claims_no_result(tmp_path, base):
    empty = facts(report=None, config=None)
    text = write_model_card(tmp_path / "README.md", BaseFolder(base), empty)
    assert "None were recorded" in text and "model-index" not in text


def test_the_run_of_a_checkpoint_is_found_by_its_report(tmp_path):
    for name, report in (("a", {"checkpoints": {}}), ("b", REPORT)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    (tmp_path / "b" / "config.json").write_text(json.dumps(CONFIG))
    found = run_of_checkpoint("tinker://run:train:0/weights/final", tmp_path)
    assert found == (REPORT, CONFIG)
    assert run_of_checkpoint("tinker://run:train:9/weights/final", tmp_path) == (None, None)


def test_a_dry_run_lists_every_file_with_its_size_and_sends_nothing(model):
    hub = HubDouble()
    with serving(hub.app()) as url:
        plan = upload(model, "ada/sums", dry_run=True, endpoint=url, token=TOKEN)
    assert hub.requests == [] and plan.url is None
    assert dict(plan.files) == {p.name: p.stat().st_size for p in model.iterdir()}


def test_an_upload_arrives_whole_in_a_private_repository(model, online):
    hub = HubDouble()
    with serving(hub.app()) as url:
        plan = upload(model, "ada/sums", endpoint=url, token=TOKEN)
        again = upload(model, "ada/sums", endpoint=url, token=TOKEN)
    assert hub.repos["ada/sums"]["private"] is True
    assert hub.repos["ada/sums"]["files"] == {p.name: p.read_bytes() for p in model.iterdir()}
    assert plan.url == "https://huggingface.co/ada/sums/commit/1" and again.url is not None
    assert "POST /ada/sums.git/info/lfs/objects/batch" in hub.requests
    assert "POST /api/validate-yaml" in hub.requests


def test_a_public_repository_is_made_only_when_asked_for(model, online):
    hub = HubDouble()
    with serving(hub.app()) as url:
        upload(model, "ada/sums", private=False, endpoint=url, token=TOKEN)
    assert hub.repos["ada/sums"]["private"] is False


def test_a_private_upload_never_goes_into_a_repository_that_is_public(model, online):
    hub = HubDouble(repos={"ada/sums": {"private": False, "files": {}}})
    with (
        serving(hub.app()) as url,
        pytest.raises(CourseError, match="this repository exists and is public"),
    ):
        upload(model, "ada/sums", endpoint=url, token=TOKEN)
    assert hub.repos["ada/sums"]["files"] == {}


def test_a_wrong_token_is_one_sentence(model, online):
    hub = HubDouble()
    with (
        serving(hub.app()) as url,
        pytest.raises(CourseError, match=r"ada/sums: the Hub refuses it: .*401.*hf auth login"),
    ):
        upload(model, "ada/sums", endpoint=url, token="hf_" + "y" * 8)
    assert hub.repos == {}


@pytest.mark.parametrize(
    "secret",
    [
        "tml-" + "a1B2" * 6,
        "hf_" + "a1B2" * 8,
        "sk-" + "a1B2" * 8,
        "ak-" + "a1B2" * 6,
        "AKIA" + "ABCD" * 4,
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)
def test_a_secret_in_any_file_stops_the_upload_at_its_line(model, secret):
    readme = model / "README.md"
    readme.write_text(readme.read_text() + f"\nkey = {secret}\n")
    line = readme.read_text().count("\n")
    with pytest.raises(CourseError, match=rf"README\.md:{line}: holds a secret") as caught:
        upload(model, "ada/sums", dry_run=True)
    assert secret not in str(caught.value), "the error message repeats the secret"


def test_the_value_of_ones_own_key_variable_stops_the_upload(model, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct horse battery")
    (model / "notes.txt").write_text("correct horse battery\n")
    with pytest.raises(CourseError, match="the value of MY_SERVICE_TOKEN"):
        find_secrets(model)


def test_a_file_that_is_no_part_of_a_model_stops_the_upload(model):
    (model / ".env").write_text("A=1\n")
    with pytest.raises(CourseError, match=r"\.env: is no part of a model"):
        upload(model, "ada/sums", dry_run=True)


def test_the_double_refuses_what_the_hub_refuses(model):
    hub = HubDouble()
    with serving(hub.app()) as url:
        answer = httpx.post(f"{url}/api/repos/create", json={"name": "x"})
        bad = httpx.put(f"{url}/lfs/{'0' * 64}", content=b"other bytes")
    assert answer.status_code == 401 and bad.status_code == 400
