"""Which model is served under which name? Loading, aliases, and where the tokenizers are found.

The SDK loads a sampler's tokenizer from the Hugging Face hub by the base model's name alone.
`tokenizer_home` lays out a small HF home in which each served name leads to its own tokenizer, for
programs that run elsewhere on this machine: `HF_HOME=... HF_HUB_OFFLINE=1 python program.py`.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from course_lib.engine.runs import Model
from course_lib.errors import CourseError
from course_lib.startup import uninterrupted, without_collecting

BASE_NAME = "course/base"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,2}", re.ASCII)
_WHOLE = 256 * 2**20  # bytes of a file up to which all of it goes into the model's fingerprint
_PROBE, _PROBES = 65_536, 256  # of a larger one so many bytes at so many places
_KIND = "2:"  # begins a fingerprint of these places; older ones begin with nothing
_REVISION = "0" * 40


def shipped_model() -> Path:
    """The base model that comes with the course."""
    return Path(__file__).resolve().parents[2] / "data" / "base-model"


@without_collecting()
def load_models(
    model: str | Path | None = None, aliases: dict[str, str] | None = None
) -> dict[str, Model]:
    """Load each folder or hub name once, and give it all its names."""
    with uninterrupted():
        from course_lib.engine.cores import apart
        from course_lib.engine.memory import keep_freed_memory
        from course_lib.engine.model import BaseModel

    keep_freed_memory()
    keep_quiet()
    wanted = {BASE_NAME: str(model or shipped_model()), **(aliases or {})}
    loaded: dict[str, tuple[Any, str]] = {}
    models = {}
    for name, source in wanted.items():
        if not _NAME.fullmatch(name):
            raise CourseError(f"--alias {name}", "not a model name", "use a name like org/model")
        key = str(Path(source).resolve()) if Path(source).exists() else source
        if key not in loaded:
            base = apart(BaseModel.load, source, name)
            loaded[key] = base, fingerprint(Path(base.tokenizer_path))
        models[name] = Model(name, *loaded[key])
    return models


def keep_quiet() -> None:
    """Silence what the libraries say on stderr without need: a notebook shows it in red."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for message in (
        "Model has `tie_word_embeddings=True` and a tied layer",  # our adapters handle tied weights
        "`is_gradient_checkpointing` is deprecated",  # peft's use of transformers
    ):
        warnings.filterwarnings("ignore", message=message)


def fingerprint(folder: Path) -> str:
    """A short digest of a model's files, by which a checkpoint knows its base model again.

    A file that takes too long to read at every start is probed from end to end: no training
    leaves all those places as they were.
    """
    return _KIND + _digest(folder, _places)


def knows_again(written: str, model: Model) -> bool:
    """Whether a checkpoint's fingerprint is this model's. Old ones saw both ends of a file only."""
    if written == model.fingerprint or written.startswith(_KIND):
        return written == model.fingerprint
    folder = Path(model.base.tokenizer_path)
    return written == _digest(folder, lambda size: [0, max(0, size - _PROBE)])


def _places(size: int) -> Iterable[int]:
    if size <= _WHOLE:
        return range(0, size, _PROBE)
    return [(size - _PROBE) * probe // (_PROBES - 1) for probe in range(_PROBES)]


def _digest(folder: Path, places: Callable[[int], Iterable[int]]) -> str:
    digest = hashlib.sha256()
    for file in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]:
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}:".encode())
            with file.open("rb") as stream:
                for place in places(size):
                    stream.seek(place)
                    digest.update(stream.read(_PROBE))
    return digest.hexdigest()[:16]


def hub_name(name: str) -> str:
    """The hub repository from which the SDK loads a base model's tokenizer."""
    if name.startswith("meta-llama/Llama-3"):
        return "thinkingmachineslabinc/meta-llama-3-instruct-tokenizer"
    return "/".join(name.split("/")[:2])


def tokenizer_home(home: Path, models: dict[str, Model]) -> Path:
    """Lay out `home` as an HF home that holds the tokenizer of every served name."""
    for name, model in models.items():
        folder = home / "hub" / f"models--{hub_name(name).replace('/', '--')}"
        snapshot = folder / "snapshots" / _REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(_REVISION)
        for file in Path(model.base.tokenizer_path).iterdir():
            if file.suffix in (".json", ".jinja", ".model", ".txt"):
                shutil.copyfile(file, snapshot / file.name)
    return home
