"""`Reading`: what the caller says of an adapter where its files do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from loratool.errors import UsageError, printable

Value = TypeVar("Value", str, float)
EXPERT_LAYOUTS = ("rank-major", "grouped-by-expert")


@dataclass(frozen=True)
class Reading:
    """How one adapter is to be read; None leaves a question to its files."""

    expert_layout: str | None = None  # of the columns of a fused lora_B: one of EXPERT_LAYOUTS
    adapter_name: str | None = None  # which of several adapters in one file or folder
    input_alpha: float | None = None  # α of every module, for files that do not hold it


AS_STORED = Reading()  # all is as the files say


def readings(
    count: int,
    expert_layout: str | Sequence[str] | None = (),
    adapter_name: str | Sequence[str] | None = (),
    input_alpha: float | Sequence[float] | None = (),
) -> tuple[Reading, ...]:
    """One `Reading` for each of `count` adapters; of each setting one value for all of them, or one for each.

    Raises `UsageError` for another number of values, an unknown layout, or an α that is not a finite number.
    """
    layouts = each(count, [expert_layout] if isinstance(expert_layout, str) else expert_layout, "expert layouts")
    names = each(count, [adapter_name] if isinstance(adapter_name, str) else adapter_name, "adapter names")
    alphas = each(count, [input_alpha] if isinstance(input_alpha, (int, float)) else input_alpha, "input alphas")
    for layout in layouts:
        if layout is not None and layout not in EXPERT_LAYOUTS:
            raise UsageError(
                f"expert layout {printable(repr(layout))} is unknown; expected one of {', '.join(EXPERT_LAYOUTS)}"
            )
    for alpha in alphas:
        if alpha is not None and not math.isfinite(alpha):
            raise UsageError(f"an input alpha must be a finite number (got {alpha})")
    return tuple(Reading(*values) for values in zip(layouts, names, alphas, strict=True))


def each(count: int, values: Sequence[Value] | None, what: str) -> list[Value | None]:
    """`values` for `count` adapters: none, one for all, or one for each."""
    if not values:
        return [None] * count
    if len(values) == 1:
        return [values[0]] * count
    if len(values) != count:
        raise UsageError(f"got {len(values)} {what} for {count} adapters; pass one for all of them, or one for each")
    return list(values)
