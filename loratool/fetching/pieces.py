"""Single files of a repository, brought to a folder of their own and held to the Hub's SHA-256."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from loratool.arguments import PathLike
from loratool.bases.opening import open_checkpoint
from loratool.errors import HubError, InputError, printable
from loratool.fetching import HubPath, local, place_of
from loratool.fetching.client import api, asking, is_offline, patiently
from loratool.fetching.downloading import root_of
from loratool.fetching.outline import Remote, look_up, needed, outlined, put_headers, read_range
from loratool.files.checkpoint import Checkpoint
from loratool.files.digests import sha256_of
from loratool.files.gguf import GgufFile, read_gguf
from loratool.files.pipelines import Member, itself
from loratool.files.safefile import SafeFile, read_safefile
from loratool.files.small_tensors import SmallTensors
from loratool.files.source import Source
from loratool.files.stand_ins import stand_in
from loratool.lazy import hub

MOST_TRIES = 3  # of a file that arrives damaged


class Whole:
    """A file of the Hub, alone in a folder of this disk for as long as anybody has it open."""

    def __init__(self, fetch: Callable[[], SafeFile]) -> None:
        self.fetch, self.lock, self.users = fetch, threading.Lock(), 0

    @contextmanager
    def open(self) -> Iterator[Source]:
        """Its bytes; who comes first brings it, and who leaves last takes it away."""
        with self.lock:
            if not self.users:
                self.file = self.fetch()
            self.users += 1
        try:
            with self.file.open() as source:
                yield source
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    shutil.rmtree(self.file.path.parent)


@dataclass(frozen=True)
class Shell(SafeFile):
    """A weight file of which only the header is here, until somebody reads more of it than small tensors."""

    is_own: ClassVar[bool] = False

    small: SmallTensors
    whole: Whole

    @contextmanager
    def open(self) -> Iterator[Source]:
        with ExitStack() as stack:
            yield stack.enter_context(self.whole.open()) if self.whole.users else Awaited(self, stack)

    def check_unchanged(self, source: Source | None = None) -> None:
        if not isinstance(source, Awaited):
            self.whole.file.check_unchanged(source)


@dataclass(frozen=True)
class ShellGguf(Shell, GgufFile):
    """The same of a GGUF file."""


class Awaited:
    """The bytes of a file that is not here: small tensors come by range requests, anything else brings the file."""

    def __init__(self, shell: Shell, stack: ExitStack) -> None:
        self.size, self.shell, self.stack, self.lock = shell.layout.size, shell, stack, threading.Lock()
        self.file: Source | None = None

    def read(self, start: int, count: int, into: memoryview) -> None:
        if self.file is not None or not self.shell.small.read(start, count, into):
            self.bring().read(start, count, into)

    def bring(self) -> Source:
        """The file, which stays here until nobody has it open."""
        with self.lock:
            if self.file is None:
                self.file = self.stack.enter_context(self.shell.whole.open())
            return self.file


def bring(source: Source) -> None:
    """Bring the file that a source is of, where it is not here."""
    if isinstance(source, Awaited):
        source.bring()


@dataclass(frozen=True)
class BaseFiles:
    """A base of which the files come one by one."""

    checkpoint: Checkpoint
    contents: Callable[[], list[str]]  # SHA-256 of each weight file, or what else the Hub tells of its content


@contextmanager
def opened(base: PathLike, home: Callable[[str], Path]) -> Iterator[BaseFiles]:
    """A base, its weights still where they are: on the Hub, or on this disk, where they are never dropped.

    `home` gives the folder into which a file of that name is fetched. Raises as `local` does.
    """
    place = place_of(base)
    if not isinstance(place, HubPath) or is_offline():
        checkpoint = open_checkpoint(local(base, "model"))
        yield BaseFiles(checkpoint, lambda: [content_of(shard) for shard in checkpoint.shards])
        return
    remote = look_up(place)
    with outlined(remote, place) as location:
        yield on_the_hub(remote, place, location, home)


def content_of(shard: SafeFile) -> str:
    """What tells the content of a weight file: its SHA-256, or what a store says of it."""
    there = stand_in(shard.path)
    return there.state if there else sha256_of(shard.path)


def on_the_hub(remote: Remote, place: HubPath, location: Path, home: Callable[[str], Path]) -> BaseFiles:
    """The base of an outline: headers, and the small files beside them, are really there."""
    root = root_of(location, place)
    names = needed(root, location, "model")
    for name in names.others:
        path = fetch_file(remote, name, root.parent)
        os.replace(path, root / name)
        path.parent.rmdir()
    put_headers(remote, root, names.weights)
    checkpoint = open_checkpoint(location)
    for name in names.weights:
        (root / name).unlink()  # a hole of the file's size: nobody shall count it as a file

    def fetch(shard: SafeFile) -> SafeFile:
        name = shard.path.relative_to(root).as_posix()
        path = fetch_file(remote, name, home(name))
        file = read_gguf(path) if isinstance(shard, GgufFile) else read_safefile(path)
        if file.layout.header != shard.layout.header:
            raise InputError(f"{printable(file.path)}: its header changed while it was being fetched; start again")
        return file

    def shell(file: SafeFile) -> SafeFile:
        seen = itself(file)
        kind = ShellGguf if isinstance(seen, GgufFile) else Shell
        small = SmallTensors(seen.layout, partial(read_range, remote, seen.path.relative_to(root).as_posix()))
        found = kind(seen.path, seen.layout, seen.identity, small, Whole(partial(fetch, seen)))
        return Member.of(found, file.prefix) if isinstance(file, Member) else found

    shells = tuple(map(shell, checkpoint.shards))
    told = [remote.files[shard.path.relative_to(root).as_posix()] for shard in shells]
    return BaseFiles(replace(checkpoint, shards=shells), lambda: [each.sha256 or each.blob for each in told])


def fetch_file(remote: Remote, name: str, home: Path) -> Path:
    """A file of a commit, alone in a new folder of `home`. Raises `HubError`."""
    api()  # which settles whether bars are shown
    for _ in range(MOST_TRIES):
        folder = home / os.urandom(16).hex()
        with asking(remote.repo, most=remote.files[name].size):
            found = patiently(partial(hub.hf_hub_download, remote.repo, name, revision=remote.commit, local_dir=folder))
        path = folder / "file" / Path(name).name
        path.parent.mkdir()
        os.replace(found, path)
        wanted = remote.files[name].sha256
        if not wanted or sha256_of(path) == wanted:
            target = home / f"{folder.name}-file"
            os.replace(path.parent, target)
            shutil.rmtree(folder)
            return target / path.name
        shutil.rmtree(folder)
    raise HubError(f"{remote.repo}: {printable(name)} was damaged in transfer {MOST_TRIES} times; try again later")
