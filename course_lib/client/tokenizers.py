"""How does a sampler find the tokenizer of a local model? Names taught to the SDK, in this process.

`SamplingClient.get_tokenizer` asks the Hugging Face hub for the base model's name. `course/base` is
not there and need not be: its tokenizer lies in a folder of this machine. So the SDK's one loading
function first looks the name up here; every other name goes on to the hub as before.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

LOADER = "_load_tokenizer_from_model_info"  # private; a test calls it
_folders: dict[str, str] = {}


def teach(folders: dict[str, str]) -> None:
    """Let each name lead to the tokenizer in its folder; folders that are not here are left out."""
    _folders.update({name: folder for name, folder in folders.items() if Path(folder).is_dir()})
    if _folders:
        _wrap()


def _wrap() -> None:
    from tinker.lib.public_interfaces import sampling_client, training_client

    load = getattr(sampling_client, LOADER)
    if hasattr(load, "asks_course_lib"):
        return

    @functools.wraps(load)
    def load_or_look_up(model_name: str, tokenizer_id: str | None = None) -> Any:
        name = tokenizer_id or model_name
        return load(model_name, _folders.get(name, tokenizer_id))

    load_or_look_up.asks_course_lib = True  # type: ignore[attr-defined]
    for module in (sampling_client, training_client):
        setattr(module, LOADER, load_or_look_up)
