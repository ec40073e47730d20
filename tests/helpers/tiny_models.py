"""Tiny models of real architectures with random weights, and adapters as PEFT itself saves them.

Nothing is downloaded. Every adapter's B is random, as if it had been trained.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from oracle import never, weight_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, MLP, LAYERS, HEADS, VOCABULARY, POSITIONS = 32, 48, 2, 4, 96, 64
TOKENS = torch.tensor([[5, 17, 3, 80, 41, 9, 2], [1, 60, 60, 7, 33, 12, 95]])
IMAGE_SIZE = 16
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}


@dataclass(frozen=True)
class Family:
    """One architecture: how to build it, load it, adapt it and run it."""

    config: Callable[[], Any]
    model: str  # the class of transformers
    targets: Mapping[str, Any]  # arguments of LoraConfig
    inputs: Callable[[], dict[str, Tensor]] = lambda: {"input_ids": TOKENS}
    on_disk: Callable[[str], str] = weight_of  # module in memory → its tensor
    in_out: Callable[[str], bool] = never  # modules whose weights are stored (in, out)
    shard_size: str = "5GB"
    edited: int = 0  # tensors that the adapter changes

    @property
    def cls(self) -> Any:
        return getattr(transformers, self.model)


def llama_config(**changes: Any) -> Any:
    return transformers.LlamaConfig(
        **{**SIZES, "num_key_value_heads": HEADS // 2, "tie_word_embeddings": False, **changes}
    )


def gpt2_config() -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS
    )


def bert_config() -> Any:
    return transformers.BertConfig(**SIZES, num_labels=3)


def opt_config() -> Any:
    return transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
    )


def bloom_config() -> Any:
    return transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS)


def t5_config() -> Any:
    return transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=MLP,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )


def vit_config() -> Any:
    return transformers.ViTConfig(**VISION)


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(5))}


VIT_ON_DISK = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def vit_on_disk(module: str) -> str:
    """`vit.layers.0.attention.q_proj` in memory is `vit.encoder.layer.0.attention.attention.query` on disk."""
    match = re.fullmatch(r"vit\.layers\.(\d+)\.(.+)", module)
    return f"vit.encoder.layer.{match[1]}.{VIT_ON_DISK[match[2]]}.weight" if match else weight_of(module)


def is_conv1d(module: str) -> bool:
    """GPT-2's linear layers keep their weights (in, out); its head does not."""
    return bool(re.search(r"(^|\.)h\.\d+\.", module))


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        llama_config, "LlamaForCausalLM", {"target_modules": [*ATTENTION, "down_proj"]}, shard_size="20kB", edited=10
    ),
    "tied llama": Family(
        lambda: llama_config(tie_word_embeddings=True),
        "LlamaForCausalLM",
        {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]},
        edited=14,
    ),
    "gpt2": Family(  # attn.c_proj is square: its shape does not tell that it is stored (in, out)
        gpt2_config,
        "GPT2LMHeadModel",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        in_out=is_conv1d,
        shard_size="25kB",
        edited=8,
    ),
    "bert classifier": Family(
        bert_config,
        "BertForSequenceClassification",
        {"target_modules": ["query", "value", "dense"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
        edited=13,
    ),
    "t5": Family(
        t5_config,
        "T5ForConditionalGeneration",
        {"target_modules": ["q", "v", "wi_0", "wo"], "task_type": "SEQ_2_SEQ_LM"},
        lambda: {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]},
        shard_size="30kB",
        edited=20,
    ),
    "vit": Family(
        vit_config,
        "ViTForImageClassification",
        {"target_modules": [*ATTENTION, "fc1", "fc2"], "modules_to_save": ["classifier"]},
        pixels,
        on_disk=vit_on_disk,
        edited=14,
    ),
}

VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
    "num_labels": 3,
}
SWIN = {"image_size": IMAGE_SIZE, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
EVERY_LAYER = {"target_modules": "all-linear"}
# families whose modules transformers 5 calls otherwise in memory than on disk
RENAMED: Mapping[str, Family] = {
    "deit": Family(
        lambda: transformers.DeiTConfig(**VISION), "DeiTForImageClassification", EVERY_LAYER, pixels, edited=13
    ),
    "beit": Family(
        lambda: transformers.BeitConfig(**VISION), "BeitForImageClassification", EVERY_LAYER, pixels, edited=13
    ),
    "dinov2": Family(
        lambda: transformers.Dinov2Config(**VISION), "Dinov2ForImageClassification", EVERY_LAYER, pixels, edited=13
    ),
    "swin": Family(
        lambda: transformers.SwinConfig(window_size=4, num_labels=3, **SWIN),
        "SwinForImageClassification",
        EVERY_LAYER,
        pixels,
        edited=14,
    ),
    "gpt_neox": Family(  # with a head of its own
        lambda: transformers.GPTNeoXConfig(**SIZES),
        "GPTNeoXForCausalLM",
        {"target_modules": ["query_key_value", "dense"], "modules_to_save": ["lm_head"]},
        edited=5,
    ),
}


SAVED: dict[tuple[str, ...], dict[str, bytes]] = {}  # what a model is made of → its files


def build_base(folder: Path, family: Family, dtype: torch.dtype = torch.float32, model: str = "") -> Path:
    """A model with random weights, saved by transformers; one that was made before is written again as it was."""
    config = family.config()
    key = (model or family.model, config.to_json_string(), str(dtype), family.shard_size)
    if key not in SAVED:
        torch.manual_seed(11)
        built = getattr(transformers, key[0])(config)
        with torch.no_grad():
            for parameter in built.parameters():  # norms and biases too: constant tensors hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.05)
        built.to(dtype).save_pretrained(folder, max_shard_size=family.shard_size)
        SAVED[key] = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in SAVED[key].items():
        (folder / name).write_bytes(content)
    return folder


LOADED: dict[object, Any] = {}  # class, settings and files → the model, where it was asked for before
MOST_LOADED = 16


def load(family: Family, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model that transformers makes of all that is in a folder."""
    return loaded_whole(family.cls, folder, dtype=dtype)


def loaded_whole(cls: Any, folder: Path, **settings: Any) -> Any:
    """What transformers loads, nothing missing and nothing left over; of the same files, a copy of what it loaded."""
    files = sorted((p.name, hashlib.sha256(p.read_bytes()).digest()) for p in folder.iterdir() if p.is_file())
    key = (cls, *settings.items(), *files)
    if LOADED.get(key) is None:
        model, info = cls.from_pretrained(folder, output_loading_info=True, **settings)
        troubles = {kind: found for kind, found in info.items() if found}
        assert not troubles, f"transformers does not load {folder}: {troubles}"
        if key not in LOADED:  # most are loaded once
            LOADED[key] = None
            return model.eval()
        del LOADED[key]  # so that it comes last, and is the last to go
        LOADED[key] = model.eval()
        if len(kept := [other for other, model in LOADED.items() if model is not None]) > MOST_LOADED:
            del LOADED[kept[0]]
    model = deepcopy(LOADED[key])
    model.name_or_path = model.config.name_or_path = str(folder)
    return model


def adapt(model: Any, seed: int = 0, adapter_name: str = "default", **settings: Any) -> PeftModel:
    """`model` wrapped by PEFT, with everything trainable moved away from where it began."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, **settings}), adapter_name
    ).eval()
    randomise(wrapped, seed)
    return wrapped


def randomise(wrapped: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in wrapped.parameters() if p.requires_grad):
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter.dtype))


def output_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(**inputs)[0]
    return result.clone()


def rename_keys(adapter: Path, rename: Callable[[str], str]) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({rename(key): tensor for key, tensor in load_file(path).items()}, path)


@dataclass
class Case:
    """A base and an adapter on disk, with what the unmerged model says and what PEFT's own merge saves."""

    family: Family
    base: Path
    adapter: Path
    unmerged: Tensor
    plain: Tensor  # the output without the adapter
    by_peft: Path
    extra: dict[str, Any] = field(default_factory=dict)


def build_case(
    folder: Path, family: Family, base: Path | None = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> Case:
    """Train an adapter, so to speak, on the saved base; and merge it with PEFT."""
    base = base or build_base(folder / "base", family, dtype)
    model = load(family, base, dtype)
    plain = output_of(model, family.inputs())
    wrapped = adapt(model, **{**family.targets, **settings})
    wrapped.save_pretrained(folder / "adapter")
    unmerged = output_of(wrapped, family.inputs())
    wrapped.merge_and_unload().save_pretrained(folder / "by-peft", max_shard_size=family.shard_size)
    return Case(family, base, folder / "adapter", unmerged, plain, folder / "by-peft")


def config_of(model: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((model / "config.json").read_text())
    return table
