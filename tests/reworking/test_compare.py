"""How adapters lie to each other, against dense linear algebra on the updates that PEFT's formula gives."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dialect_samples import gguf_of
from peft_files import save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainer_layouts import HEADS, HIDDEN, WIDTH, halves_from_pairs, numbers, write_base
from workbench import Workbench

import loratool
from loratool import cli

SHAPES = {"model.a": (30, 20), "model.b": (16, 40)}


def write(folder: Path, seed: int, rank: int, shapes: dict[str, tuple[int, int]] = SHAPES, alpha: float = 6) -> Path:
    """A plain adapter with random factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return save_peft(folder, tensors, r=rank, lora_alpha=alpha, target_modules=[m[-1] for m in shapes])


def deltas(folder: Path) -> dict[str, Tensor]:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    return {
        name.split("model.model.")[1].replace("lora_A.", ""): scale
        * tensors[name.replace("lora_A", "lora_B")].double()
        @ a.double()
        for name, a in tensors.items()
        if "lora_A" in name
    }


def spaces(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def test_every_number_is_that_of_the_dense_updates(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", 1, 3), write(tmp_path / "other", 2, 5, alpha=2)
    report = loratool.compare([one, other], device="cpu")
    first, second = deltas(one), deltas(other)
    pair = "one × other"
    for target, a in first.items():
        b, found = second[target], report.modules[target][pair]
        u, s, vt = spaces(a, 3)
        x, t, yt = spaces(b, 5)
        assert found.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-9)
        assert found.norm_ratio == pytest.approx(float(b.norm() / a.norm()))
        assert found.overlap_out == pytest.approx(float((u.T @ x).square().sum()) / 3)
        assert found.overlap_in == pytest.approx(float((vt @ yt.T).square().sum()) / 3)
        assert found.random_out == pytest.approx(5 / a.shape[0])
        assert found.random_in == pytest.approx(5 / a.shape[1])
        assert found.clash == pytest.approx(float((x @ (x.T @ a)).norm() / a.norm()))
        assert found.transfer == pytest.approx(float((a @ yt.T @ yt).norm() / a.norm()))
        angles = torch.rad2deg(torch.acos(torch.linalg.svdvals(u.T @ x).clamp(max=1)))
        assert list(found.angles_out) == pytest.approx(angles.tolist(), abs=1e-6)
        left, right = torch.cat([u, x], 1), torch.cat([vt, yt]).T
        eye = torch.eye(8, dtype=torch.float64)
        sti = (left.T @ left - eye) @ torch.cat([s, t]).diag() @ (right.T @ right - eye)
        assert found.interference == pytest.approx(float(sti.abs().sum() / torch.cat([s, t]).sum()))
        conflict = float(((a * b) < 0).double().mean())
        assert found.sign_conflict == pytest.approx(conflict, abs=0.03)
        small = torch.minimum(a.abs() / a.norm(), b.abs() / b.norm())
        assert found.weighted_conflict == pytest.approx(float(small[(a * b) < 0].sum() / small.sum()), abs=0.03)
    flat = [torch.cat([d[t].flatten() for t in sorted(first)]) for d in (first, second)]
    assert report.totals[pair].cosine == pytest.approx(float(flat[0] @ flat[1] / (flat[0].norm() * flat[1].norm())))
    assert report.totals[pair].norm_ratio == pytest.approx(float(flat[1].norm() / flat[0].norm()))
    assert report.norms["one"] == pytest.approx(float(flat[0].norm()))


def test_an_adapter_and_itself_are_one(tmp_path: Path) -> None:
    one = write(tmp_path / "one", 1, 3)
    other = write(tmp_path / "again", 1, 3)
    for found in loratool.compare([one, other]).modules.values():
        relation = found["one × again"]
        assert relation.cosine == pytest.approx(1)
        assert relation.overlap_out == pytest.approx(1)
        assert relation.sign_conflict == 0
        assert max(relation.angles_in) == pytest.approx(0, abs=1e-5)


def test_how_an_adapter_shares_itself_between_its_factors_does_not_matter(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", 1, 3), write(tmp_path / "other", 2, 3)
    before = loratool.compare([one, other])
    tensors = load_file(other / "adapter_model.safetensors")
    gauge = torch.tensor(np.random.default_rng(0).normal(size=(3, 3)), dtype=torch.float64) + 3 * torch.eye(3)
    for name in [n for n in tensors if "lora_A" in n]:
        b = name.replace("lora_A", "lora_B")
        tensors[b], tensors[name] = (
            tensors[b].double() @ gauge,
            torch.linalg.inv(gauge) @ tensors[name].double(),
        )
    save_file(tensors, other / "adapter_model.safetensors")
    after = loratool.compare([one, other])
    for target in before.modules:
        was, now = (report.modules[target]["one × other"] for report in (before, after))
        assert (was.cosine, was.overlap_out) == pytest.approx((now.cosine, now.overlap_out))
        assert was.interference == pytest.approx(now.interference)


def test_random_adapters_overlap_as_random_subspaces_do(tmp_path: Path) -> None:
    shapes = {"model.a": (600, 500)}
    one, other = write(tmp_path / "one", 1, 8, shapes), write(tmp_path / "other", 2, 8, shapes)
    found = loratool.compare([one, other]).modules["model.a.weight"]["one × other"]
    assert found.overlap_out == pytest.approx(found.random_out, rel=0.5)
    assert found.sign_conflict == pytest.approx(0.5, abs=0.02)


def test_a_zero_update_gives_no_number(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", 1, 3), write(tmp_path / "other", 2, 3)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}, other / "adapter_model.safetensors")
    report = loratool.compare([one, other])
    found = report.modules["model.a.weight"]["one × other"]
    assert (found.cosine, found.overlap_in, found.sign_conflict) == (None, None, None)
    assert report.totals["one × other"].cosine is None
    assert "–" in str(report)


def test_layers_of_one_adapter_only_are_named(tmp_path: Path) -> None:
    one = write(tmp_path / "one", 1, 3)
    other = write(tmp_path / "other", 2, 3, {"model.a": (30, 20), "model.c": (8, 8)})
    report = loratool.compare([one, other])
    assert report.alone == {"one": ("model.b.weight",), "other": ("model.c.weight",)}
    assert report.totals["one × other"].layers == 1
    a, b = deltas(one)["model.a.weight"], deltas(other)["model.a.weight"]
    assert report.totals["one × other"].norm_ratio == pytest.approx(float(b.norm() / a.norm()))


def test_three_adapters_are_three_pairs_told_apart_though_they_have_one_name(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(n) / "adapter", n, 2) for n in range(3)]
    report = loratool.compare(paths)
    assert list(report.totals) == [
        "adapter × adapter (2)",
        "adapter × adapter (3)",
        "adapter (2) × adapter (3)",
    ]


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Workbench(tmp_path / "bench", capsys)
    one, other = write(tmp_path / "one", 1, 3), write(tmp_path / "other", 2, 3)
    text = bench.run("compare", one, other)
    assert text.code == 0
    assert "one × other" in text.out
    assert "all 2 layers" in text.out
    table = json.loads(bench.run("compare", one, other, "--json").out)
    assert set(table["modules"]) == {"model.a.weight", "model.b.weight"}
    assert all(math.isfinite(v) for v in table["norms"].values())


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Workbench(tmp_path / "bench", capsys)
    one = write(tmp_path / "one", 1, 3)
    wide = write(tmp_path / "wide", 1, 3, {"model.a": (30, 21), "model.b": (16, 40)})
    apart = write(tmp_path / "apart", 1, 3, {"model.z": (30, 20)})
    bench.refuses("compare", one, told=["at least two adapters"], code=2)
    bench.refuses("compare", one, wide, told=["model.a.weight", "30 × 20", "30 × 21"], code=4)
    bench.refuses("compare", one, apart, told=["no layer in common", "model.z.weight"], code=4)
    bench.refuses("compare", one, tmp_path / "nowhere", told=["nowhere", "no such file"], code=3)
    tensors = load_file(apart / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = math.inf
    save_file(tensors, apart / "adapter_model.safetensors")
    bench.refuses("compare", apart, apart, told=["contains NaN or infinite"], code=3)


def test_the_base_tells_which_rows_adapters_of_other_tools_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp has a head's rows 0, h, 1, h + 1, … of its halves; without the number of heads nothing is compared."""
    b, a = numbers(HEADS * WIDTH, 2, seed=1), numbers(2, HIDDEN, seed=2)
    gguf = {"blk.0.attn_q.weight.lora_a": a, "blk.0.attn_q.weight.lora_b": b}
    (tmp_path / "adapter.gguf").write_bytes(gguf_of(gguf))
    base = write_base(tmp_path / "base")
    peft, module = tmp_path / "peft", "base_model.model.model.layers.0.self_attn.q_proj"
    peft.mkdir()
    ours = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": halves_from_pairs(b, HEADS)}
    save_file(ours, peft / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (peft / "adapter_config.json").write_text(json.dumps(config))
    words = ["compare", str(tmp_path / "adapter.gguf"), str(peft)]
    assert cli.run(words) == 3
    told = capsys.readouterr().err
    assert "pass the model that was trained with --base" in told
    assert f"hint: loratool {' '.join(words)} --base BASE" in told
    assert cli.run([*words, "--base", str(base), "--json"]) == 0
    (pair,) = json.loads(capsys.readouterr().out)["totals"].values()
    assert pair["cosine"] == pytest.approx(1)
