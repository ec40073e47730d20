"""A rebased adapter is the same bytes where bases agree, and weaker by what the new base holds of it, as NumPy finds it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import draw, save_model
from dialect_samples import DIALECTS, write_image_base
from numpy.typing import NDArray
from oracle import sha256
from peft_files import named_by_peft, save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool
from loratool.cli import run
from loratool.errors import FitError

Array = NDArray[np.float64]
SHAPES = {"self_attn.q_proj": (32, 24), "mlp.down_proj": (24, 40)}
MODULES = {f"model.layers.{n}.{name}": shape for n in range(2) for name, shape in SHAPES.items()}
RANK, ALPHA = 3, 6
Weights = dict[str, Tensor]


def weights() -> Weights:
    found = {f"{module}.weight": draw(at, *shape) for at, (module, shape) in enumerate(MODULES.items())}
    return {**found, "model.norm.weight": draw(90, 24), "model.embed_tokens.weight": draw(91, 50, 24)}


def factors() -> dict[str, tuple[Tensor, Tensor]]:
    """B and A of each module."""
    return {
        module: (0.1 * draw(100 + at, rows, RANK), draw(200 + at, RANK, columns))
        for at, (module, (rows, columns)) in enumerate(MODULES.items())
    }


def deltas() -> dict[str, Tensor]:
    return {f"{module}.weight": ALPHA / RANK * up @ down for module, (up, down) in factors().items()}


def write_base(folder: Path, tensors: Mapping[str, Tensor], tokens: str = "{}") -> Path:
    """In float64, so that differences are exact."""
    save_model(
        folder,
        tensors,
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    )
    (folder / "tokenizer.json").write_text(tokens)
    return folder


@pytest.mark.parametrize("which", ["adapter", "old", "new"])
def test_values_that_are_not_finite_are_named(tmp_path: Path, which: str) -> None:
    """No cosine says anything of NaN, and comparisons with it refuse nothing."""
    old, new = weights(), weights()
    broken = f"{next(iter(MODULES))}.weight"
    if which != "adapter":
        {"old": old, "new": new}[which][broken][1, 2] = float("nan")
    pairs = factors()
    if which == "adapter":
        pairs[next(iter(MODULES))][0][0, 0] = float("inf")
    adapter = save_peft(tmp_path / "adapter", named_by_peft(pairs), r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"])  # fmt: skip
    write_base(tmp_path / "old", old)
    write_base(tmp_path / "new", new)
    with pytest.raises(loratool.InputError, match="not finite") as told:
        loratool.rebase(adapter, tmp_path / "out", base=tmp_path / "old", onto=tmp_path / "new", force=True)
    (problem,) = told.value.problems
    assert problem.startswith("base_model" if which == "adapter" else f"{which}: {broken}")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old base and its adapter."""
    folder = tmp_path_factory.mktemp("rebase")
    write_base(folder / "old", weights())
    save_peft(
        folder / "adapter",
        named_by_peft(factors()),
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "down_proj"],
        base_model_name_or_path="org/old",
    )
    return folder


def moved(**parts: float) -> Weights:
    """The new base: `held` of the update, and a drift of a relative size, in all modules."""
    found = weights()
    for at, (name, delta) in enumerate(deltas().items()):
        drift = draw(500 + at, *delta.shape)
        size = parts.get("drift", 0.0) * found[name].norm() / drift.norm()
        found[name] = found[name] + parts.get("held", 0.0) * delta + size * drift
    return found


def rebased(home: Path, tmp_path: Path, new: Mapping[str, Tensor], **keywords: Any) -> loratool.RebaseReport:
    write_base(tmp_path / "new", new)
    return loratool.rebase(home / "adapter", tmp_path / "out", base=home / "old", onto=tmp_path / "new", **keywords)


def stored(adapter: Path) -> dict[str, Array]:
    """ΔW by target, by the config's alphas."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for module in MODULES:
        up, down = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")
        alpha = next((a for p, a in config.get("alpha_pattern", {}).items() if module.endswith(p.strip("^$"))), config["lora_alpha"])  # fmt: skip
        found[f"{module}.weight"] = (alpha / RANK * up @ down).numpy()
    return found


def test_on_equal_weights_the_adapter_stays_the_same_bytes(home: Path, tmp_path: Path) -> None:
    report = rebased(home, tmp_path, weights())
    names = [place / "adapter_model.safetensors" for place in (home / "adapter", tmp_path / "out")]
    assert names[0].read_bytes() == names[1].read_bytes()
    before, after = (json.loads(n.with_name("adapter_config.json").read_text()) for n in names)
    assert after == {**before, "base_model_name_or_path": "new", "revision": None}
    assert report.total.factor == 1
    assert all(module.equal for module in report.modules.values())
    assert report.bases[1].sha256 == {"model.safetensors": sha256(tmp_path / "new" / "model.safetensors")}
    assert "toy" in next(note.text for note in report.notes if note.code == "thresholds-from-toys")


@pytest.mark.parametrize("held", [0.05, 0.2, 0.45])
def test_what_the_new_base_holds_of_an_update_is_taken_off_it(home: Path, tmp_path: Path, held: float) -> None:
    report = rebased(home, tmp_path, moved(held=held))
    assert report.total.c == pytest.approx(held, rel=1e-9)
    for name, delta in stored(tmp_path / "out").items():
        assert delta == pytest.approx((1 - held) * deltas()[name].numpy(), rel=1e-9)
        assert report.modules[name].c == pytest.approx(held, rel=1e-9)
    files = [load_file(place / "adapter_model.safetensors") for place in (home / "adapter", tmp_path / "out")]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    assert ("update-partly-in-base" in [note.code for note in report.notes]) == (held > 0.1)


def test_figures_are_those_of_whole_matrices(home: Path, tmp_path: Path) -> None:
    new = moved(held=0.1, drift=0.07)
    report = rebased(home, tmp_path, new)
    sums = np.zeros(5)  # ⟨Δ,D⟩, ‖Δ‖², ‖Δ‖²‖D‖²/dk, ‖D‖², ‖W₁‖²
    for name, delta in deltas().items():
        w1, w2, up = weights()[name].numpy(), new[name].numpy(), delta.numpy()
        d, entries = w2 - w1, delta.numel()
        u, _, vt = np.linalg.svd(up)
        u, v = u[:, :RANK], vt[:RANK].T
        found, norm = report.modules[name], np.linalg.norm
        c = (up * d).sum() / norm(up) ** 2
        wanted = {
            "relative": norm(d) / norm(w1),
            "over_update": norm(d) / norm(up),
            "cosine": (w1 * w2).sum() / norm(w1) / norm(w2),
            "c": c,
            "z": c * np.sqrt(entries) * norm(up) / norm(d),
            "seen": norm(d @ v) / norm(w1 @ v),
            "core": norm(u.T @ d @ v) ** 2 * entries / (RANK**2 * norm(d) ** 2),
        }
        for figure, value in wanted.items():
            assert getattr(found, figure) == pytest.approx(value, rel=1e-9), figure
        sums += [(up * d).sum(), norm(up) ** 2, norm(up) ** 2 * norm(d) ** 2 / entries, norm(d) ** 2, norm(w1) ** 2]
    assert report.total.c == pytest.approx(sums[0] / sums[1], rel=1e-9)
    assert report.total.z == pytest.approx(sums[0] / np.sqrt(sums[2]), rel=1e-9)
    assert report.total.relative == pytest.approx(np.sqrt(sums[3] / sums[4]), rel=1e-9)


def test_a_drift_of_no_direction_leaves_the_update_as_it_is(home: Path, tmp_path: Path) -> None:
    report = rebased(home, tmp_path, moved(drift=0.1))
    assert abs(report.total.z or 9.0) < 3
    assert report.total.factor == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (home / "adapter" / "adapter_model.safetensors").read_bytes()  # fmt: skip
    for name, delta in stored(tmp_path / "out").items():
        assert delta == pytest.approx(deltas()[name].numpy(), rel=1e-12)


def test_modules_with_equal_weights_keep_their_strength_when_others_lose_some(home: Path, tmp_path: Path) -> None:
    new, held = weights(), [name for name in deltas() if "q_proj" in name]
    for name in held:
        new[name] = new[name] + 0.3 * deltas()[name]
    report = rebased(home, tmp_path, new)
    for name, delta in stored(tmp_path / "out").items():
        assert delta == pytest.approx((0.7 if name in held else 1.0) * deltas()[name].numpy(), rel=1e-9)
    assert {name for name, module in report.modules.items() if not module.equal} == set(held)


def test_bases_that_are_no_siblings_are_refused_unless_forced(home: Path, tmp_path: Path) -> None:
    """A base with its units in another order has the same function and other weights."""
    turned = {name: w[torch.randperm(w.shape[0], generator=torch.Generator().manual_seed(1))] for name, w in weights().items()}  # fmt: skip
    with pytest.raises(FitError, match="not siblings, or one is permuted"):
        rebased(home, tmp_path, turned)
    assert not (tmp_path / "out").exists()
    report = loratool.rebase(home / "adapter", tmp_path / "out", base=home / "old", onto=tmp_path / "new", force=True)
    assert "bases-far-apart" in [note.code for note in report.notes]


def test_an_update_that_is_mostly_there_is_refused_unless_forced(home: Path, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="already contains 70 % of the update"):
        rebased(home, tmp_path, moved(held=0.7))
    report = loratool.rebase(home / "adapter", tmp_path / "out", base=home / "old", onto=tmp_path / "new", force=True)
    assert report.total.factor == pytest.approx(0.3, rel=1e-9)


def test_other_shapes_are_refused_all_at_once(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {**weights(), **{f"{m}.weight": draw(3, rows + 8, columns) for m, (rows, columns) in MODULES.items()}}
    write_base(tmp_path / "new", wide)
    words = ["rebase", home / "adapter", "--from", home / "old", "--onto", tmp_path / "new", "-o", tmp_path / "out"]
    assert run([*map(str, words), "--force"]) == 4
    told = capsys.readouterr().err
    assert all(name in told for name in SHAPES), told
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_no_number_is_named(home: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(home / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(loratool.InputError, match=rf"{name} contains NaN or infinite values"):
        loratool.rebase(adapter, tmp_path / "out", base=home / "old", onto=home / "old")
    assert not (tmp_path / "out").exists()


def test_what_differs_around_the_adapter_is_said(home: Path, tmp_path: Path) -> None:
    new = moved(drift=0.01)
    new["model.norm.weight"] = new["model.norm.weight"] + 1
    new["model.embed_tokens.weight"] = new["model.embed_tokens.weight"] * 2
    write_base(tmp_path / "new", new, '{"other": 1}')
    report = loratool.rebase(home / "adapter", tmp_path / "out", base=home / "old", onto=tmp_path / "new", dry_run=True)
    assert {note.code for note in report.notes} >= {"tokenizer-changed", "norms-changed", "embeddings-changed"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "lycoris", "diffusers"])
@pytest.mark.parametrize("held", [0.0, 0.4])
def test_a_file_of_an_image_model_gets_the_strength_in_its_tensors(dialect: str, held: float, tmp_path: Path) -> None:
    """Which has no config: its alphas, or its factors, are those of 1 − c, as what it adds to a weight shows."""
    sample = DIALECTS[dialect]
    adapter = sample.write(tmp_path / "adapter")
    base = write_image_base(tmp_path / "base.safetensors", sample.weight)
    loratool.merge(base, adapter, tmp_path / "merged.safetensors", device="cpu")
    ((name, weight),), (merged,) = load_file(base).items(), load_file(tmp_path / "merged.safetensors").values()
    save_file({name: weight + held * (merged - weight)}, tmp_path / "new.safetensors")
    loratool.rebase(adapter, tmp_path / "out", base=base, onto=tmp_path / "new.safetensors")
    loratool.merge(base, tmp_path / "out", tmp_path / "again.safetensors", device="cpu")
    (again,) = load_file(tmp_path / "again.safetensors").values()
    torch.testing.assert_close(again - weight, (1 - held) * (merged - weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("held", [0.0, 0.3])
def test_a_dora_keeps_its_magnitudes_and_its_product_loses_what_the_new_base_holds(
    home: Path, tmp_path: Path, held: float
) -> None:
    """m · V/‖V‖ with V = W + s·BA: where W₂ = W₁ + γ·s·BA, (1 − γ)·s·BA makes the same V, so the same weights."""
    adapter = tmp_path / "dora"
    tensors = load_file(home / "adapter" / "adapter_model.safetensors")
    magnitudes = {module: 1 + draw(at, shape[0]).abs() for at, (module, shape) in enumerate(MODULES.items())}
    for module, magnitude in magnitudes.items():
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = magnitude
    config = json.loads((home / "adapter" / "adapter_config.json").read_text())
    save_peft(adapter, tensors, **{**config, "use_dora": True})
    write_base(tmp_path / "new", moved(held=held))
    report = loratool.rebase(adapter, tmp_path / "out", base=home / "old", onto=tmp_path / "new")
    assert report.total.factor == pytest.approx(1 - held, rel=1e-9)
    assert "dora-of-another-base" in [note.code for note in report.notes]
    names = [place / "adapter_model.safetensors" for place in (adapter, tmp_path / "out")]
    assert {n: t.tolist() for n, t in load_file(names[0]).items()} == {n: t.tolist() for n, t in load_file(names[1]).items()}  # fmt: skip
    loratool.merge(tmp_path / "new", tmp_path / "out", tmp_path / "merged", device="cpu")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for module, magnitude in magnitudes.items():
        v = weights()[f"{module}.weight"] + deltas()[f"{module}.weight"]
        wanted = magnitude[:, None] * v / v.norm(dim=1, keepdim=True)
        assert found[f"{module}.weight"].numpy() == pytest.approx(wanted.numpy(), rel=1e-9)


class Toy(nn.Module):
    """Two residual blocks of 24 units; only the second weight of each is adapted."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inside = nn.ParameterList([nn.Parameter(draw(seed + at, 40, 24) / 5) for at in range(2)])
        self.out = nn.ParameterList([nn.Parameter(draw(seed + at + 9, 24, 40) / 6) for at in range(2)])

    def forward(self, x: Tensor, deltas: list[Tensor]) -> Tensor:
        for inside, out, delta in zip(self.inside, self.out, deltas, strict=True):
            x = x + torch.tanh(x @ inside.T) @ (out + delta).T
        return x


def trained(model: Toy, x: Tensor, wanted: Tensor, steps: int = 120) -> list[tuple[Tensor, Tensor]]:
    """B and A of a LoRA of rank 4 that was trained on a base."""
    parts = [(torch.zeros(24, 4, dtype=torch.float64), draw(70 + at, 4, 40) / 6) for at in range(2)]
    flat = [p.requires_grad_() for pair in parts for p in pair]
    means = [(torch.zeros_like(p), torch.zeros_like(p)) for p in flat]
    for step in range(1, steps + 1):  # Adam by hand: importing torch.optim takes longer
        loss = (model(x, [b @ a for b, a in parts]) - wanted).square().mean()
        with torch.no_grad():
            for p, (first, second), slope in zip(flat, means, torch.autograd.grad(loss, flat), strict=True):
                first.mul_(0.9).add_(slope, alpha=0.1)
                second.mul_(0.99).add_(slope.square(), alpha=0.01)
                p -= 0.03 * first / (1 - 0.9**step) / ((second / (1 - 0.99**step)).sqrt() + 1e-9)
    return [(b.detach(), a.detach()) for b, a in parts]


@pytest.mark.parametrize(("learnt", "least", "over_copy"), [(0.0, 0.85, -0.02), (0.4, 0.8, 0.1)])
def test_on_a_toy_it_has_most_of_the_gain_of_an_adapter_trained_on_the_new_base(
    tmp_path: Path, learnt: float, least: float, over_copy: float
) -> None:
    """A base that drifted by a tenth and, in the second case, learnt two fifths of the task meanwhile."""
    model, x = Toy(1), draw(40, 128, 24)
    task = [0.15 * draw(50 + at, 24, 3) @ draw(60 + at, 3, 40) / 2 for at in range(2)]
    with torch.no_grad():
        wanted = model(x, task)
    adapter = trained(model, x, wanted)
    old = {f"model.layers.{at}.mlp.down_proj.weight": w.detach().clone() for at, w in enumerate(model.out)}
    with torch.no_grad():
        for at, w in enumerate(model.out):
            drift = draw(80 + at, 24, 40)
            w += learnt * task[at] + 0.1 * w.norm() / drift.norm() * drift
    oracle = trained(model, x, wanted)
    write_base(tmp_path / "old", old)
    write_base(
        tmp_path / "new", {f"model.layers.{at}.mlp.down_proj.weight": w.detach() for at, w in enumerate(model.out)}
    )
    tensors = {f"base_model.model.model.layers.{at}.mlp.down_proj.lora_{side}.weight": t.contiguous() for at, (b, a) in enumerate(adapter) for side, t in (("B", b), ("A", a))}  # fmt: skip
    save_peft(tmp_path / "adapter", tensors, r=4, lora_alpha=4, target_modules=["down_proj"])
    report = loratool.rebase(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "old", onto=tmp_path / "new", force=True)  # fmt: skip

    def loss(parts: list[tuple[Tensor, Tensor]] | None, factor: float = 1.0) -> float:
        deltas = [factor * b @ a for b, a in parts] if parts else [torch.zeros(24, 40, dtype=torch.float64)] * 2
        with torch.no_grad():
            return float((model(x, deltas) - wanted).square().mean())

    possible = loss(None) - loss(oracle)
    ours, copy = ((loss(None) - loss(adapter, factor)) / possible for factor in (report.total.factor, 1.0))
    assert ours > least
    assert ours > copy + over_copy
