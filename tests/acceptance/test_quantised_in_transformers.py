"""Merged models of quantised bases are loaded by transformers, and compute what the base does with the adapter.

Needs what `make acceptance` installs.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_model
from peft import LoraConfig, PeftModel, get_peft_model
from quantised_models import FAMILIES, STACKS, Maker, Quantised, Weights, fp8
from safetensors.torch import load_file
from torch import Tensor

import loratool

transformers = pytest.importorskip("transformers")

TARGETS = ["q_proj", "up_proj", "down_proj"]
LAYERS = [1]  # so that each merged model is partly quantised
IDS = torch.arange(1, 25).reshape(2, 12)


def tiny_llama() -> Any:
    """A Llama of 3 layers with random weights, whose widths are multiples of the blocks of all kinds."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        tie_word_embeddings=False,
        initializer_range=0.06,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("plain")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=TARGETS, layers_to_transform=LAYERS, task_type="CAUSAL_LM")
    trained = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, value in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    trained.save_pretrained(folder)
    return folder


def quantised_by(kind: str, plain: Path, folder: Path) -> Path:
    """A base as the real tool writes it."""
    if kind.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
        how: dict[str, dict[str, Any]] = {
            "bitsandbytes nf4": {**four, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "bitsandbytes fp4": {**four, "bnb_4bit_quant_type": "fp4"},
            "bitsandbytes int8": {"load_in_8bit": True},
        }
        config = transformers.BitsAndBytesConfig(**how[kind])
    else:
        torchao = pytest.importorskip("torchao.quantization")
        config = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(folder)
    return folder


def ct_w8a8(weights: Weights) -> Quantised:
    """int8 as it is served: activations are quantised too, token by token."""
    made = FAMILIES["int8 (W8A8)"](weights)
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    made.config["config_groups"]["group_0"]["input_activations"] = inputs
    return made


MADE: dict[str, Maker] = {  # by the names of `quantised_models`
    "fp8 blocks": partial(fp8, block=(128, 128)),
    "fp8 one scale": FAMILIES["fp8 one scale"],
    "int4 groups": FAMILIES["int4 groups"],
    "int8 (W8A8)": ct_w8a8,
    "float8 one scale": FAMILIES["float8 one scale"],
    "float8 rows": FAMILIES["float8 rows"],
    "nvfp4": FAMILIES["nvfp4"],
    "mxfp4": FAMILIES["mxfp4"],
}


def needs_kernels() -> None:
    """Where transformers sees a GPU, it computes with packed weights by this package alone, whatever device is asked for."""
    if torch.cuda.is_available():
        pytest.importorskip("kernels")


def made_of(kind: str, plain: Path, folder: Path) -> Path:
    """A base in the layout that a tool documents, for what needs a GPU to be made with it."""
    if "fp8" in kind:
        needs_kernels()
    else:
        pytest.importorskip("compressed_tensors")
    tensors = load_file(plain / "model.safetensors")
    linear = {name: value.float() for name, value in tensors.items() if "proj" in name}
    made = MADE[kind](linear)
    rest = {name: value for name, value in tensors.items() if name not in linear}
    config = json.loads((plain / "config.json").read_text())
    return save_model(folder, {**rest, **made.tensors}, {**config, "quantization_config": made.config})


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(IDS).logits
    return found.float()


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")


BY_TOOLS = ("bitsandbytes nf4", "bitsandbytes fp4", "bitsandbytes int8", "torchao int8")


@pytest.mark.parametrize("kind", [*BY_TOOLS, *MADE])
def test_a_merged_model_computes_what_the_base_does_with_the_adapter(
    kind: str, plain: Path, adapter: Path, tmp_path: Path
) -> None:
    base = (quantised_by if kind in BY_TOOLS else made_of)(kind, plain, tmp_path / "base")
    loratool.merge(base, [adapter], tmp_path / "merged", device="cpu")
    loratool.merge(base, [], tmp_path / "plain", device="cpu", dequantize=True)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["quantization_config"]
    alone, merged = logits(loaded(tmp_path / "plain")), logits(loaded(tmp_path / "merged"))
    wanted = logits(PeftModel.from_pretrained(loaded(tmp_path / "plain"), adapter))
    change = (wanted - alone).norm()
    noise = (logits(loaded(base)) - alone).norm()  # of kernels that quantise activations too
    assert noise < 0.4 * change
    assert (merged - wanted).norm() < 0.1 * change + 1.2 * noise
    everything = loratool.merge(base, [adapter], tmp_path / "all", device="cpu", dequantize=True)
    assert everything.edited == len(TARGETS)
    assert (logits(loaded(tmp_path / "all")) - wanted).norm() < 0.1 * change


@pytest.mark.skipif(
    not hasattr(torch, "accelerator"), reason="transformers asks torch.accelerator, which torch 2.6 has"
)
def test_a_merged_gpt_oss_computes_what_the_base_does_with_the_adapter(tmp_path: Path) -> None:
    """Experts of one layer become plain; those of the others stay in MXFP4."""
    needs_kernels()
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=320,
        initializer_range=0.06,
        layer_types=["full_attention"] * 2,
    )
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    experts = {n: v.float() for n, v in tensors.items() if n.endswith(("gate_up_proj", "experts.down_proj"))}
    made = STACKS["gpt-oss"](experts)
    base = tmp_path / "base"
    rest = {name: value for name, value in tensors.items() if name not in experts}
    said = json.loads((tmp_path / "plain" / "config.json").read_text())
    save_model(base, {**rest, **made.tensors}, {**said, "quantization_config": made.config})
    loratool.merge(base, [], tmp_path / "decoded", device="cpu", dequantize=True)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    parameters = ["1.mlp.experts.gate_up_proj"]
    model = get_peft_model(loaded(tmp_path / "decoded"), LoraConfig(**settings, target_parameters=parameters))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    wanted, alone = logits(model), logits(loaded(tmp_path / "decoded"))
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "merged", device="cpu")
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.gate_up_proj_blocks" in names
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert (logits(loaded(tmp_path / "merged")) - wanted).norm() < 0.1 * (wanted - alone).norm()
