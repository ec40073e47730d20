"""An output in a store while it is made: its uploads, and records of their parts, as any number of workers share them.

    OUT/.loratool/begin.json   what is being made, by whoever came first: all others compare
    OUT/.loratool/plan.json    the id of the upload of each weight file, created once
    OUT/.loratool/part-*.json  a record of each part that is in the store
    OUT/.loratool/finish.json  from here on files of the output get their names

Nothing of an upload can be seen under the name of its object before it is completed.
"""

from __future__ import annotations

import json
import mmap
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loratool.errors import InputError, StoreError, UsageError, printable
from loratool.files.digests import Digest, Tree
from loratool.files.inputs import LARGEST_RECORD, check_bound, json_object
from loratool.files.journal import Seen
from loratool.files.part_records import FilePart, PartRecord
from loratool.files.process import host_name
from loratool.files.safefile import Layout
from loratool.files.sink import Memory
from loratool.stores import uploads
from loratool.stores.client import ConditionError, ask, connection
from loratool.stores.names import StorePath
from loratool.stores.objects import StoredObject, listed
from loratool.stores.upload_part import Piece, UploadPart
from loratool.stores.uploading import UploadedPart

FOLDER = ".loratool"
FORMAT = 1
HEAD = "loratool_upload"
BEGIN, PLAN, FINISH = "begin.json", "plan.json", "finish.json"


@dataclass(frozen=True)
class Begun:
    """What is being made below a prefix."""

    plan: str  # the fingerprint of the merge
    parts: str  # digest of how files are cut, on which all workers must agree
    weights: tuple[str, ...]  # names of the files that are uploaded in parts
    others: tuple[str, ...]  # names of all other files
    replaces: tuple[str, ...] = ()  # names of what was there, and goes
    before: tuple[str, ...] = ()  # uploads of these files that were there already, and are somebody else's

    def to_bytes(self) -> bytes:
        table = {HEAD: FORMAT, **vars(self)}
        return (json.dumps(table, sort_keys=True) + "\n").encode()

    @classmethod
    def of_bytes(cls, raw: bytes) -> Begun | None:
        """What was stored; None for anything else."""
        try:
            table = json_object(raw)
        except (ValueError, InputError):
            return None
        names = [table.get(key) for key in ("weights", "others", "replaces", "before")]
        texts = [table.get(key) for key in ("plan", "parts")]
        lists = all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in names)
        if table.get(HEAD) != FORMAT or not lists or not all(isinstance(text, str) for text in texts):
            return None
        weights, others, replaces, before = (tuple(map(str, each or ())) for each in names)
        return cls(str(texts[0]), str(texts[1]), weights, others, replaces, before)

    def keys(self, place: StorePath) -> dict[str, str]:
        """The names of weight files by their keys."""
        return {(place / name).key: name for name in self.weights}


@dataclass
class Bucket:
    """The prefix of one output, as the place of its parts and records."""

    place: StorePath
    begun: Begun
    parts: Mapping[str, UploadPart]  # by name
    ids: dict[str, str] = field(default_factory=dict)  # file → its upload
    there: dict[str, dict[int, uploads.Sent]] = field(default_factory=dict)  # file → what was listed of its upload
    made: dict[str, PartRecord] = field(default_factory=dict)  # the records of all parts, once they were found right
    memory: Memory = field(default_factory=Memory)

    @property
    def home(self) -> StorePath:
        return self.place / FOLDER

    def claim(self) -> None:
        """Begin the output, or join those who are at work on it.

        Raises `UsageError` where they merge something else.
        """
        if not self.begin():
            found = read_begun(self.place)
            if found is None:
                raise StoreError(f"{self.home / BEGIN}: keeps disappearing; is another run using it?")
            self.check(found)
            self.begun = found
        self.ids = self.planned() or self.make_uploads()

    def begin(self) -> bool:
        """Say what is being made; False where that was said already."""
        there = uploads.uploads_of(self.place, self.begun.keys(self.place))
        self.begun = replace(self.begun, before=tuple(sorted(upload for _, upload in there)))
        return uploads.put_new(self.home / BEGIN, self.begun.to_bytes())

    def check(self, found: Begun) -> None:
        """Raise `UsageError` where what is being made is something else."""
        if found.plan != self.begun.plan:
            raise UsageError(
                f"{self.place}: contains an unfinished merge of other inputs or options (its fingerprint is "
                f"{printable(found.plan[:16])}, this one's is {self.begun.plan[:16]}); finish that one, remove it with "
                "--abort, or choose another OUT"
            )
        if found.parts != self.begun.parts:
            raise UsageError(
                f"{self.place}: contains an unfinished merge that was begun with another LORATOOL_S3_PARTS or release "
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

    def records(self) -> dict[str, PartRecord]:
        """Every record that is published, by its part's name; what is no record of ours is passed over."""
        names = [name.removesuffix(".json") for name in listed(self.home)]
        wanted = [name for name in names if name in self.parts]
        raw = each_of(lambda name: uploads.get(self.home / f"{name}.json"), wanted)
        found = {
            name: record for name, each in zip(wanted, raw, strict=True) if (record := PartRecord.of_bytes(each or b""))
        }
        return {name: record for name, record in found.items() if record.is_of(self.parts[name], self.begun.plan)}

    def look(self) -> None:
        """List what the store has of each upload."""
        self.there = dict(
            zip(
                self.ids,
                each_of(lambda name: uploads.sent_parts(self.place / name, self.ids[name]), self.ids),
                strict=True,
            )
        )

    def problem(self, part: FilePart, record: PartRecord, layout: Layout) -> str:  # noqa: ARG002
        """Empty where a part is in the store as its record has it; else what is wrong.

        The store's own list is looked at, and no bytes are read: it has checked those as they came.
        """
        upload = self.parts[part.name]
        there = self.there.get(part.file, {})
        sent = [there.get(piece.number) for piece in upload.pieces]
        if None in sent or [each.size for each in sent if each] != [piece.size for piece in upload.pieces]:
            return "is not in the store"
        return "" if [each.tag for each in sent if each] == tags_of(record) else "was sent again by another worker"

    def open(self, part: FilePart, layout: Layout, stop: threading.Event) -> UploadedPart:
        return UploadedPart(self, self.parts[part.name], layout, stop)

    def send(self, part: UploadPart, piece: Piece, content: mmap.mmap) -> str:
        """Bring a piece of a part to the store; its ETag."""
        return uploads.send(self.place / part.file, self.ids[part.file], piece.number, content)

    def make_plain(self, part: UploadPart, layout: Layout) -> None:
        """Make a part with nothing to compute: have the store copy it, or send what is not of any tensor."""
        empty = Digest(part.size, tree=Tree.of_part(layout, {}))
        if part.source is None:
            sink = self.open(part, layout, threading.Event())
            sink.finish()
            sink.record(Seen(changed=False), empty)
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
        self.publish(part, empty, Seen(changed=False), {"tags": tags, "copies": copies})

    def publish(self, part: UploadPart, digest: Digest, seen: Seen, details: Mapping[str, Any]) -> None:
        """Make a record known. One that another worker has published first stands, if it can be read."""
        record = PartRecord(part.name, self.begun.plan, digest, seen, host_name(), details)
        place = self.home / f"{part.name}.json"
        if not uploads.put_new(place, record.to_bytes()):
            theirs = PartRecord.of_bytes(uploads.get(place) or b"")
            if theirs is None or not theirs.is_of(part, self.begun.plan):
                uploads.put(place, record.to_bytes())

    def forget(self, name: str) -> None:
        """Withdraw a record that was found to be wrong."""
        uploads.remove(self.home / f"{name}.json")

    def complete(self, name: str, size: int) -> None:
        """Give a weight file its name."""
        tags = [tag for part in self.parts.values() if part.file == name for tag in tags_of(self.made[part.name])]
        uploads.complete(self.place / name, self.ids[name], tags, size)

    def clear(self) -> list[str]:
        """Remove what only the making needed; what says that it has begun goes last.

        Gives the names of files that had uploads which no plan names.
        """
        strays = stray_uploads(self.place, self.begun)
        names = [name for name in listed(self.home) if is_ours(name) and name != BEGIN]
        each_of(lambda name: uploads.remove(self.home / name), names)
        uploads.remove(self.home / BEGIN)
        return strays


def each_of(call: Callable[[Any], Any], things: Iterable[Any]) -> list[Any]:
    """What `call` returns for each of some things, several at a time."""
    return list(connection().pool.map(call, list(things)))


def changed(source: StoredObject) -> InputError:
    return InputError(f"{source.place}: the object changed while it was being read; start again")


def tags_of(record: PartRecord) -> list[str]:
    """The ETags of the pieces of a part, as its record has them."""
    tags = record.details.get("tags")
    return [str(tag) for tag in tags] if isinstance(tags, list) else []


def is_ours(name: str) -> bool:
    """Whether a name in the folder of an output that is made is one that is used here."""
    return name in (BEGIN, PLAN, FINISH) or (name.startswith("part-") and name.endswith(".json") and "/" not in name)


def read_begun(place: StorePath) -> Begun | None:
    """What is being made at a place; None where nothing is.

    Raises `UsageError` where what says so cannot be read.
    """
    raw = uploads.get(place / FOLDER / BEGIN)
    if raw is None:
        return None
    check_bound(str(place / FOLDER / BEGIN), len(raw), LARGEST_RECORD)
    if (found := Begun.of_bytes(raw)) is None:
        raise UsageError(f"{place / FOLDER / BEGIN}: not written by this release of loratool; choose another OUT")
    return found


def read_plan(raw: bytes, plan: str) -> dict[str, str]:
    """The uploads of a plan; empty where it is of another one, or cannot be read."""
    try:
        table = json_object(raw)
    except (ValueError, InputError):
        return {}
    found = table.get("uploads")
    if table.get("plan") != plan or not isinstance(found, dict):
        return {}
    return {str(name): str(upload) for name, upload in found.items()}


def stray_uploads(place: StorePath, begun: Begun) -> list[str]:
    """End the uploads of the output's files, but those that were there before it was begun; the names of the files.

    Workers that came at the same time have begun some that no plan names.
    """
    keys = begun.keys(place)
    found = [(at, upload) for at, upload in uploads.uploads_of(place, keys) if upload not in begun.before]
    for at, upload in found:
        uploads.abort(at, upload)
    return sorted({keys[at.key] for at, _ in found})


def remove_all(place: StorePath, names: Iterable[str]) -> None:
    """Delete objects below a place, a few at a time."""
    each_of(lambda name: ask("delete_object", place, Key=(place / name).key), names)
