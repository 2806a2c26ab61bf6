"""Checks of a dataclass's fields that name field, value and range; override texts as values."""

from __future__ import annotations

import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable
from reprlib import repr as short
from typing import Any

from course_lib.errors import CourseError


def kinds(config: Any) -> dict[str, Any]:
    """Field name -> type of a dataclass instance."""
    return typing.get_type_hints(type(config))


def parse(kind: Any, text: str, place: str) -> Any:
    """The text of an override as a value of the field's type."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and text.lower() in ("none", ""):
        return None
    if str in options:
        return text
    if bool in options and text in ("True", "False"):  # as Python writes them
        text = text.lower()
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # a number of 5,000 digits, a list 5,000 deep, too
        value = text
    if kind is float and isinstance(value, str):  # TOML wants 1.0e-4, people write 1e-4 and .5
        try:
            value = float(value)
        except ValueError:
            raise CourseError(place, f"{text!r} is no number", "write e.g. 0.0004") from None
    return value


def check_types(config: Any) -> None:
    """TOML and overrides can bring any type: say which field is wrong before it is used."""
    for name, kind in kinds(config).items():
        value = getattr(config, name)
        options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        plain = tuple(typing.get_origin(option) or option for option in options)
        if plain == (float,) and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(config, name, float(str(value)))  # inf where float(value) raises
        elif not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
            wanted = " or ".join(getattr(option, "__name__", str(option)) for option in plain)
            place = f"{type(config).__name__}.{name}"
            raise CourseError(place, f"{short(value)} is {type(value).__name__}", f"give {wanted}")


def check_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """The field holds one of `choices`."""
    value = getattr(config, name)
    if value not in choices:
        place = f"{type(config).__name__}.{name}"
        raise CourseError(place, f"{value!r} is unknown", did_you_mean(value, choices))


def check_range(config: Any, name: str, low: float, high: float) -> None:
    """The field lies in [low, high]; NaN does not."""
    value = getattr(config, name)
    if not low <= value <= high or math.isnan(value):
        place = f"{type(config).__name__}.{name}"
        raise CourseError(place, f"{value} is out of range", f"use {low} to {high:g}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The remedy for a misspelt word: the names near it, else all of them.

    >>> did_you_mean("quik", ["tiny", "quick", "full"])
    'did you mean quick?'
    """
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return "did you mean " + ", ".join(near) + "?" if near else "use " + ", ".join(known)
