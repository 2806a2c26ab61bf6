"""Where did it go? One folder holds runs, checkpoints and sessions; processes may share it.

    STORE/runs/<run>/run.json                      who made it, on which base model, with which LoRA
    STORE/runs/<run>/weights/<name>/               adapter_model.safetensors, adapter_config.json,
                                                   optimizer.safetensors, checkpoint.json
    STORE/runs/<run>/sampler_weights/<name>/       the same without the optimizer
    STORE/runs/<run>/external_weights/<name>/      files to download
    STORE/sessions/<session>.json
    STORE/scratch/<process>/                       parked weights, until their process has ended

A checkpoint folder is written under another name, synced to disk and then renamed, so that whoever
looks sees all of it or nothing, whenever a process is killed. Safetensors and JSON only.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from course_lib.engine.names import KINDS, TinkerPath, checked_session_id, run_folder
from course_lib.engine.requests import RequestError

RECORD = "checkpoint.json"
NEXT = "~next"  # suffix of a complete checkpoint on its way to replace another of the same name
UNFINISHED = "~part-"  # prefix of a folder being written: never looked at
TTL_S = (3600, 10 * 365 * 24 * 3600)

Record = TypeVar("Record")


class NotFoundError(RequestError):
    """What was asked for is not there, or is another owner's."""


def now() -> datetime:
    return datetime.now(UTC)


def iso(moment: datetime) -> str:
    return moment.isoformat()


@dataclass(frozen=True)
class RunRecord:
    """One training run: the content of run.json."""

    run_id: str
    owner: str
    session_id: str
    base_model: str
    fingerprint: str  # of the base model's files: the same name may mean another model tomorrow
    lora: dict[str, Any]
    created_at: str
    last_request_at: str
    user_metadata: dict[str, str] | None = None


@dataclass(frozen=True)
class CheckpointRecord:
    """One checkpoint: the content of checkpoint.json."""

    path: str
    owner: str
    base_model: str
    fingerprint: str
    lora: dict[str, Any]
    created_at: str
    size_bytes: int = 0
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: str | None = None

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and datetime.fromisoformat(self.expires_at) <= now()


@dataclass(frozen=True)
class SessionRecord:
    """One client session: the content of its JSON file."""

    session_id: str
    owner: str
    created_at: str
    tags: list[str] = field(default_factory=list)
    user_metadata: dict[str, str] | None = None
    project_id: str | None = None
    display_name: str | None = None
    status: dict[str, Any] = field(default_factory=lambda: {"type": "active"})
    training_run_ids: list[str] = field(default_factory=list)
    sampler_ids: list[str] = field(default_factory=list)


def expiry(ttl_seconds: int | None) -> str | None:
    """When a checkpoint saved now with this time to live will expire."""
    if ttl_seconds is None:
        return None
    if not TTL_S[0] <= ttl_seconds <= TTL_S[1]:
        raise RequestError(f"ttl_seconds is {ttl_seconds}; it must be {TTL_S[0]} to {TTL_S[1]}")
    return iso(now() + timedelta(seconds=ttl_seconds))


class Store:
    """The folder, and what can be done with it. Every method may be called from any thread."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        (self.root / "runs").mkdir(parents=True, exist_ok=True)
        (self.root / "sessions").mkdir(exist_ok=True)

    # Runs ---------------------------------------------------------------------------------------

    def run_dir(self, run_id: str) -> Path:
        return self.root / "runs" / run_folder(run_id)

    def write_run(self, record: RunRecord) -> None:
        """Create the run's record, or replace it."""
        folder = self.run_dir(record.run_id)
        with saving(f"the record of {record.run_id}"):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "run.json", asdict(record))

    def run(self, run_id: str) -> RunRecord:
        record = read_record(self.run_dir(run_id) / "run.json", RunRecord)
        if record is None:
            raise NotFoundError(f"There is no training run {run_id} in this store")
        return record

    def runs(self) -> list[RunRecord]:
        """All runs, the one used last first."""
        files = (self.root / "runs").glob("*/run.json")
        records = [record for file in files if (record := read_record(file, RunRecord))]
        return sorted(records, key=lambda record: record.last_request_at, reverse=True)

    # Checkpoints --------------------------------------------------------------------------------

    def folder(self, path: TinkerPath) -> Path:
        """The checkpoint's folder, after finishing a replacement that a killed process began."""
        folder = self.run_dir(path.run_id) / path.kind / path.name
        if folder.is_symlink():
            raise NotFoundError(f"{path} is a link in the store's folder; links are not followed")
        following = folder.with_name(folder.name + NEXT)
        if not folder.exists() and following.is_dir():
            with contextlib.suppress(OSError):  # another process may be quicker
                following.rename(folder)
        return folder

    def save(
        self,
        path: TinkerPath,
        record: CheckpointRecord,
        write_files: Callable[[Path], None],
        overwrite: bool = False,
    ) -> CheckpointRecord:
        """Make a checkpoint visible, complete or not at all.

        Raises:
            RequestError: the name is taken, or the files cannot be written (a full disk).
        """
        folder = self.folder(path)
        if folder.exists() and not overwrite:
            raise RequestError(f"{path} exists already; choose another name or pass overwrite=True")
        part = folder.with_name(UNFINISHED + secrets.token_hex(8))
        try:
            with saving(str(path)):
                part.mkdir(parents=True)
                write_files(part)
                size = sum(file.stat().st_size for file in part.iterdir())
                record = replace(record, size_bytes=size)
                write_json(part / RECORD, asdict(record))
                sync_folder(part)
                self._make_visible(part, folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return record

    def _make_visible(self, part: Path, folder: Path) -> None:
        following = folder.with_name(folder.name + NEXT)
        if not folder.exists():
            part.rename(folder)
        else:
            # Between these steps either the old or the new checkpoint is whole: see `folder`.
            shutil.rmtree(following, ignore_errors=True)
            part.rename(following)
            aside = folder.with_name(UNFINISHED + secrets.token_hex(8))
            folder.rename(aside)
            following.rename(folder)
            shutil.rmtree(aside, ignore_errors=True)
        sync(folder.parent)

    def checkpoint(self, path: TinkerPath) -> CheckpointRecord:
        """The checkpoint's record; one that has expired is gone."""
        record = read_record(self.folder(path) / RECORD, CheckpointRecord)
        if record is None or record.expired:
            raise NotFoundError(f"There is no checkpoint {path} in this store")
        return record

    def checkpoints(self, run_id: str) -> list[CheckpointRecord]:
        """The run's checkpoints, newest first; expired ones are removed on the way."""
        found = []
        for kind in KINDS:
            for name in self._names(self.run_dir(run_id) / kind):
                path = TinkerPath(run_id, kind, name)
                record = read_record(self.folder(path) / RECORD, CheckpointRecord)
                if record is not None and record.expired:
                    self.delete(path)
                elif record is not None:
                    found.append(record)
        return sorted(found, key=lambda record: record.created_at, reverse=True)

    def _names(self, folder: Path) -> set[str]:
        if not folder.is_dir():
            return set()
        names = {entry.name for entry in folder.iterdir() if not entry.is_symlink()}
        return {name.removesuffix(NEXT) for name in names if not name.startswith(UNFINISHED)}

    def update(self, path: TinkerPath, **changes: Any) -> CheckpointRecord:
        """Change fields of the record (public, expires_at) in one step."""
        record = replace(self.checkpoint(path), **changes)
        with saving(str(path)):
            write_json(self.folder(path) / RECORD, asdict(record))
        return record

    def delete(self, path: TinkerPath) -> None:
        """Remove the checkpoint: invisible at once, its files a moment later."""
        folder = self.folder(path)
        shutil.rmtree(folder.with_name(folder.name + NEXT), ignore_errors=True)
        if not (folder / RECORD).is_file():
            raise NotFoundError(f"There is no checkpoint {path} in this store")
        aside = folder.with_name(UNFINISHED + secrets.token_hex(8))
        with saving(str(path)):
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    # Sessions -----------------------------------------------------------------------------------

    def write_session(self, record: SessionRecord) -> None:
        file = self.root / "sessions" / f"{checked_session_id(record.session_id)}.json"
        with saving(f"the record of session {record.session_id}"):
            write_json(file, asdict(record), durable=False)

    def session(self, session_id: str) -> SessionRecord | None:
        file = self.root / "sessions" / f"{checked_session_id(session_id)}.json"
        return read_record(file, SessionRecord)

    def sessions(self) -> list[SessionRecord]:
        """All sessions, newest first."""
        files = (self.root / "sessions").glob("*.json")
        records = [record for file in files if (record := read_record(file, SessionRecord))]
        return sorted(records, key=lambda record: record.created_at, reverse=True)


@contextlib.contextmanager
def saving(what: str) -> Iterator[None]:
    """Turn a full disk, a missing right and the like into the failure of this one request."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"Could not save {what}: {error.strerror or error}") from error


def read_record(file: Path, record_type: type[Record]) -> Record | None:
    """Read a JSON record; None when it is not there or is not one of ours."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return record_type(**values)
    except (OSError, ValueError, TypeError):
        return None


def write_json(file: Path, values: dict[str, Any], durable: bool = True) -> None:
    """Replace a JSON file in one step."""
    part = file.with_name(f"{UNFINISHED}{secrets.token_hex(8)}")
    try:
        with part.open("w", encoding="utf-8") as stream:
            json.dump(values, stream, indent=1)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have the file or folder on disk before going on (Windows cannot do it for folders)."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the folder and its files on disk."""
    for file in folder.iterdir():
        sync(file)
    sync(folder)
