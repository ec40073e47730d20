"""Files in PEFT's layout become an `Adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.peft import keys, lora, packing, support
from loratool.adapters.formats.peft.draft import TOKENS, Draft
from loratool.adapters.formats.peft.files import CONFIG, INDEX, WEIGHTS, open_weights, read_config, wrong_fields
from loratool.adapters.formats.peft.training import quantised_in, training_of
from loratool.adapters.reading import AS_STORED, Reading
from loratool.adapters.weight_files import weight_files
from loratool.errors import InputError, LoratoolError, Problem, printable
from loratool.files.hub_cache import name_of
from loratool.files.safefile import SafeFile, read_safefile
from loratool.layouts.diffusion.words import DENOISER, SECOND_DENOISERS, TEXT_WORDS
from loratool.notes import Note
from loratool.provenance.recorded import quantised_base, record_at

# Fields of a config that say what model was trained, not how.
OF_THE_MODEL = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")

COMPONENTS = frozenset({*DENOISER, *SECOND_DENOISERS, *TEXT_WORDS})  # folders that diffusers' scripts save adapters in
LONGEST_LIST = 8  # names that a note repeats
TENSORS = "tensors"  # the format of a file of whole tensors


def read_leniently(path: Path, reading: Reading = AS_STORED) -> tuple[Adapter, tuple[Problem, ...]]:
    """The updates that can be read of an adapter, and what is wrong with the others.

    Raises `InputError` where there is no header or no config to go by.
    """
    notes: list[Note] = []
    folder, file = open_weights(path, notes, reading.adapter_name)
    if folder.name != reading.adapter_name:
        notes += reading.unused_name()
    config_file = folder / CONFIG
    draft = draft_of(file, read_config(config_file), notes, reading)
    alone = path.is_file() and path.name not in (WEIGHTS, INDEX)  # its folder may hold anything
    own = {part.path.relative_to(folder).as_posix() for part in file.files}
    adapter, problems = adapter_from(draft, folder, config_file)
    component = folder.name if folder.name in COMPONENTS else ""
    return replace(
        adapter, component=component, alone=alone, beside=() if alone else weight_files(folder, file, own)
    ), problems


def draft_of(file: SafeFile, config: Mapping[str, Any], notes: list[Note], reading: Reading) -> Draft:
    """A draft under the fields of a config that are sound; the others are problems of it."""
    config = with_alpha(config, reading.input_alpha, notes)
    wrong = wrong_fields(config)
    return Draft(
        file,
        reading,
        notes,
        config={name: value for name, value in config.items() if name not in wrong},
        problems=[*wrong.values()],
    )


def with_alpha(config: Mapping[str, Any], alpha: float | None, notes: list[Note]) -> Mapping[str, Any]:
    """The config with the α that the caller gives, where it does not hold its own."""
    name = "lora_alpha" if config.get("peft_type", "LORA") in ("LORA", "ADALORA") else "alpha"
    if alpha is None or config.get(name) is None:
        return config if alpha is None else {**config, name: alpha}
    held = printable(config[name])
    notes.append(Note("input-alpha-not-used", f"its config has {name} {held}, so --input-alpha {alpha:g} is ignored"))
    return config


def adapter_from(draft: Draft, folder: Path, config_file: Path) -> tuple[Adapter, tuple[Problem, ...]]:
    """The adapter of a draft, and what is wrong with the rest of it."""
    read_updates(draft)
    return Adapter(
        name=name_of(folder),
        format="peft",
        folder=folder,
        file=draft.file,
        config=draft.config,
        config_file=config_file,
        training=replace(training_of(draft.config), quantised=how_quantised(draft)),
        updates=draft.updates,
        bases=draft.bases,
        sources=draft.sources,
        optional=frozenset(draft.optional),
        packing=draft.packing,
        unsupported=tuple(dict.fromkeys(draft.unsupported)),
        unused=tuple(draft.unused),
        notes=tuple(draft.notes),
    ), tuple(draft.problems)


def how_quantised(draft: Draft) -> str:
    """How the base was quantised in training, and which file says so; empty where none does."""
    if said := quantised_in(packing.card(draft)):
        return f"{said}, as its README.md says"
    with suppress(LoratoolError):
        if said := quantised_base(record_at(draft.file.path.parent)):
            return f"{said}, as its loratool.json says"
    return ""


def read_updates(draft: Draft) -> None:
    """Take every tensor of the file up, as its type of adapter means it."""
    kind = draft.config.get("peft_type", "LORA")
    row = support.TYPES.get(kind) if isinstance(kind, str) else None
    if row is None or row.refused:
        shown = f"peft_type {printable(kind)}"
        draft.unsupported.append(f"{shown}: {row.refused}" if row else f"unknown {shown}")
        return
    packing.check(draft)
    if kind == "LORA":
        draft.sort(kind, lora.SLOTS, lora.ONLY_TRAINING)
        lora.read_lora(draft)
        draft.place_tokens(lora.token_numbers)
    else:
        from loratool.adapters.formats.peft.methods import METHODS  # loaded for those who need them

        draft.notes += draft.reading.unused_layout()
        method = METHODS[kind]
        draft.sort(kind, method.slots, method.ignored)
        read = method.reader(draft)
        for module in [*draft.modules.values()]:
            if module.path and set(module.slots) != {TOKENS}:
                draft.attempt(module, read)
        draft.place_tokens(lambda _: draft.config.get("token_indices"))
    draft.place_saved()
    remark(draft)
    if not (draft.updates or draft.problems or draft.unsupported or draft.unused):
        draft.problems.append(Problem("it contains no adapter tensors"))


def read_saved(path: Path, owner: Adapter) -> Adapter:
    """A file of tensors that were trained whole, besides the adapter `owner`: each replaces the base's.

    Raises `InputError` where it is malformed, or holds factors.
    """
    notes: list[Note] = []
    file = read_safefile(path)
    draft = Draft(file, notes=notes, config={})
    draft.sort("LORA", lora.SLOTS, lora.ONLY_TRAINING)
    if draft.modules or draft.copies:
        raise InputError(f"{printable(path)}: contains adapter factors; pass it as an ADAPTER of its own")
    draft.place_saved()
    if draft.problems:
        raise InputError(f"{printable(path)}: cannot be loaded along with {owner.name}:", draft.problems)
    return Adapter(
        name=f"{owner.name}: {printable(path.name)}",
        format=TENSORS,
        folder=owner.folder,
        file=file,
        config=(config := {name: owner.config[name] for name in OF_THE_MODEL if name in owner.config}),
        config_file=path,
        training=training_of(config),
        updates=draft.updates,
        sources=draft.sources,
        unused=tuple(draft.unused),
        notes=tuple(note for note in notes if note.code != "prefix-missing"),  # its names are the base's
    )


def remark(draft: Draft) -> None:
    """Add a note for each promise of the config that the tensors do not keep: no reason to refuse, but to be said."""
    bias = draft.config.get("bias", "none")
    if bias not in (None, "none") and not any(target.endswith(".bias") for target in draft.saved):
        draft.notes.append(
            Note(
                "bias-not-saved",
                f"the config says bias={printable(repr(bias))}, but the file contains no bias, so none is merged",
            )
        )
    unknown = sorted(set(draft.config) - {*support.OPTIONS, *packing.FIELDS})
    if unknown and draft.config.get("peft_type", "LORA") == "LORA":
        shown = ", ".join(map(printable, unknown[:LONGEST_LIST])) + (", …" if len(unknown) > LONGEST_LIST else "")
        draft.notes.append(
            Note(
                "unknown-fields",
                f"config fields unknown to loratool, ignored as PEFT 0.21 does: {shown}",
            )
        )
    if idle := idle_targets(draft):
        more = ", …" if len(idle) > LONGEST_LIST else ""
        draft.notes.append(
            Note(
                "idle-targets",
                f"target_modules names {', '.join(map(printable, idle[:LONGEST_LIST]))}{more}, but the file has no "
                "tensor for it",
            )
        )


def idle_targets(draft: Draft) -> list[str]:
    """The entries of a list of `target_modules` that are the tail of no adapted module."""
    listed = draft.config.get("target_modules")
    if not isinstance(listed, list):
        return []
    idle = {entry for entry in listed if isinstance(entry, str)}
    for module in draft.modules.values():
        if not idle:
            break
        idle -= keys.tails(module.name)
    return [entry for entry in listed if isinstance(entry, str) and entry in idle]
