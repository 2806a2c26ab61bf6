"""Post-training language models with the real tinker SDK, on your own machine.

    from course_lib import check, connect, preset

Each name is imported when it is first used (PEP 562), so that `import course_lib` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from course_lib.checks import check, hint, progress
    from course_lib.client import connect
    from course_lib.config import preset
    from course_lib.errors import CourseError

__all__ = ["CourseError", "check", "connect", "hint", "preset", "progress"]

_HOME = {
    "CourseError": "errors",
    "check": "checks",
    "connect": "client",
    "hint": "checks",
    "preset": "config",
    "progress": "checks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
