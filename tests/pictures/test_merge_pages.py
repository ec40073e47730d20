"""The pages of merge, plan, verify and estimate have the numbers of their results, and the commands write them."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Opened
from pictured import LAYERS, NAMES, table_of, tiles_of
from safetensors.torch import load_file, save_file

import loratool
from loratool import cli
from loratool.notes import Note
from loratool.pictures.page import figures_of
from loratool.results.merge import MergeReport
from loratool.results.stream import StreamReport
from loratool.results.verify import Verification

EDITED = LAYERS * len(NAMES)


@pytest.fixture(scope="session")
def estimate() -> Any:
    return loratool.estimate(preset="llama-2-7b", ranks=[8, 64], targets="q_proj,v_proj")


@pytest.fixture(scope="session")
def plan(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loratool.plan(base, adapter, tmp_path_factory.mktemp("plans") / "out", simulate=[1, 8])


@pytest.fixture(scope="session")
def verified(merged: MergeReport, base: Path, adapter: Path) -> Verification:
    return loratool.verify(merged.out, base=base, adapters=[adapter], device="cpu")


@pytest.fixture(scope="session")
def spoiled(merged: MergeReport, base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Verification:
    """Of a copy in which one tensor is the base's again, and one element of another is off."""
    out = tmp_path_factory.mktemp("spoiled") / "model"
    shutil.copytree(merged.out, out)
    (out / "loratool.json").unlink()
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.3.self_attn.q_proj.weight"] = load_file(base / "model.safetensors")[
        "model.layers.3.self_attn.q_proj.weight"
    ]
    tensors["model.layers.5.mlp.down_proj.weight"][2, 2] += 64
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return loratool.verify(out, base=base, adapters=[adapter], device="cpu")


def drawn(result: Any, name: str) -> dict[str, str]:
    """Label → number of every cell of a map."""
    markup = figures_of(result)[name].draw(alone=True).markup
    return dict(re.findall(r"<title>([^<]+): (?:[^ <]+ )?([^ <]+)</title>", markup))


# merge


def test_the_page_of_a_merge_has_norm_and_gain_of_every_weight(merged: MergeReport) -> None:
    """In the table and on the maps, to four digits: ‖ΔW‖/‖W‖ as computed in float64 from the files."""
    rows = table_of(loratool.html_page(merged), "weight")
    assert {f"{name}.weight" for name in rows} == set(merged.relative_norms) == set(merged.gains)
    for name, row in rows.items():
        assert float(row["‖ΔW‖/‖W‖"]) == pytest.approx(merged.relative_norms[f"{name}.weight"], rel=1e-3)
        assert float(row["gain"]) == pytest.approx(merged.gains[f"{name}.weight"], rel=1e-3)
    for figure, heading in (("merge-relative-norm", "‖ΔW‖/‖W‖"), ("merge-gain", "gain")):
        cells = drawn(merged, figure)
        assert len(cells) == EDITED
        assert cells == {name: row[heading] for name, row in rows.items()}


def test_the_numbers_of_a_merge_s_page_are_those_of_the_formula(merged: MergeReport, base: Path, adapter: Path) -> None:
    weight = load_file(base / "model.safetensors")["model.layers.7.mlp.down_proj.weight"].double()
    factors = load_file(adapter / "adapter_model.safetensors")
    up, down = (factors[f"base_model.model.model.layers.7.mlp.down_proj.lora_{x}.weight"].double() for x in "BA")
    row = table_of(loratool.html_page(merged), "weight")["model.layers.7.mlp.down_proj"]
    expected = torch.linalg.norm(up @ down) / torch.linalg.norm(weight)
    assert float(row["‖ΔW‖/‖W‖"]) == pytest.approx(float(expected), rel=1e-3)


def test_the_page_of_a_merge_says_what_was_edited_copied_guessed_and_left_out(merged: MergeReport) -> None:
    told = replace(
        merged, notes=(Note("orientation-guessed", "assumed to be <b>stored</b> (in, out)"),), left_out=("a.bin",)
    )
    page = loratool.html_page(told)
    tiles = tiles_of(page)
    assert (tiles["edited"], tiles["copied"]) == (str(EDITED), str(LAYERS + 1))
    assert "1 note: what was assumed, guessed or left out" in page
    assert "assumed to be &lt;b&gt;stored&lt;/b&gt; (in, out)" in page
    assert "<dt>left out</dt><dd>a.bin</dd>" in page
    assert table_of(page, "adapter")["adapter"] == {
        "adapter": "adapter", "weight": "1", "modules": str(EDITED), "unchanged": "0",
    }  # fmt: skip
    assert "<dt>digest</dt>" in page


def test_a_loss_by_rounding_stands_out(merged: MergeReport) -> None:
    """The colour of the smallest gain is the strongest of the map, that of 1 the faintest."""
    first, second, *_ = merged.gains
    lossy = replace(merged, gains={**dict.fromkeys(merged.gains, 1.0), first: 0.25, second: 0.6})
    markup = figures_of(lossy)["merge-gain"].draw(alone=True).markup
    found = dict(re.findall(r'class="q(\d+)"[^>]*><title>([^:]+):', markup))
    assert {int(level) for level in found} == {0, 12, 23}
    assert found["23"] == first.removesuffix(".weight")


def test_the_page_of_a_merge_to_the_hub_has_the_gains(merged: MergeReport) -> None:
    report = StreamReport(
        repo="me/merged", url="", commit="abc", private=True, edited=merged.edited, adapters=merged.adapters,
        copied=merged.copied, files=2, bytes_written=5, resumed=(), most_on_disk=7, gain=merged.gain, gains=merged.gains,
        left_out=(), notes=(), digests={}, dry_run=False,
    )  # fmt: skip
    rows = table_of(loratool.html_page(report), "weight")
    assert {name: set(row) for name, row in rows.items()} == {
        name.removesuffix(".weight"): {"weight", "gain"} for name in merged.gains
    }
    assert "merge-relative-norm" not in figures_of(report)


# plan, verify, estimate


def test_the_page_of_a_plan_has_every_update_with_its_rule_and_the_simulations(plan: Any) -> None:
    page = loratool.html_page(plan)
    rows = table_of(page, "target")
    assert {f"{name}.weight": row["rule"] for name, row in rows.items()} == {
        e["target"]: e["rule"] for e in plan.to_dict()["edits"]
    }
    assert len(rows) == EDITED
    assert [*table_of(page, "workers")] == ["1", "8"]
    assert "plan-workers" in figures_of(plan)


def test_the_page_of_a_verification_shows_what_every_tensor_is(spoiled: Verification, base: Path) -> None:
    page = loratool.html_page(spoiled)
    assert spoiled.tensors is not None
    rows = table_of(page, "tensor")
    assert {row["status"] for row in rows.values()} == {"identical", "proven", "different"}
    assert {name for name, row in rows.items() if row["status"] == "different"} == {
        "model.layers.3.self_attn.q_proj",
        "model.layers.5.mlp.down_proj",
    }
    assert len(rows) == len(load_file(base / "model.safetensors"))
    assert {name: row["status"] for name, row in rows.items()} == drawn(spoiled, "verify-states")
    assert tiles_of(page)["verdict"] == "not proven"
    assert tiles_of(page)["different"] == "2"
    bars = dict(
        re.findall(r"<title>([^<]+): (\d+)</title>", figures_of(spoiled)["verify-distances"].draw(alone=True).markup)
    )
    assert sum(map(int, bars.values())) == len([p for p in spoiled.tensors.values() if p.ulp is not None])
    assert bars["above 64"] == str(sum((p.ulp or 0) > 64 for p in spoiled.tensors.values()))
    for diagnosis in spoiled.diagnoses:
        assert diagnosis.code in page


def test_the_page_of_a_record_s_check_needs_no_tensors(merged: MergeReport) -> None:
    result = loratool.verify(merged.out)
    page = loratool.html_page(result)
    assert tiles_of(page)["verdict"] == "as recorded"
    assert "<svg" not in page


def test_the_page_of_an_estimate_has_the_memory_of_every_rank(estimate: Any) -> None:
    """The lesson's own numbers: 4,194,304 of 6,742,609,920 parameters."""
    page = loratool.html_page(estimate)
    assert tiles_of(page)["trainable, r = 8"] == "4,194,304"
    assert tiles_of(page)["of all parameters"] == "0.0622 %"
    rows = table_of(page, "rank")
    assert (rows["r = 8"]["LoRA"], rows["r = 64"]["QLoRA"]) == ("13.54 GB", "4.40 GB")
    markup = figures_of(estimate)["estimate-memory"].draw(alone=True).markup
    widths = [float(width) for width in re.findall(r'class="s\d"[^>]*width="([\d.]+)" height="16"', markup)]
    assert widths[2] / widths[0] == pytest.approx(4, rel=1e-2)  # two moments in float32, weights in two bytes
    assert widths[1] == pytest.approx(widths[0], rel=1e-2)


@pytest.mark.parametrize("name", ["merged", "plan", "verified", "spoiled", "estimate"])
def test_a_browser_shows_it_without_complaint_and_nothing_sticks_out(
    name: str, browser: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    loratool.write_page(request.getfixturevalue(name), path)
    opened = Opened(browser, path, viewport={"width": 900, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 900
    if linked := opened.page.locator(".linked tbody tr").count():
        assert opened.page.locator(".cells path").count() % linked == 0
        opened.page.locator(".cells path").first.click()
        assert opened.texts("tr.on th") == [opened.tip()[1]]
    clipped = opened.page.evaluate(
        "[...document.querySelectorAll('svg')].filter(s => [...s.querySelectorAll('text')].some(t => "
        "t.getBoundingClientRect().right > s.getBoundingClientRect().right + 2)).length"
    )
    assert clipped == 0
    opened.close()


# The commands


def test_merge_writes_its_page_and_figures_outside_of_its_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    words = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--device", "cpu", "-q"]
    assert cli.run([*words, "--html", str(tmp_path / "page.html"), "--svg", str(tmp_path / "figures")]) == 0
    assert "· loratool merge</title>" in (tmp_path / "page.html").read_text("utf-8")
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= {"merge-gain.svg", "merge-relative-norm.svg"}
    assert cli.run(["verify", str(tmp_path / "out"), "-q"]) == 0


@pytest.mark.parametrize(
    ("flag", "place", "hint"),
    [("--html", "page.pdf", "--html {}/page.html"), ("--svg", "gain.svg", "--svg {}/gain")],
)
def test_a_file_of_another_kind_is_asked_for_as_what_there_is(
    flag: str, place: str, hint: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page that is called PDF, or one file for all figures."""
    words = ["inspect", str(adapter), flag, str(tmp_path / place)]
    assert cli.run(words) == 2
    assert capsys.readouterr().err.rstrip().endswith(hint.format(tmp_path))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("flag", ["--html", "--svg"])
@pytest.mark.parametrize("place", ["out/x", "out", "other/x", "in the way"])
def test_a_page_that_could_not_be_written_stops_a_merge_before_it_begins(
    flag: str, place: str, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in the way").mkdir()
    (tmp_path / "in the way" / "merge-gain.svg").write_text("mine")
    words = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--also", f"{tmp_path / 'other'}={adapter}"]
    assert cli.run([*words, "--device", "cpu", "--overwrite", flag, str(tmp_path / place)]) == 2
    assert flag in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in the way"]


def test_several_outputs_and_a_dry_run_have_pages_too(base: Path, adapter: Path, tmp_path: Path) -> None:
    words = ["merge", str(base), str(adapter), "-o", str(tmp_path / "one"), "--device", "cpu", "-q"]
    page = tmp_path / "page.html"
    assert cli.run([*words, "--also", f"{tmp_path / 'two'}={adapter}", "--html", str(page)]) == 0
    assert re.findall("<h1 [^>]*>([^<]+)<", page.read_text("utf-8")) == ["one", "two"]
    assert cli.run([*words, "--dry-run", "--html", str(page), "--overwrite"]) == 0
    assert "· loratool plan</title>" in page.read_text("utf-8")


@pytest.mark.parametrize("way", [["--part", "1/2"], ["--status"]])
def test_a_part_of_a_merge_has_no_page(
    way: list[str], base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), *way, "--html", str(tmp_path / "page.html")]
    assert cli.run(words) == 2
    assert "and --html are mutually exclusive" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_a_merge_in_parts_has_the_page_of_the_merge(base: Path, adapter: Path, tmp_path: Path) -> None:
    words = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--device", "cpu", "-q"]
    assert cli.run([*words, "--part", "1/1"]) == 0
    assert cli.run([*words, "--finish", "--html", str(tmp_path / "page.html")]) == 0
    assert len(table_of((tmp_path / "page.html").read_text("utf-8"), "weight")) == EDITED


def test_a_merge_of_several_outputs_has_a_page_with_all_of_them(base: Path, adapter: Path, tmp_path: Path) -> None:
    outputs: dict[Path, Any] = {tmp_path / "one": adapter, tmp_path / "two": (adapter, 0.5)}
    made = loratool.merge_many(base, outputs, device="cpu")
    assert re.findall("<h1 [^>]*>([^<]+)<", loratool.html_page(made)) == ["one", "two"]
    assert {"merge-1-gain", "merge-2-gain"} <= set(figures_of(made))


def test_verify_writes_its_page_whatever_the_verdict(
    spoiled: Verification, base: Path, adapter: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    words = ["verify", str(spoiled.merged), "--base", str(base), "--adapter", str(adapter), "--html", str(page), "-q"]
    assert cli.run(words) == 5
    assert "different" in page.read_text("utf-8")
    assert cli.run(words) == 2
    assert cli.run([*words, "--overwrite"]) == 5


def test_estimate_writes_its_page(tmp_path: Path) -> None:
    words = ["estimate", "--preset", "llama-2-7b", "--rank", "8", "--target", "q_proj", "-q"]
    assert cli.run([*words, "--html", str(tmp_path / "page.html"), "--svg", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["estimate-memory.svg", "page.html"]
