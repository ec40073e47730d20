"""What is supported of PEFT 0.21, as a table: how each type and each option is merged, or why it is refused.

Reading goes by this table, the page "What is supported" is written from it, and a test holds both to PEFT's own
lists. `test` names the test that compares a merge with PEFT's, or that sees the refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratool.errors import printable


@dataclass(frozen=True)
class Row:
    """One type of adapter, or one setting."""

    title: str
    merged: str = ""  # the merged weight, or what the setting does to it
    refused: str = ""  # why it is not merged, and what to do instead
    test: str = ""


METHOD = "adapters/test_peft_methods.py::test_a_method_is_merged_as_peft_merges_it"
VARIANT = "adapters/test_peft_lora.py::test_a_variant_of_lora_is_merged_as_peft_merges_it"
REFUSAL = "adapters/test_peft_refusals.py::test_a_type_that_has_no_merged_weight_is_refused_with_its_reason"
SETTING = "adapters/test_peft_refusals.py::test_a_setting_that_cannot_be_merged_is_refused_with_its_reason"

PROMPT = "it adds virtual tokens or cached states, not weights, so there is nothing to merge; use it unmerged"
ROUTED = "its update depends on the input, so it cannot be merged into a weight; use it unmerged"
THERE = "merge it with PEFT's merge_and_unload where it was trained"
MOVED_BASE = (
    "training began from a changed base that the adapter does not contain; save it in PEFT with "
    "path_initial_model_for_weight_conversion (the adapter as it was before training), which converts it to plain "
    "LoRA"
)

TYPES: dict[str, Row] = {
    "LORA": Row("LoRA", "W + α/r · BA, with the options below", test=VARIANT),
    "ADALORA": Row("AdaLoRA", "W + α/(init_r + 1e-5) · B(E ⊙ A)", test=METHOD),
    "BEFT": Row("BEFT", "bias + the trained difference", test=METHOD),
    "BOFT": Row("BOFT", "(W · blockdiag(R)ᵀ) ⊙ s for one butterfly factor; several are refused", test=METHOD),
    "C3A": Row("C3A", "W + block-circulant matrix / inputs", test=METHOD),
    "DELORA": Row("DeLoRA", "W + B · diag(λ / (r‖aᵢ‖‖bᵢ‖)) · A · diag(‖w‖), with the stored norms", test=METHOD),
    "FOURIERFT": Row("FourierFT", "W + scaling · Re(inverse Fourier transform of a sparse spectrum)", test=METHOD),
    "GRALORA": Row("GraLoRA", "W + α/(r + hybrid_r) · (a grid of low-rank blocks + hybrid part)", test=METHOD),
    "HIRA": Row("HiRA", "W + W ⊙ BA, with the unmerged W", test=METHOD),
    "HRA": Row(
        "HRA",
        "W · Π(I − 2uuᵀ); with apply_GS the u are orthogonalised, and refused if they are more than W has columns",
        test=METHOD,
    ),
    "IA3": Row("(IA)³", "W ⊙ l; where outputs are scaled, the bias too", test=METHOD),
    "LN_TUNING": Row("LN tuning", "norms replaced by the trained ones", test=METHOD),
    "LOHA": Row("LoHa", "W + α/r · (w1a·w1b) ⊙ (w2a·w2b), Tucker cores on convolutions", test=METHOD),
    "LOKR": Row(
        "LoKr", "W + α/r · w1 ⊗ w2, each a whole matrix or a product, Tucker cores on convolutions", test=METHOD
    ),
    "MISS": Row("MiSS", "W[:, j] + block[j mod r]; also its `bat` and `mini` forms", test=METHOD),
    "OFT": Row("OFT", "W · blockdiag(R)ᵀ, R by a Cayley transform, exact or as a Neumann series", test=METHOD),
    "PVERA": Row("PVeRA", "as VeRA, using the means; refused without the saved projection", test=METHOD),
    "SHIRA": Row("SHiRA", "W + values at stored positions", test=METHOD),
    "TRAINABLE_TOKENS": Row("Trainable tokens", "rows of the embedding replaced", test=METHOD),
    "VBLORA": Row("VB-LoRA", "W + BA, both mixed from a vector bank by their largest logits", test=METHOD),
    "VERA": Row("VeRA", "W + diag(λ_b)·B·diag(λ_d)·A; refused without the saved projection", test=METHOD),
    "ADAMSS": Row(
        "AdaMSS",
        refused=f"the rows it changes come from a scikit-learn clustering that is not stored; {THERE}",
        test=REFUSAL,
    ),
    "ADAPTION_PROMPT": Row("Adaption prompt", refused=PROMPT, test=REFUSAL),
    "BONE": Row(
        "Bone",
        refused="PEFT replaced it by MiSS; merge it with the release of PEFT that wrote it",
        test=REFUSAL,
    ),
    "CARTRIDGE": Row("Cartridge", refused=PROMPT, test=REFUSAL),
    "CPT": Row("CPT", refused=PROMPT, test=REFUSAL),
    "DEFT": Row(
        "DEFT",
        "(I − PQᵀ) · W + α/r · PR, with Q = relu(P), or with P and Q both the Q of the QR decomposition of P; without "
        "R if `para` is set",
        test=METHOD,
    ),
    "FROD": Row(
        "FRoD",
        "U(S + diag λ)Vᵀ, where U holds the directions of W · V⁻ᵀ; refused without the saved projection",
        test=METHOD,
    ),
    "GLORA": Row("GLoRA", "W + W ⊙ A + B, bias + bias ⊙ D + E + WC", test=METHOD),
    "LILY": Row("Lily", refused=ROUTED, test=REFUSAL),
    "MULTITASK_PROMPT_TUNING": Row("Multitask prompt tuning", refused=PROMPT, test=REFUSAL),
    "OSF": Row("OSF", "W without its smaller singular values + the trained ones with their vectors", test=METHOD),
    "PEANUT": Row(
        "PEANuT",
        "W + scaling · B · f(A · W), f a small network; unknown activations are refused",
        test=METHOD,
    ),
    "POLY": Row("Poly", refused=ROUTED, test=REFUSAL),
    "PREFIX_TUNING": Row("Prefix tuning", refused=PROMPT, test=REFUSAL),
    "PROMPT_TUNING": Row("Prompt tuning", refused=PROMPT, test=REFUSAL),
    "PSOFT": Row(
        "PSOFT",
        refused="it rotates singular vectors of the base, whose signs are not stored and may differ with another "
        f"library or device; {THERE}",
        test=REFUSAL,
    ),
    "P_TUNING": Row("P-tuning", refused=PROMPT, test=REFUSAL),
    "RANDLORA": Row(
        "RandLoRA", "W + α/r · Σ B_j·diag(λ_j)·A·diag(γ_j); refused without the saved projection", test=METHOD
    ),
    "ROAD": Row("RoAd", "R · W and R · bias, where R rotates and scales pairs of outputs", test=METHOD),
    "SHADOW": Row("Shadow", refused=ROUTED, test=REFUSAL),
    "SUPERTUNING": Row(
        "Super-Tuning", "W + values at stored positions + α/r · BA; refused without the positions", test=METHOD
    ),
    "TINYLORA": Row("TinyLoRA", "W + B(Σ v_i P_i)A; refused without the saved projection", test=METHOD),
    "UNILORA": Row("Uni-LoRA", "W + BA, both gathered from one vector; refused without the saved indices", test=METHOD),
    "WAVEFT": Row(
        "WaveFT",
        "W + scaling · inverse wavelet transform of a sparse spectrum, db1 to db10; others are refused",
        test=METHOD,
    ),
    "XLORA": Row(
        "X-LoRA",
        refused="a classifier mixes its adapters for each token; instead, merge one of the adapters in its config",
        test=REFUSAL,
    ),
}

READ = "describes what was trained; read from the tensors instead"
TRAINING = "affects training only"
FILED = "describes the adapter, not its weights"

OPTIONS: dict[str, Row] = {
    "r": Row(
        "rank",
        "s = α/r; r is read from the tensors, and the config must agree, unless PiSSA or OLoRA left all ranks of a smaller weight",
        test=VARIANT,
    ),
    "lora_alpha": Row("α", "s = α/r; 8 if it is missing, with a note", test=VARIANT),
    "use_rslora": Row("rsLoRA", "s = α/√r", test=VARIANT),
    "rank_pattern": Row(
        "ranks by pattern", "first match in the file's order; a pattern that matches nothing is refused", test=VARIANT
    ),
    "alpha_pattern": Row(
        "α by pattern",
        "first match in the file's order; if several match, a note says that saving sorted them",
        test="adapters/test_peft_lora.py::test_of_several_alpha_patterns_the_first_in_the_file_counts_and_it_is_said",
    ),
    "use_dora": Row("DoRA", "m/‖W + sBA‖ ⊙ (W + sBA); rows or columns of norm 0 stay 0", test=VARIANT),
    "lora_bias": Row("bias of lora_B", "bias + s · lora_B.bias", test=VARIANT),
    "bias": Row("trained biases", "`lora_only` and `all`: the base's bias is replaced", test=VARIANT),
    "modules_to_save": Row("modules saved whole", "the base's tensors are replaced", test=VARIANT),
    "trainable_token_indices": Row("trained token rows", "rows of the embedding are replaced", test=VARIANT),
    "target_parameters": Row(
        "LoRA on parameters",
        "W[e] + s · BₑAₑ for each expert of a parameter, or W + s · BA for a matrix",
        test="adapters/test_peft_parameters.py::test_parameters_of_a_module_are_merged_as_peft_merges_them",
    ),
    "init_lora_weights": Row("initialisation", "see below"),
    "use_bdlora": Row("BD-LoRA", "W + s · BA, with the block-diagonal factor expanded", test=VARIANT),
    "kasa_config": Row("KaSA", "W without its r smallest singular values + s · B·diag(d)·A", test=VARIANT),
    "velora_config": Row("VeLoRA", f"W + s · BA; the rest {TRAINING}", test=VARIANT),
    "monteclora_config": Row("MonteCLoRA", f"W + s · BA; the rest {TRAINING}", test=VARIANT),
    "use_qalora": Row(
        "QA-LoRA",
        "W + s · B · (A spread over each group of inputs) · groups / group size",
        test="adapters/test_peft_lora.py::test_qalora_is_merged_as_its_forward_computes",
    ),
    "qalora_group_size": Row("QA-LoRA group size", "see use_qalora"),
    "alora_invocation_tokens": Row(
        "aLoRA", refused=f"it is active only after its invocation tokens; {ROUTED}", test=SETTING
    ),
    "arrow_config": Row("Arrow", refused=ROUTED, test=SETTING),
    "layer_replication": Row(
        "layer replication",
        refused="the trained model repeats layers of the base; merge with a base in which the repeated layers are "
        "written out",
        test=SETTING,
    ),
    "fan_in_fan_out": Row("weights stored (in, out)", "used if the model class is unknown", test=VARIANT),
    "target_modules": Row("targets", READ),
    "exclude_modules": Row("exclusions", READ),
    "layers_to_transform": Row("layers", READ),
    "layers_pattern": Row("layer name pattern", READ),
    "megatron_config": Row("Megatron", "W + s · BA, with the same keys as LoRA"),
    "megatron_core": Row("Megatron module", TRAINING),
    "lora_dropout": Row("dropout", TRAINING),
    "runtime_config": Row("runtime", TRAINING),
    "loftq_config": Row("LoftQ", "see init_lora_weights"),
    "eva_config": Row("EVA", TRAINING),
    "corda_config": Row("CorDA", "see init_lora_weights"),
    "lora_ga_config": Row("LoRA-GA", "see init_lora_weights"),
    "ensure_weight_tying": Row("tied weights", "embedding and head get the same update, applied once"),
    "task_type": Row("task", FILED),
    "peft_type": Row("type", "see above"),
    "auto_mapping": Row("base class", FILED),
    "peft_version": Row(
        "release that saved it",
        "up to 0.21.2 the update of an out_proj of nn.MultiheadAttention is applied twice",
        test=VARIANT,
    ),
    "base_model_name_or_path": Row("base name", FILED),
    "revision": Row("base revision", FILED),
    "inference_mode": Row("inference mode", FILED),
}
# The options that have a name of their own; an adapter with one of them is said to be it.
VARIANTS = (
    *("use_rslora", "use_dora", "lora_bias", "use_bdlora", "kasa_config", "velora_config", "monteclora_config"),
    *("use_qalora", "target_parameters", "trainable_token_indices"),
)
CHECKED_FLAGS = ("use_dora", "lora_bias", "use_qalora")  # options that are true or false

# By the values of init_lora_weights.
INITIALISATIONS: dict[str, Row] = {
    "true, false": Row("Kaiming or none", "W + s · BA", test=VARIANT),
    "gaussian": Row("Gaussian", "W + s · BA", test=VARIANT),
    "orthogonal": Row("orthogonal", "W + s · BA", test=VARIANT),
    "eva": Row("EVA", "W + s · BA", test=VARIANT),
    "mica": Row("MiCA", "W + s · BA", test=VARIANT),
    "pissa": Row("PiSSA", "W − its r largest singular values and vectors + s · BA", test=VARIANT),
    "olora": Row("OLoRA", "W − s · Q[:, :r]R[:r] + s · BA, with W = QR", test=VARIANT),
    "pissa_niter_N": Row(
        "PiSSA by a randomised decomposition",
        refused=f"the part subtracted from the base depends on a random state that is not stored: {MOVED_BASE}",
        test=SETTING,
    ),
    "corda": Row("CorDA", refused=MOVED_BASE, test=SETTING),
    "lora_ga": Row("LoRA-GA", refused=MOVED_BASE, test=SETTING),
    "loftq": Row(
        "LoftQ",
        refused="the adapter corrects a quantised base; merge with PEFT, on the base it was trained on",
        test=SETTING,
    ),
}


def initialisation(value: object) -> Row | None:
    """The row of a value of `init_lora_weights`; None where it is no value that PEFT knows."""
    if value is None or isinstance(value, bool):
        return INITIALISATIONS["true, false"]
    name = value.lower() if isinstance(value, str) else ""
    return INITIALISATIONS.get("pissa_niter_N" if name.startswith("pissa_niter_") else name)


def why_refused(value: object) -> str:
    """Why an adapter with a value of `init_lora_weights` is not merged; empty where it is."""
    row, shown = initialisation(value), f"init_lora_weights {printable(repr(value))}"
    if row is None:
        return f"unknown {shown}"
    return f"{shown}: {row.refused}" if row.refused else ""


def variants(config: Mapping[str, object]) -> tuple[str, ...]:
    """What a config makes of LoRA, in words."""
    return tuple(OPTIONS[name].title for name in VARIANTS if config.get(name) not in (None, False, [], {}))
