"""What tells that a file still holds what was written: an entry of a stage's journal and of `loratool.json`.

A weight file of a merged model has a tree of digests (docs/provenance.md), which does not depend on the order in which
its bytes were written, or on how its tensors are split into files; every other file has the plain SHA-256 of its bytes.
Everything else takes a `Digest` as it comes: how one is made, stored and compared is known here alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from loratool.errors import InputError, printable
from loratool.files.inputs import open_regular
from loratool.files.names import has_other_parts
from loratool.files.process import cores
from loratool.files.safefile import Identity, Layout, SafeFile, TensorInfo, read_safefile

if TYPE_CHECKING:
    from loratool.files.source import Source

PIECE = 1 << 20  # bytes that are read at a time
CHUNK = 64 << 20  # bytes of a tensor that have a digest of their own, in whole rows
FUNCTION = "sha256"  # of the digests that are made
FUNCTIONS = ("sha256", "blake3")  # of those that are read; both have 32 bytes
HEX = frozenset("0123456789abcdef")
OTHER = "differs from the bytes that were written"


class State(Protocol):
    """A hash function at work."""

    def update(self, part: bytes | memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


new_state: Callable[[], State] = hashlib.sha256  # of `FUNCTION`


def hash_function(name: str) -> Callable[[], State] | None:
    """What begins a digest of that name; None where it needs a package that is not installed."""
    if name == FUNCTION:
        return new_state
    try:
        begin: Callable[[], State] = import_module(name).blake3
    except (ImportError, AttributeError):
        return None
    return begin


def digest_of_part(part: bytes | memoryview, begin: Callable[[], State] = new_state) -> str:
    state = begin()
    state.update(part)
    return state.hexdigest()


@dataclass(frozen=True)
class Tree:
    """The digests of one weight file: of its header and of the chunks of its tensors, in hexadecimal."""

    root: str  # over the header's digest and the tensors' roots
    header: str  # of the length, the JSON and the padding
    tensors: Mapping[str, tuple[str, ...]]  # of the chunks of each, by name, in the order of the file
    function: str = FUNCTION

    @classmethod
    def of(cls, layout: Layout, chunks: Mapping[str, Sequence[str]]) -> Tree:
        """The tree of a file, from the digests of its tensors' chunks."""
        header = digest_of_part(layout.header)
        tensors = {info.name: tuple(chunks[info.name]) for info in layout.in_order}
        return cls(root_of(header, tensors.values(), new_state), header, tensors)

    def record(self) -> dict[str, Any]:
        """Its part of a record."""
        tensors = {name: list(chunks) for name, chunks in self.tensors.items()}
        return {"function": self.function, "root": self.root, "header": self.header, "tensors": tensors}

    @classmethod
    def of_record(cls, entry: Mapping[str, Any]) -> Tree | None:
        """The tree that an entry of a record holds; None where it holds none that can be read."""
        root, header, function, tensors = (entry.get(key) for key in ("root", "header", "function", "tensors"))
        if function not in FUNCTIONS or not is_hex(root) or not is_hex(header) or not isinstance(tensors, Mapping):
            return None
        if not all(isinstance(chunks, list) and chunks and all(map(is_hex, chunks)) for chunks in tensors.values()):
            return None
        return cls(str(root), str(header), {name: tuple(chunks) for name, chunks in tensors.items()}, str(function))


@dataclass(frozen=True)
class Digest:
    """The digest of one file: its size in bytes, and the SHA-256 of all of it, or a tree, or both.

    `str` gives the root of the tree where there is one, in hexadecimal.
    """

    size: int
    sha256: str = ""
    tree: Tree | None = None

    def __str__(self) -> str:
        return self.tree.root if self.tree else self.sha256

    def record(self) -> dict[str, Any]:
        """The entry of this file in a journal or in `loratool.json`."""
        plain = {"sha256": self.sha256} if self.sha256 else {}
        return {"size": self.size, **plain, **(self.tree.record() if self.tree else {})}

    @classmethod
    def of_record(cls, entry: object) -> Digest | None:
        """The digest that such an entry holds; None where it holds none."""
        if not isinstance(entry, Mapping):
            return None
        size, sha256 = entry.get("size"), entry.get("sha256", "")
        tree = Tree.of_record(entry) if "root" in entry else None
        if type(size) is not int or size < 0 or not (is_hex(sha256) or (tree and sha256 == "")):
            return None
        return cls(size, sha256, tree)


def is_hex(value: object) -> bool:
    """Whether a value is a digest of 32 bytes in hexadecimal."""
    return isinstance(value, str) and len(value) == 64 and HEX.issuperset(value)


def chunk_cuts(info: TensorInfo) -> list[int]:
    """Where the chunks of a tensor begin and end, in bytes from its first one.

    A chunk is as many whole rows (entries of the first dimension) as fit in `CHUNK` bytes, at least one. A scalar, a
    tensor without bytes, and one whose rows are no whole bytes, are one chunk.
    """
    row, rest = divmod(info.nbytes, info.rows) if info.rows else (0, 0)
    step = info.nbytes if rest or not row else max(1, CHUNK // row) * row
    return [*range(0, info.nbytes, step or 1), info.nbytes] if info.nbytes else [0, 0]


def root_of(header: str, tensors: Iterable[Sequence[str]], begin: Callable[[], State]) -> str:
    """The root of a file, from the digests of its header and of its tensors' chunks, in the order of the file."""
    roots = [digest_of_part(bytes.fromhex("".join(chunks)), begin) for chunks in tensors]
    return digest_of_part(bytes.fromhex(header + "".join(roots)), begin)


def parts_of(path: Path) -> Iterator[bytes]:
    """All bytes of a file in parts. Raises `InputError` where it is not a regular file, or changes meanwhile."""
    with open(open_regular(path), "rb", buffering=0) as stream:
        before = Identity.of(os.fstat(stream.fileno()))
        while part := stream.read(PIECE):
            yield part
        if Identity.of(os.fstat(stream.fileno())) != before or Identity.of(path.stat()) != before:
            raise InputError(f"{printable(path)}: the file changed while it was being read; start again")


def digest_of(path: Path) -> Digest:
    """The plain digest of a file, all of which is read. Raises `InputError` where it is not a regular file, or changes
    meanwhile.
    """
    state, size = hashlib.sha256(), 0
    for part in parts_of(path):
        state.update(part)
        size += len(part)
    return Digest(size, state.hexdigest())


def digest_of_bytes(content: bytes) -> Digest:
    return Digest(len(content), hashlib.sha256(content).hexdigest())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal: how provenance names an input, and the Hub a file."""
    return digest_of(path).sha256


def recorded(files: Mapping[str, Digest]) -> dict[str, dict[str, Any]]:
    """The entry "files" of `loratool.json`: every file that was written, by its name relative to the folder."""
    return {name: digest.record() for name, digest in sorted(files.items())}


def read_recorded(provenance: Mapping[str, Any]) -> dict[str, Digest]:
    """The files that a `loratool.json` lists, which anybody may have written: entries that are none are passed over.

    loratool 0.1.0 listed the weights of merged models only, as "shards".
    """
    found: dict[str, Digest] = {}
    for key in ("shards", "files"):
        table = provenance.get(key)
        for name, entry in table.items() if isinstance(table, Mapping) else ():
            if is_plain(name) and (digest := Digest.of_record(entry)) is not None:
                found[name] = digest
    return found


def is_plain(name: object) -> bool:
    """Whether a name is a relative path that stays in its folder, spelled in the one usual way."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    if has_other_parts(name):
        return False
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name and name != "."


def why_unlike(path: Path, wanted: Digest) -> str:
    """Empty where a file holds what was written; else what is wrong. Its size is looked at first, which costs nothing."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    if size != wanted.size:
        return f"has {size} bytes, but {wanted.size} were written"
    if wanted.tree is None:
        return "" if sha256_of(path) == wanted.sha256 else OTHER
    return why_unchecked(wanted) or why_other_tree(path, wanted.tree)


def why_unchecked(wanted: Digest) -> str:
    """Empty where a digest can be compared with a file here; else the reason."""
    if wanted.tree is None or hash_function(wanted.tree.function) is not None:
        return ""
    return f"cannot be checked without the Python package {wanted.tree.function}, with which its digests were made"


def why_other_tree(path: Path, wanted: Tree) -> str:
    """Empty where a weight file has the digests of a tree; else what is wrong with it. The chunks are read in parallel."""
    begin = hash_function(wanted.function)
    assert begin is not None, "`why_unchecked` was not asked"
    os.close(open_regular(path))  # what is no regular file is said to be none, rather than no weight file
    try:
        file = read_safefile(path)
    except InputError:
        return f"{OTHER} (its header cannot be read)"
    if digest_of_part(file.layout.header, begin) != wanted.header or file.tensors.keys() != wanted.tensors.keys():
        return f"{OTHER} (its header)"
    order = file.layout.in_order
    if root_of(wanted.header, (wanted.tensors[info.name] for info in order), begin) != wanted.root:
        return "does not have the root digest that is listed for it"
    unequal = dict.fromkeys(unequal_tensors(file, wanted, begin))
    return (
        f"{OTHER} (tensor {', '.join(map(printable, [*unequal][:3]))}{', …' * (len(unequal) > 3)})" if unequal else ""
    )


def unequal_tensors(file: SafeFile, wanted: Tree, begin: Callable[[], State]) -> list[str]:
    """The tensors with a chunk that has another digest than it should."""
    chunks: list[tuple[str, str, int, int]] = []
    unequal: list[str] = []
    for info in file.layout.in_order:
        cuts, listed = chunk_cuts(info), wanted.tensors[info.name]
        if len(cuts) - 1 != len(listed):
            unequal.append(info.name)
            continue
        at = file.position(info)
        chunks += [(info.name, digest, at + a, at + b) for digest, (a, b) in zip(listed, pairwise(cuts), strict=True)]

    with file.open() as source, ThreadPoolExecutor(cores()) as pool:

        def look(chunk: tuple[str, str, int, int]) -> str:
            name, digest, start, stop = chunk
            return "" if digest_of_range(source, start, stop, begin) == digest else name

        unequal += filter(None, pool.map(look, chunks))
        file.check_unchanged(source)
        file.check_unchanged()
    return unequal


def digest_of_range(source: Source, start: int, stop: int, begin: Callable[[], State]) -> str:
    """The digest of some bytes of a source."""
    state, buffer = begin(), memoryview(bytearray(min(PIECE, stop - start)))
    for at in range(start, stop, PIECE):
        piece = buffer[: stop - at]
        source.read(at, len(piece), piece)
        state.update(piece)
    return state.hexdigest()
