"""How long N workers would take for a merge: worked out by hand for small models, and from headers of very large ones."""

from __future__ import annotations

import json
import math
import re
import runpy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

import loratool
from loratool import cli
from loratool.errors import UsageError
from loratool.results.simulation import Simulation

MADE = runpy.run_path(str(ROOT / "fixtures" / "make_headers.py"))
SIZES: Mapping[str, int] = {"hidden": 1024, "mlp": 4096, "expert": 1024, "query_rank": 512, "value_rank": 256}
HEADS: Mapping[str, int] = {"plain_head": 64, "rotary_head": 32, "value_head": 64}
MIB = 1 << 20


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of that architecture and an adapter on its attention, as headers alone."""
    home = tmp_path_factory.mktemp("hollow")
    model = MADE["Experts"](
        "small", "deepseek_v3", "DeepseekV3ForCausalLM", 8, 16, 8192, dense=1, predicting=0, layers=3, **SIZES, **HEADS
    )
    MADE["make"](model, home)
    return home


def simulated(home: Path, *workers: int, **rates: Any) -> tuple[Simulation, ...]:
    return loratool.plan(home / "base", home / "adapter", simulate=workers, **rates).simulations


def sizes(home: Path) -> tuple[int, int, int, int]:
    """Bytes of the tensors that stay, of those that are edited, of their scales, and of the adapter's file."""
    kept = edited = scales = 0
    for path in (home / "base").glob("*.safetensors"):
        for name, entry in header(path).items():
            count = math.prod(entry["shape"]) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[entry["dtype"]]
            if ".self_attn." not in name or "layernorm" in name:
                kept += count
            elif name.endswith("_scale_inv"):
                scales += count
            else:
                edited += count
    return kept, edited, scales, (home / "adapter" / "adapter_model.safetensors").stat().st_size


def header(path: Path) -> dict[str, Any]:
    """The tensors of a file, read as the format says."""
    with path.open("rb") as stream:
        found: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: entry for name, entry in found.items() if name != "__metadata__"}


def test_the_shapes_are_those_of_the_released_model() -> None:
    """Tensors of DeepSeek-V3, and values of each dtype, as the Hub shows them for the repository."""
    tensors = list(MADE["MODELS"]["deepseek-v3"].tensors)
    values: Counter[str] = Counter()
    for _, dtype, shape in tensors:
        values[dtype] += math.prod(shape)
    assert len(tensors) == 91_991
    assert values == {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}


def test_files_without_values_take_no_room(hollow: Path) -> None:
    for path in hollow.rglob("*.safetensors"):
        assert path.stat().st_blocks * 512 < 1 << 18
    assert sum(path.stat().st_size for path in hollow.rglob("*.safetensors")) > 1_000_000


def test_every_byte_is_read_and_written_by_one_of_the_workers(hollow: Path) -> None:
    """FP8 weights that are edited are read with their scales, and become bfloat16. Everybody reads the adapter."""
    kept, edited, scales, adapter = sizes(hollow)
    for found in simulated(hollow, 1, 2, 7):
        assert found.bytes_copied == kept
        assert found.bytes_computed == 2 * edited
        assert found.bytes_written == kept + 2 * edited
        assert found.bytes_read == kept + edited + scales + found.busy * adapter
        assert (found.bytes_copied_in_store, found.requests, found.dollars) == (0, {}, 0)


@pytest.mark.parametrize(
    ("rates", "limit", "seconds"),
    [
        ({"bandwidth": 1000}, "finishing", lambda kept, edited: (kept + 2 * edited) / 1000),
        ({"store_bandwidth": 500}, "finishing", lambda kept, edited: (kept + 2 * edited) / 500),
        ({"compute_rate": 1000}, "computing", lambda kept, edited: 2 * edited / 1000 + kept / 2e9),
        ({"copy_rate": 1000}, "computing", lambda kept, edited: kept / 1000 + 2 * edited / 5e8),
        ({"startup": 1e6}, "start-up", None),
    ],
)
def test_one_worker_takes_as_long_as_the_slowest_thing_that_it_does(
    hollow: Path, rates: dict[str, Any], limit: str, seconds: Any
) -> None:
    """Reading, writing and computing go on at the same time; starting, and checking what was written, do not."""
    kept, edited, _, _ = sizes(hollow)
    (found,) = simulated(hollow, 1, **{"startup": 0, **rates})
    assert found.limit == limit
    if seconds is not None:
        assert found.work_seconds == pytest.approx(seconds(kept, edited))
    assert found.seconds == found.startup_seconds + found.work_seconds + found.finish_seconds


def test_a_store_that_all_share_does_not_get_faster_with_workers(hollow: Path) -> None:
    for found in simulated(hollow, 1, 8, store_bandwidth=1000, startup=0):
        assert found.work_seconds == pytest.approx(max(found.bytes_read, found.bytes_written) / 1000)


def test_more_workers_than_parts_wait_for_the_largest_part(hollow: Path) -> None:
    (found,) = simulated(hollow, 1000, compute_rate=1000, startup=0)
    assert found.limit == "largest part"
    assert found.work_seconds == pytest.approx(found.largest_part)
    assert found.busy == found.parts < 1000
    assert found.even_seconds < found.work_seconds


def test_an_object_store_copies_what_stays_and_requests_have_a_price(hollow: Path) -> None:
    """Workers send what is edited, and what is too small to be a part of an upload next to it: under 5 MiB at each edge.

    Prices are those of Amazon S3 for a thousand requests.
    """
    kept, edited, scales, adapter = sizes(hollow)
    one, many = simulated(hollow, 1, 3, object_store=True)
    islands = 3  # the attention of each block
    assert one.bytes_computed == 2 * edited
    assert 2 * edited <= one.bytes_written <= 2 * edited + (2 * islands + 2) * 5 * MIB
    assert one.bytes_copied == one.bytes_written - 2 * edited
    written = loratool.plan(hollow / "base", hollow / "adapter", simulate=1).bytes_written
    assert 0 <= written - (one.bytes_written + one.bytes_copied_in_store) < 0.1 * MIB  # the config and the index
    assert one.bytes_copied_in_store > 0.7 * kept
    assert one.bytes_read == edited + scales + adapter + one.bytes_copied
    assert one.requests["PUT"] >= -(-one.bytes_written // (32 * MIB)) + one.parts  # pieces, and a record for each part
    headers = 2 * len([*hollow.glob("*/*.safetensors")])
    assert many.requests["GET"] - one.requests["GET"] == (many.busy - 1) * headers
    for found in (one, many):
        price = {"GET": 0.4e-6, "LIST": 5e-6, "PUT": 5e-6, "COPY": 5e-6, "POST": 5e-6}
        assert found.dollars == pytest.approx(sum(price[kind] * count for kind, count in found.requests.items()))


def test_the_terabyte_of_the_page_is_what_its_shapes_and_the_default_rates_say() -> None:
    """Sizes of Kimi-K2 and times of its merge as docs/simulating.md shows them, by hand from the shapes.

    `make distributed` compares every line with what the command prints, which reads the headers of a terabyte.
    """
    local, stored = page_tables()
    model, size = MADE["MODELS"]["kimi-k2"], MADE["size_of"]
    attention = [tensor for tensor in model.tensors if ".self_attn." in tensor[0] and "layernorm" not in tensor[0]]
    edited = sum(math.prod(shape) for _, dtype, shape in attention if dtype == "F8_E4M3")
    kept = sum(map(size, model.tensors)) - sum(map(size, attention))
    for table in (local, stored):
        assert set(table["computed"]) == {f"{2 * edited / 1e9:.2f} GB"}
        assert [seconds(word) for word in table["start-up"]] == [10] * 4
        columns = (map(seconds, table[row]) for row in ("time", "start-up", "work", "finishing"))
        for total, *steps in zip(*columns, strict=True):
            assert total == pytest.approx(sum(steps), abs=2)
    assert set(local["copied"]) == {f"{kept / 1e12:.2f} TB"}
    assert set(local["written"]) == {f"{(kept + 2 * edited) / 1e12:.2f} TB"}
    assert [seconds(word) for word in local["finishing"]] == pytest.approx([10 + (kept + 2 * edited) / 1e9] * 4, abs=1)
    assert seconds(local["work"][0]) == pytest.approx((kept + 2 * edited) / 1e9, abs=1)  # slower than copying at 2 GB/s
    for count, even in zip((1, 8, 64), local["balanced"], strict=False):
        assert seconds(even) == pytest.approx((kept + 2 * edited) / 1e9 / count, abs=1)


def page_tables() -> list[dict[str, list[str]]]:
    """The tables of docs/simulating.md: row → what it says for each number of workers."""
    text = (ROOT / "docs" / "simulating.md").read_text(encoding="utf-8")
    blocks = [block for block in text.split("```") if "kimi/base" in block and "\nworkers " in block]
    return [
        {
            name: words
            for name, *words in (re.split(r" {2,}", line.strip()) for line in block.splitlines() if "  " in line)
        }
        for block in blocks
    ]


def seconds(word: str) -> float:
    """Of `5.2 s` or `3 min 20 s`."""
    *minutes, rest = re.findall(r"[\d.]+", word)
    return 60 * float(minutes[0] if minutes else 0) + float(rest)


def test_the_command_prints_a_column_for_each_number_of_workers(
    hollow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(hollow / "base"), str(hollow / "adapter"), "--simulate", "1,16", "--object-store"]
    assert cli.run(words) == 0
    shown = capsys.readouterr().out
    assert "would write" in shown
    rows = {line.split("  ")[0].strip(): line for line in shown.partition("\n\n")[2].splitlines()}
    assert rows["workers"].split()[1:] == ["1", "16"]
    assert {"time", "limited by", "read", "written", "requests", "their cost"} <= rows.keys()
    assert cli.run([*words, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [each["workers"] for each in table["simulations"]] == [1, 16]
    assert table["gain_forecast"] is None  # which would need values


def test_a_plan_needs_no_output_and_writes_nothing(hollow: Path, tmp_path: Path) -> None:
    before = sorted(hollow.rglob("*"))
    plan = loratool.plan(hollow / "base", hollow / "adapter", simulate=2)
    placed = loratool.plan(hollow / "base", hollow / "adapter", tmp_path / "out", simulate=2)
    assert plan.simulations == placed.simulations
    assert sorted(hollow.rglob("*")) == before
    assert [*tmp_path.iterdir()] == []


def test_rates_without_a_simulation_are_refused(hollow: Path) -> None:
    with pytest.raises(UsageError, match="need --simulate"):
        loratool.plan(hollow / "base", hollow / "adapter", bandwidth="2GB")


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "many"])
def test_a_number_of_workers_that_cannot_be(hollow: Path, wrong: Any) -> None:
    with pytest.raises(UsageError, match="--simulate"):
        loratool.plan(hollow / "base", hollow / "adapter", simulate=[wrong])
