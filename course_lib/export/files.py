"""How a file appears: whole or not at all.

Everything is written beside its place under a name ending in `.tmp`, flushed to the disk and
renamed, so a kill at any moment leaves the old file, the new file, or a `.tmp` that nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.errors import CourseError, naming

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 1 << 20


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by a file holding `data`."""
    temporary = path.with_name(path.name + ".tmp")
    with naming(path), open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replace `path` by a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        remedy = "free what it needs, or choose another place"
        raise CourseError(str(path), f"cannot be written ({error})", remedy) from None
    sync_file(temporary)
    temporary.replace(path)


def read_json(path: Path, remedy: str = "restore the file or make it again") -> dict[str, Any]:
    """The JSON object in `path`; a CourseError names a file that is missing or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CourseError(str(path), "there is no such file", "check the folder's name") from None
    except ValueError as error:
        raise CourseError(str(path), f"not JSON ({error})", remedy) from None
    if not isinstance(value, dict):
        raise CourseError(str(path), "not a JSON object, {...}", remedy)
    return value


def sync_file(path: Path) -> None:
    """Flush a file that a library wrote to the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex digest of a file of any size, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def safe_path(root: Path, name: str, place: str) -> Path:
    """`root/name` for a file name from outside; one that would leave `root` is refused."""
    parts = name.replace("\\", "/").split("/")
    if not name or any(part in ("", ".", "..") or ":" in part or "\0" in part for part in parts):
        raise CourseError(
            place,
            f"the file name {name[:80]!r} leads out of the folder",
            "do not trust this source",
        )
    return root.joinpath(*parts)


def list_files(folder: Path) -> list[str]:
    """Every file below `folder`, as sorted relative names with forward slashes; temporaries left
    out.
    """
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp")
    return sorted(path.relative_to(folder).as_posix() for path in found)
