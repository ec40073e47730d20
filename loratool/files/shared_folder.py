"""Parts of an output in a folder that many machines see: the stage `OUT.partial`, on NFS or any other file system.

    OUT.partial/journal              what is being made; whoever comes first writes it, all others compare
    OUT.partial/model/*              at full length; workers write their parts at their places
    OUT.partial/parts/part-*.json    a record of each part whose bytes are on stable storage
    OUT.partial/parts/worker-*.json  signs of life

No lock is needed. A name appears whole or not at all, by a link or a rename. Machines whose page caches do not know of
each other may write whole pages where only some bytes were changed, so a part is written without the pages that it shares
with its neighbours: those few bytes are in its record, and `--finish` puts them in their place.
"""

from __future__ import annotations

import os
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.arguments import Progress
from loratool.errors import LoratoolError, StorageError, UsageError, VerificationError, printable
from loratool.files.digests import HASHES, Digest, digest_of_part, digest_of_range
from loratool.files.folders import PROVENANCE, sidecar_of
from loratool.files.journal import JOURNAL, MODEL, NEW_JOURNAL, PARTS, Journal, look
from loratool.files.outputs import check_stage, stage_of
from loratool.files.part_records import FilePart, PartRecord, SharedOutput
from loratool.files.presence import Presence, Worker, alone, publish_new, put_new, workers_in
from loratool.files.process import on_all_cores
from loratool.files.safefile import Layout, LocalSource, write_fully
from loratool.files.shard_writer import OpenFile
from loratool.files.sink import PAGE
from loratool.files.staging import Stage, check_space, storage_error, write_durably
from loratool.files.system import closing, forget_cached, open_file, sync_file, sync_folder
from loratool.files.untrusted import LARGEST_RECORD, read_json

if TYPE_CHECKING:
    from loratool.files.model_files import FileNames
    from loratool.files.seen import Seen

LARGEST_PART_RECORD = 16 << 20  # bytes
GOING, GONE = 50, 0.1  # how often it is tried to remove a stage, and seconds in between
FINISHING = "--finish"  # what a process does that finishes an output
EDGES = "edges"  # key of a record's details: first byte in the file → bytes of a page that is shared, in base64


class SharedFolder(SharedOutput):
    """The output of many workers in a folder that all of them see, as a `SharedOutput`; in it, one file if `single`."""

    read_to_check = True
    disturbed = (OSError, LoratoolError)

    def __init__(
        self,
        out: Path,
        journal: Journal,
        parts: Mapping[str, FilePart],
        layouts: Mapping[str, Layout],
        replaced: FileNames | None = None,
        single: bool = False,
    ) -> None:
        """`journal` describes the output; all workers must have the same one.

        `layouts` are the headers of the weight files, and `replaced` the files of what is at `out` and goes, by name.
        """
        super().__init__(out, journal.plan, "merge", parts, layouts)
        self.home, self.journal, self.replaced, self.single = stage_of(out), journal, replaced, single
        self.needed = 0  # bytes of the disk, for the parts that are made here
        self.turns: dict[str, AbstractContextManager[object]] = {}  # file → what writers of its parts take turns by
        self.presence: Presence | None = None  # of this process, where it works
        self.owner = -1  # the user to whom files that are made here belong
        self.check_alone: Callable[[], None] = lambda: None  # raises where another process finishes the output, too

    @classmethod
    def unfinished(cls, out: Path, single: bool) -> SharedFolder:
        """What workers have begun beside an output. Raises `UsageError` where there is no such thing."""
        found = check_stage(stage_of(out))
        if found is None or found.parts is None:
            raise UsageError(f"{printable(out)}: no unfinished merge in parts was found, so nothing was removed")
        return cls(out, found, {}, {}, single=single)

    @property
    def folder(self) -> Path:
        """Where the output's files are."""
        return self.home / MODEL

    def record_path(self, name: str) -> Path:
        return self.home / PARTS / f"{name}.json"

    def is_published(self) -> bool:
        path = sidecar_of(self.out) if self.single else self.out / PROVENANCE
        try:
            return read_json(path, LARGEST_RECORD, lenient=True).get("plan") == self.plan
        except LoratoolError:
            return False

    def workers(self) -> list[Worker]:
        return workers_in(self.home / PARTS)

    def explained(self, error: Exception) -> Exception:
        return storage_error(error, self.out, self.needed) if isinstance(error, OSError) else error

    def present(self, share: str) -> Presence:
        self.presence = Presence(self.home / PARTS, share)
        self.worker = self.presence.name
        return self.presence

    def claim(self, parts: Sequence[FilePart]) -> None:
        self.needed = sum(part.size for part in parts if PartRecord.of_bytes(self.stored(part.name)) is None)
        check_space(self.out.parent, self.needed)
        with suppress(FileExistsError):
            os.mkdir(self.home)
        draft = self.home / f"{NEW_JOURNAL}-{os.urandom(16).hex()}"
        write_durably(draft, self.journal.head(), os.O_EXCL)
        try:
            self.owner = draft.stat().st_uid
            put_new(draft, self.home / JOURNAL)
        finally:
            draft.unlink(missing_ok=True)
        if self.check() is None:
            raise StorageError(f"{printable(self.home)}: keeps disappearing; is another run using it?")
        for name in (MODEL, PARTS):
            with suppress(FileExistsError):
                os.mkdir(self.home / name)
        sync_folder(self.home)

    def check(self) -> Journal | None:
        """The journal of the stage, which is that of this output; None where there is none.

        Raises `UsageError` where it is of another output.
        """
        found = look(self.home, self.owner if self.owner >= 0 else None)
        if found is None:
            return None
        if found.parts is None:
            raise UsageError(
                f"{printable(self.home)}: contains an interrupted merge that was not made in parts; continue it without "
                "--part, or delete that folder"
            )
        if found.plan != self.journal.plan or found.parts != self.journal.parts:
            raise UsageError(
                f"{printable(self.home)}: contains parts of another merge (its fingerprint is {found.plan[:16]}, this "
                f"one's is {self.journal.plan[:16]}): its inputs, options or version of loratool differ; pass the same ones "
                "to every worker, choose another OUT, or remove the parts with --abort once no worker is running"
            )
        return found

    def all_stored(self) -> dict[str, bytes]:
        return {name: self.stored(name) for name in self.parts}

    def stored(self, name: str) -> bytes:
        try:
            with open(open_file(self.record_path(name), os.O_RDONLY), "rb") as stream:
                return stream.read(LARGEST_PART_RECORD)
        except FileNotFoundError:
            return b""

    def put_new(self, name: str, record: bytes) -> bool:
        return publish_new(self.record_path(name), record)

    def put_record(self, part: FilePart, record: PartRecord) -> None:
        super().put_record(part, record)
        if self.presence is not None:
            self.presence.end(part.name)

    def stands(self, part: FilePart, theirs: PartRecord, own: PartRecord) -> bool:
        return theirs.chunk_digests() == own.chunk_digests() or not self.problem(part, theirs)

    def problems(
        self,
        parts: Sequence[FilePart],
        records: Mapping[str, PartRecord],
        progress: Progress | None = None,
    ) -> dict[str, str]:
        """What is wrong with some parts, by name; all of their bytes are read from the disk, on all cores."""
        total, done, lock = sum(part.size for part in parts), [0], threading.Lock()
        for name in {part.file for part in parts}:
            with suppress(FileNotFoundError):  # which is told of every part
                forget_cached(self.folder / name)

        def look_at(part: FilePart) -> str:
            try:
                reason = self.problem(part, records[part.name])
            except (LoratoolError, OSError) as error:  # a disk with a bad block, say
                reason = f"cannot be read: {error}"
            with lock:
                done[0] += part.size
                if progress is not None:
                    progress(done[0], total)
            return reason

        found = zip(parts, on_all_cores(look_at, parts), strict=True)
        return {part.name: reason for part, reason in found if reason}

    def problem(self, part: FilePart, record: PartRecord) -> str:
        """Empty where a part is what its record has the digests of; else what is wrong. All of its bytes are read."""
        tree, layout = record.digest.tree, self.layouts[part.file]
        edges = edges_of(record)
        if tree is None or edges is None or not record.is_of(part, self.plan):
            return "has a record that cannot be read"
        begin = HASHES[tree.function]
        if digest_of_part(layout.header, begin) != tree.header:
            return "has a record of another file"
        path = self.folder / part.file
        try:
            opened = closing(open_file(path, os.O_RDONLY))
        except FileNotFoundError:
            return "is missing"
        with opened as descriptor:
            file = Mended(LocalSource(path, descriptor), edges)
            if file.size != layout.size:
                return f"is in a file of {file.size} bytes, which should have {layout.size}"
            if part.start == 0 and digest_of_range(file, 0, len(layout.header), begin) != tree.header:
                return "has another header in its file"
            made = zip(part.chunks, record.chunk_digests(), strict=True)
            if any(digest_of_range(file, at, at + size, begin) != digest for (_, at, size), digest in made):
                return "does not have the bytes that were written"
        return ""

    def open(self, part: FilePart, stop: threading.Event) -> PartFile:
        path = self.folder / part.file
        if path.parent != self.folder:  # never the folder itself: the output may be published
            path.parent.mkdir(parents=True, exist_ok=True)
        if self.presence is not None:
            self.presence.begin(part.name)
        return PartFile(path, part, self.layouts[part.file], stop, self)

    def forget(self, name: str) -> None:
        self.record_path(name).unlink(missing_ok=True)

    def assemble(self, parts: Sequence[FilePart], records: Mapping[str, PartRecord]) -> None:
        """Put the bytes of pages that parts share in their place."""
        for part in parts:
            with suppress(FileNotFoundError), closing(open_file(self.folder / part.file, os.O_WRONLY)) as descriptor:
                for at, content in (edges_of(records[part.name]) or {}).items():
                    write_fully(descriptor, content, at)
                sync_file(descriptor)

    @contextmanager
    def finishing(self) -> Iterator[Stage]:
        with self.told():
            folder, found = self.home / PARTS, self.check()
            if found is None or not folder.is_dir():
                raise VerificationError(f"{printable(self.out)}: no part of this merge has been made; run --part first")
            with Presence(folder, FINISHING) as presence, alone(folder, presence) as self.check_alone:
                yield Stage(self.out, self.home, found, single=self.out.name if self.single else "")

    def publish(self, stage: Stage) -> None:
        self.check_alone()
        stage.publish(self.replaced)

    def clear(self) -> None:
        """Remove the stage, which may be there still after a kill."""
        if (found := self.check()) is not None:
            remove_stage(Stage(self.out, self.home, found))

    def abort(self) -> tuple[Sequence[str], Sequence[str]]:
        removed = sorted(name for name in self.journal.files if (self.folder / name).is_file())
        remove_stage(Stage(self.out, self.home, self.journal))
        return (), removed


def remove_stage(stage: Stage) -> None:
    """Clear the stage of a published output away, once those who look at it meanwhile have let go of it.

    Where somebody does not, what is left is still known as ours, and the next `--finish` clears it away.
    """
    for _ in range(GOING):
        stage.clear()
        try:
            left = {entry.name for entry in os.scandir(stage.home)} - {JOURNAL}
        except FileNotFoundError:
            return
        if not left:
            stage.remove()
            return
        time.sleep(GONE)


def edges_of(record: PartRecord) -> dict[int, bytes] | None:
    """The bytes that a record holds, by the byte of the file at which they begin; None where that cannot be read."""
    table = record.details.get(EDGES, {})
    try:
        return {int(at): b64decode(content, validate=True) for at, content in table.items()}
    except (AttributeError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Mended:
    """A file as a `Source`, with the bytes of `edges` in place of what is there."""

    file: LocalSource
    edges: Mapping[int, bytes]

    @property
    def size(self) -> int:
        return self.file.size

    def read(self, start: int, count: int, into: memoryview) -> None:
        self.file.read(start, count, into)
        for at, content in self.edges.items():
            low, high = max(at, start), min(at + len(content), start + count)
            if low < high:
                into[low - start : high - start] = content[low - at : high - at]


class PartFile(OpenFile):
    """The sink of one part of a file, other parts of which are written by other processes at the same time."""

    def __init__(self, path: Path, part: FilePart, layout: Layout, stop: threading.Event, store: SharedFolder) -> None:
        self.filepart, self.store = part, store
        # the pages that this part has to itself; the ends of the file are nobody else's
        self.first = -(-part.start // PAGE) * PAGE
        self.last = part.stop if part.stop == layout.size else max(part.stop // PAGE * PAGE, self.first)
        inside = min(self.first, part.stop)
        self.edges = {
            at: bytearray(until - at)
            for at, until in ((part.start, inside), (max(self.last, inside), part.stop))
            if until > at
        }
        descriptor = open_file(path, os.O_RDWR | os.O_CREAT)
        if os.fstat(descriptor).st_size != layout.size:
            os.truncate(descriptor, layout.size)
        super().__init__(path, descriptor, part.start, part.size, stop, store.memory)
        self.turns = store.turns.setdefault(part.file, self.turns)  # those of the whole file
        if part.start == 0:
            try:
                self.write_cached(memoryview(layout.header), 0)
            except BaseException:
                self.close()
                raise
        self.written.add(part.size - part.payload)  # the header, and padding, which is zero

    def shared(self, at: int, count: int) -> Iterator[tuple[int, int, bytearray | None, int]]:
        """Some bytes of the part in up to three pieces, as (from, to, edge they are in if any, place in it)."""
        cuts = sorted({at, at + count, *(each for each in (self.first, self.last) if at < each < at + count)})
        for start, stop in pairwise(cuts):
            edge = next(((a, held) for a, held in self.edges.items() if a <= start < a + len(held)), None)
            yield (start, stop, None, 0) if edge is None else (start, stop, edge[1], start - edge[0])

    def write_cached(self, memory: memoryview, at: int) -> None:
        for start, stop, edge, place in self.shared(at, len(memory)):
            if edge is None:
                super().write_cached(memory[start - at : stop - at], start)
            else:
                edge[place : place + stop - start] = memory[start - at : stop - at]

    def copy_cached(self, source: LocalSource, start: int, count: int, at: int) -> None:
        for first, last, edge, place in self.shared(at, count):
            if edge is None:
                super().copy_cached(source, start + first - at, last - first, first)
            else:
                source.read(start + first - at, last - first, memoryview(edge)[place : place + last - first])

    def record(self, seen: Seen, digest: Digest) -> None:
        edges = {str(at): b64encode(held).decode() for at, held in self.edges.items()}
        self.store.record_part(self.filepart, digest, seen, {EDGES: edges} if edges else {})
