"""The picture in a generated card: what it shows, when there is one, and what it never replaces."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratool
from loratool.pictures.spectrum import spectrum_by_kind
from loratool.publishing import illustrating
from loratool.publishing.illustrating import PICTURE, illustrated
from loratool.publishing.selecting import Selection, select
from loratool.results.facts import AdapterFacts

LAYERS, RANK = 3, 4


def factors(layer: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A (4, 8) and B (12, 4)."""
    random = np.random.default_rng([layer, len(kind)])
    return random.standard_normal((RANK, 8)).astype("f4"), random.standard_normal((12, RANK)).astype("f4")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that nobody has described."""
    return write(tmp_path / "adapter")


def write(folder: Path, scale: float = 1.0) -> Path:
    tensors: dict[str, np.ndarray] = {}
    for layer in range(LAYERS):
        for kind in ("q_proj", "down_proj"):
            down, up = factors(layer, kind)
            module = f"base_model.model.model.layers.{layer}.{kind}"
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up * np.float32(scale)}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    table = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": "some/base"}
    (folder / "adapter_config.json").write_text(json.dumps(table))
    return folder


def chosen(folder: Path, exclude: list[str] | None = None, card: bool = False) -> tuple[Selection, dict[str, bytes]]:
    found = select(folder, [], exclude or [], card, "me/mine")
    return found, {upload.name: upload.read() for upload in found.uploads}


def codes(found: Selection) -> set[str]:
    return {note.code for note in found.notes}


def test_lines_are_the_root_mean_squares_of_the_singular_values_of_each_kind(adapter: Path) -> None:
    """The oracle is numpy's SVD of B·A."""
    facts = loratool.inspect(adapter, values=True, device="cpu")
    assert isinstance(facts, AdapterFacts)
    assert facts.values is not None
    lines = {line.label: line.points for line in spectrum_by_kind(facts.values.modules).lines}
    for kind in ("q_proj", "down_proj"):
        values = [
            np.linalg.svd(up.astype("f8") @ down)[1][:RANK] for down, up in (factors(n, kind) for n in range(LAYERS))
        ]
        expected = np.sqrt(np.square(values).mean(0))
        np.testing.assert_allclose([y for _, y in lines[f"{kind} ×{LAYERS}"]], expected, rtol=1e-5)


def test_a_generated_card_refers_to_a_picture_that_is_uploaded_and_the_folder_stays_as_it_is(adapter: Path) -> None:
    before = sorted(path.name for path in adapter.iterdir())
    found, files = chosen(adapter)
    assert f"]({PICTURE})" in files["README.md"].decode()
    root = ElementTree.fromstring(files[PICTURE])
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert {"q_proj ×3", "down_proj ×3"} <= {
        "".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")
    }
    assert b"<script" not in files[PICTURE]
    assert b"http" not in files[PICTURE].replace(b"http://www.w3.org/2000/svg", b"")
    assert "picture-made" in codes(found)
    assert sorted(path.name for path in adapter.iterdir()) == before
    assert chosen(adapter)[1] == files


def test_a_card_written_by_hand_gets_no_picture(adapter: Path) -> None:
    (adapter / "README.md").write_text("# mine\n")
    found, files = chosen(adapter)
    assert PICTURE not in files
    assert files["README.md"] == b"# mine\n"
    assert codes(found) == {"card-kept"}


def test_the_picture_can_be_excluded(adapter: Path) -> None:
    _, files = chosen(adapter, exclude=["*.svg"])
    assert PICTURE not in files
    assert PICTURE not in files["README.md"].decode()


def test_a_picture_of_that_name_that_loratool_did_not_make_is_kept(adapter: Path) -> None:
    (adapter / PICTURE).write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    _, files = chosen(adapter)
    assert files[PICTURE] == b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    assert PICTURE not in files["README.md"].decode()


def test_an_older_picture_of_ours_is_made_anew(adapter: Path) -> None:
    drawn = chosen(adapter)[1][PICTURE]
    (adapter / PICTURE).write_bytes(drawn.replace(b"q_proj", b"old_proj"))
    assert chosen(adapter)[1][PICTURE] == drawn


def test_an_update_of_zero_has_no_picture_and_a_note_says_why(tmp_path: Path) -> None:
    found, files = chosen(write(tmp_path / "zero", scale=0.0))
    assert PICTURE not in files
    assert PICTURE not in files["README.md"].decode()
    assert "no-picture" in codes(found)


def test_what_would_take_long_to_measure_has_no_picture(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(illustrating, "MOST_WORK", 1.0)
    found, files = chosen(adapter)
    assert PICTURE not in files
    assert "no-picture" in codes(found)


def test_the_record_that_is_uploaded_lists_the_picture(adapter: Path, tmp_path: Path) -> None:
    loratool.rescale(adapter, tmp_path / "half", scale=0.5)
    _, files = chosen(tmp_path / "half")
    for name in ("README.md", PICTURE):
        assert json.loads(files["loratool.json"])["files"][name]["size"] == len(files[name])
    for name, content in files.items():
        (tmp_path / "half" / name).write_bytes(content)
    assert chosen(tmp_path / "half")[1] == files


def test_a_card_has_its_picture_once() -> None:
    card = b"# A\n\n## Usage\n\ncode\n"
    once = illustrated(card)
    assert once.count(PICTURE.encode()) == 1
    assert once.index(PICTURE.encode()) < once.index(b"## Usage")
    assert illustrated(once) == once
    assert PICTURE.encode() in illustrated(b"# without code\n")
