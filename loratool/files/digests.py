"""What tells that a file still holds what was written: an entry of a stage's journal and of `loratool.json`.

A weight file of a merged model has a tree of digests (docs/provenance.md), which does not depend on the order in which
its bytes were written, or on how its tensors are split into files; every other file has the plain SHA-256 of its bytes.
Everything else takes a `Digest` as it comes: how one is made, stored and compared is known here alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from loratool.errors import InputError, printable
from loratool.files.names import is_plain
from loratool.files.process import on_all_cores
from loratool.files.safefile import Identity, Layout, LocalSource, SafeFile, TensorInfo
from loratool.files.source import PIECE, Source, expect, read_pieces
from loratool.files.stand_ins import hashed, stand_in
from loratool.files.untrusted import open_regular
from loratool.files.weight_formats import read_weight_file
from loratool.templates import first_few

CHUNK = 64 << 20  # bytes of a tensor that have a digest of their own, in whole rows
FUNCTION = "blake3"  # of the digests that are made
VERSION = re.compile(r'"[\x21\x23-\x7e]{1,200}"')  # an ETag
MD5 = re.compile(r"[0-9a-f]{32}")
HEX = frozenset("0123456789abcdef")
OTHER = "differs from the bytes that were written"


class State(Protocol):
    """A hash function at work."""

    def update(self, part: bytes | memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


def new_state() -> State:
    """What begins a digest of `FUNCTION`."""
    from blake3 import blake3

    return blake3()


HASHES: dict[str, Callable[[], State]] = {FUNCTION: new_state, "sha256": hashlib.sha256}  # all give 32 bytes


def digest_of_part(part: bytes | memoryview, begin: Callable[[], State] = new_state) -> str:
    state = begin()
    state.update(part)
    return state.hexdigest()


@dataclass(frozen=True)
class Reference:
    """Where a tensor's bytes are from, for want of a digest of their own: a range of a file with a known SHA-256.

    Of an object in a store its version is known instead.
    """

    file: str  # its name in the base
    sha256: str  # of the whole file
    start: int
    stop: int
    version: str = ""  # its ETag, where that is all that is known

    def root(self, begin: Callable[[], State]) -> str:
        """What it counts as in the root of a file."""
        return digest_of_part(f"{self.sha256 or self.version}:{self.start}:{self.stop}".encode(), begin)

    def record(self) -> dict[str, Any]:
        known = {"version": self.version} if self.version else {"sha256": self.sha256}
        return {"file": self.file, **known, "range": [self.start, self.stop]}

    @classmethod
    def of_record(cls, entry: Mapping[str, Any]) -> Reference | None:
        cut = range_in(entry)
        match entry:
            case {"file": str(file), "sha256": str(sha256)} if cut and is_plain(file) and is_hex(sha256):
                return cls(file, sha256, *cut)
            case {"file": str(file), "version": str(version)} if cut and is_plain(file) and VERSION.fullmatch(version):
                return cls(file, "", *cut, version) if entry.get("sha256") is None else None
        return None


@dataclass(frozen=True)
class CopiedRange:
    """Bytes of a file in a store that the store itself copied from another one."""

    start: int  # byte of the file
    stop: int
    source: Reference
    md5: str = ""  # in hexadecimal, as the store told it; empty where it did not

    def record(self) -> dict[str, Any]:
        told = {"md5": self.md5} if self.md5 else {}
        return {"range": [self.start, self.stop], "source": self.source.record(), **told}

    @classmethod
    def of_record(cls, entry: object) -> CopiedRange | None:
        """What such an entry says; None for anything else."""
        match entry:
            case {"source": dict(source), **rest} if (cut := range_in(rest)) and (known := Reference.of_record(source)):
                md5 = rest.get("md5", "")
                return cls(*cut, known, md5) if md5 == "" or (isinstance(md5, str) and MD5.fullmatch(md5)) else None
        return None


def range_in(entry: object) -> tuple[int, int] | None:
    """Where the "range" of an entry begins and ends; None where it has none."""
    match entry:
        case {"range": [start, stop]} if type(start) is type(stop) is int and 0 <= start <= stop:
            return start, stop
    return None


Listed = tuple[str, ...] | Reference  # of a tensor: the digests of its chunks, or where its bytes are from
Finder = Callable[[Reference], Path | None]  # tells the file that a reference names, where it is on this machine


@dataclass(frozen=True)
class Tree:
    """The digests of one weight file: of its header and of the chunks of its tensors, in hexadecimal."""

    root: str  # over the header's digest and the tensors' roots
    header: str  # of the length, the JSON and the padding
    tensors: Mapping[str, Listed]  # in the order of the file
    function: str = FUNCTION

    @classmethod
    def of(cls, layout: Layout, listed: Mapping[str, Listed]) -> Tree:
        """The tree of a file, from the digests of its tensors."""
        header = digest_of_part(layout.header)
        tensors = {info.name: listed[info.name] for info in layout.in_order}
        return cls(root_of(header, tensors.values(), new_state), header, tensors)

    @classmethod
    def of_part(cls, layout: Layout, listed: Mapping[str, Listed]) -> Tree:
        """The tree of a part of a file, from the digests of the chunks that are in it."""
        header = digest_of_part(layout.header)
        tensors = {info.name: listed[info.name] for info in layout.in_order if listed.get(info.name)}
        return cls(root_of(header, tensors.values(), new_state), header, tensors)

    def record(self) -> dict[str, Any]:
        """Its part of a record."""
        tensors = {n: each.record() if isinstance(each, Reference) else list(each) for n, each in self.tensors.items()}
        return {"function": self.function, "root": self.root, "header": self.header, "tensors": tensors}

    @classmethod
    def of_record(cls, entry: Mapping[str, Any]) -> Tree | None:
        """The tree that an entry of a record holds; None where it holds none that can be read."""
        match entry:
            case {"root": str(root), "header": str(header), "function": str(function), "tensors": dict(tensors)}:
                read = {str(name): listed_of_record(each) for name, each in tensors.items()}
                if function in HASHES and is_hex(root) and is_hex(header) and None not in read.values():
                    return cls(root, header, {name: each for name, each in read.items() if each is not None}, function)
        return None


@dataclass(frozen=True)
class Digest:
    """The digest of one file: its size in bytes, and the SHA-256 of all of it, or a tree, or both.

    `str` gives the root of the tree where there is one, in hexadecimal.
    """

    size: int
    sha256: str = ""
    tree: Tree | None = None
    copies: tuple[CopiedRange, ...] = ()  # what never passed through here

    def __str__(self) -> str:
        return self.tree.root if self.tree else self.sha256

    def record(self) -> dict[str, Any]:
        """The entry of this file in a journal or in `loratool.json`."""
        plain = {"sha256": self.sha256} if self.sha256 else {}
        copies = {"copies": [each.record() for each in self.copies]} if self.copies else {}
        return {"size": self.size, **plain, **(self.tree.record() if self.tree else {}), **copies}

    @classmethod
    def of_record(cls, entry: object) -> Digest | None:
        """The digest that such an entry holds; None where it holds none."""
        if not isinstance(entry, Mapping):
            return None
        size, sha256 = entry.get("size"), entry.get("sha256", "")
        tree = Tree.of_record(entry) if "root" in entry else None
        if type(size) is not int or size < 0 or not (is_hex(sha256) or (tree and sha256 == "")):
            return None
        told = entry.get("copies", [])
        copies = [CopiedRange.of_record(each) for each in told] if isinstance(told, list) else []
        return cls(size, sha256, tree, tuple(each for each in copies if each is not None and each.stop <= size))


def listed_of_record(entry: object) -> Listed | None:
    """What a record lists of a tensor; None for anything else."""
    if isinstance(entry, Mapping):
        return Reference.of_record(entry)
    return tuple(entry) if isinstance(entry, list) and entry and all(map(is_hex, entry)) else None


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


def root_of(header: str, tensors: Iterable[Listed], begin: Callable[[], State]) -> str:
    """The root of a file, from the digests of its header and of its tensors, in the order of the file."""
    roots = [
        listed.root(begin) if isinstance(listed, Reference) else digest_of_part(bytes.fromhex("".join(listed)), begin)
        for listed in tensors
    ]
    return digest_of_part(bytes.fromhex(header + "".join(roots)), begin)


def parts_of(path: Path) -> Iterator[bytes]:
    """All bytes of a file in parts. Raises `InputError` where it is not a regular file, or changes meanwhile."""
    if (there := stand_in(path)) is not None:
        source = there.source()
        expect(source, 0, source.size)
        yield from map(bytes, read_pieces(source, 0, source.size))
        return
    with open(open_regular(path), "rb", buffering=0) as stream:
        before = Identity.of(os.fstat(stream.fileno()))
        while part := stream.read(PIECE):
            yield part
        if Identity.of(os.fstat(stream.fileno())) != before or Identity.of(path.stat()) != before:
            raise InputError(f"{printable(path)}: the file changed while it was being read; start again")


def digest_of(path: Path) -> Digest:
    """The plain digest of a file, all of which is read; of what a file stands for, once.

    Raises `InputError` where it is not a regular file, or changes meanwhile.
    """
    if (there := stand_in(path)) is not None and os.fspath(path) in hashed:
        return Digest(there.source().size, hashed[os.fspath(path)])
    state, size = hashlib.sha256(), 0
    for part in parts_of(path):
        state.update(part)
        size += len(part)
    if there is not None:
        hashed[os.fspath(path)] = state.hexdigest()
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
    tables = [provenance.get(key) for key in ("shards", "files")]
    entries = [entry for table in tables if isinstance(table, Mapping) for entry in table.items()]
    return {n: digest for n, entry in entries if is_plain(n) and (digest := Digest.of_record(entry)) is not None}


def nowhere(_reference: Reference) -> None:
    """A `Finder` that finds nothing."""


def unproven(wanted: Digest, find: Finder) -> dict[str, Reference]:
    """The tensors that `why_unlike` cannot compare, for the file that they are from is not there."""
    if wanted.tree is None or wanted.sha256:
        return {}
    return {
        n: each
        for n, each in wanted.tree.tensors.items()
        if isinstance(each, Reference) and not each.version and find(each) is None
    }


def why_unlike(path: Path, wanted: Digest, find: Finder = nowhere, in_order: bool = False) -> str:
    """Empty where a file holds what was written; else what is wrong. Its size is looked at first, which costs nothing.

    Tensors that are listed by a reference are compared with the file that `find` gives for it, where it gives one. With
    `in_order`, a file that stands for an object is read from its beginning to its end, for the SHA-256 of all of it too.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    if size != wanted.size:
        return f"has {size} bytes, but {wanted.size} were written"
    if wanted.tree is None or (wanted.sha256 and any(isinstance(e, Reference) for e in wanted.tree.tensors.values())):
        return "" if sha256_of(path) == wanted.sha256 else OTHER
    return why_other_tree(path, wanted.tree, find, wanted.copies, in_order and stand_in(path) is not None)


def why_other_tree(path: Path, wanted: Tree, find: Finder, copies: Sequence[CopiedRange], in_order: bool) -> str:
    """Empty where a weight file has the digests of a tree; else what is wrong with it.

    Its ranges are read in parallel, or in their order, after which its SHA-256 is known too.
    """
    begin = HASHES[wanted.function]
    os.close(open_regular(path))  # what is no regular file is said to be none, rather than no weight file
    try:
        file = read_weight_file(path)
    except InputError:
        return f"{OTHER} (its header cannot be read)"
    if digest_of_part(file.layout.header, begin) != wanted.header or file.tensors.keys() != wanted.tensors.keys():
        return f"{OTHER} (its header)"
    if root_of(wanted.header, (wanted.tensors[info.name] for info in file.layout.in_order), begin) != wanted.root:
        return "does not have the root digest that is listed for it"
    ranges = [*tensor_ranges(file, wanted, begin, find), *copied_ranges(file, copies)]
    with file.open() as source:
        if in_order:
            ranges.sort(key=lambda each: each.start)
            whole = InOrder(source)
            right = [each.holds(whole) for each in ranges]
            hashed[os.fspath(path)] = whole.sha256()
        else:
            right = on_all_cores(lambda each: each.holds(source), ranges)
        file.check_unchanged(source)
        file.check_unchanged()
    unequal = dict.fromkeys(n for each, holds in zip(ranges, right, strict=True) if not holds for n in each.names)
    return f"{OTHER} (tensor {first_few([*unequal], 3)})" if unequal else ""


@dataclass(frozen=True)
class Compared:
    """Bytes of a weight file, from `start` on, that are read and compared, and the tensors that are among them."""

    start: int
    holds: Callable[[Source], bool]  # whether they are what was written
    names: Sequence[str]


def tensor_ranges(file: SafeFile, wanted: Tree, begin: Callable[[], State], find: Finder) -> Iterator[Compared]:
    """Each chunk of each tensor, which has a digest, or is bytes of the file that it is from."""
    for info in file.layout.in_order:
        at, listed = file.position(info), wanted.tensors[info.name]
        if isinstance(listed, Reference):
            yield Compared(
                at, partial(has_bytes, start=at, stop=at + info.nbytes, wanted=listed, find=find), [info.name]
            )
            continue
        cuts = [*pairwise(chunk_cuts(info))]
        if len(cuts) != len(listed):
            yield Compared(at, lambda _: False, [info.name])
            continue
        for digest, (a, b) in zip(listed, cuts, strict=True):
            yield Compared(
                at + a, partial(has_digest, start=at + a, stop=at + b, begin=begin, digest=digest), [info.name]
            )


def copied_ranges(file: SafeFile, copies: Sequence[CopiedRange]) -> Iterator[Compared]:
    """Each range that a store copied, and told the MD5 of."""
    infos = [(file.position(info), info) for info in file.layout.in_order if info.nbytes]
    for copy in copies:
        if copy.md5:
            names = [info.name for at, info in infos if at < copy.stop and at + info.nbytes > copy.start]
            holds = partial(
                has_digest,
                start=copy.start,
                stop=copy.stop,
                begin=partial(hashlib.md5, usedforsecurity=False),
                digest=copy.md5,
            )
            yield Compared(copy.start, holds, names)


class InOrder:
    """A source that is read forwards, what nobody asks for too, and the SHA-256 of all of it."""

    def __init__(self, source: Source) -> None:
        self.source, self.size, self.at, self.state = source, source.size, 0, hashlib.sha256()
        expect(source, 0, self.size)

    def read(self, start: int, count: int, into: memoryview) -> None:
        """As of any source; bytes that were read before do not count again."""
        self.go_to(start)
        self.source.read(start, count, into)
        if start + count > self.at:
            self.state.update(into[self.at - start : count])
            self.at = start + count

    def go_to(self, start: int) -> None:
        """Read what lies before a byte."""
        while (count := min(PIECE, start - self.at)) > 0:
            self.read(self.at, count, memoryview(bytearray(count)))

    def sha256(self) -> str:
        """In hexadecimal, of all bytes."""
        self.go_to(self.size)
        return self.state.hexdigest()


def has_bytes(source: Source, start: int, stop: int, wanted: Reference, find: Finder) -> bool:
    """Whether some bytes of a source are those of a reference; True too where the file that it names is not there."""
    path = find(wanted)
    if path is None:
        return True
    if stop - start != wanted.stop - wanted.start:
        return False
    with open(open_regular(path), "rb", buffering=0) as stream:
        theirs = read_pieces(LocalSource(path, stream.fileno()), wanted.start, wanted.stop)
        return all(one == other for one, other in zip(read_pieces(source, start, stop), theirs, strict=True))


def has_digest(source: Source, start: int, stop: int, begin: Callable[[], State], digest: str) -> bool:
    """Whether some bytes of a source have a digest."""
    return digest_of_range(source, start, stop, begin) == digest


def digest_of_range(source: Source, start: int, stop: int, begin: Callable[[], State]) -> str:
    """The digest of some bytes of a source."""
    state = begin()
    expect(source, start, stop - start)
    for piece in read_pieces(source, start, stop):
        state.update(piece)
    return state.hexdigest()
