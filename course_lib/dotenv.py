"""What a person has set: an environment variable, or its line in `.env`."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


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
    """The `NAME=value` lines of `env_file`."""
    file = env_file()
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file else []
    except (OSError, ValueError):
        return {}
    values = {}
    for line in lines:
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not name.startswith("#"):
            values[name.strip()] = value.strip().strip("'\"")
    return values
