"""A deploy folder: finished versions side by side, one of them current, and one step back.

DIR/current.json     {"version": "v2"}: which one is served; replaced in one step
DIR/v1/, DIR/v2/     finished versions; each came into being by one rename
  model/             the merged model and its card: what is served and uploaded
  adapter/           the adapter in PEFT's layout
  deploy.json        what it was made from, how it was verified, and every file's sha256
DIR/.work/           what a stopped deploy goes on from; nobody serves from it
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from course_lib.errors import CourseError
from course_lib.export.files import (
    list_files,
    read_json,
    sha256_file,
    write_json,
)
from course_lib.files import sync

CURRENT, RECORD, WORK, LOCK = "current.json", "deploy.json", ".work", "lock"


def finish_version(build: Path, version: Path, record: dict[str, Any]) -> Path:
    """Turn the folder `build` into the finished `version` of its deploy folder, in one rename."""
    for leftover in build.rglob("*.tmp"):
        leftover.unlink()
    names = [name for name in list_files(build) if name != RECORD]
    write_json(build / RECORD, record | {"files": {n: sha256_file(build / n) for n in names}})
    for name in names:
        sync(build / name)
    for folder in [build, *(path for path in build.rglob("*") if path.is_dir())]:
        sync(folder)
    os.rename(build, version)
    sync(version.parent)
    return version


def next_version(out: Path) -> Path:
    """The folder that the next finished version will be."""
    return out / f"v{max(_numbers(out), default=0) + 1}"


def read_record(version: Path) -> dict[str, Any]:
    """A finished version's deploy.json."""
    remedy = f"restore the file, or delete {version} and run posttrain deploy again"
    return read_json(version / RECORD, remedy)


def find_version(out: Path, key: str) -> Path | None:
    """The finished version that was made from the inputs named `key`, if there is one."""
    for number in sorted(_numbers(out), reverse=True):
        if read_record(out / f"v{number}").get("key") == key:
            return out / f"v{number}"
    return None


def current_version(out: str | Path) -> Path:
    """The version that `posttrain serve DIR` serves."""
    out = Path(out)
    if not (out / CURRENT).exists():
        finding = (
            "a deploy was begun here and not finished"
            if (out / WORK).exists()
            else "nothing is deployed here"
        )
        raise CourseError(str(out), finding, "run posttrain deploy --out with this folder")
    remedy = 'write {"version": "v1"} into it (or the one to serve), or run posttrain deploy again'
    version = out / str(read_json(out / CURRENT, remedy).get("version"))
    if version.parent != out or not (version / RECORD).exists():
        raise CourseError(
            str(out / CURRENT),
            f"{version.name} is not a finished version",
            "run posttrain deploy again",
        )
    return version


@contextmanager
def leaving_no_empty_work(out: Path) -> Iterator[None]:
    """A deploy that fails before it has a file leaves no folder that was not there before."""
    work = out / WORK
    made = [folder for folder in (work, out, *out.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        if work.is_dir():
            _remove_empty(work, also_lock=work in made)
        with suppress(OSError):  # the first that holds something keeps those above it
            for folder in made:
                folder.rmdir()
        raise


def use_version(out: Path, version: Path) -> None:
    """Make a finished version the current one."""
    write_json(out / CURRENT, {"version": version.name})


def rollback(out: str | Path) -> Path:
    """Make the version before the current one current; returns it. Nothing is deleted, so deploying
    goes forward. A version with a lost or changed file is refused.
    """
    out = Path(out)
    number = int(current_version(out).name[1:])
    earlier = [each for each in _numbers(out) if each < number]
    if not earlier:
        raise CourseError(
            str(out), f"v{number} is the first version", "there is nothing to go back to"
        )
    previous = out / f"v{max(earlier)}"
    check_version(previous)
    use_version(out, previous)
    return previous


def model_folder(path: str | Path) -> Path:
    """The Hugging Face folder that `path` means: a deploy folder's current model, or a model folder
    itself.
    """
    path = Path(path)
    if (path / "config.json").exists():
        return path
    if (path / RECORD).exists():
        return path / "model"
    return current_version(path) / "model"


def check_version(version: str | Path) -> None:
    """Raise CourseError when a finished version's files are no longer those that were verified."""
    version = Path(version)
    files = read_record(version).get("files")
    if not isinstance(files, dict):
        remedy = "restore the file, or run posttrain deploy again"
        raise CourseError(str(version / RECORD), "does not list the version's files", remedy)
    for name, digest in files.items():
        if not (version / name).exists() or sha256_file(version / name) != digest:
            raise CourseError(
                str(version / name),
                "is not the file that was verified",
                "run posttrain deploy again",
            )


def _remove_empty(work: Path, *, also_lock: bool) -> None:
    """Remove the empty folders below `work`, unless a deploy is at work there."""
    with suppress(OSError, Timeout), FileLock(work / LOCK, timeout=0):
        for folder in sorted((path for path in work.rglob("*") if path.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()
        if also_lock and [path.name for path in work.iterdir()] == [LOCK]:
            (work / LOCK).unlink()


def _numbers(out: Path) -> list[int]:
    names = [path.name for path in out.glob("v*") if (path / RECORD).exists()]
    return [int(name[1:]) for name in names if name[1:].isdigit()]
