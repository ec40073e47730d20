"""How files are cut for uploads in parts: every byte once, within the limits of the store, from where it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, strategies as st
from store_merges import write_large_headers
from working_plans import working_plan

import loratool
from loratool.files import stand_ins
from loratool.merging.upload_parts import Run, large_enough, upload_parts
from loratool.stores.limits import Limits
from loratool.stores.names import StorePath
from loratool.stores.objects import StoredObject
from loratool.stores.upload_part import UploadPart

if TYPE_CHECKING:
    from loratool.merging.plan import Plan

SMALLEST = 10


def there(number: int, size: int = 1 << 40) -> StoredObject:
    return StoredObject(StorePath("bucket", f"object-{number}"), size, f'"{number}"', 0)


@st.composite
def runs(draw: st.DrawFn) -> list[Run]:
    """Neighbouring runs of a file, each made here or copied from one of two objects."""
    at, found = 0, []
    for _ in range(draw(st.integers(1, 12))):
        size, origin = draw(st.integers(1, 40)), draw(st.integers(0, 2))
        source = there(origin) if origin else None
        found.append(Run(at, at + size, source, draw(st.integers(0, 1000)) if source else 0))
        at += size
    return found


@given(runs())
def test_runs_keep_every_byte_and_its_origin_and_none_but_the_last_is_too_small(given_runs: list[Run]) -> None:
    """What is copied is copied from where it was; bytes may only turn from copied to sent, never the other way."""
    origin = {}
    for run in given_runs:
        for at in range(run.start, run.stop):
            origin[at] = (run.source, run.source_start + at - run.start) if run.source else None
    found = large_enough(given_runs, SMALLEST)
    assert [at for run in found for at in range(run.start, run.stop)] == [*origin]
    assert all(run.size >= SMALLEST for run in found[:-1])
    for run in found:
        for at in range(run.start, run.stop) if run.source else ():
            assert origin[at] == (run.source, run.source_start + at - run.start)


@given(runs())
def test_no_more_is_sent_than_what_is_made_here_and_the_limits_take(given_runs: list[Run]) -> None:
    """Each copy gives away less than the smallest size at either side, or all of itself where it would become too small."""
    made = sum(run.size for run in given_runs if run.source is None)
    copies = [run for run in given_runs if run.source is not None]
    sent = sum(run.size for run in large_enough(given_runs, SMALLEST) if run.source is None)
    assert sent <= made + sum(min(run.size, 2 * SMALLEST) for run in copies)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """An attention-only merge into headers of the shape of a model of 70 B: 80 layers in 30 files."""
    home = tmp_path_factory.mktemp("large")
    write_large_headers(home)
    return working_plan(home / "base", home / "adapter")


@pytest.fixture
def stored(plan: Plan) -> Iterator[Plan]:
    """The same with its base in a store."""
    for number, shard in enumerate(plan.base.shards):
        stand_ins.standing[str(shard.path)] = there(number, shard.layout.size)
    yield plan
    stand_ins.forget()


def sizes(parts: tuple[UploadPart, ...], copied: bool) -> list[int]:
    return [piece.size for part in parts if (part.source is not None) == copied for piece in part.pieces]


def test_a_merge_of_70_b_takes_no_more_parts_than_edits_copies_and_limits_need(stored: Plan) -> None:
    """A copy for each range between edits, and for each run of edits as many pieces as fit into memory."""
    parts = upload_parts(stored, Limits())
    edited = sum(span.placed.nbytes for span in stored.edited)
    assert sum(sizes(parts, copied=False)) <= 1.1 * edited
    assert sum(sizes(parts, copied=True)) + sum(sizes(parts, copied=False)) == sum(s.layout.size for s in stored.shards)
    islands = sum(1 for part in parts if part.source is None)
    assert len(sizes(parts, copied=True)) <= islands + len(stored.shards)
    assert len(sizes(parts, copied=False)) <= edited // (8 << 20) + islands


@pytest.mark.parametrize(
    "limits", [Limits(), Limits(copies=False), Limits(copies=False, uniform=True), Limits(most=40)]
)
def test_pieces_are_within_the_limits_and_are_numbered_in_their_order(stored: Plan, limits: Limits) -> None:
    parts = upload_parts(stored, limits)
    for shard in stored.shards:
        pieces = [piece for part in parts if part.file == shard.name for piece in part.pieces]
        assert [piece.number for piece in pieces] == [*range(1, len(pieces) + 1)]
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == shard.layout.size
        assert len(pieces) <= limits.most
        assert all(limits.smallest <= piece.size <= limits.largest for piece in pieces[:-1])
        if limits.uniform:
            assert len({piece.size for piece in pieces[:-1]}) == 1


def test_every_edited_chunk_is_in_one_part(stored: Plan) -> None:
    """Chunks are the unit of digests, so a worker has to make each of them whole."""
    parts = upload_parts(stored, Limits())
    for part in parts:
        at = part.start
        whole = sorted([*((a, n) for _, a, n in part.chunks), *((f.at, f.size) for f in part.fringes)])
        if part.source is None:
            for start, size in whole:
                assert start == at
                at = start + size
            assert at == part.stop
    edited = {span.placed.name for span in stored.edited}
    assert edited <= {name for part in parts for name, _, _ in part.chunks}


def test_a_file_that_fits_into_no_upload_is_refused(stored: Plan) -> None:
    with pytest.raises(loratool.UsageError, match="pass --shard-size"):
        upload_parts(stored, replace(Limits(), most=2))


def test_nothing_is_copied_of_a_base_on_this_disk(plan: Plan) -> None:
    assert Path(plan.base.root).is_dir()
    assert sizes(upload_parts(plan, Limits()), copied=True) == []
