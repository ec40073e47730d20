"""A page looks as it did: in light and in dark, as the stored pictures do, up to the fonts of the machine.

To renew the pictures after a change that is meant, and look at them before they are committed:

    LORATOOL_RENEW_PICTURES=1 .venv/bin/pytest tests/pictures/test_looks.py
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from browser import Opened, blocks_of, contrast_of, luminance

import loratool
from loratool.files.stopwatch import Spent
from loratool.notes import Note
from loratool.results.base import Cost
from loratool.results.merge import AdapterEffect, MergeReport
from loratool.results.profile import Profile

STORED = Path(__file__).parent / "pictures"
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = 16
FAR = 40  # of 255: a block that differs by more looks different
MOST_FAR = 0.03  # of all blocks: letters of another font are so many
MOST = 4.0  # of 255, on the average


def report() -> MergeReport:
    """A merge whose numbers are made up, and always the same."""
    names = [f"model.layers.{layer}.{kind}.weight" for layer in range(LAYERS) for kind in KINDS]
    norms = {n: 0.01 * (1 + at % 6) * (1.2 + math.sin(at / 11)) for at, n in enumerate(names)}
    gains = {n: 1 - 0.7 * math.exp(-at / 9) for at, n in enumerate(names)}
    return MergeReport(
        out=Path("merged"),
        edited=len(names),
        adapters=(
            AdapterEffect("style", 1.0, len(names), ()),
            AdapterEffect("facts", 0.5, len(names), tuple(names[:2])),
        ),
        copied=35,
        converted=0,
        bytes_read=2_500_000_000,
        bytes_written=2_470_000_000,
        workers=4,
        relative_norms=norms,
        gain=0.9731,
        gains=gains,
        left_out=("pytorch_model.bin",),
        notes=(
            Note("update-lost-in-rounding", "rounding keeps 97 % of the update"),
            Note("renamed", "a name was mapped"),
        ),
        profile=Profile({"worker": {"read": Spent(1.0, 2.0), "product": Spent(2.5, 2.6), "write": Spent(0.3, 1.5)}}),
        cost=Cost("cpu", 4.2, 1.1, 700_000_000),
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_merge_looks_as_the_stored_picture_does(scheme: str, browser: Any, tmp_path: Path) -> None:
    """Both are compared as small blocks of colour, which other letters hardly change; a map that is missing, or has the
    colours of the other scheme, changes many of them."""
    page = tmp_path / "page.html"
    loratool.write_page(report(), page)
    opened = Opened(browser, page, color_scheme=scheme, device_scale_factor=0.5)
    taken = opened.page.screenshot(clip={"x": 0, "y": 0, "width": 1240, "height": 1100}, full_page=True)
    opened.close()
    stored = STORED / f"merge-{scheme}.png"
    if os.environ.get("LORATOOL_RENEW_PICTURES"):
        stored.write_bytes(taken)
    new, old = (blocks_of(browser, each) for each in (taken, stored.read_bytes()))
    differences = [
        max(abs(a - b) for a, b in zip(one, other, strict=True)) for one, other in zip(new, old, strict=True)
    ]
    assert sum(differences) / len(differences) < MOST
    assert sum(each > FAR for each in differences) < MOST_FAR * len(differences)


def test_pictures_that_are_unlike_are_told_apart(browser: Any) -> None:
    """The light picture and the dark one, and one without its maps."""
    light, dark = (blocks_of(browser, (STORED / f"merge-{scheme}.png").read_bytes()) for scheme in ("light", "dark"))
    paper = light[0]
    without = [paper if max(block) - min(block) > 25 else block for block in light]
    for other in (dark, without):
        far = sum(
            max(abs(a - b) for a, b in zip(one, two, strict=True)) > FAR for one, two in zip(light, other, strict=True)
        )
        assert far > 2 * MOST_FAR * len(light)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_on_what_is_behind_it(scheme: str, browser: Any, tmp_path: Path) -> None:
    """The contrast that the Web Content Accessibility Guidelines ask for, 4.5, of every kind of text on the page."""
    page = tmp_path / "page.html"
    loratool.write_page(report(), page)
    opened = Opened(browser, page, color_scheme=scheme)
    kinds = ["h1", ".hint", "figcaption", "dt", "dd", "th", "td", "th button", ".badge", ".problem .badge", "footer"]
    script = """kinds => kinds.map(kind => {
        const element = document.querySelector(kind);
        let behind = element;
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
    })"""
    found = dict(zip(kinds, opened.page.evaluate(script, kinds), strict=True))
    labels = opened.page.evaluate(
        "[getComputedStyle(document.querySelector('svg text')).fill, getComputedStyle(document.querySelector('.card')).backgroundColor]"
    )
    found["svg text"] = labels
    contrasts = {kind: contrast_of(*map(luminance, colours)) for kind, colours in found.items()}
    assert {kind: contrast for kind, contrast in contrasts.items() if contrast < 4.5} == {}
    opened.close()
