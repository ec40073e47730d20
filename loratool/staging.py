"""The output folder: staged beside its final name, made durable, then renamed.

    OUT.partial/            locked for the length of the run
        journal             the plan's fingerprint, then a line for each finished shard
        model/              becomes OUT in one rename

Whatever happens, OUT is absent, as it was, or complete. A journal of the same plan is continued;
one of another plan is cleared away.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.digests import Digest, Digester, digest_of, digest_of_bytes, parts_of
from loratool.errors import StorageError, UsageError, printable
from loratool.safefile import write_fully

JOURNAL = "journal"
MODEL = "model"
REPLACED = "replaced"  # the old output, whole, where names cannot be exchanged
DISCARDED = "discarded"  # the same on its way out: half of it must never come back
PUBLISHED = "published"  # the journal's word once nothing in the stage is worth keeping
LEFT_BY_OTHERS = "is there, and was not made by loratool; move it away"


@dataclass(frozen=True)
class FinishedShard:
    """An output file that is complete and on stable storage."""

    name: str
    digest: Digest
    changed: bool  # whether any weight, here or in a file before, differs from the base's

    @property
    def size(self) -> int:
        """Bytes."""
        return self.digest.size

    def record(self) -> dict[str, Any]:
        """The shard's line of a journal."""
        return {"name": self.name, **self.digest.record(), "changed": self.changed}


@dataclass
class Stage:
    """A folder that will become `out`."""

    out: Path
    home: Path  # OUT.partial
    finished: dict[str, FinishedShard] = field(default_factory=dict)
    files: dict[str, Digest] = field(default_factory=dict)  # every file of the output so far
    published: bool = False  # or about to be

    @property
    def folder(self) -> Path:
        return self.home / MODEL

    def record(self, shard: FinishedShard) -> None:
        """Note a shard whose bytes are on stable storage already."""
        line = f"\n{json.dumps(shard.record())}\n"  # on a line of its own, even after one that a kill tore
        write_durably(self.home / JOURNAL, line.encode(), append=True)
        self.keep(shard)

    def keep(self, shard: FinishedShard) -> None:
        """Count a shard that is there and recorded as part of the output."""
        self.finished[shard.name] = shard
        self.files[shard.name] = shard.digest

    def write(self, name: str, content: bytes) -> None:
        """A small file of the output."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, content)
        self.files[name] = digest_of_bytes(content)

    def copy(self, name: str, source: Path) -> None:
        """A side file of an input, byte for byte."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digester = Digester()
        writing = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            for part in parts_of(source):
                write_fully(writing, part, digester.size)
                digester.update(part)
            os.fsync(writing)
        finally:
            os.close(writing)
        self.files[name] = digester.digest()

    def add(self, name: str) -> None:
        """Count a file that was written by other means, and is complete, as part of the output."""
        self.files[name] = digest_of(self.folder / name)

    def drop_unfinished(self) -> None:
        """Remove every file that the journal does not vouch for."""
        for path in [p for p in self.folder.rglob("*") if not p.is_dir()]:
            if path.relative_to(self.folder).as_posix() not in self.finished:
                path.unlink()

    def publish(self, overwrite: bool) -> None:
        """Give the folder its final name, in one step."""
        for folder in [p for p in self.folder.rglob("*") if p.is_dir()]:
            sync_folder(folder)
        sync_folder(self.folder)
        if os.path.lexists(self.out):
            if not overwrite:
                raise StorageError(f"{printable(self.out)}: appeared during the merge; it is left as it is")
            # once swapped, the stage holds the old model: nothing in it may pass for a finished shard
            write_durably(self.home / JOURNAL, json.dumps({"plan": PUBLISHED}).encode())
            self.published = True
            exchange(self.folder, self.out, self.home / REPLACED)
        else:
            os.rename(self.folder, self.out)
        sync_folder(self.out.parent)

    def restore(self) -> None:
        """Give the old output its name back, where a run ended between its two renames; else let it go."""
        if (self.home / REPLACED).exists():
            os.rename(self.home / REPLACED, self.home / DISCARDED if os.path.lexists(self.out) else self.out)

    def remove(self) -> None:
        """Clear the stage away; the journal goes last, so that a torn removal is still known as ours."""
        with suppress(OSError):
            self.restore()
        if not os.path.lexists(self.out) and (self.home / REPLACED).exists():
            return  # the old output is kept for the next run
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            for path in self.home.iterdir():
                if path.name != JOURNAL:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            (self.home / JOURNAL).unlink(missing_ok=True)
            self.home.rmdir()


def check_target(out: Path, inputs: Sequence[Path], overwrite: bool, adapter: bool = False) -> Path:
    """`out` as it will be written, after every check that can be made before any work.

    What will be an `adapter` replaces nothing but adapters.

    Raises:
        UsageError: it exists and `overwrite` is not given, or it is, holds or lies in an input.
        StorageError: its parent is missing or cannot be written.
    """
    shown = printable(out)
    if out.suffix == ".safetensors":
        raise UsageError(f"{shown}: OUT is a folder; {printable(out.with_suffix(''))} would do")
    try:
        out = Path(os.path.realpath(out))
        if not stat.S_ISDIR(out.parent.stat().st_mode):
            raise StorageError(f"{shown}: {printable(out.parent)} is no folder")
    except OSError as error:
        raise StorageError(f"{shown}: {error.strerror}: {printable(out.parent)}") from error
    for path in (each for given in inputs for each in (given, *links_in(given))):
        if inside(out, path) or inside(path, out) or inside(path, stage_of(out)):
            raise UsageError(
                f"{shown}: is, holds or lies inside the input {printable(path)}, which is never written to"
            )
    if os.path.lexists(out):
        if not out.is_dir():
            raise UsageError(f"{shown}: is there and is no folder")
        if not overwrite:
            raise UsageError(f"{shown}: is there already; give --overwrite to replace it")
        if not looks_like_a_model(out):
            raise UsageError(f"{shown}: holds no model, so --overwrite does not replace it; remove it yourself")
        if adapter and not looks_like_an_adapter(out):
            raise UsageError(f"{shown}: is no adapter, so --overwrite does not replace it by one; remove it yourself")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{shown}: the folder {printable(out.parent)} cannot be written to")
    return out


def links_in(folder: Path) -> list[Path]:
    """The real files that links in an input's folder lead to, which are inputs too."""
    try:
        return [Path(os.path.realpath(entry.path)) for entry in os.scandir(folder) if entry.is_symlink()]
    except OSError:
        return []  # no folder; who reads it says so


def stage_of(out: Path) -> Path:
    """The folder in which `out` is staged."""
    return out.parent / f"{out.name}.partial"  # with_name refuses the root


def inside(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder`, or lies in it, whatever the links on the way."""
    try:
        wanted = folder.stat()
    except OSError:
        return False
    for place in (path, *Path(os.path.realpath(path)).parents):
        with suppress(OSError):
            if os.path.samestat(place.stat(), wanted):
                return True
    return False


def looks_like_a_model(folder: Path) -> bool:
    names = [entry.name for entry in os.scandir(folder)]
    return not names or any(n.endswith(".safetensors") or n in ("config.json", "loratool.json") for n in names)


def looks_like_an_adapter(folder: Path) -> bool:
    names = [entry.name for entry in os.scandir(folder)]
    return not names or ("adapter_config.json" in names and "config.json" not in names)


@contextmanager
def staged(out: Path, fingerprint: str, needed: int, overwrite: bool) -> Iterator[Stage]:
    """A stage for `out`, published when the block ends well.

    An interrupt keeps the finished shards for the next run of the same plan; any other failure
    leaves nothing. `needed` is the size of the whole output in bytes.
    """
    stage = Stage(out, stage_of(out))
    try:
        with locked(stage.home):
            check_owner(stage.home)
            try:
                open_stage(stage, fingerprint)
                check_space(stage.home, needed - sum(shard.size for shard in stage.finished.values()))
                yield stage
                stage.publish(overwrite)
            except KeyboardInterrupt:
                if stage.finished and not stage.published and stage.folder.is_dir():
                    stage.drop_unfinished()
                else:
                    stage.remove()
                raise
            except BaseException:
                stage.remove()
                raise
            stage.remove()
    except OSError as error:
        raise storage_error(error, out, needed) from error


def sweep(out: Path) -> None:
    """Clear away what a run left that was killed as it published `out`, or after it had."""
    home = stage_of(out)
    if not (home / JOURNAL).is_file():
        return
    with suppress(OSError, UsageError), locked(home):
        Stage(out, home).restore()
        if not os.path.lexists(out):
            return
        lines = read_journal(home / JOURNAL)
        if not (home / MODEL).exists() or (lines and lines[0].get("plan") == PUBLISHED):
            Stage(out, home).remove()


def storage_error(error: OSError, path: Path, needed: int) -> StorageError:
    """The sentence for an `OSError` met while writing."""
    where = printable(error.filename) if error.filename else printable(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return StorageError(f"{where}: the disk is full: the output needs {needed} bytes, {free} are free")
    return StorageError(f"{where}: {error.strerror or error}")


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Create `home` and hold its lock, which ends with the process however it ends."""
    for _ in range(100):
        with suppress(FileExistsError):
            os.mkdir(home)
        try:
            descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another run published it just now
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise UsageError(f"{printable(home)}: {LEFT_BY_OTHERS}") from error
            raise
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{printable(home)}: another run is writing this output; wait for it to end") from None
            except OSError as error:  # a file system without locks: go on without
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL):
                    raise
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(home)):
                    yield
                    return
        finally:
            os.close(descriptor)
    raise StorageError(f"{printable(home)}: keeps vanishing; is another run at work on it?")


def check_owner(home: Path) -> None:
    """Refuse a folder that merely has the stage's name."""
    names = {entry.name for entry in os.scandir(home)}
    if names and JOURNAL not in names:
        raise UsageError(f"{printable(home)}: {LEFT_BY_OTHERS}")


def open_stage(stage: Stage, fingerprint: str) -> None:
    """Continue what a run of the same plan left, else begin afresh."""
    journal = stage.home / JOURNAL
    lines = read_journal(journal) if journal.exists() else []
    if lines and lines[0].get("plan") == fingerprint and stage.folder.is_dir():
        for line in lines[1:]:
            digest = Digest.of_record(line)
            if digest is None:
                continue
            path = stage.folder / line["name"]
            if path.is_file() and path.stat().st_size == digest.size:
                stage.keep(FinishedShard(line["name"], digest, line["changed"]))
        stage.drop_unfinished()
        return
    stage.restore()
    for path in stage.home.iterdir():
        if path.name != JOURNAL:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_durably(journal, (json.dumps({"plan": fingerprint}) + "\n").encode())
    os.mkdir(stage.folder)
    sync_folder(stage.home)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The journal's lines, without those that a kill tore."""
    lines: list[dict[str, Any]] = []
    for raw in path.read_bytes().splitlines():
        with suppress(ValueError):
            lines.append(json.loads(raw))
    return lines


def check_space(home: Path, needed: int) -> None:
    free = shutil.disk_usage(home).free
    if free < needed:
        raise StorageError(
            f"{printable(home)}: the output needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free"
        )


def write_durably(path: Path, content: bytes, append: bool = False) -> None:
    """Write a small file; it is on stable storage when this returns."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if append else os.O_TRUNC)
    descriptor = os.open(path, flags, 0o666)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


RENAME_EXCHANGE = 2
AT_FDCWD = -100


def exchange(new: Path, old: Path, aside: Path) -> None:
    """Swap two folders' names in one step where the system can; else the old one steps `aside` first."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        failed = renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE)
        if not failed:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))
    os.rename(old, aside)
    os.rename(new, old)
