"""What may a name be? Names, ids and `tinker://` paths that arrive from outside are checked here.

Everything that later becomes a part of a file path has passed one of these functions, so that no
`..`, absolute path, NUL, drive letter or 10 kB name ever reaches the file system.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from course_lib.engine.requests import RequestError

KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
MAX_NAME = 200  # characters; a file name may have 255 bytes, and ours get a short suffix

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,199}", re.ASCII)
_SESSION_ID = re.compile(r"[A-Za-z0-9_]{1,64}", re.ASCII)
_RUN_ID = re.compile(r"([A-Za-z0-9_]{1,64}):train:([0-9]{1,9})", re.ASCII)
_WINDOWS_DEVICES = {"con", "prn", "aux", "nul"} | {
    f"{device}{digit}" for device in ("com", "lpt") for digit in "123456789"
}


@dataclass(frozen=True)
class TinkerPath:
    """`tinker://<run>/<kind>/<name>`, taken apart and checked."""

    run_id: str
    kind: str  # a key of KINDS
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        return f"{self.kind}/{self.name}"


def shown(text: object) -> str:
    """The text as an error message may quote it: escaped, and never longer than a line."""
    quoted = repr(text)
    return quoted if len(quoted) <= 80 else quoted[:76] + "...'"


def checked_name(name: str) -> str:
    """The checkpoint name itself, when it is one that every file system can hold."""
    if not _NAME.fullmatch(name) or name.endswith("."):
        raise RequestError(
            f"The checkpoint name {shown(name)} cannot be used: take 1 to {MAX_NAME} letters, "
            "digits, '.', '_', '-', '=' or '+', beginning with a letter, digit or '_'"
        )
    if name.split(".")[0].lower() in _WINDOWS_DEVICES:
        raise RequestError(f"The checkpoint name {shown(name)} is reserved on Windows")
    return name


def checked_run_id(run_id: str) -> str:
    """The run id itself, when it has the form `<session>:train:<number>`."""
    if not _RUN_ID.fullmatch(run_id):
        raise RequestError(f"{shown(run_id)} is not a training run id (<session>:train:<number>)")
    return run_id


def checked_session_id(session_id: str) -> str:
    """The session id itself, when it is one that this engine could have given out."""
    if not _SESSION_ID.fullmatch(session_id):
        raise RequestError(f"{shown(session_id)} is not a session id")
    return session_id


def run_id_of(session_id: str, model_seq_id: int) -> str:
    """The id that the SDK derives, too: the server has no choice in it."""
    return checked_run_id(f"{session_id}:train:{model_seq_id}")


def run_folder(run_id: str) -> str:
    """The run's folder name: ':' is not allowed on Windows, and '-' occurs in no session id."""
    return checked_run_id(run_id).replace(":", "-")


def parse_path(path: str) -> TinkerPath:
    """Take a `tinker://` path apart, or say what is wrong with it."""
    parts = path.removeprefix("tinker://").split("/")
    if not path.startswith("tinker://") or len(parts) != 3 or parts[1] not in KINDS:
        raise RequestError(
            f"{shown(path)} is not a checkpoint path: it reads "
            f"tinker://<run>/<{'|'.join(KINDS)}>/<name>"
        )
    return TinkerPath(checked_run_id(parts[0]), parts[1], checked_name(parts[2]))
