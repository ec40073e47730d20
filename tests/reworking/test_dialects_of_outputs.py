"""Commands that make adapters of adapters write the dialect of the first, or the one that is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkpoints import numbers, save_model
from dialect_samples import header
from peft_files import save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import FitError, UsageError

Q = "input_blocks_4_1_transformer_blocks_1_attn1_to_q"  # of SDXL
IN_DIFFUSERS = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
TE = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


def kohya(path: Path, seed: int = 1, alpha: float = 1.0, rank: int = 2) -> Path:
    tensors: dict[str, Tensor] = {}
    for n, (module, (out, inputs)) in enumerate({f"lora_unet_{Q}": (6, 4), TE: (8, 4)}.items()):
        tensors |= {
            f"{module}.lora_down.weight": numbers(rank, inputs, seed=seed + n),
            f"{module}.lora_up.weight": numbers(out, rank, seed=seed + n + 50),
            f"{module}.alpha": torch.tensor(alpha),
        }
    save_file(tensors, path, {"ss_network_dim": str(rank), "ss_output_name": "mine", "sshs_model_hash": "old"})
    return path


def delta(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """α/r · up @ down."""
    down, up = (tensors[f"{module}.lora_{side}.weight"].double() for side in ("down", "up"))
    found: Tensor = float(tensors[f"{module}.alpha"]) / down.shape[0] * (up @ down)
    return found


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_rescaling_changes_alpha_where_a_tensor_holds_it(tmp_path: Path) -> None:
    source, out = kohya(tmp_path / "a.safetensors"), tmp_path / "half.safetensors"
    loratool.rescale(source, out, scale=0.5)
    before, after = load_file(source), load_file(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor * 0.5 if name.endswith(".alpha") else tensor)
    assert (header(out)["ss_network_alpha"], header(out)["ss_output_name"]) == ("0.5", "mine")
    assert header(out)["sshs_model_hash"] != "old"


def test_resizing_a_kohya_file_gives_a_kohya_file_of_the_new_rank(tmp_path: Path) -> None:
    """The best approximation of its rank, by the SVD of the whole matrix."""
    source, out = kohya(tmp_path / "a.safetensors", rank=4), tmp_path / "small.safetensors"
    loratool.resize(source, out, rank=2)
    before, after = load_file(source), load_file(out)
    for module in (f"lora_unet_{Q}", TE):
        u, s, vt = torch.linalg.svd(delta(before, module), full_matrices=False)
        close(delta(after, module), u[:, :2] * s[:2] @ vt[:2])
    assert (header(out)["ss_network_dim"], header(out)["ss_network_alpha"]) == ("2", "2")


def test_adapters_of_two_dialects_are_combined_in_that_of_the_first(tmp_path: Path) -> None:
    one = kohya(tmp_path / "one.safetensors")
    a, b = numbers(3, 4, seed=20), numbers(6, 3, seed=21)
    other = {f"{IN_DIFFUSERS}.lora_A.weight": a, f"{IN_DIFFUSERS}.lora_B.weight": b}
    save_file(other, tmp_path / "other.safetensors")
    loratool.combine([one, tmp_path / "other.safetensors"], tmp_path / "both", weights=[1, 0.5])
    after = load_file(tmp_path / "both" / "pytorch_lora_weights.safetensors")
    before = load_file(one)
    close(delta(after, f"lora_unet_{Q}"), delta(before, f"lora_unet_{Q}") + 0.5 * b.double() @ a.double())
    close(delta(after, TE), delta(before, TE))


@pytest.mark.parametrize("command", ["combine", "resize"])
def test_a_header_says_what_all_inputs_agree_on(command: str, tmp_path: Path) -> None:
    """An entry of one input alone, or with another value in another, is not true of a combination; of one adapter it is."""
    told = {
        "a": {"modelspec.trigger_phrase": "sks cat", "ss_steps": "100", "modelspec.author": "me", "ss_v2": "False"},
        "b": {"modelspec.trigger_phrase": "ohwx dog", "ss_epoch": "7", "modelspec.author": "me", "ss_v2": "False"},
    }
    paths = []
    for seed, (name, entries) in enumerate(told.items()):
        tensors = load_file(kohya(tmp_path / f"{name}.safetensors", seed=seed))
        entries |= {"ss_base_model_version": f"sdxl_{name}", "sshs_model_hash": "old", "ss_network_dim": "9"}
        save_file(tensors, tmp_path / f"{name}.safetensors", entries)
        paths.append(tmp_path / f"{name}.safetensors")
    out = tmp_path / "out.safetensors"
    if command == "combine":
        loratool.combine(paths, out)
        kept = {"modelspec.author": "me", "ss_v2": "False"}
    else:
        loratool.resize(paths[0], out, rank=1)
        kept = {**told["a"], "ss_network_dim": "1"}
    found = header(out)
    own = ("sshs_model_hash", "loratool", "ss_network_module", "ss_network_dim", "ss_network_alpha", "format")
    assert {k: v for k, v in found.items() if k not in own} == {k: v for k, v in kept.items() if k not in own}
    made = json.loads(found["loratool"])
    assert all(path.name in json.dumps(made) for path in paths[: 2 if command == "combine" else 1])


@pytest.mark.parametrize("first", ["kohya", "diffusers"])
def test_adapters_of_two_dialects_are_combined_in_another_that_is_asked_for(first: str, tmp_path: Path) -> None:
    """Also in that of the second, whose layers were given the names of the first to be compared with them."""
    one = kohya(tmp_path / "one.safetensors")
    a, b = numbers(3, 4, seed=20), numbers(6, 3, seed=21)
    other = tmp_path / "other.safetensors"
    save_file({f"{IN_DIFFUSERS}.lora_A.weight": a, f"{IN_DIFFUSERS}.lora_B.weight": b}, other)
    sources = [one, other] if first == "kohya" else [other, one]
    for to in ("diffusers", "kohya", "comfy"):
        loratool.combine(sources, tmp_path / f"{to}.safetensors", to=to)
    wanted = delta(load_file(one), f"lora_unet_{Q}") + b.double() @ a.double()
    after = load_file(tmp_path / "diffusers.safetensors")
    close(after[f"{IN_DIFFUSERS}.lora_B.weight"].double() @ after[f"{IN_DIFFUSERS}.lora_A.weight"].double(), wanted)
    close(delta(load_file(tmp_path / "kohya.safetensors"), f"lora_unet_{Q}"), wanted)
    module = "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q"
    close(delta(load_file(tmp_path / "comfy.safetensors"), module), wanted)


@pytest.mark.parametrize("peft_first", [True, False])
def test_an_image_adapter_of_peft_s_is_compared_with_one_of_another_tool(peft_first: bool, tmp_path: Path) -> None:
    """PEFT's names have no `unet.` in front; ⟨ΔW₁, ΔW₂⟩ is that of the formula."""
    factors = {"A": numbers(3, 4, seed=20), "B": numbers(6, 3, seed=21)}
    module = f"base_model.model.{IN_DIFFUSERS.removeprefix('unet.')}"
    peft = save_peft(tmp_path / "peft", {f"{module}.lora_{side}.weight": each for side, each in factors.items()}, r=3)
    one = kohya(tmp_path / "one.safetensors")
    report = loratool.compare([peft, one] if peft_first else [one, peft])
    x, y = delta(load_file(one), f"lora_unet_{Q}"), factors["B"].double() @ factors["A"].double()
    (found,) = report.totals.values()
    assert found.cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-6)


def test_another_dialect_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    source = kohya(tmp_path / "a.safetensors")
    loratool.resize(source, tmp_path / "small.safetensors", rank=1, to="diffusers")
    loratool.rescale(source, tmp_path / "half.safetensors", scale=0.5, to="comfy")
    before, small = load_file(source), load_file(tmp_path / "small.safetensors")
    u, s, vt = torch.linalg.svd(delta(before, f"lora_unet_{Q}"), full_matrices=False)
    found = small[f"{IN_DIFFUSERS}.lora_B.weight"].double() @ small[f"{IN_DIFFUSERS}.lora_A.weight"].double()
    close(found, u[:, :1] * s[:1] @ vt[:1])
    half = load_file(tmp_path / "half.safetensors")
    module = "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q"
    close(delta(half, module), 0.5 * delta(before, f"lora_unet_{Q}"))


def test_an_adapter_of_pefts_is_resized_into_mlx(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    start = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    a, b = numbers(3, 4, seed=1), numbers(6, 3, seed=2)
    save_peft(folder, {f"{start}A.weight": a, f"{start}B.weight": b}, r=3, lora_alpha=6)
    loratool.resize(folder, tmp_path / "mlx", rank=3, to="mlx")
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    start = "model.layers.0.self_attn.q_proj.lora_"
    close((tensors[f"{start}a"].double() @ tensors[f"{start}b"].double()).T, 2 * b.double() @ a.double())


def test_what_the_dialect_cannot_express_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    start = "base_model.model.down_blocks.0.attentions.0.proj_in"
    tensors = {f"{start}.lora_A.weight": numbers(2, 4, seed=1), f"{start}.lora_B.weight": numbers(6, 2, seed=2)}
    save_peft(
        folder,
        tensors | {"base_model.model.conv_out.weight": torch.ones(2, 2)},
        r=2,
        lora_alpha=6,
        modules_to_save=["conv_out"],
    )
    with pytest.raises(FitError, match="saved whole"):
        loratool.resize(folder, tmp_path / "out", rank=1, to="kohya")


def test_a_fine_tune_is_extracted_into_mlx_at_one_rank(tmp_path: Path) -> None:
    """scale · (a @ b)ᵀ is the difference of the two models, where that has no more than the rank."""
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    shapes = {"self_attn.q_proj": (6, 8), "mlp.up_proj": (12, 8)}
    for n, (name, (out, inputs)) in enumerate(shapes.items()):
        target = f"model.layers.0.{name}.weight"
        before[target] = numbers(out, inputs, seed=n)
        after[target] = before[target] + numbers(out, n + 1, seed=n + 5) @ numbers(n + 1, inputs, seed=n + 9)
    for folder, tensors in (("base", before), ("tuned", after)):
        save_model(tmp_path / folder, tensors, {"model_type": "llama"})
    loratool.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "mlx", energy=0.999999, to="mlx")
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert {t.shape[1] for name, t in tensors.items() if name.endswith("lora_a")} == {2}
    for target, weight in before.items():
        a, b = (tensors[f"{target.removesuffix('.weight')}.lora_{side}"] for side in "ab")
        torch.testing.assert_close((a @ b).T, after[target] - weight, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="loratool convert"):
        loratool.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "kohya", to="kohya")
