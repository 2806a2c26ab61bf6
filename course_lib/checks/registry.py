"""Where the exercises are: one module per lesson, imported when first asked for."""

from __future__ import annotations

from importlib import import_module

from course_lib.checks.exercise import Exercise

LESSONS = {
    "00": "Start here",
    "01": "Data",
    "02": "LoRA",
    "03": "SFT and checkpoints",
    "04": "Rewards",
    "05": "GRPO",
    "06": "Importance sampling",
    "07": "Stability",
    "08": "Evaluate and scale",
    "09": "Deploy",
    "10": "Clinic and capstone",
}


def exercises(lesson: str) -> list[Exercise]:
    """The exercises of one lesson ("05"), in order; an unknown lesson has none."""
    if lesson not in LESSONS:
        return []
    return import_module(f"course_lib.checks.lesson_{lesson}").EXERCISES


def every_exercise() -> list[Exercise]:
    """All exercises of the course."""
    return [exercise for lesson in LESSONS for exercise in exercises(lesson)]


def find(id: str) -> Exercise | None:
    """The exercise with this id, or None."""
    return next((exercise for exercise in exercises(str(id)[:2]) if exercise.id == id), None)
