"""Signals, kills, rivals and full disks, as the system really deals them: a real process on 32 MB in 12 files.

All of these processes but the first are forks of this one.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import faults
import pytest
import torch
from faults import Picture, picture
from forks import Forked
from safetensors.torch import load_file

SHARDS, HIDDEN, RANK = 12, 512, 8
OUT, PARTIAL = "out", "out.partial"
SOON = 2.0  # seconds within which an interrupted run has to end; it promises one, on a machine that is not busy


@dataclass(frozen=True)
class Workshop:
    """A base, an adapter, and what their merge must give."""

    home: Path
    expected: Picture
    length: float  # seconds of a whole merge, from when OUT.partial is there

    @property
    def base(self) -> Path:
        return self.home / "inputs" / "base"

    def words(self, out: Path, *more: str) -> list[str]:
        adapter = str(self.home / "inputs" / "adapter")
        return ["merge", str(self.base), adapter, "-o", str(out), "--device", "cpu", "--workers", "1", *more]

    def command(self, out: Path, *more: str) -> list[str]:
        return [sys.executable, "-m", "loratool", *self.words(out, *more)]

    def begin(self, out: Path, *more: str, prepare: Callable[[], object] | None = None) -> Forked:
        """A merge into `out`, in a process group of its own."""
        return Forked(self.words(out, *more), prepare)

    def run(self, out: Path, *more: str) -> tuple[int, str, str]:
        process = self.begin(out, *more)
        output, errors = process.communicate(timeout=120)
        assert process.returncode is not None
        return process.returncode, output, errors

    def check(self, out: Path) -> bool:
        """Whether `out` is there; it is complete then, and nothing is anywhere but in it and in OUT.partial."""
        assert {path.name for path in out.parent.iterdir()} <= {OUT, PARTIAL}
        if out.exists():
            assert picture(out) == self.expected
        return out.exists()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """A base of 32 MB; all of it goes when the tests are done."""
    home = tmp_path_factory.mktemp("interrupts")
    faults.warm_up()
    faults.make_base(home / "inputs" / "base", shards=SHARDS, hidden=HIDDEN)
    faults.make_adapter(home / "inputs" / "adapter", layers=SHARDS, hidden=HIDDEN, rank=RANK)
    out = home / "reference" / OUT
    out.parent.mkdir()
    subprocess.run(Workshop(home, {}, 0).command(out), check=True, capture_output=True, timeout=120)
    expected = picture(out)
    shutil.rmtree(out)
    process = Workshop(home, {}, 0).begin(out)
    wait_for(out.with_name(PARTIAL), process)
    began = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert picture(out) == expected  # a fork does what a process does that begins by itself
    yield Workshop(home, expected, time.monotonic() - began)
    shutil.rmtree(home)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where to merge to: alone in its folder, and gone after the test."""
    yield tmp_path / OUT
    for path in tmp_path.iterdir():
        shutil.rmtree(path)


def wait_for(partial: Path, process: Forked, finished: int = 0) -> None:
    """Until OUT.partial is there, with so many finished files in its journal, or the process has ended."""
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        with suppress(FileNotFoundError):
            if partial.stat() and (not finished or len(finished_files(partial)) >= finished):
                return
        time.sleep(0.001)


def finished_files(partial: Path) -> list[str]:
    """The output files that the journal speaks of, in lines that are whole."""
    return re.findall(r'"name": "([^"]+)".*"root": "\w{64}".*}\n', (partial / "journal").read_text())


def test_the_reference_is_the_formula(workshop: Workshop) -> None:
    adapter = load_file(workshop.home / "inputs" / "adapter" / "adapter_model.safetensors")
    name = "model-00003-of-00012.safetensors"
    merged = load_file(workshop.home / "reference" / OUT / name)
    for tensor, weight in load_file(workshop.base / name).items():
        key = f"base_model.model.{tensor.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            down, up = adapter[f"{key}.lora_A.weight"], adapter[f"{key}.lora_B.weight"]
            weight = (weight.double() + 2 * (up.double() @ down.double())).bfloat16()
            torch.testing.assert_close(merged[tensor], weight, rtol=2**-7, atol=1e-4)
            assert (merged[tensor] == weight).double().mean() > 0.99
        else:
            assert torch.equal(merged[tensor], weight)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_any_moment_ends_the_run_soon_and_leaves_no_half_output(
    workshop: Workshop, out: Path, number: signal.Signals, status: int
) -> None:
    """Every run goes on with what the one before has left."""
    for percent in (10, 30, 50, 70, 90) if number == signal.SIGINT else (20, 50, 80):
        process = workshop.begin(out)
        wait_for(out.with_name(PARTIAL), process)
        time.sleep(workshop.length * percent / 100)
        sent = time.monotonic()
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        took = time.monotonic() - sent
        if workshop.check(out):  # finished before the signal came
            assert process.returncode in (0, status)
            shutil.rmtree(out)
            continue
        assert process.returncode == status, (percent, errors)
        assert took < SOON, f"{took:.1f} s from the signal at {percent} % to the end"
        assert output == ""
        assert errors.strip() == "Interrupted; run the same command again to continue."
    code, _, errors = workshop.run(out)
    assert code == 0, errors
    assert workshop.check(out)
    assert not out.with_name(PARTIAL).exists()


def test_a_second_ctrl_c_ends_the_run_at_once_and_does_no_harm(workshop: Workshop, out: Path) -> None:
    for pause in (0.0, 0.05, 0.3):
        shutil.rmtree(out.with_name(PARTIAL), ignore_errors=True)  # by which is seen that the run has begun
        process = workshop.begin(out)
        wait_for(out.with_name(PARTIAL), process, finished=2)
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - sent < SOON / 2
        assert process.returncode in (130, -signal.SIGINT), errors
        assert "Traceback" not in errors
        assert not workshop.check(out)
    code, _, errors = workshop.run(out)
    assert code == 0, errors
    assert workshop.check(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_the_caller_has_set_aside_does_not_end_the_run(
    workshop: Workshop, out: Path, number: signal.Signals
) -> None:
    """As under `nohup`, or in the background of a script."""
    process = workshop.begin(out, prepare=lambda: signal.signal(number, signal.SIG_IGN))
    wait_for(out.with_name(PARTIAL), process, finished=2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert workshop.check(out)


def test_kills_at_random_moments_leave_the_output_absent_or_complete(workshop: Workshop, out: Path) -> None:
    """6 kills, each of a run that goes on with what the one before has left."""
    chance = random.Random(0)
    inputs = picture(workshop.home / "inputs")
    for _ in range(4):
        process = workshop.begin(out)
        wait_for(out.with_name(PARTIAL), process)
        time.sleep(workshop.length * chance.random())
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL)
        if workshop.check(out):
            shutil.rmtree(out)
    assert picture(workshop.home / "inputs") == inputs
    code, _, errors = workshop.run(out)
    assert code == 0, errors
    assert workshop.check(out)
    assert not out.with_name(PARTIAL).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_rerun_continues_with_the_finished_files_and_says_so(
    workshop: Workshop, out: Path, number: signal.Signals
) -> None:
    interrupt_after(2, workshop, out, number)
    finished = finished_files(out.with_name(PARTIAL))
    kept = {name: os.stat(out.with_name(PARTIAL) / "model" / name).st_ino for name in finished}
    assert 2 <= len(finished) < SHARDS
    if number == signal.SIGINT:
        code, output, errors = workshop.run(out, "--json")
        assert sorted(json.loads(output)["resumed"]) == sorted(finished)
    else:
        code, output, errors = workshop.run(out)
        assert f"{len(finished)} finished files of an interrupted run were kept" in output
    assert code == 0, errors
    assert workshop.check(out)
    assert {name: os.stat(out / name).st_ino for name in finished} == kept


def interrupt_after(finished: int, workshop: Workshop, out: Path, number: signal.Signals) -> None:
    """A run that is stopped when its journal speaks of so many finished files."""
    process = workshop.begin(out)
    wait_for(out.with_name(PARTIAL), process, finished)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not workshop.check(out)


def test_a_run_with_another_weight_starts_over(workshop: Workshop, out: Path) -> None:
    assert workshop.run(out, "-w", "-0.5")[0] == 0
    wanted = picture(out)
    assert wanted != workshop.expected
    shutil.rmtree(out)
    interrupt_after(2, workshop, out, signal.SIGKILL)
    code, output, errors = workshop.run(out, "-w", "-0.5", "--json")
    assert code == 0, errors
    assert json.loads(output)["resumed"] == []
    assert picture(out) == wanted
    assert not out.with_name(PARTIAL).exists()


def test_of_runs_into_one_output_that_begin_together_exactly_one_wins(workshop: Workshop, out: Path) -> None:
    processes = [workshop.begin(out) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert Counter(process.returncode for process in processes) == {0: 1, 2: 2}, errors
    assert workshop.check(out)
    assert not out.with_name(PARTIAL).exists()


def test_a_run_that_comes_later_is_told_of_the_one_at_work_and_does_not_disturb_it(
    workshop: Workshop, out: Path
) -> None:
    first = workshop.begin(out)
    wait_for(out.with_name(PARTIAL), first, finished=1)
    first.send_signal(signal.SIGSTOP)
    before = picture(out.parent)
    try:
        for more in ([], ["--overwrite"], ["-w", "2"]):
            code, _, errors = workshop.run(out, *more)
            assert code == 2
            said, _, _ = errors.partition("\nhint: ")
            assert said.endswith(f"{PARTIAL}: another run is writing this output; wait for it to end")
        assert picture(out.parent) == before
    finally:
        first.send_signal(signal.SIGCONT)
    first.communicate(timeout=120)
    assert first.returncode == 0
    assert workshop.check(out)


def test_a_file_size_limit_is_told_and_leaves_nothing(workshop: Workshop, out: Path) -> None:
    """The kernel refuses to let a file grow: a real error of a write, without any privilege."""
    process = workshop.begin(out, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20)))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 6, errors
    assert errors.startswith("Error: ")
    assert re.fullmatch(r"Error: .*\nhint: loratool .*\n", errors)
    assert list(out.parent.iterdir()) == []


NO_DISK = 77  # the exit status of a process that got no disk of its own
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS and CLONE_NEWUSER
MOUNT = (
    'mount --make-rprivate / && mount -t tmpfs -o size="$1" tmpfs "$2" && if [ -n "$3" ]; then cp -r "$3" "$2/out"; fi'
)
LIST = "cd \"$1\" && find . -type f -exec sha256sum {} + && find . -name '*.partial'"


def in_a_disk(disk: Path, size: int, old: Path | None, listing: Path) -> Callable[[], None]:
    """What a process does to have `disk` mounted for itself alone; its parent lists the files there when it has ended."""

    def prepare() -> None:
        user, group = os.geteuid(), os.getegid()
        if ctypes.CDLL(None).unshare(NEW_USER | NEW_MOUNTS):
            os._exit(NO_DISK)
        try:
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
                Path("/proc/self", name).write_text(text)
            subprocess.run(["sh", "-c", MOUNT, "sh", str(size), disk, old or ""], check=True)
        except (OSError, subprocess.CalledProcessError):
            os._exit(NO_DISK)
        if child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with listing.open("w") as stream:
                subprocess.run(["sh", "-c", LIST, "sh", disk], stdout=stream, check=True)
            os._exit(code)

    return prepare


@dataclass(frozen=True)
class SmallDisk:
    """A merge onto a disk of its own, in a namespace of its own: what it said, and the files that are there then."""

    code: int
    errors: str
    files: dict[str, str]  # path → SHA-256


def merge_on_small_disk(workshop: Workshop, home: Path, size: int, old: Path | None = None) -> SmallDisk:
    """With `old`, a model that is there already, `--overwrite` is given."""
    disk, listing = home / "disk", home / "listing"
    disk.mkdir()
    process = workshop.begin(disk / OUT, *(["--overwrite"] if old else []), prepare=in_a_disk(disk, size, old, listing))
    _, errors = process.communicate(timeout=120)
    if process.returncode == NO_DISK:
        pytest.skip(f"no disk of our own can be had here: {errors.strip()}")
    assert process.returncode is not None
    rows = [line.split(maxsplit=1) for line in listing.read_text().splitlines()]
    return SmallDisk(process.returncode, errors, {row[-1].removeprefix("./"): row[0] for row in rows})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A model of 150 kB."""
    home = tmp_path_factory.mktemp("small")
    faults.make_base(home / "inputs" / "base", hidden=96)
    faults.make_adapter(home / "inputs" / "adapter", hidden=96)
    out = home / "reference" / OUT
    out.parent.mkdir()
    assert Workshop(home, {}, 0).run(out)[0] == 0
    return Workshop(home, picture(out), 0)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(workshop: Workshop, tmp_path: Path) -> None:
    end = merge_on_small_disk(workshop, tmp_path, 16_000_000)
    assert end.code == 6, end.errors
    assert re.search(r"needs 31\.\d\d MB of disk, but only 1[56]\.\d\d MB is free", end.errors)
    assert end.files == {}


def test_a_disk_that_fills_up_during_the_merge_is_told_and_left_as_it_was(small: Workshop, tmp_path: Path) -> None:
    """There is room for the bytes of the shards, and not for the rest of their last pages and of the last small files."""
    sizes = [path.stat().st_size for path in (small.home / "reference" / OUT).rglob("*") if path.is_file()]
    pages = sum(-(-size // 4096) for size in sizes)
    end = merge_on_small_disk(small, tmp_path, (pages - 1) * 4096)
    assert end.code == 6, end.errors
    assert re.fullmatch(r"Error: .*\nhint: loratool .*\n", end.errors)
    assert re.search(r"disk is full.*needs [\d.,]+ .* [\d.,]+ .*free", end.errors), end.errors
    assert end.files == {}


@pytest.mark.parametrize("room", [0.5, 1.0])
def test_a_disk_without_room_for_both_keeps_the_old_output(small: Workshop, tmp_path: Path, room: float) -> None:
    reference = small.home / "reference" / OUT
    pages = sum(-(-path.stat().st_size // 4096) for path in reference.rglob("*") if path.is_file())
    end = merge_on_small_disk(small, tmp_path, int((1 + room) * pages - 1) * 4096, old=reference)
    assert end.code == 6, end.errors
    assert end.files == {f"{OUT}/{name}": digest for name, digest in small.expected.items() if digest}


def test_a_disk_with_just_enough_room_will_do(small: Workshop, tmp_path: Path) -> None:
    end = merge_on_small_disk(small, tmp_path, 2 * sum(path.stat().st_size for path in small.base.glob("*")))
    assert end.code == 0, end.errors
    assert end.files == {f"{OUT}/{name}": digest for name, digest in small.expected.items() if digest}
