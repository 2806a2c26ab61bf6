"""Run by test_deploy: deploys again and again, killing each attempt at another point.

    python kill_deploy.py URL ADAPTER BASE OUT POINTS SEED

Half of the kills come at a random line of the deploy's own code, half at a random time, which also
falls into the C code that writes tensors. After each kill the folder is looked at as a user would,
and the deploy is run again to its end. Prints one JSON line: what was killed where.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from download_double import ServiceDouble

from course_lib import deploy as deploy_module
from course_lib.errors import CourseError
from course_lib.export import versions

CODE = (str(Path(versions.__file__).parent), str(Path(deploy_module.__file__)))
CHECKPOINT = "tinker://run:train:0/weights/final"


def deploy_once(service: ServiceDouble, out: Path, runs: Path) -> None:
    deploy_module.deploy(service, CHECKPOINT, out, runs=runs)  # type: ignore[arg-type]


def in_a_child(work, kill_at_line: int = 0, kill_after_s: float = 0.0) -> tuple[int, int]:
    """Run `work` in a forked child; returns (its exit status, lines of deploy code it ran)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        lines = 0

        def trace(frame, event, argument):
            nonlocal lines
            if not frame.f_code.co_filename.startswith(CODE):
                return None
            if event == "line":
                lines += 1
                if lines == kill_at_line:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            if kill_after_s:  # the kernel's own timer: no Python runs at the kill
                signal.setitimer(signal.ITIMER_REAL, kill_after_s)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
            if kill_at_line:
                sys.settrace(trace)
            work()
            status = 0
        finally:
            sys.settrace(None)
            os.write(writer, str(lines).encode())
            os._exit(status)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    lines = os.read(reader, 100)
    os.close(reader)
    return status, int(lines or 0)


def look(out: Path) -> str:
    """What a user finds after a kill; AssertionError if it looks finished and is not."""
    for folder in out.glob("v*"):
        assert (folder / "deploy.json").exists(), f"{folder} has no record"
        versions.check_version(folder)
    try:
        version = versions.current_version(out)
    except CourseError as error:
        assert "not finished" in str(error) or "nothing is deployed" in str(error), error
        return "nothing"
    versions.check_version(version)
    return version.name


def main() -> None:
    url, adapter, base, out, points, seed = sys.argv[1:]
    service = ServiceDouble(url, Path(adapter), "course/base", Path(base))
    folder, runs = Path(out), Path(out).parent / "runs"
    small = functools.partial(deploy_module.merge_adapter, shard_bytes=30_000)
    deploy_module.merge_adapter = small
    work = functools.partial(deploy_once, service, folder, runs)
    start = time.monotonic()
    in_a_child(work)
    seconds = time.monotonic() - start
    shutil.rmtree(folder)
    status, lines = in_a_child(work, kill_at_line=10**9)  # only counts
    assert status == 0 and lines > 500, (status, lines)
    wanted = versions.read_record(folder / "v1")["files"]
    rng = random.Random(int(seed))
    found, killed = [], 0
    for point in range(int(points)):
        shutil.rmtree(folder)
        if point % 2:
            status, _ = in_a_child(work, kill_after_s=rng.uniform(0.01, seconds))
        else:
            status, _ = in_a_child(work, kill_at_line=rng.randint(1, lines))
        killed += os.WIFSIGNALED(status)
        found.append(look(folder))
        status, _ = in_a_child(work)
        assert status == 0, f"point {point}: the second run failed"
        assert look(folder) == "v1" and not list(folder.rglob("*.tmp"))
        files = versions.read_record(folder / "v1")["files"]
        print(f"point {point}: {found[-1]}", file=sys.stderr, flush=True)
        same = {k: v for k, v in files.items() if k.startswith(("model/", "adapter/"))}
        assert same.items() <= wanted.items(), f"point {point}: another model came out"
    print(json.dumps({"points": int(points), "killed": killed, "found": found, "lines": lines}))


if __name__ == "__main__":
    main()
