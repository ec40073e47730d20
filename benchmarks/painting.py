"""A headless chromium, where there is one, and when it has painted a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from running import say

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
FIRST_PAINT = """
new Promise(done => new PerformanceObserver(seen => done(seen.getEntries()[0].startTime / 1000))
  .observe({type: "paint", buffered: true}))
"""


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser; None, which is said, where it or playwright is missing."""
    program = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        say("in a browser: not measured, because chromium or playwright is missing")
        yield None
        return
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def first_paint(page: Path, turns: int) -> float | None:
    """Seconds from the navigation to the first paint, the browser running, the median; None without one."""
    with chromium() as browser:
        if browser is None:
            return None
        took = []
        for _ in range(turns):
            tab = browser.new_page()
            tab.goto(page.as_uri())
            took.append(float(tab.evaluate(FIRST_PAINT)))
            tab.close()
    return median(took)
