"""Tensors that nobody has to hash: their base's record or the Hub's cache knows what they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
from tree_digests import blake, entry_of, sha256
from workbench import interrupted

import loratool
from loratool.bases.opening import open_checkpoint
from loratool.files import known_digests, untrusted
from loratool.provenance import record

NOTHING = "0" * 64


def merge(base: Path, adapter: Path, out: Path, **more: Any) -> dict[str, Any]:
    """The entries of the weight files of a merge."""
    loratool.merge(base, adapter, out, device="cpu", **more)
    return entries(out)


def entries(folder: Path) -> dict[str, Any]:
    files = json.loads((folder / "loratool.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".safetensors")}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return faults.make_adapter(tmp_path / "adapter", 2, 32)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """One with a record: the output of a merge."""
    first = faults.make_adapter(tmp_path / "first", 2, 32, rank=3)
    loratool.merge(faults.make_base(tmp_path / "begin", 2, 32), first, tmp_path / "base", device="cpu")
    return tmp_path / "base"


def with_a_wrong_digest(base: Path) -> tuple[str, str]:
    """Make the base's record list another digest of a tensor that no edit touches; its file and its name."""
    path = base / "loratool.json"
    table = json.loads(path.read_text())
    file, name = next(
        (file, name) for file, e in table["files"].items() for name in e.get("tensors", ()) if "norm" in name
    )
    table["files"][file]["tensors"][name] = [NOTHING]
    path.write_text(json.dumps(table))
    return file, name


def test_the_base_s_record_is_taken_at_its_word(base: Path, adapter: Path, tmp_path: Path) -> None:
    """What it says of a tensor stands in the output's record, unless all is to be hashed; then the bytes count."""
    found = merge(base, adapter, tmp_path / "out")
    assert found == {path.name: entry_of(path.read_bytes()) for path in (tmp_path / "out").glob("*.safetensors")}
    file, name = with_a_wrong_digest(base)
    assert merge(base, adapter, tmp_path / "known")[file]["tensors"][name] == [NOTHING]
    assert merge(base, adapter, tmp_path / "full", digests="full") == found
    assert record.compare(tmp_path / "full").problems == ()
    assert [file in told and name in told for told in record.compare(tmp_path / "known").problems] == [True]


def test_the_base_s_record_is_read_once_for_all_its_files(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = untrusted.read_json

    def counted(path: Path, *words: Any, **more: Any) -> dict[str, Any]:
        read.append(path)
        return real(path, *words, **more)

    monkeypatch.setattr(known_digests, "read_json", counted)
    known, shards = known_digests.KnownDigests(base), open_checkpoint(base).shards
    assert len(shards) == 2
    for shard in shards:
        entry = entries(base)[shard.path.name]
        assert str(known.whole(shard)) == entry["root"]
        assert {name: known.of(shard, info) for name, info in shard.tensors.items()} == {
            name: tuple(digests) for name, digests in entry["tensors"].items()
        }
    assert read == [base / "loratool.json"]


def touch(base: Path, file: str) -> None:
    os.utime(base / file, ns=(2**62, 2**62))


def change_header(base: Path, file: str) -> None:
    """With the same size, and the time that it had."""
    path = base / file
    before, content = path.stat(), path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:begin])
    other = json.dumps(dict(reversed(table.items())), separators=(",", ":")).encode().ljust(begin - 8)
    path.write_bytes(content[:8] + other + content[begin:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def remove_record(base: Path, _file: str) -> None:
    (base / "loratool.json").unlink()


def break_record(base: Path, _file: str) -> None:
    (base / "loratool.json").write_text("{")


@pytest.mark.parametrize("change", [touch, change_header, remove_record, break_record])
def test_a_record_that_may_be_of_other_files_is_not(
    base: Path, adapter: Path, tmp_path: Path, change: Callable[[Path, str], None]
) -> None:
    file, _ = with_a_wrong_digest(base)
    change(base, file)
    found = merge(base, adapter, tmp_path / "out")[file]
    assert found == entry_of((tmp_path / "out" / file).read_bytes())


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base in the Hub's cache: links to blobs that have their SHA-256 as names."""
    plain = faults.make_base(tmp_path / "plain", 2, 32)
    repo = tmp_path / "hub" / "models--org--base"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in (path for path in plain.iterdir() if path.is_file()):
        whole = hashlib.sha256(path.read_bytes()).hexdigest()
        blob = repo / "blobs" / (whole if path.suffix == ".safetensors" else whole[:40])
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_copy_from_the_hub_s_cache_is_recorded_as_where_it_is_from(
    cached: Path, adapter: Path, tmp_path: Path
) -> None:
    """File, SHA-256 and range, whose bytes the tensor has; edited tensors have digests. The root is as documented."""
    referenced = 0
    for file, entry in merge(cached, adapter, tmp_path / "out").items():
        before, after = (cached / file).read_bytes(), (tmp_path / "out" / file).read_bytes()
        begin = 8 + int.from_bytes(after[:8], "little")
        hashed = entry_of(after)
        roots = b""
        for name, listed in entry["tensors"].items():
            if isinstance(listed, list):
                assert listed == hashed["tensors"][name]
                roots += blake(b"".join(map(bytes.fromhex, listed)))
                continue
            referenced += 1
            start, stop = listed["range"]
            first, last = json.loads(after[8:begin])[name]["data_offsets"]
            assert (listed["file"], listed["sha256"]) == (file, sha256(before).hex())
            assert after[begin + first : begin + last] == before[start:stop]
            roots += blake(f"{listed['sha256']}:{start}:{stop}".encode())
        assert entry["root"] == blake(blake(after[:begin]) + roots).hex()
    assert referenced
    full = merge(cached, adapter, tmp_path / "full", digests="full")
    assert full == {path.name: entry_of(path.read_bytes()) for path in (tmp_path / "full").glob("*.safetensors")}


def a_reference(out: Path) -> tuple[str, str]:
    """The file and the name of a tensor that is recorded as a copy."""
    return next(
        (f, n) for f, e in entries(out).items() for n, listed in e["tensors"].items() if isinstance(listed, dict)
    )


def damage(path: Path, name: str) -> None:
    """The last bit of a tensor."""
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[begin + json.loads(content[8:begin])[name]["data_offsets"][1] - 1] ^= 128
    path.write_bytes(content)


def test_the_check_compares_copies_with_the_hub_s_cache(
    cached: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the base is gone, or damaged itself, it says that they were not checked, and looks at the rest."""
    out = tmp_path / "out"
    merge(cached, adapter, out)
    assert record.compare(out) == record.Comparison()
    file, name = a_reference(out)
    sound = (out / file).read_bytes()
    damage(out / file, name)
    assert [file in told and name in told for told in record.compare(out).problems] == [True]
    for state in ("damaged", "gone"):
        blob = (cached / file).resolve()
        if state == "damaged":
            damage(blob, name)
        else:
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nowhere"))
        found = record.compare(out)
        assert found.problems == ()
        assert {note.code for note in found.notes} == {"not-checked"}
        assert any(file in note.text for note in found.notes)
    (out / file).write_bytes(sound)
    edited = next(n for n, listed in entries(out)[file]["tensors"].items() if isinstance(listed, list))
    damage(out / file, edited)
    assert [edited in told for told in record.compare(out).problems] == [True]


def test_a_copy_in_a_finished_file_is_compared_with_its_base_on_resuming(
    cached: Path, adapter: Path, tmp_path: Path
) -> None:
    (first,) = interrupted(cached, adapter, tmp_path / "out")
    stage = tmp_path / "out.partial"
    lines = [json.loads(line) for line in (stage / "journal").read_text().splitlines() if line]
    tensors = next(line["finished"]["tensors"] for line in lines if "finished" in line)
    damage(stage / "model" / first, next(name for name, listed in tensors.items() if isinstance(listed, dict)))
    report = loratool.merge(cached, adapter, tmp_path / "out", device="cpu")
    assert report.resumed == ()
    loratool.merge(cached, adapter, tmp_path / "fresh", device="cpu")
    assert faults.picture(tmp_path / "out") == faults.picture(tmp_path / "fresh")


def test_a_merge_with_the_sha256_of_whole_files_is_checked_without_its_base(
    cached: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(cached, adapter, tmp_path / "out", sha256=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nowhere"))
    assert record.compare(tmp_path / "out") == record.Comparison()
    damage(tmp_path / "out" / a_reference(tmp_path / "out")[0], a_reference(tmp_path / "out")[1])
    assert len(record.compare(tmp_path / "out").problems) == 1
