"""Exercises that judge in words: `check`, `hint`, `progress`. Nothing leaves the machine."""

from course_lib.checks.desk import check, hint, progress
from course_lib.checks.exercise import NOT_ATTEMPTED, Exercise, Mutant, Property

__all__ = ["NOT_ATTEMPTED", "Exercise", "Mutant", "Property", "check", "hint", "progress"]
