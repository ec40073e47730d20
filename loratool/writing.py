"""One output file while it is written, hashed and brought to stable storage, all at the same time."""

from __future__ import annotations

import hashlib
import heapq
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.safefile import SafeFile, open_regular, read_exactly, write_fully

if TYPE_CHECKING:
    from loratool.planning import ShardPlan

HASH_CHUNK = 4 << 20
SYNC_CHUNK = 256 << 20  # bytes after which what was written is sent to the disk
send = getattr(os, "fdatasync", os.fsync)


class OutputShard:
    """One output file while it is being written, hashed and synced."""

    def __init__(self, plan: ShardPlan, folder: Path, stop: threading.Event) -> None:
        self.plan, self.stop = plan, stop
        path = folder / plan.name
        if path.parent != folder:  # never `folder` itself: a run that was stopped may have removed it
            path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        self.path = path
        self.descriptor = os.open(path, flags, 0o666)
        self.sources: dict[Path, tuple[SafeFile, int]] = {}
        self.changed = threading.Condition()
        self.ready = 0  # bytes from the file's start that are all written
        self.written = 0  # bytes written anywhere
        self.waiting: list[tuple[int, int]] = []  # written ranges beyond `ready`
        self.goals = {"ready": plan.layout.size, "written": plan.layout.size}  # what someone waits for
        os.truncate(self.descriptor, plan.layout.size)
        write_fully(self.descriptor, plan.layout.header, 0)
        self.wrote(0, plan.layout.data_start)

    def source(self, file: SafeFile) -> int:
        """A descriptor of an input of this shard, open until the shard is closed."""
        with self.changed:
            if file.path not in self.sources:
                descriptor = open_regular(file.path)
                self.sources[file.path] = (file, descriptor)
                file.check_unchanged(descriptor)
            return self.sources[file.path][1]

    def wrote(self, start: int, stop: int) -> None:
        with self.changed:
            heapq.heappush(self.waiting, (start, stop))
            while self.waiting and self.waiting[0][0] <= self.ready:
                self.ready = max(self.ready, heapq.heappop(self.waiting)[1])
            self.written += stop - start
            if self.ready >= self.goals["ready"] or self.written >= self.goals["written"]:
                self.changed.notify_all()

    def wait(self, what: str, amount: int) -> bool:
        """Until `ready` or `written` has come to `amount`; False when the merge is being stopped."""
        with self.changed:
            self.goals[what] = amount
            while getattr(self, what) < amount and not self.stop.is_set():
                self.changed.wait(0.2)
            self.goals[what] = self.plan.layout.size
            return not self.stop.is_set()

    def hash(self) -> str:
        """SHA-256 of the file, read back behind the workers; empty when stopped."""
        digest, at, size = hashlib.sha256(), 0, self.plan.layout.size
        buffer = memoryview(bytearray(min(HASH_CHUNK, size)))
        while at < size:
            piece = buffer[: size - at]
            if not self.wait("ready", at + len(piece)):
                return ""
            read_exactly(self.descriptor, piece, at, self.path)
            digest.update(piece)
            at += len(piece)
        return digest.hexdigest()

    def sync(self) -> None:
        """Send what was written to the disk while more is being written, and all of it in the end."""
        synced, size = 0, self.plan.layout.size
        while synced < size and self.wait("written", min(synced + SYNC_CHUNK, size)):
            synced = self.written
            send(self.descriptor)
        if synced >= size:
            os.fsync(self.descriptor)

    def close(self) -> None:
        for _, descriptor in self.sources.values():
            os.close(descriptor)
        os.close(self.descriptor)
