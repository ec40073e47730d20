"""Checkpoints in which some modules are packed and others plain: whether a config says so, and how it names those.

What the loaders of quantised models have in common.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from loratool.adapters.patterns import search_names
from loratool.bases.codecs.parts import Finder, told
from loratool.bases.packed import Packed, Packing
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES
from loratool.layouts.architectures import INPUT_EMBEDDINGS
from loratool.layouts.fusions import SERVED_AS
from loratool.layouts.renames import IN_MEMORY
from loratool.templates import template_of

EXPERTS = ".experts."
PARTS_OF_MODELS = ("text_config", "vision_config", "audio_config", "thinker_config")  # of more than text
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


def complete(
    finder: Finder, found: Mapping[str, Packed], title: str, way_out: str, endings: Sequence[str] = ()
) -> Packing:
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


def modules_of(weights: Collection[str]) -> list[str]:
    """The modules of some weights, without repeats: a stack of experts is named by its parameter."""
    return [*dict.fromkeys(name.removesuffix(".weight") for name in weights)]


def is_of_diffusers(base: Checkpoint) -> bool:
    """Whether a model is loaded by diffusers, and not by transformers."""
    return "_class_name" in base.config


def matched_in_diffusers(
    packing: Packing, plain: Collection[str], base: Checkpoint, matches: Callable[[str, str], bool]
) -> frozenset[str]:
    """The weights besides `plain` that a loader of diffusers takes for plain; `matches` has an entry and a module."""
    if not is_of_diffusers(base):
        return frozenset()
    entries = modules_of(plain)
    found = {
        name
        for name in packing.weights.keys() - set(plain)
        if any(matches(entry, name.removesuffix(".weight")) for entry in entries)
    }
    return frozenset(found | matched_in_diffusers(packing, {*plain, *found}, base, matches) if found else found)


def last_name(module: str) -> str:
    """The last part of a module's name."""
    return module.rpartition(".")[2]


def texts_in(value: object) -> list[str]:
    """The texts in a list of a config; none in anything else."""
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def in_memory(names: Sequence[str], base: Checkpoint) -> list[str]:
    """Names that a loader may know some weights or modules by, where those are not the ones that they have on disk.

    They differ in models of more than text. A name in a list that no module has does no harm.
    """
    if not any(isinstance(base.config.get(key), Mapping) for key in PARTS_OF_MODELS):
        return []
    found = (then + name.removeprefix(now) for name in names for now, then in IN_MEMORY if name.startswith(now))
    return [*dict.fromkeys(found)]


def fused_modules(modules: Sequence[str], base: Checkpoint, packed: Collection[str]) -> list[str]:
    """The names of the layers that vLLM makes of some plain modules, where all of their parts are plain.

    `packed` are the weights that stay packed. A name that the base has for a module of its own is not there.
    """
    found: dict[str, None] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        for fused, parts in SERVED_AS.items():
            stay = any(f"{parent}.{part}.weight" in packed for part in parts)
            if leaf in parts and not stay and f"{parent}.{fused}.weight" not in base.tensors:
                found[f"{parent}.{fused}"] = None
    return [*found]


def expert_layers(modules: Sequence[str], packed: Collection[str]) -> list[str]:
    """The layers of experts that vLLM makes of some plain experts, where none of theirs is among `packed` modules."""
    stay = {name.partition(EXPERTS)[0] for name in packed if EXPERTS in name}
    layers = dict.fromkeys(name.partition(EXPERTS)[0] for name in modules if EXPERTS in name)
    return [f"{layer}{EXPERTS[:-1]}" for layer in layers if layer not in stay]


def plain_matrices(base: Checkpoint, packing: Packing) -> list[str]:
    """The modules whose weight is a plain matrix in a base, embeddings left out."""
    return modules_of(
        [
            name
            for name, info in base.tensors.items()
            if name.endswith(".weight") and info.dtype in FLOAT_NAMES and len(info.shape) == 2
            if name not in packing.weights and name.split(".")[-2] not in INPUT_EMBEDDINGS
        ]
    )


def grown(given: object, base: Checkpoint, packing: Packing, plain: Collection[str]) -> list[str]:
    """A list of modules that are not packed, with those of the weights `plain` in it.

    Where there is none, transformers leaves the head as it is, and what is tied to it (`get_keys_to_not_convert`). That
    no longer applies once there is a list, so a new one has the head, tied or not, and all that is plain in the base.
    """
    packed = packing.weights.keys() - set(plain)
    listed = texts_in(given)
    if is_of_diffusers(base):  # which leaves nothing as it is
        return [*dict.fromkeys([*listed, *modules_of(plain)])]
    if given is None:
        head = [] if any(name.endswith("lm_head.weight") for name in packed) else ["lm_head"]
        matrices = plain_matrices(base, packing)
        listed = [*head, *matrices, *in_memory(matrices, base)]
    edited = modules_of(plain)
    return [*dict.fromkeys([*listed, *edited, *fused_modules(edited, base, packed)])]
