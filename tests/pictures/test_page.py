"""The page of `inspect --html`, opened in a real browser: what is drawn, what a reader can do with it, and what it loads.

Skipped where Debian's chromium is not installed (`apt-get install chromium`), but for what needs no browser.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import loratool
from loratool import cli
from loratool.results.facts import AdapterFacts

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
NAMES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
LAYERS, RANK = 12, 4
NASTY = "</script><img src=x onerror=alert(1)>&\"'"


def write(folder: Path, layers: int = LAYERS, names: Sequence[str] = NAMES, **config: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for at, name in enumerate(names):
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, 16, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(24, RANK, generator=generator) * (1 + layer + 3 * at)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    table = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": "some/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(table))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("html") / "adapter")


@pytest.fixture(scope="module")
def facts(adapter: Path) -> AdapterFacts:
    found = loratool.inspect(adapter, values=True, check=True, device="cpu")
    assert isinstance(found, AdapterFacts)
    return found


@pytest.fixture(scope="module")
def page_file(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "page.html"
    assert cli.run(["inspect", str(adapter), "--html", str(path), "--check", "--device", "cpu", "-q"]) == 0
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: the page is not opened in a browser")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
    with driver.sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


class Opened:
    """A page in the browser, and everything that it complained of or asked for."""

    def __init__(self, browser: Any, path: Path, **settings: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1240, "height": 900}, **settings})
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("footer")

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.page.locator(selector).all_inner_texts()
        return found

    def tip(self) -> str:
        text: str = self.page.locator("#tip").inner_text()
        return text


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Opened]:
    found = Opened(browser, page_file)
    yield found
    assert found.complaints == []
    assert [url for url in found.requests if not url.startswith(("file:", "data:"))] == []
    found.context.close()


def norms(facts: AdapterFacts) -> dict[str, float]:
    assert facts.values is not None
    return {m.target.removesuffix(".weight"): m.norm or 0.0 for m in facts.values.modules}


def test_the_heat_map_has_a_cell_for_each_module_and_darker_is_larger(opened: Opened, facts: AdapterFacts) -> None:
    cells = opened.page.locator(".cell")
    assert cells.count() == LAYERS * len(NAMES) == len(norms(facts))
    places = {(cell.get_attribute("x"), cell.get_attribute("y")) for cell in cells.all()}
    assert len(places) == LAYERS * len(NAMES)
    colours = opened.page.evaluate("[...document.querySelectorAll('.cell')].map(c => getComputedStyle(c).fill)")
    assert len(set(colours)) > LAYERS


def test_hovering_over_a_cell_shows_its_module_and_its_number(opened: Opened, facts: AdapterFacts) -> None:
    known = norms(facts)
    for at in (0, 7, LAYERS * len(NAMES) - 1):
        opened.page.locator(f'.cell[data-at="{at}"]').hover()
        number, target = opened.tip().split("\n")
        assert target in known
        assert float(number.split()[-1]) == pytest.approx(known[target], rel=1e-3)


def test_the_map_shows_another_number_when_it_is_chosen(opened: Opened, facts: AdapterFacts) -> None:
    assert facts.values is not None
    stable = {m.target.removesuffix(".weight"): m.stable_rank for m in facts.values.modules}
    opened.page.select_option("select.metric", label="stable rank")
    opened.page.locator('.cell[data-at="5"]').hover()
    number, target = opened.tip().split("\n")
    assert number.startswith("stable rank ")
    assert float(number.split()[-1]) == pytest.approx(stable[target], rel=1e-3)


def column(opened: Opened, number: int) -> list[str]:
    return opened.texts(f".modules tbody tr td:nth-child({number})")


def test_a_click_on_a_heading_sorts_and_another_one_turns_the_order(opened: Opened) -> None:
    heading = opened.page.locator(".modules thead th", has_text="‖ΔW‖").first
    heading.locator("button").click()
    falling = [float(text) for text in column(opened, 3)]
    assert falling == sorted(falling, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"
    heading.locator("button").click()
    rising = [float(text) for text in column(opened, 3)]
    assert rising == sorted(falling)
    opened.page.locator(".modules thead th button").first.click()
    layers = [int(re.findall(r"\d+", text)[0]) for text in column(opened, 1)]
    assert layers == sorted(layers)  # 2 comes before 10
    assert len(layers) == LAYERS * len(NAMES)


def test_the_filter_leaves_the_rows_whose_name_holds_the_text(opened: Opened) -> None:
    opened.page.fill("input[type=search]", "down")
    shown = [row for row in opened.page.locator(".modules tbody tr").all() if row.is_visible()]
    assert len(shown) == LAYERS
    assert all("down_proj" in row.inner_text() for row in shown)


def test_a_click_on_a_cell_chooses_the_spectrum_and_hovering_tells_its_values(
    opened: Opened, facts: AdapterFacts
) -> None:
    assert facts.values is not None
    opened.page.locator('.cell[data-at="4"]').click()
    target = opened.texts(".chosen-name")[0].split(" among")[0]
    assert opened.texts(".modules tr.chosen td:first-child")[0] == target
    module = next(m for m in facts.values.modules if m.target.removesuffix(".weight") == target)
    assert opened.page.locator(".line").count() == 2 * (LAYERS * len(NAMES) + 1)
    chart = opened.page.locator(".charts svg").first
    box = chart.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] * 0.11, box["y"] + box["height"] / 2)
    found = re.match(r"σ 1 = (\S+)", opened.tip())
    assert found
    assert float(found[1]) == pytest.approx(module.singular_values[0], rel=1e-3)
    energy = opened.page.locator(".charts svg").last
    box = energy.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] * 0.98, box["y"] + box["height"] / 2)
    assert opened.tip().startswith(f"rank {RANK} keeps 100.0 %")


@pytest.mark.parametrize("width", [390, 768, 1240])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_every_width_in_light_and_in_dark(
    browser: Any, page_file: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, page_file, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    assert opened.page.locator(".cell").count() == LAYERS * len(NAMES)
    sizes = opened.page.evaluate(
        "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect()).map(b => Math.min(b.width, b.height))"
    )
    assert min(size for size in sizes if size) > 4
    ink, paper = opened.page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    contrast = contrast_of(luminance(ink), luminance(paper))
    assert contrast > 7
    assert (luminance(paper) < luminance(ink)) == (scheme == "dark")
    assert opened.complaints == []
    opened.context.close()


def luminance(colour: str) -> float:
    """Relative luminance, as the Web Content Accessibility Guidelines define it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast_of(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_names_from_the_file_are_shown_as_text_and_run_nothing(browser: Any, tmp_path: Path) -> None:
    names = [f"a{NASTY}.q_proj", "b.q_proj"]
    path = write(tmp_path / "<b>adapter", 2, names, base_model_name_or_path=NASTY, target_modules=["x", NASTY])
    out = tmp_path / "page.html"
    assert cli.run(["inspect", str(path), "--html", str(out), "--check", "--device", "cpu", "-q"]) == 0
    assert "<img" not in out.read_text("utf-8")
    assert out.read_text("utf-8").count("</script>") == 2
    opened = Opened(browser, out)
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator("h1 b").count() == 0
    assert opened.page.title().startswith("<b>adapter")
    assert any(NASTY in text for text in opened.texts("dd"))
    assert opened.complaints == []
    opened.context.close()


def test_an_adapter_without_layers_zero_updates_and_checkpoints_have_a_page_too(browser: Any, tmp_path: Path) -> None:
    tensors = {
        "base_model.model.embed.lora_embedding_A": torch.zeros(2, 9),
        "base_model.model.embed.lora_embedding_B": torch.zeros(8, 2),
        "base_model.model.head.lora_A.weight": torch.full((2, 8), float("nan")),
        "base_model.model.head.lora_B.weight": torch.ones(9, 2),
    }
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    (tmp_path / "base").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "base" / "model.safetensors")
    out = tmp_path / "page.html"
    words = ["inspect", str(tmp_path / "a"), str(tmp_path / "base"), "--check", "--html", str(out), "--device", "cpu"]
    assert cli.run([*words, "-q"]) == 3
    opened = Opened(browser, out)
    assert opened.texts("h1") == ["a", "base"]
    assert opened.page.locator(".cell").count() == 2
    assert opened.page.locator(".cell.none").count() == 1
    assert "not-finite" in opened.texts(".finding.problem .badge")
    assert opened.complaints == []
    opened.context.close()


# What needs no browser


def test_the_page_of_a_70b_adapter_is_below_5_mb_and_holds_every_module(facts: AdapterFacts) -> None:
    assert facts.values is not None
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    spectrum = tuple(1 / (1 + at) for at in range(1024))
    modules = tuple(
        replace(facts.values.modules[0], target=f"model.layers.{layer}.{name}.weight", singular_values=spectrum)
        for layer in range(80)
        for name in names
    )
    text = loratool.html_page([replace(facts, values=replace(facts.values, modules=modules))])
    assert len(text.encode()) < 5_000_000
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert len(data[0]["modules"]) == 560
    assert {(m["layer"], m["name"]) for m in data[0]["modules"]} == {(n, name) for n in range(80) for name in names}


def test_the_page_loads_nothing_and_says_so_to_the_browser(page_file: Path) -> None:
    text = page_file.read_text("utf-8")
    assert "default-src 'none'" in text
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)\S+", text) == []
    assert re.findall(r"(?:src|href)=\"(?!data:)", text) == []
    assert "innerHTML" not in text


def test_a_page_is_not_overwritten_unless_that_is_said(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    out.write_text("mine")
    words = ["inspect", str(adapter), "--html", str(out), "--device", "cpu", "-q"]
    assert cli.run(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    out.unlink()
    assert cli.run(words) == 0
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
