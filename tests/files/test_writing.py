"""Whichever way bytes come to the disk, they are the right ones, and the digest is theirs.

The wanted files are put together here, by `struct` and `json`. All values are multiples of 1/8 between -1 and 1, so
that W + 2·BA is exact in float32, and there is one answer to the last bit.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import random
import shutil
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import nearest, raw_tensors
from peft_files import save_peft
from torch import Tensor
from tree_digests import entry_of
from workbench import within

import loratool
from loratool.files import digests, shard_writer, sink
from loratool.files.safefile import Layout
from loratool.files.shard_writer import LocalFile
from loratool.files.sink import Memory
from loratool.files.system import create_file, open_direct, reserve
from loratool.merging import resources, tasks

PAGE, SECTOR = max(4096, mmap.PAGESIZE), 512
BF16, F16, F32, F64, U8 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8
NAMES = {BF16: "BF16", F16: "F16", F32: "F32", F64: "F64", U8: "U8"}

Spec = tuple[str, torch.dtype, tuple[int, ...]]  # a tensor's name, dtype and shape


def edited(number: int, rows: int, columns: int, dtype: torch.dtype = BF16) -> Spec:
    return f"layers.{number}.weight", dtype, (rows, columns)


def plain(number: int, *shape: int, dtype: torch.dtype = U8) -> Spec:
    return f"layers.{number}.state", dtype, shape


@dataclass(frozen=True)
class File:
    """A weight file to be made: its tensors, and spaces that make its header longer."""

    tensors: Sequence[Spec]
    spaces: int = 0
    multiple: int = 1  # the file's size is one of this many bytes

    def assemble(self, contents: Mapping[str, bytes]) -> bytes:
        """The file with these bytes of its tensors."""
        table, at = {}, 0
        for name, dtype, shape in self.tensors:
            stop = at + len(contents[name])
            table[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [at, stop]}
            at = stop
        text = json.dumps(table).encode() + b" " * self.spaces
        text += b" " * (-(8 + len(text) + at) % self.multiple)
        return struct.pack("<Q", len(text)) + text + b"".join(contents[name] for name, _, _ in self.tensors)


@dataclass(frozen=True)
class Model:
    """A base, an adapter, and the files that their merge must give."""

    base: Path
    adapter: Path
    wanted: dict[str, bytes]
    untouched: int  # bytes of the tensors that the adapter leaves alone
    wide: dict[str, bytes]  # every tensor when floats are written as float32

    @contextmanager
    def of_our_own(self) -> Iterator[None]:
        """The base has a record, so that nothing has to be hashed that no edit touches."""
        files = {path.name: entry_of(path.read_bytes(), digests.CHUNK) for path in self.base.glob("*.safetensors")}
        (self.base / "loratool.json").write_text(json.dumps({"files": files}))
        yield
        (self.base / "loratool.json").unlink()

    def merge(self, out: Path, workers: int | None = None) -> None:
        """Merge into `out`; every file and its digest must be right."""
        with within(60):
            report = loratool.merge(self.base, [self.adapter], out, device="cpu", workers=workers)
        for name, content in self.wanted.items():
            assert (out / name).read_bytes() == content, name
        entries = {name: entry_of(content, digests.CHUNK) for name, content in self.wanted.items()}
        assert report.digests == {name: entry["root"] for name, entry in entries.items()}
        table = json.loads((out / "loratool.json").read_text())
        assert {name: entry for name, entry in table["files"].items() if name in self.wanted} == entries


def eighths(numbers: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(np.asarray(numbers.integers(-8, 9, shape) / 8))


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(U8).numpy().tobytes() if tensor.numel() else b""


def make_model(home: Path, files: Sequence[File]) -> Model:
    numbers = np.random.default_rng(0)
    for folder in ("base", "adapter"):
        (home / folder).mkdir(parents=True)
    weight_map: dict[str, str] = {}
    factors: dict[str, Tensor] = {}
    wanted: dict[str, bytes] = {}
    wide: dict[str, bytes] = {}
    untouched = 0
    for number, file in enumerate(files, 1):
        shard = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        before: dict[str, bytes] = {}
        after: dict[str, bytes] = {}
        for name, dtype, shape in file.tensors:
            value = eighths(numbers, *shape)
            before[name] = after[name] = numbers.bytes(value.numel()) if dtype == U8 else raw(value.to(dtype))
            wide[name] = before[name] if dtype == U8 else raw(value.float())
            module = name.removesuffix(".weight")
            if module == name:
                untouched += len(before[name])
            else:
                down, up = eighths(numbers, 2, shape[1]), eighths(numbers, shape[0], 2)
                factors[f"base_model.model.{module}.lora_A.weight"] = down.float()
                factors[f"base_model.model.{module}.lora_B.weight"] = up.float()
                merged = value + 2 * up @ down
                after[name], wide[name] = raw(nearest(merged, dtype)), raw(merged.float())
        (home / "base" / shard).write_bytes(file.assemble(before))
        wanted[shard] = file.assemble(after)
        weight_map |= dict.fromkeys(before, shard)
    if len(files) > 1:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (home / "base" / "model.safetensors.index.json").write_text(index)
    save_peft(home / "adapter", factors, r=2, lora_alpha=4)
    return Model(home / "base", home / "adapter", wanted, untouched, wide)


MODELS: dict[str, list[File]] = {
    "smaller than a page": [File([plain(0, 7), edited(1, 8, 6)])],
    "one page": [File([plain(0, 7), edited(1, 8, 6)], multiple=PAGE)],
    "whole pages, an edited tensor last": [File([plain(0, 9000), edited(1, 40, 60)], multiple=PAGE)],
    "whole pages, an untouched tensor last": [File([edited(0, 40, 60), plain(1, 9000)], multiple=PAGE)],
    "a header longer than a page": [File([edited(0, 40, 60), plain(1, 3000, dtype=F32)], spaces=PAGE + 1)],
    "a header of one page": [File([edited(0, 40, 60)], spaces=PAGE - 8 - 77), File([edited(1, 40, 60)], multiple=PAGE)],
    "odd places": [
        File([plain(0, 3), edited(1, 64, 48), plain(2, 6), edited(3, 40, 40, F32), plain(4, 1), edited(5, 50, 30, F16)])
    ],
    "many tensors in a page": [
        File([edited(n, 2, 3) if n % 5 == 3 else plain(n, 1 + n % 7) for n in range(200)]),
        File([plain(n, 2 * PAGE + n) if n % 50 == 0 else plain(n, n % 3) for n in range(200, 400)]),
    ],
    "empty tensors": [
        File([plain(0, 0), edited(1, 40, 60), plain(2, 0, 5, dtype=F32), plain(3, 50), edited(4, 3, 5), plain(5, 0)]),
        File([plain(6, 0)]),
    ],
    "several files": [
        File([plain(0, 30_001), edited(1, 90, 70), edited(2, 70, 90), plain(3, 20_000)]),
        File([plain(4, 50_000)]),
        File([edited(5, 100, 100, F64), plain(6, dtype=F32), edited(7, 3, 20_000)]),
    ],
}


@dataclass
class System:
    """The system's calls that open and write, seen and, where a test says so, refused."""

    opens: bool = True  # files for direct writes
    refuses: range = range(0)  # which direct writes get EINVAL
    shortest: int = 1 << 30  # bytes after which a direct write ends
    copies: Callable[[int], int] | None = None  # how many bytes copy_file_range moves when asked for so many
    shares: bool = False  # blocks between files
    lock: threading.Lock = field(default_factory=threading.Lock)
    direct: set[int] = field(default_factory=set)  # open descriptors
    written: list[tuple[int, int, int]] = field(default_factory=list)  # directly: position, bytes, address in memory
    buffered: int = 0  # bytes of ordinary writes
    copied: int = 0  # bytes that copy_file_range has moved
    shared: list[tuple[int, int]] = field(default_factory=list)  # ranges of files: position, bytes

    def install(self, patch: pytest.MonkeyPatch) -> None:
        real_open, real_close, real_write, real_copy = os.open, os.close, os.pwrite, os.copy_file_range

        def opening(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & os.O_DIRECT and not self.opens:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
            descriptor = real_open(path, flags, *more, **named)
            if flags & os.O_DIRECT:
                self.direct.add(descriptor)
            return descriptor

        def closing(descriptor: int) -> None:
            self.direct.discard(descriptor)
            real_close(descriptor)

        def writing(descriptor: int, buffer: memoryview, position: int) -> int:
            with self.lock:
                number = len(self.written)
                if descriptor not in self.direct:
                    self.buffered += len(buffer)
                else:
                    self.written.append((position, len(buffer), np.frombuffer(buffer, np.uint8).ctypes.data))
            if descriptor in self.direct:
                if number in self.refuses or position % SECTOR or len(buffer) % SECTOR:  # as a disk would
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                buffer = buffer[: self.shortest]
            return real_write(descriptor, buffer, position)

        def copying(source: int, target: int, count: int, *places: int) -> int:
            moved = real_copy(source, target, self.copies(count) if self.copies else count, *places)
            self.copied += moved
            return moved

        def requesting(target: int, request: int, content: bytes) -> int:
            assert request == 0x4020940D  # FICLONERANGE
            source, start, count, at = struct.unpack("qQQQ", content)
            if not self.shares:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            if start % PAGE or count % PAGE or at % PAGE or not count:  # as a file system would
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            self.shared.append((at, count))
            assert real_write(target, os.pread(source, count, start), at) == count
            return 0

        patch.setattr(fcntl, "ioctl", requesting)
        patch.setattr(os, "open", opening)
        patch.setattr(os, "close", closing)
        patch.setattr(os, "pwrite", writing)
        patch.setattr(os, "copy_file_range", copying)


def cannot_copy(_count: int) -> int:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


SYSTEMS: dict[str, dict[str, Any]] = {
    "that refuses nothing": {},
    "without direct writes": {"opens": False},
    "without direct writes or copies": {"opens": False, "copies": cannot_copy},
    "without direct writes, whose copies move nothing": {"opens": False, "copies": lambda count: 0},
    "without direct writes, whose copies fall short": {"opens": False, "copies": lambda count: 1 + count // 2},
    "whose files share blocks": {"shares": True},
    "whose files share blocks, without direct writes": {"shares": True, "opens": False},
    "that refuses the first direct write": {"refuses": range(1)},
    "that refuses direct writes": {"refuses": range(1 << 30)},
    "that refuses a later direct write": {"refuses": range(2, 3)},
    "whose direct writes end after a sector": {"shortest": SECTOR},
    "whose direct writes end within a sector": {"shortest": 1000},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"), MODELS[request.param])


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of little more than a page, and of less where a tensor's rows allow."""
    monkeypatch.setattr(resources, "CPU_BLOCK", 3000)
    monkeypatch.setattr(sink, "COPY_PIECE", 5000)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch, small_pieces: None) -> None:
    """Chunks of a few pages too, so that parts meet within a tensor."""
    monkeypatch.setattr(digests, "CHUNK", 7000)
    monkeypatch.setattr(tasks, "RUN", 9000)
    monkeypatch.setattr(shard_writer, "RESERVED", 5 * PAGE)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.usefixtures("small_parts")
def test_a_file_is_right_on_a_system(
    request: pytest.FixtureRequest, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """Every model on every system; models and systems by turns with 1 worker and with 8."""
    turn = list(SYSTEMS).index(system) + list(MODELS).index(request.node.callspec.params["model"])
    workers = (1, 8)[turn % 2]
    System(**SYSTEMS[system]).install(monkeypatch)
    with model.of_our_own() if "copies" in SYSTEMS[system] or "shares" in SYSTEMS[system] else nullcontext():
        model.merge(tmp_path / "out", workers)


@pytest.mark.parametrize("workers", [None, 1])
def test_a_file_is_right_in_parts_of_the_usual_size(model: Model, tmp_path: Path, workers: int | None) -> None:
    model.merge(tmp_path / "out", workers)


@pytest.mark.usefixtures("small_parts")
def test_tensors_are_right_in_files_of_other_dtypes_and_sizes(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = loratool.merge(model.base, [model.adapter], out, device="cpu", dtype="float32", shard_size=30_000)
    assert raw_tensors(out) == model.wide
    assert json.loads((out / "loratool.json").read_text())["files"].keys() >= report.digests.keys()
    for path in out.glob("*.safetensors"):
        assert report.digests[path.name] == entry_of(path.read_bytes(), digests.CHUNK)["root"]


@pytest.mark.parametrize("seed", range(20))
def test_a_file_is_right_whatever_its_tensors_and_its_parts_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(resources, "CPU_BLOCK", chance.choice([1, 100, 4096, 5000, 20_000]))
    monkeypatch.setattr(sink, "COPY_PIECE", chance.choice([100, 4096, 4097, 20_000]))
    monkeypatch.setattr(digests, "CHUNK", chance.choice([30, 3000, 8192, 50_000, 1 << 26]))
    monkeypatch.setattr(tasks, "RUN", chance.choice([1, 3000, 8192, 1 << 26]))
    monkeypatch.setattr(shard_writer, "MOST_KEPT", chance.choice([0, 1, 1024]))
    sizes = (1, 2, 5, 30, 100, 190)
    files = [
        File(
            [
                edited(n, chance.choice(sizes), chance.choice(sizes), chance.choice([BF16, F16, F32, F64]))
                if chance.random() < 0.4
                else plain(n, chance.choice([0, 1, 3, 1000, 4096, 30_000]), dtype=chance.choice([U8, U8, BF16]))
                for n in range(100 * number, 100 * number + chance.randrange(1, 9))
            ],
            spaces=chance.choice([0, 1, 2, 4000, 9000]),
            multiple=chance.choice([1, 1, PAGE]),
        )
        for number in range(chance.randrange(1, 4))
    ]
    files.append(File([edited(999, 90, 90)]))
    model = make_model(tmp_path, files)
    System(**SYSTEMS[chance.choice(list(SYSTEMS))]).install(monkeypatch)
    with model.of_our_own() if chance.random() < 0.5 else nullcontext():
        model.merge(tmp_path / "out", chance.choice([1, 2, 8]))


@pytest.fixture
def memory_disk() -> Iterator[Path]:
    """A folder on a file system in memory, which is another one than the base's."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm to write to")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("system", [name for name, refused in SYSTEMS.items() if "copies" not in refused])
@pytest.mark.usefixtures("small_parts")
def test_a_file_is_right_on_a_file_system_in_memory(
    model: Model, memory_disk: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    System(**SYSTEMS[system]).install(monkeypatch)
    model.merge(memory_disk / "out")


def test_reserving_takes_pages_and_keeps_the_bytes_that_are_there(memory_disk: Path) -> None:
    descriptor = create_file(memory_disk / "x")
    try:
        os.truncate(descriptor, 10 * PAGE)
        os.pwrite(descriptor, b"early", 3 * PAGE - 2)
        if not reserve(descriptor, PAGE, 8 * PAGE):
            pytest.skip("this system reserves nothing")
        os.pwrite(descriptor, b"late", 8 * PAGE - 2)
        assert os.fstat(descriptor).st_blocks * 512 >= 8 * PAGE
        wanted = bytearray(10 * PAGE)
        wanted[3 * PAGE - 2 : 3 * PAGE + 3], wanted[8 * PAGE - 2 : 8 * PAGE + 2] = b"early", b"late"
        assert (memory_disk / "x").read_bytes() == wanted
    finally:
        os.close(descriptor)


def test_a_file_system_in_memory_gets_no_direct_writes(memory_disk: Path) -> None:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    if not any(place == "/dev/shm" and kind == "tmpfs" for _, place, kind, *_ in mounts):
        pytest.skip("/dev/shm is no tmpfs here")
    descriptor = create_file(memory_disk / "x")
    try:
        assert open_direct(memory_disk / "x", descriptor, 10 * PAGE) is None
        assert os.fstat(descriptor).st_blocks == 0
    finally:
        os.close(descriptor)


@pytest.fixture
def direct_disk(tmp_path: Path) -> Path:
    """A folder where files can be opened for direct writes."""
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system for temporary files has no direct writes")
    return tmp_path


def pages_of_tensors(content: bytes) -> range:
    """The pages of a file that hold nothing but tensors, and are whole."""
    begin = 8 + int.from_bytes(content[:8], "little")
    return range(-(-begin // PAGE), len(content) // PAGE)


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.usefixtures("small_pieces")
def test_whole_pages_go_straight_to_the_disk_each_of_them_once(
    model: Model, direct_disk: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Copied ones too, and those in which tensors meet that two workers make; only the ends of a file are no such pages."""
    system = System()
    system.install(monkeypatch)
    model.merge(direct_disk / "out", workers)
    assert all(value % PAGE == 0 for call in system.written for value in call)
    large = [content for content in model.wanted.values() if len(content) >= PAGE]
    pages = Counter(page for content in large for page in pages_of_tensors(content))
    written = Counter(at // PAGE + n for at, count, _ in system.written for n in range(count // PAGE))
    assert pages == written
    direct = sum(count for _, count, _ in system.written)
    assert direct + system.buffered + system.copied == sum(map(len, model.wanted.values()))  # each byte once
    assert not system.copied or len(large) < len(model.wanted)  # the kernel copies into files of less than a page


@pytest.mark.usefixtures("small_pieces")
def test_without_direct_writes_the_kernel_copies_what_need_not_be_hashed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System(opens=False)
    system.install(monkeypatch)
    with model.of_our_own():
        model.merge(tmp_path / "out")
    assert system.copied == model.untouched  # all on one file system
    assert system.buffered == sum(map(len, model.wanted.values())) - model.untouched


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.usefixtures("small_pieces")
def test_files_share_the_whole_pages_that_no_edit_touches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Where they are as far from a page's start in both files; nothing of them is written, though it may be hashed."""
    model = make_model(tmp_path, [File([plain(0, 30_000), edited(1, 40, 60), plain(2, 9000), plain(3, 9000)])])
    system = System(shares=True)
    system.install(monkeypatch)
    with model.of_our_own() if known else nullcontext():
        model.merge(tmp_path / "out")
    (content,) = model.wanted.values()
    begin = 8 + int.from_bytes(content[:8], "little")
    runs = [(begin, begin + 30_000), (begin + 30_000 + 40 * 60 * 2, len(content))]
    pages = [n for start, stop in runs for n in range(-(-start // PAGE), stop // PAGE)]
    shared = sorted(at // PAGE + n for at, count in system.shared for n in range(count // PAGE))
    assert set(shared) <= set(pages)
    assert len(shared) == len(set(shared)) >= len(pages) - (0 if known else 1)  # two tensors may meet in a page
    written = sum(count for _, count, _ in system.written)
    assert system.buffered + system.copied + written == len(content) - len(shared) * PAGE


@pytest.mark.parametrize("opens", [True, False], ids=["direct", "through the page cache"])
@pytest.mark.parametrize("at", [0, 1, 7, 20])
@pytest.mark.usefixtures("small_parts")
def test_a_write_that_fails_ends_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, opens: bool
) -> None:
    model = make_model(tmp_path, MODELS["several files"])
    System(opens=opens).install(monkeypatch)
    real, calls = os.pwrite, iter(range(1 << 30))

    def failing(*call: Any) -> int:
        if next(calls) == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*call)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(loratool.StorageError, match=os.strerror(errno.EIO)):
        model.merge(tmp_path / "out", workers=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_file_is_not_vouched_for_when_the_merge_was_stopped_during_its_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stopped the merge has perhaps removed the file by then."""
    stop = threading.Event()
    recorded: list[object] = []
    file = LocalFile(tmp_path / "model.safetensors", Layout.of([]), stop, Memory(), lambda *seen: recorded.append(seen))
    monkeypatch.setattr(os, "fsync", lambda descriptor: stop.set())
    assert not file.finish()
    assert recorded == []
    os.close(file.descriptor)
