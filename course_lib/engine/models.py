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
from pathlib import Path
from typing import Any

from course_lib.engine.runs import Model
from course_lib.errors import CourseError
from course_lib.startup import without_collecting

BASE_NAME = "course/base"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,2}", re.ASCII)
_PROBE = 65_536  # bytes at either end of a weights file that go into its fingerprint
_REVISION = "0" * 40


def shipped_model() -> Path:
    """The base model that comes with the course."""
    return Path(__file__).resolve().parents[2] / "data" / "base-model"


@without_collecting()
def load_models(
    model: str | Path | None = None, aliases: dict[str, str] | None = None
) -> dict[str, Model]:
    """Load each folder or hub name once, and give it all its names."""
    from course_lib.engine.cores import apart
    from course_lib.engine.memory import keep_freed_memory
    from course_lib.engine.model import BaseModel

    keep_freed_memory()
    keep_quiet()
    wanted = {BASE_NAME: str(model or shipped_model()), **(aliases or {})}
    loaded: dict[str, Any] = {}
    models = {}
    for name, source in wanted.items():
        if not _NAME.fullmatch(name):
            raise CourseError(f"--alias {name}", "not a model name", "use a name like org/model")
        key = str(Path(source).resolve()) if Path(source).exists() else source
        if key not in loaded:
            loaded[key] = apart(BaseModel.load, source, name)
        models[name] = Model(name, loaded[key], fingerprint(Path(loaded[key].tokenizer_path)))
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

    Of large files only size and both ends are read: enough to tell two trainings apart.
    """
    digest = hashlib.sha256()
    for file in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]:
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}:".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_PROBE))
                stream.seek(max(0, size - _PROBE))
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
