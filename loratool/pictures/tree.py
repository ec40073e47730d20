"""A dendrogram: which are alike, and at which distance they are joined."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.pictures.drawing import Drawing, Figure, mark, safe, widest
from loratool.pictures.lines import Axis
from loratool.results.text import fitted

WIDTH = 1080
LONGEST = 44  # letters of a name
TALL = 20  # pixels of a row


@dataclass(frozen=True, kw_only=True)
class Tree(Figure):
    """Leaves and joins; joins are numbered after the leaves, as `results.matrix.Join` does."""

    leaves: tuple[str, ...]
    joins: tuple[tuple[int, int, float], ...]  # two clusters, and the distance at which they become one
    axis: Axis

    def draw(self, alone: bool) -> Drawing:  # noqa: ARG002 (the same in both)
        left = widest(self.leaves, LONGEST) + 14
        room, bottom = WIDTH - left - 20, TALL * len(self.leaves) + 6.0
        parts = []
        for value, text in self.axis.ticks:
            x = left + self.axis.part(value) * room
            parts.append(mark("path", kind="grid", d=f"M{x:.1f} 0V{bottom:.1f}"))
            parts.append(mark("text", safe(text), x=x, y=bottom + 16, text_anchor="middle"))
        parts.append(mark("text", safe(self.axis.label), x=left + room / 2, y=bottom + 34, text_anchor="middle"))
        places: dict[int, tuple[float, float]] = {}  # of each cluster: where its line begins, and its row, in pixels
        for row, leaf in enumerate(self.order()):
            y = (row + 0.5) * TALL
            places[leaf] = left, y
            parts.append(
                mark(
                    "text", safe(fitted(self.leaves[leaf], LONGEST)), kind="n", x=left - 10, y=y + 4, text_anchor="end"
                )
            )
        for at, (one, other, distance) in enumerate(self.joins, len(self.leaves)):
            (x1, y1), (x2, y2) = places.pop(one), places.pop(other)
            x = left + self.axis.part(distance) * room
            hint = mark("title", safe(f"{distance:.3g}"))
            parts.append(mark("path", hint, kind="s s0", d=f"M{x1:.1f} {y1:.1f}H{x:.1f}V{y2:.1f}H{x2:.1f}"))
            places[at] = x, (y1 + y2) / 2
        return Drawing(WIDTH, bottom + 42, "\n".join(parts))

    def order(self) -> list[int]:
        """The leaves from top to bottom, so that no lines cross."""
        members = {at: [at] for at in range(len(self.leaves))}
        for at, (one, other, _) in enumerate(self.joins, len(self.leaves)):
            members[at] = members.pop(one) + members.pop(other)
        return [leaf for cluster in members.values() for leaf in cluster]
