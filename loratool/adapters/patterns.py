"""Patterns of names, from configs and from users: which of them match a module, as PEFT matches its own.

The package `regex` has a time limit, too, and reads some patterns otherwise than `re`, which PEFT matches with.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping

from loratool.grouping import by_key
from loratool.templates import first_few

PATTERN_SECONDS = 10.0
PLAIN_PATTERN = re.compile(r"[\w.$-]+")  # patterns of these characters compile and match at once
DOT, PIECE = re.compile(r"\."), re.compile(r"\\?.")
FIXED_PATTERN = re.compile(r"\^?(?P<body>(?:[\w.-]|\\[.-])+)\$?")  # and what these match is as long as they are


def match_patterns(patterns: Iterable[str], modules: Iterable[str]) -> dict[str, set[str]]:
    """Module → the patterns that PEFT would find to match it: the whole path, or a whole dotted tail of it."""
    wanted, names = list(patterns), list(modules)
    fixed = {pattern: match["body"] for pattern in wanted if (match := FIXED_PATTERN.fullmatch(pattern))}
    if any("\n" in name for name in names):  # which no dot matches, and which may follow the end
        fixed = {}
    found = search_names((pattern for pattern in wanted if pattern not in fixed), names, r"^(.*\.)?({})$")
    for pattern, name in fixed_matches(fixed, found) if fixed else ():
        found[name].add(pattern)
    for name in found.keys() & wanted:  # PEFT's last resort: the path itself as a key
        if not found[name]:
            found[name].add(name)
    return found


def fixed_matches(bodies: Mapping[str, str], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(pattern, name) for all that match, by the patterns' bodies: a config may have one for each of thousands of modules.

    Dotted tails are looked up by their length, with a dot at every place at which a pattern takes any character.
    """
    tails = by_key(
        (len(name) - at, (name[at:], name)) for name in names for at in [0, *(dot.end() for dot in DOT.finditer(name))]
    )
    pieces = {pattern: PIECE.findall(body) for pattern, body in bodies.items()}
    alike = by_key(
        ((len(each), tuple(at for at, piece in enumerate(each) if piece == ".")), pattern)
        for pattern, each in pieces.items()
    )
    for (length, open_places), group in alike.items():
        there = by_key((with_dots(tail, open_places), name) for tail, name in tails.get(length, ()))
        for pattern in group:
            text = "".join(piece[-1] for piece in pieces[pattern])
            yield from ((pattern, name) for name in there.get(text, ()) if pattern[0] != "^" or len(name) == length)


def with_dots(text: str, places: Iterable[int]) -> str:
    """A text with dots at some places."""
    characters = list(text)
    for at in places:
        characters[at] = "."
    return "".join(characters)


def search_names(patterns: Iterable[str], names: Iterable[str], around: str = "{}") -> dict[str, set[str]]:
    """Name → the patterns that are found in it; `around` is what each of them is put into.

    A pattern may take for ever to compile or to match, so all but plain ones are tried in a process
    of their own that ends with the time limit. `ValueError` names those that took too long, or are none.
    """
    wanted, found = list(dict.fromkeys(patterns)), {name: set[str]() for name in names}
    for pattern in filter(PLAIN_PATTERN.fullmatch, wanted):
        expression = re.compile(around.format(pattern))
        for name in filter(expression.search, found):
            found[name].add(pattern)
    risky = [pattern for pattern in wanted if not PLAIN_PATTERN.fullmatch(pattern)]
    if risky and found:
        for matching, more in zip(found.values(), search_apart(risky, list(found), around), strict=True):
            matching.update(more)
    return found


SEARCHER = """
import json, re, sys
patterns, names, around = json.load(sys.stdin)
expressions, invalid = [], []
for p in patterns:
    try:
        re.compile(p)
        expressions.append((p, re.compile(around.format(p))))
    except (re.error, RecursionError, OverflowError):
        invalid.append(p)
json.dump([invalid, [[p for p, e in expressions if e.search(n)] for n in names]], sys.stdout)
"""


def search_apart(patterns: list[str], names: list[str], around: str) -> list[list[str]]:
    """For each name the patterns that are found in it, tried in a child process under a time limit."""
    import subprocess

    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", SEARCHER],
            input=json.dumps([patterns, names, around]),
            capture_output=True,
            text=True,
            timeout=PATTERN_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"one of these patterns takes too long to match: {first_few([*map(repr, patterns)], 3)}; write it without nested repeats"
        ) from None
    except subprocess.CalledProcessError:
        raise ValueError(f"a pattern cannot be matched, one of {first_few([*map(repr, patterns)], 3)}") from None
    result: list[list[str]]
    invalid, result = json.loads(answer.stdout)
    if invalid:
        raise ValueError(f"not a valid regular expression: {first_few([*map(repr, invalid)], 3)}")
    return result
