"""The `--map` options that lead every weight without a place to a tensor of the base, where there can be no doubt.

A wrong proposal is worse than none. So there are only those that together map every unmatched weight, each to a tensor
of its own, of the same shape, under the same last name or one that a release of transformers gives to the same layer,
with all numbers kept.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence, Set

from loratool.algebra.updates.base import Update
from loratool.bases.binding import fusing
from loratool.bases.binding.fusing import Misfit
from loratool.bases.binding.names import Disk, by_template, unwrapped
from loratool.bases.binding.places import Rule
from loratool.bases.binding.resolving import tower
from loratool.layouts.architectures import INPUT_EMBEDDINGS, OUTPUT_HEADS
from loratool.layouts.renames import RENAMES
from loratool.templates import Numbers, template_of

MOST_SEARCHED = 64  # templates of lost weights; an adapter with more lies in another model
SEQUENCE = ".0"  # what a layer alone in an nn.Sequential has behind the sequence's name


def last_of(name: str) -> str:
    """The last component of a row of the table of renames."""
    return name.removesuffix(".weight").rpartition(".")[2].lstrip("^")


SAME_LAYER = frozenset(
    pair for one, other in RENAMES for pair in ((last_of(one), last_of(other)), (last_of(other), last_of(one)))
)


def proposals(lost: Mapping[str, Update], others: Iterable[str], disk: Disk, taken: Set[str]) -> dict[str, str]:
    """For each lost weight the `--map` text that leads it to its tensor; nothing where one of them has none.

    Args:
        lost: target → its update.
        others: the adapter's targets that have a place, which the maps must leave alone.
        disk: the base's tensors by name.
        taken: tensors that other targets of the adapter edit.
    """
    members = by_template(lost)
    if not lost or len(members) > MOST_SEARCHED or any("#" in target for target in lost):
        return {}
    maps: dict[str, str] = {}
    wanted: dict[str, str] = {}  # target → the tensor it is led to
    for template, every in members.items():
        whole = all(lost[target].replaces for target, _ in every)
        there = only_place(template, every, lost, disk)
        if whole and there is not None and first_of(there) != first_of(template):
            there = None  # a head of its own, whatever layer of another head has its shape
        if there is None:
            if whole:
                continue  # a head that the base has not: it is another question whether it may be added
            return {}
        maps[template] = map_text(template, there)
        wanted |= {target: disk.templates[there][kept(there, numbers)] for target, numbers in every}
    tensors = list(wanted.values())
    if len(set(tensors)) < len(tensors) or taken & set(tensors) or not lead(maps.values(), wanted, others):
        return {}
    return {target: maps[template] for template, every in members.items() for target, _ in every if target in wanted}


def first_of(template: str) -> str:
    """The module at the top of the model that a weight belongs to."""
    return template.lstrip(".").partition(".")[0]


def only_place(
    template: str, every: Sequence[tuple[str, Numbers]], lost: Mapping[str, Update], disk: Disk
) -> str | None:
    """The one template of the base that all weights of a template can mean: of several the one with the longest end in
    common, if that is one.
    """
    found = [there for there in disk.templates if same_layer(template, there, every) and fits(there, every, lost, disk)]
    ends = {there: common_end(template, there) for there in found}
    best = [there for there in found if ends[there] == max(ends.values())]
    return best[0] if len(best) == 1 else None


def same_layer(template: str, there: str, every: Sequence[tuple[str, Numbers]]) -> bool:
    """Whether the last names say that it is the same layer, with as many numbers around it."""
    if is_sequence(template, there):
        return all(numbers[-1] == SEQUENCE[1:] for _, numbers in every)
    old, new = (name[1:-1].split(".") for name in (template, there))
    if tower(template) != tower(there):
        return False
    if template == there or old.count("#") != new.count("#") or old[-1] != new[-1] or min(len(old), len(new)) < 2:
        return False
    if any((old[-2] in role) != (new[-2] in role) for role in (INPUT_EMBEDDINGS, OUTPUT_HEADS)):
        return False
    return old[-2] != "#" and (old[-2] == new[-2] or (old[-2], new[-2]) in SAME_LAYER)


def is_sequence(template: str, there: str) -> bool:
    """Whether one is the only layer of an nn.Sequential where the other is the layer itself."""
    head, _, parameter = template[:-1].rpartition(".")
    return head.endswith(".#") and there == f"{head.removesuffix('.#')}.{parameter}."


def kept(there: str, numbers: Numbers) -> Numbers:
    """The numbers that the base's name has: all, or all but that of a sequence's only layer."""
    return numbers[: there.count("#")]


def fits(there: str, every: Sequence[tuple[str, Numbers]], lost: Mapping[str, Update], disk: Disk) -> bool:
    """Whether the base has a tensor for each, of the shape that its update has."""
    for target, numbers in every:
        name = disk.templates[there].get(kept(there, numbers))
        try:
            if name is None or not fusing.whole(lost[target], disk.tensors[name], Rule()).straight:
                return False
        except Misfit:
            return False
    return True


def common_end(template: str, there: str) -> int:
    """How many components at the end of two names are the same."""
    pairs = zip(reversed(template.split(".")), reversed(there.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def map_text(template: str, there: str) -> str:
    """The `REGEX=TEMPLATE` that makes names of one template those of another, with the shortest pattern that does."""
    old, new = template[1:-1].split("."), there[1:-1].split(".")
    while len(old) > 1 and len(new) > 1 and old[-1] == new[-1]:
        del old[-1], new[-1]
    if is_sequence(template, there):
        old[-1] = SEQUENCE[1:]
    pattern = "^" + r"\.".join(r"(\d+)" if part == "#" else re.escape(part) for part in old) + r"\b"
    groups = itertools.count(1)
    return pattern + "=" + ".".join(rf"\{next(groups)}" if part == "#" else part for part in new)


def lead(maps: Iterable[str], wanted: Mapping[str, str], others: Iterable[str]) -> bool:
    """Whether the maps together do what is wanted and touch no other name."""
    patterns = [(re.compile(regex), new) for regex, _, new in (text.rpartition("=") for text in dict.fromkeys(maps))]

    def renamed(name: str) -> str | None:
        return next((regex.sub(new, name, count=1) for regex, new in patterns if regex.search(name)), None)

    there = {target: template_of(unwrapped(name)) for target, name in wanted.items()}
    reached = {target: renamed(target) for target in wanted}
    right = all(name is not None and template_of(name) == there[target] for target, name in reached.items())
    return right and not any(renamed(other) for other in others)
