"""Make the n-th file call below a folder fail, fall short or be the last one, in a forked copy of this process.

    outcome = merge(arguments, root=where_the_output_goes, fault=Fault("ENOSPC", 7), scratch=tmp_path)

Everything loratool writes goes through `os.*`, and through `C_FUNCTIONS` by way of ctypes. The copy replaces
those functions with counting ones: one counter for all threads, and only calls below `root` count; for an
interrupt, the starts of threads do too. A job of `side_by_side` is in a copy already, where merge after merge
runs in one process, as in a notebook, whatever goes wrong in them; only what kills forks again. Also here: a
small model and adapter to merge, and pictures of folders to compare.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import hashlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from loratool import cli

Mode = Literal[
    "ENOSPC",  # the call fails: the disk is full; later calls work again
    "ENOSPC for good",  # and so does every later call that needs space
    "EIO",  # the call fails once
    "short",  # a write or a copy does a part of what it was asked to
    "short for good",  # and so does every later one
    "torn",  # a write or a copy does a part, then the process is killed
    "killed before",
    "killed after",
    "SIGINT",  # as from Ctrl-C, just before the call
    "SIGINT, slowly",  # and then the call takes its time in its thread, and the process lives on like a notebook
]

KILLS = ("killed before", "killed after", "torn")

# Which argument says what a call touches: a path, or a descriptor opened before.
TARGETS: dict[str, tuple[int, ...]] = {
    "open": (0,),
    "mkdir": (0,),
    "rename": (0, 1),
    "replace": (0, 1),
    "link": (1,),
    "symlink": (1,),
    "unlink": (0,),
    "remove": (0,),
    "rmdir": (0,),
    "chmod": (0,),
    "utime": (0,),
    "write": (0,),
    "writev": (0,),
    "pwrite": (0,),
    "pwritev": (0,),
    "sendfile": (0,),
    "copy_file_range": (1,),
    "fallocate64": (0,),
    "truncate": (0,),
    "ftruncate": (0,),
    "fsync": (0,),
    "fdatasync": (0,),
    "renameat2": (1, 3),
}
C_FUNCTIONS = {"fallocate64", "renameat2"}  # these by way of ctypes
WRITING = {"write", "writev", "pwrite", "pwritev", "sendfile", "copy_file_range"}
# What a full disk can refuse; opening counts where it creates a file.
ALLOCATING = WRITING | {"open", "mkdir", "rename", "replace", "link", "symlink", "fallocate64", "truncate"}
ALLOCATING |= {"ftruncate", "fsync", "fdatasync", "renameat2"}
CLEARING = {"unlink", "remove", "rmdir"}


@dataclass(frozen=True)
class Fault:
    mode: Mode
    at: int  # counts, from 1, the calls to which the mode can happen
    since: str = ""  # where given, calls count only from the one on that is written so
    path: str = ""  # where given, only calls count that touch a path with this end

    def may_hit(self, call: Call) -> bool:
        if not any(path.endswith(self.path) for path in call.paths):
            return False
        match self.mode:
            case "SIGINT" | "SIGINT, slowly":
                return True
            case "short" | "short for good" | "torn":
                return call.name in WRITING
            case "ENOSPC" | "ENOSPC for good":
                return call.name in ALLOCATING and (call.creates or call.name != "open")
            case _:
                return call.name != "start"


@dataclass(frozen=True)
class Call:
    """One file call below `root`, or the start of a thread."""

    name: str
    paths: tuple[str, ...]  # relative to `root`
    creates: bool  # a file, by `open`

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.paths)})"


@dataclass(frozen=True)
class Outcome:
    """What became of a merge."""

    code: int  # exit status; -n after signal n
    hit: Call | None  # the call at which the fault happened
    output: str  # stdout
    errors: str  # stderr
    calls: tuple[Call, ...]  # all of them; unknown after a kill
    opened: tuple[str, ...]  # files below `root` that Python opened for writing, by whatever means


class Injector:
    """Stands between this process and the file system, for one fault at most."""

    def __init__(self, root: Path, fault: Fault | None, exchange: bool) -> None:
        self.root, self.fault = os.path.realpath(root), fault
        self.exchange = exchange  # whether the system has renameat2
        self.on_hit: Callable[[Call], None] = lambda call: None
        self.lock = threading.Lock()
        self.count = 0
        self.counting = fault is not None and not fault.since
        self.calls: list[Call] = []
        self.opened: list[str] = []
        self.paths: dict[int, str] = {}  # of open descriptors
        self.replaced: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        real_open, real_close, real_cdll, injector = os.open, os.close, ctypes.CDLL, self

        def tracked_open(path: Any, flags: int, *args: Any, **named: Any) -> int:
            descriptor = real_open(path, flags, *args, **named)
            self.paths[descriptor] = self.resolve(path, named.get("dir_fd"))
            return descriptor

        def tracked_close(descriptor: int) -> None:
            self.paths.pop(descriptor, None)
            real_close(descriptor)

        class Library:
            """The C library with some of its functions counted."""

            def __init__(self, *args: Any, **named: Any) -> None:
                self.real = real_cdll(*args, **named)

            def __getattr__(self, name: str) -> Any:
                return injector.c_function(name, self.real[name]) if name in C_FUNCTIONS else self.real[name]

        originals: dict[Any, Any] = {}
        for name in TARGETS:
            if (real := getattr(os, name, None)) is not None:
                originals[real] = self.wrapped(name, tracked_open if name == "open" else real)
                self.replace(os, name, originals[real])
        self.replace(os, "close", tracked_close)
        for module, name, value in names_of(tuple(originals)):
            self.replace(module, name, originals[value])
        self.replace(ctypes, "CDLL", Library)
        self.replace(threading.Thread, "start", self.thread_start(threading.Thread.start))
        at_work.append(self)
        listen()

    def uninstall(self) -> None:
        at_work.remove(self)
        for module, name, value in reversed(self.replaced):
            setattr(module, name, value)

    def replace(self, module: Any, name: str, value: Any) -> None:
        self.replaced.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python's own word on files opened for writing, so that none goes past the counter."""
        if event == "open" and isinstance(arguments[0], (str, bytes)) and isinstance(arguments[2], int):
            path = self.below_root(os.path.realpath(os.fsdecode(arguments[0])))
            if path is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                self.opened.append(path)

    def resolve(self, target: Any, folder: int | None = None) -> str:
        """The path of a path, of an open descriptor, or of a name in an open folder."""
        if isinstance(target, int):
            return self.paths.get(target, "")
        path = os.fsdecode(target)
        if folder is not None and folder >= 0:
            path = os.path.join(self.paths.get(folder, ""), path)
        return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))

    def below_root(self, path: str) -> str | None:
        if path != self.root and not path.startswith(self.root + os.sep):
            return None
        return os.path.relpath(path, self.root)

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            folders = [named.get("dir_fd", named.get("src_dir_fd")), named.get("dst_dir_fd")]
            targets = [self.resolve(args[i], folders[at]) for at, i in enumerate(TARGETS[name])]
            creates = name == "open" and bool(args[1] & os.O_CREAT)
            return self.pass_on(name, targets, creates, real, args, named)

        return counted

    def c_function(self, name: str, real: Callable[..., int]) -> Callable[..., int]:
        def counted(*args: Any) -> int:
            targets = [self.resolve(args[i], args[i - 1] if i else None) for i in TARGETS[name]]
            try:
                if name == "renameat2" and not self.exchange:
                    raise OSError(errno.ENOSYS, "the system has no renameat2")
                return int(self.pass_on(name, targets, False, real, args, {}))
            except OSError as error:  # as C says it
                ctypes.set_errno(error.errno or 0)
                return -1

        return counted

    def thread_start(self, real: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
        def counted(thread: threading.Thread) -> None:
            self.pass_call(Call("start", (thread.name,), False), real, (thread,), {})

        return counted

    def pass_on(
        self,
        name: str,
        targets: list[str],
        creates: bool,
        real: Callable[..., Any],
        args: tuple[Any, ...],
        named: dict[str, Any],
    ) -> Any:
        paths = tuple(path for target in targets if (path := self.below_root(target)) is not None)
        if not paths:
            return real(*args, **named)
        return self.pass_call(Call(name, paths, creates), real, args, named)

    def pass_call(self, call: Call, real: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        with self.lock:
            self.calls.append(call)
            hit, struck = self.strike(call)
            if hit:
                self.on_hit(call)
        if self.fault is None or not struck:
            return real(*args, **named)
        return strike_with(self.fault.mode, call.name, real, args, named)

    def strike(self, call: Call) -> tuple[bool, bool]:
        """Whether this is the call of the fault, and whether the fault happens to it."""
        if self.fault is None:
            return False, False
        self.counting = self.counting or str(call) == self.fault.since
        if not self.counting or not self.fault.may_hit(call):
            return False, False
        self.count += 1
        hit = self.count == self.fault.at
        return hit, hit or (self.count > self.fault.at and self.fault.mode.endswith("for good"))


at_work: list[Injector] = []


@cache
def listen() -> None:
    """Tell the injector at work what Python says of files; a process cannot undo this."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        for injector in at_work:
            injector.watch(event, arguments)

    sys.addaudithook(watch)


@cache
def names_of(functions: tuple[Any, ...]) -> list[tuple[Any, str, Any]]:
    """Where modules of the package have these under names of their own, as `send = os.fsync` does."""
    return [
        (module, name, value)
        for key, module in list(sys.modules.items())
        if key.startswith("loratool.")
        for name, value in vars(module).items()
        if callable(value) and value in functions
    ]


def strike_with(mode: Mode, name: str, real: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A file call that goes wrong."""
    match mode:
        case "EIO" | "ENOSPC" | "ENOSPC for good":
            number = errno.EIO if mode == "EIO" else errno.ENOSPC
            named_file = () if isinstance(args[0], int) else (args[0],)  # as the system's own errors have it
            raise OSError(number, os.strerror(number), *named_file)
        case "short" | "short for good":
            return real(*shortened(name, args), **named)
        case "torn":
            real(*shortened(name, args), **named)
            os.kill(os.getpid(), signal.SIGKILL)
        case "killed before":
            os.kill(os.getpid(), signal.SIGKILL)
        case "SIGINT" | "SIGINT, slowly":
            os.kill(os.getpid(), signal.SIGINT)
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.2 if mode.endswith("slowly") else 0.02)  # in which the main thread gets to know it
        case "killed after":
            try:
                real(*args, **named)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **named)


def shortened(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call that writes half as much, though something."""
    match name:
        case "write" | "pwrite":
            return (args[0], memoryview(args[1])[: max(1, len(args[1]) // 2)], *args[2:])
        case "copy_file_range":
            return (*args[:2], max(1, args[2] // 2), *args[3:])
        case _:
            raise NotImplementedError(f"{name} is new here: say how it falls short")


copied: list[int] = []  # what this process is a forked copy of


def fork(work: Callable[[], object]) -> int:
    """A copy of this process that does some work and ends."""
    warm_up()
    tests = os.getpid()
    if process := os.fork():
        return process
    try:
        gc.freeze()
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        copied.append(tests)
        work()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(99)
    os._exit(0)


def merge(
    arguments: Sequence[str], root: Path, scratch: Path, fault: Fault | None = None, exchange: bool = True
) -> Outcome:
    """`loratool ARGUMENTS` with a fault below `root`, in a forked copy; `scratch` lies elsewhere.

    `exchange=False` is a system without `renameat2`.
    """
    injector, ending = Injector(root, fault, exchange), scratch / "ending"
    if copied and not (fault and fault.mode in KILLS):
        return run_with(injector, arguments, scratch)
    for name in ("output", "errors", "hit"):
        (scratch / name).write_bytes(b"")
    process = fork(lambda: ending.write_text(json.dumps(asdict(run_with(injector, arguments, scratch)))))
    if status := os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        return Outcome(status, hit_in(scratch), "", (scratch / "errors").read_text(), (), ())
    told = json.loads(ending.read_text())
    calls = tuple(map(as_call, told["calls"]))
    return Outcome(**{**told, "hit": hit_in(scratch), "calls": calls, "opened": tuple(told["opened"])})


def hit_in(scratch: Path) -> Call | None:
    text = (scratch / "hit").read_text()
    return as_call(json.loads(text)) if text else None


@cache
def warm_up() -> None:
    """Merge in this process first, so that its forks find imported and worked out what any merge needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    with tempfile.TemporaryDirectory() as home, contextlib.redirect_stdout(io.StringIO()) as said:
        inputs = [str(make_base(Path(home, "base"))), str(make_adapter(Path(home, "adapter")))]
        assert cli.run(["merge", *inputs, "-o", str(Path(home, "out")), "--device", "cpu", "--workers", "1"]) == 0
    assert said.getvalue()
    torch.set_num_threads(threads)
    names_of(tuple(dict.fromkeys(real for name in TARGETS if (real := getattr(os, name, None)) is not None)))


def run_with(injector: Injector, arguments: Sequence[str], scratch: Path) -> Outcome:
    """`loratool ARGUMENTS` in this process, whose stdout and stderr become files."""
    signal.alarm(60)  # one that hangs ends with status -14
    signal.signal(signal.SIGINT, signal.default_int_handler)
    opened = [os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("output", "errors", "hit")]
    for number, descriptor in enumerate(opened[:2], 1):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    write = os.write

    def note(call: Call) -> None:
        write(opened[2], json.dumps(asdict(call)).encode())

    injector.on_hit = note
    injector.install()
    try:
        code = cli.run(list(arguments))
    except KeyboardInterrupt:
        code = 130
    finally:
        if injector.fault is not None and injector.fault.mode == "SIGINT, slowly":
            time.sleep(0.3)
        injector.uninstall()
        signal.alarm(0)
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor in opened:
        os.close(descriptor)
    output, errors = (scratch / "output").read_text(), (scratch / "errors").read_text()
    return Outcome(code, hit_in(scratch), output, errors, tuple(injector.calls), tuple(injector.opened))


def as_call(table: dict[str, Any]) -> Call:
    return Call(**{**table, "paths": tuple(table["paths"])})


def side_by_side(jobs: Sequence[Callable[[], list[str]]], scratch: Path) -> list[str]:
    """What all jobs found, each of them worked in a forked copy of this process; one that fails has found that."""
    results = [scratch / f"job-{number}" for number in range(len(jobs))]

    def work(job: Callable[[], list[str]], result: Path) -> None:
        try:
            found = job()
        except BaseException:
            found = [traceback.format_exc()]
        result.write_text(json.dumps(found))

    processes = [fork(partial(work, job, result)) for job, result in zip(jobs, results, strict=True)]
    for process in processes:
        assert os.waitpid(process, 0)[1] == 0
    return [problem for result in results for problem in json.loads(result.read_text())]


Picture = dict[str, str]  # relative path → SHA-256 of the bytes; "" for a folder


def picture(folder: Path) -> Picture:
    """Everything below `folder`; empty where there is none."""
    found: Picture = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def make_base(folder: Path, shards: int = 2, hidden: int = 32, layers_per_shard: int = 1) -> Path:
    """A bfloat16 model in `shards` files of several pages, with an index, a config and a side file in a folder."""
    generator = torch.Generator().manual_seed(0)
    square = (torch.randn(hidden, hidden, generator=generator) * 0.02).bfloat16()
    wide = (torch.randn(2 * hidden, hidden, generator=generator) * 0.02).bfloat16()
    (folder / "extra").mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for layer in range(number * layers_per_shard, (number + 1) * layers_per_shard):
            name = f"model.layers.{layer}"
            tensors[f"{name}.self_attn.q_proj.weight"] = square * (layer + 1)
            tensors[f"{name}.mlp.up_proj.weight"] = wide * (layer + 1)
            tensors[f"{name}.mlp.gate_proj.weight"] = wide * (layer + 2)  # no adapter touches it
            tensors[f"{name}.input_layernorm.weight"] = torch.ones(hidden).bfloat16()
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}\n')
    (folder / "extra" / "notes.txt").write_text("carried over\n")
    return folder


def make_adapter(folder: Path, layers: int = 2, hidden: int = 32, rank: int = 2) -> Path:
    """A PEFT adapter on `q_proj` and `up_proj` of every layer, α = 2r."""
    generator = torch.Generator().manual_seed(1)
    folder.mkdir(parents=True)
    tensors = {}
    for layer in range(layers):
        for name, out in (("self_attn.q_proj", hidden), ("mlp.up_proj", 2 * hidden)):
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "up_proj"]}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "none", "fan_in_fan_out": False}))
    return folder


# Commands that make something, of the folders base, adapter, other and tuned.
COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "merge": lambda home: ["merge", f"{home}/base", f"{home}/adapter"],
    "rescale": lambda home: ["rescale", f"{home}/adapter", "--scale", "2"],
    "rescale --bake": lambda home: ["rescale", f"{home}/adapter", "--scale", "2", "--bake"],
    "resize": lambda home: ["resize", f"{home}/adapter", "--rank", "1"],
    "combine": lambda home: ["combine", f"{home}/adapter", f"{home}/other"],
    "extract": lambda home: ["extract", f"{home}/base", f"{home}/tuned", "--rank", "1"],
}
