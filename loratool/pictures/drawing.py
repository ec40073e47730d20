"""`Figure`: what all figures have in common, and the SVG that is made of one, in a page or as a file of its own."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

from loratool import __version__
from loratool.errors import escaped
from loratool.pictures.colours import style_of_file
from loratool.results.text import fitted

METADATA_START = "made by loratool"  # how a file's metadata begins
# Pixels of letters in labels of 12 pixels, in a wide font: others take less.
LETTER, LETTERS = (
    7.6,
    {**dict.fromkeys("ijl.,:;|'!", 4.0), **dict.fromkeys("frt()[]-/ ", 5.0), **dict.fromkeys("mwMW@%×…‖", 11.8)},
)
PAD = 16  # pixels around a figure that is a file


def safe(text: object) -> str:
    """Text from anywhere as markup shows it, between tags or in an attribute."""
    return html.escape(escaped(str(text)))


def mark(tag: str, text: str | None = None, **attributes: object) -> str:
    """An element. Attributes are our own words and numbers; `kind` is the class, `_` in a name stands for `-`."""
    given = {"class" if name == "kind" else name.replace("_", "-"): value for name, value in attributes.items()}
    told = "".join(f' {name}="{spelled(value)}"' for name, value in given.items() if value is not None and value != "")
    return f"<{tag}{told}/>" if text is None else f"<{tag}{told}>{text}</{tag}>"


def spelled(value: object) -> str:
    """A number with at most one decimal, for nobody sees more; other text as markup."""
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return safe(value)


def width_of(text: str) -> float:
    """Pixels that a label takes at most."""
    return sum(LETTERS.get(letter, LETTER) for letter in text)


def widest(texts: Iterable[str], most: int) -> float:
    """Pixels that the longest of some labels takes at most, of which so many letters are shown."""
    return max((width_of(fitted(text, most)) for text in texts), default=0.0)


def legend(kinds: Iterable[tuple[str, str]], top: float) -> str:
    """A square of each class with its name, one after the other; pairs are (name, class)."""
    parts, at = [], 0.0
    for name, kind in kinds:
        parts.append(mark("rect", kind=kind, x=at, y=top, width=11, height=11, rx=2))
        parts.append(mark("text", safe(name), x=at + 17, y=top + 10))
        at += 17 + width_of(name) + 20
    return "".join(parts)


@dataclass(frozen=True)
class Drawing:
    """What a figure looks like. Sizes are pixels at which its text is easily read."""

    width: float
    height: float
    markup: str  # the elements in it
    data: tuple[tuple[str, str], ...] = ()  # what the script of a page must know, by the names of its attributes


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure as plain data; each kind of it draws itself."""

    name: str  # of its file, without suffix: lower case, digits and hyphens
    title: str
    about: str = ""  # what is shown, in a sentence

    @property
    def wide(self) -> bool:
        """Whether it takes the whole width of a page, or half of it."""
        return True

    def draw(self, alone: bool) -> Drawing:
        """What it looks like; `alone` in a file, where no table has the values."""
        raise NotImplementedError


def svg_in_page(figure: Figure, labelled_by: str) -> str:
    """A figure as an element of a page, which has its title as the element with an id."""
    drawn = figure.draw(alone=False)
    data = "".join(f' data-{name}="{safe(value)}"' for name, value in drawn.data)
    view = f"0 0 {spelled(float(drawn.width))} {spelled(float(drawn.height))}"
    about = mark("desc", safe(figure.about)) if figure.about else ""
    return (
        f'<svg viewBox="{view}" width="{spelled(float(drawn.width))}" height="{spelled(float(drawn.height))}" '
        f'role="img" aria-labelledby="{labelled_by}"{data}>{about}{drawn.markup}</svg>'
    )


def svg_file(figure: Figure) -> str:
    """A figure as a file: with its title, its own style sheet and room around it."""
    drawn = figure.draw(alone=True)
    top = PAD + 26
    width, height = (spelled(float(size)) for size in (drawn.width + 2 * PAD, drawn.height + top + PAD))
    heading = mark("text", safe(figure.title), kind="h", x=PAD, y=PAD + 12)
    ground = mark(
        "rect", kind="ground", width="100%", height="100%"
    )  # pages that show it may be dark where it is light
    body = f'{ground}\n{heading}\n<g transform="translate({PAD} {top})">\n{drawn.markup}\n</g>'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'role="img" aria-labelledby="title about">',
            f"<metadata>{METADATA_START} {safe(__version__)}</metadata>",
            f'<title id="title">{safe(figure.title)}</title>',
            f'<desc id="about">{safe(figure.about or figure.title)}</desc>',
            f"<style>\n{style_of_file(body)}\n</style>",
            body,
            "</svg>",
            "",
        ]
    )
