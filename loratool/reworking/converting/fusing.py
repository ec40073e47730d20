"""Projections and experts that are apart, as one layer; and such layers taken apart.

Releases of transformers, and servers, disagree about which of them a model has: `q_proj`, `k_proj` and `v_proj` or one
`qkv_proj`, a layer for each expert or one parameter for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loratool.adapters.formats.format import Format
from loratool.adapters.layers import Kind
from loratool.adapters.model_settings import attention_heads, model_types, setting
from loratool.errors import FitError, InputError, printable
from loratool.layouts.fusions import CROSS_ATTENTION, EXPERT_COUNTS, FUSIONS, INTERLEAVED_EXPERTS, Fusion
from loratool.notes import Note
from loratool.reworking.converting.rows import Rows, Sized, Target

# Those of the table that most models have.
NAMES = ("experts.gate_up_proj", "experts.down_proj", "qkv_proj", "gate_up_proj")
PARTS = ("q_proj", "gate_proj", "experts.#.gate_proj.weight", "experts.#.down_proj.weight")
USUAL: tuple[Fusion, ...] = tuple(
    fusion
    for name in NAMES
    for fusion in FUSIONS
    if fusion.fused == name and fusion.parts[0] in PARTS and not fusion.models and fusion.repeats == 1
)


def part_of(target: str, fusion: Fusion) -> tuple[str, int, int] | None:
    """(what comes before, part, expert) of a target that is a part of a fused layer; the expert is 0 for none."""
    for number, part in enumerate(fusion.parts):
        pattern = re.escape(part if part.endswith(".weight") else f"{part}.weight").replace(re.escape("#"), r"(\d+)")
        match = re.fullmatch(rf"(.*\.|){pattern}", target)
        if match and not match[1].removesuffix(".").endswith(CROSS_ATTENTION):
            return match[1], number, int(match[2]) if match.lastindex == 2 else 0
    return None


def split(
    layers: Mapping[str, Sized], config: Mapping[str, Any], experts_only: bool = False
) -> tuple[dict[str, Target], tuple[Note, ...]]:
    """The layers with fused ones apart, or `experts_only`.

    Raises `InputError` where it takes the base to know their rows.
    """
    found: dict[str, Target] = {}
    notes: dict[str, Note] = {}
    for target, layer in layers.items():
        own = (f for f in USUAL if ends(target, f.fused) and f.of_experts == (layer.kind is Kind.PARAMETER))
        fusion = next((f for f in own if f.of_experts or not experts_only), None)
        if fusion is None:
            found[target] = Target.same(layer)
            continue
        start = target.removesuffix(".weight").removesuffix(fusion.fused)
        if fusion.of_experts:
            check_experts(target, config)
            notes |= assumed(config, len(fusion.parts))
        at = 0
        for part, size in zip(fusion.parts, sizes_of(target, layer, fusion, config), strict=True):
            for expert in range(layer.experts):
                name = start + (part.replace("#", str(expert)) if fusion.of_experts else f"{part}.weight")
                rows = Rows(layer.target, at, size, expert if fusion.of_experts else None)
                found[name] = Target(Kind.LINEAR, ((rows,),))
            at += size
    return found, tuple(notes.values())


def ends(target: str, fused: str) -> bool:
    module = target.removesuffix(".weight")
    return module == fused or module.endswith(f".{fused}")


def check_experts(target: str, config: Mapping[str, Any]) -> None:
    """Raise `FitError` where gate and up of experts have their rows in turns, so that neither is some rows on end."""
    if model_types(config) & INTERLEAVED_EXPERTS:
        raise FitError(
            f"{printable(target)}: this model alternates the rows of gate and up, so they have no separate names"
        )


def assumed(config: Mapping[str, Any], parts: int) -> dict[str, Note]:
    """What is taken for granted of experts whose model is not known."""
    if model_types(config) or parts == 1:
        return {}
    text = "gate and up of experts are assumed to be the first and the second half of the rows; pass --base to be sure"
    return {"gate-then-up": Note("gate-then-up", text)}


def sizes_of(target: str, layer: Sized, fusion: Fusion, config: Mapping[str, Any]) -> list[int]:
    """The rows of each part of a fused layer."""
    count = len(fusion.parts)
    heads = attention_heads(config) if "q" in fusion.sizes else None
    if heads is not None:
        each, rest = divmod(layer.rows, heads.queries + 2 * heads.keys)
        if not rest:
            return [each * heads.queries, each * heads.keys, each * heads.keys]
    if layer.rows % count or ("q" in fusion.sizes and layer.rows != count * layer.columns):
        raise InputError(
            f"{printable(target)}: how its {layer.rows} rows are divided into {', '.join(fusion.parts)} depends on the "
            "model; pass --base"
        )
    return [layer.rows // count] * count


def fused(layers: Mapping[str, Sized]) -> dict[str, Target]:
    """The layers with parts of fused ones together.

    Raises `FitError` where a part is missing whose number of rows the others do not tell.
    """
    found: dict[str, Target] = {}
    groups: dict[tuple[str, Fusion], dict[tuple[int, int], str]] = {}
    for target, layer in layers.items():
        for fusion in USUAL if layer.kind is Kind.LINEAR else ():
            if place := part_of(target, fusion):
                start, part, expert = place
                groups.setdefault((start, fusion), {})[expert, part] = target
                break
        else:
            found[target] = Target.same(layer)
    for (start, fusion), members in groups.items():
        name = f"{start}{fusion.fused}" + ("" if fusion.of_experts else ".weight")
        experts = max(expert for expert, _ in members) + 1
        sizes = [rows_of(fusion, number, members, layers, name) for number in range(len(fusion.parts))]
        found[name] = Target(
            Kind.PARAMETER if fusion.of_experts else Kind.LINEAR,
            tuple(
                tuple(Rows(members.get((expert, number), ""), 0, size) for number, size in enumerate(sizes))
                for expert in range(experts)
            ),
        )
    return found


def stacked(
    layers: Mapping[str, Sized], form: Format, config: Mapping[str, Any]
) -> tuple[dict[str, Target], tuple[Note, ...]]:
    """The layers with those of experts as a format stacks them, which takes factors for all; zeros where there are none.

    Raises `FitError` where those of one stack differ in shape.
    """
    apart, notes = split(layers, config, experts_only=True)
    own_names = {layer.target: layer for layer in layers.values()}
    stacks: dict[str, dict[int, tuple[Rows, ...]]] = {}
    found: dict[str, Target] = {}
    for name, target in apart.items():
        if (place := form.stack_of(name, config)) is None:
            found[name] = target
        else:
            stacks.setdefault(place[0], {})[place[1]] = target.experts[0]
    if not stacks:
        return {target: Target.same(layer) for target, layer in layers.items()}, ()
    counted = setting(config, EXPERT_COUNTS)
    count = max(counted or 0, *(expert + 1 for own in stacks.values() for expert in own))
    for name, own in stacks.items():
        shapes = {(sum(rows.count for rows in parts), own_names[parts[0].target].columns) for parts in own.values()}
        if len(shapes) > 1:
            raise FitError(f"{printable(name)}: its experts differ in shape: {', '.join(map(str, sorted(shapes)))}")
        ((size, _),) = shapes
        none = (Rows("", 0, size),)
        found[name] = Target(Kind.PARAMETER, tuple(own.get(expert, none) for expert in range(count)))
    if counted is None and any(len(own) < count for own in stacks.values()):
        text = (
            f"the model is assumed to have {count} experts, some of which the adapter changes; pass --base to be sure"
        )
        notes = (*notes, Note("experts-counted", text))
    return found, notes


def rows_of(
    fusion: Fusion, number: int, members: Mapping[tuple[int, int], str], layers: Mapping[str, Sized], name: str
) -> int:
    """The rows of a part: its own, or those of a part that is as large."""
    letters: Sequence[str] = fusion.sizes or "a" * len(fusion.parts)
    alike = {layers[t].rows for (_, part), t in members.items() if letters[part] == letters[number]}
    if len(alike) != 1:
        raise FitError(
            f"{printable(name)}: the adapter changes no {printable(fusion.parts[number])}, whose number of rows is not "
            "known from the others"
        )
    return alike.pop()
