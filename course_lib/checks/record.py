"""Remember on this machine what was solved and which hints were read."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from course_lib.files import write_whole


@dataclass(frozen=True)
class Entry:
    """What one exercise has seen of its learner."""

    solved: bool = False
    tries: int = 0  # verdicts other than "not attempted"
    hints: int = 0  # 0..3


def progress_path() -> Path:
    """`COURSE_PROGRESS`, else `.course/progress.json` in the checkout, else in the home folder."""
    if os.environ.get("COURSE_PROGRESS"):
        return Path(os.environ["COURSE_PROGRESS"])
    root = Path(__file__).resolve().parents[2]
    home = root if (root / "notebooks").is_dir() and os.access(root, os.W_OK) else Path.home()
    return home / ".course" / "progress.json"


def read_progress() -> dict[str, Entry]:
    """Exercise id -> entry. A missing file counts as empty, and so does what cannot be read of it:
    it is not worth an error."""
    stored = _stored() or {}
    return {id: read for id, entry in stored.items() if (read := _entry(entry)) is not None}


def write_entry(id: str, entry: Entry) -> None:
    """Replace one entry, atomically; what else the file holds stays. A damaged file is laid aside
    first, as progress.json.damaged. A disk that refuses is passed over in silence."""
    path = progress_path()
    with contextlib.suppress(OSError):
        stored = _stored()
        if stored is None:
            path.replace(path.with_name(f"{path.name}.damaged"))
        entries = {**(stored or {}), id: asdict(entry)}
        write_whole(path, json.dumps(entries, indent=1, sort_keys=True) + "\n", durable=False)


def _stored() -> dict[str, Any] | None:
    """What the file holds; None if that is no JSON object."""
    try:
        stored = json.loads(progress_path().read_text(encoding="utf-8"))
    except OSError:
        return {}
    except (ValueError, RecursionError):
        return None
    return stored if isinstance(stored, dict) else None


def _entry(stored: Any) -> Entry | None:
    if not isinstance(stored, dict):
        return None
    wanted = {name: type(default) for name, default in asdict(Entry()).items()}
    known = {name: stored[name] for name in wanted if name in stored}
    sound = all(type(value) is wanted[name] for name, value in known.items())
    return Entry(**known) if known and sound else None
