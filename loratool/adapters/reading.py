"""`Reading`: what the caller says of an adapter where its files do not, and the options it is said with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from loratool.errors import UsageError, printable
from loratool.notes import Note
from loratool.options.described import NUMBER, TEXT, Choice, Options, option

Value = TypeVar("Value", str, float)
EXPERT_LAYOUTS = ("rank-major", "grouped-by-expert")


@dataclass(frozen=True)
class Reading:
    """How one adapter is to be read; None leaves a question to its files."""

    expert_layout: str | None = None  # of the columns of a fused lora_B: one of EXPERT_LAYOUTS
    adapter_name: str | None = None  # which of several adapters in one file or folder
    input_alpha: float | None = None  # α of every module, for files that do not hold it

    def unused(self) -> tuple[Note, ...]:
        """What to say of an adapter in a format that has neither several adapters in a file nor fused experts."""
        return (*self.unused_name(), *self.unused_layout())

    def unused_layout(self) -> tuple[Note, ...]:
        """What to say where the layout of fused experts was given, and no order of columns makes a difference."""
        if self.expert_layout is None:
            return ()
        text = f"it has no fused experts of a rank above 1, so --expert-layout {self.expert_layout} is ignored"
        return (Note("expert-layout-not-used", text),)

    def unused_name(self) -> tuple[Note, ...]:
        """What to say where the adapter of this name was asked for, and there is only one, without a name."""
        if self.adapter_name is None:
            return ()
        text = f"there is only one adapter, and it has no name, so --adapter-name {printable(self.adapter_name)} is ignored"
        return (Note("adapter-name-not-used", text),)


AS_STORED = Reading()  # all is as the files say


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(Options):
    """What is said of adapters where their files do not; of each option one value for all of them, or one for each."""

    expert_layout: tuple[str, ...] = option(
        help="Column order of a fused lora_B if the config does not record it; pass it once for all adapters, or once "
        "per adapter in order.",
        default=(),
        kind=Choice(lambda: EXPERT_LAYOUTS),
        many=True,
    )
    adapter_name: tuple[str, ...] = option(
        help="Adapter to read if a file or folder contains several; pass it once for all adapters, or once per "
        "adapter in order.",
        default=(),
        kind=TEXT,
        many=True,
        metavar="NAME",
    )
    input_alpha: tuple[float, ...] = option(
        help="Alpha, for adapters whose files do not record it; pass it once for all adapters, or once per adapter in "
        "order.",
        default=(),
        kind=NUMBER,
        many=True,
        commas=True,
    )

    def readings(self, count: int) -> tuple[Reading, ...]:
        """One `Reading` for each of `count` adapters; raises `UsageError` for another number of values."""
        layouts = each(count, self.expert_layout, "expert layouts")
        names = each(count, self.adapter_name, "adapter names")
        alphas = each(count, self.input_alpha, "input alphas")
        return tuple(Reading(*values) for values in zip(layouts, names, alphas, strict=True))


def each(count: int, values: Sequence[Value] | None, what: str) -> list[Value | None]:
    """`values` for `count` adapters: none, one for all, or one for each."""
    if not values:
        return [None] * count
    if len(values) == 1:
        return [values[0]] * count
    if len(values) != count:
        raise UsageError(f"got {len(values)} {what} for {count} adapters; pass one for all of them or one for each")
    return list(values)
