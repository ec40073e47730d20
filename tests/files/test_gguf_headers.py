"""GGUF headers: read as llama.cpp's package writes them, and refused where they lie, in little memory and time."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf_bytes import ARRAY, BOOL, F32, I32, STRING, U8, U32, U64, entry, tensor, text

from loratool.errors import InputError
from loratool.files.gguf import Array, read_gguf
from loratool.layouts import ggml


def file_of(
    path: Path,
    entries: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (tensor("a.weight", (2, 4)),),
    data: int = 32,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> Path:
    """A file with a header that says these things, and so many bytes of data."""
    told = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, *told) + b"".join((*entries, *tensors))
    path.write_bytes(head + b"\0" * (-len(head) % 32) + bytes(range(data % 256)) * (data // max(data % 256, 1) or 1))
    return path


def test_types_have_the_codes_and_the_blocks_of_the_package() -> None:
    gguf = pytest.importorskip("gguf")
    kinds = {kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {name: tuple(packing) for name, packing in ggml.TYPES.items()} == kinds


@pytest.mark.parametrize("version", [2, 3])
def test_values_and_tensors_are_those_that_were_written(tmp_path: Path, version: int) -> None:
    entries = (
        entry("general.architecture", STRING, text("llama")),
        entry("llama.block_count", U32, struct.pack("<I", 7)),
        entry("x.flag", BOOL, b"\1"),
        entry("x.half", F32, struct.pack("<f", 0.5)),
        entry("x.heads", ARRAY, struct.pack("<IQ3i", I32, 3, 4, 8, 4)),
        entry("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("be")),
    )
    tensors = (tensor("a.weight", (2, 3)), tensor("b.weight", (3, 32), 8, 32))
    file = read_gguf(file_of(tmp_path / "m.gguf", entries, tensors, 32 + 3 * 34, version))
    assert file.values["general.architecture"] == "llama"
    assert [file.values[f"x.{key}"] for key in ("flag", "half")] == [True, 0.5]
    assert file.values["x.heads"] == Array(I32, 3, (4, 8, 4))
    assert file.values["tokenizer.ggml.tokens"] == Array(STRING, 2)
    assert file.number("x.heads", 1) == 8
    assert [(i.name, i.dtype, i.shape, i.start, i.stop) for i in file.tensors.values()] == [
        ("a.weight", "F32", (2, 3), 0, 24),
        ("b.weight", "Q8_0", (3, 32), 32, 134),
    ]
    assert file.layout.header == (tmp_path / "m.gguf").read_bytes()[: file.layout.data_start]


def test_a_layout_like_another_has_its_metadata_and_is_read_as_it_was_planned(tmp_path: Path) -> None:
    entries = (entry("general.alignment", U32, struct.pack("<I", 64)), entry("a.text", STRING, text("as it is")))
    file = read_gguf(file_of(tmp_path / "m.gguf", entries, (tensor("a.weight", (2, 32), 8),), 68 + 44))
    planned = file.layout.like([("a.weight", "BF16", (2, 32)), ("b.weight", "Q4_0", (1, 32))])
    (tmp_path / "n.gguf").write_bytes(planned.header + bytes(planned.size - len(planned.header)))
    again = read_gguf(tmp_path / "n.gguf")
    assert again.values == file.values
    assert (again.layout.header, dict(again.tensors)) == (planned.header, dict(planned.tensors))
    assert [info.start for info in again.tensors.values()] == [0, 128]
    assert (again.layout.size, again.layout.padding) == (planned.size, planned.padding)


HUGE = 1 << 60
Broken = Callable[[Path], Path]


def broken(**more: Any) -> Broken:
    return lambda path: file_of(path, **more)


def with_array(code: int, count: int, rest: bytes = b"") -> Mapping[str, Any]:
    return {"entries": (entry("x.y", ARRAY, struct.pack("<IQ", code, count) + rest),)}


BROKEN: dict[str, tuple[Broken, str]] = {
    "count of tensors": (broken(counts=(HUGE, 0)), "over the limit of 200000"),
    "count of entries": (broken(counts=(1, HUGE)), "over the limit of 100000"),
    "count beyond the file": (broken(counts=(150_000, 0)), "more than the rest of its header"),
    "length of a key": (broken(entries=(struct.pack("<Q", 2**63 + 5),)), "more than the rest of its header"),
    "length of a text": (
        broken(entries=(entry("a", STRING, struct.pack("<Q", 1 << 32)),)),
        "more than the rest of its header",
    ),
    "long name": (broken(tensors=(tensor("n" * 5000, (1,)),)), "over the limit of 4096"),
    "numbers of an array": (broken(**with_array(U64, HUGE)), "more than the rest of its header"),
    "texts of an array": (broken(**with_array(STRING, HUGE)), "more than the rest of its header"),
    "array of arrays": (broken(**with_array(ARRAY, 1, struct.pack("<IQ", U8, 1))), "array of arrays"),
    "array of nothing known": (broken(**with_array(77, 1)), "unknown type (77)"),
    "value of nothing known": (broken(entries=(entry("a", 99, b""),)), "unknown type (99)"),
    "key twice": (broken(entries=(entry("a", BOOL, b"\1"),) * 2), "duplicated"),
    "name twice": (broken(tensors=(tensor("a", (2, 4)), tensor("a", (2, 4), at=32)), data=64), "listed twice"),
    "name of no text": (broken(tensors=(struct.pack("<Q", 2) + b"\xff\xfe" + b"\0" * 24,)), "not UTF-8"),
    "dimensions": (broken(tensors=(tensor("a", (1, 1, 1, 1, 1)),)), "5 dimensions"),
    "elements": (broken(tensors=(tensor("a", (2**32, 2**32, 4)),)), "more elements than 63 bits"),
    "elements and none": (broken(tensors=(tensor("a", (2**40, 2**40, 0)),)), "more elements than 63 bits"),
    "size over 63 bits": (broken(tensors=(tensor("a", (2**64 - 1,)),)), "more elements than 63 bits"),
    "type": (broken(tensors=(tensor("a", (2, 4), 4),)), "unknown type (4)"),
    "blocks": (broken(tensors=(tensor("a", (2, 100), 12),)), "not a multiple of a block of Q4_K"),
    "odd position": (broken(tensors=(tensor("a", (2, 4), at=8),)), "not a multiple of 32"),
    "position beyond": (broken(tensors=(tensor("a", (2, 4), at=1 << 40),)), "but the file has"),
    "position over 63 bits": (broken(tensors=(tensor("a", (2, 4), at=2**64 - 32),)), "but the file has"),
    "overlap": (broken(tensors=(tensor("a", (4, 4)), tensor("b", (4, 4), at=32)), data=96), "overlaps tensor a"),
    "gap": (broken(tensors=(tensor("a", (2, 4)), tensor("b", (2, 4), at=64)), data=96), "leaves a gap after"),
    "missing data": (broken(data=20), "12 of 32 bytes of tensor data are missing"),
    "more data": (broken(data=100), "68 extra bytes"),
    "alignment of 0": (broken(entries=(entry("general.alignment", U32, struct.pack("<I", 0)),)), "power of two"),
    "alignment of 48": (broken(entries=(entry("general.alignment", U32, struct.pack("<I", 48)),)), "power of two"),
    "alignment of text": (broken(entries=(entry("general.alignment", STRING, text("32")),)), "power of two"),
    "version 1": (broken(version=1), "GGUF of version 1"),
    "big endian": (broken(version=0x03000000), "big-endian"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_headers_that_lie_are_refused_with_what_is_wrong(tmp_path: Path, case: str) -> None:
    make, said = BROKEN[case]
    with pytest.raises(InputError) as refused:
        read_gguf(make(tmp_path / "m.gguf"))
    assert said in str(refused.value)


@pytest.mark.parametrize("start", [b"", b"GGUF", b"ggla" + b"\0" * 40, b"version https://git-lfs.github.com/spec/v1\n"])
def test_files_that_are_no_gguf_are_refused(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(start)
    with pytest.raises(InputError, match=r"truncated|before GGUF|LFS|empty"):
        read_gguf(tmp_path / "m.gguf")


def test_a_header_cut_anywhere_is_refused(tmp_path: Path) -> None:
    entries = (entry("a", STRING, text("text")), entry("b", ARRAY, struct.pack("<IQ", STRING, 1) + text("x")))
    whole = file_of(tmp_path / "m.gguf", entries).read_bytes()
    for stop in range(0, len(whole), 3):
        (tmp_path / "m.gguf").write_bytes(whole[:stop])
        with pytest.raises(InputError):
            read_gguf(tmp_path / "m.gguf")


def test_mutated_headers_are_read_or_refused(tmp_path: Path) -> None:
    """Seeded: single bytes, and lengths and counts of eight bytes, become others anywhere in the header."""
    entries = (
        entry("general.architecture", STRING, text("llama")),
        entry("general.alignment", U32, struct.pack("<I", 32)),
        entry("x.heads", ARRAY, struct.pack("<IQ3i", I32, 3, 4, 8, 4)),
        entry("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("be")),
    )
    path = file_of(tmp_path / "m.gguf", entries, (tensor("a.weight", (2, 4)), tensor("b.weight", (2, 4), at=32)), 64)
    whole, chance = path.read_bytes(), random.Random(7)
    outcomes = set()
    for _ in range(400):
        raw = bytearray(whole)
        at = chance.randrange(len(whole) - 72)
        if chance.random() < 0.5:
            raw[at] = chance.randrange(256)
        else:
            raw[at : at + 8] = struct.pack("<Q", chance.choice((0, 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1)))
        path.write_bytes(raw)
        try:
            read_gguf(path)
            outcomes.add("read")
        except InputError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
