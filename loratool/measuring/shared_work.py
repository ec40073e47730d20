"""A worker's share of a command whose partial results go into a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loratool.options.sharing import Share, deal

if TYPE_CHECKING:
    from loratool.arguments import Progress
    from loratool.files.partials import Partials


def do_share(
    partials: Partials,
    share: Share,
    work: Callable[[int], tuple[Mapping[str, Any], bytes]],
    tell: Progress,
) -> tuple[int, int]:
    """Do the units of a share that are not done; how many were done now, and how many before."""
    partials.claim()
    units = deal(partials.costs, share.count)[share.index - 1]
    made = 0
    for number, unit in enumerate(units):
        if partials.read(unit) is None:
            partials.forget(unit)  # where it is damaged
            partials.publish(unit, *work(unit))
            made += 1
        tell(number + 1, len(units))
    return made, len(units) - made
