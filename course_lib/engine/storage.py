"""Where did it go? One folder holds runs, checkpoints and sessions; processes may share it.

    STORE/runs/<run>/run.json                      who made it, on which base model, with which LoRA
    STORE/runs/<run>/weights/<name>/               adapter_model.safetensors, adapter_config.json,
                                                   optimizer.safetensors, checkpoint.json
    STORE/runs/<run>/sampler_weights/<name>/       the same without the optimizer
    STORE/runs/<run>/external_weights/<name>/      files to download
    STORE/sessions/<session>.json                  who connected
    STORE/sessions/<session>.samplers              the ids of its samplers, one a line
    STORE/scratch/<process>/                       parked weights, until their process has ended

A checkpoint folder is written under another name, synced to disk and then renamed, so that whoever
looks sees all of it or nothing, whenever a process is killed. Safetensors and JSON only.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from course_lib.engine.names import KINDS, TinkerPath, checked_session_id, run_folder
from course_lib.engine.records import (
    UNFINISHED,
    CheckpointRecord,
    RunRecord,
    SessionRecord,
    read_record,
    saving,
    stale,
    sync_folder,
    write_json,
)
from course_lib.engine.requests import NotFoundError, RequestError
from course_lib.errors import CourseError
from course_lib.files import sync

Found = TypeVar("Found")

RECORD = "checkpoint.json"
SAMPLERS = ".samplers"
NEXT = "~next"  # suffix of a complete checkpoint on its way to replace another of the same name


class Store:
    """The folder, and what can be done with it. Every method may be called from any thread."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self._lock = threading.RLock()  # whoever moves or changes a checkpoint holds it
        try:
            (self.root / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CourseError(
                str(self.root),
                f"cannot be a store ({error.strerror})",
                "name a folder that can be written, with --store or COURSE_STORE",
            ) from error
        self._sweep()

    def _sweep(self) -> None:
        """Remove what killed saves left behind."""
        for part in (self.root / "runs").glob(f"*/*/{UNFINISHED}*"):
            with contextlib.suppress(OSError):  # its save may end just now
                if stale(part):
                    shutil.rmtree(part, ignore_errors=True)

    # Runs ---------------------------------------------------------------------------------------

    def run_dir(self, run_id: str) -> Path:
        return self.root / "runs" / run_folder(run_id)

    def write_run(self, record: RunRecord) -> None:
        """Create the run's record, or replace it."""
        folder = self.run_dir(record.run_id)
        with saving(f"the record of {record.run_id}"):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "run.json", asdict(record))

    def claim_run(self, run_id: str) -> bool:
        """Take the run's folder for a new run; of several who ask at once, one gets it."""
        with saving(f"the run {run_id}"):
            try:
                self.run_dir(run_id).mkdir(parents=True)
            except FileExistsError:
                return False
        return True

    def unclaim_run(self, run_id: str) -> None:
        """Give back a folder that was claimed, with what is in it."""
        shutil.rmtree(self.run_dir(run_id), ignore_errors=True)

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
        with self._lock:  # else it would finish what a save in this process is in the middle of
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
        self._unexpired(path)
        if folder.exists() and not overwrite:
            # Only save_state can overwrite: the SDK's other methods have no such argument.
            remedy = " or pass overwrite=True" if path.kind == "weights" else ""
            raise RequestError(f"{path} exists already; choose another name{remedy}")
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
        with self._lock:
            if folder.exists():
                self._replace(folder, part)
            else:
                part.rename(folder)
        sync(folder.parent)

    def _replace(self, folder: Path, part: Path) -> None:
        following = folder.with_name(folder.name + NEXT)
        aside = folder.with_name(UNFINISHED + secrets.token_hex(8))
        # Between these steps either the old or the new checkpoint is whole: see `folder`.
        shutil.rmtree(following, ignore_errors=True)
        part.rename(following)
        try:
            folder.rename(aside)
            following.rename(folder)
        except FileNotFoundError:
            if not folder.exists():
                raise
            # Another process looked between the two renames, and has finished the second.
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def checkpoint(self, path: TinkerPath) -> CheckpointRecord:
        """The checkpoint's record; one that has expired is gone."""
        record = self._record(path)
        if record is None or record.expired:
            raise NotFoundError(f"There is no checkpoint {path} in this store")
        return record

    def _record(self, path: TinkerPath) -> CheckpointRecord | None:
        def look() -> CheckpointRecord | None:
            return read_record(self.folder(path) / RECORD, CheckpointRecord)

        with self._lock:  # while one replaces another there is none for a moment
            # Twice: another process, which has another lock, may have been in the middle of it;
            # the second look at the folder finishes that.
            return look() or look()

    def read(self, path: TinkerPath, reader: Callable[[Path], Found]) -> Found:
        """What `reader` finds in the checkpoint's folder, all of one version: it looks again where
        another took the first one's place meanwhile."""
        while True:
            version = self.checkpoint(path).created_at
            try:
                found = reader(self.folder(path))
            except (OSError, RequestError):
                if self.checkpoint(path).created_at == version:
                    raise
            else:
                if self.checkpoint(path).created_at == version:
                    return found

    def checkpoints(self, run_id: str) -> list[CheckpointRecord]:
        """The run's checkpoints, newest first; expired ones are removed on the way."""
        found = []
        for kind in KINDS:
            for name in self._names(self.run_dir(run_id) / kind):
                record = self._unexpired(TinkerPath(run_id, kind, name))
                if record is not None:
                    found.append(record)
        return sorted(found, key=lambda record: record.created_at, reverse=True)

    def _unexpired(self, path: TinkerPath) -> CheckpointRecord | None:
        """The checkpoint's record; one that has expired is removed on the way."""
        with self._lock:  # what expired is deleted, not what has replaced it since
            record = self._record(path)
            if record is None or not record.expired:
                return record
            with contextlib.suppress(RequestError):  # another process may be quicker
                self.delete(path)
        return None

    def _names(self, folder: Path) -> set[str]:
        if not folder.is_dir():
            return set()
        names = {entry.name for entry in folder.iterdir() if not entry.is_symlink()}
        return {name.removesuffix(NEXT) for name in names if not name.startswith(UNFINISHED)}

    def update(self, path: TinkerPath, **changes: Any) -> CheckpointRecord:
        """Change fields of the record (public, expires_at) in one step."""
        with self._lock, saving(str(path)):
            record = replace(self.checkpoint(path), **changes)
            write_json(self.folder(path) / RECORD, asdict(record))
        return record

    def delete(self, path: TinkerPath) -> None:
        """Remove the checkpoint: invisible at once, its files a moment later."""
        with self._lock:
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
        """Create the session's record, or replace it; its samplers are kept beside it."""
        file = self._session_file(record.session_id)
        with saving(f"the record of session {record.session_id}"):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, asdict(record), durable=False)

    def add_sampler(self, session_id: str, sampler_id: str) -> None:
        """Note one more sampler of the session; the cost does not grow with their number."""
        file = self._session_file(session_id).with_suffix(SAMPLERS)
        with saving(f"the samplers of session {session_id}"), file.open("ab") as stream:
            stream.write(f"{sampler_id}\n".encode())

    def session(self, session_id: str) -> SessionRecord | None:
        return self._session(self._session_file(session_id))

    def sessions(self) -> list[SessionRecord]:
        """All sessions, newest first."""
        files = (self.root / "sessions").glob("*.json")
        records = [record for file in files if (record := self._session(file))]
        return sorted(records, key=lambda record: record.created_at, reverse=True)

    def _session_file(self, session_id: str) -> Path:
        return self.root / "sessions" / f"{checked_session_id(session_id)}.json"

    def _session(self, file: Path) -> SessionRecord | None:
        """The record with its samplers, each once; older records hold theirs themselves."""
        record = read_record(file, SessionRecord)
        try:
            added = file.with_suffix(SAMPLERS).read_text(encoding="utf-8").splitlines()
        except OSError:  # none has joined
            return record
        if record is None:
            return None
        return replace(record, sampler_ids=list(dict.fromkeys([*record.sampler_ids, *added])))
