"""Who is at work on a stage that many workers write to: signs of life, for people and for `--finish`.

Nothing that must be right depends on them. Their age is told by the clock of the file system, which gave both times.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import UsageError, printable
from loratool.files.process import host_name, is_running
from loratool.files.staging import write_durably
from loratool.files.system import create_file, sync_folder
from loratool.files.untrusted import json_object

BEAT = 10.0  # seconds between two signs of life
SILENT = 60.0  # seconds without one after which a worker counts as dead
PREFIX, FINISH = "worker-", "finish-"


@dataclass(frozen=True)
class Worker:
    """A worker, as it said of itself."""

    host: str
    pid: int
    share: str  # of the work, such as 3/8; what it does where that is no share
    doing: tuple[str, ...]  # parts that are being made
    seconds: float  # since its last sign of life
    file: str = ""  # the name of its file

    @property
    def alive(self) -> bool:
        """Whether it seems to be running: it was heard of lately and, on this machine, its process is there."""
        return self.seconds < SILENT and not (self.host == host_name() and not is_running(self.pid))

    def __str__(self) -> str:
        return f"{self.host} process {self.pid}"


class Presence:
    """The signs of life of this process in a folder, from its beginning to its end."""

    def __init__(self, folder: Path, share: str) -> None:
        self.share, self.doing = share, set[str]()
        self.path = folder / f"{PREFIX}{os.urandom(16).hex()}.json"
        self.over, self.lock = threading.Event(), threading.Lock()

    @property
    def name(self) -> str:
        """Who this is."""
        return f"{host_name()} process {os.getpid()}"

    def __enter__(self) -> Presence:
        self.tell()
        threading.Thread(target=self.beat, name="loratool-presence", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        with self.lock, suppress(OSError):
            self.path.unlink()

    def beat(self) -> None:
        while not self.over.wait(BEAT):
            with suppress(OSError):
                os.utime(self.path)  # the time of the file system, not of this machine

    def begin(self, part: str) -> None:
        """A part is being made from now on."""
        self.doing.add(part)
        self.tell()

    def end(self, part: str) -> None:
        """A part is no longer being made."""
        self.doing.discard(part)
        self.tell()

    def tell(self) -> None:
        table = {"host": host_name(), "pid": os.getpid(), "share": self.share, "doing": sorted(self.doing)}
        with self.lock, suppress(OSError):  # a sign of life is worth no error
            if not self.over.is_set():
                write_whole(self.path, json.dumps(table).encode())


def write_whole(path: Path, content: bytes) -> None:
    """A small file, whole under its name at any time; it need not be there after a power cut."""
    draft = draft_of(path)
    try:
        with open(create_file(draft), "wb") as stream:
            stream.write(content)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def draft_of(path: Path) -> Path:
    """A name beside a file that no other process uses."""
    return path.with_name(f"{path.name}.{os.urandom(16).hex()}.new")


def workers_in(folder: Path) -> list[Worker]:
    """Everybody who gave a sign of life and has not said that it ended; those who were killed are among them."""
    found: list[Worker] = []
    try:
        paths = sorted(path for path in folder.iterdir() if path.name.startswith(PREFIX) and path.suffix == ".json")
        now = clock_of(folder) if paths else 0.0
    except OSError:
        return []
    for path in paths:
        with suppress(OSError, ValueError):
            age = max(0.0, now - path.stat().st_mtime)
            match json_object(path.read_bytes()):
                case {"host": str(host), "pid": int(pid), "share": str(share), "doing": list(doing)}:
                    if type(pid) is int and pid > 0 and all(isinstance(each, str) for each in doing):
                        found.append(Worker(host, pid, share, tuple(doing), age, path.name))
    return found


@contextmanager
def alone(folder: Path, presence: Presence) -> Iterator[Callable[[], None]]:
    """Be the only one who finishes an output; gives what raises `UsageError` once another one has taken over.

    Whoever has the file with the highest number is the one. It is taken over only from those who seem to be dead.

    Raises:
        UsageError: another process is finishing it.
    """
    while True:
        last = last_of(folder)
        refuse_if_alive(folder, last)
        own = folder / f"{FINISH}{number_of(last) + 1:06d}.json"
        if publish_new(own, json.dumps({"worker": presence.path.name}).encode()):
            break

    def check() -> None:
        if (last := last_of(folder)) != own:
            refuse_if_alive(folder, last)

    try:
        yield check
    finally:
        with suppress(OSError):
            own.unlink()


def last_of(folder: Path) -> Path | None:
    """The file of the process that finishes an output, or was the last to do so."""
    found = [path for path in folder.iterdir() if path.name.startswith(FINISH) and path.suffix == ".json"]
    return max(found, key=number_of, default=None)


def number_of(path: Path | None) -> int:
    """Its number; 0 where there is none."""
    digits = path.stem.removeprefix(FINISH) if path is not None else ""
    return int(digits) if digits.isdecimal() else 0


def refuse_if_alive(folder: Path, path: Path | None) -> None:
    """Raise `UsageError` where the process that a file names seems to be running; None names none."""
    with suppress(OSError, ValueError):
        name = json_object(path.read_bytes() if path else b"{}").get("worker")
        for worker in workers_in(folder):
            if worker.file == name and worker.alive:
                raise UsageError(
                    f"another --finish is running on this output ({printable(str(worker))}, last heard from "
                    f"{worker.seconds:.0f} s ago); if it was killed, run this one again in {SILENT:.0f} s"
                )


def put_new(draft: Path, path: Path) -> bool:
    """Give a file its name if nothing has it; False where something has. `draft` may stay or go.

    A link is made or not made in one step on every server; where there are no links, a rename takes its place.
    """
    try:
        os.link(draft, path)
    except FileExistsError:
        return draft.stat().st_nlink > 1  # a server may have made the link, and its answer was lost
    except FileNotFoundError:
        raise
    except OSError:
        if os.path.lexists(path):
            return False
        os.rename(draft, path)
    return True


def publish_new(path: Path, content: bytes) -> bool:
    """Give content a name if nothing has it, on stable storage when this returns; False where something has."""
    draft = draft_of(path)
    write_durably(draft, content, os.O_EXCL)
    try:
        return put_new(draft, path)
    finally:
        draft.unlink(missing_ok=True)
        sync_folder(path.parent)


def clock_of(folder: Path) -> float:
    """The time now, in seconds, as the file system of a folder has it."""
    probe = draft_of(folder / f"{PREFIX}0.json")
    os.close(create_file(probe))
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
