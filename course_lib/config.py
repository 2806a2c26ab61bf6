"""Every number of a run in frozen dataclasses, checked when they are made.

`preset("quick")` gives one of three sizes; `load_config` adds a TOML file and overrides:

    load_config("quick", ["rl.steps=20", "batch_size=16"])
    load_config("data/configs/ppo.toml")

A field has one home: `model_name` stands in `SFTConfig` only, RL goes on from the SFT checkpoint.
A new one takes a type, a default, a comment with its unit and off-switch, and a check in
`__post_init__`; `--set` and TOML files know it by itself.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from course_lib.dotenv import PROJECT, setting
from course_lib.errors import CourseError
from course_lib.fields import check_choice, check_range, check_types, did_you_mean, kinds, parse

PRESETS = ("tiny", "quick", "full")
SECTIONS = ("sft", "rl", "preference", "deploy")
LOSS_FNS = ("importance_sampling", "ppo", "cispo", "dro", "gspo")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning with LoRA."""

    model_name: str = "auto"  # SDK name of the base model; auto = the back end's own
    dataset_type: str = "jsonl"  # jsonl | huggingface
    data_path: str = "data/conversations.jsonl"  # file, folder or hub name
    eval_path: str | None = "auto"  # held-out conversations; auto = shipped, or 1 in 10; none = off
    batch_size: int = 32  # conversations per optimizer step
    epochs: int = 1  # times every conversation is seen
    max_steps: int = 0  # steps; 0 = all of every epoch
    max_length: int = 1024  # tokens per conversation; a longer one is an error
    learning_rate: float = 4e-3  # peak of the schedule
    schedule: str = "linear"  # linear | cosine (both fall to 0) | constant
    lora_rank: int = 16  # a power of two, as hosted Tinker asks
    train_on: str = "last_assistant"  # last_assistant | all_assistant
    save_every: int = 20  # steps; 0 = at the end only
    eval_every: int = 20  # steps; 0 = at the end only

    def __post_init__(self) -> None:
        check_types(self)
        check_choice(self, "dataset_type", ("jsonl", "huggingface"))
        check_choice(self, "schedule", ("linear", "cosine", "constant"))
        check_choice(self, "train_on", ("last_assistant", "all_assistant"))
        check_range(self, "batch_size", 1, 4096)
        check_range(self, "epochs", 1, 1000)
        check_range(self, "max_steps", 0, 10_000_000)
        check_range(self, "max_length", 2, 1_048_576)
        check_range(self, "learning_rate", 0, 1)
        check_range(self, "save_every", 0, 10_000_000)
        check_range(self, "eval_every", 0, 10_000_000)
        _check_rank(self)


@dataclass(frozen=True)
class RLConfig:
    """GRPO: groups of completions, rewards, advantages, a policy-gradient step."""

    environment: str = "auto"  # sums | FILE.jsonl (prompt, answer) | conversations; auto = by data
    reward: str = (
        "auto"  # e.g. correct, correct+0.2*format, file.py:function; auto = by environment
    )
    steps: int = 100  # rollout batches; 0 = skip RL
    prompts_per_step: int = 16  # groups per step
    group_size: int = 8  # completions per prompt; below 2 there is nothing to compare
    loss_fn: str = "importance_sampling"  # importance_sampling | ppo | cispo | dro | gspo
    loss_fn_config: dict[str, float] = field(default_factory=dict)  # e.g. clip_low_threshold=0.8
    learning_rate: float = 8e-4  # peak of the schedule
    schedule: str = "linear"  # linear | cosine (both fall to 0) | constant
    lora_rank: int = 16  # only if RL starts from the base model; a checkpoint brings its own
    temperature: float = 1.0  # of sampling; the trainer's logprobs are at 1
    max_tokens: int = 64  # tokens per completion, the stop token included
    substeps: int = 1  # optimizer steps on each batch of rollouts; 1 = on-policy
    advantages: str = "centred"  # centred | normalised | leave_one_out
    kl_penalty: float = 0.0  # reward lost per nat of KL to the start of RL; 0 = off
    kl_estimator: str = "k1"  # k1 | k2 | k3
    length_normalise: bool = (
        False  # True = each completion weighs the same (GRPO); False = Dr. GRPO
    )
    save_every: int = 20  # steps; 0 = at the end only
    eval_every: int = 0  # steps; 0 = never inside the loop
    eval_problems: int = 100  # held-out problems of such an evaluation
    deterministic: bool = False  # True = one sample call at a time: slower, repeats to 1e-5

    def __post_init__(self) -> None:
        check_types(self)
        check_choice(self, "loss_fn", LOSS_FNS)
        check_choice(self, "schedule", ("linear", "cosine", "constant"))
        check_choice(self, "advantages", ("centred", "normalised", "leave_one_out"))
        check_choice(self, "kl_estimator", ("k1", "k2", "k3"))
        check_range(self, "steps", 0, 10_000_000)
        check_range(self, "prompts_per_step", 1, 4096)
        check_range(self, "group_size", 2, 4096)
        check_range(self, "learning_rate", 0, 1)
        check_range(self, "temperature", 0.01, 10)
        check_range(self, "max_tokens", 1, 1_048_576)
        check_range(self, "substeps", 1, 1000)
        check_range(self, "kl_penalty", 0, 1000)
        check_range(self, "save_every", 0, 10_000_000)
        check_range(self, "eval_every", 0, 10_000_000)
        check_range(self, "eval_problems", 1, 1_000_000)
        _check_rank(self)


@dataclass(frozen=True)
class PreferenceConfig:
    """Learning from pairs: the judge behind rewards preference and tournament, and DPO."""

    data_path: str = (
        "auto"  # JSONL of prompt, chosen, rejected; auto = shipped, or own data vs samples
    )
    strength: str = "verdict"  # verdict: p("yes, a good reply") | reply: p(the reply itself)
    batch_size: int = 16  # pairs per optimizer step
    epochs: int = 2  # times every pair is seen
    max_steps: int = 0  # steps; 0 = all of every epoch
    learning_rate: float = 1e-3  # at the first step, falling to 0
    lora_rank: int = 16  # of the judge's own adapter
    dpo_beta: float = 0.1  # how strongly DPO holds to its reference; larger = closer
    dpo_nll: float = 0.0  # weight of the chosen replies' own loss, nats per token, beside DPO's

    def __post_init__(self) -> None:
        check_types(self)
        check_choice(self, "strength", ("verdict", "reply"))
        check_range(self, "batch_size", 1, 4096)
        check_range(self, "epochs", 1, 1000)
        check_range(self, "max_steps", 0, 10_000_000)
        check_range(self, "learning_rate", 0, 1)
        check_range(self, "dpo_beta", 0, 100)
        check_range(self, "dpo_nll", 0, 100)
        _check_rank(self)


@dataclass(frozen=True)
class DeployConfig:
    """Where the finished model goes: the Hugging Face Hub, a Modal app."""

    upload_to_hf: bool = False  # False = nothing leaves this machine
    hf_repo_name: str | None = None  # owner/name; needed for the upload
    private: bool = True  # False = everybody can read the repository
    app_name: str = "posttrain"  # of the Modal app
    gpu: str = "L4"  # a Modal GPU name
    scaledown_s: int = 300  # seconds without a request until the container stops
    max_containers: int = 1  # upper bound of the bill
    region: str | None = None  # a Modal region, e.g. eu; none = Modal chooses

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "scaledown_s", 2, 1200)
        check_range(self, "max_containers", 1, 100)
        named = self.hf_repo_name or ""
        if (self.upload_to_hf or named) and named.count("/") != 1:
            remedy = "write owner/name, e.g. hf_repo_name=ada/sums-lora"
            raise CourseError("DeployConfig.hf_repo_name", f"{named!r} names no repository", remedy)


@dataclass(frozen=True)
class RunConfig:
    """One whole run: what `posttrain all` does."""

    preset: str = "tiny"  # the preset it started from
    seed: int = 0  # adapter start, data order, problems and sampling all follow from it
    backend: str | None = None  # embedded | hosted | URL; none = by environment variables
    out: str | None = None  # folder of the run; none = runs/<time>-<preset>
    store: str | None = None  # folder of the embedded engine's checkpoints; none = runs/store
    eval_problems: int = 200  # held-out problems behind every accuracy in the report
    sft: SFTConfig = field(default_factory=SFTConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    deploy: DeployConfig = field(default_factory=DeployConfig)

    def __post_init__(self) -> None:
        check_types(self)
        check_choice(self, "preset", PRESETS)
        check_range(self, "seed", 0, 2**31 - 1)
        check_range(self, "eval_problems", 1, 1_000_000)

    @property
    def model_name(self) -> str:
        """The base model's SDK name, whose home is `sft.model_name`."""
        return self.sft.model_name


def preset(name: str | None = None) -> RunConfig:
    """One of three sizes; without a name `COURSE_PRESET`, else tiny."""
    place = "preset" if name else "COURSE_PRESET"
    name = name or setting("COURSE_PRESET") or "tiny"
    if name == "tiny":  # seconds: does it run?
        sft = SFTConfig(batch_size=8, epochs=1, save_every=100, eval_every=100)  # 300 steps
        rl = RLConfig(steps=10, prompts_per_step=4, save_every=5)
        return RunConfig(preset=name, sft=sft, rl=rl, eval_problems=64)
    if name == "quick":  # about a minute: does it work?
        sft = SFTConfig(batch_size=32, epochs=1)
        rl = RLConfig(steps=100, prompts_per_step=16)
        return RunConfig(preset=name, sft=sft, rl=rl, eval_problems=200)
    if name == "full":  # a coffee: how far does it go?
        sft = SFTConfig(batch_size=64, epochs=3)
        rl = RLConfig(steps=500, prompts_per_step=32, save_every=50)
        return RunConfig(preset=name, sft=sft, rl=rl, eval_problems=500)
    raise CourseError(place, f"{name!r} is unknown", did_you_mean(name, PRESETS))


def load_config(name_or_toml: str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """A preset or a TOML file, with `field=value` or `section.field=value` written over it."""
    if name_or_toml is not None and name_or_toml.endswith(".toml"):
        config = _from_toml(name_or_toml)
    elif name_or_toml is None or name_or_toml in PRESETS:
        config = preset(name_or_toml)
    else:
        remedy = did_you_mean(name_or_toml, PRESETS) + ", or a FILE.toml"
        raise CourseError("--config", f"{name_or_toml!r} is no preset", remedy)
    changes: dict[str, Any] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise CourseError("--set", f"{override!r} has no '='", "write field=value")
        section, name = _find_field(config, path.strip(), "--set")
        if (section, name) == ("", "preset"):
            remedy = f"use --config with one of {', '.join(PRESETS)}"
            raise CourseError("--set preset", "would change the name alone", remedy)
        kind = kinds(getattr(config, section) if section else config)[name]
        value = parse(kind, text.strip(), f"--set {path.strip()}")
        (changes.setdefault(section, {}) if section else changes)[name] = value
    return _updated(config, changes, "--set")


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """The whole configuration as plain data, for `config.json` in the run's folder."""
    return asdict(config)


def config_from_dict(values: dict[str, Any], place: str = "config") -> RunConfig:
    """The configuration that `config_to_dict` wrote; unknown fields are errors."""
    return _from_file(RunConfig(), values, place)


def find_file(path: str | Path) -> Path:
    """`path` as it stands, or, for the project's own files, seen from the project's root."""
    if "://" in str(path):
        raise CourseError(str(path), "is an address, not a file", "download it, and give the file")
    given = Path(os.path.expanduser(path))  # Path's own raises for a user that is not there
    shipped = PROJECT / given
    return shipped if not given.exists() and shipped.exists() else given


def _from_toml(path: str) -> RunConfig:
    file = find_file(path)
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8-sig"))  # Notepad begins with a mark
    except OSError as error:
        remedy = "give the path of a TOML file, or one of " + ", ".join(PRESETS)
        raise CourseError(path, error.strerror or "cannot be read", remedy) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits
        raise CourseError(path, f"is not TOML ({error})", "write field = value lines") from None
    name = values.get("preset", "quick")
    if name not in PRESETS:
        raise CourseError(path, f"preset {name!r} is unknown", did_you_mean(str(name), PRESETS))
    return _from_file(preset(name), values, path)


def _from_file(config: RunConfig, values: dict[str, Any], file: str) -> RunConfig:
    """`_updated`, where a wrong value is told with the file that it stands in."""
    try:
        return _updated(config, values, file)
    except CourseError as error:
        if error.place == file:
            raise
        raise CourseError(f"{file}: {error.place}", error.finding, error.remedy) from None


def _updated(config: RunConfig, values: dict[str, Any], place: str) -> RunConfig:
    """`config` with the nested `values` written over it, every name checked."""
    changes: dict[str, Any] = {}
    for name, value in values.items():
        section = getattr(config, name, None)
        if name in SECTIONS:
            if not isinstance(value, dict):
                raise CourseError(place, f"{name} is a section", f"write [{name}] and its fields")
            for inner in value:
                _find_field(config, f"{name}.{inner}", place)
            changes[name] = replace(section, **value)  # type: ignore[type-var]
        else:
            found_in, _ = _find_field(config, name, place)
            if found_in:
                remedy = f"write it below [{found_in}]"
                raise CourseError(place, f"{name!r} belongs to {found_in}", remedy)
            changes[name] = value
    return replace(config, **changes)


def _find_field(config: RunConfig, path: str, place: str) -> tuple[str, str]:
    """(section or "", field) that `path` means; a bare name may stand in one section only."""
    sections = {"": config, **{name: getattr(config, name) for name in SECTIONS}}
    home = {
        (f"{section}.{item.name}" if section else item.name): (section, item.name)
        for section, values in sections.items()
        for item in fields(values)
        if section or item.name not in sections
    }
    if path in home:
        return home[path]
    named = [full for full, (section, name) in home.items() if section and name == path]
    # The main job's fields come first: batch_size is SFT's, the judge's is preference.batch_size.
    matches = [full for full in named if not full.startswith("preference.")] or named
    if len(matches) == 1:
        return home[matches[0]]
    if matches:
        raise CourseError(place, f"{path!r} is ambiguous", "write " + " or ".join(matches))
    known = list(home) + [name for section, name in home.values() if section]
    raise CourseError(place, f"field {path!r} is unknown", did_you_mean(path, known))


def _check_rank(config: SFTConfig | RLConfig | PreferenceConfig) -> None:
    rank = config.lora_rank
    if not 1 <= rank <= 512 or rank & (rank - 1):
        place = f"{type(config).__name__}.lora_rank"
        raise CourseError(place, f"{rank} is no power of two", "use 1, 2, 4 ... 512")
