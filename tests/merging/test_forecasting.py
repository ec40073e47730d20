"""A dry run forecasts the gain: the part of the update that the merge, made then, is measured to keep."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import save_model, seeded
from peft_files import save_peft
from safetensors.torch import load_file
from torch import Tensor

import loratool
from loratool.cli import run
from loratool.merging import forecasting

SHAPES = {
    f"model.layers.{layer}.{name}.weight": shape
    for layer in range(2)
    for name, shape in (("self_attn.q_proj", (512, 384)), ("mlp.up_proj", (768, 384)))
}


def make_base(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    tensors = {name: torch.randn(shape, generator=seeded(at)) * 0.02 for at, (name, shape) in enumerate(SHAPES.items())}
    return save_model(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def make_adapter(folder: Path, size: float, seed: int = 50, norms: Mapping[str, Tensor] | None = None) -> Path:
    """An adapter whose updates are about `size` of the weights of `make_base`; with `norms` of their rows, a DoRA."""
    stored, rank = {}, 4
    for at, (name, (rows, columns)) in enumerate(SHAPES.items()):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        stored[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=seeded(seed + at))
        stored[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=seeded(seed + 10 + at)) * size * 0.01
        if norms:
            stored[f"{module}.lora_magnitude_vector"] = norms[name]
    words = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "up_proj"]}
    words |= {"use_dora": norms is not None}
    return save_peft(folder, stored, **words)


def updates(adapters: Sequence[Path]) -> dict[str, Tensor]:
    """Σ BA of each weight, by the formula in float64."""
    found: dict[str, Tensor] = {}
    for adapter in adapters:
        stored = load_file(adapter / "adapter_model.safetensors")
        for name in SHAPES:
            b, a = (stored[f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight"].double() for x in "BA")
            found[name] = found.get(name, torch.zeros(())) + b @ a
    return found


def measured(base: Path, out: Path, deltas: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
    """⟨W' − W, ΔW⟩ / ‖ΔW‖² on all elements of what a merge has written, in all and by weight."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    pairs = {
        name: (float(((after[name].double() - before[name].double()) * delta).sum()), float(delta.square().sum()))
        for name, delta in deltas.items()
    }
    products, squares = (sum(pair[side] for pair in pairs.values()) for side in (0, 1))
    return products / squares, {name: one / other for name, (one, other) in pairs.items()}


@pytest.mark.parametrize("size", [3e-4, 1e-3, 1e-1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_forecast_is_the_gain_that_the_merge_has(
    tmp_path: Path, size: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasting, "SAMPLED", 1 << 16)  # a third of the rows, or less
    base, adapter = make_base(tmp_path / "base", dtype), make_adapter(tmp_path / "adapter", size)
    plan = loratool.plan(base, [adapter], tmp_path / "out")
    loratool.merge(base, [adapter], tmp_path / "out")
    gain, gains = measured(base, tmp_path / "out", updates([adapter]))
    assert plan.gain_forecast == pytest.approx(gain, abs=0.02)
    assert plan.gains_forecast == pytest.approx(gains, abs=0.06)
    warned = [note for note in plan.notes if note.code == "update-lost-in-rounding"]
    assert bool(warned) == (gain < 0.9)
    assert all("pass --rounding compensated" in note.text for note in warned)


def test_several_adapters_on_the_same_weights_are_forecast_together(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapters = [make_adapter(tmp_path / f"a{n}", 1e-3, seed=50 + 100 * n) for n in range(2)]
    plan = loratool.plan(base, adapters, tmp_path / "out")
    loratool.merge(base, adapters, tmp_path / "out")
    assert plan.gain_forecast == pytest.approx(measured(base, tmp_path / "out", updates(adapters))[0], abs=0.02)


def test_a_dora_is_forecast_by_its_own_formula(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    weights = {name: weight.double() for name, weight in load_file(base / "model.safetensors").items()}
    norms = {name: weight.norm(dim=1).float() for name, weight in weights.items()}
    adapter = make_adapter(tmp_path / "adapter", 1e-3, norms=norms)
    deltas = {}
    for name, delta in updates([adapter]).items():
        moved = weights[name] + delta
        deltas[name] = norms[name].double()[:, None] * moved / moved.norm(dim=1, keepdim=True) - weights[name]
    plan = loratool.plan(base, [adapter], tmp_path / "out")
    loratool.merge(base, [adapter], tmp_path / "out")
    gain, gains = measured(base, tmp_path / "out", deltas)
    assert gain < 0.9
    assert plan.gain_forecast == pytest.approx(gain, abs=0.02)
    assert plan.gains_forecast == pytest.approx(gains, abs=0.06)


def test_the_command_tells_the_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", 3e-4)
    words = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--dry-run"]
    assert run(words) == 0
    text = capsys.readouterr().out
    assert run([*words, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert f"gain forecast  {table['gain_forecast']:.3f} of the update after rounding; least" in text
    assert "pass --rounding compensated" in text
    assert table["gains_forecast"].keys() == SHAPES.keys()
    assert any(note["code"] == "update-lost-in-rounding" for note in table["notes"])
    assert run([*words, "--json", "--also", f"{tmp_path / 'other'}={adapter}"]) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert [entry["gain_forecast"] for entry in outputs] == [table["gain_forecast"]] * 2


def test_of_many_weights_some_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", 1e-3)
    monkeypatch.setattr(forecasting, "MOST_WEIGHTS", 3)
    plan = loratool.plan(base, [adapter], tmp_path / "out")
    assert len(plan.gains_forecast) == 3
    loratool.merge(base, [adapter], tmp_path / "out")
    assert plan.gain_forecast == pytest.approx(measured(base, tmp_path / "out", updates([adapter]))[0], abs=0.03)


@pytest.mark.parametrize(
    "options", [["--dtype", "float32"], ["--rounding", "compensated"], ["--rounding", "stochastic"]], ids=" ".join
)
def test_nothing_is_forecast_where_nothing_is_rounded_to_the_nearest(tmp_path: Path, options: list[str]) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", 3e-4)
    words = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--dry-run", "--json", *options]
    code = "import sys; from loratool.cli import run; sys.exit(run(sys.argv[1:]) or 100 * ('torch' in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert (table["gain_forecast"], table["gains_forecast"]) == (None, {})
    assert not any(note["code"] == "update-lost-in-rounding" for note in table["notes"])


def test_the_most_common_updates_are_forecast_without_torch_and_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", 1e-3)
    with monkeypatch.context() as patched:
        patched.delattr(forecasting, "seen_by_torch")
        found = loratool.plan(base, [adapter], tmp_path / "out")
    monkeypatch.setattr(forecasting, "suits", lambda _: False)
    assert loratool.plan(base, [adapter], tmp_path / "out").gains_forecast == pytest.approx(found.gains_forecast)
