"""Parts of output files, which many machines make, and what is recorded of each: where bytes are, nobody here knows.

A part is some neighbouring chunks of one output file. Whoever makes one publishes a record with the digests of its
chunks; the bytes and the records live in a `SharedOutput`, a folder that all machines see or a bucket.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratool.arguments import Progress
from loratool.files.digests import Digest
from loratool.files.seen import Seen
from loratool.files.sink import Memory, Sink
from loratool.files.untrusted import json_or_empty

if TYPE_CHECKING:
    import threading
    from pathlib import Path

    from loratool.files.presence import Worker
    from loratool.files.safefile import Layout
    from loratool.files.staging import Stage


FORMAT = 1
HEAD = "loratool_part"


@dataclass(frozen=True)
class FilePart:
    """Neighbouring chunks of one output file; the first part of a file has its header, the last one what is at its end."""

    name: str  # of its record; no other part of the output has it
    file: str
    start: int  # byte of the file
    stop: int
    chunks: tuple[tuple[str, int, int], ...]  # tensor, byte of the file and size of each, in the order of the file
    work: Mapping[str, int] = field(default_factory=dict)  # kind of work → bytes of it

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.stop - self.start

    @property
    def payload(self) -> int:
        """Bytes of tensors."""
        return sum(size for _, _, size in self.chunks)

    @property
    def copied(self) -> bool:
        """Whether nothing in it is computed."""
        return self.work.keys() <= {"copy"}


@dataclass(frozen=True)
class PartRecord:
    """What is recorded of a part that is made, and on stable storage."""

    name: str
    plan: str  # the fingerprint of the merge
    digest: Digest  # its bytes, and the tree of its chunks: its "header" is that of the whole file
    seen: Seen
    worker: str  # who made it
    details: Mapping[str, Any] = field(default_factory=dict)  # what the store has to know besides, as JSON

    def to_bytes(self) -> bytes:
        """As it is stored: one line of JSON, and a line with its SHA-256."""
        table = {
            HEAD: FORMAT,
            "name": self.name,
            "plan": self.plan,
            "digest": self.digest.record(),
            "seen": self.seen.table(),
            "worker": self.worker,
            "details": dict(self.details),
        }
        line = json.dumps(table).encode() + b"\n"
        return line + hashlib.sha256(line).hexdigest().encode() + b"\n"

    @classmethod
    def of_bytes(cls, raw: bytes) -> PartRecord | None:
        """The record that was stored; None for anything else, or where a byte of it is another."""
        line, _, rest = raw.partition(b"\n")
        if rest.strip() != hashlib.sha256(line + b"\n").hexdigest().encode():
            return None
        table = json_or_empty(line, lenient=True)
        digest = Digest.of_record(table.get("digest"))
        if table.get(HEAD) != FORMAT or digest is None or digest.tree is None:
            return None
        match table:
            case {"name": str(name), "plan": str(plan), "seen": dict(seen), "worker": str(who), "details": dict(more)}:
                return cls(name, plan, digest, Seen.of_table(seen), who, more)
        return None

    def is_of(self, part: FilePart, plan: str) -> bool:
        """Whether it is the record of a part, of that merge, with a digest for each of its chunks."""
        chunks = dict(Counter(tensor for tensor, _, _ in part.chunks))
        tree = self.digest.tree
        listed = {} if tree is None else {name: len(each) for name, each in tree.tensors.items() if type(each) is tuple}
        return (self.name, self.plan, self.digest.size, listed) == (part.name, plan, part.size, chunks)

    def chunk_digests(self) -> list[str]:
        """Those of the chunks of its part, in their order."""
        assert self.digest.tree is not None
        return [digest for each in self.digest.tree.tensors.values() if isinstance(each, tuple) for digest in each]


class PublishedError(Exception):
    """Another process has published the output in the meantime, so nothing is left to do."""


class SharedOutput(ABC):
    """An output that any number of workers make together: its parts, their records, and how it gets its name.

    Doing a part twice is allowed at any time: the first record that is published stands.
    """

    read_to_check: bool  # whether `problems` reads every byte, so that many workers should share it
    disturbed: tuple[type[Exception], ...]  # what fails where another process publishes the output meanwhile

    def __init__(
        self, out: Path, plan: str, command: str, parts: Mapping[str, FilePart], layouts: Mapping[str, Layout]
    ) -> None:
        """`plan` is the fingerprint of what `command` makes; the headers of weight files are `layouts`, by name."""
        self.out, self.plan, self.command, self.parts, self.layouts = out, plan, command, parts, layouts
        self.memory = Memory()
        self.worker = ""  # who works here, for people

    @abstractmethod
    def is_published(self) -> bool:
        """Whether the output is there, complete."""

    def workers(self) -> Sequence[Worker]:
        """Who is at work, as far as that is known."""
        return ()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell in a sentence what fails in the block; once the output is published, as that."""
        try:
            yield
        except self.disturbed as error:
            if self.is_published():
                raise PublishedError from error
            raise self.explained(error) from None

    @abstractmethod
    def explained(self, error: Exception) -> Exception:
        """The error to raise for one that came while the output was made or finished."""

    @contextmanager
    def at_work(self, share: str, parts: Sequence[FilePart]) -> Iterator[None]:
        """Begin the output, or join those who are at work on it, to make some parts, which people know as `share`.

        Raises:
            UsageError: something else is made there.
            PublishedError: it is complete by now.
        """
        with self.told():
            self.claim(parts)
            if self.is_published():  # since it was looked at last
                self.clear()
                raise PublishedError
            with self.present(share):
                yield

    @abstractmethod
    def claim(self, parts: Sequence[FilePart]) -> None:
        """Begin the output, or join those who are at work on it; raises `UsageError` where they make something else."""

    def present(self, share: str) -> AbstractContextManager[object]:  # noqa: ARG002 (nobody looks)
        """Give signs of life while the block runs, where others can see them."""
        return nullcontext()

    def records(self) -> dict[str, PartRecord]:
        """Every record that is published, by its part's name; what is no record of ours is passed over."""
        found = {name: PartRecord.of_bytes(raw) for name, raw in self.all_stored().items()}
        return {n: record for n, record in found.items() if record and record.is_of(self.parts[n], self.plan)}

    @abstractmethod
    def all_stored(self) -> Mapping[str, bytes]:
        """What is there under the names of records."""

    @abstractmethod
    def stored(self, name: str) -> bytes:
        """What is there under the name of a record; empty where nothing is."""

    @abstractmethod
    def put_new(self, name: str, record: bytes) -> bool:
        """Publish a record where there is none; False where there is one."""

    def put_record(self, part: FilePart, record: PartRecord) -> None:
        """Make a record known. One that another worker has published first stands, if it and its bytes are still there."""
        while not self.put_new(part.name, record.to_bytes()):
            theirs = PartRecord.of_bytes(self.stored(part.name))
            if theirs is not None and theirs.is_of(part, self.plan) and self.stands(part, theirs, record):
                break
            self.forget(part.name)  # torn, or of bytes that are there no more

    def stands(self, part: FilePart, theirs: PartRecord, own: PartRecord) -> bool:  # noqa: ARG002 (all bytes are kept)
        """Whether the bytes of another worker's record are there, after those of the own one were written."""
        return True

    def record_part(self, part: FilePart, digest: Digest, seen: Seen, details: Mapping[str, Any]) -> None:
        """Make known that all of a part is on stable storage; `details` are what the output has to know besides."""
        self.put_record(part, PartRecord(part.name, self.plan, digest, seen, self.worker, details))

    @abstractmethod
    def forget(self, name: str) -> None:
        """Withdraw a record that was found to be wrong."""

    def held(self, parts: Sequence[FilePart]) -> int:  # noqa: ARG002 (nothing is sent)
        """Bytes of some parts that each worker may hold until they are sent."""
        return 0

    def make_alone(self, parts: Sequence[FilePart]) -> Sequence[FilePart]:
        """Make those of some parts for which no bytes of tensors are needed here; gives the others."""
        return parts

    @abstractmethod
    def open(self, part: FilePart, stop: threading.Event) -> Sink:
        """What takes the bytes of a part. Its `record` publishes the part, once its bytes are on stable storage."""

    def assemble(self, parts: Sequence[FilePart], records: Mapping[str, PartRecord]) -> None:  # noqa: B027 (most need it not)
        """Do what only the one process may do that finishes the output, before the parts are compared with their records."""

    @abstractmethod
    def problems(
        self,
        parts: Sequence[FilePart],
        records: Mapping[str, PartRecord],
        progress: Progress | None = None,
    ) -> dict[str, str]:
        """Of those of some parts whose bytes are not what their records say: name → what is wrong."""

    @abstractmethod
    def finishing(self) -> AbstractContextManager[Stage]:
        """Finish the output; gives the stage into which its small files go.

        Raises:
            VerificationError: nobody has begun the output.
            UsageError: another process is finishing it.
            PublishedError: another process has published it.
        """

    def name_weights(self, stage: Stage, records: Mapping[str, PartRecord], read: bool) -> None:  # noqa: B027 (they may be in the stage)
        """Put the weight files together of their parts; with `read`, so that they can be read in the stage."""

    @abstractmethod
    def publish(self, stage: Stage) -> None:
        """Make the output complete, with the other files of the stage."""

    @abstractmethod
    def clear(self) -> None:
        """Remove what only the making of a published output needed."""

    @abstractmethod
    def abort(self) -> tuple[Sequence[str], Sequence[str]]:
        """Give the output up; the files whose uploads were ended, and those that were removed."""
