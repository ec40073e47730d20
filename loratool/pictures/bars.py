"""Bars: a number for each name, in one piece or made of several."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.pictures.drawing import Drawing, Figure, legend, mark, safe, widest
from loratool.results.text import fitted

WIDTH = 1080
LONGEST = 44  # letters of a label
TALL, THICK = 26, 16  # pixels from bar to bar, and of a bar


@dataclass(frozen=True)
class Bar:
    """A name and the lengths of its pieces."""

    label: str
    values: tuple[float, ...]
    text: str  # the number at its end
    kind: str = ""  # class of a bar of one piece: s0 … s7, bad or quiet


@dataclass(frozen=True, kw_only=True)
class Bars(Figure):
    """Horizontal bars from one line."""

    bars: tuple[Bar, ...]
    series: tuple[str, ...] = ()  # names of the pieces, where there are several
    longest: float | None = None  # the value of a full length; the largest of them where none is given

    def draw(self, alone: bool) -> Drawing:  # noqa: ARG002 (the same in both)
        left = widest((bar.label for bar in self.bars), LONGEST) + 12
        right = widest((bar.text for bar in self.bars), LONGEST) + 12
        most = self.longest or max((sum(bar.values) for bar in self.bars), default=0.0) or 1.0
        room, top = WIDTH - left - right, 24.0 if self.series else 0.0
        parts = [legend(((name, f"s{at}") for at, name in enumerate(self.series)), 0)] if self.series else []
        for at, bar in enumerate(self.bars):
            y, x = top + at * TALL, left
            parts.append(
                mark(
                    "text",
                    safe(fitted(bar.label, LONGEST)),
                    kind="n",
                    x=left - 10,
                    y=y + THICK / 2 + 4,
                    text_anchor="end",
                )
            )
            for piece, value in enumerate(bar.values):
                length = room * max(0.0, min(1.0, value / most))
                if not length:
                    continue
                kind = bar.kind or f"s{piece}"
                hint = mark("title", safe(f"{bar.label}: {bar.text}"))
                parts.append(mark("rect", hint, kind=kind, x=x, y=y, width=length, height=THICK, rx=1.5))
                x += length
            parts.append(mark("text", safe(bar.text), kind="n", x=x + 8, y=y + THICK / 2 + 4))
        bottom = top + len(self.bars) * TALL
        parts.append(mark("path", kind="axis", d=f"M{left - 0.5:.1f} {top - 3:.1f}V{bottom - TALL + THICK + 3:.1f}"))
        return Drawing(WIDTH, bottom, "\n".join(parts))
