"""What something was made of, through all generations that its record knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loratool.errors import escaped

SHORT_COMMIT = 7  # characters of a commit that are shown


@dataclass(frozen=True)
class Ancestor:
    """A model or an adapter in a history, and what it was made of. All texts come from records, and are escaped."""

    role: str  # base, tuned, shared, adapter; empty for what is inspected itself
    name: str
    hub: str  # org/name@commit; empty where it was a local one
    license: str  # as its card has it
    weight: float | None  # of an adapter that was merged
    digests: Mapping[str, str]  # file → SHA-256, or the root or the header's digest where that is all there is
    made_by: str  # such as "merge"; empty where loratool did not make it
    command: str
    inputs: tuple[Ancestor, ...]

    def __str__(self) -> str:
        """The history of it as a tree, a line for each ancestor."""
        return "\n".join(["history", *(f"  {line}" for line in tree_lines(self))])

    @property
    def line(self) -> str:
        """It in a few words."""
        repo, at, commit = self.hub.partition("@")
        name = f"{repo}{at}{commit[:SHORT_COMMIT]}" if self.hub else self.name
        weight = f" × {self.weight:g}" if self.weight is not None else ""
        label = f"{self.role}{weight}: {name}" if self.role else name
        return f"{label}{f' ({self.license})' if self.license else ''}{f', made by {self.made_by}' if self.made_by else ''}"


def tree_lines(node: Ancestor) -> Iterator[str]:
    """The line of a node, and those of its inputs below it."""
    yield escaped(node.line)
    for number, each in enumerate(node.inputs):
        last = number == len(node.inputs) - 1
        first, *others = tree_lines(each)
        yield f"{'└─ ' if last else '├─ '}{first}"
        yield from (f"{'   ' if last else '│  '}{line}" for line in others)
