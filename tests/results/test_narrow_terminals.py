"""Text in a terminal: no line is longer than it is wide, and what is left out for that is said; a file gets all of it."""

from __future__ import annotations

import io
import shlex

import pytest

from loratool import cli
from loratool.results.blocks import bars
from loratool.results.fleet import FleetFacts, FleetRow
from loratool.results.matrix import Join, Matrix, matrix_lines
from loratool.results.text import aligned, fitting, in_columns, table

ESTIMATE = "estimate --preset llama-2-7b --target q_proj --rank 8 --rank 16 --rank 64 --rank 128"


class Stream(io.StringIO):
    """A terminal, for those who ask."""

    def isatty(self) -> bool:
        return True


def shown_in(columns: int, words: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal receives from a command."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdout", stream := Stream())
        assert cli.run(shlex.split(words)) == 0
    return stream.getvalue()


def test_a_name_loses_its_beginning_before_a_column_is_left_out() -> None:
    header = ["norms of the update", "rank", "layer"]
    rows = [["0.25", "8", "model.layers.11.self_attn.q_proj"], ["12.5", "16", "model.layers.2.mlp"]]
    with fitting(47):
        assert table(header, rows).splitlines() == [
            "norms of the update  rank  layer",
            "               0.25     8  …11.self_attn.q_proj",
            "               12.5    16  model.layers.2.mlp",
        ]
    with fitting(46):
        assert table(header, rows).splitlines() == [
            "norms of the update  layer",
            "               0.25  …yers.11.self_attn.q_proj",
            "               12.5  model.layers.2.mlp",
            "not shown in 46 columns: rank",
        ]


def test_a_heading_keeps_its_beginning() -> None:
    with fitting(40):
        lines = table(["norm" * 4, "largest updates, in model.layers"], [["1", "0.q_proj"]]).splitlines()
    assert lines == ["normnormnormnorm  largest updates, in…", "               1  0.q_proj"]


def test_columns_go_in_the_order_in_which_they_are_spared_and_then_from_the_end() -> None:
    header, row = ["a" * 12, "b" * 12, "c" * 12, "name"], ["1", "2", "3", "style"]
    with fitting(40):
        assert table(header, [row]).splitlines() == [
            f"{'a' * 12}  {'b' * 12}  name",
            f"{'1':>12}  {'2':>12}  style",
            f"not shown in 40 columns: {'c' * 12}",
        ]
        assert table(header, [row], spare=["b" * 12]).splitlines()[0] == f"{'a' * 12}  {'c' * 12}  name"
    assert table(header, [row], spare=["b" * 12]).splitlines()[0].split() == header, "a file gets all of them"


def test_ranks_without_room_come_below_the_others_behind_their_labels() -> None:
    rows = [["", "r = 8", "r = 16"], ["trainable parameters", "1,000,000", "2,000,000"]]
    with fitting(40):
        assert in_columns(rows).splitlines() == [
            "                          r = 8",
            "trainable parameters  1,000,000",
            "",
            "                         r = 16",
            "trainable parameters  2,000,000",
        ]
    assert in_columns(rows).count("\n") == 1


def test_a_value_is_broken_below_its_beginning() -> None:
    rows = [("took", "1.25 s on cpu, start-up 0.50 s, peak memory 100 MB"), ("out", "x" * 50)]
    with fitting(40):
        assert aligned(rows).splitlines() == [
            "took  1.25 s on cpu, start-up 0.50 s,",
            "      peak memory 100 MB",
            "out   " + "x" * 50,
        ]


@pytest.mark.parametrize("count", [2, 7, 8, 40])
@pytest.mark.parametrize("columns", [48, 60, 80])
def test_a_matrix_has_the_rows_that_there_is_room_for(count: int, columns: int) -> None:
    names = [f"adapters/number-{at}/of-a-long-name" for at in range(count)]
    numbers = tuple((0.5,) * count for _ in range(count))
    tree = [Join(0, 1, 0.5, 2), *(Join(count + at, at + 2, 0.6, at + 3) for at in range(count - 2))]
    with fitting(columns):
        lines = "\n".join(matrix_lines(names, Matrix(*[numbers] * 5), tree, dict.fromkeys(names, 0.5))).splitlines()
    assert max(map(len, lines)) <= columns
    rows = [line for line in lines if "%" in line]
    assert len(rows) in (0, min(count, columns - 30))


def test_bars_of_blocks_keep_their_labels() -> None:
    with fitting(40):
        lines = bars({f"unet.down_blocks.{at}.attentions.0.proj_in.weight": 1.0 + at for at in range(3)}).splitlines()
    assert max(map(len, lines)) <= 40
    assert all(line.split()[2].startswith("IN") for line in lines[1:])


@pytest.mark.parametrize("columns", [60, 80])
def test_a_table_of_adapters_keeps_the_health(columns: int) -> None:
    rows = [
        FleetRow(f"adapters/{name}", name, ("peft",), "LORA", "org/base", (16,), (32.0,), (2.0,), ("q_proj", "v_proj"))
        for name in ("one", "two-with-a-long-name")
    ]
    text = FleetFacts(kind="fleet", path="adapters", adapters=tuple(rows), left_out=())
    with fitting(columns):
        lines = str(text).splitlines()
    assert max(map(len, lines)) <= columns
    assert "health" in lines[1]
    assert lines[2].endswith("adapters/one")
    assert any(line.startswith(f"not shown in {columns} columns: ") for line in lines)


def test_a_terminal_gets_what_fits_and_a_file_gets_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = shown_in(60, ESTIMATE, monkeypatch)
    assert max(map(len, narrow.splitlines())) <= 60
    assert cli.run(shlex.split(ESTIMATE)) == 0
    whole = capsys.readouterr().out
    assert max(map(len, whole.splitlines())) > 60, "COLUMNS is of terminals"
    assert shown_in(200, ESTIMATE, monkeypatch).startswith(whole)
    assert {*whole.split()} <= {*narrow.split()}, "nothing of it is lost"
