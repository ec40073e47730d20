"""What is known of a base's tensors before they are read: from its own `loratool.json`, or from the Hub's cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from loratool.errors import LoratoolError
from loratool.files.digests import (
    FUNCTION,
    HASHES,
    Digest,
    Listed,
    Reference,
    digest_of_part,
    read_recorded,
)
from loratool.files.folders import PROVENANCE
from loratool.files.hub_cache import sha256_of_link
from loratool.files.pipelines import Member
from loratool.files.safefile import SafeFile, TensorInfo
from loratool.files.untrusted import LARGEST_RECORD, read_json


class KnownDigests:
    """The digests of a base's tensors, so far as they need not be computed."""

    def __init__(self, root: Path) -> None:
        self.home = root if root.is_dir() else root.parent
        self.files: dict[Path, tuple[Mapping[str, Listed], str]] = {}  # path → of its tensors, and of all of it

    def of(self, file: SafeFile, info: TensorInfo) -> Listed | None:
        """The digests of the chunks of a tensor, or a reference to its bytes; None where neither is known."""
        if isinstance(file, Member):
            return self.of(file.original, file.original.tensors[file.names[info.name]])
        if not (file.is_own and file.path.is_relative_to(self.home)):  # of an adapter, or not here yet
            return None
        if file.path not in self.files:
            self.files[file.path] = self.tensors(file), sha256_of_link(file.path)
        listed, sha256 = self.files[file.path]
        start = file.position(info)
        if info.name in listed or not sha256:
            return listed.get(info.name)
        return Reference(self.name(file), sha256, start, start + info.nbytes)

    def find(self, reference: Reference) -> Path | None:
        """The file of the base that a reference names."""
        path = self.home / reference.file
        return path if sha256_of_link(path) == reference.sha256 else None

    def name(self, file: SafeFile) -> str:
        return file.path.relative_to(self.home).as_posix()

    def whole(self, file: SafeFile) -> Digest | None:
        """The digest of a weight file of the base; None where it is not known."""
        if found := self.recorded(file):
            return found
        sha256 = sha256_of_link(file.path)
        return Digest(file.layout.size, sha256) if sha256 else None

    def tensors(self, file: SafeFile) -> Mapping[str, Listed]:
        """What the base's record lists of a file's tensors."""
        found = self.recorded(file)
        listed = found.tree.tensors if found and found.tree and found.tree.function == FUNCTION else {}
        # the version of an object is no digest of what it holds
        return {n: each for n, each in listed.items() if not (isinstance(each, Reference) and each.version)}

    @cached_property
    def record(self) -> tuple[Mapping[str, Digest], int]:
        """What the base's record lists of its files, and when it was written (nanoseconds)."""
        path = self.home / PROVENANCE
        try:
            return read_recorded(read_json(path, LARGEST_RECORD, lenient=True)), path.stat().st_mtime_ns
        except (LoratoolError, OSError):
            return {}, 0

    def recorded(self, file: SafeFile) -> Digest | None:
        """What the base's record lists of a file; nothing of a file that seems to have been changed since."""
        if not file.path.is_relative_to(self.home):  # not here yet
            return None
        listed, written = self.record
        found = listed.get(self.name(file))
        if found is None or found.tree is None or found.size != file.layout.size or file.identity.modified > written:
            return None
        return found if found.tree.header == digest_of_part(file.layout.header, HASHES[found.tree.function]) else None
