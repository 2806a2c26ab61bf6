"""What was saved, where it is, and how to go on from it.

A run's folder holds `checkpoints.jsonl`, one line per checkpoint. Each names two things in the
server's store: `state_path` (weights and optimizer: go on training) and `sampler_path` (weights
only: sample, evaluate, deploy). Everything else that a run needs to go on follows from the seed
and the step number, so nothing else is saved.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.errors import CourseError, naming

if TYPE_CHECKING:
    import tinker

WHOLE = '{"phase": "'  # how every line of checkpoints.jsonl begins
StepHook = Callable[[int, int, dict[str, Any]], None]  # on_step(step, total, metrics)


class StopTraining(Exception):
    """Raised by an `on_step` hook: the loop saves a checkpoint and returns what it has.

    Loops over pairs save none: half a judge is no judge.
    """


@dataclass(frozen=True)
class Checkpoint:
    """`step` optimizer batches of `phase` are in these weights."""

    phase: str  # sft | rl | preference | dpo
    step: int
    state_path: str  # tinker://.../weights/...
    sampler_path: str  # tinker://.../sampler_weights/...


class CheckpointLog:
    """`checkpoints.jsonl` in a run's folder."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "checkpoints.jsonl"

    def append(self, checkpoint: Checkpoint) -> None:
        """One whole line in one write: a reader never sees half a checkpoint that counts."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(checkpoint)).encode() + b"\n"
        if _ends_torn(self.path):
            line = b"\n" + line
        with naming(self.path), open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Checkpoint]:
        """Every checkpoint in the order saved; a line torn by a crash is no checkpoint.

        Raises:
            CourseError: another line is none either, and nobody can tell what is missing.
        """
        if not self.path.exists():
            return []
        found = []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                found.append(_checkpoint(json.loads(line)))
            except (ValueError, TypeError):
                if not _is_torn(line):
                    remedy = "mend the line, or delete it and lose that checkpoint"
                    place = f"{self.path}:{number}"
                    raise CourseError(place, "is no checkpoint", remedy) from None
        return found

    def last(self, phase: str | None = None) -> Checkpoint | None:
        """The newest checkpoint (of a phase): the one to go on from."""
        found = [point for point in self.read() if phase is None or point.phase == phase]
        return found[-1] if found else None


def save_checkpoint(
    client: tinker.TrainingClient, phase: str, step: int, log: CheckpointLog | None = None
) -> Checkpoint:
    """Save weights, optimizer and sampler weights; log them once both are safely in the store."""
    name = f"{phase}-{step:05d}-{secrets.token_hex(3)}"  # a cell run twice must not collide
    saving_state = client.save_state(name)
    saving_sampler = client.save_weights_for_sampler(name)
    try:
        try:
            state = saving_state.result()
        finally:  # after a failure, too: whoever hears of it finds nothing half written
            sampler = saving_sampler.result()
    except Exception as error:
        place = f"checkpoint {name}"
        remedy = "free disk space, or move the store and name it with --store; then --resume"
        raise CourseError(place, f"was not saved ({one_line(error)})", remedy) from error
    checkpoint = Checkpoint(phase, step, state.path, sampler.path)
    if log:
        log.append(checkpoint)
    return checkpoint


def training_client_from(
    service: tinker.ServiceClient, checkpoint: Checkpoint | str, *, optimizer: bool = True
) -> tinker.TrainingClient:
    """A training client with the checkpoint's weights and, unless told otherwise, its optimizer."""
    path = checkpoint if isinstance(checkpoint, str) else checkpoint.state_path
    kind = "/weights/"
    if not path.startswith("tinker://") or kind not in path:
        remedy = "give tinker://RUN/weights/NAME, as report.json and checkpoints.jsonl show it"
        raise CourseError(path, "is no training checkpoint", remedy)
    create = (
        service.create_training_client_from_state_with_optimizer
        if optimizer
        else service.create_training_client_from_state
    )
    try:
        return create(path).result()
    except Exception as error:
        remedy = "look in the run's checkpoints.jsonl, and use the --store that it was saved in"
        raise CourseError(path, f"cannot be loaded ({one_line(error)})", remedy) from error


def one_line(error: BaseException) -> str:
    """What the back end said, without line breaks and the SDK's wrapping, at a readable length.

    >>> one_line(ValueError("Request failed: no such loss for self.request_id='1' and expected"))
    'no such loss'
    """
    body = getattr(error, "body", None)
    said = body.get("error") if isinstance(body, dict) else None
    text = said if isinstance(said, str) else str(error)
    text = text.removeprefix("Request failed: ").split(" for self.request_id=")[0]
    return " ".join(text.split())[:200] or type(error).__name__


def _checkpoint(values: Any) -> Checkpoint:
    checkpoint = Checkpoint(**values)
    if type(checkpoint.step) is not int:
        raise TypeError("step is a whole number")
    return checkpoint


def _is_torn(line: str) -> bool:
    """Is it the beginning of a line that `append` writes?"""
    return WHOLE.startswith(line[: len(WHOLE)]) and not line.endswith("}")


def _ends_torn(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as handle:
        handle.seek(-1, os.SEEK_END)
        return handle.read(1) != b"\n"
