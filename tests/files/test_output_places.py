"""Where an output may go, and what happens when the place, the base or the terminal is not as hoped.

Rows 53 to 61 of the table of run-time cases.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Forked
from malformed import (
    ADAPTER,
    BASE,
    MODEL,
    NORM,
    SHARDS,
    WEIGHT,
    W,
    f16,
    f32,
    safetensors_bytes,
    write_adapter,
    write_base,
    write_sharded,
)
from workbench import (
    Outcome,
    Workbench,
    bound_by_permissions,
    check_is_merged,
    check_refusal,
    command,
    each,
    is_clean,
    run_apart,
    snapshot,
    tensors_of,
    within,
)

import loratool


def merge_words(bench: Workbench, *options: str | Path) -> list[str]:
    return command("merge", bench.base, bench.adapter, "-o", bench.out, *options)


# ---------------------------------------------------------------- 53: the output exists


def a_file(path: Path) -> None:
    path.write_text("mine")


def an_empty_folder(path: Path) -> None:
    path.mkdir()


def a_folder_of_other_things(path: Path) -> None:
    path.mkdir()
    (path / "photo.jpg").write_text("mine")


def an_older_model(path: Path) -> None:
    write_base(path, {"old.weight": f32(W)})
    (path / "generation_config.json").write_text("{}")


def a_dangling_link_in_a_loop(path: Path) -> None:
    path.symlink_to(path.name)


PLACES: dict[str, Callable[[Path], None]] = {
    "file": a_file,
    "empty folder": an_empty_folder,
    "folder of other things": a_folder_of_other_things,
    "model": an_older_model,
    "looping link": a_dangling_link_in_a_loop,
}


@each(PLACES)
def test_an_output_that_exists_is_not_touched_without_overwrite(bench: Workbench, case: Callable[[Path], None]) -> None:
    """Row 53."""
    case(bench.out)
    bench.refuses_to_merge(str(bench.out), code=2)
    bench.refuses_to_merge(str(bench.out), code=2, options=["--dry-run"])


def test_only_a_model_may_be_overwritten(bench: Workbench) -> None:
    """Row 53: --overwrite on a mistyped folder must not cost what is in it."""
    for place in (a_file, a_folder_of_other_things, a_dangling_link_in_a_loop):
        place(bench.out)
        bench.refuses_to_merge(str(bench.out), code=2, options=["--overwrite"])
        shutil.rmtree(bench.out) if bench.out.is_dir() else bench.out.unlink()


def test_overwriting_leaves_the_new_model_and_nothing_of_the_old(bench: Workbench) -> None:
    """Row 53."""
    an_older_model(bench.out)
    tensors, _ = bench.merges("--overwrite")
    check_is_merged(tensors)
    assert sorted(os.listdir(bench.out)) == ["README.md", "config.json", "loratool.json", MODEL]


def test_a_failed_merge_leaves_the_model_that_it_was_to_overwrite(bench: Workbench) -> None:
    """Row 53: this one fails while computing, when some of the new model is written."""
    an_older_model(bench.out)
    write_base(bench.base, {**BASE, WEIGHT: f16(W)})
    write_adapter(bench.adapter, lora_alpha=1e9)
    bench.refuses_to_merge(WEIGHT, code=4, options=["--overwrite"])


STRANGERS: dict[str, Callable[[Path], None]] = {
    "file": a_file,
    "folder of other things": a_folder_of_other_things,
    "model": an_older_model,
    "link to a folder": lambda path: path.symlink_to("."),
    "dangling link": lambda path: path.symlink_to("nowhere"),
}


@each(STRANGERS)
def test_a_stranger_under_the_stage_s_name_is_not_touched(bench: Workbench, case: Callable[[Path], None]) -> None:
    """Row 53, for OUT.partial."""
    case(bench.outputs / "merged.partial")
    bench.refuses_to_merge("merged.partial", code=6)
    bench.refuses_to_merge("merged.partial", code=6, options=["--dry-run"])


def test_an_output_named_like_a_file_is_refused(bench: Workbench) -> None:
    """Row 53: somebody who wants one file gets told that OUT is a folder."""
    out = bench.outputs / "merged.safetensors"
    bench.refuses("merge", bench.base, bench.adapter, "-o", out, told=[str(out), "folder"], code=2)


# ---------------------------------------------------------------- 54: the output is an input


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("owner", ["base", "adapter"])
def test_an_output_that_is_in_or_around_an_input_is_refused(bench: Workbench, owner: str, options: list[str]) -> None:
    """Row 54, by plain names, by links, and by detours."""
    operand = bench.inputs / owner
    (bench.inputs / "link").symlink_to(owner)
    (operand / "sub").mkdir()
    (bench.outputs / "way").symlink_to(bench.inputs)
    for out in (
        operand,
        operand / "merged",
        operand / "sub" / "merged",
        operand / "sub" / ".." / "merged",
        operand / "sub" / "..",
        bench.inputs,
        bench.inputs / "link",
        bench.inputs / "link" / "merged",
        bench.outputs / "way" / owner / "merged",
        bench.outputs / "way",
        operand / ".",
    ):
        bench.refuses("merge", bench.base, bench.adapter, "-o", out, *options, told=[str(out)], code=2)


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_an_output_around_a_base_of_one_file_is_refused(bench: Workbench, options: list[str]) -> None:
    """Row 54."""
    file = bench.base / MODEL
    for out in (bench.base, bench.inputs):
        bench.refuses("merge", file, bench.adapter, "-o", out, *options, told=[str(out)], code=2)


def test_an_output_under_another_mount_of_an_input_is_refused(bench: Workbench) -> None:
    """Row 54: the same inode under another name that no link explains."""
    other = bench.outputs / "mounted"
    other.mkdir()
    words = command("merge", bench.base, bench.adapter, "-o", other / "merged")
    before = snapshot(bench.inputs)
    outcome = run_apart(mounted(["mount", "--bind", str(bench.base), str(other)], words))
    check_refusal(outcome, ["merged", "input"], 2)
    assert snapshot(bench.inputs) == before


def mounted(mount: list[str], words: list[str]) -> list[str]:
    """A command in a mount namespace of its own, after the command `mount`."""
    enter = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    try:
        subprocess.run([*enter, *mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mount namespaces here")
    return [*enter, "sh", "-c", f'{" ".join(mount)} && exec "$@"', "sh", *words]


@each({"the stage": "", "the unfinished model in it": "model"})
@pytest.mark.parametrize("owner", ["base", "adapter"])
def test_a_stage_that_is_an_input_is_not_cleared_away(bench: Workbench, owner: str, case: str) -> None:
    """Row 54: OUT.partial of a killed run is the input somebody rescues from it."""
    stage = bench.inputs / "merged.partial"
    kept = stage / case
    kept.parent.mkdir(exist_ok=True)
    (bench.inputs / owner).rename(kept)
    (stage / "journal").write_text('{"plan": "another"}\n')
    operands = [kept if owner == name else bench.inputs / name for name in ("base", "adapter")]
    bench.refuses("merge", *operands, "-o", bench.inputs / "merged", told=["merged"], code=2)


# ---------------------------------------------------------------- 55: two runs, one output


def test_an_output_that_another_process_is_writing_is_refused_until_that_process_is_gone(bench: Workbench) -> None:
    """Row 55: the lock dies with its holder, however it ends."""
    stage = bench.outputs / "merged.partial"
    stage.mkdir()
    hold = "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-uc", hold, str(stage)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            outcome = bench.refuses_to_merge("merged.partial", "another run", code=2)
            assert outcome.seconds < 5
        finally:
            holder.kill()
    tensors, _ = bench.merges()
    check_is_merged(tensors)


def test_of_two_runs_at_once_one_wins_and_the_other_says_why(bench: Workbench) -> None:
    """The loser finds the output, the lock of the winner, or, having planned before the winner was done, an output that
    appeared meanwhile: it says which, and leaves it alone."""
    runs = [
        Forked(["merge", str(bench.base), str(bench.adapter), "-o", str(bench.out), "--device", "cpu"])
        for _ in range(2)
    ]
    said = [run.communicate(timeout=60) for run in runs]
    winner, loser = sorted(
        (Outcome(run.returncode or 0, out, err, 0.0) for run, (out, err) in zip(runs, said, strict=True)),
        key=lambda outcome: outcome.code,
    )
    assert winner.code == 0, winner
    check_refusal(loser, ["merged"], 2)
    assert any(why in loser.err for why in ("another run", "already exists", "was created by something else"))
    assert os.listdir(bench.outputs) == ["merged"]
    check_is_merged(tensors_of(bench.out))


# ---------------------------------------------------------------- 56: a place that is not writable

TELL_TORCH = "import sys; from loratool.cli import run; code = run(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"


def early(words: list[str]) -> list[str]:
    """The same command, which must end before torch is there: before any arithmetic."""
    return [sys.executable, "-c", TELL_TORCH, *words[3:]]


@each({"missing": "no/such/folder", "a file": "file", "a file that may be run": "program", "below a file": "file/x"})
def test_a_parent_that_is_missing_or_no_folder_is_told_before_computing(bench: Workbench, case: str) -> None:
    """Row 56."""
    (bench.outputs / "file").write_text("mine")
    (bench.outputs / "program").write_text("mine")
    (bench.outputs / "program").chmod(0o755)
    out = bench.outputs / case / "merged"
    bench.refuses("merge", bench.base, bench.adapter, "-o", out, told=[str(out)], code=6)
    bench.refuses("merge", bench.base, bench.adapter, "-o", out, "--dry-run", told=[str(out)], code=6)


def test_a_folder_without_write_permission_is_told_before_computing(bench: Workbench) -> None:
    """Row 56."""
    bench.outputs.chmod(0o555)
    outcome = run_apart(bound_by_permissions(early(merge_words(bench))))
    bench.outputs.chmod(0o755)
    check_refusal(outcome, [str(bench.out), "is not writable"], 6)
    assert list(bench.outputs.iterdir()) == []


def test_a_folder_without_search_permission_is_told_before_computing(bench: Workbench) -> None:
    """Row 56."""
    bench.outputs.chmod(0o000)
    outcome = run_apart(bound_by_permissions(early(merge_words(bench))))
    bench.outputs.chmod(0o755)
    check_refusal(outcome, [str(bench.out)], 6)
    assert list(bench.outputs.iterdir()) == []


def test_a_read_only_file_system_is_told_before_computing(bench: Workbench) -> None:
    """Row 56: modes allow it, and root is not let in either."""
    place = str(bench.outputs)
    words = ["sh", "-c", f'mount --bind {place} {place} && mount -o remount,bind,ro {place} && exec "$@"', "sh"]
    outcome = run_apart(mounted(["true"], [*words, *early(merge_words(bench))]))
    check_refusal(outcome, [str(bench.out), "is not writable"], 6)
    assert list(bench.outputs.iterdir()) == []


# ---------------------------------------------------------------- 57: the output is a link


def test_a_link_to_a_model_is_overwritten_at_its_target_only_when_asked(bench: Workbench) -> None:
    """Row 57: the link stays, and the report names the folder that was written."""
    real = bench.outputs / "real"
    an_older_model(real)
    bench.out.symlink_to("real")
    bench.refuses_to_merge(str(bench.out), code=2)
    outcome = bench.run("merge", bench.base, bench.adapter, "-o", bench.out, "--overwrite")
    assert outcome.code == 0
    assert str(real) in outcome.out
    assert os.readlink(bench.out) == "real"
    assert sorted(os.listdir(bench.outputs)) == ["merged", "real"]
    check_is_merged(tensors_of(real))


def test_a_link_to_nothing_yet_becomes_a_link_to_the_model(bench: Workbench) -> None:
    """Row 57."""
    bench.out.symlink_to("real")
    outcome = bench.run("merge", bench.base, bench.adapter, "-o", bench.out)
    assert outcome.code == 0
    assert str(bench.outputs / "real") in outcome.out
    assert bench.out.is_symlink()
    check_is_merged(tensors_of(bench.outputs / "real"))


def test_a_link_to_a_folder_of_other_things_is_not_followed_even_with_overwrite(bench: Workbench) -> None:
    """Row 57."""
    a_folder_of_other_things(bench.outputs / "real")
    bench.out.symlink_to("real")
    bench.refuses_to_merge(str(bench.out), code=2, options=["--overwrite"])


# ---------------------------------------------------------------- 58: an input changes during the run


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"more")


def rewrite_the_same_bytes(path: Path) -> None:
    raw = path.read_bytes()
    with path.open("r+b") as stream:
        stream.write(raw)


def change_a_byte(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")


def replace(path: Path) -> None:
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw)


def remove(path: Path) -> None:
    path.unlink()


CHANGES: dict[str, Callable[[Path], None]] = {
    change.__name__: change for change in (cut, empty, lengthen, rewrite_the_same_bytes, change_a_byte, replace, remove)
}


def long_ago(folder: Path) -> None:
    """Date all files back, so that any later change shows in their time."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (1e9, 1e9))


def interfere(bench: Workbench, when: Callable[[int, int], bool], what: Callable[[], None]) -> str:
    """Merge, do `what` the first time that `when` holds of the progress, and give the error's text."""
    done: list[int] = []

    def progress(count: int, total: int) -> None:
        if not done and when(count, total):
            done.append(count)
            what()

    with within(15), pytest.raises(loratool.InputError) as caught:
        loratool.merge(bench.base, bench.adapter, bench.out, workers=1, progress=progress)
    assert done
    assert list(bench.outputs.iterdir()) == []
    return str(caught.value)


@each(CHANGES)
def test_a_base_that_changes_before_its_first_byte_is_read_stops_the_merge(
    bench: Workbench, case: Callable[[Path], None]
) -> None:
    """Row 58."""
    long_ago(bench.inputs)
    path = bench.base / MODEL
    assert MODEL in interfere(bench, lambda count, _: count == 0, lambda: case(path))


@each({name: change for name, change in CHANGES.items() if change not in (replace, remove)})
def test_a_base_that_changes_while_it_is_read_stops_the_merge(bench: Workbench, case: Callable[[Path], None]) -> None:
    """Row 58: after one tensor and before the last. A file that is replaced is still open as it was."""
    long_ago(bench.inputs)
    path = bench.base / MODEL
    assert MODEL in interfere(bench, lambda count, total: 0 < count < total, lambda: case(path))


@each({change.__name__: change for change in (cut, change_a_byte, replace, remove)})
def test_a_later_shard_that_changes_stops_the_merge(bench: Workbench, case: Callable[[Path], None]) -> None:
    """Row 58: the first shard is finished by then, and goes away again."""
    write_sharded(bench.base)
    long_ago(bench.inputs)
    path = bench.base / SHARDS[1]
    assert SHARDS[1] in interfere(bench, lambda count, _: count == 0, lambda: case(path))


@each({change.__name__: change for change in (cut, change_a_byte, replace, remove)})
def test_an_adapter_that_changes_before_it_is_merged_stops_the_merge(
    bench: Workbench, case: Callable[[Path], None]
) -> None:
    """Row 58, for the other input."""
    long_ago(bench.inputs)
    path = bench.adapter / ADAPTER
    assert ADAPTER in interfere(bench, lambda count, _: count == 0, lambda: case(path))


def test_a_base_that_is_replaced_while_it_is_read_gives_the_old_model_or_an_error(bench: Workbench) -> None:
    """Row 58: never a mixture of two files."""
    long_ago(bench.inputs)
    path = bench.base / MODEL

    def swap() -> None:
        new = bench.base / "new"
        new.write_bytes(safetensors_bytes({name: f32(-W) if name == WEIGHT else t for name, t in BASE.items()}))
        new.replace(path)

    done: list[int] = []

    def progress(count: int, total: int) -> None:
        if not done and 0 < count < total:
            done.append(count)
            swap()

    try:
        loratool.merge(bench.base, bench.adapter, bench.out, workers=1, progress=progress)
    except loratool.InputError:
        assert list(bench.outputs.iterdir()) == []
    else:
        check_is_merged(tensors_of(bench.out))
    assert done


# ---------------------------------------------------------------- 59: names that meet on some file systems

TWINS: dict[str, tuple[str, str]] = {
    "case": ("Notes.txt", "notes.TXT"),
    "Unicode forms": ("caf\u00e9.txt", "cafe\u0301.txt"),
    "sharp s": ("stra\u00dfe.txt", "strasse.txt"),
    "case of a folder": ("Docs/a.txt", "docs/a.txt"),
    "config": ("config.json", "CONFIG.JSON"),
    "provenance": ("LoraTool.json", "x.txt"),
}


@each(TWINS)
def test_side_files_that_some_file_systems_take_for_one_are_refused(bench: Workbench, case: tuple[str, str]) -> None:
    """Row 59. The last would meet with a file that a merge makes itself."""
    for name in case:
        (bench.base / name).parent.mkdir(exist_ok=True)
        (bench.base / name).write_text("{}")
    bench.refuses_to_merge("only in case", *(name for name in case if name != "x.txt"))


def test_shards_that_some_file_systems_take_for_one_are_refused(bench: Workbench) -> None:
    """Row 59."""
    (bench.base / MODEL).unlink()
    (bench.base / "part.safetensors").write_bytes(safetensors_bytes({WEIGHT: BASE[WEIGHT]}))
    (bench.base / "Part.safetensors").write_bytes(safetensors_bytes({NORM: BASE[NORM]}))
    bench.refuses_to_merge("only in case", "part.safetensors", "Part.safetensors")


# ---------------------------------------------------------------- 60: strange paths

PATHS: dict[str, bytes] = {
    "blanks": b" a  b ",
    "quotes": b'it\'s "$(touch x)" `y`; * ? [z]',
    "line end": b"one\ntwo",
    "terminal codes": b"\x1b[31mred\x1b]0;t\x07",
    "not UTF-8": b"caf\xe9 \xff\xfe",
    "Unicode": "模型 é 🦙 \u202e".encode(),
    "percent and braces": b"%s{0}%(x)d",
    "dash": b"-o",
    "like a Hub id": b"name@main",
    "255 bytes": b"n" * 255,
    "backslash": b"a\\b",
}


@each(PATHS)
def test_inputs_may_have_any_name(bench: Workbench, case: bytes) -> None:
    """Row 60."""
    name = os.fsdecode(case)
    for owner in ("base", "adapter"):
        (bench.inputs / owner / "sub").mkdir()
        folder = bench.inputs / owner / "sub" / name
        folder.mkdir()
        for path in list((bench.inputs / owner).iterdir()):
            if path.is_file():
                path.rename(folder / path.name)
    bench.base, bench.adapter = bench.base / "sub" / name, bench.adapter / "sub" / name
    (bench.base / name).write_text("a side file")
    tensors, _ = bench.merges()
    check_is_merged(tensors)
    assert (bench.out / name).read_text() == "a side file"
    for words in (
        ("inspect", bench.base, bench.adapter),
        ("merge", bench.base, bench.adapter, "-o", bench.outputs / "again", "--dry-run"),
        ("merge", bench.base, bench.adapter, "-o", bench.outputs / "again"),
    ):
        outcome = bench.run(*words)
        assert outcome.code == 0, outcome
        assert is_clean(outcome.out + outcome.err)
    (bench.base / MODEL).write_bytes(b"\x1b")
    bench.refuses("merge", bench.base, bench.adapter, "-o", bench.outputs / "third", told=[MODEL])


@each({name: path for name, path in PATHS.items() if name != "255 bytes"})
def test_an_output_may_have_any_name(bench: Workbench, case: bytes) -> None:
    """Row 60."""
    bench.out = bench.outputs / os.fsdecode(case)
    tensors, report = bench.merges()
    check_is_merged(tensors)
    assert report["out"] == str(bench.out)
    outcome = bench.run("merge", bench.base, bench.adapter, "-o", bench.out, "--overwrite")
    assert outcome.code == 0
    assert is_clean(outcome.out + outcome.err)
    bench.refuses_to_merge("already exists", code=2)


def test_shards_may_have_any_name(bench: Workbench) -> None:
    """Row 60: names that need no index, and then get one that can be read again."""
    (bench.base / MODEL).unlink()
    for number, name in enumerate(BASE, 1):
        shard = os.fsdecode(b"a \n\xff-%05d-of-00003.safetensors" % number)
        (bench.base / shard).write_bytes(safetensors_bytes({name: BASE[name]}))
    outcome = bench.run("merge", bench.base, bench.adapter, "-o", bench.out)
    assert is_clean(outcome.out + outcome.err)
    if outcome.code:
        check_refusal(outcome, ["-of-00003.safetensors"], 3)
    else:
        assert bench.run("inspect", bench.out).code == 0


def test_an_output_name_of_any_length_works_or_is_refused_in_a_sentence(bench: Workbench) -> None:
    """Row 60: 255 bytes are the most that a name may have, and the stage's is longer."""
    worked = 0
    for length in (240, 247, 248, 255, 256, 300):
        out = bench.outputs / ("n" * length)
        outcome = bench.run("merge", bench.base, bench.adapter, "-o", out)
        if outcome.code == 0:
            worked += 1
            check_is_merged(tensors_of(out))
            shutil.rmtree(out)
        else:
            assert outcome.code in (2, 6), outcome
            check_refusal(outcome, ["nnnnnnnn", "too long"], outcome.code)
        assert list(bench.outputs.iterdir()) == []
    assert worked >= 2


@each({"output": "out", "base": "base", "adapter": "adapter"})
def test_a_path_over_4096_bytes_is_refused_in_a_sentence(bench: Workbench, case: str) -> None:
    """Row 60."""
    deep = bench.outputs.joinpath(*["d" * 200] * 25)
    words = {"base": bench.base, "adapter": bench.adapter, "out": bench.out, case: deep}
    outcome = bench.run("merge", words["base"], words["adapter"], "-o", words["out"])
    assert outcome.code in ((2, 6) if case == "out" else (3, 6))
    check_refusal(outcome, ["ddd", "too long"], outcome.code)
    assert list(bench.outputs.iterdir()) == []


def test_a_deep_folder_is_taken(bench: Workbench) -> None:
    """Row 60: nearly as deep as the system goes."""
    deep = bench.outputs.joinpath(*["d" * 200] * 18)
    deep.mkdir(parents=True)
    out = deep / "merged"
    outcome = bench.run("merge", bench.base, bench.adapter, "-o", out)
    assert outcome.code == 0, outcome
    check_is_merged(tensors_of(out))


def test_a_relative_output_lies_where_the_command_was_given(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 60."""
    monkeypatch.chdir(bench.outputs)
    for out in ("merged", "./two/", "three//"):
        assert bench.run("merge", "../in/base", "../in/adapter", "-o", out).code == 0
    assert sorted(os.listdir(bench.outputs)) == ["merged", "three", "two"]
    for out in (".", "/"):
        outcome = bench.run("merge", "../in/base", "../in/adapter", "-o", out, "--overwrite")
        check_refusal(outcome, [], 2)
    empty = bench.run("merge", "../in/base", "../in/adapter", "-o", "", "--overwrite")
    assert (empty.code, empty.out) == (2, "")
    assert "it is empty" in empty.err
    assert sorted(os.listdir(bench.outputs)) == ["merged", "three", "two"]


# ---------------------------------------------------------------- 61: stdout or stderr that takes nothing

COMMANDS: dict[str, tuple[str, ...]] = {
    "help": ("--help",),
    "inspect": ("inspect", "BASE"),
    "inspect --json": ("inspect", "BASE", "--json"),
    "plan": ("merge", "BASE", "ADAPTER", "-o", "OUT", "--dry-run"),
    "error": ("inspect", "/nonexistent"),
}


Prepare = Callable[[], None]


def full(*numbers: int) -> Prepare:
    """These streams go to a device that is full."""

    def prepare() -> None:
        for number in numbers:
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)

    return prepare


def closed(*numbers: int) -> Prepare:
    """These streams are closed; Python has nothing in their places then."""

    def prepare() -> None:
        for number in numbers:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)

    return prepare


def broken() -> None:
    """Standard output is a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)


def spell(bench: Workbench, words: tuple[str, ...]) -> list[str]:
    places = {"BASE": bench.base, "ADAPTER": bench.adapter, "OUT": bench.out}
    return [os.fspath(places.get(word, word)) for word in words]


def redirected(words: list[str], prepare: Prepare) -> Outcome:
    """The command with streams that `prepare` has changed, in a fork of this process."""
    run = Forked(words, prepare)
    out, err = run.communicate(timeout=60)
    assert run.returncode is not None
    return Outcome(run.returncode, out, err, 0.0)


def check_is_no_crash(outcome: Outcome) -> None:
    assert "Traceback" not in outcome.err, outcome.err
    assert "Exception ignored" not in outcome.err, outcome.err
    assert "a bug" not in outcome.err, outcome.err
    assert is_clean(outcome.err)


@each(COMMANDS)
def test_a_full_a_closed_and_a_broken_stdout_are_no_crash(bench: Workbench, case: tuple[str, ...]) -> None:
    """Row 61: no traceback, and a status that says so: 141 as a shell has it, 1, or 6."""
    usual = 3 if "/nonexistent" in case else 0
    outcomes = [redirected(spell(bench, case), prepare) for prepare in (full(1), closed(1), broken)]
    for outcome in outcomes:
        check_is_no_crash(outcome)
    assert outcomes[0].code == (usual or 6), outcomes[0]
    assert usual or f"could not write to stdout: {os.strerror(errno.ENOSPC)}\n" in outcomes[0].err
    assert outcomes[1].code in (usual, 1, 6), outcomes[1]
    assert outcomes[2].code == (usual or 141), outcomes[2]


def test_a_process_of_its_own_ends_as_the_forks_do(bench: Workbench) -> None:
    """Row 61: Python itself finds its streams like that, and flushes them at its end."""
    words = command("inspect", bench.base)
    read, write = os.pipe()
    os.close(read)
    try:
        outcomes = {141: run_apart(words, stdout=write)}
    finally:
        os.close(write)
    for code, how in ((6, "> /dev/full"), (0, "<&- >&- 2>&-")):
        outcomes[code] = run_apart(["sh", "-c", f'exec "$@" {how}', "sh", *words])
    for code, outcome in outcomes.items():
        check_is_no_crash(outcome)
        assert outcome.code == code, outcome


@each({"stderr": closed(2), "all": closed(0, 1, 2), "stderr full": full(2)})
def test_a_closed_stderr_is_no_crash(bench: Workbench, case: Prepare) -> None:
    """Row 61."""
    assert redirected(spell(bench, ("inspect", "BASE")), case).code == 0
    assert redirected(spell(bench, ("inspect", "/nonexistent")), case).code == 3


@each({"full": full(1), "closed": closed(0, 1, 2)})
def test_a_merge_whose_report_cannot_be_shown_is_done_all_the_same(bench: Workbench, case: Prepare) -> None:
    """Row 61. Where standard streams are closed, the next file opened gets their number: no line may land in it."""
    outcome = redirected(spell(bench, ("merge", "BASE", "ADAPTER", "-o", "OUT", "--device", "cpu")), case)
    assert outcome.code in (0, 1, 6, 141), outcome
    check_is_no_crash(outcome)
    check_is_merged(tensors_of(bench.out))
    assert os.listdir(bench.outputs) == ["merged"]
