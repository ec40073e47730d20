"""How configs of quantised models name modules that are not quantised: what their loaders have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from loratool.bases.packed import Packing
from loratool.files.checkpoint import Checkpoint
from loratool.files.safefile import FLOAT_NAMES
from loratool.layouts.architectures import INPUT_EMBEDDINGS
from loratool.layouts.fusions import SERVED_AS
from loratool.layouts.renames import IN_MEMORY

EXPERTS = ".experts."
PARTS_OF_MODELS = ("text_config", "vision_config", "audio_config", "thinker_config")  # of more than text


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
