"""Commands on a simulated system, in a process of its own: what other systems lack is taken away before loratool is imported.

    python other_systems.py SYSTEM FOLDER < commands.json > outcomes.json

A command is a list of words. After "killed" it is killed when its first file is finished; after "busy" and a folder it
runs while another process holds the lock of that folder; "unlocked" is a system without locks that does not report free
disk space either; after "interrupted" Ctrl-C comes when the first file is finished, after "failing"
and "header" or "tensors" the disk fails at one of these.

Every path below FOLDER, which is also the working directory, goes through the simulation, also where the Hub's client
or boto3 use it. Torch and other packages are imported before: how they get on is their own affair. The Hub's client has
simulated locks: filelock, which it takes them from, asks for the name of the system.

    macos      no /proc, direct writes, affinity, swaps of names or copies inside the kernel; the disk has a cache of its own
    windows    of these all, and no fcntl, resource, users or flags of POSIX; files are read and written by seeking; folders
               cannot be opened; case is folded, open files cannot be renamed or removed, some names and long paths are
               refused, `\\` separates, no links can be made; consoles know cp1252 only
"""

from __future__ import annotations

import builtins
import errno
import glob
import importlib
import io
import json
import os
import posixpath
import shutil
import signal
import stat
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from loratool.files.journal import FinishedShard

LONGEST = 260  # characters of a path
BINARY = 1 << 29  # stands for O_BINARY
DEVICES = {"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(1, 10))}
FORK = os.fork

NO_DIRECT = ("O_DIRECT", "sched_getaffinity", "copy_file_range", "fdatasync")
NO_POSIX = (
    *("preadv", "pread", "pwrite", "pwritev", "readv", "writev", "sendfile", "fork", "forkpty", "sysconf"),
    *("statvfs", "fstatvfs", "getuid", "geteuid", "getgid", "getegid", "fchmod", "fchown", "chown", "sync"),
    *("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_DIRECTORY", "O_SYNC", "O_DSYNC", "O_NOATIME"),
    *("posix_fallocate", "posix_fadvise", "sched_setaffinity"),
)


def without_modules(*names: str) -> None:
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]  # whoever imports it gets an ImportError


def without_names(*names: str) -> None:
    for name in names:
        if hasattr(os, name):
            delattr(os, name)


def without_proc() -> None:
    from loratool.files import process

    process.STATUS = Path("/nowhere")


def without_c_functions() -> None:
    """`ctypes.CDLL(None)`, which Windows refuses."""
    import ctypes

    def refused(*_: Any, **__: Any) -> Any:
        raise TypeError("argument of type 'NoneType' is not iterable")

    ctypes.CDLL = refused  # type: ignore[assignment, misc]


def reserved(name: str) -> bool:
    """Whether Windows has no file of that name."""
    stem = name.partition(".")[0].rstrip().lower()
    return stem in DEVICES or name.endswith((".", " ")) or any(c in '<>:"|?*' or ord(c) < 32 for c in name)


def separated(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of `os.path` for which `\\` separates, too."""
    return lambda path: real(os.fspath(path).replace("\\", "/") if not isinstance(path, bytes) else path)


def no_links(source: Any, target: Any, *_: Any, **__: Any) -> None:
    """`os.symlink` for somebody who may not make links, as most users of Windows."""
    error = OSError(errno.EINVAL, "A required privilege is not held by the client", os.fspath(source))
    error.filename2, error.winerror = os.fspath(target), 1314  # type: ignore[attr-defined]
    raise error


def turn_slashes(pathlib: Any) -> None:
    """Let relative paths have the separators of Windows as text: `org\\name`, `s3:\\bucket\\prefix`."""
    plain = pathlib.PurePath.__str__

    def turned(self: Any) -> str:
        text = str(plain(self))
        return text if text.startswith("/") else text.replace("/", "\\")

    pathlib.PosixPath.__str__ = turned
    pathlib.PurePath.as_posix = lambda self: plain(self).replace("\\", "/")


def refused_name(text: str) -> OSError:
    """The error of Windows for a name that cannot be, which pathlib knows by its number there."""
    error = OSError(errno.EINVAL, os.strerror(errno.EINVAL), text)
    error.winerror = 123  # type: ignore[attr-defined]
    return error


class Windows:
    """Stands before the file calls of Python and keeps to the rules of Windows below a folder."""

    def __init__(self, root: str) -> None:
        self.root = os.path.realpath(root)
        self.real = {name: getattr(os, name) for name in (*ONE_PATH, *TWO_PATHS, "open", "fsync")}

    def install(self) -> None:
        for name in ONE_PATH:
            setattr(os, name, self.one(self.real[name], removes=name in REMOVING))
        for name in TWO_PATHS:
            setattr(os, name, self.two(name))
        native: Any = importlib.import_module("safetensors.torch")
        load = native.load_file  # which opens the file itself
        native.load_file = lambda path, *more: load(self.found(path), *more)
        link = os.link
        os.link = lambda old, new, **named: link(self.found(old), self.found(new), **named)
        os.symlink = no_links  # type: ignore[assignment]
        os.open = self.open
        os.fsync = self.fsync  # type: ignore[assignment]
        real_open = io.open
        patched = lambda file, *more, **named: real_open(self.found(file), *more, **named)  # noqa: E731
        builtins.open = io.open = patched  # type: ignore[assignment]
        os.O_BINARY = BINARY  # type: ignore[attr-defined]
        os.sep, os.altsep, posixpath.altsep = "\\", "/", "\\"
        for name in ("split", "basename", "dirname"):
            setattr(posixpath, name, separated(getattr(posixpath, name)))
        pathlib = sys.modules["pathlib"]
        turn_slashes(pathlib)
        for globber in ("_Globber", "_StringGlobber"):  # since Python 3.13
            if hasattr(glob, globber):
                getattr(glob, globber).scandir = staticmethod(os.scandir)
        if hasattr(pathlib, "_posix_flavour"):  # before Python 3.12
            pathlib._posix_flavour.altsep = "\\"
        if (accessor := getattr(pathlib, "_NormalAccessor", None)) is not None:  # before Python 3.11
            accessor.open = staticmethod(io.open)
            for name in {*ONE_PATH, *TWO_PATHS} & set(dir(accessor)):
                setattr(accessor, name, staticmethod(getattr(os, name)))
        shutil._use_fd_functions = shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]

    def found(self, path: Any) -> Any:
        """The path as it is on the disk, where names that differ in case are one."""
        if isinstance(path, int):
            return path
        text = os.fsdecode(path).replace("\\", "/")
        full = posixpath.normpath(posixpath.join(self.root, text))
        if not full.startswith(f"{self.root}/"):
            return text
        if len(full) >= LONGEST:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text)
        parts = full[len(self.root) + 1 :].split("/")
        if any(map(reserved, parts)):
            raise refused_name(text)
        with suppress(OSError):
            self.real["lstat"](full)
            return full  # as it is written
        place = self.root
        for name in parts:
            try:
                names = self.real["listdir"](place)
            except OSError:
                names = []
            folded = [each for each in names if each.casefold() == name.casefold()]
            place = f"{place}/{folded[0] if folded and name not in names else name}"
        return place

    def check_closed(self, path: str) -> None:
        """Raise as Windows does for a file, or a folder with one, that somebody has open."""
        for number in self.real["listdir"]("/proc/self/fd"):
            try:
                target = self.real["readlink"](f"/proc/self/fd/{number}")
            except OSError:
                continue
            if target == path or target.startswith(f"{path}/"):
                raise PermissionError(errno.EACCES, "The process cannot access the file: it is open", path)

    def one(self, real: Callable[..., Any], removes: bool) -> Callable[..., Any]:
        def call(path: Any = ".", *more: Any, **named: Any) -> Any:
            place = self.found(path)
            if removes:
                self.check_closed(place)
            return real(place, *more, **named)

        return call

    def two(self, name: str) -> Callable[..., Any]:
        def call(source: Any, target: Any, **named: Any) -> Any:
            old, new = self.found(source), self.found(target)
            self.check_closed(old)
            if os.path.lexists(new):
                self.check_closed(new)
                if name == "rename" and old != new:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
                if stat.S_ISDIR(self.real["lstat"](new).st_mode):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), target)
            return self.real[name](old, new, **named)

        return call

    def open(self, path: Any, flags: int, *more: Any, **named: Any) -> int:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        place = self.found(path)
        if str(caller).startswith("loratool.files.system"):
            assert flags & BINARY, f"{path}: opened as text, which changes ends of lines"
        if os.path.isdir(place):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return int(self.real["open"](place, flags & ~BINARY, *more, **named))

    def fsync(self, descriptor: int) -> None:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))


ONE_PATH = (
    *("stat", "lstat", "mkdir", "rmdir", "unlink", "remove", "listdir", "scandir", "truncate", "access", "readlink"),
    *("utime", "chmod"),
)
REMOVING = {"unlink", "remove", "rmdir"}
TWO_PATHS = ("rename", "replace")


class ThreadLock:
    """What the Hub's client locks files of its cache with; the package that it has for that goes by the system's name."""

    held: ClassVar[dict[str, threading.Lock]] = {}

    def __init__(self, path: Any, **_: Any) -> None:
        self.lock = self.held.setdefault(os.fspath(path), threading.Lock())

    def acquire(self, **_: Any) -> None:
        self.lock.acquire()

    def release(self) -> None:
        self.lock.release()


def full_sync(descriptor: int, command: int) -> int:
    synced.append(descriptor)
    return 0


synced: list[int] = []


def become(system: str, root: str) -> None:
    """Take away what `system` lacks, then import the command line."""
    import fcntl

    for name in ("torch", "numpy", "huggingface_hub", "safetensors.torch", "click", "tqdm", "boto3"):
        importlib.import_module(name)
    assert not any(name.split(".")[0] == "loratool" for name in sys.modules)
    fixes: Any = importlib.import_module("huggingface_hub.utils._fixes")
    room = shutil.disk_usage(root)
    without_names(*NO_DIRECT)
    without_c_functions()
    if system == "macos":
        fcntl.F_FULLFSYNC = 51  # type: ignore[attr-defined]
        fcntl.fcntl = full_sync  # type: ignore[assignment]
    else:
        locks = SimpleNamespace(locking=locking_with(fcntl), LK_NBLCK=2)
        without_modules("fcntl", "resource")
        without_names(*NO_POSIX)
        sys.modules["msvcrt"] = locks  # type: ignore[assignment]
        shutil.disk_usage = lambda path, room=room: room  # type: ignore[misc]
        tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[assignment]  # an open file keeps its name
        fixes.FileLock = ThreadLock
        Windows(root).install()
    without_proc()


def locking_with(fcntl: Any) -> Callable[[int, int, int], None]:
    """`msvcrt.locking`: some bytes of a file are locked for as long as it is open."""

    def lock(descriptor: int, _mode: int, count: int) -> None:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count)

    return lock


def killed(words: list[str]) -> int:
    """The command in a process that is killed when its first file is finished; its status."""
    from loratool.files import staging

    process = FORK()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    record = staging.Stage.record

    def last(self: staging.Stage, shard: FinishedShard) -> None:
        record(self, shard)
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        staging.Stage.record = last  # type: ignore[method-assign]
        outcome(words)
    finally:
        os._exit(99)


def interrupted(words: list[str]) -> dict[str, Any]:
    """The outcome of a command that is interrupted when its first file is finished."""
    from loratool.files import staging

    real = staging.Stage.record

    def record(self: staging.Stage, shard: FinishedShard) -> None:
        real(self, shard)
        raise KeyboardInterrupt

    staging.Stage.record = record  # type: ignore[method-assign]
    try:
        return outcome(words)
    finally:
        staging.Stage.record = real  # type: ignore[method-assign]


def failing(words: list[str]) -> dict[str, Any]:
    """The outcome of a command while the disk fails: at the header of the second file, or at the first piece of tensors."""
    at_header, words = words[0] == "header", words[1:]
    safefile: Any = importlib.import_module("loratool.files.safefile")
    real, calls = safefile.write_at, iter(range(1 << 30))

    def write_at(descriptor: int, buffer: memoryview, position: int) -> int:
        if at_header == (position == 0) and next(calls) == at_header:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return int(real(descriptor, buffer, position))

    safefile.write_at = write_at
    try:
        return outcome(words)
    finally:
        safefile.write_at = real


def unlocked(words: list[str]) -> dict[str, Any]:
    """The outcome of a command where there are no locks, and nothing is known of free space."""
    from loratool.files import locks

    kept = locks.msvcrt, shutil.disk_usage
    locks.msvcrt = None
    del shutil.disk_usage
    try:
        return outcome(words)
    finally:
        locks.msvcrt, shutil.disk_usage = kept


def busy(folder: str, words: list[str]) -> dict[str, Any]:
    """The outcome of a command while another process holds the lock of a folder, which is made for that."""
    from loratool.files import locks

    os.mkdir(folder)
    ready, done = os.pipe(), os.pipe()
    process = FORK()
    if not process:
        lock = locks.lock_folder(Path(folder))
        os.write(ready[1], b"!")
        os.close(done[1])
        os.read(done[0], 1)
        lock.release()
        os._exit(0)
    os.read(ready[0], 1)
    try:
        return outcome(words)
    finally:
        os.write(done[1], b"!")
        os.waitpid(process, 0)


def outcome(words: list[str]) -> dict[str, Any]:
    """What `loratool WORDS` says on a console that knows cp1252 only, and how it ends."""
    from loratool.cli import run
    from loratool.files import process

    kept = sys.stdout, sys.stderr
    raw = io.BytesIO(), io.BytesIO()
    sys.stdout, sys.stderr = (io.TextIOWrapper(each, encoding="cp1252", write_through=True) for each in raw)
    try:
        process.prepare_streams()
        code = run(words)
    except BaseException:
        code = 99
        traceback.print_exc(file=kept[1])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        said = [each.getvalue().decode("cp1252") for each in raw]
        sys.stdout, sys.stderr = kept
    return {"words": words, "code": code, "out": said[0], "err": said[1]}


WAYS = {"interrupted": interrupted, "failing": failing, "unlocked": unlocked}


def main() -> None:
    system, root = sys.argv[1:3]
    answer = os.fdopen(os.dup(1), "w")  # a command that fails may silence stdout
    commands = json.load(sys.stdin)
    become(system, root)
    os.chdir(root)
    outcomes = []
    for words in commands:
        if words[0] in WAYS:
            outcomes.append(WAYS[words[0]](words[1:]))
        elif words[0] == "killed":
            outcomes.append({"words": words, "code": killed(words[1:]), "out": "", "err": ""})
        elif words[0] == "busy":
            outcomes.append(busy(words[1], words[2:]))
        else:
            outcomes.append(outcome(words))
    json.dump({"outcomes": outcomes, "synced": len(synced)}, answer)
    answer.close()


if __name__ == "__main__":
    main()
