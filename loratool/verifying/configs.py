"""The files of a merged model besides its weights: `config.json` decides what is computed, others are told about."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator, Mapping
from typing import Any

from loratool.errors import LoratoolError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.folders import CARD
from loratool.files.untrusted import json_value
from loratool.layouts.ties import TIE_FLAGS
from loratool.merging.plan import Plan
from loratool.notes import Note
from loratool.results.verify import Diagnosis
from loratool.templates import some
from loratool.verifying.pairing import Pairing

CONFIG = "config.json"
# Keys that say who wrote the file, or from where; what is computed does not depend on them.
ORIGINS = frozenset({"transformers_version", "_name_or_path", "_commit_hash", "_diffusers_version"})
DTYPES = ("torch_dtype", "dtype")
PACKINGS = ("quantization_config", "compression_config")
MOST_SHOWN = 6
MISSING = object()


def compare_files(plan: Plan, merged: Checkpoint, explained: frozenset[str]) -> Iterator[Note | Diagnosis]:
    """What differs in the small files. `explained` are keys of the config that another diagnosis is about."""
    wanted = {file.name: file for file in plan.side_files}
    config = wanted.pop(CONFIG, None)
    if config is not None:
        content = config.content if config.source is None else config.source.read_bytes()
        try:
            ours = json_value(content or b"{}")
        except (ValueError, LoratoolError):
            ours = None
        yield from compare_configs(ours, merged, explained)
    other: list[str] = []
    for name, file in sorted(wanted.items()):
        path = merged.root / name
        if name == CARD or name.endswith(".safetensors.index.json"):
            continue
        if not path.is_file():
            other.append(f"{name} (missing)")
        elif not (
            path.read_bytes() == file.content if file.source is None else filecmp.cmp(path, file.source, shallow=False)
        ):
            other.append(name)
    if other:
        yield Note("side-files-differ", f"other bytes than those of the inputs: {some(other, MOST_SHOWN)}")


def compare_configs(ours: Any, merged: Checkpoint, explained: frozenset[str]) -> Iterator[Note | Diagnosis]:
    """Shared keys must have the same values; keys that only one side has are noted."""
    if not isinstance(ours, Mapping) or not ours:
        return
    if CONFIG not in merged.side_files:
        if merged.root.is_dir():
            yield Diagnosis("config-missing", f"{CONFIG} is missing, so nothing can load the model")
        return
    changed, added, gone = list[str](), list[str](), list[str]()
    for path, one, other in unlike(ours, merged.config):
        keys = path.split(".")
        if keys[-1] in ORIGINS or not explained.isdisjoint(keys):
            continue
        if one is MISSING:
            added.append(path)
        elif other is MISSING:
            gone.append(path)
        else:
            changed.append(f"{printable(path)} is {short(other)}, not {short(one)}")
    if changed:
        more = f" and {len(changed) - MOST_SHOWN} more" if len(changed) > MOST_SHOWN else ""
        yield Diagnosis("config-changed", f"{CONFIG}: {'; '.join(changed[:MOST_SHOWN])}{more}")
    if added or gone:
        parts = [f"{len(added)} keys added" * bool(added), f"{len(gone)} keys left out" * bool(gone)]
        names = ", ".join(map(printable, [*added, *gone][:MOST_SHOWN]))
        yield Note("config-keys-differ", f"{CONFIG}: {' and '.join(filter(None, parts))} by another tool: {names}")


def unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, object, object]]:
    """(dotted path, our value, their value) of every key in which two configs differ; the dtype has two names."""
    ours, theirs = one_dtype(ours), one_dtype(theirs)
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        one, other = ours.get(key, MISSING), theirs.get(key, MISSING)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from unlike(one, other, f"{path}{key}.")
        elif one != other and not (one is None and other is MISSING) and not (one is MISSING and other is None):
            yield f"{path}{key}", one, other


def one_dtype(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with its dtype under one name; transformers 5 renamed it."""
    if "torch_dtype" not in config or "dtype" in config:
        return config
    return {("dtype" if key == "torch_dtype" else key): value for key, value in config.items()}


def short(value: object) -> str:
    text = json.dumps(value, default=str)
    return printable(text if len(text) <= 60 else f"{text[:57]}…")


def keys_of(pairing: Pairing) -> frozenset[str]:
    """The keys of a config that change with the tensors, and are told with them."""
    return frozenset(
        (
            *(TIE_FLAGS if pairing.untied or pairing.still_tied else ()),
            *(("vocab_size",) if pairing.resized else ()),
            *(DTYPES if pairing.dtypes else ()),
            *(PACKINGS if pairing.quantised else ()),
        )
    )
