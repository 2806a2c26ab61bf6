"""Remember on this machine what was solved and which hints were read."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from course_lib.files import write_whole


@dataclass(frozen=True)
class Entry:
    """What one exercise has seen of its learner."""

    solved: bool = False
    tries: int = 0  # verdicts other than "not attempted"
    hints: int = 0  # 0..3


def progress_path() -> Path:
    """`COURSE_PROGRESS`, else `.course/progress.json` in the checkout, else in the home folder."""
    if "COURSE_PROGRESS" in os.environ:
        return Path(os.environ["COURSE_PROGRESS"])
    root = Path(__file__).resolve().parents[2]
    home = root if (root / "notebooks").is_dir() and os.access(root, os.W_OK) else Path.home()
    return home / ".course" / "progress.json"


def read_progress() -> dict[str, Entry]:
    """Exercise id -> entry. A missing or damaged file counts as empty: it is not worth an error."""
    try:
        stored = json.loads(progress_path().read_text(encoding="utf-8"))
        return {id: Entry(**entry) for id, entry in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_entry(id: str, entry: Entry) -> None:
    """Replace one entry, atomically. A disk that refuses is passed over in silence."""
    entries = read_progress() | {id: entry}
    text = json.dumps({id: asdict(entry) for id, entry in sorted(entries.items())}, indent=1)
    with contextlib.suppress(OSError):
        write_whole(progress_path(), text + "\n", durable=False)
