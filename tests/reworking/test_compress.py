"""Compressed adapters are what their files say by ten lines of anybody's code, and nothing of them is dropped in silence.

The oracle reads the files with safetensors and NumPy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import draw, save_model
from numpy.typing import NDArray
from peft_files import named_by_peft, save_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.cli import run
from loratool.errors import FitError, InputError, UsageError
from loratool.reworking.compressing import planning

Array = NDArray[np.float64]
ROWS, COLUMNS, DIRECTIONS = 48, 40, 6
RANKS = (3, 4, 2, 5, 4, 3, 4, 4)
MODULES = [f"model.layers.{n}.self_attn.{name}" for n in range(2) for name in ("q_proj", "v_proj")]
PREFIX = "base_model.model."


def write_adapter(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float32, **config: Any) -> None:  # fmt: skip
    """Up and down of each module, of equal rank, with α twice that."""
    rank = max(up.shape[1] for up, _ in factors.values())
    halves = {module: (up / 2, down) for module, (up, down) in factors.items()}
    save_peft(
        folder,
        {**named_by_peft(halves, dtype), **config.pop("more", {})},
        **{
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": sorted({m.rpartition(".")[2] for m in factors}),
            "base_model_name_or_path": "org/base",
            "modules_to_save": None,
            **config,
        },
    )


def factors_of(seed: int, rank: int, bases: Mapping[str, tuple[Tensor, Tensor]] | None) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """Updates of all modules; in shared directions where there are bases, with a little of their own."""
    found = {}
    for at, module in enumerate(MODULES):
        up, down = draw(seed + 2 * at, ROWS, rank), draw(seed + 2 * at + 1, rank, COLUMNS)
        if bases:
            u, v = bases[module]
            up, down = u @ draw(seed + 77 + at, DIRECTIONS, rank) + 0.05 * up, draw(seed + 99 + at, rank, DIRECTIONS) @ v + 0.05 * down  # fmt: skip
        found[module] = (up, down)
    return found


def shared_directions() -> dict[str, tuple[Tensor, Tensor]]:
    return {m: (draw(9000 + at, ROWS, DIRECTIONS), draw(9100 + at, DIRECTIONS, COLUMNS)) for at, m in enumerate(MODULES)}  # fmt: skip


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight related adapters of unequal ranks; the second lacks a module, the third saved one whole."""
    home = tmp_path_factory.mktemp("fleet")
    for at, rank in enumerate(RANKS):
        factors = factors_of(1000 * at, rank, shared_directions())
        more: dict[str, Any] = {}
        if at == 1:
            del factors[MODULES[1]]
        if at == 2:
            more = {"modules_to_save": ["lm_head"], "more": {f"{PREFIX}lm_head.weight": draw(5, 10, 12).float()}}
        write_adapter(home / f"a{at}", factors, **more)
    return home


@pytest.fixture(scope="module")
def unrelated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("unrelated")
    for at, rank in enumerate(RANKS[:4]):
        write_adapter(home / f"a{at}", factors_of(1000 * at + 1, rank, None))
    return home


@pytest.fixture(scope="module")
def compressed(fleet: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, loratool.CompressReport]:
    """The related adapters in 12 kB."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    return out, loratool.compress(fleet, out, budget="12kB")


Compressed = tuple[Path, loratool.CompressReport]


def expanded(folder: Path, name: str) -> dict[str, Array]:
    """ΔW by target, as docs/compressing.md says that anybody can."""
    shared, own = load_file(folder / "shared.safetensors"), load_file(folder / f"{name}.safetensors")
    deltas: dict[str, Array] = {}
    for place in sorted({key.rpartition("/")[0] for key in own if not key.startswith("other/")}):
        target, _, cluster = place.rpartition("/")
        core = own[f"{place}/M"].double() if f"{place}/M" in own else own[f"{place}/B"].double() @ own[f"{place}/A"].double()  # fmt: skip
        if cluster != "own":
            core = shared[f"{place}/U"].double() @ core @ shared[f"{place}/V"].double()
        deltas[target] = deltas.get(target, 0) + core.numpy()
    return deltas


def stored(adapter: Path) -> dict[str, Array]:
    """ΔW by target of a plain adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name in tensors:
        if name.endswith(".lora_B.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_B.weight")
            down = tensors[name.replace("lora_B", "lora_A")].double()
            rank = config.get("rank_pattern", {}).get(module, config["r"])
            alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
            found[f"{module}.weight"] = (alpha / rank * tensors[name].double() @ down).numpy()
    return found


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def total_bytes(folder: Path) -> int:
    """Of all tensors that are not kept as they are."""
    return sum(
        tensor.nbytes for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items() if not key.startswith("other/")
    )  # fmt: skip


@pytest.mark.parametrize("rule", [{"rank": 7}, {"energy": 0.95}, {"budget": "12kB"}, {"budget": "3k"}], ids=str)
def test_errors_and_bytes_are_those_of_the_files(fleet: Path, tmp_path: Path, rule: dict[str, Any]) -> None:
    report = loratool.compress(fleet, tmp_path / "out", **rule)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*(f"a{n}.safetensors" for n in range(8)), "loratool.json", "shared.safetensors"]  # fmt: skip
    lost = []
    for name, told in report.adapters.items():
        wanted, found = stored(fleet / name), expanded(tmp_path / "out", name)
        size = math.sqrt(sum(np.linalg.norm(d) ** 2 for d in wanted.values()))
        apart = {t: float(np.linalg.norm(d - found.get(t, 0 * d))) for t, d in wanted.items()}
        lost.append(math.sqrt(sum(a**2 for a in apart.values())) / size)
        assert told.norm == pytest.approx(size, rel=1e-9)
        assert told.error == pytest.approx(lost[-1], rel=1e-6, abs=1e-7)
        for target, delta in wanted.items():
            relative = apart[target] / float(np.linalg.norm(delta))
            assert report.modules[target].errors[name] == pytest.approx(relative, rel=1e-6, abs=1e-7)
    assert report.totals.error == pytest.approx(math.sqrt(np.mean(np.square(lost))), rel=1e-6)
    assert report.totals.bytes == total_bytes(tmp_path / "out")
    if "energy" in rule:
        assert report.totals.error**2 <= 1 - rule["energy"] + 1e-6
    if rule == {"budget": "12kB"}:
        assert 11_000 <= report.totals.bytes <= 12_000
    if rule == {"budget": "3k"}:
        assert sum(t.numel() for p in (tmp_path / "out").glob("*.safetensors") for k, t in load_file(p).items() if "other/" not in k) <= 3000  # fmt: skip


def test_shared_bases_have_the_size_of_the_formula(fleet: Path, tmp_path: Path) -> None:
    """R (rows + columns) of a module, and min(R², 2 r R) for each adapter that has it."""
    report = loratool.compress(fleet, tmp_path / "out", rank=9)
    assert {m.directions for m in report.modules.values()} == {(9,)}
    cores = sum(min(81, 2 * 9 * rank) for at, rank in enumerate(RANKS) for module in range(4) if (at, module) != (1, 1))
    assert report.totals.bytes == 4 * (9 * (ROWS + COLUMNS) * 4 + cores)


def test_related_adapters_keep_more_than_by_truncation_at_the_same_bytes(compressed: Compressed) -> None:
    out, report = compressed
    assert report.totals.pays
    assert report.totals.error < 0.5 * report.totals.truncated
    with safe_open(out / "shared.safetensors", "pt") as file:
        assert file.metadata()["loratool_compressed"] == "1"


def test_unrelated_adapters_are_truncated_and_that_is_said(unrelated: Path, tmp_path: Path) -> None:
    report = loratool.compress(unrelated, tmp_path / "out", budget="9kB")
    assert not report.totals.pays
    assert [note.code for note in report.notes] == ["sharing-does-not-pay"]
    assert report.totals.error == pytest.approx(report.totals.truncated, rel=1e-6)
    assert load_file(tmp_path / "out" / "shared.safetensors") == {}


def test_one_adapter_alone_is_what_resize_makes_of_it_at_the_same_budget(unrelated: Path, tmp_path: Path) -> None:
    report = loratool.compress(unrelated / "a3", tmp_path / "out", budget="3kB")
    loratool.resize(unrelated / "a3", tmp_path / "small", budget="3kB")
    wanted = stored(tmp_path / "small")
    found = expanded(tmp_path / "out", "a3")
    assert found.keys() == wanted.keys()
    for target, delta in wanted.items():
        assert np.abs(found[target] - delta).max() < 1e-5 * np.abs(delta).max()
    assert report.totals.bytes <= 3000


def test_expand_gives_a_plain_adapter_with_all_that_is_beside_its_factors(fleet: Path, compressed: Compressed, tmp_path: Path) -> None:  # fmt: skip
    for name in ("a1", "a2"):
        report = loratool.expand(compressed[0], name, tmp_path / name)
        wanted, found = expanded(compressed[0], name), stored(tmp_path / name)
        assert found.keys() == wanted.keys()
        for target, delta in wanted.items():
            assert np.abs(found[target] - delta).max() < 1e-6 * np.abs(delta).max()
        assert report.dialect == "peft"
        assert loratool.read_adapter(tmp_path / name).training.base == "org/base"
    assert f"{MODULES[1]}.weight" not in stored(tmp_path / "a1")
    before, after = (load_file(place / "adapter_model.safetensors") for place in (fleet / "a2", tmp_path / "a2"))
    assert torch.equal(before[f"{PREFIX}lm_head.weight"], after[f"{PREFIX}lm_head.weight"])
    assert json.loads((tmp_path / "a2" / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]


def test_adding_one_leaves_every_other_file_as_it_was(compressed: Compressed, tmp_path: Path) -> None:
    """A relative gets a core in the shared bases, a stranger triples of its own."""
    out = tmp_path / "out"
    shutil.copytree(compressed[0], out)
    before = digests(out)
    write_adapter(tmp_path / "relative", factors_of(70_000, 4, shared_directions()))
    write_adapter(tmp_path / "stranger", factors_of(80_000, 4, None))
    report = loratool.compress([tmp_path / "relative", tmp_path / "stranger"], into=out)
    after = digests(out)
    assert {name for name in after if after[name] != before.get(name)} == {"loratool.json", "relative.safetensors", "stranger.safetensors"}  # fmt: skip
    for name in ("relative", "stranger"):
        wanted, found = stored(tmp_path / name), expanded(out, name)
        lost = sum(np.linalg.norm(d - found.get(t, 0 * d)) ** 2 for t, d in wanted.items())
        assert report.adapters[name].error ** 2 == pytest.approx(lost / sum(np.linalg.norm(d) ** 2 for d in wanted.values()), rel=1e-5)  # fmt: skip
        loratool.expand(out, name, tmp_path / f"{name} again")
        again = stored(tmp_path / f"{name} again")
        assert all(np.abs(again[t] - d).max() < 1e-5 * np.abs(d).max() for t, d in found.items())
    assert report.adapters["relative"].error < 0.3
    assert not any("/own/" in key for key in load_file(out / "relative.safetensors"))
    assert any("/own/" in key for key in load_file(out / "stranger.safetensors"))
    listed = json.loads((out / "loratool.json").read_text())
    assert {name: entry["sha256"] for name, entry in listed["files"].items()} == {n: d for n, d in after.items() if n != "loratool.json"}  # fmt: skip
    assert len(listed["added"]) == 1
    with pytest.raises(UsageError, match="has these adapters already"):
        loratool.compress(tmp_path / "relative", into=out)


def test_an_adapter_of_another_model_shares_nothing_and_that_is_said(compressed: Compressed, tmp_path: Path) -> None:
    """None of its modules is one that the shared file has directions of; a relative is added without the note."""
    shutil.copytree(compressed[0], tmp_path / "out")
    other = {name.replace("model.layers", "h"): pair for name, pair in factors_of(80_000, 4, None).items()}
    write_adapter(tmp_path / "other", other)
    write_adapter(tmp_path / "relative", factors_of(70_000, 4, shared_directions()))
    report = loratool.compress([tmp_path / "other", tmp_path / "relative"], into=tmp_path / "out")
    found = [str(note) for note in report.notes if note.code == "no-common-layer"]
    assert len(found) == 1
    assert found[0].startswith("other: has no layer in common with the shared file")


def test_stacks_of_experts_are_kept_and_named(tmp_path: Path) -> None:
    target = "model.layers.0.mlp.experts"
    for at in range(2):
        more = {
            f"{PREFIX}{target}.lora_A.weight": draw(at, 6, 10).float(),
            f"{PREFIX}{target}.lora_B.weight": draw(at + 9, 12, 6).float(),
        }
        write_adapter(tmp_path / "in" / f"a{at}", factors_of(at, 2, None), more=more, target_parameters=["mlp.experts.down_proj"], r=2)  # fmt: skip
    report = loratool.compress(tmp_path / "in", tmp_path / "out", energy=0.9)
    assert "experts-kept" in [note.code for note in report.notes]
    down, up = draw(0, 6, 10).float().double().reshape(3, 2, 10), draw(9, 12, 6).float().double().reshape(12, 2, 3)
    (found,) = (d for name, d in expanded(tmp_path / "out", "a0").items() if "experts" in name)
    for expert in range(3):
        assert found[expert] == pytest.approx((2 * up[:, :, expert] @ down[expert]).numpy(), rel=1e-5, abs=1e-5)
    loratool.expand(tmp_path / "out", "a0", tmp_path / "a0")
    back = load_file(tmp_path / "a0" / "adapter_model.safetensors")
    factor = [back[f"{PREFIX}{target}.lora_{side}.weight"].double() for side in "AB"]
    again = factor[1].reshape(12, 2, 3)[:, :, 1] @ factor[0].reshape(3, 2, 10)[1]
    assert again.numpy() == pytest.approx(found[1], rel=1e-5, abs=1e-5)


def test_image_adapters_come_back_in_their_own_dialect(tmp_path: Path) -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    for at in range(3):
        tensors = {
            f"{layer}.lora_down.weight": draw(at, 4, 320).float(),
            f"{layer}.lora_up.weight": draw(at + 10, 320, 4).float(),
            f"{layer}.alpha": torch.tensor(2.0),
        }
        (tmp_path / "in").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "in" / f"style{at}.safetensors")
    loratool.compress(tmp_path / "in", tmp_path / "out", energy=0.999)
    report = loratool.expand(tmp_path / "out", "style1", tmp_path / "back.safetensors")
    assert report.dialect == "kohya"
    found = load_file(tmp_path / "back.safetensors")
    assert set(found) == {f"{layer}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    delta = float(found[f"{layer}.alpha"]) / 4 * found[f"{layer}.lora_up.weight"].double() @ found[f"{layer}.lora_down.weight"].double()  # fmt: skip
    wanted = 0.5 * draw(11, 320, 4) @ draw(1, 4, 320)
    assert float((delta - wanted).norm() / wanted.norm()) < 0.04
    with safe_open(tmp_path / "back.safetensors", "pt") as file:  # a file that stands alone says what made it
        made = json.loads(file.metadata()["loratool"])
    assert made["command"] == "loratool expand ./out ./style1 -o out"
    assert made["shared"]["sha256"]["style1.safetensors"] == digests(tmp_path / "out")["style1.safetensors"]
    loratool.expand(tmp_path / "out", "style1", tmp_path / "back.safetensors", overwrite=True)


@pytest.mark.parametrize("dialect", ["gguf", "torchtune"])
def test_the_base_tells_which_rows_adapters_of_other_tools_have(fleet: Path, tmp_path: Path, dialect: str) -> None:
    """The error names it as the way out; an adapter, and one that is added, is expanded into PEFT's layout with the ΔW that
    the adapter has that they were converted from.
    """
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4}
    base = save_model(tmp_path / "base", {"model.norm.weight": torch.ones(4)}, config)
    (tmp_path / "in").mkdir()
    for name in ("a0", "a3"):
        out = tmp_path / "in" / (f"{name}.gguf" if dialect == "gguf" else name)
        loratool.convert(fleet / name, out, to=dialect, base=base)
    with pytest.raises(InputError, match="pass the model that was trained with --base"):
        loratool.compress(tmp_path / "in", tmp_path / "out", energy=1.0)
    runs: list[tuple[Path, dict[str, Any], str]] = [(tmp_path / "in", {"base": base}, "out"), (fleet, {}, "plain")]
    for given, options, kind in runs:
        one, other = (next(given.glob(f"{name}*")) for name in ("a0", "a3"))
        loratool.compress(one, tmp_path / kind, energy=1.0, **options)
        loratool.compress(other, into=tmp_path / kind, **options)
    for name in ("a0", "a3"):
        loratool.expand(tmp_path / "out", name, tmp_path / f"back-{name}")
        found, wanted = stored(tmp_path / f"back-{name}"), expanded(tmp_path / "plain", name)
        assert found.keys() == wanted.keys()
        for target, delta in wanted.items():
            assert np.linalg.norm(found[target] - delta) <= 1e-5 * np.linalg.norm(delta)


def test_streamed_modules_are_compressed_alike(fleet: Path, compressed: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("loratool.algebra.lowrank.shared_bases.EXACT", 4)
    monkeypatch.setattr(planning, "WIDEST", 12)
    near = loratool.compress(fleet, tmp_path / "near", budget="12kB")
    assert near.totals.error == pytest.approx(compressed[1].totals.error, rel=0.05)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["FLEET", "-o", "OUT"], 2, "pass exactly one of --rank, --energy, --budget (got none)"),
        (["FLEET", "-o", "OUT", "--rank", "2", "--energy", "0.5"], 2, "(got --rank and --energy)"),
        (["FLEET", "-o", "OUT", "--budget", "10B"], 2, "budget 10 bytes is too small"),
        (
            ["FLEET", "--rank", "2"],
            2,
            "Missing option '-o' / '--output', or --into SHARED, so nothing was written hint: loratool compress",
        ),
        (["FLEET", "-o", "OUT", "--into", "FLEET"], 2, "-o and --into are mutually exclusive"),
        (["FLEET", "--into", "FLEET"], 3, "no shared.safetensors"),
        (["FLEET", "--into", "FLEET", "--rank", "2"], 2, "--rank does not apply to --into"),
        (["FLEET", "ODD", "-o", "OUT", "--rank", "2"], 4, "do not have the same base"),
    ],
)
def test_what_makes_no_sense_is_refused(
    fleet: Path, tmp_path: Path, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "odd", {MODULES[0]: (draw(1, 7, 2), draw(2, 2, COLUMNS))})
    places = {"FLEET": fleet, "OUT": tmp_path / "out", "ODD": tmp_path / "odd"}
    assert run(["compress", *(str(places.get(word, word)) for word in words)]) == code
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_expand_says_which_adapters_there_are_and_refuses_files_of_other_bases(compressed: Compressed, unrelated: Path, tmp_path: Path) -> None:  # fmt: skip
    shutil.copytree(compressed[0], tmp_path / "out")
    with pytest.raises(UsageError, match="it has a0, a1, a2, a3"):
        loratool.expand(tmp_path / "out", "b", tmp_path / "b")
    loratool.compress(unrelated, tmp_path / "other", rank=4)
    os.replace(tmp_path / "other" / "a0.safetensors", tmp_path / "out" / "a0.safetensors")
    with pytest.raises(InputError, match="was made with another"):
        loratool.expand(tmp_path / "out", "a0", tmp_path / "b")
    save_file({"x": torch.zeros(1)}, tmp_path / "out" / "a1.safetensors")
    with pytest.raises(InputError, match="is not a file that loratool compress made"):
        loratool.expand(tmp_path / "out", "a1", tmp_path / "b")


def test_a_folder_of_compressed_adapters_is_told_what_it_is_and_refused_elsewhere_with_the_command_that_helps(
    compressed: Compressed, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`inspect` shows what it was made of; no other command takes it for an adapter or a model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(compressed[0], "out")
    facts = loratool.inspect("out")
    assert isinstance(facts, loratool.CheckpointFacts)
    (note,) = facts.notes
    assert note.code == "compressed-adapters"
    assert note.text.startswith("8 adapters are compressed together: a0, a1")
    assert facts.history is not None
    assert (facts.history.made_by, len(facts.history.inputs)) == ("compress", 8)
    for words, name in ((["rescale", "out", "--scale", "2"], "a0"), (["rescale", "out/a3.safetensors", "--bake"], "a3"), (["merge", "out", "out"], "a0")):  # fmt: skip
        assert run([*words, "-o", "made"]) == 3
        told, _, hint = capsys.readouterr().err.rpartition("hint: loratool ")
        assert "contains compressed adapters (a0, a1, a2 and 5 more)" in told
        assert hint == f"expand out {name} -o ./{name}\n"
    assert run(hint.split()) == 0


def test_a_dry_run_says_the_same_and_writes_nothing(fleet: Path, compressed: Compressed, tmp_path: Path) -> None:
    dry = loratool.compress(fleet, tmp_path / "dry", budget="12kB", dry_run=True)
    assert not (tmp_path / "dry").exists()
    assert dry.totals == compressed[1].totals
    assert dry.modules == compressed[1].modules


def test_the_same_bytes_come_out_twice_and_replace_what_was_there(fleet: Path, compressed: Compressed, tmp_path: Path) -> None:  # fmt: skip
    shutil.copytree(compressed[0], tmp_path / "out")
    with pytest.raises(UsageError, match="already exists"):
        loratool.compress(fleet, tmp_path / "out", budget="12kB")
    loratool.compress(fleet, tmp_path / "out", budget="12kB", overwrite=True)
    assert digests(tmp_path / "out") == digests(compressed[0])


def test_bfloat16_adapters_keep_their_dtype_and_cores_are_float32(fleet: Path, tmp_path: Path) -> None:
    for at in range(4):
        write_adapter(tmp_path / "in" / f"a{at}", factors_of(1000 * at, 4, shared_directions()), torch.bfloat16)
    report = loratool.compress(tmp_path / "in", tmp_path / "out", rank=8)
    dtypes = {key.rpartition("/")[2]: t.dtype for path in (tmp_path / "out").glob("*.safetensors") for key, t in load_file(path).items()}  # fmt: skip
    assert dtypes["U"] is dtypes["V"] is torch.bfloat16
    assert dtypes["B"] is dtypes["A"] is torch.float32
    assert report.dtype == "bfloat16"
    for name, told in report.adapters.items():
        wanted, found = stored(tmp_path / "in" / name), expanded(tmp_path / "out", name)
        lost = sum(np.linalg.norm(d - found[t]) ** 2 for t, d in wanted.items())
        assert told.error**2 == pytest.approx(lost / sum(np.linalg.norm(d) ** 2 for d in wanted.values()), rel=1e-5)


def test_untrained_adapters_are_named_and_layers_without_directions_are_told_together(unrelated: Path, tmp_path: Path) -> None:  # fmt: skip
    shutil.copytree(unrelated, tmp_path / "in")
    write_adapter(tmp_path / "in" / "zero", {MODULES[0]: (torch.zeros(ROWS, 2), draw(2, 2, COLUMNS))})
    with pytest.raises(FitError) as refused:
        loratool.compress(tmp_path / "in", tmp_path / "out", energy=0.9)
    assert refused.value.problems == ("zero",)
    report = loratool.compress(unrelated, tmp_path / "out", budget="4kB")
    (note,) = (note for note in report.notes if note.code == "layers-left-out")
    lacking = [(m, name) for m, module in report.modules.items() for name, error in module.errors.items() if error == 1]
    assert note.text.startswith(f"{len(lacking)} layers of {len({name for _, name in lacking})} adapters")


@pytest.mark.parametrize("which", ["shared", "a0"])
def test_a_dtype_that_nobody_knows_is_a_damaged_file(compressed: Compressed, tmp_path: Path, which: str) -> None:
    """The metadata name the dtype of the factors as torch does; one letter of it is another here, in the header alone."""
    shutil.copytree(compressed[0], tmp_path / "fleet")
    path = tmp_path / "fleet" / f"{which}.safetensors"
    content = path.read_bytes()
    assert content.count(b'\\"dtype\\": \\"float32\\"') == 1
    path.write_bytes(content.replace(b'\\"dtype\\": \\"float32\\"', b'\\"dtype\\": \\"flout32\\"'))
    write_adapter(tmp_path / "relative", factors_of(70_000, 4, shared_directions()))
    adding = partial(loratool.compress, tmp_path / "relative", into=tmp_path / "fleet")
    expanding = partial(loratool.expand, tmp_path / "fleet", "a0", tmp_path / "out")
    with pytest.raises(loratool.InputError, match="dtype"):
        (adding if which == "shared" else expanding)()


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("rank", 10**15, "rank 1000000000000000"),
        ("rank", 0, "rank 0"),
        ("rows", 10**12, "header says 1000000000000 × "),
        ("experts", 10**9, "header says 1000000000 × "),
        ("kernel", [7, 7], "kernels of 49"),
    ],
)
def test_sizes_that_are_not_those_of_what_is_stored_are_a_damaged_file(
    compressed: Compressed, tmp_path: Path, field: str, value: Any, told: str
) -> None:
    """They are refused from headers, before the output's size is worked out or memory taken."""
    shutil.copytree(compressed[0], tmp_path / "fleet")
    path = tmp_path / "fleet" / "a0.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["about"])
    next(iter(about["layers"].values()))[field] = value
    save_file(tensors, path, {**metadata, "about": json.dumps(about)})
    with pytest.raises(loratool.InputError, match=told) as caught:
        loratool.expand(tmp_path / "fleet", "a0", tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[next(each for each in tensors if each.endswith(name))]

    return spoil


def turned(tensors: dict[str, Tensor]) -> None:
    name = next(each for each in tensors if each.endswith("/0/U"))
    tensors[name] = tensors[name].mT.contiguous()


def moved(tensors: dict[str, Tensor]) -> None:
    for name in [each for each in tensors if "/0/" in each]:
        tensors[name.replace("/0/", "/9/")] = tensors.pop(name)


def cut(tensors: dict[str, Tensor]) -> None:
    name = next(each for each in tensors if each.endswith("/0/M"))
    tensors[name] = tensors[name][:-1].contiguous()


@pytest.mark.parametrize(
    ("which", "spoil", "told"),
    [
        ("shared", without("/0/V"), "/0: neither a matrix nor two factors"),
        ("shared", turned, "/0: neither a matrix nor two factors"),
        ("a0", moved, "/9: there are no such directions"),
        ("a0", cut, "directions"),
    ],
)
def test_tensors_that_do_not_belong_together_are_named(
    compressed: Compressed, tmp_path: Path, which: str, spoil: Callable[[dict[str, Tensor]], None], told: str
) -> None:
    """A part that is missing, or of other shapes, in either file; the header is as it was."""
    shutil.copytree(compressed[0], tmp_path / "fleet")
    path = tmp_path / "fleet" / f"{which}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    spoil(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(loratool.InputError) as caught:
        loratool.expand(tmp_path / "fleet", "a0", tmp_path / "out")
    assert all(told in problem for problem in caught.value.problems)
    assert not (tmp_path / "out").exists()
