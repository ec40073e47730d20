"""A worker's share of a command whose partial results go into a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratool import __version__
from loratool.files.partials import Partials
from loratool.options.sharing import Share, deal
from loratool.results.base import Cost
from loratool.results.partial import PartialReport

if TYPE_CHECKING:
    from loratool.arguments import PathLike, Progress


def partials_in(into: PathLike, command: str, facts: Sequence[Any], costs: Sequence[float]) -> Partials:
    """The partial results of a command in a folder: `facts`, plain data, tell inputs and options, `costs` those of each unit."""
    fingerprint = hashlib.sha256(json.dumps([__version__, *facts]).encode()).hexdigest()
    return Partials(into, command, fingerprint, costs)


def do_share(
    partials: Partials,
    share: Share,
    work: Callable[[int], tuple[Mapping[str, Any], bytes]],
    progress: Progress | None,
    started: float,
    device: str = "",
) -> PartialReport:
    """Do the units of a share that are not done, for a command that began at that second of `time.monotonic`."""
    partials.claim()
    units = deal(partials.costs, share.count)[share.index - 1]
    made = 0
    for number, unit in enumerate(units):
        if partials.read(unit) is None:
            partials.forget(unit)  # where it is damaged
            partials.publish(unit, *work(unit))
            made += 1
        if progress:
            progress(number + 1, len(units))
    cost = Cost.since(started, device)
    return PartialReport(partials.folder, str(share), made, len(units) - made, len(partials.costs), cost=cost)
