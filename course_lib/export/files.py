"""What do JSON, tensors and file names need here? To be written whole, read with a sentence where
they are damaged, and kept within their folder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.errors import CourseError, naming
from course_lib.files import sync, write_whole

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 1 << 20


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replace `path` by a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with naming(path):
        temporary.touch()
    mode = temporary.stat().st_mode  # safetensors takes everybody else's right to read away
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        remedy = "free what it needs, or choose another place"
        raise CourseError(str(path), f"cannot be written ({error})", remedy) from None
    temporary.chmod(mode)
    sync(temporary)
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
