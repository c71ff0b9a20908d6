"""The system's Chromium, driven by Playwright; tests that need it are skipped where it is not installed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import cores

DESKTOP, PHONE = (1280, 900), (390, 844)
"""Width and height in pixels."""

PROGRAMS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)


def program() -> str:
    """The path of a Chromium; skips the test where there is none."""
    found = next((path for path in map(shutil.which, PROGRAMS) if path), None)
    if found is None:
        pytest.skip("no Chromium is installed: apt-get install chromium, or Google Chrome on a Mac")
    return found


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A browser without a window, which holds no state."""
    path = program()
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    # As root Chromium cannot make the sandbox of its processes.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with contextlib.ExitStack() as tools:
        # A browser has many processes, which would take the core of the server that they ask.
        with cores.on_all():
            chromium = tools.enter_context(playwright.sync_playwright()).chromium
            opened = chromium.launch(executable_path=path, args=flags)
        try:
            yield opened
        finally:
            opened.close()


class Tab:
    """A page of a browser, with what went wrong in it and what it asked of other machines."""

    def __init__(self, opened: Any, size: tuple[int, int] = DESKTOP) -> None:
        self.page = opened.new_page(viewport={"width": size[0], "height": size[1]})
        self.complaints: list[str] = []
        self.asked: set[str] = set()
        self.page.on("console", lambda line: self._heard(line.type, line.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(request.url.split("/")[2]))

    def _heard(self, kind: str, text: str) -> None:
        # A status that the page expects, such as 401 before the key is typed, is told by the browser as well.
        if kind == "error" and "Failed to load resource" not in text:
            self.complaints.append(text)

    def fits(self) -> bool:
        """Whether nothing is wider than the window."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))

    def picture(self, path: Path) -> None:
        """Save the whole page as a picture."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path), full_page=True)
