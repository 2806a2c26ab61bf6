"""What the serving benchmarks share: server processes, the machine's name, a result as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key-for-the-benchmark"
START_S = 180


@contextlib.contextmanager
def running(command: list[str], port: int, ready: str) -> Iterator[str]:
    """A server process, from its first good answer to its end; yields its URL without a path."""
    environment = os.environ | {"POSTTRAIN_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, **quiet)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + ready, trust_env=False).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command[:6])} did not start")
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def posttrain_serve(folder: str, port: int) -> list[str]:
    """The command that serves a deploy or model folder as `posttrain serve` does."""
    return [sys.executable, "-m", "course_lib.cli", "serve", folder, "--port", str(port)]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def machine() -> str:
    """Cores and architecture, without names of hosts."""
    return f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f} before"


def keep(path: Path, command: str, before: str, **found: Any) -> None:
    """Write a result whole: its command, the machine, the versions, and what was found."""
    packages = {name: version(name) for name in ("torch", "transformers", "openai")}
    record = {"command": command, "machine": before, "versions": packages, **found}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    print(f"kept in {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
