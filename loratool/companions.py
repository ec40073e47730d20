"""What goes into the output beside the weights: config, tokenizer, code, licence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.checkpoint import Checkpoint, leaves
from loratool.errors import printable

if TYPE_CHECKING:
    from loratool.adapter import Adapter

# What a tokenizer is made of; an adapter that ships its own was trained with it.
TOKENIZER_FILES = frozenset(
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tekken.json",
        "chat_template.jinja",
        "chat_template.json",
    ]
)
MORE_TEMPLATES = "additional_chat_templates"
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")


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


def companions(
    base: Checkpoint, adapters: Sequence[Adapter], dtype: str, notes: list[str]
) -> tuple[dict[str, OutputFile], list[str]]:
    """The files of the output by name, and those left out: the base's, the adapters' tokenizer over them, config edits."""
    files = {name: OutputFile(name, base.root / name) for name in base.side_files}
    left_out = list(base.left_out)
    for name, source in tokenizer_files(adapters, notes).items():
        files[name] = OutputFile(name, source)
    tokenizer = files.get("tokenizer_config.json", OutputFile("")).source
    if tokenizer and tokenizer.parent != base.root and b'"chat_template"' in tokenizer.read_bytes():
        # a template in a file of its own would win over the one that the adapter's config holds
        for name in CHAT_TEMPLATES:
            if name in files and files[name].source == base.root / name:
                del files[name]
                left_out.append(f"{name} (the adapter's tokenizer_config.json brings its own)")
    if dtype != "keep" and (edited := config_with_dtype(base.config, dtype)) is not None:
        files["config.json"] = OutputFile("config.json", content=edited)
        notes.append(f"config.json: dtype set to {dtype}")
    return files, left_out


def tokenizer_files(adapters: Sequence[Adapter], notes: list[str]) -> dict[str, Path]:
    """Tokenizer and chat template files that adapters ship; of several adapters the first one's win."""
    found: dict[str, Path] = {}
    owner = ""
    for adapter in adapters:
        names = [p.name for p in sorted(adapter.folder.iterdir()) if p.name in TOKENIZER_FILES]
        names += [f"{MORE_TEMPLATES}/{p.name}" for p in sorted((adapter.folder / MORE_TEMPLATES).glob("*.jinja"))]
        own = {n: adapter.folder / n for n in names if (adapter.folder / n).is_file() and not leaves(adapter.folder, n)}
        if not own:
            continue
        if not owner:
            found, owner = own, adapter.name
            notes.append(f"{owner}: its {', '.join(map(printable, own))} win over the base's")
        elif any(name not in found or found[name].read_bytes() != p.read_bytes() for name, p in own.items()):
            notes.append(f"{adapter.name}: its tokenizer differs from that of {owner}, which is used")
    return found


def config_with_dtype(config: Mapping[str, Any], dtype: str) -> bytes | None:
    """`config.json` with every dtype entry set, or None where it has none."""
    changed = False

    def visit(node: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal changed
        result: dict[str, Any] = {}
        for key, value in node.items():
            if key in ("torch_dtype", "dtype") and isinstance(value, str):
                changed = changed or value != dtype
                result[key] = dtype
            else:
                result[key] = visit(value) if isinstance(value, dict) else value
        return result

    table = visit(config)
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode() if changed else None
