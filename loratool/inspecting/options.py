"""The options of `inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loratool.adapters.reading import ReadingOptions
from loratool.notes import Note
from loratool.options.described import FLAG, Number, PathKind, PlaceKind, described_by, option
from loratool.options.shared import DeviceOption, NamingOptions, OrientationOption

OF_ADAPTERS = ("base", "base_config", "metadata", "expert_layout", "adapter_name", "input_alpha")  # options


@dataclass(frozen=True, kw_only=True)
class InspectOptions(NamingOptions, OrientationOption, ReadingOptions, DeviceOption):
    """Of `inspect`."""

    base: str | None = option(
        help="Base model of the adapters; adds parameter counts, matching weights and sizes.", kind=PlaceKind()
    )
    base_config: str | None = option(
        help="Only the config.json of the base; adds total parameters, for known model families.",
        kind=PlaceKind("FILE", role="any"),
    )
    metadata: bool = option(
        help="Show what the training tool wrote into the header of an adapter's file.", default=False, kind=FLAG
    )
    tensors: bool = option(help="List every tensor.", default=False, kind=FLAG)
    values: bool = option(help="Measure every module of an adapter: norms, ranks, spectra.", default=False, kind=FLAG)
    check: bool = option(help="Check for problems; exit with 3 or 5 if there are any.", default=False, kind=FLAG)
    near: str | None = option(
        help="List the adapters of an index, made by `loratool index`, that are nearest to this one.",
        kind=PathKind("INDEX"),
    )
    top: int = option(help="How many of the nearest to list.", default=10, kind=Number(whole=True, low=1))
    where: str | None = option(
        help='Of several adapters, list only those that meet conditions, such as "rank>16 and base~llama".',
        metavar="CONDITIONS",
    )
    sort: str | None = option(
        help="Sort several adapters by these fields, separated by commas; - before a field puts the largest first.",
        metavar="FIELD",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_needed("top", "near")
        self.check_needed("maps", "base")
        self.check_needed("fan_in_fan_out", "base")


def unused_of_model(options: InspectOptions) -> Iterator[Note]:
    """What to say of options that have no effect on what is shown of a model."""
    if options.values:
        yield Note("values-not-measured", "values of a model are not measured; --values is for adapters")
    every = described_by(InspectOptions)
    if idle := [every[name][0].flag for name in OF_ADAPTERS if options.is_given(name)]:
        yield Note(
            "options-for-adapters",
            f"{' and '.join(idle)} {'are' if len(idle) > 1 else 'is'} for adapters, and ignored for a model",
        )
