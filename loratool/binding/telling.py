"""Names for people: many in one line, and the nearest to one."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from loratool.binding.names import Numbers, fill, template_of
from loratool.errors import printable

if TYPE_CHECKING:
    from loratool.safefile import TensorInfo

MOST_COMPARED = 500  # templates that a search for the nearest one looks at
MOST_SEARCHED = 64  # templates for which the nearest one is searched: more than a message shows
MOST_NAMED = 4  # groups of names that a note lists
MOST_NUMBERS = 8  # of a name that ranges are told of


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
    templates: dict[str, list[Numbers]] = {}
    for name in names:
        template, numbers = template_of(name) if "#" not in name else (f".{name}.", ())
        templates.setdefault(template, []).append(numbers)
    return [line for template, every in templates.items() for line in ranges(template, every)]


def listed(names: Iterable[str]) -> str:
    """Names for a note: in groups, the first few of them."""
    lines = grouped(names)
    return ", ".join(map(printable, lines[:MOST_NAMED])) + (", …" if len(lines) > MOST_NAMED else "")


def ranges(template: str, every: Sequence[Numbers]) -> list[str]:
    """The names of one template, in as few lines as ranges can tell them exactly."""
    if template.count("#") != len(every[0]) or not every[0]:
        return [template[1:-1]]
    if len(every[0]) > MOST_NUMBERS:
        return [fill(template, numbers)[1:-1] for numbers in dict.fromkeys(every)]
    if len(every[0]) == 1:
        return [fill(template, (braced(numbers[0] for numbers in every),))[1:-1]]
    firsts: dict[str, list[Numbers]] = {}
    for first, *rest in every:
        firsts.setdefault(first, []).append(tuple(rest))
    alike: dict[tuple[str, ...], list[str]] = {}
    head, _, tail = template.partition("#")
    for first, rests in firsts.items():
        alike.setdefault(tuple(ranges(tail, rests)), []).append(first)
    return [f"{head[1:]}{braced(numbers)}{tail[0]}{line}" for lines, numbers in alike.items() for line in lines]


def braced(numbers: Iterable[str]) -> str:
    found = spans(numbers)
    return found if found.isdigit() else f"{{{found}}}"


class Nearest:
    """For a name that the base has not, the nearest that it has."""

    def __init__(self, templates: Mapping[str, Mapping[Numbers, str]], tensors: Mapping[str, TensorInfo]) -> None:
        self.templates, self.tensors = templates, tensors
        self.found: dict[str, str | None] = {}

    def reason(self, target: str, proposal: str = "") -> str:
        """That the base has no such weight, with the `--map` that leads to one, or else the nearest that it has."""
        if proposal:
            return (
                f"the base has no such weight; if it is the same layer, give --map {printable(shlex.quote(proposal))}"
            )
        template, numbers = template_of(target)
        if template not in self.found:
            searched = len(self.found) < MOST_SEARCHED
            self.found[template] = nearest(template, sorted(self.templates)) if searched else None
        there = self.found[template]
        if there is None:
            return "the base has no such weight"
        members = self.templates[there]
        near = members.get(numbers) or members[min(members, key=lambda found: tuple(map(int, found)))]
        return (
            f"the base has no such weight; nearest is {printable(near)} {list(self.tensors[near].shape)}; if a weight of "
            "the base is the same layer under another name, --map REGEX=TEMPLATE says so"
        )


def nearest(template: str, known: Sequence[str]) -> str | None:
    """The template most like another: of those with the same last components where there are any."""
    parts = template.split(".")
    for tail in (3, 2):  # the last one is empty
        if alike := [name for name in known if name.split(".")[-tail:] == parts[-tail:]]:
            known = alike
            break
    found = difflib.get_close_matches(template, known[:MOST_COMPARED], n=1, cutoff=0.5)
    return found[0] if found else None


def tell(problems: Mapping[str, str]) -> list[str]:
    """Problems of targets, those that differ in numbers only in one line."""
    alike: dict[tuple[str, str], list[str]] = {}
    for target, why in problems.items():
        template = template_of(target)[0] if "#" not in target else target
        alike.setdefault((template, template_of(why)[0]), []).append(target)
    return [f"{printable(line)}: {problems[targets[0]]}" for targets in alike.values() for line in grouped(targets)]
