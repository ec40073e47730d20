"""What goes into the output beside the weights: config, tokenizer, code, licence."""

from __future__ import annotations

import filecmp
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.training import Training
from loratool.adapters.weight_files import module_files
from loratool.bases.decoded import Decoded, PackedModel
from loratool.bases.packing_settings import TWINS
from loratool.errors import InputError, printable
from loratool.files.checkpoint import Checkpoint
from loratool.files.folders import leaves
from loratool.files.model_files import TOKENIZER_FILES
from loratool.files.untrusted import holds_text, special_files
from loratool.layouts.architectures import CLASS_ENDS, IRREGULAR_CLASSES, LABEL_HEADS, TASK_CLASSES
from loratool.layouts.ties import TEXT_CONFIGS, TIE_FLAGS
from loratool.notes import Note

MORE_TEMPLATES = "additional_chat_templates"
ABOUT_PACKING = (*TWINS, "recipe.yaml")  # files that are about nothing but packed weights
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class ConfigEdit:
    """A value of a config that the output has another for."""

    path: tuple[str, ...]  # keys from the top; none for all of the file
    value: Any  # None removes the key
    file: str = "config.json"
    about: str = ""  # what changes, where the value is too long to be shown

    def __str__(self) -> str:
        name = ".".join(map(printable, self.path))
        if self.about:
            return f"{self.file}: {self.about}"
        if self.value is None:
            return f"{self.file}: {name} removed"
        shown = json.dumps(self.value) if not isinstance(self.value, dict) else f"{len(self.value)} entries"
        return f"{self.file}: {name} set to {shown}"


@dataclass(frozen=True)
class OutputFile:
    """A small file of the output: the copy of a file, or new content."""

    name: str
    source: Path | None = None
    content: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content or b"") if self.source is None else self.source.stat().st_size


def plan_side_files(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    dtype: str,
    notes: list[Note],
    edits: Sequence[ConfigEdit],
    plain: Collection[str],
) -> tuple[dict[str, OutputFile], list[str]]:
    """The files of the output by name, and those left out: the base's, the adapters' tokenizer over them, config edits."""
    files = {name: OutputFile(name, base.root / name) for name in base.side_files}
    left_out = list(map(str, base.left_out))
    adapters = [
        adapter for adapter in adapters if adapter.folder != base.root
    ]  # of a model saved unmerged they are one
    for name, source in {**module_files_of(adapters, notes), **tokenizer_files(adapters, notes)}.items():
        files[name] = OutputFile(name, source)
    tokenizer = files.get("tokenizer_config.json", OutputFile("")).source
    if tokenizer and tokenizer.parent != base.root and holds_text(tokenizer, b'"chat_template"'):
        # a template in a file of its own would win over the one that the adapter's config holds
        for name in CHAT_TEMPLATES:
            if name in files and files[name].source == base.root / name:
                del files[name]
                left_out.append(f"{name} (the adapter's tokenizer_config.json has its own)")
    configs = configs_of(base)
    edits = [*(edit for edit in edits if edit.file in configs), *packing_edits(base, plain)]
    if dtype != "keep":
        edits += [edit for file, config in configs.items() for edit in dtype_edits(config, dtype, file)]
    for edit in (each for each in edits if not each.path):  # a file that is about nothing else
        del files[edit.file]
        if edit.value is None:
            left_out.append(f"{printable(edit.file)} (describes packed weights, and none are left)")
        else:
            files[edit.file] = OutputFile(edit.file, content=json_bytes(edit.value))
    for file, config in configs.items():
        inner = [edit for edit in edits if edit.path and edit.file == file]
        if inner and config:
            files[file] = OutputFile(file, content=edited_config(config, inner))
        elif inner:
            text = "the base has no config.json; if you add one to the output, it must contain:"
            notes.append(Note("no-config", text))
    notes += [Note("config-edit", str(edit)) for edit in edits]
    return files, left_out


def configs_of(base: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """The configs of a model by file; none where the weights' own file says what a config says."""
    if base.components:
        return {f"{name}/config.json": model.config for name, model in base.components.items()}
    return {"config.json": base.config} if not base.config or "config.json" in base.side_files else {}


def tokenizer_files(adapters: Sequence[Adapter], notes: list[Note]) -> dict[str, Path]:
    """Tokenizer and chat template files that adapters ship; of several adapters the first one's win."""
    found: dict[str, Path] = {}
    owner = ""
    for adapter in adapters:
        names = [p.name for p in sorted(adapter.folder.iterdir()) if p.name in TOKENIZER_FILES]
        names += [f"{MORE_TEMPLATES}/{p.name}" for p in sorted((adapter.folder / MORE_TEMPLATES).glob("*.jinja"))]
        refuse_special(adapter.folder, names)
        own = {n: adapter.folder / n for n in names if (adapter.folder / n).is_file() and not leaves(adapter.folder, n)}
        if not own:
            continue
        if not owner:
            found, owner = own, adapter.name
            notes.append(
                Note("tokenizer-replaced", f"{owner}: its {', '.join(map(printable, own))} replace the base's")
            )
        elif any(name not in found or not filecmp.cmp(found[name], p, shallow=False) for name, p in own.items()):
            notes.append(
                Note("tokenizer-differs", f"{adapter.name}: its tokenizer differs from that of {owner}, which is used")
            )
    return found


def module_files_of(adapters: Sequence[Adapter], notes: list[Note]) -> dict[str, Path]:
    """What sentence-transformers reads besides the model, of the first adapter that brings it."""
    found: dict[str, Path] = {}
    for adapter in adapters:
        own = {name: path for name, path in module_files(adapter.folder).items() if not leaves(adapter.folder, name)}
        refuse_special(adapter.folder, own)
        if not found and own:
            found = own
            shown = ", ".join(printable(name) for name in own)
            notes.append(Note("modules-carried-over", f"{adapter.name}: copied for sentence-transformers: {shown}"))
        elif any(name not in found or not filecmp.cmp(found[name], path, shallow=False) for name, path in own.items()):
            text = f"{adapter.name}: its modules for sentence-transformers differ from those of the first adapter"
            notes.append(Note("modules-differ", f"{text}, which are used"))
    return found


def refuse_special(folder: Path, names: Iterable[str]) -> None:
    """Raise `InputError` naming the files that are none, such as pipes."""
    if odd := special_files(folder, names):
        raise InputError(f"{printable(folder)}: contains something that is not a regular file; remove it:", odd)


def edited_config(config: Mapping[str, Any], edits: Sequence[ConfigEdit]) -> bytes:
    """`config.json` with some values set; keys stay in their order, new ones go to the end."""

    def put(node: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
        key, *rest = path
        if not rest and value is None:
            return {name: other for name, other in node.items() if name != key}
        return {**node, key: put(node[key], tuple(rest), value) if rest else value}

    for edit in edits:
        config = put(config, edit.path, edit.value)
    return json_bytes(config)


def json_bytes(config: Mapping[str, Any]) -> bytes:
    """A config as a file holds it."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    if any(
        "\ud800" <= character <= "\udfff" for character in text
    ):  # half a surrogate pair, which UTF-8 has no bytes for
        text = json.dumps(config, indent=2)
    return (text + "\n").encode()


def parts_of(
    config: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The config and every config within it, each with the keys that lead there."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict):
            yield from parts_of(value, (*path, key))


def packing_edits(base: Checkpoint, plain: Collection[str]) -> list[ConfigEdit]:
    """What configs must say of packed weights that are plain in the output."""
    if not isinstance(base, Decoded) or not plain:
        return []
    in_order = [name for name in base.weights if name in plain]  # that of the files, so that outputs are reproducible
    return [edit for each in base.models if (own := each.own(in_order)) for edit in packing_edits_of(each, own)]


def packing_edits_of(part: PackedModel, plain: Sequence[str]) -> list[ConfigEdit]:
    """What the configs of one model must say, by its own names."""
    places = part.settings.places
    if len(plain) == len(part.packing.weights) and not part.packing.unread:
        whole = [name for name in ABOUT_PACKING if name in part.model.side_files]
        inside = [ConfigEdit(each.path, None, part.folder + each.file) for each in places if each.path]
        return [*inside, *(ConfigEdit((), None, part.folder + name) for name in whole)]
    about = f"names the weights that become plain, {len(plain)} in total"
    from loratool.bases.codecs.plain_modules import in_memory

    named = [*plain, *in_memory(plain, part.model)]
    return [
        ConfigEdit(
            each.path,
            part.left_plain(each, named),
            part.folder + each.file,
            f"{'.'.join(each.path)} {about}".strip(),
        )
        for each in places
    ]


def dtype_edits(config: Mapping[str, Any], dtype: str, file: str) -> list[ConfigEdit]:
    """Every entry of a config that tells the dtype and tells another one."""
    return [
        ConfigEdit((*path, key), dtype, file)
        for path, part in parts_of(config)
        for key in ("torch_dtype", "dtype")
        if isinstance(part.get(key), str) and part[key] != dtype
    ]


def tie_edits(config: Mapping[str, Any]) -> list[ConfigEdit]:
    """The flag that ties, off: at the top and for the language model, whether it is there or not, and where it is on.

    Releases of transformers differ in which of them they read, and in what they take a missing one for.
    """
    return [
        ConfigEdit((*path, key), False)
        for path, part in parts_of(config)
        for key in TIE_FLAGS
        if part.get(key) is True
        or (key == TIE_FLAGS[0] and key not in part and all(name in TEXT_CONFIGS for name in path))
    ]


def vocabulary_edits(config: Mapping[str, Any], sizes: Set[int]) -> list[ConfigEdit]:
    """The number of tokens, at the top and for the language model, where it is there and another."""
    return [
        ConfigEdit((*path, "vocab_size"), size)
        for size in sizes
        for path, part in parts_of(config)
        if all(name in TEXT_CONFIGS for name in path) and part.get("vocab_size", size) != size
    ]


def head_edits(
    base: Checkpoint, trained: Training, heads: Mapping[str, tuple[int, ...]], new: Set[str]
) -> list[ConfigEdit]:
    """What the config must say of heads that an adapter brings: the class of the model, and the labels.

    Args:
        base: whose config it is.
        trained: what the adapter says of its training.
        heads: their tensors and shapes.
        new: those of them that the base has not.
    """
    edits: list[ConfigEdit] = []
    if new and (name := class_with_head(base, trained)) and [name] != list(base.architectures):
        edits.append(ConfigEdit(("architectures",), [name]))
    counts = {
        shape[0]
        for tensor, shape in heads.items()
        if tensor.endswith(".weight") and len(shape) == 2 and tensor.split(".")[-2] in LABEL_HEADS
    }
    if len(counts) == 1 and (count := counts.pop()) != labels_of(base.config):
        names = {str(number): f"LABEL_{number}" for number in range(count)}
        edits.append(ConfigEdit(("id2label",), names))
        edits.append(ConfigEdit(("label2id",), {label: int(number) for number, label in names.items()}))
        if "num_labels" in base.config:
            edits.append(ConfigEdit(("num_labels",), count))
    return edits


def class_with_head(base: Checkpoint, trained: Training) -> str:
    """The class of transformers that was trained; empty where neither the adapter nor the base tells."""
    if trained.model_class:
        return trained.model_class
    end = TASK_CLASSES.get(trained.task, "")
    if not end or not base.architectures:
        return ""
    regular = re.sub(CLASS_ENDS, "", base.architectures[0]) + end
    return IRREGULAR_CLASSES.get((base.model_type, end), regular)


def labels_of(config: Mapping[str, Any]) -> int:
    """How many labels the config knows; transformers takes a missing entry for two."""
    labels, count = config.get("id2label"), config.get("num_labels")
    return len(labels) if isinstance(labels, dict) else count if isinstance(count, int) else 2
