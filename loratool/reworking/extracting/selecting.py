"""Names: which modules `--include` and `--exclude` ask for, and which known ones are near to others."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence

from loratool.adapters.patterns import search_names
from loratool.errors import UsageError, printable
from loratool.templates import first_few


def selected(include: Sequence[str], exclude: Sequence[str], modules: Collection[str]) -> set[str]:
    """The modules that are asked for.

    Raises `UsageError` for a pattern that is no regular expression, takes for ever, or matches nothing.
    """
    patterns = (*include, *exclude)
    try:
        matching = search_names(patterns, modules)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if idle := set(patterns) - set[str]().union(*matching.values()):
        raise UsageError(f"no module matches {first_few([*map(repr, sorted(idle))], 3)}")
    included = {module for module in modules if not include or not matching[module].isdisjoint(include)}
    return {module for module in included if matching[module].isdisjoint(exclude)}


def nearest_names(names: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    """For some names that are not known, the nearest that are."""
    for name in names[:3]:
        near = difflib.get_close_matches(name, known[:2000], n=1, cutoff=0.0)
        yield f"TUNED has {printable(name)}" + (f"; nearest in BASE is {printable(near[0])}" if near else "")
