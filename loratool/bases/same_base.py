"""Whether a base is the one that an adapter was trained on, by name, by shape, or by how it is packed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.adapters.adapter import Adapter, same_bytes
from loratool.adapters.model_settings import setting
from loratool.bases.codecs import as_decoded
from loratool.bases.opening import open_checkpoint
from loratool.errors import LoratoolError, printable
from loratool.files.folders import PROVENANCE
from loratool.files.hub_cache import origin_of
from loratool.files.hub_names import parse
from loratool.files.stand_ins import stand_in
from loratool.files.untrusted import read_json
from loratool.notes import Note

if TYPE_CHECKING:
    from loratool.files.checkpoint import Checkpoint
    from loratool.files.safefile import SafeFile


SIZES = {
    "hidden dimensions": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "dimensions inside the MLP": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
}

# What names of quantised models have in them: unsloth/llama-3-8b-bnb-4bit, org/Qwen2.5-7B-Instruct-GPTQ-Int4
MARK = re.compile(
    r"[-_.](?:bnb|nf4|fp4|gptq|awq|hqq|eetq|aqlm|quanto|torchao|quantized|quantised|fp8|nvfp4|mxfp[48]|int[48]"
    r"|w[48]a(?:4|8|16)(?:fp8)?|[2-8]-?bits?)(?=[-_.]|$)",
    re.IGNORECASE,
)


def unlike_bases(base: Checkpoint, adapters: Sequence[Adapter]) -> Iterator[Note]:
    """A note for each adapter that was trained on another base, by its id on the Hub, its config, or how it is stored."""
    origin, written = origin_of(base.root), base.config.get("_name_or_path")
    known = origin.repo if origin else written if isinstance(written, str) else ""
    place = parse(known) if known and not os.path.lexists(known) else None
    for adapter in adapters:
        name = adapter.training.base
        config = named_config(name) if name else {}
        packing = unlike_packing(base, known or base.root.name, adapter, config)
        if packing is not None:
            yield packing.under(adapter.name)
        if not name:
            continue
        named = parse(name) if not os.path.lexists(name) else None
        if packing and place and unmarked(name) == unmarked(place.repo):
            continue  # it is the same model, stored in another way
        if named and place and named.repo.lower() != place.repo.lower():
            text = (
                f"says it was trained on {printable(named.repo)}, but BASE is {printable(place.repo)}; on another "
                "base the result is not what was trained"
            )
        elif differing := unlike_shapes(config, base.config):
            text = f"says it was trained on {printable(name)}, whose config.json has {differing}"
        elif packing is None and (weight := unlike_weight(name, base, adapter)):
            text = (
                f"says it was trained on {printable(name)}, whose {printable(weight)} has other values than BASE's; on "
                "another base the result is not what was trained"
            )
        else:
            continue
        yield Note("base-mismatch", text).under(adapter.name)


def unlike_weight(name: str, base: Checkpoint, adapter: Adapter) -> str:
    """The smallest weight that an adapter changes, where its values in the base that it names differ from those in `base`.

    Empty where they are the same, or where that cannot be seen on this machine. A base that loratool made of another
    model has a record of that, and is another on purpose.
    """
    folder = named_folder(name)
    try:
        if folder is None or os.path.samefile(folder, base.root) or (base.root / PROVENANCE).is_file():
            return ""
        named = open_checkpoint(folder)
        alike: list[tuple[int, str]] = []
        for each in adapter.updates:
            there, here = named.stored.get(each), base.stored.get(each)
            if there is not None and here is not None and (there.dtype, there.shape) == (here.dtype, here.shape):
                alike.append((there.nbytes, each))
        if not alike:
            return ""
        from loratool.bases.weights import plain_of

        weight = min(alike)[1]
        one, other = (plain_of(model, weight) for model in (named, base))
        if not (is_whole(one.file) and is_whole(other.file)):
            return ""
        return "" if same_bytes(one, other) else weight
    except (LoratoolError, OSError):
        return ""


def is_whole(file: SafeFile) -> bool:
    """Whether all bytes of a file are on this disk."""
    return stand_in(file.path) is None and file.path.stat().st_size >= file.layout.size


def named_folder(name: str) -> Path | None:
    """The folder of a base that an adapter names, where it is on this machine: itself, or in the Hub's cache."""
    if os.path.isdir(name):
        return Path(name)
    place = parse(name)
    folder = cached(place.repo, place.revision or "main") if place is not None else None
    return folder if folder is not None and folder.is_dir() else None


def named_config(name: str) -> Mapping[str, Any]:
    """The config of a base that an adapter names, where it is on this machine: a folder, or in the Hub's cache."""
    folder = named_folder(name)
    if folder is None or not (folder / "config.json").is_file():
        return {}
    try:
        return read_json(folder / "config.json", repeated=True, lenient=True)
    except LoratoolError:
        return {}


def cached(repo: str, revision: str) -> Path | None:
    """The snapshot of a revision in the cache of the Hub, by the cache's layout alone: its client is slow to import."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))
    folder = cache / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / revision.replace("..", "")).read_text(encoding="ascii")[:40]
    except (OSError, ValueError):
        return None
    return folder / "snapshots" / commit if re.fullmatch("[0-9a-f]{40}", commit) else None


def unlike_shapes(named: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """The first size in which two configs differ, in words; empty where they agree as far as both say it."""
    for what, fields in SIZES.items():
        one, other = setting(named, fields), setting(base, fields)
        if one and other and one != other:
            return f"{one} {what}; BASE's has {other}"
    return ""


def is_marked(name: str) -> bool:
    """Whether the name or the path of a model says that it is quantised."""
    return MARK.search(last_part(name)) is not None


def unmarked(name: str) -> str:
    """The last part of a model's name without what says that it is quantised, in lower case."""
    return MARK.sub("", last_part(name)).lower()


def last_part(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def unlike_packing(base: Checkpoint, known: str, adapter: Adapter, named: Mapping[str, Any]) -> Note | None:
    """A note where either the adapter's base or the one it is merged into is quantised, and the other is not.

    Args:
        base: that it is merged into, decoded.
        known: the name of `base`.
        adapter: whose files say what it was trained on.
        named: the config of the base that it names; empty where that is not on this machine.
    """
    name, said = adapter.training.base, adapter.training.quantised
    packed = as_decoded(base) is not None
    trained_packed = bool(said or is_marked(name) or named.get("quantization_config"))
    if packed == trained_packed or (name and last_part(name) == last_part(known)):
        return None
    if trained_packed:
        what = printable(said or name)
        return Note(
            "trained-quantised",
            f"was trained on quantised weights ({what}), but BASE is plain; unless BASE is a dequantised copy of them, "
            "pass the quantised model as BASE to get the model that was trained",
        )
    if not name or (not named and unmarked(name) == unmarked(known) and not is_marked(known)):
        return None  # what it names may be quantised as well
    return Note(
        "trained-plain",
        f"names {printable(name)} as its base, but BASE is quantised; unless it was trained on a quantised copy, as with "
        f"QLoRA, pass {printable(name)} as BASE to get the model that was trained",
    )
