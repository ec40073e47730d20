"""Objects of a store: their listing, and ranges of their bytes, all of one state of each object."""

from __future__ import annotations

import hashlib
import mmap
import re
import threading
from dataclasses import dataclass, field
from typing import Any

from loratool.errors import InputError, UsageError
from loratool.files.safefile import Identity, Layout
from loratool.files.small_tensors import TINY, SmallTensors
from loratool.stores.client import THREADS, ConditionError, GoneError, PassingError, ask, connection, patiently
from loratool.stores.names import StorePath

PIECE = 4 << 20  # bytes of one request
AHEAD = 2 * PIECE  # bytes that are asked for together, where more are expected: each thread holds them
STEP = 256 << 10  # bytes that the client is asked for at a time, which it copies several times
MOST_OBJECTS = 100_000  # below one prefix
TAG = re.compile(r'"[\x21\x23-\x7e]{1,200}"')


@dataclass(frozen=True)
class StoredObject:
    """One object in the state in which it was listed."""

    place: StorePath
    size: int
    tag: str  # its ETag, with the quotes
    modified: int  # nanoseconds
    small: dict[str, SmallTensors] = field(default_factory=dict, repr=False, compare=False)  # kept as they arrive

    @property
    def identity(self) -> Identity:
        name = f"{self.place} {self.tag}".encode(errors="surrogatepass")
        number = int.from_bytes(hashlib.sha256(name).digest()[:7], "little")
        return Identity(0, number, self.size, self.modified)

    @property
    def ahead(self) -> int:
        return min(AHEAD, self.size)

    @property
    def state(self) -> str:
        return f"{self.size} {self.tag}"

    def source(self, layout: Layout | None = None) -> StoreSource:
        if layout is None:
            return StoreSource(self, None)
        if "" not in self.small:
            self.small[""] = SmallTensors(layout, self.read, TINY)
        return StoreSource(self, self.small[""])

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from byte `start` on."""
        found = bytearray(count)
        self.fill(start, memoryview(found))
        return bytes(found)

    def fill(self, start: int, into: memoryview) -> None:
        """Fill `into` from byte `start` on, by several requests at a time where it is large.

        Raises `InputError` where the object is no longer the one that was listed.
        """
        cuts = [(at, min(PIECE, len(into) - at)) for at in range(0, len(into), PIECE)]
        if len(cuts) <= 1 or threading.current_thread().name.startswith(THREADS):  # which wait for none of their own
            for at, count in cuts:
                self.ask(start + at, into[at : at + count])
        else:
            list(connection().pool.map(lambda cut: self.ask(start + cut[0], into[cut[0] : sum(cut)]), cuts))

    def ask(self, start: int, into: memoryview) -> None:
        """Fill `into` by one request."""
        client, stop = connection().client, start + len(into)

        def get() -> None:
            answer = client.get_object(
                Bucket=self.place.bucket, Key=self.place.key, Range=f"bytes={start}-{stop - 1}", IfMatch=self.tag
            )
            self.check(answer, start, stop)
            at = 0
            for piece in answer["Body"].iter_chunks(STEP):
                if at + len(piece) > len(into):
                    raise PassingError("more bytes than were asked for")
                into[at : at + len(piece)] = piece
                at += len(piece)
            if at < len(into):
                raise PassingError(f"{at} of {len(into)} bytes")

        try:
            patiently(self.place, get)
        except (ConditionError, GoneError):
            raise InputError(f"{self.place}: the object changed while it was being read; start again") from None

    def check(self, answer: Any, start: int, stop: int) -> None:
        """Raise `PassingError` unless an answer is about the bytes that were asked for, of the object that was listed."""
        if answer.get("ETag") != self.tag:
            raise PassingError(f"ETag {answer.get('ETag')} instead of {self.tag}")
        if answer.get("ContentRange") != f"bytes {start}-{stop - 1}/{self.size}":
            raise PassingError(f"Content-Range {answer.get('ContentRange')}")


class Window(threading.local):
    """What one thread expects to read next of an object, and what of it is here."""

    stop = 0  # of what is expected
    start = 0  # of `held`
    held = memoryview(b"")  # goes back to the system when it was read: a thread may have such a window of several files


class StoreSource:
    """The bytes of an object, as a `Source`: more than is asked for comes only of what is expected."""

    def __init__(self, there: StoredObject, small: SmallTensors | None) -> None:
        self.there, self.small, self.size, self.window = there, small, there.size, Window()

    def expect(self, start: int, count: int) -> None:
        self.window.stop, self.window.start, self.window.held = start + count, start, memoryview(b"")

    def read(self, start: int, count: int, into: memoryview) -> None:
        if start + count > self.size:
            raise InputError(f"{self.there.place}: the object ends early")
        window, into = self.window, into[:count]
        if window.start <= start < window.stop:
            while len(into) and start < window.stop:
                if not window.start <= start < window.start + len(window.held):
                    self.move_to(start, len(into))
                piece = window.held[start - window.start :][: len(into)]
                into[: len(piece)] = piece
                start, into = start + len(piece), into[len(piece) :]
            if start >= window.stop:
                window.held = memoryview(b"")
        if len(into) and not (self.small and self.small.read(start, len(into), into)):
            self.there.fill(start, into)

    def move_to(self, start: int, least: int) -> None:
        """Hold the next bytes that are expected, from byte `start` on."""
        window = self.window
        count = min(max(AHEAD, least), window.stop - start)
        window.held = memoryview(b"")
        held = memoryview(mmap.mmap(-1, count))
        self.there.fill(start, held)
        window.start, window.held = start, held


def listed(place: StorePath, beside: bool = False) -> dict[str, StoredObject]:
    """The objects below a place, by their names in it; with `beside` only those directly in it.

    Raises:
        UsageError: there are more than anybody reads.
        StoreError: as `ask` does.
    """
    found: dict[str, StoredObject] = {}
    words: dict[str, Any] = {"Prefix": place.prefix, **({"Delimiter": "/"} if beside else {})}
    while True:
        answer = ask("list_objects_v2", place, **words)
        for entry in answer.get("Contents", ()):
            key, tag = str(entry["Key"]), str(entry.get("ETag", ""))
            name = key[len(place.prefix) :]
            if key.startswith(place.prefix) and name and not name.endswith("/") and TAG.fullmatch(tag):
                modified = round(entry["LastModified"].timestamp() * 1e9)
                found[name] = StoredObject(StorePath(place.bucket, key), int(entry["Size"]), tag, modified)
        if len(found) > MOST_OBJECTS:
            raise UsageError(f"{place}: contains over {MOST_OBJECTS} objects; name a prefix inside it")
        if not answer.get("IsTruncated"):
            return found
        words["ContinuationToken"] = answer["NextContinuationToken"]
