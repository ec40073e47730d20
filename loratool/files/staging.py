"""The output folder: staged beside its final name, made durable, then renamed.

    OUT.partial/            locked for the length of the run
        journal             what is being made, and a line for each finished weight file
        model/              becomes OUT in one rename

Whatever happens, OUT is absent, as it was, or complete. A journal of the same work is continued; one of other work is
cleared away. What no journal names is never touched. Packages for atomic writes know single files alone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.arguments import PathLike
from loratool.errors import ANOTHER_OUT, LoratoolError, StorageError, UsageError, printable
from loratool.files.digests import (
    Digest,
    Finder,
    digest_of,
    digest_of_bytes,
    nowhere,
    parts_of,
    sha256_of,
    unproven,
    why_unlike,
)
from loratool.files.folders import PROVENANCE, sidecar_of
from loratool.files.journal import (
    DISCARDED,
    FETCHED,
    JOURNAL,
    MODEL,
    NEW_JOURNAL,
    PROBE,
    REPLACED,
    FinishedShard,
    ForeignError,
    Journal,
    check_owned,
    foreign,
    look,
    walk,
)
from loratool.files.locks import lock_folder
from loratool.files.names import LONGEST, check_names, check_output_name
from loratool.files.outputs import BUSY, check_stage, is_spent, record_at, replaceable_files, stage_of
from loratool.files.safefile import write_fully
from loratool.files.system import (
    closing,
    create_file,
    current_user,
    exchange,
    free_space,
    open_file,
    sync_file,
    sync_folder,
)
from loratool.shown import size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loratool.files.model_files import FileNames


@dataclass
class Stage:
    """A folder that will become `out`."""

    out: Path
    home: Path  # OUT.partial
    journal: Journal
    finished: dict[str, FinishedShard] = field(default_factory=dict)  # of an earlier run and of this one
    files: dict[str, Digest] = field(default_factory=dict)  # every file of the output so far
    redone: dict[str, str] = field(default_factory=dict)  # finished by an earlier run, and why it is made again
    find: Finder = nowhere  # of the inputs that finished shards may refer to
    single: str = ""  # the file of it that is published as `out`, its record with it

    @property
    def folder(self) -> Path:
        return self.home / MODEL

    def note(self, key: str, value: object) -> None:
        """Add a line to the journal, on stable storage when this returns."""
        line = {key: value}
        # on a line of its own, even after one that a kill tore
        write_durably(self.home / JOURNAL, f"\n{json.dumps(line)}\n".encode(), os.O_APPEND)
        self.journal.take(line)

    def expect(self, names: Sequence[str]) -> None:
        """Note the names of files before the first of them is made: what the journal does not name is not ours."""
        if new := sorted({*names} - self.journal.files):
            self.note("files", new)
            self.check_names(new)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise `StorageError` where the file system cannot hold files of these names, before they are made."""
        check_names(self.home / PROBE, names, self.journal.files)

    def record(self, shard: FinishedShard) -> None:
        """Note a shard whose bytes are on stable storage already."""
        self.note("finished", shard.record())
        self.keep(shard)

    def keep(self, shard: FinishedShard) -> None:
        """Count a shard that is there and recorded as part of the output."""
        self.finished[shard.name] = shard
        self.files[shard.name] = shard.digest

    def write(self, name: str, content: bytes) -> None:
        """A small file of the output, in place of one that was written before."""
        path = self.way_to(name)
        if name in self.files:
            path.unlink()
        write_durably(path, content, os.O_EXCL)
        self.files[name] = digest_of_bytes(content)

    def copy(self, name: str, source: Path) -> None:
        """A side file of an input, byte for byte."""
        state, done = hashlib.sha256(), 0
        with closing(create_file(self.way_to(name))) as writing:
            for part in parts_of(source):
                write_fully(writing, part, done)
                state.update(part)
                done += len(part)
            sync_file(writing)
        self.files[name] = Digest(done, state.hexdigest())

    def way_to(self, name: str) -> Path:
        """Where a file of the output goes; the folders on the way to it are made."""
        self.expect([name])
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(self, name: str) -> None:
        """Count a file that was written by other means, and is complete, as part of the output."""
        self.files[name] = digest_of(self.folder / name)

    def place_for(self, name: str) -> Path:
        """The folder into which a file of the Hub is fetched, in a folder of its own."""
        if name not in self.journal.fetches:
            self.note("fetches", [name])
        (self.home / FETCHED).mkdir(exist_ok=True)
        return self.home / FETCHED

    def begin(self, found: Journal | None) -> None:
        """Make an empty stage of what `found` describes, or of nothing."""
        wanted, self.journal = self.journal, found or self.journal
        self.restore()
        self.clear()
        self.journal = wanted
        write_durably(self.home / NEW_JOURNAL, wanted.head(), os.O_TRUNC)
        os.replace(self.home / NEW_JOURNAL, self.home / JOURNAL)
        os.mkdir(self.folder)
        self.check_names(sorted(wanted.files))
        sync_folder(self.home)

    def go_on(self, found: Journal) -> None:
        """Keep the finished shards that still hold what was written; nothing else is kept."""
        wanted, self.journal = self.journal, found
        for name, shard in found.finished.items():
            try:
                reason = why_unlike(self.folder / name, shard.digest, self.find)
                if unproven(shard.digest, self.find):
                    reason = reason or "can no longer be compared with its base"
            except (LoratoolError, OSError) as error:  # a disk with a bad block, say
                reason = f"cannot be read: {error}"
            if reason:
                self.redone[name] = reason
            else:
                self.keep(shard)
        self.drop_unfinished()
        self.expect(sorted(wanted.files))

    def keep_only(self, device: str) -> None:
        """Let go of finished shards that were computed on another kind of device, whose last bits may differ."""
        for shard in list(self.finished.values()):
            if shard.seen.device not in ("", device):
                self.redone[shard.name] = f"was computed on {shard.seen.device}"
                del self.finished[shard.name], self.files[shard.name]
        self.drop_unfinished()

    def keep_sha256(self, wanted: bool) -> None:
        """Give finished shards the SHA-256 of the whole file, or take it away, as this run records it."""
        for shard in list(self.finished.values()):
            sha256 = (shard.digest.sha256 or sha256_of(self.folder / shard.name)) if wanted else ""
            self.keep(replace(shard, digest=replace(shard.digest, sha256=sha256)))

    def drop_unfinished(self) -> None:
        """Remove every file of the output that is not finished."""
        self.clear(but={f"{MODEL}/{name}" for name in self.finished} | {MODEL, NEW_JOURNAL})

    def clear(self, but: set[str] | frozenset[str] = frozenset()) -> None:
        """Remove all that is ours `but` some files; the journal stays, and so does whatever it does not name."""
        for path, status in reversed(list(walk(self.home))):
            if path in but or path == JOURNAL:
                continue
            if not stat.S_ISDIR(status.st_mode):
                if self.journal.owns(path):
                    (self.home / path).unlink(missing_ok=True)
            elif self.journal.owns_folder(path):
                remove_folder(self.home / path)

    def publish(self, replaced: FileNames | None) -> None:
        """Give the folder its final name, in one step."""
        for path, status in walk(self.folder):
            if stat.S_ISDIR(status.st_mode):
                sync_folder(self.folder / path)
        sync_folder(self.folder)
        check_owned(
            self.home, self.journal, walk(self.home), self.home.stat().st_uid
        )  # what others put into it meanwhile is not published
        there = os.path.lexists(self.out)
        if there and replaced is None:
            raise UsageError(
                f"{printable(self.out)}: was created by something else in the meantime, and is left unchanged"
            )
        self.note("becomes", (self.folder / self.single).stat().st_ino)
        if self.single:
            os.replace(self.folder / self.single, self.out)
            if (self.folder / PROVENANCE).is_file():
                os.replace(self.folder / PROVENANCE, sidecar_of(self.out))
            elif replaced is not None and record_at(sidecar_of(self.out)):  # of the file that was replaced
                sidecar_of(self.out).unlink()
        elif there and replaced is not None:
            # once swapped, the stage holds the old output: nothing in it may pass for a finished shard
            self.note("replaces", replaceable_files(self.out, printable(self.out), replaced))
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
        with suppress(OSError):
            self.clear()
            (self.home / JOURNAL).unlink(missing_ok=True)
            self.home.rmdir()


@contextmanager
def staged(
    out: Path, wanted: Journal, needed: int, replaced: FileNames | None, find: Finder = nowhere, single: str = ""
) -> Iterator[Stage]:
    """A stage for `out`, published when the block ends well.

    An interrupt keeps the finished shards for the next run of the same work; any other failure leaves nothing of ours.

    Args:
        out: the output folder.
        wanted: what is to be made: its fingerprint, its inputs, and as many of its files as are known.
        needed: bytes of the whole output.
        replaced: the files of what is at `out` and goes, by name; None where nothing may be there.
        find: tells the inputs that finished shards may refer to.
        single: the file of the stage that is published as `out`, where that is a file; its record goes beside it.

    Raises:
        UsageError: another run is at work on it.
        StorageError: the disk or the file system said no, or the stage holds what is not ours.
    """
    home = stage_of(out)
    refuse_parts(home)
    try:
        check_output_name(out)
        check_space(out.parent, needed - kept_size(check_stage(home), wanted))
        with locked(home) as found:
            stage = Stage(out, home, wanted, find=find, single=single)
            try:
                if found is not None and continues(found, wanted) and stage.folder.is_dir():
                    stage.go_on(found)
                else:
                    stage.begin(found)
                yield stage
                stage.publish(replaced)
            except (KeyboardInterrupt, ForeignError):
                if stage.finished and stage.journal.replaces is None and stage.folder.is_dir():
                    with suppress(PermissionError):  # a file that a thread still has open goes with the next run
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


@contextmanager
def workplace(home: Path) -> Iterator[Stage]:
    """A stage of which nothing is published or kept: empty to begin with, and gone at the end.

    Raises as `staged` does.
    """
    try:
        check_stage(home)
        with locked(home) as found:
            stage = Stage(home, home, Journal(plan=home.name))
            try:
                stage.begin(found)
                yield stage
            finally:
                stage.remove()
    except OSError as error:
        raise storage_error(error, home, 0) from error


@contextmanager
def clearing_spent(out: PathLike, dry_run: bool = False) -> Iterator[None]:
    """Call `clear_spent` where the block refuses the output; a dry run changes nothing."""
    try:
        yield
    except UsageError:
        if not dry_run:
            clear_spent(out)
        raise


def clear_spent(out: PathLike) -> None:
    """Remove the stage of an output in which a run left nothing but what it had replaced, when it was ended at its end."""
    out = Path(os.path.realpath(out))
    home = stage_of(out)
    with suppress(OSError, LoratoolError):  # somebody else is at work in it, or has put something there
        if is_spent(out):
            with locked(home) as found:
                if is_spent(out):
                    Stage(home, home, found or Journal("")).remove()


def refuse_parts(home: Path) -> None:
    """Raise `UsageError` where a stage is being written in parts, by workers who hold no lock."""
    found = check_stage(home)
    if found is not None and found.parts is not None:
        raise UsageError(
            f"{printable(home)}: contains a merge in parts, which workers may still be writing; complete it with "
            "--finish, or "
            "remove it with --abort",
            hint="--finish",
        )


def continues(found: Journal, wanted: Journal) -> bool:
    """Whether the finished files of a journal are files of the same work, of inputs that nobody touched since."""
    return found.plan == wanted.plan and found.inputs == wanted.inputs and found.replaces is None


def kept_size(found: Journal | None, wanted: Journal) -> int:
    """Bytes of the output that are there already, as a journal says."""
    if found is None or not continues(found, wanted):
        return 0
    return sum(shard.size for shard in found.finished.values())


def storage_error(error: OSError, path: Path, needed: int) -> StorageError:
    """The sentence for an `OSError` met while writing."""
    where = printable(error.filename) if error.filename else printable(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = free_space(path.parent)
        left = "" if free is None else f", and {size(free)} is free"
        return StorageError(f"{where}: the disk is full: the output needs {size(needed)}{left}")
    length = len(str(error.filename or path))
    too_long = f" (the path has {length} characters; a shorter OUT may work)" if length >= LONGEST else ""
    return StorageError(f"{where}: {error.strerror or error}{too_long}")


@contextmanager
def locked(home: Path) -> Iterator[Journal | None]:
    """Create `home` and hold its lock, which ends with the process however it ends; gives the journal in it."""
    owner = current_user()
    for _ in range(100):
        with suppress(FileExistsError):
            os.mkdir(home)
            owner = home.stat().st_uid  # some file systems give all files to one user
        try:
            lock = lock_folder(home)
        except FileNotFoundError:
            continue  # another run published it just now
        except BlockingIOError:
            raise UsageError(f"{printable(home)}: {BUSY}", hint=ANOTHER_OUT) from None
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise foreign(home, [f"{printable(home.name)}: is not a folder"]) from error
            raise
        try:
            if lock.is_of_the_folder():
                yield look(home, owner)
                return
        finally:
            lock.release()
    raise StorageError(f"{printable(home)}: keeps disappearing; is another run using it?")


def check_space(home: Path, needed: int) -> None:
    free = free_space(home)
    if free is not None and free < needed:
        raise StorageError(f"{printable(home)}: the output needs {size(needed)} of disk, but only {size(free)} is free")


def write_durably(path: Path, content: bytes, how: int) -> None:
    """Write a small file, opened with a flag that says how; it is on stable storage when this returns."""
    with closing(open_file(path, os.O_WRONLY | os.O_CREAT | how)) as descriptor:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        sync_file(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder, unless there is something in it."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
