"""What a notebook shows: figures with their words, sources, and widgets over the same figures.

Each name is imported when it is first used: a lesson that shows one picture loads no ipywidgets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from course_lib.widgets.chat import Chat
    from course_lib.widgets.display import show, show_source
    from course_lib.widgets.explorers import (
        clip_explorer,
        group_explorer,
        kl_sampler,
        lora_explorer,
        luck_explorer,
        mask_viewer,
        reward_designer,
    )
    from course_lib.widgets.live import LiveTraining

_HOME = {
    "Chat": "chat",
    "LiveTraining": "live",
    "clip_explorer": "explorers",
    "group_explorer": "explorers",
    "kl_sampler": "explorers",
    "lora_explorer": "explorers",
    "luck_explorer": "explorers",
    "mask_viewer": "explorers",
    "reward_designer": "explorers",
    "show": "display",
    "show_source": "display",
}

__all__ = [
    "Chat",
    "LiveTraining",
    "clip_explorer",
    "group_explorer",
    "kl_sampler",
    "lora_explorer",
    "luck_explorer",
    "mask_viewer",
    "reward_designer",
    "show",
    "show_source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
