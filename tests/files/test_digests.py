"""Digests of weight files: by the definition in docs/provenance.md, made and compared; the oracle is the definition, on whole files."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import faults
import pytest
from tree_digests import entry_of, file_entry, sha256
from workbench import interrupted

import loratool
from loratool import cli
from loratool.files import digests
from loratool.files.digests import Digest, Tree, chunk_cuts, why_unlike
from loratool.files.safefile import TensorInfo

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "a scalar": ("F32", ()),
    "empty": ("F32", (0,)),
    "rows without elements": ("F32", (5, 0)),
    "a vector": ("U8", (1000,)),
    "rows that fit": ("BF16", (30, 20)),
    "rows that are larger than a chunk": ("F32", (3, 100)),
    "one row": ("BF16", (1, 999)),
    "a stack": ("BF16", (7, 3, 11)),
    "rows of half bytes": ("F4", (6, 3)),
    "half bytes, whole rows": ("F4", (50, 6)),
}
BITS = {"F32": 32, "U8": 8, "BF16": 16, "F4": 4}


def weight_file(tensors: Mapping[str, tuple[str, tuple[int, ...]]], spaces: int = 3) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table).encode() + b" " * spaces
    return struct.pack("<Q", len(text)) + text + bytes(n * n % 251 for n in range(at))


def digest_of_entry(entry: Mapping[str, Any]) -> Digest:
    found = Digest.of_record(json.loads(json.dumps(entry)))
    assert found is not None
    return found


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(digests, "CHUNK", 150)
    return 150


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_are_as_many_whole_rows_as_fit_and_at_least_one(small_chunks: int, name: str) -> None:
    dtype, shape = SHAPES[name]
    bits = math.prod(shape) * BITS[dtype]
    cuts = chunk_cuts(TensorInfo("x", dtype, shape, 8, 8 + bits // 8))
    (chunks,) = entry_of(weight_file({"x": (dtype, shape)}), small_chunks)["tensors"].values()
    assert len(cuts) - 1 == len(chunks)
    assert (cuts[0], cuts[-1]) == (0, bits // 8)
    row = math.prod(shape[1:]) * BITS[dtype] / 8
    if len(chunks) > 1:
        assert all(at % row == 0 for at in cuts)
        sizes = [stop - start for start, stop in pairwise(cuts)]
        assert all(size == row or size <= small_chunks < size + row for size in sizes[:-1])


def test_a_file_is_what_the_definition_says_of_it(tmp_path: Path, small_chunks: int) -> None:
    content = weight_file(SHAPES)
    (tmp_path / "x.safetensors").write_bytes(content)
    assert why_unlike(tmp_path / "x.safetensors", digest_of_entry(entry_of(content, small_chunks))) == ""


@pytest.mark.parametrize("name", [name for name, (_, shape) in SHAPES.items() if math.prod(shape)])
@pytest.mark.parametrize("place", [0, -1])
def test_the_tensor_that_differs_is_named(tmp_path: Path, small_chunks: int, name: str, place: int) -> None:
    """Its first and its last byte, whatever chunk they are in; no other tensor is named."""
    content = bytearray(weight_file(SHAPES))
    digest = digest_of_entry(entry_of(bytes(content), small_chunks))
    begin = 8 + int.from_bytes(content[:8], "little")
    start, stop = json.loads(content[8:begin])[name]["data_offsets"]
    content[begin + (start if place == 0 else stop - 1)] ^= 1
    (tmp_path / "x.safetensors").write_bytes(content)
    told = why_unlike(tmp_path / "x.safetensors", digest)
    assert "differs" in told
    assert [other for other in SHAPES if f"tensor {other})" in told] == [name]


def test_a_header_that_differs_is_named(tmp_path: Path) -> None:
    """Its padding counts too, and a header that cannot be read any more."""
    tensors = {"x": ("U8", (40,))}
    content = weight_file(tensors)
    digest = digest_of_entry(entry_of(content))
    for changed in (
        content.replace(b"}   ", b"} \t "),
        content.replace(b'"x"', b'"y"'),
        content.replace(b'"U8"', b'"??"'),
    ):
        assert len(changed) == len(content)
        (tmp_path / "x.safetensors").write_bytes(changed)
        assert "header" in why_unlike(tmp_path / "x.safetensors", digest)


def test_a_record_whose_digests_do_not_belong_together_is_told(tmp_path: Path) -> None:
    """Somebody has made the digest of a tensor fit what is there, but not the root."""
    content, other = weight_file({"x": ("U8", (40,))}, 3), weight_file({"x": ("U8", (40,))}, 4)
    (tmp_path / "x.safetensors").write_bytes(content)
    entry = {**entry_of(content), "root": entry_of(other)["root"]}
    assert "root" in why_unlike(tmp_path / "x.safetensors", digest_of_entry(entry))


@pytest.mark.parametrize(
    "change",
    [
        {"function": "md5"},
        {"root": "0" * 63},
        {"header": 7},
        {"tensors": []},
        {"tensors": {"x": []}},
        {"tensors": {"x": ["0" * 63]}},
        {"tensors": {"x": "0" * 64}},
        {"size": -1},
        {"sha256": "0"},
    ],
)
def test_an_entry_that_is_none_is_not_read(change: dict[str, object]) -> None:
    entry = entry_of(weight_file({"x": ("U8", (40,))}))
    assert Digest.of_record(entry) is not None
    assert Digest.of_record({**entry, **change}) is None


def test_digests_by_sha256_of_earlier_releases_are_compared(tmp_path: Path) -> None:
    """Those of chunks, and of a tensor that is a range of a file with a known SHA-256."""
    content = weight_file({"x": ("U8", (40,)), "y": ("U8", (9,))})
    path = tmp_path / "model.safetensors"
    entry = entry_of(content, digest=sha256)
    reference = {"file": "base.safetensors", "sha256": "0" * 64, "range": [100, 109]}
    counted = sha256(f"{'0' * 64}:100:109".encode())
    root = sha256(bytes.fromhex(entry["header"]) + sha256(bytes.fromhex(entry["tensors"]["x"][0])) + counted).hex()
    by_reference = {**entry, "tensors": {**entry["tensors"], "y": reference}, "root": root}
    for each in (entry, by_reference):
        assert each["function"] == "sha256"
        path.write_bytes(content)
        assert why_unlike(path, digest_of_entry(each)) == ""
        path.write_bytes(content[:-49] + b"\xfe" + content[-48:])
        assert "tensor x" in why_unlike(path, digest_of_entry(each))


def test_a_plain_record_of_an_earlier_release_is_compared(tmp_path: Path) -> None:
    content = weight_file({"x": ("U8", (40,))})
    plain = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "model.safetensors").write_bytes(content)
    assert why_unlike(tmp_path / "model.safetensors", digest_of_entry(plain)) == ""
    (tmp_path / "model.safetensors").write_bytes(content[:-1] + b"\xff")
    assert "differs" in why_unlike(tmp_path / "model.safetensors", digest_of_entry(plain))


def test_a_tree_is_what_its_record_says() -> None:
    entry = entry_of(weight_file(SHAPES), 150)
    tree = Tree.of_record(entry)
    assert tree is not None
    assert tree.record() == {key: value for key, value in entry.items() if key != "size"}


def files_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "loratool.json").read_text())["files"])


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return faults.make_base(tmp_path / "base", 3, 32), faults.make_adapter(tmp_path / "adapter", 3, 32)


def test_the_sha256_of_whole_files_is_recorded_on_request(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.run(["merge", *map(str, pair), "-o", str(out), "--device", "cpu", "--sha256", "-q"]) == 0
    written = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    del written["loratool.json"]
    assert files_of(out) == {name: file_entry(name, content, sha256=True) for name, content in written.items()}
    assert "--sha256" in json.loads((out / "loratool.json").read_text())["command"]


@pytest.mark.parametrize("before", [False, True])
def test_a_resumed_merge_records_the_sha256_as_this_run_says(
    pair: tuple[Path, Path], tmp_path: Path, before: bool
) -> None:
    """Of the files too that an interrupted run has finished, which had been told otherwise."""
    finished = interrupted(*pair, tmp_path / "out", 2, sha256=before)
    report = loratool.merge(*pair, tmp_path / "out", device="cpu", sha256=not before)
    assert set(report.resumed) == set(finished)
    loratool.merge(*pair, tmp_path / "fresh", device="cpu", sha256=not before)
    assert faults.picture(tmp_path / "out") == faults.picture(tmp_path / "fresh")


def test_a_tensor_that_no_edit_touches_has_its_base_s_digests_in_any_shards(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base = {name: d for p in pair[0].glob("*.safetensors") for name, d in entry_of(p.read_bytes())["tensors"].items()}
    for size in (None, "9kB", "50MB"):
        out = tmp_path / f"out-{size}"
        loratool.merge(*pair, out, device="cpu", shard_size=size)
        merged = {name: each for entry in files_of(out).values() for name, each in entry.get("tensors", {}).items()}
        assert merged.keys() == base.keys()
        same = {name for name in base if merged[name] == base[name]}
        assert same
        assert same != base.keys()
