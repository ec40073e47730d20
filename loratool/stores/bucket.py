"""An output in a store while it is made: its uploads, and records of their parts.

Nothing of an upload can be seen under the name of its object before it is completed. What whoever works on the output
shares is below `.loratool/` (`begun`).
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool.arguments import Progress
from loratool.errors import InputError, StoreError, UsageError, VerificationError, printable
from loratool.files import stand_ins
from loratool.files.digests import Digest, Tree
from loratool.files.folders import INDEX_SUFFIX, PROVENANCE
from loratool.files.part_records import FilePart, PartRecord, SharedOutput
from loratool.files.process import host_name
from loratool.files.safefile import Layout
from loratool.files.seen import Seen
from loratool.files.staging import Stage, workplace
from loratool.stores import uploads
from loratool.stores.begun import (
    BEGIN,
    FINISH,
    FORMAT,
    HEAD,
    PLAN,
    Begun,
    is_ours,
    read_begun,
    read_plan,
    read_record,
    stray_uploads,
)
from loratool.stores.client import ConditionError, GoneError, connection
from loratool.stores.names import FOLDER, StorePath
from loratool.stores.objects import StoredObject, listed
from loratool.stores.upload_part import Piece, UploadPart
from loratool.stores.uploading import UploadedPart

MOST_LOOKS = 4  # at an object, until an answer has its ETag: one answer may be wrong


class Bucket(SharedOutput):
    """The output of many workers in a store, as a `SharedOutput`: a prefix, or one object and its record if `single`."""

    read_to_check = False  # the store has compared what came with checksums, and tells those
    disturbed = (GoneError, VerificationError)
    parts: Mapping[str, UploadPart]

    def __init__(
        self,
        place: StorePath,
        begun: Begun,
        parts: Mapping[str, UploadPart],
        layouts: Mapping[str, Layout],
        single: str = "",
    ) -> None:
        """`place` is the prefix below which the files are; `single` the name of the one file, if it is one."""
        self.place, self.single, self.begun = place, single, begun
        super().__init__(Path(str(self.address)), begun.plan, begun.command, parts, layouts)
        self.worker = host_name()
        self.ids: dict[str, str] = {}  # file → its upload

    @classmethod
    def unfinished(cls, place: StorePath, single: str) -> Bucket:
        """What was begun at a place. Raises `UsageError` where there is no such thing."""
        begun = read_begun(home_of(place, single))
        if begun is None:
            raise UsageError(
                f"{place / single if single else place}: no unfinished output was found, so nothing was removed"
            )
        return cls(place, begun, {}, {}, single)

    @property
    def home(self) -> StorePath:
        return home_of(self.place, self.single)

    @property
    def address(self) -> StorePath:
        """The output, as people call it."""
        return self.place / self.single if self.single else self.place

    def path(self, name: str) -> StorePath:
        """The place of a file of the output."""
        return file_of(self.place, self.single, name)

    def is_published(self) -> bool:
        """Whether its record is there, which comes last."""
        return read_record(self.path(PROVENANCE)).get("plan") == self.plan

    def join(self) -> bool:
        """Go on with what others have begun; False where nobody has."""
        if (found := read_begun(self.home)) is None:
            return False
        self.check(found)
        self.begun = found
        return True

    def settle(self, joining: bool, replaced: Callable[[], tuple[str, ...]]) -> bool:
        """Look at what is there: whether the output is complete already. With `joining`, such an output is not in the way.

        Of any other, `replaced` tells the names of what goes; raises what that raises.
        """
        if self.join():
            return self.is_published()
        if joining and self.is_published():
            return True
        self.begun = replace(self.begun, replaces=replaced())
        return False

    def explained(self, error: Exception) -> Exception:
        if not isinstance(error, GoneError):
            return error
        return StoreError(
            f"{self.address}: its uploads were removed by something else, such as a rule of the bucket; remove "
            "what is left with --abort, then merge again"
        )

    def claim(self, parts: Sequence[FilePart]) -> None:  # noqa: ARG002 (a store has room for all)
        if not self.begin() and not self.join():
            raise StoreError(f"{self.home / BEGIN}: keeps disappearing; is another run using it?")
        self.ids = self.planned() or self.make_uploads()

    def begin(self) -> bool:
        """Say what is being made; False where that was said already."""
        there = uploads.uploads_of(self.place, self.begun.keys(self.place))
        self.begun = replace(self.begun, before=tuple(sorted(upload for _, upload in there)))
        return uploads.put_new(self.home / BEGIN, self.begun.to_bytes())

    def check(self, found: Begun) -> None:
        """Raise `UsageError` where what is being made is something else."""
        if found.command != self.command:
            raise UsageError(
                f"{self.address}: contains an unfinished {found.command}; run the command that began it again, remove it "
                "with --abort, or choose another OUT"
            )
        if found.plan != self.begun.plan:
            raise UsageError(
                f"{self.address}: contains an unfinished {found.command} of other inputs or options (its fingerprint is "
                f"{printable(found.plan[:16])}, this one's is {self.begun.plan[:16]}); finish that one, remove it with "
                "--abort, or choose another OUT"
            )
        if found.parts != self.begun.parts:
            raise UsageError(
                f"{self.address}: contains an unfinished {found.command} that was begun with another LORATOOL_S3_PARTS or release "
                "of loratool; finish it with that one, or remove it with --abort"
            )

    def planned(self) -> dict[str, str]:
        """The uploads that are planned; empty where nobody has planned them yet."""
        raw = uploads.get(self.home / PLAN)
        return read_plan(raw, self.begun.plan) if raw is not None else {}

    def make_uploads(self) -> dict[str, str]:
        """New uploads of all weight files, if no other worker is first."""
        own = dict(
            zip(
                self.begun.weights,
                each_of(lambda name: uploads.begin(self.place / name), self.begun.weights),
                strict=True,
            )
        )
        table = {HEAD: FORMAT, "plan": self.begun.plan, "uploads": own}
        if uploads.put_new(self.home / PLAN, (json.dumps(table) + "\n").encode()):
            return own
        for name, upload in own.items():
            uploads.abort(self.place / name, upload)
        if not (found := self.planned()):
            raise StoreError(f"{self.home / PLAN}: cannot be read; start again with --abort")
        return found

    def all_stored(self) -> dict[str, bytes]:
        names = [name for each in listed(self.home) if (name := each.removesuffix(".json")) in self.parts]
        return dict(zip(names, each_of(self.stored, names), strict=True))

    def stored(self, name: str) -> bytes:
        return uploads.get(self.home / f"{name}.json") or b""

    def put_new(self, name: str, record: bytes) -> bool:
        return uploads.put_new(self.home / f"{name}.json", record)

    def held(self, parts: Sequence[FilePart]) -> int:
        """Twice the largest piece: one that a worker fills, and one that another worker fills up."""
        sent = [part for each in parts if (part := self.parts[each.name]).source is None]
        return 2 * max((piece.size for part in sent for piece in part.pieces), default=0)

    def problems(
        self,
        parts: Sequence[FilePart],
        records: Mapping[str, PartRecord],
        progress: Progress | None = None,  # noqa: ARG002 (nothing is read)
    ) -> dict[str, str]:
        """What is wrong with some parts, by name.

        The store's own lists are looked at, and no bytes are read: it has checked those as they came. Raises `GoneError`
        where uploads are gone, and nobody is completing them.
        """
        names = sorted({part.file for part in parts})
        try:
            lists = each_of(lambda name: uploads.sent_parts(self.place / name, self.ids[name]), names)
        except GoneError:
            if uploads.head(self.home / FINISH) is None:
                raise
            return {}
        there: dict[str, dict[int, uploads.Sent]] = dict(zip(names, lists, strict=True))
        found = {p.name: why_unlike(self.parts[p.name], records[p.name], there[p.file]) for p in parts}
        return {name: reason for name, reason in found.items() if reason}

    def open(self, part: FilePart, stop: threading.Event) -> UploadedPart:
        return UploadedPart(self, self.send, self.parts[part.name], self.layouts[part.file], stop)

    def send(self, part: UploadPart, piece: Piece, content: mmap.mmap) -> str:
        """Bring a piece of a part to the store; its ETag."""
        return uploads.send(self.place / part.file, self.ids[part.file], piece.number, content)

    def make_alone(self, parts: Sequence[FilePart]) -> Sequence[FilePart]:
        """Make those of some parts that have no chunk: have the store copy them, or send what is not of any tensor."""
        each_of(self.make_plain, [self.parts[part.name] for part in parts if not part.chunks])
        return [part for part in parts if part.chunks]

    def make_plain(self, part: UploadPart) -> None:
        empty = Digest(part.size, tree=Tree.of_part(self.layouts[part.file], {}))
        if part.source is None:
            sink = self.open(part, threading.Event())
            sink.finish()
            sink.record(Seen(), empty)
            return
        tags, copies = [], []
        for piece in part.pieces:
            start = part.source_start + piece.start - part.start
            try:
                tag, md5 = uploads.copy(
                    self.place / part.file, self.ids[part.file], piece.number, part.source, start, start + piece.size
                )
            except ConditionError:
                raise changed(part.source) from None
            tags.append(tag)
            copies.append([piece.start, piece.stop, md5])
        self.record_part(part, empty, Seen(), {"tags": tags, "copies": copies})

    def forget(self, name: str) -> None:
        uploads.remove(self.home / f"{name}.json")

    @contextmanager
    def finishing(self) -> Iterator[Stage]:
        """Gives a stage on this disk; any number of processes may do the same."""
        with self.told():
            begun = self.join()
            self.ids = self.planned() if begun else {}
            if not begun or (self.begun.weights and not self.ids):
                raise VerificationError(f"{self.address}: no part of this merge has been made; run --part first")
            with tempfile.TemporaryDirectory(prefix="loratool-") as home, workplace(Path(home) / "merged") as stage:
                try:
                    yield stage
                finally:
                    for name in self.layouts:
                        stand_ins.standing.pop(os.fspath(stage.folder / name), None)

    def name_weights(self, stage: Stage, records: Mapping[str, PartRecord], read: bool) -> None:
        """Complete the uploads; with `read`, files of the stage stand for their objects."""
        self.check_sources()
        self.begin_naming(self.layouts)
        each_of(lambda name: self.complete(name, records), self.layouts)
        for name, layout in self.layouts.items() if read else ():
            tag, size = uploads.head(self.place / name) or ("", -1)
            path = stage.way_to(name)
            path.write_bytes(layout.header)
            os.truncate(path, layout.size)
            stand_ins.standing[os.fspath(path)] = StoredObject(self.place / name, size, tag, 0)

    def check_sources(self) -> None:
        """Raise `InputError` where an object that was copied from is no longer the one that was listed.

        Some stores copy from whatever is there.
        """
        for source in {part.source for part in self.parts.values() if part.source is not None}:
            if not any((uploads.head(source.place) or ("", 0))[0] == source.tag for _ in range(MOST_LOOKS)):
                raise changed(source)

    def begin_naming(self, first: Collection[str]) -> None:
        """Say that files get their names from here on; of a replaced output all go but those with names of the `first` ones."""
        uploads.put_new(self.home / FINISH, b"{}\n")
        gone = [name for name in self.begun.replaces if name not in first]
        for name in sorted(gone, key=lambda name: (name != PROVENANCE, not name.endswith(INDEX_SUFFIX))):
            uploads.remove(self.path(name))

    def complete(self, name: str, records: Mapping[str, PartRecord]) -> None:
        """Give a weight file its name."""
        tags = [tag for part in self.parts.values() if part.file == name for tag in tags_of(records[part.name])]
        uploads.complete(self.place / name, self.ids[name], tags, self.layouts[name].size)

    def publish(self, stage: Stage) -> None:
        self.put_files(stage.folder, [name for name in stage.files if name not in self.layouts])

    def put_files(self, folder: Path, names: Iterable[str]) -> None:
        """Put small files there, the index after the others, and the record last of all."""
        small = [name for name in names if name != PROVENANCE]
        for name in sorted(small, key=lambda name: (name.endswith(INDEX_SUFFIX), name)):
            uploads.put(self.path(name), (folder / name).read_bytes())
        record = self.path(PROVENANCE)
        if not uploads.put_new(record, (folder / PROVENANCE).read_bytes()) and not self.is_published():
            raise UsageError(f"{record}: was written by something else in the meantime")

    def clear(self) -> None:
        self.sweep()

    def sweep(self) -> list[str]:
        """Remove what only the making needed; what says that it has begun goes last.

        Gives the names of files that had uploads which no plan names.
        """
        strays = stray_uploads(self.place, self.begun)
        names = [name for name in listed(self.home) if is_ours(name) and name != BEGIN]
        each_of(lambda name: uploads.remove(self.home / name), names)
        uploads.remove(self.home / BEGIN)
        return strays

    def abort(self) -> tuple[Sequence[str], Sequence[str]]:
        """Give the output up; one that is complete stays."""
        complete, removed = self.is_published(), list[str]()
        if not complete and uploads.head(self.home / FINISH) is not None:
            names = sorted({*self.begun.weights, *self.begun.others, *self.begun.replaces})
            heads = each_of(lambda name: uploads.head(self.path(name)), names)
            removed = [name for name, head in zip(names, heads, strict=True) if head is not None]
            each_of(lambda name: uploads.remove(self.path(name)), removed)
        planned = self.planned()
        for name, upload in planned.items():
            uploads.abort(self.place / name, upload)
        ended = {*planned, *self.sweep()}
        return () if complete else sorted(ended), removed


def file_of(place: StorePath, single: str, name: str) -> StorePath:
    """The place of a file of an output, of which one of a single file has its record next to it."""
    return place / (f"{single}.{name}" if single and name == PROVENANCE else name)


def home_of(place: StorePath, single: str = "") -> StorePath:
    """Where those who work on an output below a prefix share what they do."""
    return place / FOLDER / single if single else place / FOLDER


def why_unlike(part: UploadPart, record: PartRecord, there: Mapping[int, uploads.Sent]) -> str:
    """Empty where a part is in the store as its record has it; else what is wrong."""
    sent = [there.get(piece.number) for piece in part.pieces]
    if None in sent or [each.size for each in sent if each] != [piece.size for piece in part.pieces]:
        return "is not in the store"
    return "" if [each.tag for each in sent if each] == tags_of(record) else "was sent again by another worker"


def each_of(call: Callable[[Any], Any], things: Iterable[Any]) -> list[Any]:
    """What `call` returns for each of some things, several at a time; where one raises, no other is left at work."""
    futures = [connection().pool.submit(call, each) for each in things]
    try:
        return [each.result() for each in futures]
    except Exception:
        for each in futures:
            each.cancel()
        wait(futures)
        raise


def changed(source: StoredObject) -> InputError:
    return InputError(f"{source.place}: the object changed while it was being read; start again")


def tags_of(record: PartRecord) -> list[str]:
    """The ETags of the pieces of a part, as its record has them."""
    tags = record.details.get("tags")
    return [str(tag) for tag in tags] if isinstance(tags, list) else []
