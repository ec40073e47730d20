"""Without `--to`, outputs are in the dialect of the first input, or in one that a note names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import save_model
from dialect_samples import DIALECTS, O_PROJ
from paths import ROOT
from peft_files import edit_config, save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainer_layouts import HIDDEN, RANK, numbers, write_base

import loratool
from loratool.files.gguf import read_gguf
from loratool.results.facts import AdapterFacts

EXPERTS, INNER = 3, 4
MIXTRAL = {"up_proj": "w3", "down_proj": "w2"}  # what it calls the layers of an expert


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("llama") / "base")


def format_of(path: Path, alpha: float | None = None) -> str:
    facts = loratool.inspect(path, input_alpha=alpha)
    assert isinstance(facts, AdapterFacts)
    assert isinstance(facts.format, str)
    return facts.format


def test_the_table_has_every_dialect_that_is_read() -> None:
    page = (ROOT / "docs" / "dialects.md").read_text(encoding="utf-8")
    table = page.partition("| dialect | a tensor |")[2].partition("\n\n")[0]
    assert sorted(DIALECTS) == sorted(re.findall(r"^\| ([\w-]+) \|", table, re.MULTILINE))


@pytest.mark.parametrize("name", DIALECTS)
def test_an_output_is_in_the_dialect_of_the_input_or_a_note_says_which(name: str, base: Path, tmp_path: Path) -> None:
    made = DIALECTS[name]
    adapter, out = made.write(tmp_path / "adapter"), tmp_path / "out"
    model = base if name in ("torchtune", "gguf") else None
    report = loratool.resize(adapter, out, rank=1, device="cpu", input_alpha=made.alpha, base=model)
    # the header still says which tool made the adapter, whose dialect has the same names
    assert format_of(out, made.alpha) == (name if name in ("ai-toolkit", "simpletuner") else made.becomes)
    changed = [note.text for note in report.notes if note.code == "layout-changed"]
    assert bool(changed) == (made.becomes != name)
    assert all(name in text for text in changed)


def test_what_takes_a_model_to_write_is_pefts_without_one_and_a_note_says_it(base: Path, tmp_path: Path) -> None:
    for name in ("torchtune", "gguf"):
        adapter = DIALECTS[name].write(tmp_path / name)
        report = loratool.resize(
            adapter, tmp_path / f"{name}-out", rank=1, device="cpu", input_alpha=DIALECTS[name].alpha
        )
        assert format_of(tmp_path / f"{name}-out") == "peft"
        assert ["--base" in note.text for note in report.notes if note.code == "layout-changed"] == [True]


def test_adapters_of_two_dialects_are_combined_in_that_of_the_first(base: Path, tmp_path: Path) -> None:
    """PEFT's scale is 1/2, mlx-lm's 3: ΔW of the sum is that of the formulas."""
    folders = [DIALECTS[name].write(tmp_path / name) for name in ("mlx", "peft")]
    loratool.combine(folders, tmp_path / "sum", normalize=False, device="cpu")
    found = load_file(tmp_path / "sum" / "adapters.safetensors")
    scale = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    one, other = (load_file(next(folder.glob("*.safetensors"))) for folder in folders)
    a, b = (one[f"{O_PROJ}.lora_{side}"].double() for side in "ab")
    low, high = (other[f"base_model.model.{O_PROJ}.lora_{side}.weight"].double() for side in "AB")
    wanted = 3 * (a @ b).T + 0.5 * high @ low
    a, b = (found[f"{O_PROJ}.lora_{side}"].double() for side in "ab")
    torch.testing.assert_close(scale * (a @ b).T, wanted, rtol=1e-5, atol=1e-6)


# ---- experts in mlx-lm's one tensor for all ----


def experts(folder: Path, which: tuple[int, ...] = (0, 1, 2), container: str = "mlp", **config: object) -> Path:
    """PEFT's LoRA on layers of experts, each of which has factors of its own."""
    tensors: dict[str, Tensor] = {}
    for expert in which:
        for leaf, (rows, columns) in {"up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items():
            start = f"base_model.model.model.layers.0.{container}.experts.{expert}.{leaf}.lora_"
            tensors[f"{start}A.weight"] = numbers(RANK, columns, seed=expert)
            tensors[f"{start}B.weight"] = numbers(rows, RANK, seed=expert + 9)
    return save_peft(
        folder, tensors, **{"r": RANK, "lora_alpha": 1, "target_modules": ["up_proj", "down_proj"], **config}
    )


def change(adapter: Path, expert: int, leaf: str, scale: float = 0.5) -> Tensor:
    tensors = load_file(adapter / "adapter_model.safetensors")
    start = f"base_model.model.model.layers.0.mlp.experts.{expert}.{leaf}.lora_"
    a, b = (tensors[f"{start}{side}.weight"].double() for side in "AB")
    return scale * (b @ a)


def stacked(out: Path, leaf: str, container: str = "switch_mlp") -> Tensor:
    """ΔW of every expert by mlx-lm's formula, scale · b @ a."""
    tensors = load_file(out / "adapters.safetensors")
    scale = json.loads((out / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    a, b = (tensors[f"model.layers.0.mlp.{container}.{leaf}.lora_{side}"].double() for side in "ab")
    found: Tensor = scale * (b @ a)
    return found


def test_experts_are_stacked_for_mlx_and_come_apart_again(tmp_path: Path) -> None:
    adapter = experts(tmp_path / "adapter")
    report = loratool.convert(adapter, tmp_path / "mlx", to="mlx")
    assert {layer.error for layer in report.modules.values()} == {0.0}
    for leaf in ("up_proj", "down_proj"):
        wanted = torch.stack([change(adapter, expert, leaf) for expert in range(EXPERTS)])
        torch.testing.assert_close(stacked(tmp_path / "mlx", leaf), wanted, rtol=0, atol=0)
    loratool.convert(tmp_path / "mlx", tmp_path / "back", to="peft")
    before, after = (load_file(place / "adapter_model.safetensors") for place in (adapter, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_experts_that_the_adapter_does_not_change_get_zeros(base: Path, tmp_path: Path) -> None:
    """As many as the base has; without one a note says how many were assumed. Some models have another container."""
    adapter = experts(tmp_path / "adapter", (0, 2))
    report = loratool.convert(adapter, tmp_path / "mlx", to="mlx")
    assert "experts-counted" in [note.code for note in report.notes]
    found = stacked(tmp_path / "mlx", "up_proj")
    assert found.shape[0] == 3
    assert not bool(found[1].any())
    model = tmp_path / "model"
    save_model(model, {"model.norm.weight": torch.ones(4)}, {"model_type": "dots1", "n_routed_experts": 5})
    loratool.convert(adapter, tmp_path / "dots", to="mlx", base=model)
    found = stacked(tmp_path / "dots", "up_proj", "experts")
    assert found.shape[0] == 5
    torch.testing.assert_close(found[2], change(adapter, 2, "up_proj"), rtol=0, atol=0)


def test_parameters_of_all_experts_are_cut_into_mlx_lms_layers(tmp_path: Path) -> None:
    """PEFT's one parameter for gate and up: ΔW of each part and expert is that of its rows."""
    adapter = experts(tmp_path / "adapter")
    loratool.convert(adapter, tmp_path / "fused", to="peft-fused")
    loratool.convert(tmp_path / "fused", tmp_path / "mlx", to="mlx")
    for leaf in ("up_proj", "down_proj"):
        wanted = torch.stack([change(adapter, expert, leaf) for expert in range(EXPERTS)])
        torch.testing.assert_close(stacked(tmp_path / "mlx", leaf), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("verb", ["resize", "rescale", "combine"])
def test_experts_of_mlx_stay_in_one_tensor(verb: str, tmp_path: Path) -> None:
    adapter = experts(tmp_path / "adapter")
    loratool.convert(adapter, tmp_path / "mlx", to="mlx")
    out, factor = tmp_path / "out", 1.0
    if verb == "resize":
        loratool.resize(tmp_path / "mlx", out, rank=3, device="cpu")
    elif verb == "rescale":
        loratool.rescale(tmp_path / "mlx", out, scale=2.0, bake=True)
        factor = 2.0
    else:
        loratool.combine([tmp_path / "mlx", adapter], out, normalize=False, device="cpu")
        factor = 2.0
    for leaf in ("up_proj", "down_proj"):
        wanted = torch.stack([change(adapter, expert, leaf) for expert in range(EXPERTS)])
        torch.testing.assert_close(stacked(out, leaf), factor * wanted, rtol=1e-5, atol=1e-6)


# ---- experts in llama.cpp's one tensor for all ----


def gguf_stacks(path: Path) -> dict[str, Tensor]:
    """ΔW of every stack as `llama-graph.cpp` computes it: α / rank · B_e A_e, of (experts, rank, in) and (experts, out, rank)."""
    file = read_gguf(path)
    raw = path.read_bytes()

    def values(name: str) -> Tensor:
        info = file.tensors[name]
        at = file.position(info)
        return torch.frombuffer(bytearray(raw[at : at + info.nbytes]), dtype=torch.float32).view(info.shape).double()

    alpha = float(str(file.values["adapter.lora.alpha"]))
    names = [name.removesuffix(".lora_a") for name in file.tensors if name.endswith("_exps.weight.lora_a")]
    pairs = {name: (values(f"{name}.lora_a"), values(f"{name}.lora_b")) for name in names}
    return {name: alpha / a.shape[1] * (b @ a) for name, (a, b) in pairs.items()}


def moe_model(folder: Path, kind: str) -> Path:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return save_model(folder, {"model.norm.weight": torch.ones(4)}, {"model_type": kind, "num_experts": 4, **heads})


@pytest.mark.parametrize(("kind", "packed"), [("qwen3_moe", False), ("qwen3_moe", True), ("mixtral", False)])
def test_experts_are_stacked_for_llama_cpp_and_come_apart_again(tmp_path: Path, kind: str, packed: bool) -> None:
    """Those that the adapter does not change have zeros; PEFT's one parameter for gate and up is cut."""
    model, given = moe_model(tmp_path / "model", kind), experts(tmp_path / "adapter", (0, 2))
    adapter = given
    if kind == "mixtral":
        tensors = load_file(given / "adapter_model.safetensors")
        old = {"mlp": "block_sparse_moe", **MIXTRAL}
        named = {".".join(old.get(part, part) for part in name.split(".")): t for name, t in tensors.items()}
        save_file(named, given / "adapter_model.safetensors")
        edit_config(given, target_modules=["w3", "w2"])
    elif packed:
        adapter = tmp_path / "packed"
        loratool.convert(given, adapter, to="peft-fused")
    loratool.convert(adapter, tmp_path / "a.gguf", to="gguf", base=model)
    found = gguf_stacks(tmp_path / "a.gguf")
    wanted = change if kind != "mixtral" else mixtral_change
    for leaf, stack in {"up_proj": "blk.0.ffn_up_exps.weight", "down_proj": "blk.0.ffn_down_exps.weight"}.items():
        assert found[stack].shape[0] == 4
        assert not bool(found[stack][[1, 3]].any())
        for expert in (0, 2):
            torch.testing.assert_close(found[stack][expert], wanted(given, expert, leaf), rtol=1e-6, atol=1e-7)
    loratool.convert(tmp_path / "a.gguf", tmp_path / "back", to="peft")
    after = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.mlp.experts.2.up_proj.lora_A.weight" in after


def mixtral_change(adapter: Path, expert: int, leaf: str) -> Tensor:
    """ΔW of an expert under Mixtral's names."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    start = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{MIXTRAL[leaf]}.lora_"
    a, b = (tensors[f"{start}{side}.weight"].double() for side in "AB")
    return 0.5 * (b @ a)


def test_a_gguf_adapter_of_experts_merges_to_what_it_was_made_of(tmp_path: Path) -> None:
    """Written and read back, and merged into experts that are apart."""
    given, model = experts(tmp_path / "adapter"), tmp_path / "model"
    sizes = {"up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    names = {(n, leaf): f"model.layers.0.mlp.experts.{n}.{leaf}.weight" for n in range(EXPERTS) for leaf in sizes}
    weights = {name: numbers(*sizes[leaf], seed=n) for (n, leaf), name in names.items()}
    save_model(model, weights, {"model_type": "qwen3_moe", "num_experts": EXPERTS})
    loratool.convert(given, tmp_path / "a.gguf", to="gguf", base=model)
    loratool.merge(model, tmp_path / "a.gguf", tmp_path / "out", device="cpu")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for (n, leaf), name in names.items():
        wanted = (weights[name].double() + change(given, n, leaf)).float()
        torch.testing.assert_close(merged[name], wanted, rtol=1e-6, atol=1e-6)
