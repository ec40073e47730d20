"""Variants and options of LoRA, as configs for the zoo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import BdLoraConfig, LoraConfig
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig


@dataclass(frozen=True)
class Case:
    """Settings of a LoraConfig, and the tensors that its adapter changes."""

    settings: dict[str, Any]
    edited: tuple[str, ...]

    def config(self) -> LoraConfig:
        return LoraConfig(**{"r": 3, "lora_alpha": 5, **self.settings})


def case(edited: str, targets: str, **settings: Any) -> Case:
    return Case({"target_modules": targets.split(), **settings}, tuple(edited.split()))


LAYERS = "embed linear c_attn square conv1 conv2"


WEIGHTS = "embed.weight linear.weight c_attn.weight square.weight conv1.weight conv2.weight"


LINEAR = "linear c_attn square"


MATRICES = "linear.weight c_attn.weight square.weight"


BIASES = "linear.bias c_attn.bias norm.bias conv1.bias conv2.bias conv3.bias head.bias attention.out_proj.bias"


VARIANTS: dict[str, Case] = {
    "plain": case(WEIGHTS, LAYERS),
    "rsLoRA": case(WEIGHTS, LAYERS, use_rslora=True),
    "patterns": case(
        WEIGHTS,
        LAYERS,
        rank_pattern={"conv.": 2, "^square": 5, "embed": 4},
        alpha_pattern={"c_attn": 1, "(linear|conv2)": 11},
    ),
    "rsLoRA with patterns": case(
        MATRICES, LINEAR, use_rslora=True, rank_pattern={"linear": 6}, alpha_pattern={"square": 0.5}
    ),
    "fractional and negative alpha": case(MATRICES, LINEAR, lora_alpha=-2.5),
    "nn.MultiheadAttention": case("attention.in_proj_weight attention.out_proj.weight", "attention"),
    "DoRA": case(WEIGHTS, LAYERS, use_dora=True),
    "DoRA with rsLoRA and patterns": case(
        WEIGHTS, LAYERS, use_dora=True, use_rslora=True, rank_pattern={"linear": 2}, alpha_pattern={"conv1": 9}
    ),
    "lora_bias": case(
        "linear.weight linear.bias c_attn.weight c_attn.bias conv1.weight conv1.bias conv2.weight conv2.bias",
        "linear c_attn conv1 conv2",
        lora_bias=True,
    ),
    "bias='lora_only'": case(
        f"{MATRICES} conv2.weight linear.bias c_attn.bias conv2.bias", f"{LINEAR} conv2", bias="lora_only"
    ),
    "bias='all'": case(f"{MATRICES} {BIASES}", LINEAR, bias="all"),
    "bias='all' and a module saved whole": case(
        f"{MATRICES} {BIASES} head.weight", LINEAR, bias="all", modules_to_save=["head"]
    ),
    "modules_to_save": case(
        f"{MATRICES} head.weight head.bias norm.weight norm.bias", LINEAR, modules_to_save=["head", "norm"]
    ),
    "trainable_token_indices": case(f"{MATRICES} embed.weight", LINEAR, trainable_token_indices={"embed": [7, 2, 11]}),
    "BD-LoRA": case(
        "linear.weight square.weight", "linear square", r=4, use_bdlora=BdLoraConfig(["linear"], ["square"], nblocks=2)
    ),
    "BD-LoRA on some modules": case(
        "linear.weight square.weight", "linear square", use_bdlora=BdLoraConfig([], ["square"], 3, match_strict=False)
    ),
    "KaSA": case("linear.weight square.weight", "linear square", kasa_config=KasaConfig()),
    "KaSA with rsLoRA and patterns": case(
        "linear.weight square.weight",
        "linear square",
        kasa_config=KasaConfig(),
        use_rslora=True,
        rank_pattern={"square": 5},
    ),
    "VeLoRA": case("linear.weight square.weight", "linear square", velora_config=VeloraConfig(num_groups=4)),
    "MonteCLoRA": case("linear.weight square.weight", "linear square", monteclora_config=MontecloraConfig()),
    "gaussian": case(WEIGHTS, LAYERS, init_lora_weights="gaussian"),
    "orthogonal": case("linear.weight square.weight", "linear square", r=4, init_lora_weights="orthogonal"),
    "no initialisation": case(WEIGHTS, LAYERS, init_lora_weights=False),
    "MiCA": case("linear.weight square.weight", "linear square", init_lora_weights="mica"),
    "PiSSA": case(MATRICES, LINEAR, init_lora_weights="pissa"),
    "PiSSA with rsLoRA and DoRA": case(MATRICES, LINEAR, init_lora_weights="pissa", use_rslora=True, use_dora=True),
    "PiSSA of more ranks than a weight has": case(MATRICES, LINEAR, r=12, init_lora_weights="pissa"),
    "OLoRA with rsLoRA, of more ranks than a weight has": case(
        "linear.weight square.weight", "linear square", r=12, use_rslora=True, init_lora_weights="olora"
    ),
    "OLoRA": case("linear.weight square.weight", "linear square", init_lora_weights="olora"),
    "OLoRA with patterns": case(
        "linear.weight square.weight",
        "linear square",
        init_lora_weights="OLoRA",
        rank_pattern={"square": 7},
        alpha_pattern={"linear": 2},
    ),
}
