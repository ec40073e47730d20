"""Adapters of three generations on the disks of three generations, from names and shapes alone.

Every cell is a model of `layout_facts`, an adapter of some release and a base in some layout. The oracle is the
float64 formula at the places that the table records.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from layout_facts import (
    FIXTURE,
    WHOLE,
    Cell,
    carried,
    expected,
    in_memory,
    loaded_as_is,
    newest_names,
    random_tensors,
    read_cells,
    read_models,
    shapes,
    write_adapter,
    write_base,
)
from oracle import read_tensors, same_bits
from torch import Tensor

import loratool

TABLE = read_cells()
CELLS = [cell for releases in TABLE.values() for cell in releases.values()]
NEWEST, LAST_OF_FOUR = "5.23", "4.57"


def name_of(cell: Cell) -> str:
    return f"{cell.model}-{cell.release}"


def assert_merged(merged: Path, base: Mapping[str, Tensor], wanted: Mapping[str, Tensor], edited: set[str]) -> None:
    """Edited tensors are the formula within float32, all others are the base's, bit for bit."""
    after = read_tensors(merged)
    assert set(after) == set(base)
    for name, before in base.items():
        if name not in edited:
            assert same_bits(after[name], before), f"{name} should be an exact copy"
            continue
        error = float((after[name].double() - wanted[name]).abs().max())
        assert error <= 1e-6, f"{name}: off by {error}"
        assert float((wanted[name] - before.double()).abs().max()) > 1e-3, f"{name}: nothing was to be seen"


def values(cell: Cell) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Base and adapter tensors of a cell."""
    return random_tensors(cell.disk, 1, 0.05), random_tensors(cell.adapter, 2, 0.2)


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_an_adapter_merges_into_the_disk_of_its_own_generation(tmp_path: Path, cell: Cell) -> None:
    base, adapter = values(cell)
    folder = write_base(tmp_path / "base", cell, base)
    report = loratool.merge(folder, write_adapter(tmp_path / "adapter", cell, adapter), tmp_path / "out")
    wanted = expected(cell, base, adapter)
    assert report.edited == len(wanted.edited)
    assert_merged(tmp_path / "out", base, wanted.tensors, wanted.edited)


NEW_ON_OLD = [releases[NEWEST] for releases in TABLE.values() if {NEWEST, LAST_OF_FOUR} <= set(releases)]
OLD_ON_MEMORY = [
    cell for releases in TABLE.values() for cell in releases.values() if not cell.newest and NEWEST in releases
]
NEW_ON_MEMORY = [releases[NEWEST] for releases in TABLE.values() if NEWEST in releases]


@pytest.mark.parametrize("cell", NEW_ON_OLD, ids=name_of)
def test_an_adapter_of_the_newest_release_merges_into_a_disk_that_an_older_one_wrote(
    tmp_path: Path, cell: Cell
) -> None:
    old = TABLE[cell.model][LAST_OF_FOUR]
    base, adapter = random_tensors(old.disk, 1, 0.05), values(cell)[1]
    folder = write_base(tmp_path / "base", old, base)
    loratool.merge(folder, write_adapter(tmp_path / "adapter", cell, adapter), tmp_path / "out")
    names = newest_names(old, cell)
    resaved = {new: carried(base[name], cell.disk[new]) for name, new in names.items()}
    wanted = expected(cell, resaved, adapter)
    back = {name: carried(wanted.tensors[new], old.disk[name]) for name, new in names.items()}
    edited = {name for name, new in names.items() if new in wanted.edited}
    assert len(edited) == len(wanted.edited)
    assert_merged(tmp_path / "out", base, back, edited)


@pytest.mark.parametrize("cell", OLD_ON_MEMORY, ids=name_of)
def test_an_adapter_of_an_older_release_merges_into_a_disk_in_the_layout_of_memory(tmp_path: Path, cell: Cell) -> None:
    newest = TABLE[cell.model][NEWEST]
    disk, adapter = values(cell)
    names = newest_names(cell, newest)
    wanted = expected(cell, disk, adapter)
    lost = {name for name in wanted.edited if name not in names}
    assert not lost, "the newest release has another tensor for it"

    def as_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return in_memory(newest, {new: carried(tensors[name], newest.disk[new]) for name, new in names.items()})

    base, merged = as_memory(disk), as_memory(wanted.tensors)
    folder = write_base(tmp_path / "base", newest, base)
    loratool.merge(folder, write_adapter(tmp_path / "adapter", cell, adapter), tmp_path / "out")
    edited = {name for name in base if not torch.equal(base[name].double(), merged[name])}
    assert parameters(merged, edited) == parameters(wanted.tensors, wanted.edited)
    assert_merged(tmp_path / "out", base, merged, edited)


@pytest.mark.parametrize("cell", NEW_ON_MEMORY, ids=name_of)
def test_an_adapter_of_the_newest_release_merges_into_a_disk_in_the_layout_of_memory(
    tmp_path: Path, cell: Cell
) -> None:
    cell = loaded_as_is(cell)
    base, adapter = values(cell)
    folder = write_base(tmp_path / "base", cell, base)
    loratool.merge(folder, write_adapter(tmp_path / "adapter", cell, adapter), tmp_path / "out")
    wanted = expected(cell, base, adapter)
    assert_merged(tmp_path / "out", base, wanted.tensors, wanted.edited)


def parameters(tensors: Mapping[str, Tensor], names: set[str]) -> int:
    return sum(tensors[name].numel() for name in names)


@pytest.mark.skipif(not WHOLE.is_file(), reason="the whole table is not here")
def test_the_excerpt_of_the_table_says_what_the_table_says() -> None:
    whole = read_models(WHOLE)
    for model, facts in read_models(FIXTURE).items():
        assert facts["arch"] == whole[model]["arch"]
        for release, found in facts["versions"].items():
            there = whole[model]["versions"][release]
            for part in ("disk", "adapter"):
                assert shapes(found[part]).items() <= shapes(there[part]).items()
            assert all(step in there["resolution"] for step in found["resolution"])
