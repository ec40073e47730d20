"""`--include` and `--exclude`: which modules are asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.adapters.patterns import PATTERN_SECONDS, PLAIN_PATTERN, few
from loratool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Selection:
    """Which modules are asked for."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    matching: dict[str, set[str]]  # module → the patterns that match in it

    @classmethod
    def of(cls, include: Sequence[str], exclude: Sequence[str], modules: Sequence[str]) -> Selection:
        """Raises `UsageError` for a pattern that is no regular expression, takes for ever, or matches nothing."""
        patterns = list(dict.fromkeys([*include, *exclude]))
        matching = dict(zip(modules, search(patterns, modules), strict=True))
        if idle := set(patterns) - set[str]().union(*matching.values()):
            raise UsageError(f"no module has a name that matches {few(sorted(idle))}")
        return cls(tuple(include), tuple(exclude), matching)

    def __contains__(self, module: str) -> bool:
        found = self.matching[module]
        return (not self.include or not found.isdisjoint(self.include)) and found.isdisjoint(self.exclude)


SEARCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
expressions, invalid = [], []
for p in patterns:
    try:
        expressions.append((p, re.compile(p)))
    except (re.error, RecursionError, OverflowError):
        invalid.append(p)
json.dump([invalid, [[p for p, e in expressions if e.search(n)] for n in names]], sys.stdout)
"""


def search(patterns: Sequence[str], names: Sequence[str]) -> list[set[str]]:
    """For each name the patterns that match somewhere in it; those that are not plain in a process with a time limit."""
    risky = [p for p in patterns if not PLAIN_PATTERN.fullmatch(p)]
    plain = [(p, re.compile(p)) for p in patterns if p not in risky]
    found = [{p for p, expression in plain if expression.search(name)} for name in names]
    if not risky:
        return found
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", SEARCHER],
            input=json.dumps([risky, list(names)]),
            capture_output=True,
            text=True,
            timeout=PATTERN_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(f"a pattern takes too long to match, one of {few(risky)}") from None
    except subprocess.CalledProcessError:
        raise UsageError(f"a pattern cannot be matched, one of {few(risky)}") from None
    invalid, matching = json.loads(answer.stdout)
    if invalid:
        raise UsageError(f"no regular expression: {few(invalid)}")
    return [one.union(more) for one, more in zip(found, matching, strict=True)]
