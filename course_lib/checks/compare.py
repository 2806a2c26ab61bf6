"""Are two answers the same, and how is one shown? Lists, arrays and tensors are alike here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

RELATIVE, ABSOLUTE = 1e-4, 1e-6  # wide enough for float32, far narrower than any mistake we name


def plain(value: Any) -> Any:
    """Arrays and tensors as nested lists, tuples as lists; the rest as it is."""
    if hasattr(type(value), "tolist"):  # numpy and torch alike, with or without a gradient
        return plain(value.tolist())
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def close(left: Any, right: Any) -> bool:
    """Equal, with numbers compared to 1e-4 relative.

    >>> close((1.0, [2]), [1.00001, (2.0,)])
    True
    >>> close("129", 129)
    False
    """
    left, right = plain(left), plain(right)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(close, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(close(left[key], right[key]) for key in left)
    if isinstance(left, int | float) and isinstance(right, int | float):
        if math.isnan(left) or math.isnan(right):
            return math.isnan(left) and math.isnan(right)
        return math.isclose(left, right, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return type(left) is type(right) and bool(left == right)


def within(tolerance: float) -> Callable[[Any, Any], bool]:
    """A comparison for predicted numbers: within `tolerance` of the right one, relative."""

    def near(left: Any, right: Any) -> bool:
        left, right = plain(left), plain(right)
        if not isinstance(left, int | float) or not isinstance(right, int | float):
            return False
        return math.isclose(left, right, rel_tol=tolerance, abs_tol=1e-9)

    return near


def describe(value: Any, width: int = 90) -> str:
    """A value in a few characters, floats to four figures.

    >>> describe([1/3, 2])
    '[0.3333, 2]'
    """
    text = _text(plain(value))
    return text if len(text) <= width else text[: width - 4] + " ..."


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value + 0.0:.4g}"  # + 0.0: no "-0"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_text(item)}" for key, item in value.items()) + "}"
    if value is None or isinstance(value, str | int):
        return repr(value)
    return f"a {type(value).__name__}"  # never an address: it would differ from run to run
