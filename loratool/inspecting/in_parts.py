"""`inspect --values` by many workers: what each measures of its modules is put together in the end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loratool.adapters.reading import ReadingOptions
from loratool.arguments import PathLike, Progress
from loratool.errors import UsageError, printable
from loratool.inspecting.inspect import inspect
from loratool.inspecting.options import InspectOptions
from loratool.measuring.shared_work import do_share, partials_in
from loratool.options.described import described_by
from loratool.options.shared import NamingOptions, OrientationOption
from loratool.results.values import Measured, MeasuredOnBase, Values

if TYPE_CHECKING:
    from loratool.adapters.adapter import Adapter
    from loratool.bases.adapter_fit import Fit
    from loratool.files.partials import Partials
    from loratool.measuring.modules import Look
    from loratool.options.sharing import Share
    from loratool.results.facts import OneFacts
    from loratool.results.partial import PartialReport

COMMAND = "inspect"
UNIT = 8  # modules that are measured together
# options on which it depends what is measured
DECISIVE = {name for kind in (NamingOptions, OrientationOption, ReadingOptions) for name in described_by(kind)}


class MeasuredError(Exception):
    """A worker's share is measured; the rest of the inspection is not asked for."""


def inspect_part(
    path: PathLike, options: InspectOptions, share: Share, into: PathLike, progress: Progress | None = None
) -> PartialReport:
    """Do one worker's share; `loratool.commands.partial` says all of it."""
    started = time.monotonic()
    reports: list[PartialReport] = []

    def measured(adapter: Adapter, fit: Fit | None, device: str, _progress: Progress | None) -> Values:
        from loratool.measuring.modules import check_packed, layers_in, looked_at
        from loratool.measuring.session import session

        layers, _ = layers_in(adapter)
        if fit:
            check_packed(fit)
        units, partials = units_of(adapter, list(layers), fit, options, into)
        with session(device, ()) as at_work:

            def work(unit: int) -> tuple[Mapping[str, Any], bytes]:
                return {"modules": [told(look) for look in looked_at(layers, units[unit], fit, at_work)]}, b""

            reports.append(do_share(partials, share, work, progress, started))
        raise MeasuredError

    try:
        inspect(path, with_values(options), None, None, measured)
    except MeasuredError:
        return reports[0]
    raise UsageError(f"{printable(path)}: not an adapter; --part measures only adapters")


def finish_inspect(path: PathLike, options: InspectOptions, into: PathLike) -> OneFacts:
    """What all workers measured; `loratool.commands.partial` says all of it."""

    def measured(adapter: Adapter, fit: Fit | None, device: str, _progress: Progress | None) -> Values:
        from loratool.measuring.modules import layers_in, measure

        names = list(layers_in(adapter)[0])
        units, partials = units_of(adapter, names, fit, options, into)
        looks = [look_of(each) for table, _ in partials.every() for each in table["modules"]]
        found = dict(zip([target for unit in units for target in unit], looks, strict=True))
        return measure(adapter, fit, device, None, {target: found[target] for target in names})

    return inspect(path, with_values(options), None, None, measured)


def with_values(options: InspectOptions) -> InspectOptions:
    """The options, which must ask for values, and for one adapter."""
    if not options.values:
        raise UsageError("--part and --finish need --values")
    return options


def units_of(
    adapter: Adapter, names: list[str], fit: Fit | None, options: InspectOptions, into: PathLike
) -> tuple[list[list[str]], Partials]:
    """The targets in units, and where what is measured of them goes."""
    from loratool.merging.fingerprints import sampled

    units = [names[at : at + UNIT] for at in range(0, len(names), UNIT)]
    base = fit.checkpoint if fit else None
    facts = [
        sorted(adapter.digests().values()),
        [sampled(shard) for shard in base.shards] if base else [],
        {name: value for name, value in options.keywords().items() if name in DECISIVE},
        names,
    ]
    return units, partials_in(into, COMMAND, facts, [float(len(unit)) for unit in units])


def told(look: Look) -> dict[str, Any]:
    """What is measured of a module, as JSON."""
    measured, energies, noise = look
    return {"told": dataclasses.asdict(measured), "energies": energies, "noise": noise}


def look_of(table: Mapping[str, Any]) -> Look:
    facts = dict(table["told"])
    for name in ("energy_ranks", "singular_values"):
        facts[name] = None if facts[name] is None else tuple(facts[name])
    facts["weight"] = None if facts["weight"] is None else MeasuredOnBase(**facts["weight"])
    return Measured(**facts), list(table["energies"]), bool(table["noise"])
