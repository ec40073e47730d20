"""One safetensors file: what the safetensors package writes is read, what is planned it can read."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from oracle import needs_dtypes
from safetensors import safe_open
from safetensors.torch import save_file

from loratool.errors import InputError
from loratool.files import safefile
from loratool.files.safefile import DTYPE_BITS, Layout, LocalSource, read_exactly, read_safefile, write_fully

TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "F64": torch.float64,
}
names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())
shapes = st.lists(st.integers(0, 4), max_size=3)
tables = st.dictionaries(names, st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), shapes), min_size=1, max_size=6)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(tables)
def test_header_says_what_the_safetensors_package_wrote(
    tmp_path: Path, table: dict[str, tuple[str, list[int]]]
) -> None:
    tensors = {name: torch.ones(shape, dtype=TORCH_DTYPES[dtype]) for name, (dtype, shape) in table.items()}
    path = tmp_path / "some.safetensors"
    save_file(tensors, path, {"format": "pt"})
    file = read_safefile(path)
    assert file.layout.metadata == {"format": "pt"}
    assert {n: (t.dtype, list(t.shape)) for n, t in file.tensors.items()} == table
    raw = path.read_bytes()
    for name, info in file.tensors.items():
        expected = (
            tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensors[name].numel() else b""
        )
        assert raw[file.position(info) : file.position(info) + info.nbytes] == expected


@quick
@given(tables)
def test_planned_file_is_read_by_the_safetensors_package(
    tmp_path: Path, table: dict[str, tuple[str, list[int]]]
) -> None:
    layout = Layout.of([(name, dtype, tuple(shape)) for name, (dtype, shape) in table.items()], {"made": "here"})
    path = tmp_path / "planned.safetensors"
    path.write_bytes(layout.header + bytes(layout.size - layout.data_start))
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"made": "here"}
        assert {n: list(opened.get_slice(n).get_shape()) for n in table} == {n: s for n, (_, s) in table.items()}
        assert set(opened.keys()) == set(table)
    assert layout.data_start % 8 == 0


def test_header_without_change_is_kept_to_the_byte(tmp_path: Path) -> None:
    body = {
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    text = json.dumps(body, indent=1).encode() + b" \n "  # odd order, odd blanks
    raw = len(text).to_bytes(8, "little") + text + b"xyz"
    path = tmp_path / "odd.safetensors"
    path.write_bytes(raw)
    file = read_safefile(path)
    assert file.layout.header == raw[:-3]
    assert list(file.tensors) == ["b", "a"]


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_package_is_known_with_its_width(tmp_path: Path, dtype: str) -> None:
    needs_dtypes(dtype)
    layout = Layout.of([("x", dtype, (8,))])
    path = tmp_path / "x.safetensors"
    path.write_bytes(layout.header + bytes(layout.size - layout.data_start))
    with safe_open(path, framework="pt") as opened:  # parses and validates the header
        assert opened.get_slice("x").get_dtype() == dtype
    assert layout.tensors["x"].nbytes == DTYPE_BITS[dtype]


def test_reading_goes_on_after_a_short_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(200)))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:7]], at))
    buffer = bytearray(100)
    with open(path, "rb") as stream:
        read_exactly(stream.fileno(), memoryview(buffer), 50, path)
        assert buffer == bytes(range(50, 150))
        with pytest.raises(InputError, match="ended early"):
            read_exactly(stream.fileno(), memoryview(buffer), 150, path)


def test_writing_goes_on_after_a_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    with open(tmp_path / "out", "w+b") as stream:
        write_fully(stream.fileno(), b"0123456789", 2)
        assert stream.read() == b"\0\x000123456789"


@pytest.mark.parametrize("answer", ["unsupported", "zero", "missing", "short"])
def test_copying_falls_back_where_the_kernel_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "in").write_bytes(content)
    real = os.copy_file_range

    def copy(source: int, target: int, count: int, at: int, target_at: int) -> int:
        if answer == "unsupported":
            raise OSError(errno.EXDEV, "cross-device")
        return 0 if answer == "zero" else real(source, target, min(count, 1000), at, target_at)

    if answer == "missing":
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", copy)
    with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "wb") as target:
        LocalSource(tmp_path / "in", source.fileno()).copy_to(target.fileno(), 5, len(content) - 5, 0)
    assert (tmp_path / "out").read_bytes() == content[5:]


def test_a_disk_error_while_copying_is_not_taken_for_missing_support(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(*_: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    (tmp_path / "in").write_bytes(b"x" * 100)
    monkeypatch.setattr(os, "copy_file_range", copy)
    with (
        open(tmp_path / "in", "rb") as source,
        open(tmp_path / "out", "wb") as target,
        pytest.raises(OSError, match="full"),
    ):
        LocalSource(tmp_path / "in", source.fileno()).copy_to(target.fileno(), 0, 100, 0)


def test_reading_a_header_touches_no_tensor_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": torch.zeros(1_000_000)}, tmp_path / "big.safetensors")
    seen = 0
    real, real_vector = os.pread, os.preadv

    def pread(fd: int, count: int, at: int) -> bytes:
        nonlocal seen
        seen = max(seen, at + count)
        return real(fd, count, at)

    def preadv(fd: int, buffers: list[memoryview], at: int) -> int:
        nonlocal seen
        seen = max(seen, at + sum(map(len, buffers)))
        return real_vector(fd, buffers, at)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(os, "preadv", preadv)
    file = safefile.read_safefile(tmp_path / "big.safetensors")
    assert seen <= file.layout.data_start
