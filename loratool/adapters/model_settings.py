"""What a model's config says that the layout of an adapter may depend on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.errors import NAME_BASE, InputError, printable
from loratool.layouts.fusions import GROUPED, HEADS, KEY_HEADS, ONE_KEY_HEAD
from loratool.layouts.ties import TEXT_CONFIGS

NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "attn_config", "ffn_config")


@dataclass(frozen=True)
class Heads:
    """The heads of attention: those of queries, and those of keys, each of which several of the former share."""

    queries: int
    keys: int

    @property
    def each(self) -> int:
        """Heads of queries in a group, which has one head of keys and one of values."""
        return self.queries // self.keys


def parts_under(
    config: Mapping[str, Any], keys: Sequence[str], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The config and the configs that stand in it under any of `keys`, to any depth, each with the keys that lead there."""
    yield path, config
    for key in keys:
        if isinstance(part := config.get(key), dict):
            yield from parts_under(part, keys, (*path, key))


def language_parts(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The config and those parts of it that describe its language model, each with the keys that lead there."""
    return parts_under(config, TEXT_CONFIGS)


def setting(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """The first of several config fields that is a positive whole number, nested configs included."""
    values = (part.get(name) for _, part in parts_under(config, NESTED) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """The model types that a config names: the whole model's, and those of its language model."""
    named = (part.get("model_type") for _, part in language_parts(config))
    return frozenset(name for name in named if isinstance(name, str))


def attention_heads(config: Mapping[str, Any]) -> Heads | None:
    """The heads of a model; None where its config does not tell them."""
    queries, keys = setting(config, HEADS), setting(config, KEY_HEADS)
    if queries is None:
        return None
    if config.get(ONE_KEY_HEAD) is True and config.get(GROUPED) is not True:
        keys = 1  # whatever else is said of their number
    keys = keys or queries
    return Heads(queries, keys) if queries % keys == 0 else None


def model_needed(why: str, known: Iterable[str], config: Mapping[str, Any]) -> InputError:
    """The error where adapters are written for models of `known` types, and the config of the model is of none, or lacks
    heads.
    """
    types, found = tuple(known), sorted(model_types(config))
    if {*found} & {*types}:
        return InputError(f"{why}, and the config.json of this model does not tell how many heads it has")
    if found:
        named = ", ".join(map(printable, found))
        return InputError(f"{why}, and type {named} is not supported (only {', '.join(types)})")
    return InputError(
        f"{why}; pass --base with the folder of the model that was trained, with its config.json (one of "
        f"{', '.join(types)})",
        hint=NAME_BASE,
    )
