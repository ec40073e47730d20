"""The lock of a folder: held by one process at a time, and let go of by its end, however that comes.

Where folders can be locked, the folder itself is. Elsewhere it is an empty file beside it, `NAME.lock`; and where nothing
can be locked, the run goes on without, as on file systems that know no locks. The package filelock
locks a file beside it everywhere, and does not tell whether a folder is still the one that was locked.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loratool.files import system

fcntl, msvcrt = system.optional("fcntl"), system.optional("msvcrt")

NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL}  # of a file system


@dataclass
class FolderLock:
    """A lock that is held until it is released."""

    folder: Path
    descriptor: int = -1  # none where nothing can be locked
    beside: Path | None = None  # the file that is locked instead of the folder

    def is_of_the_folder(self) -> bool:
        """Whether the folder that was locked is still the one of that name."""
        try:
            status = os.stat(self.folder)
        except FileNotFoundError:
            return False
        folder_is_open = self.descriptor >= 0 and self.beside is None
        return not folder_is_open or os.path.samestat(os.fstat(self.descriptor), status)

    def release(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        if self.beside is not None:
            with suppress(OSError):  # another run has opened it
                if not self.beside.stat().st_size:
                    self.beside.unlink()


def lock_folder(folder: Path) -> FolderLock:
    """The lock of a folder that exists.

    Raises `BlockingIOError` where another process holds it, and `OSError` (ENOTDIR, ELOOP) where `folder` is none.
    """
    if fcntl is not None:
        lock = FolderLock(folder, system.open_folder(folder))
        attempt = lock_by_descriptor
    else:
        system.refuse_link(folder)
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        if msvcrt is None:
            system.do_without("no file locks on this system; two runs may write the same output at once")
            return FolderLock(folder)
        beside = folder.with_name(f"{folder.name}.lock")
        lock = FolderLock(folder, system.open_file(beside, os.O_RDWR | os.O_CREAT), beside)
        attempt = lock_first_byte
    try:
        attempt(lock.descriptor)
    except BaseException:
        os.close(lock.descriptor)  # whoever holds the lock removes its file
        raise
    return lock


def lock_by_descriptor(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        system.do_without("no locks on this file system; two runs may write the same output at once")


def lock_first_byte(descriptor: int) -> None:
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:  # EACCES or EDEADLK, which is all that it says
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error


def is_locked(folder: Path) -> bool:
    """Whether another process holds the lock of a folder."""
    try:
        lock_folder(folder).release()
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False
