"""The options of `extract`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from loratool.adapters.writer import FactorOptions
from loratool.errors import UsageError, printable
from loratool.options.described import FLAG, Kind, Number, option
from loratool.options.shared import DeviceOption, OrientationOption
from loratool.options.writing import PublishOptions
from loratool.reworking.dialects import DialectOption

MOST_RANK = 32  # where no number is given: what servers take by their defaults or nearly so, and noise seldom fills


@dataclass(frozen=True)
class RankOrAuto(Kind):
    """A whole number, or auto."""

    metavar = "N|auto"

    annotation = 'int | Literal["auto"]'

    def taken(self, value: Any, flag: str) -> Any:
        if value == "auto":
            return value
        number = Number(whole=True).number(value)
        if number is None or number < 1:
            raise UsageError(f"{flag} must be auto or a whole number of at least 1 (got {printable(repr(value))})")
        return number


@dataclass(frozen=True, kw_only=True)
class ExtractOptions(OrientationOption, FactorOptions, DialectOption, DeviceOption, PublishOptions):
    """Of `extract`."""

    rank: int | Literal["auto"] | None = option(
        help="Rank of every layer; auto keeps what rounding cannot explain [default: auto].", kind=RankOrAuto()
    )
    energy: float | None = option(
        help="Fraction of ‖W_tuned − W_base‖² that each layer keeps; with --rank the smaller rank is used.",
        kind=Number(above=0, high=1),
    )
    max_rank: int = option(
        help="Largest rank of a layer, with auto or --energy.", default=MOST_RANK, kind=Number(whole=True, low=1)
    )
    exact: bool = option(help="Use a full SVD of every matrix instead of a sketch.", default=False, kind=FLAG)
    include: tuple[str, ...] = option(
        help="Only modules whose name contains a match of REGEX; may be repeated.",
        default=(),
        many=True,
        metavar="REGEX",
    )
    exclude: tuple[str, ...] = option(
        help="Skip modules whose name contains a match of REGEX; may be repeated.",
        default=(),
        many=True,
        metavar="REGEX",
    )
    seed: int = option(help="Random seed of the sketch.", default=0, kind=Number(whole=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, int) and self.is_given("max_rank"):
            raise UsageError(f"--max-rank is for --rank auto and for --energy alone (got --rank {self.rank})")
        if self.exact and self.is_given("seed"):
            raise UsageError("--seed is for the sketch, which --exact does not use")
