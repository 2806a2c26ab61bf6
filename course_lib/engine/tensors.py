"""How are weights written? Safetensors in PEFT's layout; a fault is told as one sentence.

An adapter folder made here is one that `peft.PeftModel.from_pretrained(model, folder)` reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.engine.records import UNFINISHED, saving, stale
from course_lib.engine.requests import RequestError

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER, CONFIG, OPTIMIZER = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
)


def write_adapter(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write PEFT's two files."""
    write_tensors(folder / ADAPTER, state)
    text = json.dumps(config, indent=1, default=_plain)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def write_tensors(file: Path, state: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        save_file(contiguous, file, metadata={"format": "pt"})
    except SafetensorError as error:  # the library wraps the system's error, a full disk included
        raise OSError(0, str(error)) from error


def read_tensors(file: Path, what: str) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        RequestError: it is missing, unreadable, truncated or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise RequestError(f"{what}: {file.name} cannot be read: {error}") from error


class Scratch:
    """A folder of this process for weights that are parked; others remove it once we are gone."""

    def __init__(self, root: Path) -> None:
        self._parent = root / "scratch"
        self._parent.mkdir(parents=True, exist_ok=True)
        self._sweep()
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        part = self._parent / (UNFINISHED + name)
        part.mkdir()
        self._lock = (part / "lock").open("w")
        # Before the folder has a name that others sweep.
        if _try_lock(self._lock) is None:
            self._lock.close()  # Windows renames no folder while a file in it is open
        self.folder = part.rename(self._parent / name)

    def write(self, name: str, state: dict[str, Tensor]) -> None:
        with saving(f"the parked weights {name}"):
            write_tensors(self.folder / f"{name}.safetensors", state)

    def read(self, name: str) -> dict[str, Tensor]:
        return read_tensors(self.folder / f"{name}.safetensors", "Parked weights")

    def remove(self, name: str) -> None:
        (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def close(self) -> None:
        self._lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what killed processes left behind: their lock went with them."""
        for folder in self._parent.iterdir():
            with contextlib.suppress(OSError):  # another process may be quicker
                if _abandoned(folder):
                    shutil.rmtree(folder, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    if folder.name.startswith(UNFINISHED):  # its lock may not be taken yet
        return stale(folder)
    with (folder / "lock").open("r+") as lock:
        free = _try_lock(lock)
    return stale(folder) if free is None else free


def _try_lock(stream: Any) -> bool | None:
    """Take the file's lock without waiting; None where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
