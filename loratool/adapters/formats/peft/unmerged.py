"""A full model that was saved with its adapter unmerged: the base's tensors and the adapter's, told apart.

`state_dict()` of a model that PEFT has wrapped holds `base_layer.weight` where the model had `weight`, and the factors
of every adapter with that adapter's name: `lora_A.default.weight`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.formats.peft import keys, lora
from loratool.adapters.formats.peft.draft import LEFT_BEHIND, TOKENS
from loratool.adapters.formats.peft.files import CONFIG, read_config
from loratool.adapters.formats.peft.methods import METHODS
from loratool.adapters.formats.peft.reading import adapter_from, draft_of
from loratool.adapters.reading import Reading
from loratool.errors import InputError, UsageError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.views import SafeFiles, Selection
from loratool.notes import Note

SLOTS = frozenset(
    {*lora.SLOTS, *lora.ONLY_TRAINING, TOKENS, *LEFT_BEHIND}.union(*(method.slots for method in METHODS.values()))
)
Names = dict[str, str]  # name of a tensor as it is read → as the file spells it


def taken_apart(checkpoint: Checkpoint, reading: Reading) -> tuple[Checkpoint, Adapter]:
    """The base and one adapter of a model that was saved unmerged.

    Raises:
        UsageError: it holds several adapters and none, or another one, is named.
        InputError: its α is not known, or the adapter is malformed.
    """
    found = {name: keys.split(name, SLOTS) for name in checkpoint.tensors}
    paths = keys.Paths.of([key for key in found.values() if key], {})
    base: Names = {}
    adapters: dict[str, Names] = {}
    for name, key in found.items():
        parts = keys.path_of(name)
        if key is not None and key.slot:
            owner, plain = without_owner(parts, key.slot.removesuffix(".bias"))
            adapters.setdefault(owner, {})[plain] = name
        elif "modules_to_save" in parts[:-1]:
            at = parts.index("modules_to_save")
            adapters.setdefault(parts[at + 1], {})[".".join(parts[:at] + parts[at + 2 :])] = name
        else:
            base[paths.plain(".".join(part for part in parts if part != "original_module"))] = name
    owner = chosen(checkpoint.root, sorted(adapters), reading)
    left = sorted(set(adapters) - {owner})
    return base_of(checkpoint, base, left), adapter_of(checkpoint, owner, adapters[owner], reading)


def without_owner(parts: list[str], slot: str) -> tuple[str, str]:
    """The adapter that a factor is of, and its name as PEFT saves it alone."""
    at = len(parts) - 1 - parts[::-1].index(slot)
    rest = parts[at + 1 :]
    owner = rest[0] if rest and rest[0] not in ("weight", "bias") else ""
    return owner, ".".join(parts[: at + 1] + (rest[1:] if owner else rest))


def chosen(root: Path, names: list[str], reading: Reading) -> str:
    """The adapter that is asked for, or the only one."""
    listed = ", ".join(map(printable, names))
    if reading.adapter_name is None:
        if len(names) > 1:
            raise UsageError(f"{printable(root)}: contains several adapters ({listed}); choose one with --adapter-name")
        return names[0]
    if reading.adapter_name not in names:
        raise UsageError(f"{printable(root)}: has no adapter {printable(repr(reading.adapter_name))}; it has {listed}")
    return reading.adapter_name


def base_of(checkpoint: Checkpoint, names: Names, left: list[str]) -> Checkpoint:
    """The model without its adapters, its tensors under the names that the model itself gives them."""
    shards = [
        Selection.of(shard, {n: old for n, old in names.items() if old in shard.tensors}) for shard in checkpoint.shards
    ]
    renamed = [(old, name) for name, old in names.items() if old != name]
    notes = list(checkpoint.notes)
    if renamed:
        old, name = next((pair for pair in renamed if ".base_layer." in pair[0]), renamed[0])
        more = f" and {len(renamed) - 1} more" if len(renamed) > 1 else ""
        notes.append(Note("tensors-renamed", f"PEFT's names are dropped: {printable(old)} → {printable(name)}{more}"))
    if left:
        notes.append(Note("adapters-left-out", f"its other adapters are not merged: {', '.join(map(printable, left))}"))
    return dataclasses.replace(
        checkpoint,
        shards=tuple(shard for shard in shards if shard.tensors),
        index_metadata={k: v for k, v in (checkpoint.index_metadata or {}).items() if not k.startswith("total_")},
        notes=tuple(note for note in notes if note.code != "unmerged-model"),
    )


def adapter_of(checkpoint: Checkpoint, owner: str, names: Names, reading: Reading) -> Adapter:
    """One adapter of the model, under the config that lies there or under α alone."""
    file = SafeFiles.of(
        checkpoint.shards[0].path,
        (
            Selection.of(shard, {n: old for n, old in names.items() if old in shard.tensors})
            for shard in checkpoint.shards
        ),
    )
    folder = checkpoint.root if checkpoint.root.is_dir() else checkpoint.root.parent
    places = (folder / CONFIG, folder / owner / CONFIG) if owner else (folder / CONFIG,)
    path = next((path for path in places if path.is_file()), None)
    notes: list[Note] = []
    config = read_config(path) if path else assumed_config(folder, owner, names, reading, notes)
    draft = draft_of(file, config, notes, reading)
    adapter, problems = adapter_from(draft, folder, path or checkpoint.shards[0].path)
    if problems:
        raise InputError(f"{printable(checkpoint.root)}: its adapter is malformed:", problems)
    return dataclasses.replace(adapter, name=printable(owner) or adapter.name)


def assumed_config(
    folder: Path, owner: str, names: Mapping[str, str], reading: Reading, notes: list[Note]
) -> dict[str, Any]:
    """The config of a plain LoRA with the α that was given, for a model without a config of its adapter."""
    other = {family for name in names if (family := keys.family_of(name)) not in ("", "LORA")}
    if other:
        raise InputError(f"{printable(folder)}: contains an adapter of type {min(other)}, but no {CONFIG}")
    if reading.input_alpha is None:
        raise InputError(
            f"{printable(folder)}: the alpha of its adapter {printable(repr(owner))} is not recorded; pass the "
            f"lora_alpha it was trained with as --input-alpha, or add its {CONFIG} to the folder"
        )
    parts = {part for name in names for part in name.split(".")}
    notes.append(Note("config-assumed", f"there is no {CONFIG}; plain scaling by α/r is assumed, not rsLoRA"))
    return {
        "peft_type": "LORA",
        "use_dora": "lora_magnitude_vector" in parts,
        "lora_bias": any(name.endswith("lora_B.bias") for name in names),
    }
