"""`loratool demo --learn`: every command of the lesson is real, and what the lesson says of its files is true."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from loratool import cli
from loratool.cli import lesson
from loratool.results.lesson import Latency, Lesson, Nearness, Played, Step

Q_AND_V = re.compile(r"model\.layers\.\d\.self_attn\.[qv]_proj\.weight")


@dataclass(frozen=True)
class Run:
    folder: Path
    text: str

    @property
    def commands(self) -> list[list[str]]:
        return [shlex.split(line)[2:] for line in self.text.splitlines() if line.startswith("$ loratool")]

    def tensors(self, name: str) -> dict[str, Tensor]:
        files = sorted((self.folder / name).glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def updates(self, adapter: str) -> dict[str, Any]:
        """BA of each weight, in float64 by numpy."""
        factors = {k: v.double().numpy() for k, v in self.tensors(adapter).items()}
        stems = {key.removesuffix(".lora_A.weight") for key in factors if key.endswith(".lora_A.weight")}
        return {
            f"{stem.removeprefix('base_model.model.')}.weight": factors[f"{stem}.lora_B.weight"]
            @ factors[f"{stem}.lora_A.weight"]
            for stem in stems
        }


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("lesson") / "learn"
    text = StringIO()
    with redirect_stdout(text):
        assert cli.run(["demo", str(folder), "--learn"]) == 0
    return Run(folder, text.getvalue())


def test_it_has_six_steps_with_a_command_each_and_all_files_stay(played: Run) -> None:
    steps = played.text.split("\nStep ")
    titles = ["what is trained", "ΔW by hand", "the rank, from the spectrum", "α is a strength", "merging"]
    titles += ["unmerging, and how close it comes"]
    assert [line for line in played.text.splitlines() if re.match(r"Step \d of 6: ", line)] == [
        f"Step {number} of 6: {title}" for number, title in enumerate(titles, 1)
    ]
    assert all("$ loratool " in step for step in steps)
    named = {word for words in played.commands for word in words if word.startswith(str(played.folder))}
    assert all(Path(path).is_dir() for path in named)
    assert {Path(path).name for path in named} >= {"base", "adapter", "merged", "unmerged", "small", "half"}


def test_its_commands_typed_again_print_the_same(played: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that only read; numbers of time and memory differ from run to run."""

    def steady(text: str) -> list[str]:
        return [re.sub(r"^(took|peak memory|read) .*", r"\1", line) for line in text.rstrip("\n").splitlines()]

    reading = [words for words in played.commands if words[0] in ("estimate", "inspect", "verify")]
    assert len(reading) == 4
    for words in reading:
        assert cli.run(words) == 0
        shown = played.text.split(f"$ {shlex.join(['loratool', *words])}\n")[1]
        again = steady(capsys.readouterr().out)
        assert steady(shown)[: len(again)] == again


def test_the_known_digits_are_in_the_first_step(played: Run) -> None:
    first = played.text.split("Step 2 of 6")[0]
    assert "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622" in first
    assert "= 80.86 GB" in first
    assert "84 GB" in first


def test_the_matrix_in_the_file_is_the_one_that_pen_and_paper_give(played: Run) -> None:
    weight, merged = (played.tensors(name)["layer.weight"].numpy() for name in ("matrix", "matrix-merged"))
    config = LoraConfig.from_pretrained(str(played.folder / "matrix-adapter"))
    wanted = weight + config.lora_alpha / config.r * played.updates("matrix-adapter")["layer.weight"]
    assert weight.shape == (6, 4)
    np.testing.assert_array_equal(merged, wanted)
    last = played.text.split("as by hand:\n\n")[1].split("\n\n")[0]
    shown = [[float(number) for number in line.split()] for line in last.splitlines()]
    np.testing.assert_array_equal(shown, wanted)


def test_training_learnt_the_four_directions_and_three_hold_99_percent(played: Run) -> None:
    for name, update in played.updates("adapter").items():
        assert Q_AND_V.fullmatch(name)
        values = np.linalg.svd(update, compute_uv=False)
        np.testing.assert_allclose(values[:4], [0.8, 0.6, 0.3, 0.1], rtol=0.1)
        assert values[4] < 0.02
        energy = np.cumsum(values**2) / np.sum(values**2)
        assert energy[1] < 0.99 <= energy[2]
    small = LoraConfig.from_pretrained(str(played.folder / "small"))
    assert small.r == 3
    assert "rank          3\n" in played.text


def test_half_of_alpha_is_the_weight_one_half(played: Run) -> None:
    whole, half = (LoraConfig.from_pretrained(str(played.folder / name)) for name in ("adapter", "half"))
    assert half.lora_alpha / half.r == whole.lora_alpha / whole.r / 2
    base, merged, updates = played.tensors("base"), played.tensors("merged-half"), played.updates("adapter")
    for name, update in updates.items():
        wanted = base[name].double() + 0.5 * torch.from_numpy(update)
        torch.testing.assert_close(merged[name].double(), wanted, rtol=2**-8, atol=1e-12)
    assert "proven: every tensor is what the formula gives" in played.text


def test_three_timings_have_a_median_a_spread_and_a_ratio(played: Run) -> None:
    number = r"(\d+\.\d)"
    for name in ("base", r"base \+ adapter", "merged"):
        found = re.search(
            rf"^{name} +{number} µs  \({number} to {number}\)  (\d+\.\d\d) × base$", played.text, re.MULTILINE
        )
        assert found
        median, low, high = map(float, found.groups()[:3])
        assert low <= median <= high


def test_what_unmerging_leaves_is_counted_as_in_the_files(played: Run) -> None:
    base, unmerged = played.tensors("base"), played.tensors("unmerged")
    names = [name for name in base if Q_AND_V.fullmatch(name)]
    same = sum(int((base[name].view(torch.int16) == unmerged[name].view(torch.int16)).sum()) for name in names)
    total = sum(base[name].numel() for name in names)
    largest = max(float((base[name].double() - unmerged[name].double()).abs().max()) for name in names)
    assert 0 < same < total
    assert re.search(rf"^equal to the base +{same:,} +{100 * same / total:.2f} %$", played.text, re.MULTILINE)
    assert re.search(rf"^largest difference +{largest:.2g}$", played.text, re.MULTILINE)
    assert all(torch.equal(base[name], unmerged[name]) for name in base if name not in names)


def test_it_replaces_a_lesson_only_when_asked_and_never_other_files(played: Run) -> None:
    assert cli.run(["demo", str(played.folder), "--learn"]) == 2
    (played.folder / "notes.txt").write_text("mine")
    try:
        assert cli.run(["demo", str(played.folder), "--learn", "--overwrite"]) == 2
        assert (played.folder / "notes.txt").read_text() == "mine"
        assert (played.folder / "unmerged" / "model.safetensors.index.json").is_file()
    finally:
        (played.folder / "notes.txt").unlink()


def test_with_json_the_lesson_is_one_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Step(1, "a title", "before", (Played("loratool inspect x", "text"),), "after")
    latency = {"base": Latency(1.0, 0.5, 2.0, 1.0)}

    def play(home: Path, overwrite: bool, show: Any) -> Lesson:
        show(step)
        return Lesson(home, (step,), latency, Nearness(4, 3, 1, 0, 0.5))

    monkeypatch.setattr(lesson, "play", play)
    assert cli.run(["demo", str(tmp_path / "learn"), "--learn", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["kind"]) == (1, "lesson")
    assert found["steps"][0]["played"] == [{"command": "loratool inspect x", "output": "text"}]
    assert found["latency"]["base"] == {"median": 1.0, "low": 0.5, "high": 2.0, "ratio": 1.0}
    assert found["nearness"]["equal"] == 3
    assert cli.run(["demo", str(tmp_path / "learn"), "--learn", "-q"]) == 0
    assert capsys.readouterr().out == ""
