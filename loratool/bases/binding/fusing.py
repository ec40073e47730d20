"""Parts of fused tensors: which rows of it a part has, whichever of the two the adapter names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from loratool.adapters.model_settings import model_types, setting
from loratool.algebra.updates.base import ANY, Update
from loratool.algebra.updates.experts import ExpertFactors
from loratool.bases.binding.places import ALL, Match, Place, Rule
from loratool.files.safefile import TensorInfo
from loratool.layouts.fusions import EXPERT_COUNTS, FUSIONS, Fusion


class Misfit(Exception):  # noqa: N818  (no error by itself: another way may fit)
    """Why an update does not fit where its name leads."""


def fusions_of(config: Mapping[str, Any]) -> tuple[Fusion, ...]:
    """The rows of the table that hold for a model: those for its type, and where it has none those for all."""
    types = model_types(config)
    own = [
        fusion
        for fusion in FUSIONS
        if fusion.models & types and all(config.get(name, absent) == wanted for name, wanted, absent in fusion.when)
    ]
    settled = {fusion.fused for fusion in own}
    return (*own, *(f for f in FUSIONS if not f.models and f.fused not in settled))


def repeats(fusion: Fusion, config: Mapping[str, Any]) -> int:
    if isinstance(fusion.repeats, int):
        return fusion.repeats
    count = setting(config, fusion.repeats)
    if count is None:
        raise Misfit(f"config.json does not say how often {fusion.fused} repeats its parts ({fusion.repeats[0]})")
    return count


def sizes_from(fusion: Fusion, part: int, own: int, total: int) -> list[int]:
    """Rows of every part of a fused tensor of `total` rows, from those of one part."""
    letters = fusion.sizes or "a" * len(fusion.parts)
    others = [letter for letter in letters if letter != letters[part]]
    alike = len(letters) - len(others)
    rest, uneven = divmod(total - alike * own, len(others)) if others else (0, total - alike * own)
    if uneven or rest < 0 or (others and not rest) or len(set(others)) > 1:
        raise Misfit(f"a part of {own} rows does not fit into {total} rows of {' + '.join(fusion.parts)}")
    return [own if letter == letters[part] else rest for letter in letters]


def runs(sizes: Sequence[int], part: int, times: int) -> list[tuple[int, int, int]]:
    """(row of the fused tensor, row of the part, rows) of each stretch in which a part's rows lie together."""
    if any(size % times for size in sizes):
        raise Misfit(f"parts of {', '.join(map(str, sizes))} rows cannot repeat {times} times")
    period, before, own = sum(sizes) // times, sum(sizes[:part]) // times, sizes[part] // times
    return [(n * period + before, n * own, own) for n in range(times)]


def whole(update: Update, info: TensorInfo, rule: Rule) -> Match:
    """An update of a whole tensor."""
    shape = info.shape
    if isinstance(update, ExpertFactors) and len(shape) == 3:
        pair = either_way(update, shape)
    else:
        pair = (update.fit(shape), turned(update, shape))
    match = Match(*(() if u is None else (all_of(u, info, rule),) for u in pair))
    if not match.tensors:
        raise Misfit(f"update is {described(update)}")
    return match


def turned(update: Update, shape: tuple[int, ...]) -> Update | None:
    """The update for a matrix of `shape` stored the other way round, where it can be that and fits."""
    mine = update.shape
    possible = len(mine) == len(shape) == 2 and all(a in (ANY, b) for a, b in zip(mine[::-1], shape, strict=True))
    return update.turned.fit(shape) if update.turnable and possible else None


def all_of(update: Update, info: TensorInfo, rule: Rule) -> Place:
    return Place(info.name, rule, update, 0, math.prod(info.shape[: update.fold]), fold=update.fold)


def into_fused(
    fusion: Fusion,
    part: int,
    info: TensorInfo,
    times: int,
    heads: tuple[int, int] | None,
    update: Update,
    rule: Rule,
) -> Match:
    """A part's update into some rows of the fused tensor, or into some columns where that is stored (in, out).

    `times` the order of parts repeats; `heads` are those of queries and of keys, where the config tells.
    """
    mine, shape = update.shape, info.shape
    if len(mine) != len(shape) or len(shape) > 2 or ANY in mine:
        raise Misfit(f"update of a part is {list(mine)}")
    other = update.turned if update.turnable and len(shape) == 2 and mine[1] == shape[0] else None
    places: list[tuple[Place, ...]] = [(), ()]
    reason: Misfit | None = None
    if mine[1:] == shape[1:]:
        try:
            stretches = stretches_of(fusion, part, mine[0], shape[0], times, heads)
            places[0] = tuple(Place(info.name, rule, update, at, rows, own) for at, own, rows in stretches)
        except Misfit as misfit:
            reason = misfit
    if other is not None:
        try:
            stretches = stretches_of(fusion, part, mine[0], shape[1], times, heads)
            if len(stretches) > 1:
                raise Misfit(f"{' + '.join(fusion.parts)} alternate in its columns, which is not supported")
            ((at, _, columns),) = stretches
            places[1] = (Place(info.name, rule, other, 0, shape[0], columns=slice(at, at + columns)),)
        except Misfit as misfit:
            reason = reason or misfit
    if not any(places):
        raise reason or Misfit(f"update of a part is {list(mine)}")
    return Match(*places)


def stretches_of(
    fusion: Fusion, part: int, own: int, total: int, times: int, heads: tuple[int, int] | None
) -> list[tuple[int, int, int]]:
    """The rows of one part among all, as `runs` gives them. All heads are equally wide."""
    sizes = sizes_from(fusion, part, own, total)
    if heads and fusion.sizes == "qkk" and sizes[0] * heads[1] != sizes[1] * heads[0]:
        raise Misfit(
            f"{sizes[0]} query rows and {sizes[1]} key rows do not match the config's {heads[0]} heads and {heads[1]} "
            "key heads"
        )
    return runs(sizes, part, times)


def heads_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Heads of queries and of keys, where a config tells both."""
    heads, key_heads = setting(config, ("num_attention_heads",)), setting(config, ("num_key_value_heads",))
    return (heads, key_heads) if heads and key_heads else None


def into_experts(
    fusion: Fusion,
    part: int,
    expert: int,
    info: TensorInfo,
    stored: bool | None,
    interleaved: bool,
    update: Update,
    rule: Rule,
) -> Match:
    """One expert's part into the fused tensor of all: (experts, out, in), or (experts, in, out).

    `stored` says which of the two it is where the shape leaves that open: whether it is (in, out).
    """
    mine, shape = update.shape, info.shape
    if len(mine) != 2 or len(shape) != 3 or ANY in mine:
        raise Misfit(f"update of one expert is {list(mine)}")
    if expert >= shape[0]:
        raise Misfit(f"the base has {shape[0]} experts, numbered from 0; this is number {expert}")
    out, count = mine[0], len(fusion.parts)
    fits = [shape[1:] == (count * out, mine[1]), shape[1:] == (mine[1], count * out)]
    if all(fits) and stored is not None:
        fits = [not stored, stored]
    other = update.turned if update.turnable and fits[1] else None
    places: list[tuple[Place, ...]] = [(), ()]
    if fits[0]:
        places[0] = (Place(info.name, rule, update, expert * shape[1] + part * out, out, fold=2),)
    if fits[1] and other is not None:
        columns = slice(part, None, count) if interleaved else slice(part * out, (part + 1) * out)
        columns = ALL if count == 1 else columns
        places[1] = (Place(info.name, rule, other, expert * shape[1], shape[1], columns=columns, fold=2),)
    if not any(places):
        raise Misfit(f"update of one expert is {list(mine)}")
    return Match(*places)


def out_of_fused(parts: Sequence[TensorInfo], times: int, update: Update, rule: Rule) -> Match:
    """An update of the fused tensor into the tensors of its parts, each of which takes its rows."""
    first = parts[0].shape
    if any(part.shape[1:] != first[1:] or not part.shape for part in parts):
        raise Misfit("its parts in the base differ in more than their rows")
    sizes = [part.shape[0] for part in parts]
    fitted = update.fit((sum(sizes), *first[1:]))
    if fitted is None or fitted.fold != 1:
        raise Misfit(f"the update is {list(update.shape)}, but its parts have {' + '.join(map(str, sizes))} rows")
    return Match(
        tuple(
            Place(info.name, rule, fitted, own, rows, at)
            for n, info in enumerate(parts)
            for at, own, rows in runs(sizes, n, times)
        )
    )


def out_of_experts(experts: Sequence[Sequence[TensorInfo]], update: Update, rule: Rule, interleaved: bool) -> Match:
    """An update of all experts' fused tensor into the tensors of each expert's parts, all (out, in)."""
    shapes = [part.shape for part in experts[0]]
    if any([part.shape for part in parts] != shapes for parts in experts) or any(len(s) != 2 for s in shapes):
        raise Misfit("the experts of the base differ in shape")
    if any(shape[1] != shapes[0][1] for shape in shapes):
        raise Misfit("the parts of an expert differ in more than their rows")
    if interleaved and len(shapes) > 1:
        raise Misfit("gate and up alternate in the adapter's rows but are separate in the base, which is not supported")
    each = sum(shape[0] for shape in shapes)
    shape = (len(experts), each, shapes[0][1])
    offsets = [sum(shape[0] for shape in shapes[:n]) for n in range(len(shapes))]

    def places(fitted: Update) -> Iterator[Place]:
        for number, parts in enumerate(experts):
            for info, offset in zip(parts, offsets, strict=True):
                yield Place(info.name, rule, fitted, 0, info.shape[0], number * each + offset)

    match = of_stack(update, shape, places)
    if not match.tensors:
        raise Misfit(f"the update is {described(update)}, but the base's experts together are {list(shape)}")
    return match


def stacked(parts: Sequence[TensorInfo], update: Update, rule: Rule) -> Match:
    """An update of all experts' fused tensor into tensors that hold one part of all experts: (experts, out, in) each."""
    shapes = [part.shape for part in parts]
    if any(len(s) != 3 or (s[0], s[2]) != (shapes[0][0], shapes[0][2]) for s in shapes):
        raise Misfit("its parts in the base differ in more than their rows")
    experts, each = shapes[0][0], sum(s[1] for s in shapes)
    shape = (experts, each, shapes[0][2])
    offsets = [sum(s[1] for s in shapes[:n]) for n in range(len(shapes))]

    def places(fitted: Update) -> Iterator[Place]:
        for info, offset in zip(parts, offsets, strict=True):
            for e in range(experts):
                yield Place(info.name, rule, fitted, e * info.shape[1], info.shape[1], e * each + offset, fold=2)

    match = of_stack(update, shape, places)
    if not match.tensors:
        raise Misfit(f"the update is {described(update)}, but its parts in the base are {list(shape)} together")
    return match


def of_stack(update: Update, shape: tuple[int, ...], places: Callable[[Update], Iterable[Place]]) -> Match:
    """An update of all experts' fused tensor of this shape, at the places that it has once it is fitted."""
    pair = either_way(update, shape) if isinstance(update, ExpertFactors) else (update.fit(shape), None)
    return Match(*(tuple(places(fitted)) if fitted and fitted.fold == 2 else () for fitted in pair))


def either_way(update: ExpertFactors, shape: tuple[int, ...]) -> tuple[Update | None, Update | None]:
    """An update of a stack of matrices as A and B are meant for (out, in), and for (in, out)."""
    return update.fit(shape, False), update.fit(shape, True)


def described(update: Update) -> str:
    """An update's sizes, also where the weight decides its shape."""
    if isinstance(update, ExpertFactors):
        return f"lora_A {list(update.a.shape)} and lora_B {list(update.b.shape)}"
    return str(list(update.shape))


def expert_count(config: Mapping[str, Any]) -> int | None:
    return setting(config, EXPERT_COUNTS)
