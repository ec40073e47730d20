"""What must hold of all places of an adapter together, and what its reader should know of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from loratool.adapters.adapter import Adapter
from loratool.bases.binding.names import unwrapped
from loratool.bases.binding.places import ALL, Place
from loratool.errors import printable
from loratool.files.safefile import TensorInfo
from loratool.grouping import by_key
from loratool.notes import Note
from loratool.templates import Numbers, fill, listed, template_of

LARGEST_WIDTH = 1 << 62  # columns


def overlap(one: Place, other: Place) -> bool:
    """Whether two places of one tensor have an element in common; those of one kind of matrix have rows in common."""
    if one.fold != other.fold:
        return True
    columns = [slice.indices(place.columns, LARGEST_WIDTH) for place in (one, other)]
    (start, stop, step), (start2, stop2, step2) = columns
    if step == step2 and (start - start2) % step:
        return False
    return start < stop2 and start2 < stop


def rivals(places: Mapping[str, Sequence[Place]]) -> dict[str, tuple[str, str]]:
    """Targets that edit what another one edits: target → (tensor, other), of each pair the later by name."""
    tensors = by_key(
        (place.tensor, (place.first_row, target, place)) for target, every in places.items() for place in every
    )
    found: dict[str, tuple[str, str]] = {}
    for tensor, edits in tensors.items():
        if len(edits) == 1:
            continue
        edits.sort(key=lambda edit: edit[:2])
        reaching: list[tuple[str, Place]] = []  # those that may reach into what follows
        for first, target, place in edits:
            reaching = [(t, p) for t, p in reaching if p.first_row + p.rows > first or p.fold != place.fold]
            for other, taken in reaching:
                if other != target and overlap(place, taken):
                    one, later = sorted((target, other))
                    found[later] = min(found.get(later, (tensor, one)), (tensor, one))
            reaching.append((target, place))
    return found


def uncut(places: Sequence[Place]) -> str:
    """Empty where the places may take what they take of their update; else why they may not."""
    update = places[0].update
    if not update.needs_weight:
        if update.looks_at_base and any(place.columns != ALL for place in places):
            return "an update that depends on whole rows of the weight cannot be applied to some of its columns only"
        return ""
    if len(places) == 1 and not places[0].update_row:
        return ""
    starts, counts = zip(*sorted((place.update_row, place.rows) for place in places), strict=True)
    gapless = [*starts, update.shape[0]] == [0, *accumulate(counts)]
    if not gapless or any(place.columns != ALL for place in places):
        return "an update that depends on the whole weight cannot be applied to a part of it"
    return ""


# What a note says of weights that were not found by their own name, by the code of the rule's step.
STEPS = {
    "map-used": "weights were renamed by --map",
    "renamed": "weights were matched under the names that other releases use for the same layers",
    "other-layout": "weights were found under the names that they have in other layouts of the model",
    "prefix-dropped": "weights have a shorter prefix in the base",
    "prefix-added": "weights have a longer prefix in the base",
    "part-of-fused": "weights are parts of fused tensors of the base",
    "split-into-parts": "weights are fused tensors that are split in the base",
}
MOST_STEPS = 4  # ways of renaming that a note tells


def found_otherwise(places: Mapping[str, Sequence[Place]]) -> Iterator[Note]:
    """Notes on weights that another rule than the exact name led to their place; suffixes have one of their own."""
    words: dict[str, set[str]] = {}
    counts = Counter[str]()
    wrapped = 0
    for every in places.values():
        steps = {step for place in every for step in place.rule.steps}
        counts.update({code for code, _ in steps})
        for code, said in steps:
            words.setdefault(code, set()).add(said)
        wrapped += any(unwrapped(place.tensor) != place.tensor for place in every)
    for code, text in STEPS.items():
        if code in counts:
            found = sorted(words[code])
            more = f", and {len(found) - MOST_STEPS} more" if len(found) > MOST_STEPS else ""
            shown = f": {', '.join(map(printable, found[:MOST_STEPS]))}{more}" if code != "map-used" else ""
            yield Note(code, f"{counts[code]} {text}{shown}")
    if wrapped:
        yield Note("wrapper-dropped", f"{wrapped} weights have a training wrapper in their name in the base")


def holes(adapter: Adapter, places: Mapping[str, Sequence[Place]], tensors: Mapping[str, TensorInfo]) -> list[Note]:
    """Notes on weights that the adapter leaves out though its config targets them and the base has them.

    The base's tensors of the same template as one that is edited tell what could have been adapted.
    """
    if (asked := adapter.training.targets) is None:
        return []
    of_target: dict[str, set[Numbers]] = {}
    of_tensor: dict[str, str] = {}
    for target, every in places.items():
        template, numbers = template_of(target)
        if "#" in target or len({place.tensor for place in every}) != 1:
            continue
        there, others = template_of(every[0].tensor)
        if others == numbers:
            of_target.setdefault(template, set()).add(numbers)
            of_tensor[template] = min(there, of_tensor.get(template, there))
    known: dict[str, set[Numbers]] = {there: set() for there in of_tensor.values()}
    for name in tensors:
        there, numbers = template_of(name)
        if there in known:
            known[there].add(numbers)
    left_out = [
        name.removesuffix(".weight")
        for template, present in sorted(of_target.items())
        for numbers in sorted(known[of_tensor[template]] - present)
        if (name := fill(template, numbers)[1:-1]).rpartition(".")[0] in asked
    ]
    if not left_out:
        return []
    text = f"it has no update for {listed(left_out)}, although its config targets them and the base has them"
    return [Note("targets-left-out", text)]
