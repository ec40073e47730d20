"""A merge that was interrupted ends in the bytes of one that was not, whatever happened in between."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from safetensors.torch import load_file, save_file
from workbench import interrupted, tree
from working_plans import working_plan

import loratool

SHARDS, HIDDEN = 3, 32
FIRST = "model-00001-of-00003.safetensors"
LAST = "model-00003-of-00003.safetensors"


@dataclass
class Merge:
    """The inputs of a merge, which a test may change, and its output."""

    base: Path
    adapter: Path
    out: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """Where the finished files of an interrupted run are."""
        return self.out.with_name(f"{self.out.name}.partial") / "model"

    def run(self, out: Path) -> loratool.MergeReport:
        return loratool.merge(self.base, self.adapter, out, device="cpu", **self.settings)

    def check(self) -> loratool.MergeReport:
        """Continue the merge; its output is that of a fresh run of the same inputs."""
        fresh = self.out.with_name("fresh")
        self.run(fresh)
        report = self.run(self.out)
        assert faults.picture(self.out) == faults.picture(fresh)
        assert not self.model.parent.exists()
        return report


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    base = faults.make_base(tmp_path / "in" / "base", SHARDS, HIDDEN)
    adapter = faults.make_adapter(tmp_path / "in" / "adapter", SHARDS, HIDDEN)
    (tmp_path / "out").mkdir()
    return Merge(base, adapter, tmp_path / "out" / "merged")


# ---------------------------------------------------------------- finished files that are damaged


def flip_a_bit(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def flip_the_last_bit(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 128
    file.write_bytes(raw)


def put_zeroes(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[:4096] + bytes(len(raw) - 4096))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def extend(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\0")


def empty(file: Path) -> None:
    os.truncate(file, 0)


def remove(file: Path) -> None:
    file.unlink()


def swap(file: Path) -> None:
    (other,) = (path for path in file.parent.glob("*.safetensors") if path != file)
    first, second = file.read_bytes(), other.read_bytes()
    assert len(first) == len(second)  # a size tells nothing here
    file.write_bytes(second)
    other.write_bytes(first)


DAMAGES = (flip_a_bit, flip_the_last_bit, put_zeroes, cut, extend, empty, remove, swap)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_finished_file_that_was_damaged_is_written_again_and_the_report_says_so(
    merge: Merge, damage: Callable[[Path], None]
) -> None:
    """Files that are as they were written are kept."""
    first, second = interrupted(merge.base, merge.adapter, merge.out, 2)
    kept = os.stat(merge.model / second).st_ino
    damage(merge.model / first)
    report = merge.check()
    again = [note for note in report.notes if note.code == "written-again"]
    wanted = {first, second} if damage is swap else {first}
    assert {name for name in (first, second) if any(name in note.text for note in again)} == wanted
    assert len(again) == len(wanted)
    assert set(report.resumed) == {first, second} - wanted
    if damage is not swap:
        assert os.stat(merge.out / second).st_ino == kept
    assert "written-again" not in (merge.out / "loratool.json").read_text()  # which is that of a fresh run


@pytest.mark.parametrize("target", ["outside", "the other finished file"])
def test_a_link_in_the_place_of_a_finished_file_is_neither_followed_nor_removed(
    merge: Merge, tmp_path: Path, target: str
) -> None:
    """Not even one to a file with the right bytes: a stage holds no links. Without the link the merge goes on."""
    first, second = interrupted(merge.base, merge.adapter, merge.out, 2)
    place = tmp_path / "elsewhere" if target == "outside" else merge.model / second
    if target == "outside":
        (merge.model / first).rename(place)
    else:
        (merge.model / first).unlink()
    (merge.model / first).symlink_to(place)
    before = tree(tmp_path)
    with pytest.raises(loratool.StorageError) as caught:
        merge.run(merge.out)
    assert f"model/{first}: is a link" in str(caught.value)
    assert tree(tmp_path) == before
    (merge.model / first).unlink()
    merge.check()


def test_a_file_that_cannot_be_read_any_more_is_written_again(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk with a bad block, which answers reads with EIO."""
    first, second = interrupted(merge.base, merge.adapter, merge.out, 2)
    fresh = merge.out.with_name("fresh")
    merge.run(fresh)
    real = os.open

    def failing(path: Any, *args: Any, **named: Any) -> int:
        if str(path) == str(merge.model / first) and not args[0] & os.O_CREAT:
            raise OSError(5, "Input/output error", str(path))
        return real(path, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        report = merge.run(merge.out)
    assert report.resumed == (second,)
    assert any(first in note.text and "Input/output error" in note.text for note in report.notes)
    assert faults.picture(merge.out) == faults.picture(fresh)


def test_digests_are_compared_on_resuming_only(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that nobody interrupts reads no output file back."""
    read: list[str] = []

    def noting(path: Path, *_: object) -> str:
        read.append(path.name)
        return ""

    monkeypatch.setattr("loratool.files.staging.why_unlike", noting)
    merge.run(merge.out.with_name("fresh"))
    assert read == []
    finished = interrupted(merge.base, merge.adapter, merge.out, 2)
    merge.run(merge.out)
    assert sorted(read) == finished


# ---------------------------------------------------------------- inputs and settings that change in between


def restore_time(path: Path, change: Callable[[Path], object]) -> None:
    """Change a file in place, and set its times back."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def put(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(content)


def edit_base(merge: Merge) -> None:
    """In the file that is finished already, with another size and time."""
    tensors = load_file(merge.base / FIRST)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, merge.base / FIRST, {"format": "pt", "a": "b"})


def edit_base_in_place(merge: Merge) -> None:
    """Same size, same inode, same time: only ctime tells, and the bytes, which are outside of any small sample."""
    restore_time(merge.base / FIRST, lambda path: put(path, path.stat().st_size - 7, b"\x3f"))


def edit_base_of_the_rest(merge: Merge) -> None:
    restore_time(merge.base / LAST, lambda path: put(path, path.stat().st_size - 7, b"\x3f"))


def touch_base(merge: Merge) -> None:
    (merge.base / FIRST).touch()


def copy_base(merge: Merge) -> None:
    """Other inodes, other bytes, the same names and times."""
    shutil.copytree(merge.base, merge.base.with_name("copy"), copy_function=shutil.copy2)
    shutil.rmtree(merge.base)
    merge.base.with_name("copy").rename(merge.base)
    edit_base_in_place(merge)


def change_header(merge: Merge) -> None:
    """A shape, which no byte of a tensor tells."""
    tensors = load_file(merge.base / FIRST)
    name = next(name for name in tensors if "gate" in name)
    tensors[name] = tensors[name].reshape(HIDDEN, -1).contiguous()
    save_file(tensors, merge.base / FIRST, {"format": "pt"})


def change_adapter_value(merge: Merge) -> None:
    file = merge.adapter / "adapter_model.safetensors"
    restore_time(file, lambda path: put(path, path.stat().st_size - 2, b"\x20\x3e"))


def change_adapter_config(merge: Merge) -> None:
    file = merge.adapter / "adapter_config.json"
    restore_time(file, lambda path: path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8')))


def change_pattern(merge: Merge) -> None:
    """The scale of one module alone."""
    file = merge.adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "alpha_pattern": {"layers.0.mlp.up_proj": 64}}))


def change_base_config(merge: Merge) -> None:
    (merge.base / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16", "more": 1}\n')


def change_side_file(merge: Merge) -> None:
    (merge.base / "extra" / "notes.txt").write_text("changed\n")


def add_side_file(merge: Merge) -> None:
    (merge.base / "LICENSE").write_text("terms\n")


def remove_side_file(merge: Merge) -> None:
    shutil.rmtree(merge.base / "extra")


def add_tokenizer(merge: Merge) -> None:
    (merge.adapter / "tokenizer.json").write_text("{}")


def rename_shards(merge: Merge) -> None:
    """The two first files of the base change places; the index goes with them."""
    index = merge.base / "model.safetensors.index.json"
    text = index.read_text()
    second = "model-00002-of-00003.safetensors"
    (merge.base / FIRST).rename(merge.base / "moved")
    (merge.base / second).rename(merge.base / FIRST)
    (merge.base / "moved").rename(merge.base / second)
    index.write_text(text.replace(FIRST, "?").replace(second, FIRST).replace("?", second))


def set_to(**settings: Any) -> Callable[[Merge], None]:
    def change(merge: Merge) -> None:
        merge.settings |= settings

    return change


def other_base(merge: Merge) -> None:
    """Another folder with a model of the same shapes; a sound one, of other values."""
    other = merge.base.with_name("other")
    shutil.copytree(merge.base, other)
    for shard in other.glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    merge.base = other


def other_adapter(merge: Merge) -> None:
    other = merge.adapter.with_name("other")
    shutil.copytree(merge.adapter, other)
    file = other / "adapter_model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    merge.adapter = other


CHANGES: dict[str, Callable[[Merge], None]] = {
    "a base file is another": edit_base,
    "a base file is edited in place": edit_base_in_place,
    "a base file that is not merged yet is edited in place": edit_base_of_the_rest,
    "a base file is touched": touch_base,
    "the base is a copy with an edit": copy_base,
    "a shape of the base": change_header,
    "the base's files change places": rename_shards,
    "the base's config": change_base_config,
    "a side file": change_side_file,
    "one more side file": add_side_file,
    "one side file less": remove_side_file,
    "another base": other_base,
    "a value of the adapter": change_adapter_value,
    "the adapter's config": change_adapter_config,
    "a pattern of the adapter's config": change_pattern,
    "the adapter's tokenizer": add_tokenizer,
    "another adapter": other_adapter,
    "the weight": set_to(weights=[0.5]),
    "the dtype": set_to(dtype="float32"),
    "the shard size": set_to(shard_size=9000),
    "a map": set_to(maps=[r"mlp[.]up_proj=mlp.gate_proj"]),
    "the orientation": set_to(fan_in_fan_out=True),
    "new tensors allowed": set_to(allow_new_tensors=True),
    "workers": set_to(workers=3),
    "memory": set_to(max_memory=4 << 30),
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_between_interruption_and_rerun_the_output_is_that_of_a_fresh_run(
    merge: Merge, change: str
) -> None:
    interrupted(merge.base, merge.adapter, merge.out)
    CHANGES[change](merge)
    try:
        merge.run(merge.out.with_name("trial"))
    except loratool.LoratoolError as refused:  # an option that does not go with this adapter, say
        before = tree(merge.out.parent)
        with pytest.raises(type(refused)):
            merge.run(merge.out)
        assert tree(merge.out.parent) == before
    else:
        merge.check()


@pytest.mark.parametrize("change", ["workers", "a side file", "one more side file"])
def test_work_is_kept_where_no_weight_depends_on_what_changed(merge: Merge, change: str) -> None:
    finished = interrupted(merge.base, merge.adapter, merge.out)
    CHANGES[change](merge)
    assert set(merge.check().resumed) == set(finished)


def test_two_adapters_that_change_places_are_another_merge(merge: Merge, tmp_path: Path) -> None:
    other = faults.make_adapter(tmp_path / "in" / "other", SHARDS, HIDDEN, rank=3)
    both = [merge.adapter, other]
    interrupted(merge.base, both, merge.out, weights=[1.0, 0.25])
    fresh = loratool.merge(merge.base, both[::-1], tmp_path / "out" / "fresh", weights=[1.0, 0.25], device="cpu")
    loratool.merge(merge.base, both[::-1], merge.out, weights=[1.0, 0.25], device="cpu")
    assert faults.picture(merge.out) == faults.picture(fresh.out)


def test_files_that_another_kind_of_device_has_computed_are_not_kept(merge: Merge) -> None:
    """Their last bits may differ. The journal is made to say that a GPU computed the finished file."""
    interrupted(merge.base, merge.adapter, merge.out)
    journal = merge.model.parent / "journal"
    text = journal.read_text()
    assert text.count('"device": "cpu", "norms"') >= 1
    journal.write_text(text.replace('"device": "cpu", "norms"', '"device": "cuda", "norms"'))
    report = merge.check()
    assert report.resumed == ()
    assert any(note.code == "written-again" and "cuda" in note.text for note in report.notes)


def test_the_same_command_on_the_same_inputs_continues(merge: Merge) -> None:
    """So that what the tests above see is no merge that always begins anew."""
    finished = interrupted(merge.base, merge.adapter, merge.out, 2)
    assert set(merge.check().resumed) == set(finished)


def test_the_report_of_a_continued_merge_tells_of_all_files(merge: Merge) -> None:
    """Norms, NaN of the base and notes are those of a fresh run, wherever the first one was interrupted.

    The norms are also those of W' - W in the files, and here all updates are larger than their weights.
    """
    file = merge.base / FIRST
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("q_proj.weight")]
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    fresh = merge.run(merge.out.with_name("fresh"))
    assert fresh.nonfinite == {name: 1}
    before, after = (
        {
            name: tensor.double()
            for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for folder in (merge.base, fresh.out)
    )
    large = {n for n in before if (after[n] - before[n]).norm() > before[n].norm()}
    assert large == set(fresh.relative_norms)
    for finished in range(1, SHARDS):
        names = interrupted(merge.base, merge.adapter, merge.out, finished)
        report = merge.run(merge.out)
        assert set(report.resumed) == set(names)
        assert report.relative_norms == fresh.relative_norms
        assert report.nonfinite == fresh.nonfinite
        assert report.notes == fresh.notes
        assert "update-larger-than-weight" in [note.code for note in report.notes]
        shutil.rmtree(merge.out)


# ---------------------------------------------------------------- the fingerprint of the content


def test_the_content_fingerprint_is_the_same_on_every_machine(merge: Merge, tmp_path: Path) -> None:
    """Neither folders, nor times, nor inodes, nor the order of a folder's entries decide anything."""
    from loratool.merging.fingerprints import content_fingerprint

    def fingerprint(base: Path, adapter: Path) -> str:
        plan = working_plan(base, adapter)
        return content_fingerprint(plan, [adapter.digests() for adapter in plan.adapters])

    first = fingerprint(merge.base, merge.adapter)
    shutil.copytree(merge.base, tmp_path / "far" / "away", copy_function=shutil.copyfile)
    shutil.copytree(merge.adapter, tmp_path / "far" / "too", copy_function=shutil.copyfile)
    assert fingerprint(tmp_path / "far" / "away", tmp_path / "far" / "too") == first
    tensors = load_file(tmp_path / "far" / "away" / LAST)
    changed = {name: tensor * 2 for name, tensor in tensors.items()}
    save_file(changed, tmp_path / "far" / "away" / LAST, {"format": "pt"})
    assert fingerprint(tmp_path / "far" / "away", merge.adapter) != first


def test_a_sample_of_every_tensor_is_in_the_fingerprint(tmp_path: Path) -> None:
    """Of a small tensor the sample is all of it: any byte of any of them that changes, changes the fingerprint."""
    from loratool.files.safefile import read_safefile
    from loratool.merging.fingerprints import sampled

    tensors = {f"t{n}": torch.arange(n * 7, dtype=torch.float32) for n in range(1, 9)} | {"none": torch.zeros(0)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    seen = {sampled(read_safefile(path))}
    for at in range(start, len(raw), 13):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        seen.add(sampled(read_safefile(path)))
    assert len(seen) == 1 + len(range(start, len(raw), 13))


def test_an_interrupted_merge_into_an_old_output_continues_and_then_replaces_it(merge: Merge, tmp_path: Path) -> None:
    """With --overwrite, the old output stays whole until then."""
    merge.settings = {"weights": [-1.0]}
    merge.run(merge.out)
    old = faults.picture(merge.out)
    finished = interrupted(merge.base, merge.adapter, merge.out, overwrite=True)
    assert faults.picture(merge.out) == old
    merge.settings = {}
    merge.run(tmp_path / "out" / "fresh")
    merge.settings = {"overwrite": True}
    assert set(merge.run(merge.out).resumed) == set(finished)
    assert faults.picture(merge.out) == faults.picture(tmp_path / "out" / "fresh")


def test_the_command_line_says_what_was_kept_and_what_was_written_again(
    merge: Merge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from loratool.cli import run

    first, _ = interrupted(merge.base, merge.adapter, merge.out, 2)
    flip_a_bit(merge.model / first)
    assert run(["merge", str(merge.base), str(merge.adapter), "-o", str(merge.out), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "1 finished file" in said
    assert f"{first}: finished by an interrupted run" in said
