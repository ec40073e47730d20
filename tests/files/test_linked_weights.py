"""A base whose weights are links to elsewhere: a cache, a data disk, a folder of somebody else's."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from malformed import INDEX, MODEL, SHARDS, WEIGHT, weight_map, write_json, write_sharded
from workbench import Workbench, bound_by_permissions, check_is_merged, check_refusal, command, run_apart

STORE = "store"  # beside the inputs: where the weights really lie


def move(bench: Workbench, name: str, leads: Callable[[Path], str] = str) -> Path:
    """Put a file of the base into the store, and a link to it in its place; where it is now."""
    store = bench.inputs / STORE
    store.mkdir(exist_ok=True)
    there = store / name
    (bench.base / name).rename(there)
    (bench.base / name).symlink_to(leads(there))
    return there


def through_folder(there: Path) -> str:
    """By way of a link to the folder."""
    folder = there.parent.with_name("by-another-name")
    if not folder.is_symlink():
        folder.symlink_to(there.parent.name)
    return str(folder / there.name)


def through_link(there: Path) -> str:
    """By way of a second link, beside the file."""
    second = there.with_name(f"{there.name}.link")
    second.symlink_to(there.name)
    return os.path.relpath(second, there.parent.with_name("base"))


LEADS = {"absolute": str, "relative": lambda t: f"../{STORE}/{t.name}", "folder": through_folder, "twice": through_link}


@pytest.mark.parametrize("leads", LEADS.values(), ids=LEADS)
@pytest.mark.parametrize("layout", ["single", "index", "shards"])
def test_linked_weights_are_merged_and_the_report_says_where_they_lie(
    bench: Workbench, leads: Callable[[Path], str], layout: str
) -> None:
    """Links to regular files are followed; merge, its plan and inspect name where they lead."""
    if layout != "single":
        write_sharded(bench.base)
    if layout == "shards":
        (bench.base / INDEX).unlink()
    names = [MODEL] if layout == "single" else list(SHARDS)
    there = [move(bench, name, leads) for name in names]
    for words in (("inspect", bench.base), ("merge", bench.base, bench.adapter, "-o", bench.out, "--dry-run")):
        outcome = bench.run(*words)
        assert outcome.code == 0, outcome.err
        assert str(there[0]) in outcome.out
    tensors, report = bench.merges()
    check_is_merged(tensors)
    assert any(str(there[0]) in str(note) for note in report["notes"])
    assert not any(path.is_symlink() for path in bench.out.rglob("*"))


def test_a_linked_index_is_followed(bench: Workbench) -> None:
    """The index may be a link as the shards may."""
    write_sharded(bench.base)
    move(bench, INDEX)
    check_is_merged(bench.merges()[0])


def test_a_shard_in_a_linked_folder_is_followed(bench: Workbench) -> None:
    """The index may name a shard in a folder that is a link."""
    write_sharded(bench.base, {**weight_map(), WEIGHT: f"sub/{SHARDS[0]}"})
    store = bench.inputs / STORE
    store.mkdir()
    (bench.base / SHARDS[0]).rename(store / SHARDS[0])
    (bench.base / "sub").symlink_to(store)
    table = {name: f"sub/{SHARDS[0]}" if shard == SHARDS[0] else shard for name, shard in weight_map().items()}
    write_json(bench.base / INDEX, {"weight_map": table})
    check_is_merged(bench.merges()[0])


def test_small_files_are_followed_to_where_the_weights_lie_and_nowhere_else(bench: Workbench) -> None:
    """A config beside the linked weights is the model's; a link to any other place is left out and told."""
    (bench.base / "config.json").write_text('{"model_type": "llama"}')
    (bench.base / "generation_config.json").write_text("{}")
    move(bench, MODEL)
    move(bench, "config.json")
    other = bench.inputs / "private"
    other.mkdir()
    (bench.base / "generation_config.json").rename(other / "key")
    (bench.base / "generation_config.json").symlink_to(other / "key")
    _, report = bench.merges()
    assert (bench.out / "config.json").read_text() == '{"model_type": "llama"}'
    assert not (bench.out / "generation_config.json").exists()
    assert any("generation_config.json" in line and "link" in line for line in report["left_out"])


def loop(link: Path) -> str:
    link.symlink_to(link.name)
    return "leads to itself"


def broken(link: Path) -> str:
    link.symlink_to(link.parent / "nowhere.safetensors")
    return "does not exist"


def device(link: Path) -> str:
    link.symlink_to("/dev/zero")
    return "a device"


def pipe(link: Path) -> str:
    os.mkfifo(link.parent / "pipe")
    link.symlink_to("pipe")
    return "a named pipe"


def folder(link: Path) -> str:
    (link.parent.parent / "weights.safetensors").mkdir()
    link.symlink_to(link.parent.parent / "weights.safetensors")
    return "folder"


@pytest.mark.parametrize("make", [loop, broken, device, pipe, folder])
def test_links_that_lead_to_no_regular_file_are_refused(bench: Workbench, make: Callable[[Path], str]) -> None:
    """Exit 3 at once, with the name of the shard and what it leads to."""
    write_sharded(bench.base)
    (bench.base / SHARDS[1]).unlink()
    told = make(bench.base / SHARDS[1])
    outcome = bench.refuses_to_merge(SHARDS[1], told)
    assert outcome.seconds < 2
    bench.refuses_to_inspect(bench.base, SHARDS[1], told)


def test_a_link_to_a_file_that_this_user_may_not_read_is_refused(bench: Workbench) -> None:
    """Exit 3, with the name of the weights."""
    there = move(bench, MODEL)
    there.chmod(0)
    try:
        words = bound_by_permissions(command("merge", bench.base, bench.adapter, "-o", bench.out))
        check_refusal(run_apart(words), [MODEL, "permission denied"])
    finally:
        there.chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_push_sends_the_weights_that_links_lead_to(bench: Workbench) -> None:
    """What would be sent is named with the size of the real file."""
    there = move(bench, MODEL)
    outcome = bench.run("push", bench.base, "me/model", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["files"][MODEL] == there.stat().st_size


def test_an_output_that_holds_the_real_weights_is_refused(bench: Workbench) -> None:
    """What links lead to is an input too, which --overwrite may not replace."""
    there = move(bench, MODEL)
    outcome = bench.run("merge", bench.base, bench.adapter, "-o", there.parent, "--overwrite")
    assert outcome.code == 2
    assert "loratool never writes to" in outcome.err
    assert there.is_file()
