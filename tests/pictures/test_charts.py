"""Charts in a terminal: how long bars are, how dense cells, and what is printed where there are no colours or blocks."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratool
from loratool import cli
from loratool.pictures.charts import by_layer, charts_of, mean
from loratool.pictures.terminal import Chart, Row, Terminal, drawn, terminal_of

ESCAPE = re.compile("\x1b\\[[0-9;]*m")
KINDS = ("self_attn.q_proj", "mlp.down_proj")
LAYERS, RANK = 6, 4
PLAIN = Terminal(80, colours=False, blocks=True)


def factors(seed: int, layer: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A (4, 16) and B (24, 4) of one module; later layers have larger updates."""
    random = np.random.default_rng([seed, layer, KINDS.index(kind)])
    decay = np.array([1, 0.5, 0.25, 0.125], np.float32)
    down = random.standard_normal((RANK, 16)).astype(np.float32) * decay[:, None]
    return down, random.standard_normal((24, RANK)).astype(np.float32) * (1 + layer)


def delta(seed: int, layer: int, kind: str) -> np.ndarray:
    down, up = factors(seed, layer, kind)
    product: np.ndarray = up.astype(np.float64) @ down
    return product


def write(folder: Path, seed: int) -> Path:
    tensors = {}
    for layer in range(LAYERS):
        for kind in KINDS:
            module = f"base_model.model.model.layers.{layer}.{kind}"
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = factors(seed, layer, kind)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": "some/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of six layers, `one` and `two`, written by the safetensors package."""
    home = tmp_path_factory.mktemp("charts")
    for seed, name in enumerate(("one", "two")):
        write(home / name, seed)
    return home


def chart(found: object, title: str) -> Chart:
    return next(chart for chart in charts_of(found) if chart.title.startswith(title))


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


def test_a_bar_is_as_long_as_its_share_of_the_room_in_eighths_of_a_character() -> None:
    text = drawn(
        [Chart("title", (Row("all", (1.0,), "8"), Row("part", (0.375 + 3 / 384,), "3"), Row("no", (0.0,))))], PLAIN
    )
    title, whole, part, nothing = text.split("\n")
    assert title == "title"
    assert whole == f"all   {'█' * 48}  8"
    assert part == f"part  {'█' * 18}▍{' ' * 29}  3"
    assert nothing == "no"


def test_the_smallest_part_is_still_seen() -> None:
    assert "▏" in drawn([Chart("title", (Row("tiny", (1e-9,)),))], PLAIN)


def test_cells_are_denser_for_larger_shares_blank_for_none_and_marked_where_negative() -> None:
    row = Row("row", (0.0, 0.3, 0.5, 0.7, 1.0, None, -1.0))
    assert drawn([Chart("title", (row,), "low", "high")], PLAIN).split("\n") == [
        "title   low ·░▒▓█ high",
        "row  ····░░░░▒▒▒▒▓▓▓▓████    -███",
    ]


def test_colours_repeat_what_the_characters_show() -> None:
    charts = [Chart("title", (Row("row", (0.0, 0.5, -1.0), "end"),), "0", "1"), Chart("bars", (Row("bar", (0.5,)),))]
    coloured = drawn(charts, Terminal(80, colours=True, blocks=True))
    assert ESCAPE.search(coloured)
    assert ESCAPE.sub("", coloured) == drawn(charts, PLAIN)


def test_more_layers_than_columns_share_cells_and_the_title_says_how_many() -> None:
    text = drawn([Chart("title", (Row("row", tuple(at / 127 for at in range(128)), "9"),))], Terminal(40, False, True))
    title, row = text.split("\n")
    assert title == "title; a cell is the mean of 4 columns"
    assert row == f"row  {'·' * 6}{'░' * 7}{'▒' * 6}{'▓' * 7}{'█' * 6}  9"


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_longer_than_the_terminal(width: int, adapters: Path) -> None:
    found = loratool.inspect(adapters / "one", values=True, device="cpu")
    text = drawn(
        [*charts_of(found), Chart("n" * 30, (Row("a.very.long.name." * 5, (0.5,) * 90, "1"),))],
        Terminal(width, False, True),
    )
    assert max(map(len, text.split("\n"))) <= width


def test_names_in_files_cannot_command_a_terminal() -> None:
    text = drawn([Chart("title", (Row("\x1b[2Jname", (1.0,)),))], PLAIN)
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
    charts = [Chart("title", (Row("row", (0.0, 0.5, -1.0), "end"),), "0", "1"), Chart("bars", (Row("bar", (0.5,)),))]
    assert drawn(charts, Terminal(80, False, False)).encode("cp1252").isascii()


def test_energy_at_smaller_ranks_is_that_of_the_singular_values(adapters: Path) -> None:
    """The oracle is numpy's SVD of the products B·A in float64."""
    found = chart(loratool.inspect(adapters / "one", values=True, device="cpu"), "energy kept at a smaller rank")
    values = [np.linalg.svd(delta(0, layer, kind))[1] for layer in range(LAYERS) for kind in KINDS]
    total = sum((v**2).sum() for v in values)
    assert [row.name for row in found.rows] == ["rank 1", "rank 2", "rank 4"]
    for row, rank in zip(found.rows, (1, 2, 4), strict=True):
        assert row.shares[0] == pytest.approx(sum((v[:rank] ** 2).sum() for v in values) / total, rel=1e-5)


def test_norms_are_cells_by_kind_and_layer_from_the_smallest_to_the_largest(adapters: Path) -> None:
    found = chart(loratool.inspect(adapters / "one", values=True, device="cpu"), "‖ΔW‖ by layer, 0 to 5")
    norms = np.array([[np.linalg.norm(delta(0, layer, kind)) for layer in range(LAYERS)] for kind in KINDS])
    assert [row.name for row in found.rows] == [*KINDS]
    expected = (norms - norms.min()) / (norms.max() - norms.min())
    np.testing.assert_allclose(shares(found), expected, atol=1e-5)
    assert [row.value for row in found.rows] == [f"{np.linalg.norm(row):.3g}" for row in norms]


def test_resize_shows_the_energy_that_each_layer_keeps(adapters: Path, tmp_path: Path) -> None:
    report = loratool.resize(adapters / "one", tmp_path / "out", rank=2, device="cpu")
    found = chart(report, "energy kept by layer")
    squares = {(k, n): np.linalg.svd(delta(0, n, k))[1] ** 2 for k in KINDS for n in range(LAYERS)}
    kept = np.array([[squares[k, n][:2].sum() / squares[k, n].sum() for n in range(LAYERS)] for k in KINDS])
    np.testing.assert_allclose(shares(found), (kept - kept.min()) / (1 - kept.min()), atol=1e-4)


def test_compare_shows_cosines_by_layer_of_two_and_a_matrix_of_several(adapters: Path) -> None:
    found = chart(loratool.compare([adapters / "one", adapters / "two"], device="cpu"), "cosine by layer")
    for row, kind in zip(found.rows, KINDS, strict=True):
        for layer, share in enumerate(row.shares):
            one, two = delta(0, layer, kind), delta(1, layer, kind)
            assert share == pytest.approx((one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two), abs=1e-5)
    three = loratool.compare([adapters / "one", adapters / "two", adapters / "one"], device="cpu")
    rows = chart(three, "cosine of every two").rows
    assert len(rows) == 3
    assert all(len(row.shares) == 3 and len(row.value.split()) == 3 for row in rows)


def test_modules_of_one_layer_are_bars() -> None:
    found = by_layer("norm by layer", {"blocks.0.q": 1.0, "blocks.0.v": 4.0}, str, mean)
    assert [(row.name, row.shares) for row in found.rows] == [("q", (0.25,)), ("v", (1.0,))]


def test_experts_of_a_layer_share_a_cell() -> None:
    values = {f"layers.{n}.experts.{e}.up_proj": float(n + e) for n in range(2) for e in range(3)}
    found = by_layer("norm by layer", values, str, mean)
    assert [(row.name, row.shares) for row in found.rows] == [("up_proj", (0.0, 1.0))]


def test_a_terminal_gets_the_text_and_below_it_the_charts(
    adapters: Path, look: Look, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["estimate", "--preset", "llama-2-7b", "--rank", "8", "--target", "q_proj"]
    assert cli.run(arguments) == 0
    text = capsys.readouterr().out
    assert "█" not in text
    assert "\x1b" not in text
    shown = look(arguments)
    assert shown.startswith(text + "\nmemory for training")
    assert ESCAPE.search(shown)
    monkeypatch.setenv("NO_COLOR", "1")
    assert look(arguments) == ESCAPE.sub("", shown)
    assert look([*arguments, "--json"]).startswith("{")
    assert "█" not in look([*arguments, "--json"])
    assert look([*arguments, "-q"]) == ""
    monkeypatch.setenv("COLUMNS", "40")
    table = look(["inspect", str(adapters), "--values", "--device", "cpu"])
    bars = table.partition("\n‖ΔW‖\n")[2].split("\n")
    assert [line[:3] for line in bars[:2]] == ["one", "two"]
    assert all("█" in line for line in bars[:2])
    assert max(map(len, bars)) <= 40
