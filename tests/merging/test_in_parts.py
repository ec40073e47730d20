"""A merge that many workers make on one file system is the merge that one process makes, whatever happens to them."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import faults
import pytest
from workbench import snapshot

import loratool
from loratool.cli import run
from loratool.errors import LoratoolError, StorageError, UsageError, VerificationError
from loratool.files import digests, presence, safefile, shard_writer, sink, staging, system
from loratool.files.digests import Listed
from loratool.files.journal import Journal
from loratool.files.part_records import PartRecord
from loratool.files.shared_folder import SharedFolder
from loratool.merging import dealing, in_parts, parted_merge
from loratool.merging.merge_options import MergeOptions
from loratool.results.parts import FinishReport, PartReport

SHARDS, HIDDEN = 2, 64
COUNTS = [1, 2, 7, 37]


@dataclass
class Merge:
    """The inputs of a merge, and its output."""

    base: Path
    adapter: Path
    out: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial")

    def part(self, word: str, **more: Any) -> PartReport:
        settings = {"device": "cpu", **self.settings, **more}
        return loratool.merge_part(self.base, self.adapter, self.out, word, **settings)

    def finish(self, **more: Any) -> FinishReport:
        return loratool.finish_merge(self.base, self.adapter, self.out, **{"device": "cpu", **self.settings, **more})

    def status(self) -> loratool.PartsStatus:
        return loratool.merge_status(self.base, self.adapter, self.out, **self.settings)

    def local(self) -> Path:
        """The output of one process."""
        out = self.out.parent.parent / "local" / self.out.name
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            loratool.merge(self.base, self.adapter, out, device="cpu", **self.settings)
        return out

    def check(self, out: Path | None = None) -> None:
        """OUT has the bytes of every file of the local merge, and in `loratool.json` the same but for the fingerprint."""
        out = out or self.out
        found, wanted = (without_record(faults.picture(each)) for each in (out, self.local()))
        assert found == wanted
        found, wanted = (json.loads((each / "loratool.json").read_text()) for each in (out, self.local()))
        assert len(found.pop("plan")) == 64
        assert found == wanted
        assert os.listdir(out.parent) == [out.name]


def without_record(picture: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: content for name, content in picture.items() if name != "loratool.json"}


@pytest.fixture
def merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Merge:
    """Two files of 40 kB in ten parts."""
    monkeypatch.setattr(digests, "CHUNK", 5000)
    monkeypatch.setattr(dealing, "SMALLEST", 9000)
    base = faults.make_base(tmp_path / "in" / "base", SHARDS, HIDDEN)
    adapter = faults.make_adapter(tmp_path / "in" / "adapter", SHARDS, HIDDEN)
    (tmp_path / "out").mkdir()
    return Merge(base, adapter, tmp_path / "out" / "merged")


def parts_of(merge: Merge) -> list[str]:
    return [*merge.status().missing]


def record_of(merge: Merge, name: str) -> Path:
    return merge.stage / "parts" / f"{name}.json"


# ---------------------------------------------------------------- the same bytes


def test_parts_of_one_file_in_memory_have_few_writers_together(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel lets one into such a file at a time, and others spin."""
    write, lock, writing, most = safefile.write_fully, threading.Lock(), Counter[int](), Counter[int]()

    def watched(descriptor: int, memory: memoryview, at: int) -> None:
        file = os.fstat(descriptor).st_ino
        with lock:
            writing[file] += 1
            most[file] = max(most[file], writing[file])
        time.sleep(0.002)
        write(descriptor, memory, at)
        with lock:
            writing[file] -= 1

    for module in (shard_writer, system):  # one of them opens such files for direct writes where they are on a disk
        monkeypatch.setattr(module, "is_in_memory", lambda _descriptor: True)
    monkeypatch.setattr(shard_writer, "write_fully", watched)
    merge.part("1/1", workers=8)
    assert len(most) == SHARDS
    assert max(most.values()) <= shard_writer.WRITERS
    merge.finish()
    merge.check()


@pytest.mark.parametrize("count", COUNTS)
def test_any_number_of_workers_in_any_order_makes_the_bytes_of_one(merge: Merge, count: int) -> None:
    numbers = [*range(1, count + 1)]
    random.Random(count).shuffle(numbers)
    made = [name for number in numbers for name in merge.part(f"{number}/{count}").made]
    assert len(made) == len({*made}) == 10
    report = merge.finish()
    merge.check()
    assert report.published
    assert report.merge is not None
    assert report.merge.gains


@pytest.mark.parametrize(
    "settings",
    [{"rounding": "compensated", "dtype": "bfloat16"}, {"dtype": "float32", "shard_size": 30_000, "sha256": True}],
    ids=lambda settings: ",".join(settings),
)
def test_other_ways_to_merge_are_made_in_parts_too(merge: Merge, settings: dict[str, Any]) -> None:
    merge.settings = settings
    for word in ("2/2", "1/2"):
        merge.part(word)
    merge.finish()
    merge.check()


def test_the_report_says_what_that_of_a_local_merge_does(merge: Merge) -> None:
    """Norms, gains and effects are sums over parts; they agree with those of one process to rounding."""
    merge.part("1/2")
    merge.part("2/2")
    found = merge.finish().merge
    shutil.rmtree(merge.out)
    wanted = loratool.merge(merge.base, merge.adapter, merge.out, device="cpu")
    assert found is not None
    assert found.relative_norms == pytest.approx(wanted.relative_norms)
    assert found.gains == pytest.approx(wanted.gains)
    for name in ("edited", "copied", "adapters", "bytes_written", "notes", "digests", "nonfinite"):
        assert getattr(found, name) == getattr(wanted, name), name


def test_an_output_of_one_file_is_made_in_parts_too(merge: Merge, tmp_path: Path) -> None:
    base = faults.make_base(tmp_path / "single", 1, HIDDEN)
    file = next(base.glob("*.safetensors"))
    out = merge.out.with_suffix(".safetensors")
    words = ["merge", str(file), str(faults.make_adapter(tmp_path / "one", 1, HIDDEN)), "--device", "cpu", "-o"]
    assert run([*words, str(tmp_path / "alone.safetensors")]) == 0
    for more in (["--part", "2/3"], ["--part", "1/3"], ["--part", "3/3"], ["--finish"], ["--finish"]):
        assert run([*words, str(out), *more]) == 0
    assert out.read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    assert sorted(os.listdir(out.parent)) == ["merged.safetensors", "merged.safetensors.loratool.json"]


def test_nothing_is_at_out_before_finish(merge: Merge) -> None:
    merge.part("1/1")
    assert os.listdir(merge.out.parent) == ["merged.partial"]
    assert not (merge.stage / "model" / "config.json").exists()


# ---------------------------------------------------------------- workers that come and go


def test_another_number_of_workers_goes_on_with_what_is_there(merge: Merge) -> None:
    first = merge.part("2/3")
    second = merge.part("1/2")
    third = merge.part("1/1")
    assert {*first.made} & {*second.made} == set()
    assert {*third.kept} == {*first.made, *second.made}
    assert len(first.made) + len(second.made) + len(third.made) == 10
    merge.finish()
    merge.check()


def test_workers_at_the_same_time_may_have_the_same_parts(merge: Merge) -> None:
    """Four threads, whose shares overlap, begin at the same moment on a stage that is not there."""
    together([partial(merge.part, word) for word in ("1/1", "1/2", "2/2", "1/1")])
    merge.finish()
    merge.check()


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What some functions return that begin at the same moment, or the error that they raise."""
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def run(number: int) -> None:
        barrier.wait()
        try:
            results[number] = jobs[number]()
        except LoratoolError as error:
            results[number] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_pages_that_parts_share_are_written_by_finish_alone(merge: Merge) -> None:
    """A machine may write a whole page where a part has some bytes of it, and so undo what another machine has written."""
    merge.part("1/1")
    parts = parted_merge.open_parts(merge.base, merge.adapter, merge.out, MergeOptions(device="cpu")).parts
    inner = [(part.file, part.start) for part in parts if part.start]
    assert len(inner) == 8
    before = {name: (merge.stage / "model" / name).read_bytes() for name, _ in inner}
    merge.finish()
    for name, start in inner:
        first = start // sink.PAGE * sink.PAGE
        page = slice(max(first, 1000), first + sink.PAGE)  # the header is in the first one
        if start % sink.PAGE and first + sink.PAGE < len(before[name]):
            assert before[name][page] == bytes(len(before[name][page]))
            assert (merge.out / name).read_bytes()[page] != before[name][page]


@pytest.mark.parametrize("at", [0.05, 0.2, 0.4, 0.6, 0.75, 0.95])
@pytest.mark.parametrize("words", [["--part", "1/1"], ["--finish"]], ids=["part", "finish"])
def test_a_process_that_is_killed_is_started_again(merge: Merge, tmp_path: Path, words: list[str], at: float) -> None:
    """Killed at a file call, that far on the way; OUT is absent or complete, and nothing is beside the stage."""
    line = ["merge", str(merge.base), str(merge.adapter), "-o", str(merge.out), "--device", "cpu", "--workers", "2"]
    root = merge.out.parent
    if words == ["--finish"]:
        merge.part("1/1")
    shutil.copytree(root, tmp_path / "before")
    calls = [call for call in faults.merge([*line, *words], root, tmp_path).calls if call.name != "start"]
    shutil.rmtree(root)
    shutil.copytree(tmp_path / "before", root)
    outcome = faults.merge([*line, *words], root, tmp_path, faults.Fault("killed before", max(1, int(at * len(calls)))))
    assert outcome.code == -9
    assert {*os.listdir(root)} <= {"merged", "merged.partial"}
    if merge.out.exists():
        assert without_record(faults.picture(merge.out)) == without_record(faults.picture(merge.local()))
    merge.part("1/1")
    merge.finish()
    merge.check()


def test_a_worker_whose_output_is_published_has_nothing_to_do(merge: Merge) -> None:
    merge.part("1/1")
    merge.finish()
    before = snapshot(merge.out.parent)
    report = merge.part("1/2")
    assert report.published
    assert report.made == ()
    again = merge.finish()
    assert not again.published
    assert again.merge is None
    assert merge.status().published
    assert snapshot(merge.out.parent) == before


def test_a_worker_that_planned_before_the_output_was_published_leaves_nothing(merge: Merge) -> None:
    """It finds the output complete when it begins to work, and no stage is left."""
    opened = parted_merge.open_parts(merge.base, merge.adapter, merge.out, MergeOptions(device="cpu"))
    merge.part("1/1")
    merge.finish()
    assert not opened.published
    assert in_parts.make_parts(opened, opened.parts, "1/1").published
    assert not in_parts.publish(opened).published
    merge.check()


# ---------------------------------------------------------------- damage


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


def truncate(path: Path, _at: int) -> None:
    os.truncate(path, 20_000)


def extend(path: Path, _at: int) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def remove(path: Path, _at: int) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, extend, remove])
@pytest.mark.parametrize("place", [10, 5000, 30_000, -1])
def test_damaged_data_is_found_by_finish_and_made_again(merge: Merge, damage: Callable[..., None], place: int) -> None:
    """In the header, in the middle, or at the end of a file."""
    merge.part("1/1")
    damage(merge.stage / "model" / "model-00002-of-00002.safetensors", place)
    with pytest.raises(VerificationError, match="damaged") as caught:
        merge.finish()
    assert all("part-00001" in problem for problem in caught.value.problems)
    with pytest.raises(VerificationError, match="parts are missing"):
        merge.finish()
    assert not merge.out.exists()
    assert {name.partition(":")[0] for name in caught.value.problems} == {*merge.part("1/1").made}
    merge.finish()
    merge.check()


def test_a_worker_that_is_started_again_trusts_no_data_without_its_digest(merge: Merge) -> None:
    merge.part("1/1")
    flip(merge.stage / "model" / "model-00001-of-00002.safetensors", 14_000)
    report = merge.part("1/1")
    assert len(report.redone) == len(report.made) == 1
    merge.finish()
    merge.check()


def lengths(record: PartRecord) -> list[int]:
    """How many chunks each tensor of a part has in it."""
    assert record.digest.tree is not None
    return [len(each) for each in record.digest.tree.tensors.values() if isinstance(each, tuple)]


def of_other_bytes(record: PartRecord) -> bytes:
    assert record.digest.tree is not None
    digests = dict(zip(record.digest.tree.tensors, lengths(record), strict=True))
    lies: dict[str, Listed] = {name: ("0" * 64,) * count for name, count in digests.items()}
    tree = dataclasses.replace(record.digest.tree, tensors=lies)
    return dataclasses.replace(record, digest=dataclasses.replace(record.digest, tree=tree)).to_bytes()


def of_another_merge(record: PartRecord) -> bytes:
    return dataclasses.replace(record, plan="0" * 64).to_bytes()


def with_a_flipped_bit(record: PartRecord) -> bytes:
    raw = bytearray(record.to_bytes())
    raw[len(raw) // 2] ^= 1
    return bytes(raw)


def torn(record: PartRecord) -> bytes:
    return record.to_bytes()[:100]


def with_other_edges(record: PartRecord) -> bytes:
    edges = dict.fromkeys(record.details["edges"], "AAAA")
    return dataclasses.replace(record, details={"edges": edges}).to_bytes()


@pytest.mark.parametrize("lie", [of_other_bytes, of_another_merge, with_a_flipped_bit, torn, with_other_edges])
def test_a_record_that_lies_is_found_and_its_part_made_again(merge: Merge, lie: Callable[[PartRecord], bytes]) -> None:
    merge.part("1/1")
    name = sorted(merge.status().done)[1]
    path = record_of(merge, name)
    record = PartRecord.of_bytes(path.read_bytes())
    assert record is not None
    path.write_bytes(lie(record))
    with pytest.raises(VerificationError) as caught:
        merge.finish()
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [name]
    assert merge.part("1/1").made == (name,)
    merge.finish()
    merge.check()


def test_the_first_record_of_a_part_stands_if_its_bytes_are_still_there(merge: Merge) -> None:
    """Of two workers whose bytes differ, as updates that are no sums may on other devices, the last has overwritten them."""
    merge.part("1/1")
    name = sorted(merge.status().done)[1]
    path = record_of(merge, name)
    first = path.read_bytes()
    opened = parted_merge.open_parts(merge.base, merge.adapter, merge.out, MergeOptions(device="cpu"))
    (part,) = (part for part in opened.parts if part.name == name)
    mine = PartRecord.of_bytes(first)
    assert mine is not None
    assert isinstance(opened.output, SharedFolder)
    opened.output.put_record(part, dataclasses.replace(mine, worker="another"))
    assert path.read_bytes() == first
    path.write_bytes(of_other_bytes(mine))  # what the first one wrote is there no more
    opened.output.put_record(part, dataclasses.replace(mine, worker="another"))
    assert b'"worker": "another"' in path.read_bytes()


# ---------------------------------------------------------------- refusals


def test_finish_names_what_is_missing(merge: Merge) -> None:
    with pytest.raises(VerificationError, match="no part of this merge has been made"):
        merge.finish()
    assert os.listdir(merge.out.parent) == []
    missing = {*merge.part("1/2").made} ^ {*parts_of(merge)} & {*parts_of(merge)}
    with pytest.raises(VerificationError, match="parts are missing") as caught:
        merge.finish()
    assert {*caught.value.problems} == {*parts_of(merge)} == missing & {*parts_of(merge)}


def test_a_run_with_other_inputs_is_refused_by_the_fingerprint(merge: Merge, tmp_path: Path) -> None:
    """Whoever comes first says what is merged; paths do not matter."""
    merge.part("1/2")
    before = snapshot(merge.stage)
    for more in ({"weights": [2]}, {"rounding": "stochastic"}):
        for attempt in (merge.finish, lambda **m: merge.part("2/2", **m)):
            with pytest.raises(UsageError, match="parts of another merge"):
                attempt(**more)
    assert snapshot(merge.stage) == before
    shutil.copytree(merge.base, tmp_path / "moved" / "elsewhere")
    merge.base = tmp_path / "moved" / "elsewhere"
    merge.part("2/2")
    merge.finish()


def test_a_merge_by_one_process_keeps_away_from_one_in_parts(merge: Merge) -> None:
    merge.part("1/2")
    before = snapshot(merge.stage)
    with pytest.raises(UsageError, match="contains a merge in parts"):
        loratool.merge(merge.base, merge.adapter, merge.out)
    assert snapshot(merge.stage) == before


def test_workers_keep_away_from_an_interrupted_merge_by_one_process(merge: Merge) -> None:
    merge.stage.mkdir()
    (merge.stage / "journal").write_bytes(Journal("0" * 64).head())
    before = snapshot(merge.stage)
    with pytest.raises(UsageError, match="not made in parts"):
        merge.part("1/2")
    assert snapshot(merge.stage) == before


def test_what_others_put_into_the_stage_is_never_touched(merge: Merge) -> None:
    merge.part("1/1")
    (merge.stage / "model" / "notes.txt").write_text("mine")
    before = snapshot(merge.stage)
    for attempt in (merge.finish, lambda: merge.part("1/2")):
        with pytest.raises(StorageError, match="did not write"):
            attempt()
    assert snapshot(merge.stage) == before


def test_a_disk_without_room_is_told_before_anything_is_made(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "free_space", lambda _folder: 1000)
    with pytest.raises(StorageError, match=r"only 1.00 kB is free"):
        merge.part("1/2")
    assert os.listdir(merge.out.parent) == []


def test_a_disk_that_becomes_full_keeps_what_is_done(merge: Merge, tmp_path: Path) -> None:
    line = ["merge", str(merge.base), str(merge.adapter), "-o", str(merge.out), "--device", "cpu", "--part", "1/1"]
    outcome = faults.merge([*line, "--workers", "1"], merge.out.parent, tmp_path, faults.Fault("ENOSPC for good", 80))
    assert outcome.code == 6
    assert "the disk is full" in outcome.errors
    done = merge.status().done
    assert 0 < len(done) < 10
    assert {*merge.part("1/1").kept} == {*done}
    merge.finish()
    merge.check()


def test_an_output_that_exists_needs_overwrite(merge: Merge) -> None:
    """And is what it was until `--finish` replaces it."""
    loratool.merge(merge.base, merge.adapter, merge.out, weights=[2])
    before = snapshot(merge.out)
    for attempt in (merge.finish, lambda: merge.part("1/1")):
        with pytest.raises(UsageError, match="already exists"):
            attempt()
    merge.part("1/1", overwrite=True)
    assert snapshot(merge.out) == before
    merge.finish(overwrite=True)
    assert without_record(faults.picture(merge.out)) == without_record(faults.picture(merge.local()))
    assert os.listdir(merge.out.parent) == ["merged"]


# ---------------------------------------------------------------- two at once


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
def test_of_two_that_finish_at_once_one_publishes_and_the_other_says_so(merge: Merge, existing: bool) -> None:
    for _ in range(3):
        if existing:
            loratool.merge(merge.base, merge.adapter, merge.out, weights=[2], overwrite=True)
        elif merge.out.exists():
            shutil.rmtree(merge.out)
        merge.part("1/1", overwrite=existing)
        results = together([lambda: merge.finish(overwrite=existing)] * 2)
        told = [result for result in results if isinstance(result, FinishReport)]
        assert sum(report.published for report in told) == 1
        busy = [result for result in results if isinstance(result, LoratoolError)]
        assert all("another --finish is running" in str(error) for error in busy)
        assert without_record(faults.picture(merge.out)) == without_record(faults.picture(merge.local()))
        assert os.listdir(merge.out.parent) == ["merged"]


def test_finish_takes_over_from_one_that_was_killed(merge: Merge) -> None:
    """A file of a process that is there no more does not stand in its way; one of a live process does."""
    merge.part("1/1")
    folder = merge.stage / "parts"
    gone = presence.Presence(folder, "--finish")
    gone.tell()
    (folder / "finish-000001.json").write_text(json.dumps({"worker": gone.path.name}))
    with pytest.raises(UsageError, match="another --finish is running"):
        merge.finish()
    table = json.loads(gone.path.read_text())
    gone.path.write_text(json.dumps({**table, "host": "elsewhere"}))
    with pytest.raises(UsageError, match="elsewhere process"):
        merge.finish()
    os.utime(gone.path, (0, 0))  # silent for long
    assert merge.finish().published
    merge.check()


# ---------------------------------------------------------------- status


def test_status_tells_what_is_done_missing_and_running_and_by_whom(
    merge: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    made = merge.part("1/2").made
    worker = presence.Presence(merge.stage / "parts", "2/2")
    worker.begin(parts_of(merge)[0])
    before = snapshot(merge.out.parent)
    status = merge.status()
    assert {*status.done} == {*made}
    assert {*status.done} | {*status.missing} == {*status.done, *parts_of(merge)}
    assert len(status.done) + len(status.missing) == status.parts == 10
    assert [(each.share, each.parts, each.alive) for each in status.running] == [("2/2", status.missing[:1], True)]
    assert status.running[0].worker == worker.name
    assert {*status.done.values()} == {worker.name}
    assert f"{worker.name} ({len(status.done)} part" in str(status)
    assert 0 < status.bytes_done < status.bytes_all == sum(f.stat().st_size for f in merge.base.glob("*.safetensors"))
    line = ["merge", str(merge.base), str(merge.adapter), "-o", str(merge.out), "--status"]
    assert run([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == [*status.missing]
    assert run(line) == 0
    assert "5 of 10 parts" in capsys.readouterr().out
    assert snapshot(merge.out.parent) == before


def test_the_age_of_a_worker_is_told_by_the_clock_of_the_file_system(
    merge: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose own clock is off by a year sees the same ages."""
    merge.part("1/2")
    presence.Presence(merge.stage / "parts", "2/2").tell()
    monkeypatch.setattr("time.time", lambda: 0.0)
    (found,) = merge.status().running
    assert found.seconds < 30
    assert found.alive


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--part", "1/2", "--finish"], "--part and --finish"),
        (["--finish", "--status"], "--finish and --status"),
        (["--part", "1/2", "--dry-run"], "--part and --dry-run"),
        (["--part", "1/2", "--push-to-hub", "me/it"], "with --finish"),
        (["--status", "--also", "other=adapter"], "--status and --also"),
        (["--part", "0/4"], "from 1 to N"),
        (["--part", "5/4"], "from 1 to N"),
        (["--part", "half"], "must be I/N"),
    ],
)
def test_words_that_contradict_each_other(
    merge: Merge, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    assert run(["merge", str(merge.base), str(merge.adapter), "-o", str(merge.out), *words]) == 2
    assert named in capsys.readouterr().err
    assert os.listdir(merge.out.parent) == []


def test_links_are_not_needed(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have none; names are then given by renames."""

    def refused(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    merge.part("1/2")
    merge.part("2/2")
    merge.part("1/1")
    merge.finish()
    merge.check()


def test_abort_removes_the_stage_and_nothing_else(merge: Merge, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["merge", str(merge.base), str(merge.adapter), "-o", str(merge.out), "--abort"]
    assert run(line) == 2
    assert "no unfinished merge" in capsys.readouterr().err
    merge.part("1/2")
    worker = presence.Presence(merge.stage / "parts", "2/2")
    worker.tell()
    with pytest.raises(UsageError, match="workers are running"):
        loratool.abort_merge(merge.out)
    worker.path.unlink()
    (merge.stage / "mine.txt").write_text("mine")
    before = snapshot(merge.stage)
    with pytest.raises(StorageError, match="did not write"):
        loratool.abort_merge(merge.out)
    assert snapshot(merge.stage) == before
    (merge.stage / "mine.txt").unlink()
    capsys.readouterr()
    assert run(line) == 0
    assert capsys.readouterr().out.split() == ["output", str(merge.out), "removed", f"{merge.out}.partial"]
    assert os.listdir(merge.out.parent) == []
