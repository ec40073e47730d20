"""One self-contained HTML page of any results that have one, and the figures of it.

A module of this package makes the page of a kind of result; `MAKERS` says which. Foreign text reaches the page escaped, and a
policy in its head forbids it to load anything. `string.Template` would take the `${…}` of its script for names.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import PurePath

from loratool import __version__
from loratool.errors import UsageError
from loratool.pictures.blocks import Block, Group, Table
from loratool.pictures.colours import style_of_page
from loratool.pictures.drawing import Figure, safe
from loratool.results.base import Result
from loratool.results.merge_many import ResultsOfOutputs

# The kind of a result → the module of this package whose `page_of` makes its page.
MAKERS = {
    "AdapterFacts": "inspect",
    "CheckpointFacts": "inspect",
    "CombineReport": "combine",
    "CompareReport": "compare",
    "Estimate": "estimate",
    "ExtractReport": "extract",
    "FleetFacts": "fleet",
    "MergePlan": "plan",
    "MergeReport": "merge",
    "ResizeReport": "resize",
    "StreamReport": "merge",
    "UnreadableFacts": "inspect",
    "Verification": "verify",
}


@dataclass(frozen=True)
class Page:
    """What is shown of one result."""

    title: str
    command: str  # that gives such a result
    blocks: tuple[Block, ...]

    @property
    def figures(self) -> list[Figure]:
        return [figure for block in self.blocks if isinstance(block, Group) for figure in block.figures]


def pages_of(results: Result | Iterable[Result]) -> list[Page]:
    """The page of each result, and of each output of a merge of several; `UsageError` for a kind that has none."""
    every: list[Result] = []
    for result in [results] if isinstance(results, Result) else results:
        every += result.reports.values() if isinstance(result, ResultsOfOutputs) else [result]
    return [page_of(result) for result in every]


def last_part(path: str) -> str:
    """The title of a page that is about a path: its last part."""
    return PurePath(path).name or path


def page_of(result: Result) -> Page:
    name = next((kind.__name__ for kind in type(result).__mro__ if kind.__name__ in MAKERS), None)
    if name is None:
        raise UsageError(f"a {type(result).__name__} has no page; those that have one are {', '.join(sorted(MAKERS))}")
    page: Page = import_module(f"loratool.pictures.{MAKERS[name]}").page_of(result)
    return page


def html_page(results: Result | Sequence[Result]) -> str:
    """The HTML page of a result, or of several one below the other, as text. It contains all that it needs.

    Raises:
        UsageError: a result is of a kind that has no page.
    """
    return html_of(pages_of(results))


def html_of(pages: Sequence[Page]) -> str:
    """Pages one below the other as one HTML document."""
    title = ", ".join(page.title for page in pages) or "nothing"
    command = next((page.command for page in pages), "inspect")
    sections = "\n".join(section(page, f"p{at}") for at, page in enumerate(pages))
    tables = (  # ids of the headings of those that can be sorted
        f"p{at}-{number}"
        for at, page in enumerate(pages)
        for number, block in enumerate(page.blocks)
        if isinstance(block, Table) and not block.plain
    )
    parts = {
        "TITLE": f"{safe(title)} · loratool {safe(command)}",
        "STYLE": style_of_page() + asset("page.css"),
        "CONTENT": sections,
        "SCRIPT": asset("page.js"),
        "VERSION": html.escape(__version__),
        "TABLE": next(tables, "main"),
    }
    return re.sub("@@([A-Z]+)@@", lambda match: parts[match[1]], asset("page.html"))


def asset(name: str) -> str:
    return files("loratool.pictures").joinpath(name).read_text(encoding="utf-8")


def section(page: Page, name: str) -> str:
    """One result, with ids that begin with `name`."""
    blocks = "\n".join(block.markup(f"{name}-{at}") for at, block in enumerate(page.blocks))
    header = f'<header><p>loratool {safe(page.command)}</p><h1 id="{name}">{safe(page.title)}</h1></header>'
    return f'<article aria-labelledby="{name}">\n{header}\n{blocks}\n</article>'


def figures_of(results: Result | Iterable[Result]) -> dict[str, Figure]:
    """The figures of results by the names of their files, such as `merge-gain`; several results are numbered."""
    pages = pages_of(results)
    found = {}
    for at, page in enumerate(pages, 1):
        number = f"-{at}" if len(pages) > 1 else ""
        for figure in page.figures:
            name = f"{page.command}{number}-{figure.name}"
            title = f"{page.title}: {figure.title}" if len(pages) > 1 else figure.title
            found[name] = dataclasses.replace(figure, title=title)
    return found
