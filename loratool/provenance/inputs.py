"""The entries of `loratool.json` about inputs: what each is called, where it is from, its licence, digests and history."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.files.checkpoint import Checkpoint
from loratool.files.digests import FUNCTION, Digest, digest_of_part, sha256_of
from loratool.files.hub_cache import told_origin
from loratool.files.known_digests import KnownDigests
from loratool.files.safefile import SafeFile
from loratool.files.seen_digests import SeenDigests
from loratool.files.views import Selection
from loratool.provenance.cards import terms_of
from loratool.provenance.record import is_decisive
from loratool.provenance.recorded import LICENCE, made_of


def told_input(place: Path, alone: bool = False) -> dict[str, str]:
    """What is told of any input: its commit where it is from the Hub, and its licence as its card has it.

    `alone` says that it is one file, whose folder may have the card of something else.
    """
    fields = {} if alone else terms_of(place if place.is_dir() else place.parent).fields
    return {**told_origin(place), **{key: fields[key] for key in LICENCE if key in fields}}


@dataclass(frozen=True)
class ModelDigests:
    """How the digests of a model's weight files come about."""

    known: KnownDigests
    seen: SeenDigests  # of files whose digests are computed

    @classmethod
    def of(cls, model: Checkpoint, compute: bool = True) -> ModelDigests:
        """Of a model that is about to be read; `compute` those of which nothing is known."""
        known, files = KnownDigests(model.root), weights_of(model).values() if compute else ()
        return cls(known, SeenDigests(file for file in files if known.whole(file) is None))

    def entry(self, file: SafeFile) -> dict[str, Any]:
        """What a record says of a file: its digests, or that of its header alone."""
        if self.seen.has(file):
            return Digest(file.layout.size, tree=self.seen.tree(file)).record()
        if (known := self.known.whole(file)) is not None:
            return known.record()
        return {"size": file.layout.size, "function": FUNCTION, "header": digest_of_part(file.layout.header)}


def told_model(model: Checkpoint, digests: ModelDigests | None = None) -> dict[str, Any]:
    """The entry of a model, with the digest of each file of weights and each config."""
    digests = digests or ModelDigests.of(model)
    weights = weights_of(model)
    files = {name: digests.entry(file) for name, file in weights.items()}
    if model.root.is_dir():
        for name in sorted({*model.side_files, *([model.index.name] if model.index else [])}):
            path = model.root / name
            if is_decisive(name) and name not in files and path.is_file():
                files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    alone = not model.root.is_dir()
    return {
        "name": model.name,
        **told_input(model.root, alone),
        "files": files,
        **made_of(model.root, dict.fromkeys(weights, ""), next(iter(weights.values())).metadata if alone else None),
    }


def weights_of(model: Checkpoint) -> dict[str, SafeFile]:
    """The files of weights of a model as they are on disk, by their names in it."""
    home = model.root if model.root.is_dir() else model.root.parent
    return {shard.path.relative_to(home).as_posix(): on_disk(shard) for shard in model.shards}


def on_disk(file: SafeFile) -> SafeFile:
    """The file that one with some of its tensors, or with other names for them, is seen in."""
    while isinstance(file, Selection):
        file = file.original
    return file
