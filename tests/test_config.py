"""Config: presets as promised, every wrong value told by field, value and range."""

import contextlib
import dataclasses
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from course_lib.config import (
    PROJECT,
    SECTIONS,
    DeployConfig,
    PreferenceConfig,
    RLConfig,
    RunConfig,
    SFTConfig,
    config_from_dict,
    config_to_dict,
    find_file,
    load_config,
    preset,
)
from course_lib.errors import CourseError


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "steps", "prompts"),
    [("tiny", 8, 1, 10, 4), ("quick", 32, 1, 100, 16), ("full", 64, 3, 500, 32)],
)
def test_presets_are_the_promised_sizes(name, batch, epochs, steps, prompts):
    config = preset(name)
    assert (config.sft.batch_size, config.sft.epochs) == (batch, epochs)
    assert (config.rl.steps, config.rl.prompts_per_step, config.rl.group_size) == (
        steps,
        prompts,
        8,
    )
    assert config.preset == name


def test_course_preset_chooses_when_no_name_is_given(monkeypatch):
    monkeypatch.setenv("COURSE_PRESET", "quick")
    assert preset().preset == "quick"
    monkeypatch.delenv("COURSE_PRESET")
    assert preset().preset == "tiny"


def test_overrides_take_the_type_of_their_field():
    config = load_config(
        "quick",
        [
            "batch_size=16",
            "rl.learning_rate=1e-3",
            "rl.deterministic=true",
            "eval_path=none",
            "seed=7",
            "loss_fn_config={clip_low_threshold = 0.9}",
            "deploy.region=eu",
            "out=",
        ],
    )
    assert config.sft.batch_size == 16
    assert config.rl.learning_rate == 1e-3 and config.rl.deterministic is True
    assert config.sft.eval_path is None
    assert config.seed == 7 and config.deploy.region == "eu" and config.out is None
    assert config.rl.loss_fn_config == {"clip_low_threshold": 0.9}
    assert config.sft.epochs == preset("quick").sft.epochs


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lerning_rate=1", "learning_rate"),
        ("rl.group_sise=4", "did you mean rl.group_size"),
        ("learning_rate=1e-3", "sft.learning_rate or rl.learning_rate"),
        ("batch_size", "no '='"),
        ("batch_size=zero", "is str; give int"),
        ("batch_size=1.5", "is float; give int"),
        ("batch_size=true", "is bool; give int"),
        ("batch_size=0", "SFTConfig.batch_size: 0 is out of range; use 1 to 4096"),
        ("sft.learning_rate=nan", "SFTConfig.learning_rate: nan is out of range"),
        ("sft.learning_rate=fast", "is no number"),
        ("sft.schedule=lineer", "did you mean linear"),
        ("loss_fn=pppo", "did you mean ppo"),
        ("sft.lora_rank=12", "SFTConfig.lora_rank: 12 is no power of two"),
        ("upload_to_hf=true", "DeployConfig.hf_repo_name"),
        ("hf_repo_name=ada/sums/lora", "'ada/sums/lora' names no repository"),
        ("seed=-1", "RunConfig.seed"),
        ("preset=full", "use --config with one of tiny, quick, full"),
        ("steps=" + "9" * 5000, "is str; give int"),
        ("steps=" + "[" * 5000, "is str; give int"),
        ("sft.learning_rate=" + "9" * 400, "inf is out of range"),
    ],
)
def test_a_wrong_override_is_told_in_one_line(override, said):
    with pytest.raises(CourseError) as caught:
        load_config("tiny", [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_yes_and_no_are_written_as_in_toml_or_as_in_python():
    for text in ("true", "True"):
        assert load_config("tiny", [f"deterministic={text}"]).rl.deterministic is True
    assert load_config("tiny", ["deploy.private=False"]).deploy.private is False


def test_an_unknown_preset_names_the_near_one():
    with pytest.raises(CourseError, match="did you mean quick"):
        load_config("quik")


def test_a_missing_toml_and_a_broken_toml_name_the_file(tmp_path):
    with pytest.raises(CourseError, match=r"nowhere\.toml"):
        load_config("nowhere.toml")
    broken = tmp_path / "broken.toml"
    for text in ("batch_size = = 3", "seed = " + "9" * 5000, "seed = " + "[" * 5000):
        broken.write_text(text)
        with pytest.raises(CourseError, match="is not TOML"):
            load_config(str(broken))


def test_a_home_that_is_not_there_is_a_file_that_is_not_there():
    """A traceback ended with "Could not determine home directory"."""
    assert find_file("~nobody-of-that-name/x.jsonl") == Path("~nobody-of-that-name/x.jsonl")
    assert find_file("~/x.jsonl") == Path.home() / "x.jsonl"


def test_a_wrong_value_in_a_toml_file_names_the_file(tmp_path):
    file = tmp_path / "mine.toml"
    for text, said in (
        ("[sft]\nepochs = 0", f"{file}: SFTConfig.epochs: 0 is out of range"),
        ('preset = "qick"', f"{file}: preset 'qick' is unknown; did you mean quick"),
        ("preset = 3", f"{file}: preset 3 is unknown"),
    ):
        file.write_text(text)
        with pytest.raises(CourseError) as caught:
            load_config(str(file))
        assert str(caught.value).startswith(said)


def test_a_wrong_course_preset_is_named_as_what_was_set(monkeypatch):
    monkeypatch.setenv("COURSE_PRESET", "qick")
    with pytest.raises(CourseError, match="COURSE_PRESET: 'qick' is unknown; did you mean quick"):
        preset()


def test_an_unknown_or_misplaced_toml_field_is_an_error(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[rl]\nstepps = 3\n")
    with pytest.raises(CourseError, match=r"did you mean rl\.steps"):
        load_config(str(file))
    file.write_text("batch_size = 3\n")
    with pytest.raises(CourseError) as caught:
        load_config(str(file))
    assert str(caught.value).startswith(f"{file}: 'batch_size' belongs to sft;")  # once its name


def test_a_toml_file_from_notepad_begins_with_a_mark(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("seed = 7\n", encoding="utf-8-sig")
    assert load_config(str(file)).seed == 7


@pytest.mark.parametrize("file", sorted((PROJECT / "data/configs").glob("*.toml")), ids=str)
def test_every_shipped_config_loads(file):
    assert isinstance(load_config(str(file)), RunConfig)


def test_shipped_configs_say_what_they_are_for():
    larger = load_config("data/configs/larger-model.toml")
    assert larger.model_name == "meta-llama/Llama-3.1-8B"
    assert (larger.sft.batch_size, larger.sft.lora_rank) == (16, 64)
    ppo = load_config("data/configs/ppo.toml").rl
    assert ppo.loss_fn == "ppo" and ppo.learning_rate < RLConfig().learning_rate
    assert load_config("data/configs/hub-dataset.toml").sft.dataset_type == "huggingface"
    assert load_config("data/configs/hub-upload.toml").deploy.upload_to_hf


def test_a_config_survives_the_trip_through_plain_data():
    config = load_config("quick", ["rl.loss_fn=ppo", "seed=3"])
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize("kind", [SFTConfig, RLConfig, DeployConfig, RunConfig])
def test_configs_are_frozen(kind):
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().lora_rank = 4


def unguarded(kind) -> list[str]:
    """The numbers of a configuration that may be anything."""
    found = []
    for name, of_type in typing.get_type_hints(kind).items():
        if of_type in (int, float):
            with contextlib.suppress(CourseError):
                found.append(kind(**{name: -(10**12)}) and name)
    return found


@pytest.mark.parametrize("kind", [SFTConfig, RLConfig, PreferenceConfig, DeployConfig, RunConfig])
def test_every_field_has_a_range_a_comment_and_a_reader(kind):
    """A field without them was accepted from `--set`, whatever its value, and did nothing."""
    place = f"course_lib/config.py, {kind.__name__}"
    assert not unguarded(kind), f"{place}: add check_range for {unguarded(kind)}"
    plain = [item.name for item in dataclasses.fields(kind) if item.name not in SECTIONS]
    written = re.split(r"^    (?=\w+: )|^    def ", inspect.getsource(kind), flags=re.M)
    silent = [n for n in plain if not any(w.startswith(f"{n}: ") and "  # " in w for w in written)]
    assert not silent, f"{place}: say unit and off-switch of {silent} in a comment beside it"
    files = [file for file in (PROJECT / "course_lib").rglob("*.py") if file.name != "config.py"]
    library = "\n".join(file.read_text(encoding="utf-8") for file in files)
    unread = [name for name in plain if not re.search(rf"\.{name}\b", library)]
    assert not unread, f"{place}: nothing in course_lib reads {unread}"


def test_shipped_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file("data/configs/ppo.toml").exists()
    (tmp_path / "mine.jsonl").write_text("")
    assert find_file("mine.jsonl").exists()


def test_config_imports_nothing_heavy():
    probe = (
        "import sys, course_lib.config; print([m for m in ('torch','tinker') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60
    )
    assert shown.stdout.strip() == "[]"
