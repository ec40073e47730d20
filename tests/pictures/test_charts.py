"""Figures in a terminal: how long bars are, how dense cells, and what is printed where there are no colours or blocks."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictured import LAYERS, NAMES, RANK, delta, write_adapter

import loratool
from loratool import cli
from loratool.pictures.bars import Bar, Bars
from loratool.pictures.charts import charts_of
from loratool.pictures.heat_map import Cell, HeatMap
from loratool.pictures.terminal import Chart, Terminal, chart_of, shown, terminal_of

ESCAPE = re.compile("\x1b\\[[0-9;]*m")
PLAIN = Terminal(80, colours=False, blocks=True)


def bars(*values: float) -> Bars:
    made = tuple(Bar(f"bar {at}", (value,), f"{value:g}") for at, value in enumerate(values))
    return Bars(name="bars", title="Bars", bars=made)


def heat_map(*rows: tuple[float | None, ...], numbers: bool = False) -> HeatMap:
    """Values from −1 to 1 where one is negative."""
    signed = any((value or 0.0) < 0 for row in rows for value in row)
    return HeatMap(
        name="map",
        title="Map",
        rows=tuple(f"row {at}" for at in range(len(rows))),
        columns=tuple(map(str, range(len(rows[0])))),
        cells=tuple(Cell(at, column, value) for at, row in enumerate(rows) for column, value in enumerate(row)),
        scale="both" if signed else "up",
        bounds=(-1.0, 1.0) if signed else (None, None),
        numbers=numbers,
    )


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, `one` and `two`."""
    home = tmp_path_factory.mktemp("charts")
    for seed, name in enumerate(("one", "two")):
        write_adapter(home / name, seed=seed)
    return home


def chart(found: object, name: str) -> Chart:
    """A figure of a result that a terminal shows, by its name."""
    figure = next(figure for figure in charts_of(found) if figure.name == name)
    assert isinstance(figure, (Bars, HeatMap))
    return chart_of(figure)


def shares(found: Chart) -> np.ndarray:
    """(rows, cells)"""
    return np.array([row.shares for row in found.rows], np.float64)


Look = Callable[[list[str]], str]


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Look:
    """What a pseudo-terminal receives from a command."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(arguments: list[str]) -> str:
        master, slave = pty.openpty()
        received = bytearray()

        def drain() -> None:
            while b"\x04" not in received:
                received.extend(os.read(master, 1 << 16))

        reader = threading.Thread(target=drain)
        reader.start()
        with os.fdopen(slave, "w", encoding="utf-8") as stream, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stream)
            code = cli.run(arguments)
            stream.write("\x04")
            stream.flush()
            reader.join()
        os.close(master)
        assert code == 0
        return received.decode().replace("\r\n", "\n").removesuffix("\x04").replace("^D", "")

    return run


def test_a_bar_is_as_long_as_its_part_of_the_largest_in_eighths_of_a_character() -> None:
    title, whole, part, nothing = shown([bars(8, 3.0625, 0)], PLAIN).split("\n")
    assert title == "Bars"
    assert whole == f"bar 0  {'█' * 48}       8"
    assert part == f"bar 1  {'█' * 18}▍{' ' * 29}  3.0625"
    assert nothing == f"bar 2  {' ' * 48}       0"


def test_the_smallest_part_is_still_seen() -> None:
    assert "▏" in shown([bars(1, 1e-9)], PLAIN)


def test_cells_are_denser_for_larger_values_and_blank_where_there_is_none() -> None:
    assert shown([heat_map((0.0, 3.0, 5.0, 7.0, 10.0, None))], PLAIN).split("\n") == [
        "Map, 0 to 5   0 ·░▒▓█ 10",
        "row 0  ····░░░░▒▒▒▒▓▓▓▓████      5",
    ]


def test_negative_cells_have_a_sign_and_numbers_next_to_them() -> None:
    assert shown([heat_map((1.0, -0.5), (-0.001, -1.0), (0.3, 1.0), numbers=True)], PLAIN).split("\n") == [
        "Map   0 ·░▒▓█ 1",
        "row 0  ████-▒▒▒   1.00 -0.50",
        "row 1  ····-███   0.00 -1.00",
        "row 2  ░░░░████   0.30  1.00",
    ]
    assert shown([heat_map((1.0, -0.5), (-0.5, 1.0), numbers=True)], PLAIN) == "", "of two there is one number"


def test_colours_repeat_what_the_characters_show() -> None:
    figures = [heat_map((0.0, 0.5, -1.0)), bars(1, 2)]
    coloured = shown(figures, Terminal(80, colours=True, blocks=True))
    assert ESCAPE.search(coloured)
    assert ESCAPE.sub("", coloured) == shown(figures, PLAIN)


def test_more_layers_than_columns_share_cells_and_the_title_says_how_many() -> None:
    text = shown([heat_map(tuple(at / 127 for at in range(128)))], Terminal(40, False, True))
    assert text.split("\n") == [
        "Map, 0 to 127; a cell is the mean of 5",
        "columns   0 ·░▒▓█ 1",
        f"row 0  {'·' * 5}{'░' * 5}{'▒' * 5}{'▓' * 5}{'█' * 6}  0.5",
    ]


def test_modules_of_one_layer_are_bars_from_zero() -> None:
    assert shares(chart_of(heat_map((1.0,), (4.0,)))).tolist() == [[0.25], [1.0]]


def test_a_map_of_one_density_is_left_out() -> None:
    """As that of a gain of 1 in every module, which the text says in a line."""
    gains = replace(heat_map((0.999, 1.0), (1.0, 0.998)), bounds=(0.5, 1.0))
    assert shown([gains], PLAIN) == ""
    assert shown([replace(gains, bounds=(0.998, 1.0))], PLAIN) != ""


def test_a_map_has_one_colour_where_its_numbers_are_equal_as_shown() -> None:
    """Rounding errors of 1e-9 do not become the two ends of a scale from 1 to 1."""
    equal = heat_map((1.0, 1.0 - 1e-9), (1.0 + 1e-9, 1.0))
    assert len(set(re.findall(r'class="(q\d+)" d=', equal.draw(alone=True).markup))) == 1
    assert shown([equal], PLAIN) == ""


def test_of_many_rows_those_that_differ_in_numbers_are_one() -> None:
    """The experts of a layer share a cell, which is their mean."""
    figure = HeatMap(
        name="map",
        title="Map",
        rows=tuple(f"experts.{at}.up" for at in range(64)),
        columns=("0", "1"),
        cells=tuple(Cell(at, column, float(at + 64 * column)) for at in range(64) for column in range(2)),
    )
    found = chart_of(figure)
    assert [row.name for row in found.rows] == ["experts.*.up"]
    np.testing.assert_allclose(shares(found), [[31.5 / 127, 95.5 / 127]])


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    long = heat_map(*[tuple(at / 100 for at in range(90))] * 40)
    figures = [bars(1, 2), long, heat_map((1.0, -0.5), numbers=True), bars(*range(100))]
    assert max(map(len, shown(figures, Terminal(width, False, True)).split("\n"))) <= width


def test_names_in_files_cannot_command_a_terminal() -> None:
    text = shown(
        [Bars(name="bars", title="Bars", bars=(Bar("\x1b[2Jname", (1.0,), "1"), Bar("b", (1.0,), "1")))], PLAIN
    )
    assert "\x1b" not in text
    assert "\\x1b[2Jname" in text


class Stream(io.StringIO):
    """A terminal of some encoding."""

    def __init__(self, encoding: str, tty: bool = True) -> None:
        super().__init__()
        self._encoding, self._tty = encoding, tty

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return self._tty


@pytest.mark.parametrize(
    ("environment", "encoding", "colours", "blocks"),
    [
        ({"TERM": "xterm"}, "utf-8", True, True),
        ({}, "utf-8", True, True),
        ({"NO_COLOR": "1"}, "utf-8", False, True),
        ({"NO_COLOR": ""}, "utf-8", True, True),
        ({"TERM": "dumb"}, "utf-8", False, True),
        ({"TERM": "xterm"}, "cp1252", True, False),
        ({"TERM": "xterm"}, "ascii", True, False),
    ],
)
def test_what_a_terminal_has(environment: dict[str, str], encoding: str, colours: bool, blocks: bool) -> None:
    found = terminal_of(Stream(encoding), environment)
    assert found is not None
    assert (found.colours, found.blocks) == (colours, blocks)


def test_a_file_and_a_pipe_are_no_terminals() -> None:
    assert terminal_of(Stream("utf-8", tty=False)) is None


def test_consoles_without_blocks_get_ascii() -> None:
    assert shown([heat_map((0.0, 0.5, -1.0)), bars(1, 2)], Terminal(80, False, False)).encode("cp1252").isascii()


def test_energy_at_smaller_ranks_is_that_of_the_singular_values(adapters: Path) -> None:
    """The oracle is numpy's SVD of the products B·A in float64."""
    found = chart(loratool.inspect(adapters / "one", values=True, device="cpu"), "energy-by-rank")
    squares = np.array(
        [np.linalg.svd(delta(adapters / "one", at, name))[1] ** 2 for at in range(LAYERS) for name in NAMES]
    )
    assert [row.name for row in found.rows] == ["rank 1", "rank 2", "rank 4"]
    expected = [squares[:, :rank].sum() / squares[:, :RANK].sum() for rank in (1, 2, 4)]
    np.testing.assert_allclose(shares(found)[:, 0], expected, rtol=1e-5)


def test_norms_are_cells_by_kind_and_layer_from_the_smallest_to_the_largest(adapters: Path) -> None:
    found = chart(loratool.inspect(adapters / "one", values=True, device="cpu"), "norm")
    norms = np.array([[np.linalg.norm(delta(adapters / "one", at, name)) for at in range(LAYERS)] for name in NAMES])
    assert [row.name for row in found.rows] == [*NAMES]
    np.testing.assert_allclose(shares(found), (norms - norms.min()) / (norms.max() - norms.min()), atol=1e-5)
    assert [row.value for row in found.rows] == [f"{row.mean():.3g}" for row in norms]


def test_every_result_that_has_charts_has_those_that_are_named(adapters: Path, tmp_path: Path) -> None:
    one, two = adapters / "one", adapters / "two"
    names = {
        "resize": loratool.resize(one, tmp_path / "out", energy=0.8, dry_run=True, device="cpu"),
        "combine": loratool.combine([one, two], tmp_path / "out", dry_run=True, device="cpu"),
        "pair": loratool.compare([one, two], device="cpu"),
        "three": loratool.compare([one, two, one], device="cpu"),
        "fleet": loratool.inspect(adapters, values=True, device="cpu"),
        "estimate": loratool.estimate(preset="llama-2-7b", ranks=[8], targets=["q_proj"]),
    }
    assert {name: [figure.name for figure in charts_of(found)] for name, found in names.items()} == {
        "resize": ["energy", "ranks"],
        "combine": ["energy-by-adapter", "energy"],
        "pair": ["cosine-1", "cosine"],
        "three": ["cosine-1", "cosine-2", "cosine-3", "cosine"],
        "fleet": ["norms", "ranks"],
        "estimate": ["memory"],
    }


def test_a_terminal_gets_the_text_and_below_it_the_charts(
    adapters: Path, look: Look, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["estimate", "--preset", "llama-2-7b", "--rank", "8", "--target", "q_proj"]
    assert cli.run(arguments) == 0
    text = capsys.readouterr().out
    assert "█" not in text
    assert "\x1b" not in text
    shown = look(arguments)
    assert shown.startswith(text + "\nMemory of training")
    assert ESCAPE.search(shown)
    monkeypatch.setenv("NO_COLOR", "1")
    assert look(arguments) == ESCAPE.sub("", shown)
    assert look([*arguments, "--json"]).startswith("{")
    assert "█" not in look([*arguments, "--json"])
    assert look([*arguments, "-q"]) == ""
    monkeypatch.setenv("COLUMNS", "40")
    table = look(["inspect", str(adapters), "--values", "--device", "cpu"])
    bars = table.partition("\n‖ΔW‖\n")[2].split("\n")
    assert [line[:3] for line in bars[:2]] == ["two", "one"]  # the larger first
    assert all("█" in line for line in bars[:2])
    assert max(map(len, bars)) <= 40
