"""The whole job: data -> SFT -> GRPO -> held-out evaluation -> report.json.

A run is a folder: `config.json` and `command.json` (what was asked), `metrics.jsonl` and
`checkpoints.jsonl` (what happened), `evaluations/` (every judged completion), `samples.jsonl`
(before and after), and at the very end `report.json`. Each phase that finished is found there, so a
killed run goes on where it was.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.checkpoints import (
    CheckpointLog,
    StepHook,
    StopTraining,
    one_line,
    training_client_from,
)
from course_lib.config import RunConfig, config_from_dict, config_to_dict
from course_lib.diagnosis import diagnose
from course_lib.errors import CourseError
from course_lib.files import write_whole
from course_lib.grpo import RLResult, train_grpo
from course_lib.judges import Judge, judge_by_strength, reward_model
from course_lib.metrics import read_metrics
from course_lib.run_data import RunData, load_run_data
from course_lib.run_judge import needs_judge, run_judge, run_reward
from course_lib.sft import SFTResult, train_sft
from course_lib.stages import StageJudge, seconds_so_far, write_samples

if TYPE_CHECKING:
    import tinker

    from course_lib.client import CourseService


@dataclass(frozen=True)
class Command:
    """Which `posttrain` command made a run, and what it began with."""

    name: str  # sft | rl | all
    sft_checkpoint: str | None = None  # of rl; None: it began with the base model


JUDGED = (
    "These prompts have no answers to check, so there is no accuracy: a judge, trained on the "
    "better replies, compared the completions of each group with one another."
)


def run_all(
    service: CourseService,
    config: RunConfig,
    out: Path,
    on_step: StepHook | None = None,
    *,
    resume: bool = False,
    data: RunData | None = None,
) -> dict[str, Any]:
    """Base -> SFT -> GRPO, each evaluated on held-out problems; the report, also in `out`.

    `on_step` gets metrics whose `phase` is sft, rl or eval. A run that it stops has no report.json
    yet; one that has is finished, and going on with it changes nothing.
    """
    began = time.monotonic()
    data = data or load_run_data(config)  # first: bad data leaves no folder behind
    start_run(config, out, Command("all"), resume=resume)
    if (out / "report.json").exists():
        return json.loads((out / "report.json").read_text(encoding="utf-8"))
    before = seconds_so_far(out)
    judge = StageJudge(service, config, out, data, on_step)
    base = _fresh_client(service, config)
    stages = {"base": judge.stage("base", base)}

    sft = run_sft(service, config, out, on_step, data=data, client=base)
    if sft.stopped:
        return _stopped("sft", out)
    stages["sft"] = judge.stage("sft", sft.checkpoints[-1])

    rl = None
    if config.rl.steps:
        rl = run_rl(service, config, out, sft.checkpoints[-1].state_path, on_step, data=data)
        if rl.stopped:
            return _stopped("rl", out)
        stages["rl"] = judge.stage("rl", rl.checkpoints[-1])
        if needs_judge(config, data):
            stages["rl"]["win_rate_vs_sft"] = judge.win_rate(
                "rl", "sft", _judge(service, config, out)
            )

    checkpoints = {"sft": sft.checkpoints[-1].state_path}
    checkpoints["sft_sampler"] = sft.checkpoints[-1].sampler_path
    if rl:
        checkpoints["rl"] = rl.checkpoints[-1].state_path
        checkpoints["rl_sampler"] = rl.checkpoints[-1].sampler_path
    write_samples(out, list(stages))
    rows = read_metrics(out / "metrics.jsonl")
    report = {
        "preset": config.preset,
        "seed": config.seed,
        "seconds": before + time.monotonic() - began,
        "note": "" if data.environment.checkable else JUDGED,
        "checkpoints": checkpoints,
        "base": stages["base"],
        "sft": stages["sft"],
        "rl": stages.get("rl"),
        "diagnosis": [str(found) for found in diagnose(rows)],
    }
    write_whole(out / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def run_sft(
    service: CourseService,
    config: RunConfig,
    out: Path,
    on_step: StepHook | None = None,
    *,
    data: RunData | None = None,
    client: tinker.TrainingClient | None = None,
) -> SFTResult:
    """SFT in `out`, from the last checkpoint there if there is one, else from `client` or anew."""
    data = data or load_run_data(config)
    checkpoint = CheckpointLog(out).last("sft")
    if checkpoint:
        client = training_client_from(service, checkpoint)
    client = client or _fresh_client(service, config)
    return train_sft(
        client,
        data.train,
        config.sft,
        tokenizer=client.get_tokenizer(),
        heldout=data.heldout,
        out=out,
        seed=config.seed,
        resume=checkpoint,
        on_step=on_step,
    )


def run_rl(
    service: CourseService,
    config: RunConfig,
    out: Path,
    sft_checkpoint: str | None,
    on_step: StepHook | None = None,
    *,
    data: RunData | None = None,
) -> RLResult:
    """GRPO in `out`: from the last RL checkpoint there, else `sft_checkpoint`, else the base model.

    A new phase starts with a new optimizer: SFT's momentum points where SFT was going.
    """
    data = data or load_run_data(config)
    checkpoint = CheckpointLog(out).last("rl")
    if sft_checkpoint:
        client = training_client_from(service, sft_checkpoint, optimizer=False)
    else:
        client = _fresh_client(service, config, rank=config.rl.lora_rank)
    strengths = None
    if needs_judge(config, data):
        policy = client.save_weights_and_get_sampling_client().result()
        model = base_model_name(service, config)
        try:
            strengths = run_judge(service, config, out, data, policy, model, on_step)
        except StopTraining:
            return RLResult([], [], [], stopped=True)
    if checkpoint:
        client = training_client_from(service, checkpoint)
    return train_grpo(
        client,
        data.environment,
        config.rl,
        tokenizer=client.get_tokenizer(),
        reward=run_reward(config, data, strengths),
        out=out,
        seed=config.seed,
        resume=checkpoint,
        on_step=on_step,
    )


def start_run(config: RunConfig, out: Path, command: Command, *, resume: bool = False) -> Command:
    """Make the run's folder, or check that it holds the run to go on with; the command that began
    it, which knows where it began.

    What only RL reads is checked here as well: SFT comes first, and may take an hour. Only the
    store may be another one than before: whoever moved it says where it is now.
    """
    from course_lib.losses import check_settings

    check_settings(config.rl.loss_fn, config.rl.loss_fn_config)
    file, begun = out / "config.json", out / "command.json"
    if resume:
        saved = saved_config(out)
        if replace(saved, store=config.store) != config:
            remedy = "resume with the settings in its config.json, or start a run of its own"
            raise CourseError(str(file), "was made with other settings", remedy)
        command = _same_command(command, begun)
    elif file.exists():
        remedy = f"go on with --resume {out}, or choose another --out"
        raise CourseError(str(out), "holds a run already", remedy)
    for record, values in ((begun, asdict(command)), (file, config_to_dict(config))):
        text = json.dumps(values, indent=2) + "\n"
        if not record.exists() or record.read_text(encoding="utf-8") != text:
            write_whole(record, text)
    return command


def _same_command(command: Command, file: Path) -> Command:
    """The command that a run was begun with, if this one goes on with it."""
    if not file.exists():  # a run from before there was such a file
        return command
    try:
        begun = Command(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        remedy = 'write {"name": "sft"}, or rl or all: the command that made the run'
        raise CourseError(str(file), "cannot be read", remedy) from None
    if begun.name != command.name:
        finding = f"was made by posttrain {begun.name}, not by {command.name}"
        remedy = f"go on with: posttrain {begun.name} --resume {file.parent}"
        raise CourseError(str(file.parent), finding, remedy)
    if command.sft_checkpoint not in (None, begun.sft_checkpoint):
        finding = f"began with {begun.sft_checkpoint or 'the base model'}"
        remedy = f"write only --resume {file.parent}, or start a run of its own"
        raise CourseError(str(file.parent), finding, remedy)
    return begun


def saved_config(out: Path) -> RunConfig:
    """The configuration of the run in `out`."""
    file = out / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no object")
    except (OSError, ValueError):
        raise CourseError(str(out), "holds no run", "give the folder of a stopped run") from None
    return config_from_dict(values, str(file))


def new_folder(config: RunConfig) -> Path:
    """`config.out`, or runs/<time>-<preset>."""
    return Path(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.preset}")


def base_model_name(service: CourseService, config: RunConfig) -> str:
    """The SDK name to train: on the embedded engine what --model loaded, else checked there."""
    if service.backend == "embedded":
        return service.base_model
    from course_lib.client import resolve_model

    return resolve_model(service, config.model_name)


def _fresh_client(
    service: CourseService, config: RunConfig, rank: int | None = None
) -> tinker.TrainingClient:
    name = base_model_name(service, config)
    rank = rank or config.sft.lora_rank
    try:
        return service.create_lora_training_client(name, rank=rank, seed=config.seed).result()
    except Exception as error:
        remedy = "check the model's name and the back end with: posttrain doctor"
        raise CourseError(name, f"cannot be trained ({one_line(error)})", remedy) from error


def _stopped(phase: str, out: Path) -> dict[str, Any]:
    last = CheckpointLog(out).last(phase)
    return {"stopped": phase, "checkpoints": {phase: last.state_path if last else None}}


def _judge(service: CourseService, config: RunConfig, out: Path) -> Judge:
    """The judge that this run trained, to compare with."""
    checkpoint = CheckpointLog(out).last("preference")
    assert checkpoint, "run_rl has trained it"
    sampler = service.create_sampling_client(checkpoint.sampler_path).result()
    strength = config.preference.strength
    return judge_by_strength(reward_model(sampler, sampler.get_tokenizer(), strength))
