"""JupyterLab as a learner has it, in a headless Chromium: what test_browser.py drives."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from loopback import free_port

from tools.execute import lane_environment

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
START_S, RUN_S = 60, 300

# Cells out of sight are in the page, too; no news, no update check; nothing of the user's own.
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": '{"windowingMode": "none"}',
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": '{"fetchNews": "false"}',
}

CODE_CELLS = """() => {
  const cells = [...jupyterapp.shell.currentWidget.content.model.cells];
  return cells.filter(cell => cell.type === "code").map(cell => ({
    id: cell.sharedModel.getId(),
    count: cell.executionCount,
    state: cell.executionState,
    outputs: cell.outputs.toJSON(),
  }));
}"""


def browser_path() -> str:
    """The system's Chromium, by any of its names."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    assert found, "no Chromium found; on Debian and Ubuntu: apt install chromium"
    return found


@contextmanager
def running_lab(folder: Path) -> Iterator[str]:
    """A JupyterLab server on copies of the student notebooks; gives open_notebook's address."""
    notebooks = folder / "notebooks"
    shutil.copytree(ROOT / "notebooks", notebooks)
    for name, text in SETTINGS.items():
        file = folder / "settings" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    port, token = free_port(), secrets.token_hex(16)
    environment = lane_environment(folder) | {
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": notebooks,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": token,
        "LabApp.expose_app_in_browser": True,
        "LabApp.news_url": None,
    }
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, log.name)
            # A workspace each: a shared one opens the earlier notebooks again, one of them on top.
            yield f"http://127.0.0.1:{port}/lab/workspaces/{{}}/tree/{{}}?token={token}"
        finally:
            server.terminate()
            server.wait(timeout=30)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: str) -> None:
    until = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < until:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    raise AssertionError(f"JupyterLab does not answer:\n{Path(log).read_text()}")


@contextmanager
def running_page() -> Iterator[Page]:
    """One tab of a headless Chromium."""
    from playwright.sync_api import sync_playwright

    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # which Chromium refuses to root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=sandbox)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def open_notebook(page: Page, address: str, name: str) -> Locator:
    """Open it as from the file browser; wait until its kernel can be used."""
    page.goto(address.format(Path(name).stem, name))
    page.wait_for_function(
        "() => typeof jupyterapp !== 'undefined' && jupyterapp.shell.currentWidget?.content?.model"
        " && jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.status === 'idle'",
        timeout=START_S * 1000,
    )
    return page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")


def run_all(page: Page) -> None:
    """The menu's Run > Run All Cells."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(
        "() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'busy'"
    )


def wait_until_idle(page: Page, timeout_s: float = RUN_S) -> None:
    """Until every cell that was asked to run has run (an awaiting kernel says busy, too)."""
    page.wait_for_function(
        f"() => ({CODE_CELLS})().every(cell => cell.state !== 'running')"
        " && jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'",
        timeout=timeout_s * 1000,
        polling=500,
    )


def code_cells(page: Page) -> list[dict[str, Any]]:
    """Per code cell of the open notebook: id, count, state, outputs (nbformat)."""
    return page.evaluate(CODE_CELLS)


def whole_notebook(page: Page, panel: Locator, file: Path) -> None:
    """A picture of the notebook from its first cell to its last."""
    outer = panel.locator(".jp-WindowedPanel-outer").first
    height = outer.evaluate(
        "outer => [...outer.querySelectorAll('.jp-Cell')].pop().getBoundingClientRect().bottom"
        " - outer.getBoundingClientRect().top + outer.scrollTop"
    )
    size = page.viewport_size or {"width": 1400, "height": 1000}
    page.set_viewport_size({"width": size["width"], "height": min(16_000, int(height) + 200)})
    outer.evaluate("outer => { outer.scrollTop = 0 }")
    page.wait_for_timeout(500)
    panel.screenshot(path=file)
    page.set_viewport_size(size)
