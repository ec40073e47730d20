"""The pages of resize, combine, extract, compare and of many adapters: their numbers, their size, and how they open."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Opened
from pictured import LAYERS, NAMES, RANK, delta, write_adapter

import loratool
from loratool import cli
from loratool.pictures.bars import Bars
from loratool.pictures.heat_map import HeatMap
from loratool.pictures.lines import Lines
from loratool.pictures.page import figures_of, html_page
from loratool.pictures.tree import Tree
from loratool.results.base import Result
from loratool.results.combine import CombineReport
from loratool.results.compare import CompareReport
from loratool.results.extract import ExtractReport
from loratool.results.fleet import FleetFacts
from loratool.results.matrix import Join, Matrix
from loratool.results.resize import ResizeReport
from loratool.results.sketch import Neighbour

MOST_BYTES = 1_500_000
TARGETS = [(layer, name) for layer in range(LAYERS) for name in NAMES]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("three")
    return [write_adapter(home / name, seed=seed) for seed, name in enumerate(("one", "two", "three"))]


@pytest.fixture(scope="module")
def resized(three: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ResizeReport:
    out = tmp_path_factory.mktemp("resized") / "small"
    return loratool.resize(three[0], out, energy=0.8, dry_run=True, device="cpu")


@pytest.fixture(scope="module")
def combined(three: list[Path], tmp_path_factory: pytest.TempPathFactory) -> CombineReport:
    out = tmp_path_factory.mktemp("combined") / "both"
    return loratool.combine(three, out, rank=RANK, dry_run=True, device="cpu")


@pytest.fixture(scope="module")
def compared(three: list[Path]) -> CompareReport:
    return loratool.compare(three, device="cpu")


@pytest.fixture(scope="module")
def pair(three: list[Path]) -> CompareReport:
    return loratool.compare(three[:2], device="cpu")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> ExtractReport:
    """Two checkpoints that differ by two products of rank 4 in each of three layers, and in a norm."""
    from safetensors.numpy import save_file

    home, random = tmp_path_factory.mktemp("extracted"), np.random.default_rng(0)
    base: dict[str, np.ndarray] = {"model.norm.weight": np.ones(16, np.float32)}
    tuned = {"model.norm.weight": np.full(16, 2, np.float32)}
    for layer in range(3):
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            key = f"model.layers.{layer}.{name}.weight"
            base[key] = random.standard_normal((24, 16)).astype(np.float32)
            tuned[key] = base[key] + (random.standard_normal((24, 4)) @ random.standard_normal((4, 16))).astype(
                np.float32
            )
    for folder, tensors in (("base", base), ("tuned", tuned)):
        (home / folder).mkdir()
        save_file(tensors, home / folder / "model.safetensors")
        (home / folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    return loratool.extract(home / "base", home / "tuned", home / "out", rank=2, dry_run=True, device="cpu")


@pytest.fixture(scope="module")
def fleet(three: list[Path]) -> FleetFacts:
    found = loratool.inspect(three[0].parent, values=True, device="cpu")
    assert isinstance(found, FleetFacts)
    return found


def singular(folder: Path) -> dict[tuple[int, str], np.ndarray]:
    """Singular values of every module by numpy, in float64."""
    return {(layer, name): np.linalg.svd(delta(folder, layer, name))[1][:RANK] for layer, name in TARGETS}


def cells(figure: object) -> np.ndarray:
    """(rows, columns)"""
    assert isinstance(figure, HeatMap)
    found = np.full((len(figure.rows), len(figure.columns)), np.nan)
    for cell in figure.cells:
        found[cell.row, cell.column] = np.nan if cell.value is None else cell.value
    return found


def test_resize_maps_the_energy_that_numpy_s_singular_values_give(resized: ResizeReport, three: list[Path]) -> None:
    figures = figures_of(resized)
    ranks, energies = cells(figures["resize-ranks"]), cells(figures["resize-energy"])
    values = singular(three[0])
    for row, name in enumerate(NAMES):
        for layer in range(LAYERS):
            squares = values[layer, name] ** 2
            kept = squares.cumsum() / squares.sum()
            assert ranks[row, layer] == np.searchsorted(kept, 0.8) + 1
            assert energies[row, layer] == pytest.approx(kept[int(ranks[row, layer]) - 1], abs=1e-3)
    budget = figures["resize-rank-budget"]
    assert isinstance(budget, Bars)
    assert [bar.values for bar in budget.bars] == [(row.sum(),) for row in ranks]


def test_no_rank_budget_is_shown_where_all_ranks_are_the_same(combined: CombineReport) -> None:
    assert not any("rank" in name for name in figures_of(combined))


def test_combine_has_a_bar_for_each_adapter_and_the_least_that_each_layer_keeps(combined: CombineReport) -> None:
    figures = figures_of(combined)
    bars = figures["combine-energy-by-adapter"]
    assert isinstance(bars, Bars)
    assert {bar.label: bar.values[0] for bar in bars.bars} == combined.totals.energy_kept
    least = cells(figures["combine-energy"])
    each = [cells(figures[f"combine-energy-{at}"]) for at in (1, 2, 3)]
    np.testing.assert_array_equal(least, np.min(each, axis=0))
    matrix = cells(figures["combine-cosine"])
    np.testing.assert_array_equal(matrix, matrix.T)


def test_the_matrix_of_compare_has_the_cosines_of_the_products(compared: CompareReport, three: list[Path]) -> None:
    every = {path.name: np.concatenate([delta(path, *at).ravel() for at in TARGETS]) for path in three}
    figure = figures_of(compared)["compare-cosine"]
    assert isinstance(figure, HeatMap)
    table = cells(figure)
    for i, one in enumerate(figure.rows):
        for j, other in enumerate(figure.columns):
            a, b = every[one], every[other]
            assert table[i, j] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)


def test_the_spectra_of_compare_are_those_of_all_modules_together(compared: CompareReport, three: list[Path]) -> None:
    figures = figures_of(compared)
    spectra, energy = figures["compare-spectra"], figures["compare-energy"]
    assert isinstance(spectra, Lines)
    assert isinstance(energy, Lines)
    for number, path in enumerate(three):
        squares = np.sum([values**2 for values in singular(path).values()], axis=0)
        assert spectra.lines[number].label == path.name
        np.testing.assert_allclose(
            [y for _, y in spectra.lines[number].points], np.sqrt(squares / squares[0]), rtol=1e-5
        )
        kept = 100 * np.append(0, squares.cumsum()) / squares.sum()
        np.testing.assert_allclose([y for _, y in energy.lines[number].points], kept, rtol=1e-5)


def test_of_a_pair_every_layer_has_a_cosine_and_there_is_no_dendrogram(pair: CompareReport, three: list[Path]) -> None:
    figures = figures_of(pair)
    assert "compare-dendrogram" not in figures
    table = cells(figures["compare-cosine-1"])
    for row, name in enumerate(NAMES):
        for layer in range(LAYERS):
            a, b = delta(three[0], layer, name).ravel(), delta(three[1], layer, name).ravel()
            assert table[row, layer] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)


def test_extract_counts_tensors_and_maps_what_they_keep(extracted: ExtractReport) -> None:
    figures = figures_of(extracted)
    bars = figures["extract-tensors"]
    assert isinstance(bars, Bars)
    assert {bar.label: bar.text for bar in bars.bars} == {"extracted": "6", "saved whole": "1"}
    kept = cells(figures["extract-energy"])
    assert kept.shape == (2, 3)
    assert ((kept > 0.2) & (kept < 1)).all()


def many_modules(report: Any, count: int = 2000) -> Any:
    """The report with so many modules, as an adapter of a 500B model has them."""
    known = [*report.modules.values()]
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_up_proj")
    names = [f"base_model.model.model.layers.{at // 5}.{kinds[at % 5]}.weight" for at in range(count)]
    return replace(report, modules={name: known[at % len(known)] for at, name in enumerate(names)})


def many_adapters(report: CompareReport, count: int) -> CompareReport:
    """The report of so many adapters."""
    names = tuple(f"a-team/with-a-run-{at:04d}" for at in range(count))
    line = tuple((at % 19 - 9) / 10 for at in range(count))
    clusters, tree = [*range(count)], list[Join]()
    while len(clusters) > 1:
        one, other, *rest = clusters
        tree.append(Join(one, other, len(tree) / count, 2))
        clusters = [*rest, count + len(tree) - 1]
    return replace(
        report,
        adapters=names,
        norms=dict.fromkeys(names, 1.0),
        spectra={name: tuple(2.0 ** -(at / 3) for at in range(64)) for name in names},
        modules={},
        matrix=Matrix(*[(line,) * count] * 5),
        tree=tuple(tree),
        forecast=replace(report.forecast, energy_kept=dict.fromkeys(names, 0.5)),
    )


@pytest.mark.parametrize("name", ["resized", "combined", "pair", "compared", "extracted"])
def test_a_page_of_two_thousand_modules_is_small(name: str, request: pytest.FixtureRequest) -> None:
    assert len(html_page(many_modules(request.getfixturevalue(name))).encode()) <= MOST_BYTES


def test_a_page_of_a_thousand_adapters_is_small_and_says_what_is_left_out(
    compared: CompareReport, fleet: FleetFacts
) -> None:
    rows = tuple(
        replace(fleet.adapters[at % 3], name=f"a-team/with-a-run-{at:04d}/checkpoint-1200") for at in range(1000)
    )
    page = html_page(replace(fleet, adapters=rows))
    assert page.count("/checkpoint-1200</th>") == 1000
    assert len(page.encode()) <= MOST_BYTES
    page = html_page(many_adapters(compared, 1000))
    assert len(page.encode()) <= MOST_BYTES
    assert "The nearest of 1000 adapters share a row." in page


def test_rows_of_several_adapters_are_leaves_of_the_dendrogram(compared: CompareReport) -> None:
    figures = figures_of(many_adapters(compared, 60))
    tree, matrix = figures["compare-dendrogram"], figures["compare-cosine"]
    assert isinstance(tree, Tree)
    assert isinstance(matrix, HeatMap)
    assert tree.leaves == matrix.rows
    assert len(tree.joins) == len(tree.leaves) - 1
    assert sorted(at for one, other, _ in tree.joins for at in (one, other)) == [*range(2 * len(tree.leaves) - 2)]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("resized", "light"),
        ("combined", "dark"),
        ("pair", "light"),
        ("compared", "dark"),
        ("extracted", "light"),
        ("fleet", "dark"),
    ],
)
def test_every_page_opens_without_a_complaint_or_a_request(
    browser: Any, name: str, scheme: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    loratool.write_page(request.getfixturevalue(name), path)
    opened = Opened(browser, path, color_scheme=scheme)
    assert opened.page.locator("article h1").count() == 1
    assert opened.page.locator("svg[role=img]").count() > 0
    opened.close()


def test_of_many_adapters_the_one_that_is_chosen_in_the_table_is_in_front(
    browser: Any, compared: CompareReport, tmp_path: Path
) -> None:
    found = many_adapters(compared, 12)
    spectra = {name: tuple(1 / (at + 1) ** rank for rank in range(8)) for at, name in enumerate(found.adapters)}
    loratool.write_page(replace(found, spectra=spectra), tmp_path / "page.html")
    opened = Opened(browser, tmp_path / "page.html")
    script = "document.querySelector('.lines .chosen').getAttribute('d') === [...document.querySelectorAll('.lines .l')][{}].getAttribute('d')"
    assert opened.page.evaluate(script.format(0))
    opened.page.locator(".linked tbody tr").nth(7).click()
    assert opened.page.evaluate(script.format(7))
    assert "a-team/with-a-run-0007 in front of the others; choose another one in the table" in opened.texts(".hint")
    opened.close()


def test_a_map_of_signs_keeps_its_colours(
    browser: Any, pair: CompareReport, resized: ResizeReport, tmp_path: Path
) -> None:
    """Only maps from little to much can be coloured by another column."""
    for name, report, chooses in (("pair", pair, 0), ("resized", resized, 1)):
        loratool.write_page(report, tmp_path / f"{name}.html")
        opened = Opened(browser, tmp_path / f"{name}.html")
        assert opened.page.locator("select.metric:not([hidden])").count() == chooses
        opened.close()


def test_the_page_of_many_has_their_problems_twins_and_neighbours(fleet: FleetFacts) -> None:
    one, three, two = fleet.adapters  # by name
    near = Neighbour("old-run", 0.125, 0.01, 0.0625, "", "runs/old-run")
    rows = (
        replace(one, near=(near,)),
        replace(two, same_as=("three",)),
        replace(three, health="malformed", reason="the header is not JSON", exit_code=3, same_as=("two",)),
    )
    page = html_page(replace(fleet, adapters=rows, left_out=("model.safetensors",)))
    text = re.sub(r"<[^>]*>", " ", page)
    assert re.search(r"one\s+old-run\s+0\.125\s+0\.0625", text)
    assert re.search(r"malformed\s+three: the header is not JSON", text)
    assert text.count("three = two") == 1
    assert "not an adapter  model.safetensors" in text


def test_the_table_of_a_folder_is_sorted_by_keyboard(browser: Any, three: list[Path], tmp_path: Path) -> None:
    """`inspect DIR --html` writes the page of the table; ‖ΔW‖ in it is numpy's, and a heading sorts by it."""
    assert cli.run(["inspect", str(three[0].parent), "--values", "--html", str(tmp_path / "page.html"), "-q"]) == 0
    opened = Opened(browser, tmp_path / "page.html")
    heads = opened.texts(".sorted thead th")
    column = next(at for at, head in enumerate(heads, 1) if "‖ΔW‖" in head)
    button = opened.page.locator(f".sorted thead th:nth-child({column}) button")
    button.focus()
    opened.page.keyboard.press("Enter")
    shown = [float(text) for text in opened.column(column, ".sorted")]
    norms = [np.sqrt(sum((values**2).sum() for values in singular(path).values())) for path in three]
    assert shown == pytest.approx(sorted(norms, reverse=shown[0] > shown[-1]), rel=1e-3)
    opened.close()


@pytest.mark.parametrize("command", ["resize", "combine", "compare", "inspect"])
def test_commands_write_their_page_and_their_figures(command: str, three: list[Path], tmp_path: Path) -> None:
    one, two = map(str, three[:2])
    words = {
        "resize": [one, "-o", f"{tmp_path}/out", "--rank", "2"],
        "combine": [one, two, "-o", f"{tmp_path}/out"],
        "compare": [one, two],
        "inspect": [str(three[0].parent)],
    }
    arguments = [command, *words[command], "--html", f"{tmp_path}/page.html", "--svg", f"{tmp_path}/figures", "-q"]
    assert cli.run(arguments) == 0
    title = re.search("<title>(.*)</title>", (tmp_path / "page.html").read_text())
    assert title is not None
    assert title[1].endswith(f" · loratool {command}")
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names
    assert all(name.startswith(f"{command}-") and name.endswith(".svg") for name in names)


def test_names_from_files_are_text_on_a_page(fleet: FleetFacts, compared: CompareReport) -> None:
    nasty = "<img src=x onerror=alert(1)>"
    row = replace(fleet.adapters[0], name=nasty, base=nasty, reason=nasty, health="malformed", exit_code=3)
    results: list[Result] = [replace(fleet, adapters=(row, *fleet.adapters))]
    pairs = json.loads(json.dumps([nasty, *compared.adapters[1:]]))
    results.append(
        replace(
            compared,
            adapters=tuple(pairs),
            norms=dict.fromkeys(pairs, 1.0),
            spectra=dict.fromkeys(pairs, (1.0,)),
        )
    )
    for result in results:
        page = html_page(result)
        assert "<img" not in page
        assert "&lt;img src=x" in page
