"""Names as templates with numbers, and many names in one line.

`model.layers.3.mlp.experts.7.w1.weight` is the template `.model.layers.#.mlp.experts.#.w1.weight.` with the numbers 3 and 7.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import takewhile

from loratool.errors import printable
from loratool.grouping import by_key

NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")
MOST_NAMED = 4  # groups of names that a note lists
MOST_NUMBERS = 8  # of a name that ranges are told of
Numbers = tuple[str, ...]


@lru_cache(maxsize=1 << 17)  # names of one model; emptied when its binding is done
def template_of(name: str) -> tuple[str, Numbers]:
    """A name's template and its numbers."""
    dotted = f".{name}."
    return NUMBER.sub("#", dotted), tuple(NUMBER.findall(dotted))


def common_start(names: Iterable[str]) -> str:
    """The first parts of paths that all of them have, with the dot behind."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{parts[0]}." for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))


def fill(template: str, numbers: Numbers) -> str:
    """A template with its numbers put in."""
    pieces = template.split("#")
    return "".join(piece for pair in zip(pieces, (*numbers, ""), strict=True) for piece in pair)


def spans(numbers: Iterable[str]) -> str:
    """`0-3,7` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(set(map(int, numbers))):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def grouped(names: Iterable[str]) -> list[str]:
    """Names with their numbers as ranges: `model.layers.{0-31}.mlp.experts.{0-7}.w1.weight`.

    A name of its own keeps its numbers. Where not every combination of the ranges is there, each value of the
    first number that has others than the rest gets a line of its own.
    """
    templates = by_key(template_of(name) if "#" not in name else (f".{name}.", ()) for name in names)
    return [line for template, every in templates.items() for line in ranges(template, every)]


def listed(names: Iterable[str]) -> str:
    """Names for a note: in groups, the first few of them."""
    return first_few(grouped(names), MOST_NAMED)


def first_few(names: Sequence[object], most: int) -> str:
    """The first of some names: `a, b, …` where there are more."""
    return ", ".join(map(printable, names[:most])) + (", …" if len(names) > most else "")


def some(names: Sequence[object], most: int = 3) -> str:
    """The first of some names, and how many more there are: `a, b, c and 4 more`."""
    return ", ".join(map(printable, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def ranges(template: str, every: Sequence[Numbers]) -> list[str]:
    """The names of one template, in as few lines as ranges can tell them exactly."""
    if template.count("#") != len(every[0]) or not every[0]:
        return [template[1:-1]]
    if len(every[0]) > MOST_NUMBERS:
        return [fill(template, numbers)[1:-1] for numbers in dict.fromkeys(every)]
    if len(every[0]) == 1:
        return [fill(template, (braced(numbers[0] for numbers in every),))[1:-1]]
    head, _, tail = template.partition("#")
    firsts = by_key((first, tuple(rest)) for first, *rest in every)
    alike = by_key((tuple(ranges(tail, rests)), first) for first, rests in firsts.items())
    return [f"{head[1:]}{braced(numbers)}{tail[0]}{line}" for lines, numbers in alike.items() for line in lines]


def braced(numbers: Iterable[str]) -> str:
    found = spans(numbers)
    return found if found.isdigit() else f"{{{found}}}"
