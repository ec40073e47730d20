"""Patterns of names, from configs and from users: which of them match a module, as PEFT matches its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

from loratool.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

PATTERN_SECONDS = 10.0
PLAIN_PATTERN = re.compile(r"[\w.$-]+")  # patterns of these characters compile and match at once


def match_patterns(patterns: Iterable[str], modules: Iterable[str]) -> dict[str, set[str]]:
    """Module → the patterns that PEFT would find to match it: the whole path, or a whole dotted tail of it.

    A pattern may take for ever to compile or to match, so all but plain ones are tried in a process
    of their own that ends with the time limit. `ValueError` names those that took too long, or are none.
    """
    wanted, names = list(dict.fromkeys(patterns)), list(modules)
    risky = [p for p in wanted if not PLAIN_PATTERN.fullmatch(p)]
    found: dict[str, set[str]] = {name: set() for name in names}
    for pattern in wanted:
        if pattern not in risky:
            expression = re.compile(rf"(?:.*\.)?(?:{pattern})$")
            for name in names:
                if expression.match(name):
                    found[name].add(pattern)
    if risky and names:
        for name, matching in zip(names, match_apart(risky, names), strict=True):
            found[name].update(matching)
    for name in set(names) & set(wanted):  # PEFT's last resort: the path itself as a key
        if not found[name]:
            found[name].add(name)
    return found


MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
expressions, invalid = [], []
for p in patterns:
    try:
        re.compile(p)
        expressions.append((p, re.compile(rf"(.*\\.)?({p})$")))
    except (re.error, RecursionError, OverflowError):
        invalid.append(p)
json.dump([invalid, [[p for p, e in expressions if e.match(n)] for n in names]], sys.stdout)
"""


def match_apart(patterns: list[str], names: list[str]) -> list[list[str]]:
    """For each name the patterns that match it, tried in a child process under a time limit."""
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", MATCHER],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=PATTERN_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"a pattern takes too long to match, one of {few(patterns)}; write it without nested repeats"
        ) from None
    except subprocess.CalledProcessError:
        raise ValueError("a pattern cannot be matched") from None
    result: list[list[str]]
    invalid, result = json.loads(answer.stdout)
    if invalid:
        raise ValueError(f"no regular expression: {few(invalid)}")
    return result


def few(patterns: list[str]) -> str:
    """The first patterns, for a message."""
    return ", ".join(printable(repr(p)) for p in patterns[:3]) + (", …" if len(patterns) > 3 else "")
