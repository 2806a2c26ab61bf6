"""What a person has set: an environment variable, or its line in `.env`."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from course_lib.errors import CourseError

PROJECT = Path(__file__).resolve().parent.parent
SETTINGS = ("TINKER_API_KEY", "TINKER_BASE_URL", "COURSE_BACKEND", "COURSE_PRESET", "COURSE_STORE")
_QUOTED = re.compile(r"""\s*(["'])(.*?)\1\s*(?:#.*)?""")


def setting(name: str) -> str | None:
    """An environment variable, or its line in `.env`; empty counts as unset."""
    return os.environ.get(name) or read_env_file().get(name) or None


def env_file() -> Path | None:
    """The file that COURSE_ENV_FILE names (none where it is empty), else `.env` in the working
    folder, else the project's: a notebook's working folder is its own."""
    named = os.environ.get("COURSE_ENV_FILE")
    if named is not None:
        return Path(named) if named else None
    here = Path(".env")
    return here if here.exists() else PROJECT / ".env"


def read_env_file() -> dict[str, str]:
    """The `NAME=value` lines of `env_file`; no file, no lines.

    Raises:
        CourseError: it is not UTF-8 text (a byte order mark may stand before it).
    """
    return {name: _plain_value(value) for _, name, equals, value in _lines() if equals}


def misread_lines() -> list[str]:
    """What lines of `env_file` do not do although they seem to, each in a sentence; no values."""
    found = []
    for number, name, equals, _ in _lines():
        # What follows the first word may be a key, and so may the word itself.
        word = re.split(r"[\s:]", name.removeprefix("set "))[0]
        near = difflib.get_close_matches(word.upper(), SETTINGS, 1, cutoff=0.8)
        meant = near[0] if near else "NAME"
        if not equals or not name.isidentifier():
            found.append(f"{env_file()}:{number}: sets nothing; write {meant}=value")
        elif near and name not in SETTINGS:
            found.append(f"{env_file()}:{number}: {name} is no setting; perhaps {meant} is meant")
    return found


def _lines() -> Iterator[tuple[int, str, str, str]]:
    """Number, name, "=" if there is one, and value of each line that is not empty or a comment."""
    file = env_file()
    try:
        content = file.read_bytes() if file else b""
    except OSError:
        return
    for number, line in enumerate(_decode(content, file).splitlines(), start=1):
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if name and not name.startswith("#"):
            yield number, name.strip(), equals, value


def _decode(content: bytes, file: Path | None) -> str:
    try:
        text, wrong_at = content.decode("utf-8-sig"), content.find(b"\0")  # UTF-16 is full of NUL
    except UnicodeDecodeError as error:
        text, wrong_at = "", error.start
    if wrong_at >= 0:
        line = content.count(b"\n", 0, wrong_at) + 1
        raise CourseError(f"{file}:{line}", "it is not UTF-8 text", "save the file as UTF-8")
    return text


def _plain_value(text: str) -> str:
    """What is in the quotes; without quotes, what stands before a ` #`.

    >>> _plain_value("embedded  # local"), _plain_value("'a #1' # quoted"), _plain_value("a#1")
    ('embedded', 'a #1', 'a#1')
    """
    quoted = _QUOTED.fullmatch(text)
    return quoted[2] if quoted else re.sub(r"\s#.*", "", text).strip().strip("'\"")
