"""From a target's name and shape to the tensors of the base that it means.

The names that the tables make of a target's are tried breadth first. At each, the tensor itself counts, and the
fused tensor that it is a part of, and the parts or experts that it is made of. The first depth with a fit decides;
two fits there are one too many.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from loratool.adapters.model_settings import model_types
from loratool.algebra.updates.base import Update
from loratool.bases.binding import fusing
from loratool.bases.binding.fusing import Misfit
from loratool.bases.binding.names import Alias, Disk, Moves, by_template, components, unwrapped
from loratool.bases.binding.orientation import is_conv1d, module_of
from loratool.bases.binding.places import Match, Place, Rule
from loratool.errors import printable
from loratool.files.safefile import FLOAT_NAMES, TensorInfo
from loratool.layouts.architectures import REORDERED, TOWERS
from loratool.layouts.fusions import INTERLEAVED_EXPERTS, Fusion
from loratool.templates import Numbers, first_few, template_of

if TYPE_CHECKING:
    from loratool.files.checkpoint import Checkpoint


DEEPEST = 3  # renames in a row
# What the two parameters of fused experts are called on disk.
GATE_AND_DOWN = (
    (".gate_up_proj", ".down_proj"),
    (".input_linear.weight", ".output_linear.weight"),
    (".experts.fc1.weight", ".experts.fc2.weight"),
)
Renaming = tuple[re.Pattern[str], str]  # `--map`: a pattern of names, and what its match becomes


@dataclass(frozen=True)
class Way:
    """One way from a template of the adapter's to templates of the base's."""

    alias: Alias
    templates: tuple[str, ...]  # in the base
    fusion: Fusion | None = None
    part: int = -1  # which part of the fused tensor the target is; −1 where it is the fused one
    position: int = -1  # of the expert among the numbers


class Resolver:
    """Finds the places of targets in one base."""

    def __init__(self, base: Checkpoint) -> None:
        self.tensors: Mapping[str, TensorInfo] = base.tensors
        self.config = base.config
        self.disk = Disk(base.tensors)
        self.fusions = fusing.fusions_of(base.config)
        types = model_types(base.config)
        self.interleaved = bool(types & INTERLEAVED_EXPERTS)
        self.reordered = [name for kind, names in REORDERED if kind in types for name in names]
        self.levels: dict[str, tuple[list[list[Way]], Iterator[list[Alias]]]] = {}

    @cached_property
    def splits(self) -> list[Fusion]:
        """The fusions whose parts the base may have."""
        return [f for f in self.fusions if all(components(part) <= self.disk.components for part in f.parts)]

    @cached_property
    def joins(self) -> list[tuple[Fusion, int, str]]:
        """The parts, each with its number, of fusions whose fused tensor the base may have."""
        there = [f for f in self.fusions if components(f.fused) <= self.disk.components]
        return [(f, number, f".{part}.") for f in there for number, part in enumerate(f.parts)]

    @cached_property
    def moves(self) -> Moves:
        """The renames that may lead to names of the base, or to those of a fusion; seldom needed."""
        fused, parts = (f.fused for f in self.splits), (part for _, _, part in self.joins)
        wanted = self.disk.components.union(*map(components, (*fused, *parts)))
        return Moves(wanted, self.disk.prefixes, DEEPEST)

    def match(self, target: str, update: Update, renamings: Sequence[Renaming] = ()) -> Match:
        """The target's places; raises `Misfit` with the reason where there is none, or more than one."""
        for pattern, replacement in renamings:
            if pattern.search(target):
                return mapped(self.find(pattern.sub(replacement, target, count=1), update))
        return self.find(target, update)

    def find(self, name: str, update: Update) -> Match:
        if (info := self.tensors.get(name)) is not None:
            return self.whole(info, update, Rule())
        if "#" in name:
            raise Misfit("")
        template, numbers = template_of(unwrapped(name))
        reason: Misfit | None = None
        for depth in range(DEEPEST + 1):
            found: dict[object, Match] = {}
            for way in self.ways(template, depth):
                try:
                    match = self.follow(way, numbers, update)
                except Misfit as misfit:
                    reason = reason or misfit
                    continue
                if match is not None:
                    found.setdefault(identity(match), match)
            if len(found) > 1:
                where = sorted(" + ".join(sorted(match.tensors)[:2]) for match in found.values())
                raise Misfit(f"it could be any of {', '.join(map(printable, where))}")
            if found:
                (match,) = found.values()
                return match
        raise reason or Misfit("")

    def ways(self, template: str, depth: int) -> list[Way]:
        """The ways from a template that take `depth` renames."""
        if template not in self.levels:
            self.levels[template] = ([], self.moves.aliases(template))
        done, coming = self.levels[template]
        while len(done) <= depth:
            ways = (way for alias in next(coming) for way in self.ways_at(alias))
            # no way leads from one tower of a multimodal model to another; a base without the first has but one
            own = tower(template)
            done.append([way for way in ways if own not in self.towers or tower(way.templates[0]) == own])
        return done[depth]

    def ways_at(self, alias: Alias) -> Iterator[Way]:
        """The ways from a template that take no more renames."""
        template = alias.template
        if there := self.on_disk(template):
            yield Way(alias, (there,))
        for fusion in self.splits:
            dotted = f".{fusion.fused}."
            if (at := template.rfind(dotted)) >= 0:
                every = [self.on_disk(template[:at] + f".{p}." + template[at + len(dotted) :]) for p in fusion.parts]
                if all(every):
                    position = template[:at].count("#") + fusion.fused.count("#") if fusion.of_experts else -1
                    yield Way(alias, tuple(every), fusion, -1, position)
        for fusion, number, part in self.joins:
            at = template.rfind(part)
            there = self.on_disk(template[:at] + f".{fusion.fused}." + template[at + len(part) :]) if at >= 0 else ""
            if there:
                position = template[:at].count("#") if fusion.of_experts else -1
                yield Way(alias, (there,), fusion, number, position)

    @cached_property
    def towers(self) -> frozenset[str]:
        """The towers that the base has layers of."""
        return frozenset(tower(template) for template in self.disk.templates if "#" in template)

    def on_disk(self, template: str) -> str:
        """The template, or that of its packed weight, where the base has tensors of it; else nothing."""
        return template if template in self.disk.templates else self.disk.packed.get(template, "")

    def follow(self, way: Way, numbers: Numbers, update: Update) -> Match | None:
        """Where a way leads for some numbers; None where the base has no such tensor."""
        fusion, rule = way.fusion, Rule(*way.alias.moves)
        if self.reordered and any(f".{name}." in template for template in way.templates for name in self.reordered):
            raise Misfit("the base stores its rows in another order (for rotary positions), which is not supported")
        if fusion is None:
            if (info := self.tensor(way.templates[0], numbers)) is None:
                return None
            match = self.whole(info, update, rule)
            renamed = any(code == "renamed" for code, _ in rule.steps)
            if match.turned and update.turnable and renamed and not is_conv1d(module_of(info.name)):
                # a name that is only guessed at and a shape that fits the wrong way round are no match
                match = Match(match.straight)
                if not match.straight:
                    raise Misfit(
                        f"the update is {list(update.shape)}, but {printable(info.name)} is {list(info.shape)}"
                    )
            return match
        if way.part >= 0:
            rule = rule.then("part-of-fused", f"{short(fusion.parts[way.part])} of {short(fusion.fused)}")
            return self.join(way, fusion, numbers, update, rule)
        rule = rule.then("split-into-parts", f"split into {' + '.join(map(short, fusion.parts))}")
        if way.position >= 0:
            return self.spread(way, numbers, update, rule)
        parts = [self.tensor(template, numbers) for template in way.templates]
        infos = [info for info in parts if info is not None]
        if not infos:
            return None
        if len(infos) < len(parts):
            raise Misfit(f"the base has {printable(infos[0].name)} but not all of {' + '.join(fusion.parts)}")
        if packed := packed_match(infos, update, rule):
            return packed
        if len(infos[0].shape) == 3:
            return fusing.stacked(infos, update, rule)
        return fusing.out_of_fused(infos, fusing.repeats(fusion, self.config), update, rule)

    def join(self, way: Way, fusion: Fusion, numbers: Numbers, update: Update, rule: Rule) -> Match | None:
        """A part into the fused tensor."""
        at = way.position
        info = self.tensor(way.templates[0], numbers if at < 0 else numbers[:at] + numbers[at + 1 :])
        if info is None:
            return None
        if packed := packed_match([info], update, rule):
            return packed
        try:
            if at < 0:
                heads = fusing.heads_of(self.config) if tower(way.templates[0]) == "text" else None
                return fusing.into_fused(
                    fusion, way.part, info, fusing.repeats(fusion, self.config), heads, update, rule
                )
            stored = self.stored_in_out(info)
            expert = int(numbers[at])
            return fusing.into_experts(fusion, way.part, expert, info, stored, self.interleaved, update, rule)
        except Misfit as misfit:
            raise Misfit(f"{misfit}, {printable(info.name)} is {list(info.shape)}") from None

    def spread(self, way: Way, numbers: Numbers, update: Update, rule: Rule) -> Match | None:
        """The fused tensor of all experts into the tensors of each."""
        assert way.fusion is not None
        lists = [self.disk.members(template, way.position).get(numbers, []) for template in way.templates]
        if not any(lists):
            return None
        every_part = self.disk.kin(way.templates[0], way.position)  # what the base has of any part counts
        known = [
            number for template in every_part for number in self.disk.members(template, way.position).get(numbers, ())
        ]
        count = max(fusing.expert_count(self.config) or 0, 1 + max(map(int, known), default=0))
        for part, found in zip(way.fusion.parts, lists, strict=True):
            missing = sorted(set(map(str, range(count))) - set(found), key=int)
            if missing:
                raise Misfit(f"the base lacks {printable(part)} of expert {first_few(missing, 4)} of {count}")
        at = way.position
        every = [[*numbers[:at], str(expert), *numbers[at:]] for expert in range(count)]
        experts = [
            [self.tensors[self.disk.templates[template][tuple(each)]] for template in way.templates] for each in every
        ]
        if packed := packed_match([info for parts in experts for info in parts], update, rule):
            return packed
        return fusing.out_of_experts(experts, update, rule, self.interleaved)

    def stored_in_out(self, info: TensorInfo) -> bool | None:
        """Whether an expert tensor whose shape leaves it open is (experts, in, out); its sibling's shape tells.

        A gate_up is (experts, 2·I, H) or turned and its down (experts, H, I): both are never square.
        """
        gate, down = next((pair for pair in GATE_AND_DOWN if info.name.endswith(pair)), ("", ""))
        is_down = bool(down) and info.name.endswith(down)
        own, other = (down, gate) if is_down else (gate, down)
        sibling = self.tensors.get(info.name.removesuffix(own) + other) if own else None
        if sibling is None or len(sibling.shape) != 3 or len(info.shape) != 3 or info.shape[1] != info.shape[2]:
            return None
        hidden = info.shape[1]
        if is_down:  # H = I: the gate_up is (experts, 2·H, H) or (experts, H, 2·H)
            return sibling.shape[1:] == (hidden, 2 * hidden)
        return sibling.shape[1:] == (hidden // 2, hidden)  # 2·I = H: the down is (experts, H, I) or (experts, I, H)

    def tensor(self, template: str, numbers: Numbers) -> TensorInfo | None:
        name = self.disk.templates[template].get(numbers)
        return None if name is None else self.tensors[name]

    def whole(self, info: TensorInfo, update: Update, rule: Rule) -> Match:
        try:
            return packed_match([info], update, rule) or fusing.whole(update, info, rule)
        except Misfit:
            raise Misfit(
                f"the update is {fusing.described(update)}, but {printable(info.name)} is {list(info.shape)}"
            ) from None

    def by_suffix(self, targets: Mapping[str, Update]) -> tuple[dict[str, Match], str]:
        """Places of targets whose beginning alone is unknown, by the one change of prefix that explains most of them.

        Nothing where two changes explain as many, and never from one tower of a multimodal model to another.
        """
        members = by_template(targets)
        scores: dict[tuple[str, str], dict[str, Match]] = {}
        for removed, added in self.substitutions(members):
            matched: dict[str, Match] = {}
            for template, every in members.items():
                there = added + template.removeprefix(removed)
                if not template.startswith(removed) or there not in self.disk.templates:
                    continue
                if tower(template) != tower(there):
                    continue
                rule = Rule(("suffix-match", f"suffix {removed}… → {added}…"))
                for target, numbers in every:
                    if info := self.tensor(there, numbers):
                        with suppress(Misfit):
                            matched[target] = self.whole(info, targets[target], rule)
            scores[removed, added] = matched
        best = max(map(len, scores.values()), default=0)
        winners: dict[object, tuple[tuple[str, str], dict[str, Match]]] = {}
        for change, matched in scores.items():  # of changes with the same result the shortest comes first
            if best and len(matched) == best:
                same = frozenset((target, match.tensors) for target, match in matched.items())
                winners.setdefault(same, (change, matched))
        if len(winners) != 1:
            return {}, ""
        (((removed, added), matched),) = winners.values()
        return matched, f"{removed.strip('.') or 'nothing'} → {added.strip('.') or 'nothing'}"

    def substitutions(self, templates: Iterable[str]) -> list[tuple[str, str]]:
        """Changes of prefix that give some template a tensor of the base."""
        found: set[tuple[str, str]] = set()
        for template in templates:
            parts = template.split(".")
            ahead = parts.index("#") if "#" in parts else len(parts) - 3
            for cut in range(1, ahead + 1):
                rest = "." + ".".join(parts[cut:])
                removed = template[: len(template) - len(rest)]
                found.update((removed, there[: -len(rest)]) for there in self.disk.templates if there.endswith(rest))
        return sorted((removed, added) for removed, added in found if removed != added)


def tower(template: str) -> str:
    """The tower of a multimodal model that a name belongs to."""
    parts = set(template.split("."))
    return next((name for name, marks in TOWERS.items() if name != "text" and marks & parts), "text")


def short(name: str) -> str:
    """A name of the table without what every weight's name ends with."""
    return name.replace("#.", "").removesuffix(".weight").rpartition(".")[2]


def mapped(match: Match) -> Match:
    """The same places, found by a `--map` first."""

    def relabel(place: Place) -> Place:
        return replace(place, rule=Rule(("map-used", "map"), *place.rule.steps))

    return Match(tuple(map(relabel, match.straight)), tuple(map(relabel, match.turned)))


def identity(match: Match) -> object:
    """What two matches have in common that change the same elements."""
    places = match.straight or match.turned
    return frozenset((p.tensor, p.first_row, p.rows, p.update_row, str(p.columns)) for p in places)


def packed_match(infos: Sequence[TensorInfo], update: Update, rule: Rule) -> Match | None:
    """The place of an update whose weight is quantised, unfitted: the plan refuses to edit such a tensor."""
    packed = next((info for info in infos if info.dtype not in FLOAT_NAMES), None)
    return None if packed is None else Match((Place(packed.name, rule, update, 0, packed.rows),))
