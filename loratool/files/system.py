"""What operating systems do differently with files, one function a capability.

Each function takes the quick or safe way where it is there (`hasattr`, an import, an answer of the file system), and a
portable one elsewhere, with the same bytes in the end. No name of a system is asked for. `lacking()` says in sentences
what this process has done without.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from loratool.errors import escaped

PLAIN_WORD = re.compile(r"[\w.:/\\=,@+~*?-]+")  # what cmd.exe passes on as it is typed
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}  # how a file system says that it cannot do something


def optional(module: str) -> Any:
    """A module of the standard library that only some systems have; None elsewhere."""
    try:
        return import_module(module)
    except ImportError:
        return None


fcntl = optional("fcntl")

_lacking: dict[str, None] = {}  # sentences, in the order in which they became true


def do_without(sentence: str) -> None:
    """Note what this process has to do without; a sentence that is there already is not repeated."""
    _lacking.setdefault(sentence)


def lacking() -> tuple[str, ...]:
    """Sentences on what was done without since the last call."""
    sentences = tuple(_lacking)
    _lacking.clear()
    return sentences


# ---------------------------------------------------------------- opening

# Windows: bytes as they are, and no inheritance; elsewhere the second has another name.
ALWAYS = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOINHERIT", 0) | getattr(os, "O_CLOEXEC", 0)


def open_file(path: Path, flags: int, *, links: bool = False) -> int:
    """A descriptor of a file, which is made with mode 0o666 where `flags` ask for that.

    Opening does not block. A link at `path` is followed only with `links`, otherwise it is an `OSError` (ELOOP).
    """
    flags |= ALWAYS | getattr(os, "O_NONBLOCK", 0)
    if not links and not hasattr(os, "O_NOFOLLOW"):
        refuse_link(path)
    if not links:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    return os.open(path, flags, 0o666)


def create_file(path: Path) -> int:
    """A descriptor of a new file, for reading and writing; what is there already is a `FileExistsError`."""
    return open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """A descriptor that is open until the block ends."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_folder(folder: Path) -> int:
    """A descriptor of a folder, for its lock or for syncing it. Raises `OSError` (ENOTDIR, ELOOP) for anything else."""
    if not hasattr(os, "O_NOFOLLOW"):
        refuse_link(folder)
    descriptor = os.open(folder, os.O_RDONLY | ALWAYS | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0))
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    return descriptor


def refuse_link(path: Path) -> None:
    """Raise `OSError` (ELOOP) where there is a link at `path`, as O_NOFOLLOW does."""
    with suppress(FileNotFoundError):
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


NOT_DIRECT = UNSUPPORTED | {errno.EFAULT}  # how a direct write is refused


def open_direct(path: Path, descriptor: int, size: int, start: int = 0) -> int | None:
    """A second descriptor of an open file, which writes past the page cache; None where there is no such thing.

    Room for the `size` bytes of the file from byte `start` on is reserved on the disk.
    """
    if is_in_memory(descriptor):
        return None
    if not hasattr(os, "O_DIRECT"):
        do_without("no direct disk writes on this system; output files are written through the page cache")
        return None
    try:
        direct = os.open(path, os.O_WRONLY | os.O_DIRECT | ALWAYS | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    reserve(descriptor, start, size)  # without blocks of its own each direct write would lock the whole file
    return direct


def reserve(descriptor: int, start: int, size: int) -> bool:
    """Reserve room for a range of an open file, in which bytes that are there stay as they are; False where it cannot.

    Never by way of `posix_fallocate`: where a file system cannot, that writes zeros, also over what others write then.
    """
    import ctypes

    call = getattr(c_library(), "fallocate64", None)
    return call is not None and not call(descriptor, 0, ctypes.c_int64(start), ctypes.c_int64(size))


IN_MEMORY = (0x01021994, 0x858458F6)  # what Linux calls tmpfs and ramfs


def is_in_memory(descriptor: int) -> bool:
    """Whether an open file is on a file system in memory; False where the system does not tell."""
    import ctypes

    status = getattr(c_library(), "fstatfs", None)
    answer = (ctypes.c_long * 64)()
    return status is not None and not status(descriptor, answer) and answer[0] & 0xFFFFFFFF in IN_MEMORY


def c_library() -> Any:
    """The functions of the C library, whose errors are in `ctypes.get_errno()`; one without any where there is none."""
    import ctypes  # here, so that help does not wait for it

    try:
        return ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):
        return object()


# ---------------------------------------------------------------- reading and writing at a position

# A seek and what follows it are one step. Of several threads at one descriptor, each takes the same lock.
POSITIONS = tuple(threading.Lock() for _ in range(64))


def read_at(descriptor: int, buffer: memoryview, position: int) -> int:
    """Read into `buffer` from byte `position` of a file; the bytes that came, which may be fewer."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], position)
    with POSITIONS[descriptor % len(POSITIONS)], open(descriptor, "rb", buffering=0, closefd=False) as stream:
        stream.seek(position)
        return stream.readinto(buffer) or 0


def read_ahead(descriptor: int, start: int, count: int) -> None:
    """Have the system bring bytes of an open file into memory, so that nobody waits for them later, where it can."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_WILLNEED)


def write_at(descriptor: int, buffer: memoryview, position: int) -> int:
    """Write `buffer` at byte `position` of a file; the bytes that went, which may be fewer."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, buffer, position)
    with POSITIONS[descriptor % len(POSITIONS)]:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.write(descriptor, buffer)


# What a file system answers when it cannot copy between these two files by itself.
CANNOT_COPY = UNSUPPORTED | {errno.EXDEV, errno.EPERM, errno.EBADF, errno.ETXTBSY}


def copy_in_kernel(source: int, target: int, count: int, position: int, target_position: int) -> int:
    """Copy bytes between two open files inside the kernel; those that were copied, perhaps none."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, count, position, target_position)
    except OSError as error:
        if error.errno not in CANNOT_COPY:
            raise
        return 0


FICLONERANGE = 0x4020940D  # the number that Linux has given to this request on most processors
CANNOT_CLONE = CANNOT_COPY | {errno.ENOTTY}


def clone_range(source: int, target: int, count: int, position: int, target_position: int) -> bool:
    """Let a range of one open file be a range of another too, on the same blocks of the disk; False where it cannot."""
    if fcntl is None:
        return False
    request = struct.pack("qQQQ", source, position, count, target_position)
    try:
        fcntl.ioctl(target, getattr(fcntl, "FICLONERANGE", FICLONERANGE), request)
    except OSError as error:
        if error.errno not in CANNOT_CLONE:
            raise
        return False
    return True


# ---------------------------------------------------------------- stable storage

NO_FOLDER_SYNC = UNSUPPORTED | {errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}


def sync_file(descriptor: int) -> None:
    """Bring a file to stable storage."""
    if (full := getattr(fcntl, "F_FULLFSYNC", None)) is not None:  # there `fsync` leaves bytes in the disk's own cache
        with suppress(OSError):
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync_bytes(descriptor: int) -> None:
    """Bring the bytes of a file to stable storage, perhaps without all that the file system notes of it."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def forget_cached(path: Path) -> None:
    """Let the page cache drop what it has of a file, where it can, so that the next reading is one of the disk."""
    if hasattr(os, "posix_fadvise"):
        with closing(open_file(path, os.O_RDONLY)) as descriptor, suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where folders can be synced."""
    try:
        with closing(open_folder(folder)) as descriptor:
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
        do_without(
            "folders cannot be synced on this system; a power failure right after the end may undo the last rename"
        )


def free_space(folder: Path) -> int | None:
    """Bytes that the disk of a folder has left; None where the system does not tell."""
    import shutil  # which brings packages of archives

    if hasattr(shutil, "disk_usage"):
        return shutil.disk_usage(folder).free
    do_without("this system does not report free disk space, so it is not checked whether the output fits")
    return None


# ---------------------------------------------------------------- names and owners

RENAME_EXCHANGE = 2
AT_FDCWD = -100
ANYBODY = -1  # the owner of all files where files have none


def link_or_copy(path: Path, place: Path) -> None:
    """A file at another place: a link to it, or a copy where this user can make no links."""
    try:
        os.symlink(path.resolve(), place)
    except OSError:
        from shutil import copyfile

        copyfile(path, place)


def exchange(new: Path, old: Path, aside: Path) -> None:
    """Swap two folders' names in one step where the system can; else the old one steps `aside` first."""
    import ctypes

    renameat2 = getattr(c_library(), "renameat2", None)
    if renameat2 is not None:
        if not renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE):
            return
        if ctypes.get_errno() not in UNSUPPORTED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))
    do_without(
        "folders cannot be swapped in one step on this system; while an output was being replaced, it did not exist "
        "for a moment"
    )
    os.rename(old, aside)
    os.rename(new, old)


def shell_line(words: Sequence[str]) -> str:
    """Words as they are typed into the shell of this system; where paths have another separator, that is cmd.exe."""
    return " ".join(map(shell_word, words))


def shell_word(word: str) -> str:
    """One word as it is typed into the shell of this system, in quotes where it needs them."""
    if not os.altsep:
        return shlex.quote(word) if escaped(word) == word else f"$'{''.join(map(shell_letter, word))}'"
    word = escaped(word)  # which cmd.exe has no way to type
    if PLAIN_WORD.fullmatch(word):
        return word
    import subprocess  # here, so that help does not wait for it

    return subprocess.list2cmdline([f" {word}"]).replace(" ", "", 1)  # a space makes it quote


def shell_letter(letter: str) -> str:
    """A character as bash and zsh read it between $' and '."""
    if escaped(letter) != letter:
        return "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))
    return f"\\{letter}" if letter in "\\'" else letter


def current_user() -> int:
    """The number of the user who runs this process, as `st_uid` has it; `ANYBODY` where users have no numbers."""
    return os.geteuid() if hasattr(os, "geteuid") else ANYBODY


def belongs_to(status: os.stat_result, user: int) -> bool:
    """Whether a file or folder is of that user."""
    return user in (ANYBODY, status.st_uid)
