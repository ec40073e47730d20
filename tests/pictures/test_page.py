"""The page of `inspect`: what it shows is what was measured, it answers, and it loads nothing, in chromium if that is there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Opened, contrast_of, luminance
from peft_files import save_peft
from pictured import LAYERS, NAMES, RANK, write_adapter
from safetensors.torch import save_file

import loratool
from loratool import cli
from loratool.results.facts import AdapterFacts

NASTY = "</script><img src=x onerror=alert(1)>&\"'"
CELLS = ".cells path"


@pytest.fixture(scope="module")
def page_file(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "page.html"
    assert cli.run(["inspect", str(adapter), "--html", str(path), "--check", "--device", "cpu", "-q"]) == 0
    return path


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Opened]:
    found = Opened(browser, page_file)
    yield found
    found.close()


def norms(facts: AdapterFacts) -> dict[str, float]:
    assert facts.values is not None
    return {m.target.removesuffix(".weight"): m.norm or 0.0 for m in facts.values.modules}


def hovered(opened: Opened, at: int) -> tuple[str, float, str]:
    """What the tooltip says over a cell: the metric, its value and the module."""
    opened.page.locator(CELLS).nth(at).hover()
    number, target = opened.tip()
    return number.rpartition(" ")[0], float(number.rpartition(" ")[2]), target


def test_the_heat_map_has_a_cell_for_each_module_and_darker_is_larger(opened: Opened, facts: AdapterFacts) -> None:
    """Of every two cells, the one of the larger norm is not brighter."""
    cells = opened.page.locator(CELLS)
    known = norms(facts)
    assert cells.count() == LAYERS * len(NAMES) == len(known)
    assert len({cell.get_attribute("d").partition("h")[0] for cell in cells.all()}) == LAYERS * len(NAMES)
    script = f"[...document.querySelectorAll('{CELLS}')].map(c => [Number(c.dataset.e), getComputedStyle(c).fill])"
    names = opened.column(1)
    seen = sorted((known[names[entry]], luminance(fill)) for entry, fill in opened.page.evaluate(script))
    light = [value for _, value in seen]
    assert light == sorted(light, reverse=True)
    assert len(set(light)) > LAYERS


def test_hovering_over_a_cell_shows_its_module_and_its_number(opened: Opened, facts: AdapterFacts) -> None:
    known = norms(facts)
    for at in (0, 7, LAYERS * len(NAMES) - 1):
        metric, number, target = hovered(opened, at)
        assert metric == "‖ΔW‖"
        assert number == pytest.approx(known[target], rel=1e-3)


def test_the_map_shows_another_number_when_it_is_chosen(opened: Opened, facts: AdapterFacts) -> None:
    """Its colours, its legend and its tooltips are those of the column, whatever the order of the table."""
    assert facts.values is not None
    stable = {m.target.removesuffix(".weight"): m.stable_rank or 0.0 for m in facts.values.modules}
    opened.page.locator(".linked thead button").nth(4).click()
    opened.page.select_option("select.metric", label="stable")
    metric, number, target = hovered(opened, 5)
    assert metric == "stable"
    assert number == pytest.approx(stable[target], rel=1e-3)
    ends = [float(opened.page.locator(f"svg .{end}").text_content()) for end in ("low", "high")]
    assert ends == pytest.approx([min(stable.values()), max(stable.values())], rel=1e-3)
    names = opened.page.evaluate(
        f"[...document.querySelectorAll('{CELLS}')].map(c => [c.getAttribute('class'), Number(c.dataset.e)])"
    )
    first = max(names, key=lambda pair: int(re.findall(r"q(\d+)", pair[0])[0]))[1]
    opened.page.reload()
    assert stable[opened.column(1)[first]] == max(stable.values())


def test_a_heading_sorts_by_keyboard_and_a_second_time_turns_the_order(opened: Opened) -> None:
    heading = opened.page.locator(".linked thead th", has_text="‖ΔW‖").first
    heading.locator("button").focus()
    opened.page.keyboard.press("Enter")
    falling = [float(text) for text in opened.column(3)]
    assert falling == sorted(falling, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"
    opened.page.keyboard.press("Space")
    rising = [float(text) for text in opened.column(3)]
    assert rising == sorted(falling)
    assert heading.get_attribute("aria-sort") == "ascending"
    opened.page.locator(".linked thead th button").first.press("Enter")
    assert opened.page.locator("th[aria-sort]").count() == 1
    layers = [int(re.findall(r"\d+", text)[0]) for text in opened.column(1)]
    assert layers == sorted(layers)  # 2 comes before 10
    assert len(layers) == LAYERS * len(NAMES)


def test_everything_is_reached_and_named_without_a_pointer(opened: Opened) -> None:
    """The first stop skips to the table; the arrow keys go through the map, and a live region says where they are."""
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.innerText") == "Skip to the table"
    opened.page.keyboard.press("Enter")
    assert opened.page.evaluate("document.querySelector(location.hash).tagName") == "H2"
    images = opened.page.locator("svg[role=img]")
    assert images.count() == 4
    for at in range(4):
        assert opened.page.evaluate(
            "at => document.getElementById(document.querySelectorAll('svg')[at].getAttribute('aria-labelledby')).innerText",
            at,
        )
    assert opened.page.locator("tbody th[scope=row]").count() == LAYERS * len(NAMES) + 3
    assert opened.page.locator("#tip[role=status]").count() == 1
    opened.page.locator(".scroll").first.focus()
    opened.page.keyboard.press("ArrowUp")
    assert opened.tip()[1].endswith("self_attn.v_proj")
    here = int(re.findall(r"\d+", opened.tip()[1])[0])
    opened.page.keyboard.press("ArrowLeft")
    assert opened.tip()[1] == f"model.layers.{here - 1}.self_attn.v_proj"
    assert opened.texts("tr.on th") == [opened.tip()[1]]


def test_the_filter_leaves_the_rows_whose_name_holds_the_text(opened: Opened) -> None:
    opened.page.fill("input[type=search]", "down")
    shown = [row for row in opened.page.locator(".linked tbody tr").all() if row.is_visible()]
    assert len(shown) == LAYERS
    assert all("down_proj" in row.inner_text() for row in shown)


def test_a_click_on_a_cell_chooses_the_spectrum_and_hovering_tells_its_values(
    opened: Opened, facts: AdapterFacts
) -> None:
    assert facts.values is not None
    opened.page.locator(CELLS).nth(4).click()
    (target,) = opened.texts("tr.on th")
    assert opened.texts(".card:has(.lines) .hint")[0].startswith(f"{target} in front of")
    module = next(m for m in facts.values.modules if m.target.removesuffix(".weight") == target)
    assert opened.page.locator(".lines path").count() == 2 * (LAYERS * len(NAMES) + 1)
    box = opened.page.locator("svg[data-says]").first.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] * 0.12, box["y"] + box["height"] / 2)
    found = re.match(r"σ 1 = (\S+)", opened.tip()[0])
    assert found
    assert float(found[1]) == pytest.approx(module.singular_values[0], rel=1e-2)
    box = opened.page.locator("svg[data-says]").last.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] * 0.98, box["y"] + box["height"] / 2)
    assert opened.tip()[0] == f"rank {RANK} keeps 100 %"


@pytest.mark.parametrize("width", [390, 1240])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_every_width_in_light_and_in_dark(
    browser: Any, page_file: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, page_file, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    sizes = opened.page.evaluate(
        "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect()).map(b => Math.min(b.width, b.height))"
    )
    assert min(size for size in sizes if size) > 4
    ink, paper = opened.page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    assert contrast_of(luminance(ink), luminance(paper)) > 7
    assert (luminance(paper) < luminance(ink)) == (scheme == "dark")
    soft, card = opened.page.evaluate(
        "[getComputedStyle(document.querySelector('.hint')).color, getComputedStyle(document.querySelector('.card')).backgroundColor]"
    )
    assert contrast_of(luminance(soft), luminance(card)) > 4.5
    opened.close()


def test_on_paper_it_is_light_and_shows_every_row(browser: Any, page_file: Path) -> None:
    opened = Opened(browser, page_file, color_scheme="dark")
    opened.page.emulate_media(media="print")
    ink, paper = opened.page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    assert luminance(ink) < 0.05
    assert luminance(paper) > 0.95
    table = opened.page.locator(".table:has(.linked)")
    assert table.evaluate("t => t.scrollHeight - t.clientHeight") <= 1
    assert not opened.page.locator("select.metric").is_visible()
    display = "getComputedStyle(document.querySelector('.linked th button')).display"
    assert opened.page.evaluate(display) == "contents"  # chromium repeats headings on every sheet only then
    opened.close()


def test_names_from_the_file_are_shown_as_text_and_run_nothing(browser: Any, tmp_path: Path) -> None:
    names = [f"a{NASTY}.q_proj", "b.q_proj"]
    path = write_adapter(tmp_path / "<b>adapter", 2, names, base_model_name_or_path=NASTY, target_modules=["x", NASTY])
    out = tmp_path / "page.html"
    assert cli.run(["inspect", str(path), "--html", str(out), "--check", "--device", "cpu", "-q"]) == 0
    assert "<img" not in out.read_text("utf-8")
    assert out.read_text("utf-8").count("</script>") == 1
    opened = Opened(browser, out)
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator("h1 b").count() == 0
    assert opened.page.title().startswith("<b>adapter")
    assert any(NASTY in text for text in opened.texts("dd"))
    opened.close()


def test_an_adapter_without_layers_zero_updates_and_checkpoints_have_a_page_too(browser: Any, tmp_path: Path) -> None:
    tensors = {
        "base_model.model.embed.lora_embedding_A": torch.zeros(2, 9),
        "base_model.model.embed.lora_embedding_B": torch.zeros(8, 2),
        "base_model.model.head.lora_A.weight": torch.full((2, 8), float("nan")),
        "base_model.model.head.lora_B.weight": torch.ones(9, 2),
    }
    save_peft(tmp_path / "a", tensors, r=2, lora_alpha=2)
    (tmp_path / "base").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "base" / "model.safetensors")
    out = tmp_path / "page.html"
    words = ["inspect", str(tmp_path / "a"), str(tmp_path / "base"), "--check", "--html", str(out), "--device", "cpu"]
    assert cli.run([*words, "-q"]) == 3
    opened = Opened(browser, out)
    assert opened.texts("h1") == ["a", "base"]
    assert opened.page.locator(CELLS).count() == 2
    assert opened.page.locator(".cells .none").count() == 1
    assert "not-finite" in opened.texts(".finding.problem .badge")
    opened.close()


# What needs no browser


@pytest.mark.parametrize(("layers", "rank"), [(286, 16), (80, 1024)], ids=["2,000 modules", "70B, rank 1024"])
def test_the_largest_pages_are_below_one_and_a_half_megabytes_and_hold_every_module(
    facts: AdapterFacts, layers: int, rank: int
) -> None:
    assert facts.values is not None
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    one = facts.values.modules[0]
    modules = tuple(
        replace(
            one,
            target=f"model.layers.{layer}.mod.{name}.weight",
            norm=(one.norm or 0.0) * 1.0171**layer,
            singular_values=tuple(2.3**-layer / (1 + at) for at in range(rank)),
        )
        for layer in range(layers)
        for name in names
    )
    text = loratool.html_page([replace(facts, values=replace(facts.values, modules=modules))])
    assert len(text.encode()) < 1_500_000
    rows = re.findall(r'<tr><th scope="row">([^<]+)</th>', text)
    assert {f"{row}.weight" for row in rows if "." in row} == {m.target for m in modules}
    assert len(set(re.findall(r' data-e="(\d+)" d="[^"]+z"', text))) == len(modules)


def test_the_page_loads_nothing_and_says_so_to_the_browser(page_file: Path) -> None:
    text = page_file.read_text("utf-8")
    assert "default-src 'none'" in text
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)\S+", text) == []
    assert re.findall(r"(?:src|href)=\"(?!data:|#)", text) == []
    assert "innerHTML" not in text


def test_a_page_is_not_overwritten_unless_that_is_said(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    out.write_text("mine")
    words = ["inspect", str(adapter), "--html", str(out), "--device", "cpu", "-q"]
    assert cli.run(words) == 2
    said = capsys.readouterr().err
    assert "is never replaced" in said
    assert "--overwrite" not in said, "the hint would be refused, too"
    assert out.read_text() == "mine"
    out.unlink()
    assert cli.run(words) == 0
    assert cli.run(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.run([*words, "--overwrite"]) == 0
    assert out.read_text("utf-8").startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(("target", "told"), [("", "is a folder"), ("no/where.html", "does not exist")])
def test_a_page_goes_where_a_file_can_be(
    target: str, told: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["inspect", str(adapter), "--html", str(tmp_path / target), "-q"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("one_file", [False, True], ids=["folder", "file"])
def test_no_file_of_an_input_becomes_a_page(
    name: str, one_file: bool, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "adapter"
    shutil.copytree(adapter, copied)
    before = (copied / name).read_bytes()
    given = copied / name if one_file and name.endswith(".safetensors") else copied
    words = ["inspect", str(given), "--html", str(copied / name), "--overwrite", "-q"]
    assert cli.run(words) == 2
    assert "was not made by loratool" in capsys.readouterr().err
    assert (copied / name).read_bytes() == before


def test_a_page_that_lies_in_an_input_is_replaced(adapter: Path, tmp_path: Path) -> None:
    copied = tmp_path / "adapter"
    shutil.copytree(adapter, copied)
    words = ["inspect", str(copied), "--html", str(copied / "page.html"), "-q"]
    assert cli.run(words) == 0
    assert cli.run([*words, "--overwrite"]) == 0
