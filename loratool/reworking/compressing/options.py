"""The options of `compress` and `expand`."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.adapters.ranks import Amount
from loratool.adapters.reading import ReadingOptions
from loratool.adapters.writer import FactorOptions
from loratool.errors import UsageError
from loratool.options.described import Number, PathKind, amount, option
from loratool.options.shared import DeviceOption
from loratool.options.writing import PublishOptions
from loratool.reworking.dialects import ModelOption


@dataclass(frozen=True, kw_only=True)
class CompressOptions(FactorOptions, ReadingOptions, DeviceOption, ModelOption):
    """Of `compress`."""

    rank: int | None = option(
        help="Keep in each module as much as this many shared directions per side take.", kind=Number(whole=True, low=1)
    )
    energy: float | None = option(
        help="Fraction of ‖ΔW‖² to keep, on average over the adapters, such as 0.95.", kind=Number(above=0, high=1)
    )
    budget: str | None = option(
        help="Limit on the parameters (4M) or bytes (16MB) of the shared file and all small files together.",
        kind=Amount(),
        metavar="SIZE",
    )
    into: str | None = option(
        help="Add the adapters to a folder that compress has made, whose other files stay as they are.",
        kind=PathKind(),
        metavar="SHARED",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if self.into is not None and given:
            raise UsageError(f"--{given[0]} does not apply to --into: the shared file sets how much to keep")
        if self.into is None and len(given) != 1:
            said = " and ".join(f"--{name}" for name in given) or "none"
            raise UsageError(f"pass exactly one of --rank, --energy, --budget (got {said})")

    @property
    def limit(self) -> tuple[float, bool]:
        """The number that `--budget` gives, and whether it is one of bytes, as costs are where there is none."""
        return (amount(str(self.budget)) if self.budget is not None else None) or (0.0, True)

    @property
    def rule(self) -> str:
        """What was asked for, in words."""
        if self.into is not None:
            return "how much a byte keeps in the shared file"
        if self.budget is not None:
            number, in_bytes = self.limit
            return f"budget {number:,.0f} {'bytes' if in_bytes else 'parameters'}"
        return f"rank {self.rank}" if self.rank is not None else f"energy {self.energy:g}"


@dataclass(frozen=True, kw_only=True)
class ExpandOptions(FactorOptions, PublishOptions):
    """Of `expand`."""
