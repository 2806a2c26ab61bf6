"""Who is faster? Contenders in processes of their own, which work in turn, never at once.

Each contender is a function that sets itself up and then calls `gate.lap()` between pieces of work.
At the gate it reports how long the piece took and sleeps until it is told to go on. So two programs
that each want to own their loop (as TRL's trainers do) can be measured in interleaved rounds, on
one machine, with a peak of memory for each.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FEWEST = 5  # rounds, whatever the time they take: a median of fewer says little
ANSWER_S = 600  # a lap that takes longer is given up


class Stop(BaseException):
    """The measurement is over; not an Exception, so that no trainer swallows it."""


class Gate:
    """Where a contender waits between laps."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.began: float | None = None
        self.cpu = 0.0

    def lap(self, seconds: float | None = None, **facts: Any) -> None:
        """End a piece of work: report it, wait for the order to do the next."""
        took = time.perf_counter() - self.began if self.began else 0.0
        cpu = time.process_time() - self.cpu
        took = took if seconds is None else seconds
        report = {"seconds": took, "cpu_s": cpu, "peak_mib": peak_mib(), **facts}
        self.pipe.send(report)
        if self.pipe.recv() == "stop":
            raise Stop
        self.began, self.cpu = time.perf_counter(), time.process_time()


@dataclass
class Contender:
    """One function `module:name(gate, **options)` in its process, and what it has reported."""

    name: str
    target: str
    options: dict[str, Any]
    laps: int = 1  # of one round
    process: Any = None
    pipe: Any = None
    log: Any = None
    rounds: list[float] = field(default_factory=list)  # seconds: the median lap of each
    cpu_s: list[float] = field(default_factory=list)  # processor seconds of every lap
    peak_mib: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.log = tempfile.NamedTemporaryFile("w+", prefix="bench-", suffix=".log")  # noqa: SIM115
        arguments = (self.target, theirs, self.options, self.log.name)
        self.process = context.Process(target=enter, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.hear()

    def hear(self) -> float:
        """Wait for the end of the lap; its seconds."""
        try:
            if not self.pipe.poll(ANSWER_S):
                raise EOFError
            report = self.pipe.recv()
        except EOFError:
            tail = "\n".join(Path(self.log.name).read_text().splitlines()[-15:])
            self.process.join(5)
            code = self.process.exitcode
            raise RuntimeError(f"{self.name} fell over (exit code {code}):\n{tail}") from None
        self.peak_mib = report.pop("peak_mib")
        seconds = report.pop("seconds")
        self.facts |= report
        return seconds

    def go(self) -> float:
        self.pipe.send("go")
        return self.hear()

    def round(self) -> None:
        laps = []
        for _ in range(self.laps):
            laps.append(self.go())
            self.cpu_s.append(self.facts.pop("cpu_s"))
        self.rounds.append(sorted(laps)[len(laps) // 2])

    def stop(self) -> None:
        try:
            self.pipe.send("stop")
            self.process.join(10)
        except OSError:
            pass
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)
        self.log.close()


def enter(target: str, pipe: Connection, options: dict[str, Any], log: str) -> None:
    """The body of a contender's process: whatever it prints goes to a file."""
    sink = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    module, name = target.split(":")
    try:
        getattr(importlib.import_module(module), name)(Gate(pipe), **options)
    except (Stop, EOFError, BrokenPipeError):
        pass
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        pipe.close()
    os._exit(0)  # threads of a server or a data loader have nothing left to do


@contextmanager
def started(contenders: list[Contender]) -> Iterator[None]:
    """All contenders set up, one after the other, and ended whatever happens."""
    try:
        for contender in contenders:
            contender.start()
        yield
    finally:
        for contender in contenders:
            if contender.process is not None:
                contender.stop()


def run(contenders: list[Contender], rounds: int, warm_ups: int, budget_s: float) -> None:
    """Interleaved rounds, the order turned around each time; `FEWEST` when time is up."""
    began = time.monotonic()
    with started(contenders):
        for contender in contenders:
            for _ in range(warm_ups):
                contender.go()
        longest = 0.0
        for number in range(rounds):
            if number >= FEWEST and time.monotonic() - began + longest > budget_s:
                break
            before = time.monotonic()
            for contender in contenders if number % 2 else contenders[::-1]:
                contender.round()
            longest = max(longest, time.monotonic() - before)


def peak_mib() -> float:
    """The most memory that this process has held so far, in MiB."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (1024 * 1024 if sys.platform == "darwin" else 1024)
