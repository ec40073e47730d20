"""Every type of adapter that PEFT saves and that is merged, as configs for the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft


@dataclass(frozen=True)
class Case:
    """A config, and the tensors that its adapter changes."""

    config: Callable[[], Any]
    edited: tuple[str, ...]


def case(make: Callable[..., Any], edited: str, **settings: Any) -> Case:
    return Case(lambda: make(**settings), tuple(edited.split()))


LINEAR = ["linear", "square"]


WEIGHTS = "linear.weight square.weight"


CONVOLUTIONS = ["linear", "conv1", "conv2"]


CASES: dict[str, Case] = {
    "ADALORA": case(
        peft.AdaLoraConfig,
        "linear.weight c_attn.weight conv2.weight",
        target_modules=["linear", "c_attn", "conv2"],
        init_r=4,
        target_r=2,
        lora_alpha=7,
        total_step=10,
    ),
    "ADALORA without alpha": case(
        peft.AdaLoraConfig, WEIGHTS, target_modules=LINEAR, init_r=4, target_r=2, lora_alpha=0, total_step=10
    ),
    "BEFT": case(peft.BeftConfig, "linear.bias head.bias", target_modules=["linear", "head"]),
    "BOFT": case(peft.BOFTConfig, WEIGHTS, target_modules=LINEAR, boft_block_size=4),
    "BOFT on a convolution": case(
        peft.BOFTConfig, "conv2.weight", target_modules=["conv2"], boft_block_size=0, boft_block_num=9
    ),
    "C3A": case(peft.C3AConfig, WEIGHTS, target_modules=LINEAR, block_size=4),
    "C3A by pattern": case(
        peft.C3AConfig, WEIGHTS, target_modules=LINEAR, block_size=4, block_size_pattern={"square": 8}
    ),
    "DEFT": case(peft.DeftConfig, f"{WEIGHTS} c_attn.weight", target_modules=[*LINEAR, "c_attn"], r=3),
    "DEFT with QR and alpha": case(
        peft.DeftConfig,
        f"{WEIGHTS} c_attn.weight",
        target_modules=[*LINEAR, "c_attn"],
        r=3,
        decomposition_method="qr",
        alpha=7,
    ),
    "DEFT without R": case(
        peft.DeftConfig, f"{WEIGHTS} c_attn.weight", target_modules=[*LINEAR, "c_attn"], r=3, para=True
    ),
    "DELORA": case(peft.DeloraConfig, WEIGHTS, target_modules=LINEAR, r=3, rank_pattern={"square": 5}),
    "FOURIERFT": case(
        peft.FourierFTConfig,
        "linear.weight c_attn.weight square.weight",
        target_modules=["linear", "c_attn", "square"],
        n_frequency=30,
        n_frequency_pattern={"square": 11},
        random_loc_seed=5,
        scaling=17.0,
    ),
    "FROD": case(peft.FrodConfig, f"{WEIGHTS} c_attn.weight", target_modules=[*LINEAR, "c_attn"], sparse_rate=0.3),
    "GLORA": case(
        peft.GloraConfig, f"{WEIGHTS} linear.bias head.weight head.bias", target_modules=[*LINEAR, "head"], r=3
    ),
    "GLORA with vectors": case(
        peft.GloraConfig,
        f"{WEIGHTS} linear.bias",
        target_modules=LINEAR,
        config_A_B="vector",
        config_C="vector",
        config_D_E="vector",
    ),
    "GLORA with numbers": case(
        peft.GloraConfig, WEIGHTS, target_modules=LINEAR, config_A_B="constant", config_C="none", config_D_E="none"
    ),
    "GLORA on biases alone": case(
        peft.GloraConfig, "linear.bias head.bias", target_modules=["linear", "head"], config_A_B="none"
    ),
    "GRALORA": case(
        peft.GraloraConfig,
        "linear.weight c_attn.weight square.weight",
        target_modules=["linear", "c_attn", "square"],
        r=4,
        gralora_k=2,
        alpha=9,
    ),
    "GRALORA hybrid": case(
        peft.GraloraConfig,
        "linear.weight c_attn.weight square.weight",
        target_modules=["linear", "c_attn", "square"],
        r=8,
        gralora_k=4,
        hybrid_r=3,
        alpha=9,
    ),
    "HIRA": case(
        peft.HiraConfig,
        "embed.weight linear.weight c_attn.weight conv1.weight conv2.weight",
        target_modules=["embed", "linear", "c_attn", "conv1", "conv2"],
        r=3,
    ),
    "HRA": case(peft.HRAConfig, f"{WEIGHTS} conv2.weight", target_modules=[*LINEAR, "conv2"], r=4),
    "HRA, orthogonal": case(
        peft.HRAConfig, f"{WEIGHTS} conv2.weight", target_modules=[*LINEAR, "conv2"], r=4, apply_GS=True
    ),
    "IA3": case(
        peft.IA3Config,
        "linear.weight linear.bias c_attn.weight c_attn.bias square.weight conv2.weight conv2.bias head.weight",
        target_modules=["linear", "c_attn", "square", "conv2", "head"],
        feedforward_modules=["head"],
    ),
    "IA3, feed-forward Conv1D and convolution": case(
        peft.IA3Config,
        "c_attn.weight conv2.weight linear.weight linear.bias",
        target_modules=["linear", "c_attn", "conv2"],
        feedforward_modules=r"c_attn|conv\d",
    ),
    "LN_TUNING": case(peft.LNTuningConfig, "norm.weight norm.bias", target_modules=["norm"]),
    "LOHA": case(
        peft.LoHaConfig,
        "linear.weight conv1.weight conv2.weight",
        target_modules=CONVOLUTIONS,
        r=3,
        alpha=5,
        rank_pattern={"conv2": 2},
        alpha_pattern={"conv1": 11},
    ),
    "LOHA with Tucker cores": case(
        peft.LoHaConfig,
        "linear.weight conv1.weight conv2.weight",
        target_modules=CONVOLUTIONS,
        r=3,
        alpha=5,
        use_effective_conv2d=True,
    ),
    "LOKR": case(peft.LoKrConfig, "linear.weight conv1.weight conv2.weight", target_modules=CONVOLUTIONS, r=1, alpha=5),
    "LOKR, both whole": case(
        peft.LoKrConfig, "linear.weight conv1.weight conv2.weight", target_modules=CONVOLUTIONS, r=20, alpha=5
    ),
    "LOKR, both products": case(
        peft.LoKrConfig,
        "linear.weight conv1.weight conv2.weight",
        target_modules=CONVOLUTIONS,
        r=1,
        alpha=5,
        decompose_both=True,
        decompose_factor=4,
    ),
    "LOKR with Tucker cores": case(
        peft.LoKrConfig,
        "linear.weight conv2.weight",
        target_modules=["linear", "conv2"],
        r=1,
        alpha=5,
        use_effective_conv2d=True,
        rank_pattern={"linear": 2},
    ),
    "MISS": case(peft.MissConfig, WEIGHTS, target_modules=LINEAR, r=3),
    "MISS, bat": case(peft.MissConfig, WEIGHTS, target_modules=LINEAR, r=4, init_weights="bat"),
    "MISS, mini": case(peft.MissConfig, WEIGHTS, target_modules=LINEAR, r=3, mini_r=4, init_weights="mini"),
    "OFT": case(
        peft.OFTConfig,
        f"embed.weight {WEIGHTS} conv2.weight",
        target_modules=["embed", *LINEAR, "conv2"],
        oft_block_size=2,
    ),
    "OFT, exact": case(
        peft.OFTConfig,
        f"embed.weight {WEIGHTS}",
        target_modules=["embed", *LINEAR],
        oft_block_size=4,
        use_cayley_neumann=False,
    ),
    "OFT, three terms": case(
        peft.OFTConfig, WEIGHTS, target_modules=LINEAR, oft_block_size=4, num_cayley_neumann_terms=3
    ),
    "OFT, two terms": case(
        peft.OFTConfig, WEIGHTS, target_modules=LINEAR, oft_block_size=4, num_cayley_neumann_terms=2
    ),
    "OFT, one block for all": case(
        peft.OFTConfig, WEIGHTS, target_modules=LINEAR, oft_block_size=4, block_share=True, use_cayley_neumann=False
    ),
    "OFT, constrained": case(peft.OFTConfig, WEIGHTS, target_modules=LINEAR, r=2, oft_block_size=0, coft=True, eps=0.3),
    "OSF": case(peft.OSFConfig, WEIGHTS, target_modules=LINEAR, effective_rank=3, rank_pattern={"square": 0.2}),
    "PEANUT": case(peft.PeanutConfig, WEIGHTS, target_modules=LINEAR, r=3, depth=1),
    "PEANUT without layers": case(peft.PeanutConfig, WEIGHTS, target_modules=LINEAR, r=3, depth=0, act_fn="gelu"),
    "PEANUT with three layers": case(
        peft.PeanutConfig, WEIGHTS, target_modules=LINEAR, r=3, depth=3, act_fn="silu", scaling=2.5
    ),
    "PVERA": case(peft.PveraConfig, f"{WEIGHTS} c_attn.weight", target_modules=[*LINEAR, "c_attn"], r=4),
    "RANDLORA": case(
        peft.RandLoraConfig, f"{WEIGHTS} c_attn.weight", target_modules=[*LINEAR, "c_attn"], r=4, randlora_alpha=9
    ),
    "RANDLORA, sparse": case(
        peft.RandLoraConfig,
        "linear.weight head.weight",
        target_modules=["linear", "head"],
        r=3,
        randlora_alpha=9,
        sparse=True,
    ),
    "ROAD": case(peft.RoadConfig, f"{WEIGHTS} linear.bias", target_modules=LINEAR, group_size=8),
    "ROAD of variant 2": case(
        peft.RoadConfig, f"{WEIGHTS} linear.bias", target_modules=LINEAR, group_size=4, variant="road_2"
    ),
    "ROAD of variant 4": case(
        peft.RoadConfig, f"{WEIGHTS} linear.bias", target_modules=LINEAR, group_size=8, variant="road_4"
    ),
    "SHIRA": case(peft.ShiraConfig, WEIGHTS, target_modules=LINEAR, r=2),
    "SUPERTUNING": case(peft.SupertuningConfig, WEIGHTS, target_modules=LINEAR, sparsity=0.9),
    "SUPERTUNING with LoRA": case(peft.SupertuningConfig, WEIGHTS, target_modules=LINEAR, sparsity=0.9, r=3),
    "TINYLORA": case(
        peft.TinyLoraConfig,
        f"embed.weight {WEIGHTS} c_attn.weight",
        target_modules=["embed", *LINEAR, "c_attn"],
        r=9,
        u=5,
        projection_seed=3,
    ),
    "TINYLORA, two layers a vector": case(
        peft.TinyLoraConfig,
        f"embed.weight {WEIGHTS} c_attn.weight",
        target_modules=["embed", *LINEAR, "c_attn"],
        u=5,
        weight_tying=0.5,
    ),
    "TINYLORA, one vector for all": case(
        peft.TinyLoraConfig, f"{WEIGHTS} c_attn.weight", target_modules=[*LINEAR, "c_attn"], u=5, weight_tying=1.0
    ),
    "TRAINABLE_TOKENS": case(
        peft.TrainableTokensConfig, "embed.weight", target_modules=["embed"], token_indices=[9, 2, 11]
    ),
    "UNILORA": case(
        peft.UniLoraConfig,
        f"{WEIGHTS} c_attn.weight",
        target_modules=[*LINEAR, "c_attn"],
        r=3,
        theta_d_length=50,
        save_indices=True,
    ),
    "VBLORA": case(
        peft.VBLoRAConfig,
        f"{WEIGHTS} c_attn.weight",
        target_modules=[*LINEAR, "c_attn"],
        r=3,
        num_vectors=7,
        vector_length=4,
        topk=3,
    ),
    "VERA": case(peft.VeraConfig, f"{WEIGHTS} c_attn.weight", target_modules=[*LINEAR, "c_attn"], r=4),
    **{
        f"WAVEFT with {family}": case(
            peft.WaveFTConfig,
            f"{WEIGHTS} c_attn.weight",
            target_modules=[*LINEAR, "c_attn"],
            n_frequency=30,
            n_frequency_pattern={"square": 11},
            wavelet_family=family,
            random_loc_seed=5,
        )
        for family in ("db1", "db2", "db5", "db10")
    },
    "WAVEFT without a transform": case(
        peft.WaveFTConfig, WEIGHTS, target_modules=LINEAR, n_frequency=30, use_idwt=False, scaling=3.0
    ),
}
