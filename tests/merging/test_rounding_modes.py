"""What rounding leaves of an update: stated by every report, made up for, or random without bias."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from exactly import exact_products
from packed_models import save_packed
from peft_files import edit_config, named_by_peft, save_peft
from quantised_models import FAMILIES
from safetensors.torch import load_file, save_file

import loratool
from loratool.merging import resources

RANK = 8
SHAPES = {"q": (512, 384), "k": (192, 384)}


def made(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_pair(folder: Path, ratio: float, dtype: torch.dtype) -> tuple[Path, Path]:
    """A base and an adapter whose ‖ΔW‖/‖W‖ is `ratio` in both modules."""
    weights, factors = {}, {}
    for seed, (name, (rows, columns)) in enumerate(SHAPES.items()):
        weight, up, down = made(rows, columns, seed=seed) * 0.02, made(rows, RANK, seed=9), made(RANK, columns, seed=8)
        size = math.sqrt(ratio * float(weight.norm() / (up @ down).norm()))
        module = f"layers.0.self_attn.{name}_proj"
        weights[f"model.{module}.weight"] = weight.to(dtype)
        factors[f"base_model.model.model.{module}.lora_A.weight"] = down * size
        factors[f"base_model.model.model.{module}.lora_B.weight"] = up * size
    for each in ("base", "adapter"):
        (folder / each).mkdir(parents=True)
    save_file(weights, folder / "base" / "model.safetensors")
    save_peft(folder / "adapter", factors, r=RANK, lora_alpha=RANK)
    return folder / "base", folder / "adapter"


def kept(base: Path, adapter: Path, out: Path) -> dict[str, tuple[float, float]]:
    """Module → gain and ‖W' − W − ΔW‖/‖ΔW‖, from the files in float64."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    factors = {name: tensor.double() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    found = {}
    for name in before:
        module = name.removesuffix(".weight")
        up, down = (factors[f"base_model.model.{module}.lora_{x}.weight"] for x in "BA")
        change, applied = up @ down, after[name].double() - before[name].double()
        gain = float((change * applied).sum() / change.square().sum())
        found[module] = gain, float((applied - change).norm() / change.norm())
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "compensated", "stochastic"])
def test_a_report_tells_what_rounding_leaves_of_each_module(tmp_path: Path, rounding: str, dtype: torch.dtype) -> None:
    base, adapter = write_pair(tmp_path, 1e-3, dtype)
    report = loratool.merge(base, adapter, tmp_path / "out", rounding=rounding)
    wanted = kept(base, adapter, tmp_path / "out")
    assert {f"{module}.weight" for module in wanted} == set(report.gains)
    for module, (gain, _) in wanted.items():
        assert report.gains[f"{module}.weight"] == pytest.approx(gain, abs=0.01)
    assert report.gain == pytest.approx(np.mean([gain for gain, _ in wanted.values()]), abs=0.1)
    assert report.to_dict()["gain"] == report.gain
    assert f"{report.gain:.3f} of the update" in str(report)


def test_an_update_that_rounding_takes_away_is_warned_of_with_the_way_out(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, 1e-3, torch.bfloat16)
    report = loratool.merge(base, adapter, tmp_path / "out")
    (note,) = (note for note in report.notes if note.code == "update-lost-in-rounding")
    assert "--rounding compensated" in note.text
    assert "2 of 2 modules" in note.text
    large = loratool.merge(*write_pair(tmp_path / "large", 0.05, torch.bfloat16), tmp_path / "other")
    assert "update-lost-in-rounding" not in {note.code for note in large.notes}


@pytest.mark.parametrize(
    ("dtype", "ratio", "more"), [(torch.bfloat16, 1e-3, 1.25), (torch.bfloat16, 5e-4, 1.5), (torch.float16, 2e-4, 1.25)]
)
def test_compensated_rounding_keeps_the_whole_update(
    tmp_path: Path, dtype: torch.dtype, ratio: float, more: float
) -> None:
    base, adapter = write_pair(tmp_path, ratio, dtype)
    for rounding in ("nearest", "compensated"):
        loratool.merge(base, adapter, tmp_path / rounding, rounding=rounding)
    nearest, compensated = (kept(base, adapter, tmp_path / each) for each in ("nearest", "compensated"))
    for module, (gain, error) in compensated.items():
        assert gain == pytest.approx(1, abs=0.01)
        assert nearest[module][0] < 0.9
        assert error <= more * nearest[module][1]


def sized_parts(weights: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """B and A for each of three parts of a weight, (3, rows, columns), whose updates are of sizes of their own."""
    found = []
    for seed, (weight, ratio) in enumerate(zip(weights, (1e-3, 3e-3, 5e-4), strict=True)):
        rows, columns = weight.shape
        up, down = made(rows, RANK, seed=seed + 40), made(RANK, columns, seed=seed + 50)
        size = math.sqrt(ratio * float(weight.float().norm() / (up @ down).norm()))
        found.append((up * size, down * size))
    return found


def assert_each_is_kept(
    before: torch.Tensor, after: torch.Tensor, parts: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    for weight, merged, (up, down) in zip(before.double(), after.double(), parts, strict=True):
        change = up.double() @ down.double()
        assert float(((merged - weight) * change).sum() / change.square().sum()) == pytest.approx(1, abs=0.01)


def test_compensated_rounding_keeps_each_part_of_a_fused_tensor(tmp_path: Path) -> None:
    """Queries, keys and values of Flux in one tensor; the report has a gain for each."""
    name = "double_blocks.0.img_attn.qkv.weight"
    weight = (made(3, 128, 128, seed=1) * 0.02).bfloat16()
    parts = sized_parts(weight)
    modules = [f"transformer.transformer_blocks.0.attn.to_{each}" for each in "qkv"]
    factors = {
        f"{m}.lora_{side}.weight": each
        for m, (b, a) in zip(modules, parts, strict=True)
        for side, each in (("A", a), ("B", b))
    }
    save_file({name: weight.view(384, 128)}, tmp_path / "base.safetensors")
    save_file(factors, tmp_path / "adapter.safetensors")
    inputs, out = (tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"), tmp_path / "out.safetensors"
    report = loratool.merge(*inputs, out, rounding="compensated", device="cpu")
    assert_each_is_kept(weight, load_file(out)[name].view(3, 128, 128), parts)
    assert report.gains.keys() == {f"{module}.weight" for module in modules}


def test_compensated_rounding_keeps_each_expert_of_a_stack(tmp_path: Path) -> None:
    """PEFT's factors of a stack have the rows of A of one expert together, and every so many columns of B."""
    module = "model.layers.0.mlp.experts"
    weight = (made(3, 128, 96, seed=1) * 0.02).bfloat16()
    parts = sized_parts(weight)
    down, up = torch.cat([a for _, a in parts]), torch.stack([b for b, _ in parts], 2).flatten(1)
    factors = {f"base_model.model.{module}.lora_{side}.weight": each for side, each in (("A", down), ("B", up))}
    target = {"target_parameters": ["mlp.experts.gate_up_proj"]}
    save_peft(tmp_path / "adapter", factors, r=RANK, lora_alpha=RANK, **target)
    stack = {f"{module}.gate_up_proj": weight}
    save_packed(tmp_path / "base", stack, None, model_type="qwen3_moe", num_experts=3, tie_word_embeddings=False)
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rounding="compensated", device="cpu")
    assert_each_is_kept(weight, load_file(tmp_path / "out" / "model.safetensors")[f"{module}.gate_up_proj"], parts)


def test_other_roundings_leave_float32_as_it_is_and_say_so(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, 1e-4, torch.float32)
    for rounding in ("nearest", "compensated", "stochastic"):
        report = loratool.merge(base, adapter, tmp_path / rounding, rounding=rounding)
        assert [note.code for note in report.notes] == ["rounding-unused"] * (rounding != "nearest")
    assert (
        len({(tmp_path / r / "model.safetensors").read_bytes() for r in ("nearest", "compensated", "stochastic")}) == 1
    )


def test_an_update_that_is_no_product_is_told_to_be_rounded_to_the_nearest(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, 1e-2, torch.bfloat16)
    edit_config(adapter, use_dora=True)
    factors = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        factors[f"base_model.model.{module}.lora_magnitude_vector"] = weight.float().norm(dim=1) * 1.01
    save_file(factors, adapter / "adapter_model.safetensors")
    report = loratool.merge(base, adapter, tmp_path / "out", rounding="compensated")
    assert "rounded-to-nearest" in {note.code for note in report.notes}
    loratool.merge(base, adapter, tmp_path / "nearest")
    one, other = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("out", "nearest"))
    assert one == other


@pytest.mark.parametrize("rounding", ["compensated", "stochastic"])
def test_blocks_and_workers_do_not_show_in_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str
) -> None:
    base, adapter = write_pair(tmp_path, 1e-3, torch.bfloat16)
    found = set()
    for rows, workers in ((1, 16), (37, 3), (512, 1)):
        monkeypatch.setattr(resources, "CPU_BLOCK", rows * 384 * 2)
        out = tmp_path / f"out-{rows}"
        loratool.merge(base, adapter, out, rounding=rounding, workers=workers, device="cpu")
        found.add((out / "model.safetensors").read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_what_its_description_says(tmp_path: Path, dtype: torch.dtype) -> None:
    """Philox of the tensor's name and the element's place; floor(|v|/u + (2R + 1)/2³³) · u with rational numbers."""
    base, adapter = write_pair(tmp_path, 1e-3, dtype)
    name = "model.layers.0.self_attn.k_proj.weight"
    weights = load_file(base / "model.safetensors")
    weights[name][0, :5] = torch.tensor([0.0, -0.0, 1e-7, -3e-6, 6e-8]).to(dtype)
    save_file(weights, base / "model.safetensors")
    loratool.merge(base, adapter, tmp_path / "out", rounding="stochastic")
    after = load_file(tmp_path / "out" / "model.safetensors")[name].double()
    factors = load_file(adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    up, down = factors[f"{stem}B.weight"].tolist(), factors[f"{stem}A.weight"].T.tolist()
    key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], "<u8")
    words = np.random.Philox(key=key).random_raw(192 * 384 // 2)
    about = torch.finfo(dtype)
    bits, lowest = round(-math.log2(about.eps)), round(math.log2(about.smallest_normal * about.eps))
    for at in [*range(40), *range(40, 192 * 384, 97)]:
        row, column = divmod(at, 384)
        exact = Fraction(float(weights[name][row, column])) + exact_products(up[row], down[column], 1.0)
        number = (int(words[at // 2]) >> (32 * (at % 2))) & 0xFFFFFFFF
        unit = Fraction(2) ** max(math.frexp(float(exact))[1] - 1 - bits, lowest)
        count = math.floor(abs(exact) / unit + Fraction(2 * number + 1, 2**33))
        assert Fraction(float(after[row, column])) == count * unit * (1 if exact > 0 else -1), at


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_infinite_in_a_base_stays_and_all_rows_beside_it_are_rounded_at_random(
    tmp_path: Path, dora: bool
) -> None:
    """What is added there cancels, so that float64 does not tell which way to round."""
    base, adapter = write_pair(tmp_path, 1e-3, torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.weight"
    stem = f"base_model.model.{name.removesuffix('weight')}"
    factors, weights = load_file(adapter / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    factors[f"{stem}lora_B.weight"][0] = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0])
    factors[f"{stem}lora_A.weight"][:2, 0] = torch.tensor([1.0, -1])
    if dora:
        edit_config(adapter, use_dora=True)
        size = weights[name].float().norm(dim=1) * 1.01
        factors = {key: each for key, each in factors.items() if key.startswith(stem)}
        factors[f"{stem}lora_magnitude_vector"] = size
    save_file(factors, adapter / "adapter_model.safetensors")
    loratool.merge(base, adapter, tmp_path / "finite", rounding="stochastic", device="cpu")
    weights[name][0, 0] = torch.inf
    save_file(weights, base / "model.safetensors")
    loratool.merge(base, adapter, tmp_path / "out", rounding="stochastic", device="cpu")
    got, finite = (load_file(tmp_path / each / "model.safetensors")[name] for each in ("out", "finite"))
    assert not got[0, 0].isfinite()
    assert torch.equal(got[1:], finite[1:])


@pytest.mark.parametrize("rounding", ["compensated", "stochastic"])
@pytest.mark.parametrize("family", ["int8 (W8A8)", "fp8 blocks", "int4 groups"])
def test_weights_of_a_quantised_base_are_rounded_that_way_too(tmp_path: Path, family: str, rounding: str) -> None:
    """They become bfloat16; the gain is that of the values that the packed weights mean, and `verify` proves it."""
    name = "model.layers.0.mlp.down_proj.weight"
    packed = FAMILIES[family]({name: made(64, 256, seed=1) * 0.02})
    save_packed(tmp_path / "base", packed.tensors, packed.config, packed.metadata, tie_word_embeddings=False)
    up, down = made(64, RANK, seed=2) * 1e-4, made(RANK, 256, seed=3) * 0.1
    factors = named_by_peft({name.removesuffix(".weight"): (up, down)})
    save_peft(tmp_path / "adapter", factors, r=RANK, lora_alpha=RANK)
    inputs = tmp_path / "base", tmp_path / "adapter"
    report = loratool.merge(*inputs, tmp_path / "out", rounding=rounding, device="cpu")
    after = load_file(tmp_path / "out" / "model.safetensors")[name]
    change = up.double() @ down.double()
    gain = float(((after.double() - packed.values[name].double()) * change).sum() / change.square().sum())
    assert after.dtype == torch.bfloat16
    assert report.gain == pytest.approx(gain, abs=1e-6)
    assert gain == pytest.approx(1, abs=0.01 if rounding == "compensated" else 0.1)
    found = loratool.verify(tmp_path / "out", *inputs, device="cpu")
    assert (found.verdict, found.rounding) == ("proven", rounding), str(found)
