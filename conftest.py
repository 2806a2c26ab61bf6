"""The two notebook lanes, run by nbval on what is stored, at preset tiny.

    pytest --nbval solutions        strict: every text output is compared
    pytest --nbval-lax notebooks    it must run

Besides comparing, a lane fails on any xfail or xpass (after a time-out nbval calls every later cell
that, broken or not) and on a notebook that takes three times as long as its card says, where the
card was measured on this kind of machine.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

CELL_TIMEOUT_S = 300
TIMES_MEASURED = 3.0
GRACE_S = 30.0  # for starting kernels, on a machine that does other things too

scratch = pytest.StashKey[Path]()
seconds = pytest.StashKey[dict]()
complaints = pytest.StashKey[list]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[seconds], config.stash[complaints] = defaultdict(float), []
    if not _notebooks(config):
        return
    from tools.execute import lane_environment

    folder = Path(tempfile.mkdtemp(prefix="notebooks-"))
    environment = lane_environment(folder)
    for name in set(os.environ) - set(environment):
        del os.environ[name]  # kernels inherit this process's environment: no key, no server
    os.environ.update(environment)
    if kernels := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        # Kernels side by side share the cores; two that each want all of them wait for each other.
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // kernels))
    config.stash[scratch] = folder
    config.option.nbval_sanitize_with = str(Path(__file__).parent / "tests/nbval_sanitize.cfg")
    config.option.nbval_cell_timeout = CELL_TIMEOUT_S


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # pytest-timeout is for unit tests: a cell has nbval's own limit
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.timeout(0))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _REPORTS.append(report)


_REPORTS: list[pytest.TestReport] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if not _notebooks(config):
        return
    shutil.rmtree(config.stash[scratch], ignore_errors=True)
    found = config.stash[complaints]
    for report in _REPORTS:
        path = report.nodeid.split("::")[0]
        config.stash[seconds][path] += report.duration
        if hasattr(report, "wasxfail"):
            found.append(f"{report.nodeid}: xfail or xpass, which hides what the cell really did")
    found += _too_slow(config.stash[seconds])
    if found and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for line in config.stash[complaints]:
        terminalreporter.write_line(line, red=True)
    if _notebooks(config):
        for path, taken in sorted(config.stash[seconds].items()):
            terminalreporter.write_line(f"{path}: {taken:.0f} s")


def _notebooks(config: pytest.Config) -> bool:
    return bool(config.getoption("nbval", False) or config.getoption("nbval_lax", False))


def _too_slow(taken: dict[str, float]) -> list[str]:
    from tools.card import machine, read_measurements

    measured, here, slow = read_measurements(), machine(), []
    for path, duration in taken.items():
        card = measured.get(Path(path).stem, {}).get("tiny", {})
        if card.get("machine") != here:  # another kind may be three times as slow by itself
            continue
        if duration > TIMES_MEASURED * card["seconds"] + GRACE_S:
            slow.append(f"{path}: took {duration:.0f} s, its card says {card['seconds']} s")
    return slow
