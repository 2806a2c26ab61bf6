"""The card of a lesson: measured time, memory and cores, from solutions/measured.json.

Measurements live in that one file, so the card is made like every other cell and the parity test
needs no exception for it. A new measurement replaces the old one only if it is clearly different:
otherwise every build would change every card.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).resolve().parent.parent / "solutions" / "measured.json"
PRESETS = ("tiny", "quick", "full")
CLEARLY = 1.3  # times
Measurements = dict[str, dict[str, dict[str, Any]]]  # lesson -> preset -> numbers


def read_measurements() -> Measurements:
    """Everything measured so far."""
    return json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}


def keep_measurement(lesson: str, preset: str, measured: dict[str, Any]) -> bool:
    """Write a lesson's measurement, unless the one on file says nearly the same; was it written?"""
    everything = read_measurements()
    old = everything.get(lesson, {}).get(preset)
    if old and not _differs(old, measured):
        return False
    everything.setdefault(lesson, {})[preset] = measured
    draft = MEASURED.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    draft.replace(MEASURED)  # whole or not at all: two builds may run side by side
    return True


def _differs(old: dict[str, Any], new: dict[str, Any]) -> bool:
    if old["machine"] != new["machine"]:
        return True
    pairs = [(old[key], new[key]) for key in ("seconds", "peak_mb", "slowest_cell_s")]
    return any(max(pair) > CLEARLY * min(pair) + 2 for pair in pairs)


def card(lesson: str, measurements: Measurements) -> str:
    """The Markdown of the card."""
    measured = measurements.get(lesson, {})
    rows = [
        _row(preset, measured[preset]) if preset in measured else _unmeasured(preset)
        for preset in PRESETS
    ]
    machines = sorted({numbers["machine"] for numbers in measured.values()})
    where = f"Measured by `make notebooks` on a {' and a '.join(machines)}. " if machines else ""
    choice = "Choose with the environment variable `COURSE_PRESET`; without it, tiny."
    return "\n".join(
        [
            "**Run All takes**",
            "",
            "| preset | time | slowest cell | memory | cores busy |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            where + choice,
        ]
    )


def _row(preset: str, numbers: dict[str, Any]) -> str:
    memory = f"{numbers['peak_mb'] / 1000:.1f} GB"
    times = [_duration(numbers[key]) for key in ("seconds", "slowest_cell_s")]
    return f"| {preset} | {times[0]} | {times[1]} | {memory} | {numbers['cores']:.1f} |"


def _unmeasured(preset: str) -> str:
    return f"| {preset} | not measured | | | |"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def machine() -> str:
    """This machine in general words, e.g. "2-core AMD EPYC, 24 GB": nothing that names it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores}-core {_processor()}, {_memory_gb():.0f} GB"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    words = name.replace("(R)", "").replace("(TM)", "").split(" with ")[0].split("@")[0].split()
    return " ".join(word for word in words[:3] if not word.endswith("-Core"))


def _memory_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return 0.0
