"""Run a notebook in a fresh kernel, top to bottom, and measure it."""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from tools.card import machine
from tools.editions import ROOT

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
STARTUP_S, CELL_S = 60, 600
FORBIDDEN = {
    "a path of this machine": re.compile(
        rf"{re.escape(str(ROOT))}|{re.escape(str(Path.home()))}/|/tmp/|/home/"
    ),
    "a port": re.compile(r"(127\.0\.0\.1|localhost):\d{4,5}"),
    "an address in memory": re.compile(r"\bat 0x[0-9a-f]{6,}"),
    "a time of day": re.compile(r"\b20\d\d-\d\d-\d\d[ T]\d\d:\d\d"),
}


class BuildError(Exception):
    """A notebook that did not run, or that would store what it must not."""


def lane_environment(folder: Path, preset: str = "tiny") -> dict[str, str]:
    """The environment of a kernel that must not touch the learner's own runs, keys or progress."""
    mine = {
        "COURSE_PRESET": preset,
        "COURSE_ENV_FILE": "",  # no .env, so no key: the embedded engine, as in a fresh clone
        "COURSE_PROGRESS": str(folder / "progress.json"),
        "COURSE_STORE": str(folder / "store"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "TINKER_TELEMETRY": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "JUPYTER_PLATFORM_DIRS": "1",
    }
    theirs = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("TINKER_", "COURSE_"))
    }
    return {**theirs, **mine}


def execute(notebook: NotebookNode, folder: Path, preset: str = "tiny") -> dict[str, Any]:
    """Run all cells in place, in `folder`; return the measurement that the card shows."""
    client = NotebookClient(
        notebook,
        timeout=CELL_S,
        startup_timeout=STARTUP_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        store_widget_state=False,
        record_timing=False,
        coalesce_streams=True,  # one print may arrive in two messages on a busy machine
    )
    slowest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        with client.setup_kernel(env=lane_environment(Path(scratch), preset)):
            count = 0
            for index, cell in enumerate(notebook.cells):
                if cell.cell_type != "code":
                    continue
                count += 1
                started = time.monotonic()
                _run_cell(client, cell, index, count)
                slowest = max(slowest, time.monotonic() - started)
            wall = time.monotonic() - began
            peak_mb, cpu_s = _use(client)
            store = str(Path(scratch).resolve() / "store")
    for cell in notebook.cells:
        _clean(cell, store)
    return {
        "seconds": round(wall),
        "slowest_cell_s": round(slowest),
        "peak_mb": round(peak_mb),
        "cores": round(cpu_s / wall, 1),
        "machine": machine(),
    }


def _run_cell(client: NotebookClient, cell: NotebookNode, index: int, count: int) -> None:
    try:
        client.execute_cell(cell, index, execution_count=count)
    except CellExecutionError as error:
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # without the colours of a terminal
        raise BuildError(f"cell {cell.id!r} raised {error.ename}\n{text}") from None
    except CellTimeoutError:
        finding = f"cell {cell.id!r} took more than {CELL_S} s"
        raise BuildError(f"{finding}: give it less to do, or build on a quieter machine") from None
    except DeadKernelError:
        remedy = "was there memory enough?"
        raise BuildError(f"the kernel died in cell {cell.id!r}: {remedy}") from None


def _use(client: NotebookClient) -> tuple[float, float]:
    """Peak memory (MB) and processor seconds of the kernel, children not counted."""
    import psutil  # comes with ipykernel

    pid = client.km.provisioner.pid  # type: ignore[union-attr]
    process = psutil.Process(pid)
    times = process.cpu_times()
    status = Path(f"/proc/{pid}/status")
    if status.exists():  # Linux keeps the high-water mark
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peak_mb = int(line.split()[1]) / 1000
    else:
        peak_mb = process.memory_info().rss / 1e6
    return peak_mb, times.user + times.system


def _clean(cell: NotebookNode, store: str) -> None:
    """Take live widgets out (their picture stays); refuse what must not be stored."""
    if cell.cell_type != "code":
        return
    cell.metadata.pop("execution", None)
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stderr":
            raise BuildError(f"cell {cell.id!r} writes on stderr: {output.text.strip()[:400]}")
        if "data" in output:
            output.data.pop(WIDGET_VIEW, None)
        if "text" in output:  # connect() tells where the store is: here it was a scratch folder
            output.text = output.text.replace(store, "runs/store")
        for what, pattern in FORBIDDEN.items():
            found = pattern.search(_texts(output))
            if found:
                raise BuildError(f"cell {cell.id!r} prints {what}: {found[0]!r}")
    cell.outputs = [output for output in cell.outputs if output.get("data", True)]


def _texts(output: NotebookNode) -> str:
    data = output.get("data", {})
    kept = [str(text) for kind, text in data.items() if not kind.startswith("image/")]
    return "\n".join([*kept, output.get("text", "")])
