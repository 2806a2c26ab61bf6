"""Where does the time of a step go? A profile of one row, with the SDK and the engine running.

    python tests/benchmarks/where.py sft
    python tests/benchmarks/where.py grpo

Two tables: processor time by thread, and for the engine's compute thread the share of moments (a
look every millisecond) spent below each function, named by the innermost frame of course_lib and by
the package whose code was running. `PYTHONPATH=` another checkout profiles an earlier state.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ours
from rows import DUELS, OURS

COMPUTE = "engine-compute"
WARM_UPS, LAPS = 5, 25
PACKAGES = ("peft", "transformers", "torch", "numpy", "tinker")


class Stopwatch:
    """A gate that profiles the laps after the warm-up and then ends the process."""

    def __init__(self, name: str) -> None:
        self.name, self.laps = name, 0
        self.places: Counter[str] = Counter()
        self.looking = False
        self.began, self.cpu = 0.0, Counter[str]()
        threading.Thread(target=self.look, daemon=True, name="profiler").start()

    def lap(self, **facts: Any) -> None:
        self.laps += 1
        if self.laps == WARM_UPS:
            self.began, self.cpu, self.looking = time.perf_counter(), cpu_by_thread(), True
        elif self.laps == WARM_UPS + LAPS:
            self.looking = False
            self.report((time.perf_counter() - self.began) / LAPS)
            sys.stdout.flush()
            os._exit(0)

    def look(self) -> None:
        """Note every millisecond what the compute thread is doing."""
        while True:
            time.sleep(0.001)
            ids = {thread.name: thread.ident for thread in threading.enumerate()}
            frame = sys._current_frames().get(ids.get(COMPUTE) or 0)
            if self.looking and frame is not None:
                self.places[place(frame)] += 1

    def report(self, seconds: float) -> None:
        print(f"{self.name}: {1000 * seconds:.0f} ms a lap")
        print("\n| thread | CPU ms a lap |\n| --- | --- |")
        for thread, ticks in (cpu_by_thread() - self.cpu).most_common():
            spent = 1000 * ticks / os.sysconf("SC_CLK_TCK") / LAPS
            if spent >= 1:
                print(f"| {thread} | {spent:.0f} |")
        busy = Counter({key: n for key, n in self.places.items() if "worker.py" not in key})
        print("\n| compute thread, below | share |\n| --- | --- |")
        for key, count in busy.most_common(14):
            print(f"| {key} | {count / busy.total():.0%} |")


def place(frame: FrameType | None) -> str:
    """`file: function (package)`: our innermost frame, and whose code it was running."""
    package = None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "course_lib" in path.parts:
            return f"{path.name}: {frame.f_code.co_qualname} ({package or 'itself or torch'})"
        package = package or next((name for name in PACKAGES if name in path.parts), None)
        frame = frame.f_back
    return "elsewhere"


def cpu_by_thread() -> Counter[str]:
    """Clock ticks of processor time so far, by thread name (Linux)."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    ticks: Counter[str] = Counter()
    for stat in Path("/proc/self/task").glob("*/stat"):
        fields = stat.read_text().rpartition(")")[2].split()
        name = names.get(int(stat.parent.name), "torch's workers and others")
        name = "the SDK's thread" if "_background" in name else name
        ticks[name] += int(fields[11]) + int(fields[12])
    return ticks


if __name__ == "__main__":
    chosen = DUELS[sys.argv[1]]
    function = getattr(ours, chosen.sides[OURS][0].partition(":")[2])
    function(Stopwatch(chosen.name), **chosen.options)
