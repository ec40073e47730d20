"""Experts that an adapter has apart and transformers 5 holds in one parameter: PEFT stacks their factors.

For that it wants every expert, and gives all of them the config's `r` and `lora_alpha`, whatever patterns say; the
routers beside them too, which it takes for parameters as well (`_convert_peft_config_moe` of PEFT 0.21).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from loratool.adapters.layers import is_expert
from loratool.errors import printable
from loratool.notes import Note

ROUTER = ".gate.weight"


def stacked_by_peft(targets: Iterable[str]) -> tuple[str, ...]:
    """The targets that PEFT gives one rank and one α: experts that are apart, and the routers beside them."""
    found = list(targets)
    if not any(map(is_expert, found)):
        return ()
    return tuple(target for target in found if is_expert(target) or target.endswith(ROUTER))


def lost_by_peft(targets: Iterable[str]) -> tuple[str, ...]:
    """Layers that PEFT takes for experts, by the last part of their name, and then finds no factors for."""
    found = list(targets)
    leaves = {projection(target) for target in found if is_expert(target)}
    return tuple(target for target in found if not is_expert(target) and projection(target) in leaves)


def projection(target: str) -> str:
    return target.removesuffix(".weight").rpartition(".")[2]


def rank_notes(own: Mapping[str, int], ranks: Mapping[str, int]) -> Iterator[Note]:
    """What to say where experts whose `own` ranks differ were made one of rank."""
    if filled := [target for target in stacked_by_peft(ranks) if own.get(target, 0) < ranks[target]]:
        yield Note(
            "experts-one-rank",
            f"{len(filled)} experts and routers are padded with zeros to rank {ranks[filled[0]]}, the largest of "
            "them: PEFT stacks a model's experts in parameters, which have one rank",
        )
    if lost := lost_by_peft(ranks):
        yield Note(
            "peft-loses-layers",
            f"{len(lost)} layers outside the experts are named like expert projections, such as {printable(lost[0])}; "
            "where transformers 5 keeps the experts in one parameter, PEFT 0.21 skips these layers when it loads the "
            "adapter (huggingface/peft #3711). `loratool merge` applies them",
        )
