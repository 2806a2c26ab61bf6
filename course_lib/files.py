"""How does a file appear? Whole or not at all.

It is written beside its place under a name ending in `.tmp`, flushed to the disk and renamed, so
that a kill at any moment leaves the old file, the new file, or a `.tmp` that nobody reads.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from course_lib.errors import naming


def write_whole(
    path: str | Path, data: str | bytes, durable: bool = True, folders: bool = True
) -> None:
    """Make or replace a file, with the folders that lead to it; text becomes UTF-8. Not `durable`:
    it may be the old one again after a power cut. Not `folders`: its folder must be there.

    Raises:
        OSError: names `path`, not the draft.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with naming(path):
        if folders:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(draft, "wb") as file:
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Have a file, or a folder's entries, on the disk before going on; Windows has no such call for
    folders and needs none."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
