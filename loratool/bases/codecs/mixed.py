"""Checkpoints in which some modules are packed and others plain: whether their config says so, and how it names them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from loratool.adapters.patterns import search_names
from loratool.bases.codecs.parts import Finder, told
from loratool.bases.codecs.plain_modules import in_memory, modules_of, texts_in
from loratool.bases.packed import Packed, Packing
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES
from loratool.templates import template_of

STACK = re.compile(r"(?P<stack>.+\.experts)\..+")  # a weight of one of a layer's experts, or of all of them

OF_THE_CACHE = re.compile(r".*[kv]_proj\.output_\w+")  # scales of cached keys and values, which stay


def note_unlisted(
    finder: Finder, found: Mapping[str, Packed], listed: Callable[[Collection[str]], Collection[str]], where: str
) -> None:
    """Note weights that are plain while others of the same name, in other layers, are packed, and no list says so.

    `listed` gives those of some modules that the config names, under the key `where`. Loaders would take them for packed.
    """
    packed = {template_of(name)[0] for name in found}
    plain = [
        name
        for name, info in finder.base.tensors.items()
        if info.dtype in FLOAT_NAMES and len(info.shape) > 1 and name not in found and template_of(name)[0] in packed
    ]
    try:
        named = listed(modules_of(plain)) if plain else ()
    except ValueError as error:  # of a pattern
        finder.note(where, f"cannot be read: {error}")
        return
    for name in plain:
        if name.removesuffix(".weight") not in named:
            scheme = found[next(other for other in found if template_of(other)[0] == template_of(name)[0])].scheme
            said = told(finder.base.tensors[name])
            finder.note(
                name, f"is {said}, but the config says that it is packed ({scheme}): it is missing from {where}"
            )


def skipped_by(entries: object, modules: Collection[str], base: Checkpoint) -> Collection[str]:
    """Those of some modules that a list names by any loader's rule, on disk or in memory.

    An entry is found anywhere in a name, or is a regular expression from its start.
    """
    given = texts_in(entries)
    names = {module: [module, *in_memory([module], base)] for module in modules}
    found = search_names(given, [name for each in names.values() for name in each], "^(?:{})")
    return {module for module, own in names.items() if any(found[n] or any(e in n for e in given) for n in own)}


def complete(finder: Finder, found: Mapping[str, Packed], endings: Sequence[str], title: str, way_out: str) -> Packing:
    """What was found, with the tensors beside it that have these endings. Raises `InputError` where anything is wrong."""
    finder.refuse(title, way_out)
    return Packing(found, leftovers(finder.base, found, endings))


def stacks_left(packing: Packing, plain: Collection[str]) -> list[str]:
    """The modules of a layer's experts, `….mlp.experts`, of which no weight stays packed where those in `plain` do not."""
    left = {stack_of(name) for name in plain} - {stack_of(name) for name in packing.weights.keys() - set(plain)}
    return sorted(stack for stack in left if stack)


def stack_of(name: str) -> str:
    """`….experts` of a weight of an expert; empty for another."""
    match = STACK.fullmatch(name)
    return match["stack"] if match else ""


def leftovers(base: Checkpoint, found: Iterable[str], endings: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Weight → the tensors beside it with these endings: `X.input_scale`, or `X_input_scale` of a stack of experts."""
    there: dict[str, list[str]] = {}
    for name in found:
        stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
        some = [f"{stem}{ending}" for ending in endings if f"{stem}{ending}" in base.tensors]
        if some := [each for each in some if not OF_THE_CACHE.fullmatch(each)]:
            there[name] = some
    return there


def with_entries(given: object, more: Iterable[str]) -> list[object]:
    """A list of a config, with more entries that are not there yet."""
    before = list(given) if isinstance(given, (list, tuple)) else []
    return [*before, *(entry for entry in dict.fromkeys(more) if entry not in before)]
