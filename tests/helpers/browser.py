"""Pages in Debian's chromium (`apt-get install chromium`), and what they complain of or ask for there."""

from __future__ import annotations

import base64
import re
import shutil
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


class Opened:
    """A page in the browser, and everything that it complained of or asked for."""

    def __init__(self, browser: Any, path: Path, **settings: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1240, "height": 900}, **settings})
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(path.as_uri())

    def close(self) -> None:
        """Close it; there were no complaints, and nothing was asked of anybody."""
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:"))] == []
        self.context.close()

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.page.locator(selector).all_inner_texts()
        return found

    def tip(self) -> list[str]:
        """The lines of the tooltip."""
        text: str = self.page.locator("#tip").inner_text()
        return text.split("\n")

    def column(self, number: int, table: str = ".linked") -> list[str]:
        """The cells of a table's column, from 1, in the order in which they are shown."""
        return self.texts(f"{table} tbody tr > :nth-child({number})")


ACROSS, DOWN = 62, 55  # blocks of a picture

BLOCKS = """([url, across, down]) => new Promise((done) => {
    const image = new Image();
    image.onload = () => {
        const canvas = new OffscreenCanvas(across, down).getContext("2d");
        canvas.imageSmoothingQuality = "high";
        canvas.drawImage(image, 0, 0, across, down);
        const bytes = [...canvas.getImageData(0, 0, across, down).data];
        done(Array.from({ length: across * down }, (_, at) => bytes.slice(4 * at, 4 * at + 3)));
    };
    image.src = url;
})"""


def blocks_of(browser: Any, png: bytes) -> list[list[int]]:
    """A picture as few blocks of red, green and blue, from 0 to 255, row by row; the browser reads it."""
    page = browser.new_page()
    found: list[list[int]] = page.evaluate(
        BLOCKS, [f"data:image/png;base64,{base64.b64encode(png).decode()}", ACROSS, DOWN]
    )
    page.close()
    return found


def luminance(colour: str) -> float:
    """Relative luminance, as the Web Content Accessibility Guidelines define it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast_of(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
