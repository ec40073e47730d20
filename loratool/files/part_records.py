"""Parts of output files, which many machines make, and what is recorded of each: where bytes are, nobody here knows.

A part is some neighbouring chunks of one output file. Whoever makes one publishes a record with the digests of its
chunks; the bytes and the records live in a `SharedOutput`, a folder that all machines see or a bucket.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from loratool.arguments import Progress
from loratool.errors import InputError
from loratool.files.digests import Digest
from loratool.files.seen import Seen
from loratool.files.untrusted import json_object

if TYPE_CHECKING:
    import threading
    from contextlib import AbstractContextManager
    from pathlib import Path

    from loratool.files.presence import Worker
    from loratool.files.sink import Sink
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
        try:
            table = json_object(line, lenient=True)
        except (ValueError, InputError):
            return None
        name, plan, worker, seen, details = (table.get(key) for key in ("name", "plan", "worker", "seen", "details"))
        digest = Digest.of_record(table.get("digest"))
        texts = isinstance(name, str) and isinstance(plan, str) and isinstance(worker, str)
        tables = isinstance(seen, dict) and isinstance(details, dict)
        if table.get(HEAD) != FORMAT or not texts or not tables or digest is None or digest.tree is None:
            return None
        assert isinstance(seen, dict)
        assert isinstance(details, dict)
        return cls(str(name), str(plan), digest, Seen.of_table(seen), str(worker), details)

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


class SharedOutput(Protocol):
    """An output that any number of workers make together: its parts, their records, and how it gets its name.

    Doing a part twice is allowed at any time: the first record that is published stands.
    """

    @property
    def out(self) -> Path:
        """The output, as people call it."""
        ...

    @property
    def plan(self) -> str:
        """The fingerprint of what is made."""
        ...

    @property
    def command(self) -> str:
        """The command that makes it."""
        ...

    @property
    def read_to_check(self) -> bool:
        """Whether `problems` reads every byte, so that many workers should share it."""
        ...

    def is_published(self) -> bool:
        """Whether the output is there, complete."""
        ...

    def workers(self) -> Sequence[Worker]:
        """Who is at work, as far as that is known."""
        ...

    def at_work(self, share: str, parts: Sequence[FilePart]) -> AbstractContextManager[None]:
        """Begin the output, or join those who are at work on it, to make some parts, which people know as `share`.

        Raises:
            UsageError: something else is made there.
            PublishedError: it is complete by now.
        """
        ...

    def records(self) -> Mapping[str, PartRecord]:
        """Every record that is published, by its part's name; what is no record of ours is passed over."""
        ...

    def forget(self, name: str) -> None:
        """Withdraw a record that was found to be wrong."""
        ...

    def held(self, parts: Sequence[FilePart]) -> int:
        """Bytes of some parts that each worker may hold until they are sent."""
        ...

    def make_alone(self, parts: Sequence[FilePart]) -> Sequence[FilePart]:
        """Make those of some parts for which no bytes of tensors are needed here; gives the others."""
        ...

    def open(self, part: FilePart, stop: threading.Event) -> Sink:
        """What takes the bytes of a part. Its `record` publishes the part, once its bytes are on stable storage."""
        ...

    def assemble(self, parts: Sequence[FilePart], records: Mapping[str, PartRecord]) -> None:
        """Do what only the one process may do that finishes the output, before the parts are compared with their records."""
        ...

    def problems(
        self,
        parts: Sequence[FilePart],
        records: Mapping[str, PartRecord],
        progress: Progress | None = None,
    ) -> dict[str, str]:
        """Of those of some parts whose bytes are not what their records say: name → what is wrong."""
        ...

    def finishing(self) -> AbstractContextManager[Stage]:
        """Finish the output; gives the stage into which its small files go.

        Raises:
            VerificationError: nobody has begun the output.
            UsageError: another process is finishing it.
            PublishedError: another process has published it.
        """
        ...

    def name_weights(self, stage: Stage, records: Mapping[str, PartRecord], read: bool) -> None:
        """Put the weight files together of their parts; with `read`, so that they can be read in the stage."""
        ...

    def publish(self, stage: Stage) -> None:
        """Make the output complete, with the other files of the stage."""
        ...

    def clear(self) -> None:
        """Remove what only the making of a published output needed."""
        ...

    def abort(self) -> tuple[Sequence[str], Sequence[str]]:
        """Give the output up; the files whose uploads were ended, and those that were removed."""
        ...
