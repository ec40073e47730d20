"""What a type of adapter is to its reader: the slots that it saves, and the updates that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loratool.adapters.formats.peft.draft import Draft, Module
from loratool.adapters.formats.peft.scaling import Scaling
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update

Updates = Mapping[str, "Update"]
Reader = Callable[[Module], Updates]


@dataclass(frozen=True)
class Method:
    """A type of adapter: the slots that it saves, and what reads those of a module, made for an adapter."""

    slots: tuple[str, ...]
    reader: Callable[[Draft], Reader]
    ignored: tuple[str, ...] = ()


def always(read: Reader, *slots: str, ignored: tuple[str, ...] = ()) -> Method:
    """A method whose reader is the same for every adapter."""
    return Method(slots, lambda _: read, ignored)


def scaled(read: Callable[[Module, Scaling], Updates], *slots: str) -> Method:
    """A method with α and patterns."""

    def reader(draft: Draft) -> Reader:
        scaling = Scaling(draft, [module.name for module in draft.modules.values()], alpha="alpha")
        return lambda module: read(module, scaling)

    return Method(slots, reader)


def low_rank(module: Module, up: Any, down: Any, scale: float, turnable: bool = True) -> LowRank:
    """The update scale · up @ down of two stored matrices that agree."""
    module.require(
        up.shape[1] == down.shape[0], f"one factor has {up.shape[1]} columns, the other {down.shape[0]} rows"
    )
    return LowRank(up, down, scale, turnable)


MERGE_IN_PEFT = "merge it with PEFT's merge_and_unload"


def save_again(field: str) -> str:
    """What to do about tensors that PEFT saves only where a field of the config says so, and makes anew on loading."""
    return (
        f"load the adapter with PeftModel.from_pretrained(model, adapter, config=config) with config.{field} = True, "
        "and save it again"
    )
