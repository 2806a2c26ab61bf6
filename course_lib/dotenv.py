"""What a person has set: an environment variable, or its line in `.env`."""

from __future__ import annotations

import os
from pathlib import Path


def setting(name: str) -> str | None:
    """An environment variable, or its line in `.env`; empty counts as unset."""
    return os.environ.get(name) or read_env_file().get(name) or None


def read_env_file() -> dict[str, str]:
    """The `NAME=value` lines of `.env` in the working folder (COURSE_ENV_FILE names another)."""
    file = os.environ.get("COURSE_ENV_FILE", ".env")
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines() if file else []
    except (OSError, ValueError):
        return {}
    values = {}
    for line in lines:
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not name.startswith("#"):
            values[name.strip()] = value.strip().strip("'\"")
    return values
