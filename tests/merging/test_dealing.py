"""How a merge is cut into parts, and who does which: decided from headers alone, with nothing left out or done twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoints import save_model
from working_plans import working_plan

from loratool.files import digests
from loratool.files.part_records import FilePart
from loratool.merging import dealing
from loratool.merging.plan import Plan
from loratool.options.sharing import Share

MiB = 1 << 20
Planned = Callable[..., Plan]


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """Plans of a model of two files, of which `q` of four is edited; sizes of parts are small enough for it."""

    def plan(**settings: object) -> Plan:
        names = [f"model.layers.{n}.self_attn.{m}_proj.weight" for n in range(4) for m in "qkvo"]
        tensors = {name: torch.zeros(64, 32, dtype=torch.bfloat16) for name in names}
        base = save_model(tmp_path / "base", {**tensors, "odd": torch.zeros(3, 5)}, files=2)
        factors = {
            f"base_model.model.{name[:-7]}.lora_{which}.weight": torch.ones(shape)
            for name in names
            if "q_proj" in name
            for which, shape in (("A", (2, 32)), ("B", (64, 2)))
        }
        adapter = save_model(tmp_path / "adapter", factors)
        (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
        (adapter / "config.json").unlink()
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
        return working_plan(base, adapter, **settings)

    return plan


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 1 KiB, parts of 3 KiB."""
    monkeypatch.setattr(digests, "CHUNK", 1 << 10)
    monkeypatch.setattr(dealing, "SMALLEST", 3 << 10)


def test_parts_that_follow_each_other_are_in_different_files(planned: Planned, small: None) -> None:
    """A kernel lets one writer into a file at a time, so those of several workers should not meet there."""
    parts = dealing.parts_of(planned())
    found = dealing.across_files(parts)
    assert sorted(found, key=lambda part: part.name) == sorted(parts, key=lambda part: part.name)
    for file in {part.file for part in parts}:
        assert [part for part in found if part.file == file] == [part for part in parts if part.file == file]
    shortest = min(sum(part.file == file for part in parts) for file in {part.file for part in parts})
    assert all(one.file != other.file for one, other in pairwise(found[: 2 * shortest]))


def test_parts_are_every_byte_of_every_file_once(planned: Planned, small: None) -> None:
    """The first part of a file begins with its header, each next one where the last ended, and the last one with the file."""
    plan = planned()
    parts = dealing.parts_of(plan)
    assert len({part.name for part in parts}) == len(parts) > 10
    for shard in plan.shards:
        own = [part for part in parts if part.file == shard.name]
        assert own[0].start == 0
        assert own[-1].stop == shard.layout.size
        assert all(before.stop == after.start for before, after in pairwise(own))
        chunks = [chunk for part in own for chunk in part.chunks]
        assert sum(size for _, _, size in chunks) == shard.layout.size - shard.layout.data_start
        assert all(at + size == following for (_, at, size), (_, following, _) in pairwise(chunks))
    assert all(sum(part.work.values()) == part.payload for part in parts)


def test_parts_of_large_models_have_at_least_256_MiB_and_at_most_1_GiB() -> None:
    """But the last of a file, and one that ends where copies begin or end."""
    assert dealing.part_size(1 << 40) == 256 * MiB
    assert dealing.part_size(16 << 30) == 256 * MiB
    assert dealing.part_size(1 << 30) == 16 * MiB, "a small model has enough parts for many workers"


def test_a_part_ends_where_copies_begin_if_it_is_large_enough(
    planned: Planned, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a bucket can copy whole parts by itself; `q` of 4 KiB is computed, the others are copied."""
    monkeypatch.setattr(dealing, "SMALLEST", 6 << 10)
    parts = [part for part in dealing.parts_of(planned()) if "odd" not in {name for name, _, _ in part.chunks}]
    assert {tuple(sorted(part.work)) for part in parts} == {("sum",), ("copy",)}
    assert [part.copied for part in parts] == ["sum" not in part.work for part in parts]


def test_compensated_weights_are_in_one_part_each(planned: Planned, small: None) -> None:
    """What is added to a weight then depends on all of its rows, 4 KiB here; without it, a weight may be cut."""
    whole = [
        name for part in dealing.parts_of(planned(rounding="compensated")) for name in {n for n, _, _ in part.chunks}
    ]
    edited = [name for name in whole if "q_proj" in name]
    assert len(edited) == len(set(edited)) == 4
    cut = [name for part in dealing.parts_of(planned()) for name in {n for n, _, _ in part.chunks}]
    assert len([name for name in cut if "q_proj" in name]) > 4


@pytest.mark.parametrize("count", [1, 2, 7, 37])
def test_every_part_is_dealt_to_one_worker(planned: Planned, small: None, count: int) -> None:
    parts = dealing.parts_of(planned())
    shares = [dealing.share_of(parts, Share(number + 1, count)) for number in range(count)]
    assert sorted(part.name for share in shares for part in share) == [part.name for part in parts]


def made_up(name: str, **work: int) -> FilePart:
    return FilePart(name, "f", 0, sum(work.values()), (), work)


def test_shares_are_equal_in_time_and_not_in_bytes() -> None:
    """Of 64 parts of mixed kinds, no worker has more than 5 % above the mean by the costs of the kinds."""
    parts = [made_up(f"{n:02d}", **{("copy", "sum", "compensated")[n % 3]: (200 + 7 * n) * MiB}) for n in range(64)]
    loads = [sum(map(dealing.cost, share)) for share in dealing.deal(parts, 5)]
    assert max(loads) <= 1.05 * sum(loads) / 5
    sizes = [sum(part.size for part in share) for share in dealing.deal(parts, 5)]
    assert max(sizes) > 1.05 * sum(sizes) / 5
