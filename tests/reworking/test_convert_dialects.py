"""Adapters of image models in other dialects: ΔW by the formula of each, under the names that its tools look for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import numbers, save_model
from dialect_samples import header
from paths import ROOT
from peft_files import save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import FitError, InputError, LoratoolError, UsageError

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.1"  # of SDXL alone
LDM = "input_blocks_4_1_transformer_blocks_1"
Tensors = dict[str, Tensor]


def pair(out: int, inputs: int, seed: int, rank: int = 2) -> tuple[Tensor, Tensor]:
    """A and B."""
    return numbers(rank, inputs, seed=seed), numbers(out, rank, seed=seed + 50)


def saved(path: Path, tensors: Tensors, **header: str) -> Path:
    save_file(tensors, path, {"format": "pt", **header})
    return path


def in_diffusers(modules: Mapping[str, tuple[int, int]], path: Path, alpha: float | None = None) -> Path:
    """A file as diffusers saves it, with α in the header or without; names begin with a component."""
    tensors: Tensors = {}
    for n, (module, (out, inputs)) in enumerate(modules.items()):
        a, b = pair(out, inputs, seed=n)
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    header = {}
    if alpha is not None:
        components = {module.partition(".")[0] for module in modules}
        table = {f"{c}.{key}": value for c in components for key, value in (("r", 2), ("lora_alpha", alpha))}
        header = {"lora_adapter_metadata": json.dumps(table)}
    return saved(path, tensors, **header)


def delta(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """ΔW of a module as kohya's tools and ComfyUI work it out: α/r · up @ down."""
    down, up = (tensors[f"{module}.lora_{side}.weight"].double() for side in ("down", "up"))
    alpha = float(tensors[f"{module}.alpha"])
    return alpha / down.shape[0] * (up.flatten(1) @ down.flatten(1))


def of_diffusers(tensors: Mapping[str, Tensor], module: str, scale: float = 1.0) -> Tensor:
    a, b = (tensors[f"{module}.lora_{side}.weight"].double() for side in "AB")
    return scale * (b.flatten(1) @ a.flatten(1))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


SDXL = {
    f"unet.{BLOCK}.attn2.to_k": (6, 2048),
    "unet.mid_block.resnets.0.time_emb_proj": (6, 4),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (8, 4),
    "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj": (4, 4),
}
KOHYA_SDXL = (
    f"lora_unet_{LDM}_attn2_to_k",
    "lora_unet_middle_block_0_emb_layers_1",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "lora_te2_text_model_encoder_layers_0_self_attn_out_proj",
)


def test_kohya_has_the_authors_names_of_sdxl_and_alpha_as_a_tensor(tmp_path: Path) -> None:
    """The header has the rank, α and the SHA-256 of the data, which kohya's tools compute from the file."""
    source = in_diffusers(SDXL, tmp_path / "lora.safetensors", alpha=1)
    out = tmp_path / "kohya.safetensors"
    report = loratool.convert(source, out, to="kohya")
    before, after = load_file(source), load_file(out)
    assert len(after) == 12
    for module, theirs in zip(SDXL, KOHYA_SDXL, strict=True):
        close(delta(after, theirs), of_diffusers(before, module, 0.5))
        assert torch.equal(after[f"{theirs}.lora_up.weight"], before[f"{module}.lora_B.weight"])
    told, raw = header(out), out.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert told["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("2", "1")
    assert told["ss_base_model_version"].startswith("sdxl")
    assert not {"lora_adapter_metadata", "ss_network_args"} & told.keys()
    assert {layer.error for layer in report.modules.values()} == {0.0}


def test_text_encoders_have_their_usual_names_also_where_transformers_5_saved_them(tmp_path: Path) -> None:
    """Its CLIP models begin with `encoder`, where those of all tools and older releases begin with `text_model.encoder`."""
    newer = {name.replace(".text_model.", "."): shape for name, shape in SDXL.items()}
    sources = [in_diffusers(names, tmp_path / f"{n}.safetensors", alpha=1) for n, names in enumerate((SDXL, newer))]
    for dialect in ("kohya", "comfy", "diffusers"):
        found = []
        for n, source in enumerate(sources):
            loratool.convert(source, tmp_path / f"{n}-{dialect}.safetensors", to=dialect)
            found.append(load_file(tmp_path / f"{n}-{dialect}.safetensors"))
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


def test_comfy_has_paths_under_the_names_of_its_own_models(tmp_path: Path) -> None:
    source = in_diffusers(SDXL, tmp_path / "lora.safetensors", alpha=1)
    loratool.convert(source, tmp_path / "comfy.safetensors", to="comfy")
    before, after = load_file(source), load_file(tmp_path / "comfy.safetensors")
    theirs = (
        "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k",
        "diffusion_model.middle_block.0.emb_layers.1",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.out_proj",
    )
    for module, name in zip(SDXL, theirs, strict=True):
        close(delta(after, name), of_diffusers(before, module, 0.5))


def test_diffusers_gets_the_scale_in_its_factors_and_convolutions_as_they_are(tmp_path: Path) -> None:
    """Neither α of a tensor nor of a header is read by all: without either, every tool applies a scale of 1."""
    tensors: Tensors = {}
    shapes = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": ((2, 4), (6, 2)),
        "lora_unet_down_blocks_0_attentions_0_proj_in": ((2, 4, 1, 1), (6, 2, 1, 1)),
        "lora_unet_down_blocks_0_resnets_0_conv1": ((2, 4, 3, 3), (6, 2, 1, 1)),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": ((2, 4), (4, 2)),
    }
    for n, (module, (down, up)) in enumerate(shapes.items()):
        tensors |= {
            f"{module}.lora_down.weight": numbers(*down, seed=n),
            f"{module}.lora_up.weight": numbers(*up, seed=n + 9),
            f"{module}.alpha": torch.tensor(1.0),
        }
    source = saved(tmp_path / "kohya.safetensors", tensors, ss_base_model_version="sd_v1", ss_output_name="mine")
    loratool.convert(source, tmp_path / "diffusers", to="diffusers")
    written = tmp_path / "diffusers" / "pytorch_lora_weights.safetensors"
    after = load_file(written)
    names = (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.0.attentions.0.proj_in",
        "unet.down_blocks.0.resnets.0.conv1",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    )
    for theirs, module in zip(names, shapes, strict=True):
        close(of_diffusers(after, theirs), delta(tensors, module))
        assert after[f"{theirs}.lora_A.weight"].shape == shapes[module][0]
    assert len(after) == 8
    assert header(written)["ss_output_name"] == "mine"
    assert "ss_network_dim" not in header(written)


FLUX = {
    "transformer.transformer_blocks.0.attn.to_q": (4, 4),
    "transformer.transformer_blocks.0.attn.to_k": (4, 4),
    "transformer.transformer_blocks.0.attn.to_v": (4, 4),
    "transformer.single_transformer_blocks.3.attn.to_k": (4, 4),
    "transformer.single_transformer_blocks.3.proj_mlp": (16, 4),
    "transformer.norm_out.linear": (8, 4),
}


def test_layers_that_flux_has_fused_are_joined_by_rows_and_come_apart_again(tmp_path: Path) -> None:
    """Rows of q, k and v in their order, zeros for what is not adapted, and halves that change places."""
    source = in_diffusers(FLUX, tmp_path / "lora.safetensors", alpha=1)
    loratool.convert(source, tmp_path / "kohya.safetensors", to="kohya")
    before, after = load_file(source), load_file(tmp_path / "kohya.safetensors")
    own = [of_diffusers(before, module, 0.5) for module in FLUX]
    close(delta(after, "lora_unet_double_blocks_0_img_attn_qkv"), torch.cat(own[:3]))
    zero = torch.zeros(4, 4, dtype=torch.float64)
    close(delta(after, "lora_unet_single_blocks_3_linear1"), torch.cat([zero, own[3], zero, own[4]]))
    close(delta(after, "lora_unet_final_layer_adaLN_modulation_1"), torch.cat([own[5][4:], own[5][:4]]))
    loratool.convert(tmp_path / "kohya.safetensors", tmp_path / "back", to="diffusers")
    back = load_file(tmp_path / "back" / "pytorch_lora_weights.safetensors")
    assert back.keys() == before.keys()
    for module, wanted in zip(FLUX, own, strict=True):
        assert torch.equal(back[f"{module}.lora_A.weight"], before[f"{module}.lora_A.weight"])
        close(of_diffusers(back, module), wanted)


def test_layers_with_one_down_are_joined_at_their_own_rank(tmp_path: Path) -> None:
    tensors = load_file(in_diffusers(FLUX, tmp_path / "lora.safetensors"))
    shared = tensors["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"]
    for name in ("to_k", "to_v"):
        tensors[f"transformer.transformer_blocks.0.attn.{name}.lora_A.weight"] = shared.clone()
    source = saved(tmp_path / "shared.safetensors", tensors)
    loratool.convert(source, tmp_path / "comfy.safetensors", to="comfy")
    after, module = load_file(tmp_path / "comfy.safetensors"), "diffusion_model.double_blocks.0.img_attn.qkv"
    assert torch.equal(after[f"{module}.lora_down.weight"], shared)
    parts = [of_diffusers(tensors, f"transformer.transformer_blocks.0.attn.to_{part}") for part in "qkv"]
    close(delta(after, module), torch.cat(parts))


def test_loha_and_lokr_become_lora_of_the_rank_that_they_have(tmp_path: Path) -> None:
    """Columns of both halves times each other; the Kronecker product of the factors. Both by their definitions."""
    q, k = (f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{part}" for part in "qk")
    halves = [numbers(*shape, seed=n) for n, shape in enumerate([(24, 2), (2, 20), (24, 2), (2, 20)])]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors: Tensors = {f"{q}.{name}": half for name, half in zip(names, halves, strict=True)}
    w1, w2_a, w2_b = numbers(2, 2, seed=10), numbers(12, 2, seed=11), numbers(2, 10, seed=12)
    tensors |= {f"{k}.lokr_w1": w1, f"{k}.lokr_w2_a": w2_a, f"{k}.lokr_w2_b": w2_b}
    tensors |= {f"{module}.alpha": torch.tensor(1.0) for module in (q, k)}
    source = saved(tmp_path / "lycoris.safetensors", tensors)
    report = loratool.convert(source, tmp_path / "kohya.safetensors", to="kohya")
    after = load_file(tmp_path / "kohya.safetensors")
    one, other = (halves[n].double() @ halves[n + 1].double() for n in (0, 2))
    torch.testing.assert_close(delta(after, q), 0.5 * one * other, rtol=1e-6, atol=1e-6)
    kron = 0.5 * torch.kron(w1.double(), w2_a.double() @ w2_b.double())
    torch.testing.assert_close(delta(after, k), kron, rtol=1e-6, atol=1e-6)
    assert set(report.ranks.values()) == {4}
    notes = sorted(note.text for note in report.notes if note.code == "written-as-lora")
    assert notes == ["1 layer of LoHa written as LoRA", "1 layer of LoKr written as LoRA"]


def test_an_update_of_full_rank_is_approximated_on_request_with_its_error(tmp_path: Path) -> None:
    q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    w1, w2 = numbers(2, 2, seed=1), numbers(3, 4, seed=2)
    source = saved(tmp_path / "lokr.safetensors", {f"{q}.lokr_w1": w1, f"{q}.lokr_w2": w2})
    with pytest.raises(InputError, match="pass --rank"):
        loratool.convert(source, tmp_path / "out.safetensors", to="kohya")
    report = loratool.convert(source, tmp_path / "out.safetensors", to="kohya", rank=3)
    values = torch.linalg.svdvals(torch.kron(w1.double(), w2.double()))
    wanted = float((values[3:].square().sum() / values.square().sum()).sqrt())
    (layer,) = report.modules.values()
    assert layer.error == pytest.approx(wanted, rel=1e-5)
    assert layer.approximated == "rank 6 → 3"
    assert "rank 6 → 3" in str(report)


def test_names_that_fit_several_architectures_are_told_or_chosen(tmp_path: Path) -> None:
    """The names of Stable Diffusion 1 and 2 are the same, those of XL are in part."""
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    source = in_diffusers({module: (4, 4)}, tmp_path / "lora.safetensors")
    report = loratool.convert(source, tmp_path / "assumed.safetensors", to="kohya")
    assert "architecture-assumed" in [note.code for note in report.notes]
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.alpha" in load_file(
        tmp_path / "assumed.safetensors"
    )
    report = loratool.convert(source, tmp_path / "xl.safetensors", to="kohya", architecture="sdxl")
    assert "architecture-assumed" not in [note.code for note in report.notes]
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha" in load_file(tmp_path / "xl.safetensors")


def test_names_of_no_known_architecture_are_refused_rather_than_guessed(tmp_path: Path) -> None:
    module = "lora_unet_some_block_0_to_q"
    a, b = pair(4, 4, seed=1)
    source = saved(tmp_path / "odd.safetensors", {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b})
    with pytest.raises(InputError, match="some_block"):
        loratool.convert(source, tmp_path / "out", to="diffusers")
    with pytest.raises(InputError, match="underscores"):
        loratool.convert(source, tmp_path / "out", to="peft")
    loratool.convert(source, tmp_path / "out.safetensors", to="lycoris")
    assert torch.equal(load_file(tmp_path / "out.safetensors")[f"{module}.lora_up.weight"], b)


def test_of_a_known_architecture_only_the_modules_that_it_does_not_have_are_told(tmp_path: Path) -> None:
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to"
    tensors: Tensors = {}
    for module in (f"{block}_q", f"{block}_k", f"{block}_v", "lora_unet_nonsense_to_q"):
        down, up = pair(8, 8, seed=1)
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    source = saved(tmp_path / "odd.safetensors", tensors)
    with pytest.raises(InputError, match="The others are modules of sd15") as error:
        loratool.convert(source, tmp_path / "out", to="diffusers")
    assert "unet_nonsense_to_q" in str(error.value)
    assert "down_blocks" not in str(error.value)


def test_a_file_is_replaced_only_where_it_was_made_here(tmp_path: Path) -> None:
    source = in_diffusers(FLUX, tmp_path / "lora.safetensors")
    out, other = tmp_path / "out.safetensors", saved(tmp_path / "other.safetensors", {"x": torch.zeros(2)})
    loratool.convert(source, out, to="comfy")
    with pytest.raises(UsageError, match="--overwrite"):
        loratool.convert(source, out, to="kohya")
    loratool.convert(source, out, to="kohya", overwrite=True)
    assert "sshs_model_hash" in header(out)
    with pytest.raises(UsageError, match="not made by loratool"):
        loratool.convert(source, other, to="kohya", overwrite=True)
    with pytest.raises(UsageError, match="input"):
        loratool.convert(source, source, to="kohya", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lora.safetensors",
        "other.safetensors",
        "out.safetensors",
    ]


# ---- servers ----


def peft_adapter(
    folder: Path, modules: Mapping[str, tuple[int, int, int]], dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """An adapter of PEFT's: (out, in, rank) by module."""
    tensors: Tensors = {}
    for n, (module, (out, inputs, rank)) in enumerate(modules.items()):
        a, b = pair(out, inputs, seed=n, rank=rank)
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": a.to(dtype),
            f"base_model.model.{module}.lora_B.weight": b.to(dtype),
        }
    return save_peft(folder, tensors, **{"r": 2, "lora_alpha": 1, **config})


LAYERS = {"model.layers.0.self_attn.q_proj": (6, 4, 2), "model.layers.0.mlp.down_proj": (4, 8, 3)}
PATTERNS: Mapping[str, Any] = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 6}, "use_rslora": True}


@pytest.mark.parametrize(("server", "rank"), [("vllm", 8), ("sglang", 3)])
def test_a_server_gets_one_rank_and_an_alpha_that_is_the_rank(tmp_path: Path, server: str, rank: int) -> None:
    """With lora_alpha / r alone, which servers read, every ΔW is what PEFT makes of patterns and rsLoRA."""
    adapter = peft_adapter(tmp_path / "adapter", LAYERS, **PATTERNS)
    report = loratool.convert(adapter, tmp_path / "out", server=server)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    for module, scale in zip(LAYERS, (1 / 2**0.5, 6 / 3**0.5), strict=True):
        wanted = of_diffusers(before, f"base_model.model.{module}", scale)
        found = of_diffusers(after, f"base_model.model.{module}")
        assert float((found - wanted).norm() / wanted.norm()) < 1e-7
        assert after[f"base_model.model.{module}.lora_A.weight"].shape[0] == rank
    assert server in str(report).lower()


def test_a_server_refuses_by_name_what_it_does_not_take(tmp_path: Path) -> None:
    adapter = peft_adapter(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (6, 4, 2)}, use_dora=True)
    weights = adapter / "adapter_model.safetensors"
    more = {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(6)}
    save_file(load_file(weights) | more, weights)
    with pytest.raises(FitError, match=r"vLLM 0.*DoRA"):
        loratool.convert(adapter, tmp_path / "out", server="vllm")
    with pytest.raises(UsageError, match="ranks up to 512"):
        loratool.convert(
            peft_adapter(tmp_path / "big", {"model.layers.0.mlp.up_proj": (600, 600, 513)}, r=513),
            tmp_path / "out",
            server="vllm",
        )
    kernels = {
        "vision.conv.lora_A.weight": numbers(2, 3, 2, 2, seed=1),
        "vision.conv.lora_B.weight": numbers(4, 2, 1, 1, seed=2),
    }
    pixels = peft_adapter(tmp_path / "pixels", LAYERS, **PATTERNS)
    weights = pixels / "adapter_model.safetensors"
    save_file(load_file(weights) | {f"base_model.model.{name}": tensor for name, tensor in kernels.items()}, weights)
    for server in ("vllm", "sglang"):
        with pytest.raises(FitError, match=r"does not take LoRA of convolutions: vision\.conv\.weight"):
            loratool.convert(pixels, tmp_path / "out", server=server)
    with pytest.raises(UsageError, match="one of vllm"):
        loratool.convert(adapter, tmp_path / "out", server="vlm")
    with pytest.raises(UsageError, match=r"before 0\.32"):
        loratool.convert(adapter, tmp_path / "out", server="vllm@0.2")
    assert not (tmp_path / "out").exists()


def test_a_server_that_nobody_has_seen_serve_image_models_gets_an_adapter_of_one_with_a_note(tmp_path: Path) -> None:
    """What vLLM makes of LoRA on Flux is not recorded, so it is neither refused nor promised."""
    layer = {"transformer_blocks.0.attn.to_q": (4, 4, 2)}
    ours = peft_adapter(tmp_path / "flux-peft", layer | {"single_transformer_blocks.0.proj_mlp": (16, 4, 2)})
    theirs = in_diffusers(FLUX, tmp_path / "flux.safetensors")
    for number, (adapter, server) in enumerate([(ours, "vllm"), (ours, "sglang"), (theirs, "vllm")]):
        notes = loratool.convert(adapter, tmp_path / f"out-{number}", server=server).notes
        (said,) = (note.text for note in notes if note.code == "server-support-unknown")
        assert said.endswith("whether it serves flux is not known")
    language = loratool.convert(peft_adapter(tmp_path / "llama", OF_LLAMA), tmp_path / "llama-out", server="vllm")
    images = loratool.convert(ours, tmp_path / "comfy.safetensors", server="comfyui")
    assert "server-support-unknown" not in {note.code for report in (language, images) for note in report.notes}


# ---- round trips ----

WAYS = ("peft-fused", "peft-split", "mlx", "torchtune", "gguf", "diffusers", "comfy", "kohya", "lycoris")
BACK = {"peft-fused": "peft-split", "peft-split": "peft-fused"}  # of all others peft
OF_IMAGES = ("diffusers", "comfy", "kohya", "lycoris")
OF_UNET = {f"{BLOCK}.attn1.to_q": (4, 4, 2), f"{BLOCK}.attn2.to_k": (4, 2048, 2)}
OF_LLAMA = {f"model.layers.0.self_attn.{name}_proj": (4, 4, 2) for name in "qkv"}
OF_PHI = {"model.layers.0.mlp.gate_up_proj": (8, 4, 2), "model.layers.0.mlp.down_proj": (4, 4, 2)}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 2,
    "hidden_size": 4,
    "tie_word_embeddings": False,
}
CASES: Mapping[str, dict[str, Any]] = {
    "alpha = r": {"lora_alpha": 2},
    "alpha / r a power of two": {"lora_alpha": 1},
    "any alpha": {"lora_alpha": 3.3},
    "alpha patterns": {"alpha_pattern": {"to_k": 5, "k_proj": 5, "down_proj": 5}},
    "several ranks": {},
    "rsLoRA": {"use_rslora": True},
    "bfloat16, any alpha": {"lora_alpha": 3, "dtype": torch.bfloat16},
    "DoRA": {"use_dora": True},
    "experts": {},
    "convolutions": {},
    "embeddings": {},
    "token rows": {"trainable_token_indices": {"model.embed_tokens": [1, 3]}},
    "biases of factors": {"lora_bias": True},
    "modules saved whole": {"modules_to_save": ["conv_out", "lm_head"]},
}


def tensors_beside(case: str, modules: Mapping[str, tuple[int, int, int]]) -> Tensors:
    """What an adapter has besides factors."""
    start = "base_model.model."
    match case:
        case "DoRA":
            return {
                f"{start}{m}.lora_magnitude_vector": pair(out, 1, 9)[1][:, 0].abs()
                for m, (out, _, _) in modules.items()
            }
        case "biases of factors":
            return {f"{start}{m}.lora_B.bias": pair(out, 1, 9)[1][:, 0].clone() for m, (out, _, _) in modules.items()}
        case "modules saved whole":
            whole = {"conv_out": (3, 4, 3, 3)} if modules is OF_UNET else {"lm_head": (3, 4)}
            return {f"{start}{name}.weight": numbers(*shape, seed=3) for name, shape in whole.items()}
        case "embeddings":
            a, b = pair(4, 9, seed=5)
            start += "model.embed_tokens.lora_embedding_"
            return {f"{start}A": a, f"{start}B": b}
        case "convolutions":
            module = f"{start}{'down_blocks.1.resnets.0.conv1' if modules is OF_UNET else 'vision.conv'}.lora_"
            return {f"{module}A.weight": numbers(2, 4, 3, 3, seed=1), f"{module}B.weight": numbers(6, 2, 1, 1, seed=2)}
        case "token rows":
            return {f"{start}model.embed_tokens.token_adapter.trainable_tokens_delta": numbers(2, 4, seed=4)}
    return {}


def round_trip(home: Path, way: str, case: str, base: Path) -> str:
    """What is left of an adapter of PEFT's on the way there and back."""
    settings = CASES[case]
    names = OF_UNET if way in OF_IMAGES else OF_PHI if way == "peft-split" else OF_LLAMA
    if case == "several ranks":
        last, (out, inputs, _) = list(names.items())[-1]
        names = {**names, last: (out, inputs, 3)}
        leaf = last.rpartition(".")[2]
        settings = {"rank_pattern": {leaf: 3}, "alpha_pattern": {leaf: 1.5}}
    if case == "experts":
        names = {f"model.layers.0.mlp.experts.{n}.up_proj": (6, 4, 2) for n in range(3)}
        if way == "peft-split":  # a parameter of three experts
            names = {"model.layers.0.mlp.experts": (12, 4, 6)}
            settings = {"target_parameters": ["mlp.experts.gate_up_proj"]}
    adapter = peft_adapter(home / "adapter", names, **settings)
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights) | tensors_beside(case, names), weights)
    model = base if way in ("torchtune", "gguf") else None
    loratool.read_adapter(adapter)  # so that what is refused below is what the dialect cannot say
    try:
        reports = [loratool.convert(adapter, home / "there", to=way, base=model)]
    except (FitError, InputError):
        assert not (home / "there").exists()
        return "refused"
    reports.append(loratool.convert(home / "there", home / "back", to=BACK.get(way, "peft"), base=model))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, home / "back"))
    assert before.keys() == after.keys(), (way, case)
    errors = [layer.error or 0.0 for report in reports for layer in report.modules.values()]
    assert not any(error for report in reports for error in report.beside.values())
    if all(torch.equal(before[name], after[name]) for name in before):
        assert max(errors) < 1e-7
        return "same bytes"
    if any(after[name].shape != tensor.shape for name, tensor in before.items()):
        for name, tensor in before.items():
            padded = torch.zeros_like(after[name])
            padded[tuple(map(slice, tensor.shape))] = tensor
            assert torch.equal(after[name], padded)
        return "padded with zeros"
    assert all(torch.equal(before[name], after[name]) for name in before if ".lora_A." in name)
    assert all(torch.equal(before[name], after[name]) for name in before if ".lora_" not in name or "magnitude" in name)
    return "same ΔW" if max(errors) == 0 else "B rounded once"


def test_the_page_has_the_table_of_round_trips(tmp_path: Path) -> None:
    """PEFT → dialect → PEFT, as it comes out: the same bytes, or what the dialect cannot say is refused."""
    base = tmp_path / "base"
    save_model(
        base, {f"{module}.weight": torch.ones(out, inputs) for module, (out, inputs, _) in OF_LLAMA.items()}, LLAMA
    )
    lines = [f"| | {' | '.join(WAYS)} |", f"|---{'|---' * len(WAYS)}|"]
    for n, case in enumerate(CASES):
        found = []
        for way in WAYS:
            home = tmp_path / f"{n} {way}"
            home.mkdir()
            found.append(round_trip(home, way, case, base))
        lines.append(f"| {case} | {' | '.join(found)} |")
    table = "\n".join(lines)
    assert table in (ROOT / "docs" / "converting.md").read_text(encoding="utf-8"), table


def test_biases_hold_the_scale_that_their_reader_does_not_apply(tmp_path: Path) -> None:
    """`diff_b` is added as it is, PEFT's lora_B.bias times α/r: rounded once in bfloat16, and the same bytes from PEFT to PEFT."""
    adapter = peft_adapter(tmp_path / "adapter", OF_UNET, torch.bfloat16, lora_alpha=3, lora_bias=True)
    weights = adapter / "adapter_model.safetensors"
    biases = {name: t.bfloat16() for name, t in tensors_beside("biases of factors", OF_UNET).items()}
    save_file(load_file(weights) | biases, weights)
    report = loratool.convert(adapter, tmp_path / "there", to="lycoris")
    found = load_file(tmp_path / "there" / "pytorch_lora_weights.safetensors")
    wanted = [(1.5 * bias.double()).bfloat16() for bias in biases.values()]
    changed = [tensor for name, tensor in found.items() if name.endswith(".diff_b")]
    assert len(changed) == 2
    assert all(any(torch.equal(one, other) for other in changed) for one in wanted)
    assert 0 < max(report.beside.values()) < 2**-8
    loratool.convert(adapter, tmp_path / "same", to="peft")
    kept = load_file(tmp_path / "same" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], bias) for name, bias in biases.items())


def test_a_name_that_is_written_wrong_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratool.adapters.formats.named import writing

    kept = writing.NamedNames.module
    monkeypatch.setattr(writing.NamedNames, "module", lambda self, target: kept(self, target).replace("_q", "_r"))
    source = in_diffusers(FLUX, tmp_path / "lora.safetensors")
    with pytest.raises(LoratoolError) as refusal:
        loratool.convert(source, tmp_path / "out.safetensors", to="kohya")
    assert refusal.value.exit_code == 1
    assert not (tmp_path / "out.safetensors").exists()


# ---- LyCORIS and headers ----


def test_loha_and_lokr_keep_their_tensors_where_the_dialect_has_them(tmp_path: Path) -> None:
    """Under other names; a LoKr of full rank too, which no LoRA of a small rank equals."""
    q, k = (f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{part}" for part in "qk")
    tensors: Tensors = {f"{k}.lokr_w1": numbers(2, 2, seed=1), f"{k}.lokr_w2": numbers(3, 4, seed=2)}
    shapes = {"hada_w1_a": (24, 2), "hada_w1_b": (2, 20), "hada_w2_a": (24, 2), "hada_w2_b": (2, 20)}
    tensors |= {f"{q}.{role}": numbers(*shape, seed=n) for n, (role, shape) in enumerate(shapes.items())}
    tensors[f"{q}.alpha"] = torch.tensor(1.0, dtype=torch.bfloat16)
    source = saved(tmp_path / "lycoris.safetensors", tensors)
    planned = loratool.convert(source, tmp_path / "dry.safetensors", to="comfy", dry_run=True)
    assert "not read back" in str(planned)
    assert {layer.error for layer in planned.modules.values()} == {None}
    report = loratool.convert(source, tmp_path / "comfy.safetensors", to="comfy")
    after = load_file(tmp_path / "comfy.safetensors")
    start = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_"
    assert len(after) == len(tensors)
    for name, tensor in tensors.items():
        module, _, role = name.partition(".")
        assert torch.equal(after[f"{start}{module[-1]}.{role}"], tensor)
    assert {layer.error for layer in report.modules.values()} == {0.0}
    assert "byte for byte" in str(report)


def test_dora_of_some_layers_is_refused_where_one_setting_is_for_all(tmp_path: Path) -> None:
    """Without the setting mlx-lm and PEFT would drop the lengths, with it they would make up those of other layers."""
    tensors: Tensors = {}
    for n, leaf in enumerate(("to_q", "to_k")):
        a, b = pair(4, 4, seed=n)
        start = f"unet.{BLOCK}.attn1.{leaf}"
        tensors |= {f"{start}.lora_A.weight": a, f"{start}.lora_B.weight": b}
    lengths = f"unet.{BLOCK}.attn1.to_q.lora_magnitude_vector"
    source = saved(tmp_path / "style.safetensors", tensors | {lengths: numbers(4, seed=9).abs()})
    with pytest.raises(FitError, match=rf"DoRA of some layers only: unet\.{BLOCK}\.attn1\.to_q"):
        loratool.convert(source, tmp_path / "out", to="peft")
    report = loratool.convert(source, tmp_path / "out", to="peft", accept_loss=True)
    assert [note.code for note in report.lost] == ["dora-of-some"]
    found = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert len(found) == len(tensors)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()).get("use_dora", False) is False


PROJECTION = "down_blocks.1.attentions.0.proj_in"
# text width of cross-attention, architecture that is asked for → the kernel that diffusers' U-Net has there
FORMS = {"SD 1.5 by width": (768, None, (1, 1)), "SD 2 by width": (1024, None, ()), "SDXL, asked for": (0, "sdxl", ())}


@pytest.mark.parametrize("kernel", [(), (1, 1)])
@pytest.mark.parametrize("case", FORMS)
def test_layers_around_attention_get_the_form_that_their_model_has(
    case: str, kernel: tuple[int, ...], tmp_path: Path
) -> None:
    """A convolution of 1 × 1 in Stable Diffusion 1, linear since 2; a tool loads no other. The numbers are the same."""
    width, architecture, wanted = FORMS[case]
    a, b = pair(8, 8, seed=1)
    tensors = {
        f"unet.{PROJECTION}.lora_A.weight": a.view(2, 8, *kernel),
        f"unet.{PROJECTION}.lora_B.weight": b.view(8, 2, *kernel),
    }
    if width:
        key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
        k, up = pair(8, width, seed=3)
        tensors |= {f"{key}.lora_A.weight": k, f"{key}.lora_B.weight": up}
    source = saved(tmp_path / "style.safetensors", tensors)
    for to, start, names in (("diffusers", f"unet.{PROJECTION}.lora_", "AB"), ("kohya", "", ("down", "up"))):
        loratool.convert(source, tmp_path / to, to=to, architecture=architecture)
        found = load_file(next((tmp_path / to).glob("*.safetensors")))
        if to == "kohya":
            start = next(name for name in found if "proj_in" in name).partition(".")[0] + ".lora_"
        down, up = (found[f"{start}{name}.weight"] for name in names)
        assert (down.shape, up.shape) == ((2, 8, *wanted), (8, 2, *wanted))
        assert torch.equal(down.flatten(), a.flatten())
        assert torch.equal(up.flatten(), b.flatten())


def test_a_base_tells_the_form_of_layers_around_attention_and_a_guess_does_not(tmp_path: Path) -> None:
    a, b = pair(8, 8, seed=1)
    tensors = {f"unet.{PROJECTION}.lora_A.weight": a, f"unet.{PROJECTION}.lora_B.weight": b}
    source = saved(tmp_path / "style.safetensors", tensors)
    save_file({f"unet.{PROJECTION}.weight": torch.ones(8, 8, 1, 1)}, tmp_path / "base.safetensors")
    loratool.convert(source, tmp_path / "told", to="diffusers", base=tmp_path / "base.safetensors")
    report = loratool.convert(source, tmp_path / "guessed", to="diffusers")
    assert "architecture-assumed" in [note.code for note in report.notes]
    shapes = [load_file(next((tmp_path / n).glob("*.safetensors"))).values() for n in ("told", "guessed")]
    assert [{tensor.dim() for tensor in each} for each in shapes] == [{4}, {2}]


def test_dora_of_columns_is_refused_by_name_for_peft(tmp_path: Path) -> None:
    """PEFT takes lengths of rows, but for embeddings."""
    a, b = pair(4, 4, seed=1)
    module = f"lora_unet_{LDM}_attn1_to_q"
    tensors = {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b, f"{module}.dora_scale": torch.ones(1, 4)}
    source = saved(tmp_path / "style.safetensors", {**tensors, f"{module}.dora_scale": torch.ones(1, 4)})
    with pytest.raises(FitError, match="PEFT cannot store DoRA of input columns"):
        loratool.convert(source, tmp_path / "out", to="peft")


@pytest.mark.parametrize("way", ["resize", "combine", "kohya", "lycoris"])
def test_dora_of_columns_keeps_its_lengths(way: str, tmp_path: Path) -> None:
    """As OneTrainer trains it: a length for each input, of a convolution for each channel. W' = m/‖V‖ ⊙ V by columns."""
    linear, conv = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.1.resnets.0.conv1"
    shapes = {linear: (6, 6), conv: (6, 4, 3, 3)}
    tensors: Tensors = {}
    for n, (module, (rows, columns, *kernel)) in enumerate(shapes.items()):
        start, ones = f"lora_unet_{module.replace('.', '_')}", [1 for _ in kernel]
        tensors |= {
            f"{start}.lora_down.weight": numbers(2, columns, *kernel, seed=n),
            f"{start}.lora_up.weight": numbers(rows, 2, *ones, seed=n + 9),
            f"{start}.dora_scale": numbers(1, columns, *ones, seed=n + 19).abs() + 1,
        }
    source, out = saved(tmp_path / "style.safetensors", tensors), tmp_path / "out"
    if way == "resize":
        loratool.resize(source, out, rank=2, device="cpu")
    elif way == "combine":
        loratool.combine([source], out, normalize=False, device="cpu")
    else:
        loratool.convert(source, out, to=way, architecture="sd15")
    base = {f"unet.{module}.weight": numbers(*shape, seed=30) for module, shape in shapes.items()}
    save_file(base, tmp_path / "base.safetensors")
    found = {}
    for name, adapter in (("before", source), ("after", out)):
        loratool.merge(tmp_path / "base.safetensors", adapter, tmp_path / f"{name}.safetensors", device="cpu")
        found[name] = load_file(tmp_path / f"{name}.safetensors")
    for weight, tensor in base.items():
        start = f"lora_unet_{weight.removeprefix('unet.').removesuffix('.weight').replace('.', '_')}"
        down, up, lengths = (
            tensors[f"{start}.{role}"].double() for role in ("lora_down.weight", "lora_up.weight", "dora_scale")
        )
        whole = tensor.double() + (up.flatten(1) @ down.flatten(1)).view(tensor.shape)
        norms = whole.transpose(0, 1).flatten(1).norm(dim=1).view(lengths.shape)
        for merged in found.values():
            torch.testing.assert_close(merged[weight].double(), whole * lengths / norms, rtol=1e-5, atol=1e-6)


def test_training_data_is_removed_on_request_and_push_tells_of_it(tmp_path: Path) -> None:
    a, b = pair(4, 4, seed=1)
    module = f"lora_unet_{LDM}_attn1_to_q"
    told = {
        "ss_tag_frequency": '{"10_me": {"a photo of me": 3}}',
        "ss_dataset_dirs": '{"10_me": {}}',
        "ss_learning_rate": "1e-4",
    }
    tensors = {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b}
    source = saved(tmp_path / "style.safetensors", tensors, **told)
    loratool.convert(source, tmp_path / "kept", to="kohya")
    loratool.convert(source, tmp_path / "stripped", to="kohya", strip_metadata=True)
    kept, stripped = (header(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("kept", "stripped"))
    assert told.items() <= kept.items()
    assert told.keys() & stripped.keys() == {"ss_learning_rate"}
    assert "photo" not in "".join(p.read_text(errors="replace") for p in (tmp_path / "stripped").iterdir())
    notes = [
        [note.code for note in loratool.push(tmp_path / name, "org/name", dry_run=True).notes]
        for name in ("kept", "stripped")
    ]
    assert ["training-data-in-header" in codes for codes in notes] == [True, False]


def test_language_models_and_image_models_are_told_apart(tmp_path: Path) -> None:
    """GPT-2 has names that begin as those of diffusers do; experts and fused projections are of language models."""
    gpt2 = peft_adapter(tmp_path / "gpt2", {"transformer.h.0.attn.c_proj": (4, 4, 2)})
    with pytest.raises(InputError, match=r"h\.0"):
        loratool.convert(gpt2, tmp_path / "out", to="diffusers")
    flux = in_diffusers(FLUX, tmp_path / "lora.safetensors")
    unet = peft_adapter(tmp_path / "unet", OF_UNET)
    for dialect in ("mlx", "peft-fused", "gguf", "torchtune"):  # the last two without a config of such a model
        for adapter in (flux, unet):
            with pytest.raises(InputError, match="for language models"):
                loratool.convert(adapter, tmp_path / "out", to=dialect)


def test_an_architecture_that_the_modules_are_not_of_is_refused_with_the_one_that_they_are_of(tmp_path: Path) -> None:
    adapter = in_diffusers({f"unet.{BLOCK}.attn1.to_q": (8, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="these are not modules of flux, but of sdxl"):
        loratool.convert(adapter, tmp_path / "out.safetensors", to="kohya", architecture="flux")
