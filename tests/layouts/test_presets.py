"""`estimate --preset`: the sizes of released models, from a table, with the digits that people know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import loratool
from loratool import UsageError, cli
from loratool.layouts.presets import PRESETS

# Parameters of the released weights as the Hub shows them ("Model size" of the repository, tied heads counted once).
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
}
LINE = "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_its_model_is_published_with(name: str) -> None:
    assert loratool.estimate(preset=name, ranks=8, targets="all-linear").parameters == PUBLISHED[name]


def test_a_preset_estimates_what_its_config_does(tmp_path: Path) -> None:
    """All numbers are those of the same fields in a config.json; the name and the note that says where they are from differ."""
    preset = PRESETS["qwen2.5-0.5b"]
    (tmp_path / "config.json").write_text(json.dumps(dict(preset.config)))
    by_file = loratool.estimate(tmp_path, [4, 16], "q_proj,embed_tokens").to_dict()
    by_name = loratool.estimate(preset="qwen2.5-0.5b", ranks=[4, 16], targets="q_proj,embed_tokens").to_dict()
    different = {key for key in by_name if by_name[key] != by_file[key]}
    assert different <= {"cost", "path", "notes"}
    assert by_name["path"] == "qwen2.5-0.5b"


def test_llama_2_7b_needs_no_file_and_gives_the_known_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("llama-2-7b", "Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"):
        assert cli.run(["estimate", "--preset", name, "--rank", "8", "--target", "q_proj,v_proj"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert LINE in lines
        assert "note          sizes as in the config.json of meta-llama/Llama-2-7b-hf" in lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [[], ["base", "--preset", "llama-2-7b"]])
def test_a_base_and_a_preset_exclude_each_other_and_one_is_needed(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["estimate", *words, "--rank", "8", "--target", "q_proj"]) == 2
    assert "pass either BASE or --preset NAME" in capsys.readouterr().err


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'llama-2-7b'"):
        loratool.estimate(preset="llama-2-7", ranks=8, targets="q_proj")
