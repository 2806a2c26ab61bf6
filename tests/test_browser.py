"""Every student notebook in JupyterLab, in a real browser: Run All, sliders, stop and resume.

    make test-browser

BROWSER_SCREENSHOTS=FOLDER keeps a picture of each notebook after its run.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jupyter_lab import (
    ROOT,
    code_cells,
    open_notebook,
    run_all,
    running_lab,
    running_page,
    wait_until_idle,
    whole_notebook,
)

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
REDRAW_S = 10
SLIDER = ".widget-slider:visible .noUi-handle"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_lab(tmp_path_factory.mktemp("lab")) as found:
        yield found


@pytest.fixture
def page() -> Iterator[Page]:
    with running_page() as found:
        yield found


def complaints(cells: list[dict]) -> list[str]:
    """What a learner must not see: errors, text on stderr, cells that never ran."""
    found = []
    for cell in cells:
        if cell["count"] is None:
            found.append(f"{cell['id']}: did not run")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"{cell['id']}: {output['ename']}: {output['evalue']}")
            elif output.get("name") == "stderr":
                found.append(f"{cell['id']}: on stderr: {output['text']}")
    return found


def moved(slider: Locator, page: Page) -> bool:
    """Move one slider with the keyboard; whether the figure below it became another."""
    picture = slider.locator("xpath=ancestor::*[contains(@class,'widget-vbox')][1]//img").last
    before = picture.get_attribute("src")
    slider.focus()
    for key in ("ArrowRight", "ArrowLeft"):  # from an end of its range only one of them moves it
        slider.press(key)
        until = time.monotonic() + REDRAW_S
        while time.monotonic() < until:
            if picture.get_attribute("src") != before:
                return True
            page.wait_for_timeout(200)
    return False


def stop_and_resume(page: Page) -> None:
    """Click Stop while it trains: it holds; click Resume: it goes on."""
    stop, resume = (page.get_by_role("button", name=name).first for name in ("Stop", "Resume"))
    status = page.get_by_text(re.compile(r"^step \d+ of \d+")).first
    status.wait_for(timeout=120_000)
    stop.click()
    page.wait_for_timeout(2000)  # the step under way
    held = status.inner_text()
    page.wait_for_timeout(2000)
    assert "stopped" in held
    assert status.inner_text() == held
    resume.click()
    page.wait_for_function(
        "held => ![...document.querySelectorAll('.widget-html-content')]"
        ".some(shown => shown.textContent.trim() === held.trim())",
        arg=held,
    )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all_in_the_browser(name: str, address: str, page: Page):
    panel = open_notebook(page, address, name)
    run_all(page)
    if "LiveTraining().run(" in (ROOT / "notebooks" / name).read_text():
        stop_and_resume(page)
    wait_until_idle(page)
    assert not complaints(code_cells(page))
    if sliders := panel.locator(SLIDER).all():
        assert any(moved(slider, page) for slider in sliders)
    if folder := os.environ.get("BROWSER_SCREENSHOTS"):
        whole_notebook(page, panel, Path(folder) / f"{Path(name).stem}.png")
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")
