"""Figures as SVG files: valid XML that any program draws, with the values in it; only figures made here are replaced."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from browser import Opened, luminance
from pictured import LAYERS, NAMES

import loratool
from loratool import cli
from loratool.pictures.bars import Bar, Bars
from loratool.pictures.colours import LEVELS
from loratool.pictures.drawing import Figure, svg_file
from loratool.pictures.heat_map import Cell, HeatMap
from loratool.pictures.lines import Line, Lines, linear, logarithmic
from loratool.pictures.tree import Tree
from loratool.results.facts import AdapterFacts

SVG = "{http://www.w3.org/2000/svg}"
NASTY = "</text><script>forged()</script>&\"'\x1b"


def parsed(figure: Figure) -> ET.Element:
    return ET.fromstring(svg_file(figure))


def titles(figure: Figure) -> list[str]:
    return [title.text or "" for title in parsed(figure).iter(f"{SVG}title")][1:]


def test_the_figures_of_a_result_are_files_with_its_numbers(facts: AdapterFacts, tmp_path: Path) -> None:
    """Each names itself and what it shows; the map has the norm of every module as text, to four digits."""
    written = loratool.write_svgs(facts, tmp_path / "figures")
    names = ["inspect-energy-by-rank.svg", "inspect-energy.svg", "inspect-norm.svg", "inspect-singular-values.svg"]
    assert (
        sorted(path.name for path in written) == names == sorted(path.name for path in (tmp_path / "figures").iterdir())
    )
    for path in written:
        root = ET.parse(path).getroot()
        assert root.get("role") == "img"
        labels = [root.find(f"*[@id='{name}']") for name in (root.get("aria-labelledby") or "").split()]
        assert [each.tag for each in labels if each is not None and each.text] == [f"{SVG}title", f"{SVG}desc"]
        assert "var(" not in path.read_text("utf-8")  # librsvg and Inkscape know no variables
        assert "prefers-color-scheme: dark" in path.read_text("utf-8")
    assert facts.values is not None
    shown = re.findall(
        r"<title>(\S+): ‖ΔW‖ (\S+)</title>", (tmp_path / "figures" / "inspect-norm.svg").read_text("utf-8")
    )
    expected = {m.target.removesuffix(".weight"): f"{m.norm:.4g}" for m in facts.values.modules}
    assert dict(shown) == expected
    assert len(shown) == LAYERS * len(NAMES)


def test_several_results_have_figures_of_their_own(facts: AdapterFacts, tmp_path: Path) -> None:
    written = loratool.write_svgs([facts, facts], tmp_path)
    assert {path.name for path in written} >= {"inspect-1-norm.svg", "inspect-2-norm.svg"}


def test_a_file_is_drawn_on_its_own_in_light_and_in_dark(browser: Any, facts: AdapterFacts, tmp_path: Path) -> None:
    (path,) = (p for p in loratool.write_svgs(facts, tmp_path) if p.name == "inspect-norm.svg")
    script = "[...document.querySelectorAll('.cells path')].map(cell => getComputedStyle(cell).fill)"
    colours = []
    for scheme in ("light", "dark"):
        opened = Opened(browser, path, color_scheme=scheme)
        colours.append([luminance(fill) for fill in opened.page.evaluate(script)])
        opened.close()
    light, dark = colours
    assert light.index(min(light)) == dark.index(max(dark))
    assert len(light) == len(dark) == LAYERS * len(NAMES)


@pytest.mark.parametrize("case", ["mine", "a page", "a link"])
def test_only_figures_that_were_made_here_are_replaced(
    case: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing else in the folder matters; a figure in the way is found before anything is measured."""
    (tmp_path / "figures").mkdir()
    mine = tmp_path / "figures" / "inspect-norm.svg"
    (tmp_path / "other.svg").write_text("<svg/>")
    (tmp_path / "figures" / "mine.svg").write_text("<svg/>")
    if case == "a link":
        mine.symlink_to(tmp_path / "other.svg")
    else:
        mine.write_text("<svg/>" if case == "mine" else "<!doctype html><title>x · loratool inspect</title>")
    before = mine.read_text()
    words = ["inspect", str(adapter), "--svg", str(tmp_path / "figures"), "--device", "cpu"]
    assert cli.run(words) == 2
    assert "was not made by loratool, so it is never replaced" in capsys.readouterr().err
    assert cli.run([*words, "--overwrite"]) == 2
    shown = capsys.readouterr()
    assert "was not made by loratool" in shown.err
    assert shown.out == ""
    assert mine.read_text() == before
    mine.unlink()
    assert cli.run([*words, "-q"]) == 0
    assert cli.run([*words, "-q"]) == 2
    assert cli.run([*words, "-q", "--overwrite"]) == 0
    assert (tmp_path / "figures" / "mine.svg").read_text() == (tmp_path / "other.svg").read_text() == "<svg/>"


@pytest.mark.parametrize(("place", "told"), [("file", "is not a folder"), ("no/where", "does not exist")])
def test_figures_go_where_a_folder_can_be(
    place: str, told: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.run(["inspect", str(adapter), "--svg", str(tmp_path / place), "-q"]) == 2
    assert told in capsys.readouterr().err


def test_a_result_without_a_page_is_refused() -> None:
    with pytest.raises(loratool.UsageError, match="a Result has no page"):
        loratool.html_page(loratool.results.base.Result())


# What each figure draws


def test_a_heat_map_colours_from_the_smallest_to_the_largest_value_and_marks_what_has_none() -> None:
    cells = tuple(Cell(0, at, value, f"c{at}") for at, value in enumerate((1.0, 2.0, 3.0, None)))
    figure = HeatMap(name="a", title="A", rows=("r",), columns=("a", "b", "c", "d"), cells=cells)
    kinds = [path.get("class") for path in parsed(figure).iter(f"{SVG}path")]
    assert kinds == ["q0", f"q{round((LEVELS - 1) / 2)}", f"q{LEVELS - 1}", "none"]
    assert titles(figure) == ["c0: 1", "c1: 2", "c2: 3", "c3: –"]


def test_a_map_of_both_signs_has_zero_in_the_middle() -> None:
    cells = tuple(Cell(0, at, value) for at, value in enumerate((-0.5, 0.0, 1.0)))
    figure = HeatMap(name="a", title="A", rows=("r",), columns=("a", "b", "c"), cells=cells, scale="both", numbers=True)
    levels = [int((path.get("class") or "")[1:]) for path in parsed(figure).iter(f"{SVG}path")]
    assert levels[2] == LEVELS - 1
    assert levels[1] in (LEVELS // 2 - 1, LEVELS // 2)
    assert levels[1] - levels[0] == pytest.approx((LEVELS - 1) / 4, abs=1)
    assert [text.text for text in parsed(figure).iter(f"{SVG}text") if text.get("class") in ("i", "o")] == [
        "-0.50",
        "0.00",
        "1.00",
    ]


def test_a_map_of_states_says_which() -> None:
    cells = (Cell(0, 0, 1.0, "x"), Cell(0, 1, 0.0, "y"))
    states = (("proven", "s2"), ("different", "bad"))
    figure = HeatMap(name="a", title="A", rows=("r",), columns=("a", "b"), cells=cells, states=states)
    assert [path.get("class") for path in parsed(figure).iter(f"{SVG}path")] == ["bad", "s2"]
    assert titles(figure) == ["x: different", "y: proven"]


def test_bars_are_as_long_as_their_values() -> None:
    bars = (Bar("one", (1.0, 2.0), "3"), Bar("other", (1.5, 0.0), "1.5"))
    figure = Bars(name="a", title="A", bars=bars, series=("x", "y"))
    lengths = [float(r.get("width") or 0) for r in parsed(figure).iter(f"{SVG}rect") if r.get("height") == "16"]
    assert lengths[1] / lengths[0] == pytest.approx(2, rel=1e-3)
    assert lengths[2] / lengths[0] == pytest.approx(1.5, rel=1e-3)
    assert len(lengths) == 3  # a piece of nothing is not drawn


def test_points_of_a_line_are_where_the_axes_say() -> None:
    """A factor of ten is as far everywhere on a logarithmic axis."""
    axis = logarithmic("y", [1.0, 0.1, 0.01])
    figure = Lines(
        name="a", title="A", x=linear("x", 0, 2), y=axis, lines=(Line("l", ((0, 1.0), (1, 0.1), (2, 0.01))),)
    )
    (path,) = (p.get("d") or "" for p in parsed(figure).iter(f"{SVG}path") if p.get("class") == "s s0")
    _, _, *steps = map(int, re.findall(r"-?\d+", path))
    assert steps[0] == pytest.approx(steps[2], abs=1)
    assert steps[1] == pytest.approx(steps[3], abs=1)
    assert steps[1] > 0


def test_a_tree_draws_its_leaves_so_that_no_lines_cross() -> None:
    """0 and 2 are joined first, so they are neighbours; a join is as far right as its distance."""
    figure = Tree(
        name="a", title="A", leaves=("0", "1", "2"), joins=((0, 2, 0.5), (1, 3, 1.0)), axis=linear("distance", 0, 1)
    )
    names = [text.text for text in parsed(figure).iter(f"{SVG}text") if text.get("class") == "n"]
    assert names in (["1", "0", "2"], ["0", "2", "1"])
    ends = [
        float(re.findall(r"H([\d.]+)V", p.get("d") or "")[0])
        for p in parsed(figure).iter(f"{SVG}path")
        if p.get("class") == "s s0"
    ]
    starts = [
        float(re.findall(r"M([\d.]+)", p.get("d") or "")[0])
        for p in parsed(figure).iter(f"{SVG}path")
        if p.get("class") == "s s0"
    ]
    assert ends[1] - starts[0] == pytest.approx(2 * (ends[0] - starts[0]), abs=0.3)


@pytest.mark.parametrize(
    "figure",
    [
        HeatMap(name="a", title=NASTY, rows=(NASTY,), columns=(NASTY,), cells=(Cell(0, 0, 1.0, NASTY),), what=NASTY),
        Bars(name="a", title=NASTY, about=NASTY, bars=(Bar(NASTY, (1.0,), NASTY),), series=(NASTY,)),
        Lines(name="a", title=NASTY, x=linear(NASTY, 0, 1), y=linear(NASTY, 0, 1), lines=(Line(NASTY, ((0, 1),)),)),
        Tree(name="a", title=NASTY, leaves=(NASTY, NASTY), joins=((0, 1, 0.1),), axis=linear(NASTY, 0, 1)),
    ],
    ids=lambda figure: type(figure).__name__,
)
def test_foreign_text_stays_text(figure: Figure) -> None:
    root = parsed(figure)
    assert not list(root.iter(f"{SVG}script"))
    assert "\\x1b" in "".join(root.itertext())
