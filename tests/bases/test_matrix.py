"""Every architecture of the matrix: adapted by PEFT, merged from files alone, held to PEFT's own merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layout_facts import ON_FIRST, ON_LAST, experts, linear
from matrix_models import (
    ALPHA,
    ARCHITECTURES,
    EXPERT_MLP,
    EXPERTS,
    HIDDEN,
    LAYERS,
    RANK,
    Architecture,
    Trained,
    adapt,
    blocks,
    build,
    load,
    save_base,
    text,
    train,
    why_not_here,
)
from oracle import PREFIX, read_tensors, same_bits
from peft_files import edit_config, save_peft
from safetensors.torch import save_file
from torch import Tensor

import loratool

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TOLERANCE = 1e-5


def assert_same_model(merged: Path, wanted: Path, edited: int, base: Path) -> None:
    """Every tensor is what PEFT saved within rounding; those that PEFT did not change are the base's, bit for bit."""
    ours, theirs, before = read_tensors(merged), read_tensors(wanted), read_tensors(base)
    assert set(ours) == set(theirs)
    changed = set()
    for name, tensor in theirs.items():
        if same_bits(tensor, before[name]):
            assert same_bits(ours[name], before[name]), f"{name} should be an exact copy"
            continue
        changed.add(name)
        assert ours[name].dtype == tensor.dtype
        error = float((ours[name] - tensor).abs().max())
        assert error <= TOLERANCE, f"{name}: off by {error}"
        assert float((tensor - before[name]).abs().max()) > 100 * TOLERANCE, f"{name}: the adapter does next to nothing"
    assert len(changed) == edited, "the case is not what it claims to be"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Each architecture adapted, made when it is first asked for."""
    made: dict[str, Trained] = {}

    def of(name: str) -> Trained:
        if reason := why_not_here(name):
            pytest.skip(reason)
        if name not in made:
            made[name] = train(tmp_path_factory.mktemp("trained"), ARCHITECTURES[name])
        return made[name]

    return of


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_merges_into_the_checkpoint_to_what_peft_saves(
    trained: Callable[[str], Trained], tmp_path: Path, name: str
) -> None:
    case = trained(name)
    loratool.merge(case.base, case.adapter, tmp_path / "out")
    assert_same_model(tmp_path / "out", case.by_peft, case.architecture.edited, case.base)
    load(case.architecture, tmp_path / "out")


# experts and gate and up are one tensor in memory
FUSED = {"mixtral": 14, "qwen3_moe": 10, "qwen2_moe": 8, "deepseek_v3": 6, "dinov2": 8}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_merges_into_a_checkpoint_saved_in_the_layout_of_memory_to_what_peft_saves(
    trained: Callable[[str], Trained], tmp_path: Path, name: str
) -> None:
    case = trained(name)
    loratool.merge(case.base_in_memory, case.adapter, tmp_path / "out")
    edited = FUSED.get(name, case.architecture.edited)
    assert_same_model(tmp_path / "out", case.by_peft_in_memory, edited, case.base_in_memory)


def test_a_layer_for_each_expert_fits_a_base_that_has_all_of_them_in_one(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    """Granite's tensors are called `input_linear` and `output_linear`; PEFT's merge of the parameters is the same model."""
    case = trained("granitemoe")
    loratool.convert(case.adapter, tmp_path / "split", to="peft-split", base=case.base)
    loratool.merge(case.base, tmp_path / "split", tmp_path / "out")
    assert_same_model(tmp_path / "out", case.by_peft, case.architecture.edited, case.base)


# -- rank, scale and the choice of parameters --------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_rslora_on_experts_divides_alpha_by_the_root_of_the_rank_of_one_expert(tmp_path: Path, name: str) -> None:
    case = train(tmp_path, ARCHITECTURES[name], use_rslora=True)
    loratool.merge(case.base, case.adapter, tmp_path / "out")
    assert_same_model(tmp_path / "out", case.by_peft, case.architecture.edited, case.base)


def test_a_router_does_not_tell_the_orientation_of_experts(tmp_path: Path) -> None:
    """Down projections of gpt-oss are square, its router is a matrix stored (out, in)."""
    targets = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj", "mlp.router.weight"]}
    case = train(tmp_path, ARCHITECTURES["gpt_oss"], **targets)
    report = loratool.merge(case.base, case.adapter, tmp_path / "out")
    assert "expert-orientation-guessed" in {note.code for note in report.notes}
    assert_same_model(tmp_path / "out", case.by_peft, LAYERS * 2, case.base)


def test_patterns_name_a_parameter_by_its_own_path(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "rank_pattern": {"experts.gate_up_proj": 3, "q_proj": 2},
        "alpha_pattern": {r".*1\.mlp\.experts\.down_proj": 20},
    }
    case = train(tmp_path, ARCHITECTURES["mixtral"], **settings)
    loratool.merge(case.base, case.adapter, tmp_path / "out")
    assert_same_model(tmp_path / "out", case.by_peft, case.architecture.edited, case.base)


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "llama4"])
def test_one_adapted_parameter_of_the_experts_is_told_from_the_other(tmp_path: Path, name: str, parameter: str) -> None:
    if reason := why_not_here(name):
        pytest.skip(reason)
    settings = {"target_modules": ["q_proj"], "target_parameters": [f"experts.{parameter}"]}
    case = train(tmp_path, ARCHITECTURES[name], **settings)
    keys = read_tensors(case.adapter)
    assert any(key.endswith("experts.lora_A.weight") for key in keys)
    assert not any("base_layer" in key for key in keys)
    loratool.merge(case.base, case.adapter, tmp_path / "out")
    split = (2 if parameter == "gate_up_proj" else 1) * EXPERTS if name == "mixtral" else 1
    assert_same_model(tmp_path / "out", case.by_peft, LAYERS * (1 + split), case.base)


def test_a_single_expert_is_a_plain_update(tmp_path: Path) -> None:
    one = Architecture(
        lambda: transformers.MixtralConfig(**text(num_local_experts=1, num_experts_per_tok=1)),
        "MixtralForCausalLM",
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        LAYERS * 3,
    )
    case = train(tmp_path, one)
    loratool.merge(case.base, case.adapter, tmp_path / "out")
    assert_same_model(tmp_path / "out", case.by_peft, one.edited, case.base)


# -- gpt-oss: a square parameter ---------------------------------------------------------------------


def write_expert_adapter(folder: Path, names: list[str], side: str, version: str | None) -> dict[str, Tensor]:
    """An adapter of gpt-oss's experts as some release of PEFT saved it; the factors by key."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    sizes = {"gate_up_proj": (HIDDEN, 2 * HIDDEN), "down_proj": (HIDDEN, HIDDEN)}
    factors: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for depth, name in enumerate(reversed(names)):  # the last one registered is the outermost
            first, last = sizes[name]
            wide_a, wide_b = (first, last) if side == ON_FIRST else (last, first)
            module = f"{PREFIX}model.layers.{layer}.mlp.experts{'.base_layer' * depth}"
            factors[f"{module}.lora_A.weight"] = torch.randn(EXPERTS * RANK, wide_a, generator=generator) * 0.2
            factors[f"{module}.lora_B.weight"] = torch.randn(wide_b, RANK * EXPERTS, generator=generator) * 0.2
    save_file(factors, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": None}
    config["target_parameters"] = [f"mlp.experts.{name}" for name in names]
    if version:
        config["peft_version"] = version
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return factors


def expert_formula(
    base: dict[str, Tensor], factors: dict[str, Tensor], names: list[str], side: str
) -> dict[str, Tensor]:
    wanted: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for depth, name in enumerate(reversed(names)):
            module = f"{PREFIX}model.layers.{layer}.mlp.experts{'.base_layer' * depth}"
            a, b = (factors[f"{module}.lora_{side_}.weight"].double() for side_ in "AB")
            weight = f"model.layers.{layer}.mlp.experts.{name}"
            wanted[weight] = base[weight].double() + experts(a, b, EXPERTS, ALPHA / RANK, side)
    return wanted


BOTH, SQUARE = ["gate_up_proj", "down_proj"], ["down_proj"]
# (release of PEFT, where it put A of an expert parameter of gpt-oss, parameters of the adapter)
SQUARES = [
    (None, ON_FIRST, BOTH),
    ("0.18.1", ON_FIRST, BOTH),
    ("0.19.0", ON_LAST, BOTH),
    ("0.19.1", ON_FIRST, BOTH),
    ("0.21.2", ON_LAST, BOTH),  # no release did that: the other parameter's shape is believed, not the version
    ("0.18.1", ON_FIRST, SQUARE),
    ("0.19.0", ON_LAST, SQUARE),
    ("0.19.1", ON_FIRST, SQUARE),
    ("0.21.2", ON_FIRST, SQUARE),
]


@pytest.mark.parametrize(("version", "side", "names"), SQUARES)
def test_a_square_parameter_lies_as_its_sibling_does_or_as_that_release_of_peft_put_it(
    trained: Callable[[str], Trained], tmp_path: Path, version: str | None, side: str, names: list[str]
) -> None:
    base = trained("gpt_oss").base
    factors = write_expert_adapter(tmp_path / "adapter", names, side, version)
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    wanted = expert_formula(before, factors, names, side)
    assert len(wanted) == LAYERS * len(names)
    for name, tensor in before.items():
        if name in wanted:
            assert float((after[name].double() - wanted[name]).abs().max()) <= 1e-6, name
        else:
            assert same_bits(after[name], tensor)


@pytest.mark.parametrize("version", ["0.18.1", "0.21.2"])
def test_a_square_parameter_of_another_class_lies_as_that_release_of_peft_put_it(tmp_path: Path, version: str) -> None:
    llama4 = ARCHITECTURES["llama4"]
    square = Architecture(
        lambda: transformers.Llama4TextConfig(
            **text(intermediate_size=HIDDEN, intermediate_size_mlp=40, num_local_experts=EXPERTS),
            head_dim=8,
            interleave_moe_layer_step=1,
        ),
        llama4.model,
        {},
        LAYERS,
    )
    build(square).save_pretrained(tmp_path / "base")
    side = ON_FIRST if version == "0.18.1" else ON_LAST
    factors = write_expert_adapter(tmp_path / "adapter", SQUARE, side, version)
    factors = {key.replace(".mlp.", ".feed_forward."): tensor for key, tensor in factors.items()}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    edit_config(tmp_path / "adapter", target_parameters=["feed_forward.experts.down_proj"])
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before, after = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "out")
    for layer in range(LAYERS):
        module = f"{PREFIX}model.layers.{layer}.feed_forward.experts"
        a, b = (factors[f"{module}.lora_{each}.weight"].double() for each in "AB")
        weight = f"model.layers.{layer}.feed_forward.experts.down_proj"
        wanted = before[weight].double() + experts(a, b, EXPERTS, ALPHA / RANK, side)
        assert float((after[weight].double() - wanted).abs().max()) <= 1e-6


# -- one model under several names -------------------------------------------------------------------


def test_an_adapter_of_qwen3_vl_moe_merges_into_experts_stored_the_other_way_round(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    case = trained("qwen3_vl_moe")

    def as_on_the_hub(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in tensors.items()}

    respell(case.base, tmp_path / "base", as_on_the_hub)
    respell(case.by_peft, tmp_path / "wanted", as_on_the_hub)
    shape = read_tensors(tmp_path / "base")["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape
    assert shape == (EXPERTS, HIDDEN, 2 * EXPERT_MLP)
    load(case.architecture, tmp_path / "base")
    loratool.merge(tmp_path / "base", case.adapter, tmp_path / "out")
    assert_same_model(tmp_path / "out", tmp_path / "wanted", case.architecture.edited, tmp_path / "base")


def respell(source: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """A copy of a checkpoint with other names or shapes."""
    shutil.copytree(source, target)
    save_file(change(read_tensors(source)), target / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("llava", "vision_tower.", "vision_tower.vision_model."),
        ("clip text model", "", "text_model."),
    ],
)
def test_an_adapter_merges_into_a_checkpoint_with_the_prefix_that_older_releases_wrote(
    trained: Callable[[str], Trained], tmp_path: Path, name: str, old: str, new: str
) -> None:
    case = trained(name)

    def older(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in tensors.items()}

    respell(case.base, tmp_path / "base", older)
    respell(case.by_peft, tmp_path / "wanted", older)
    load(case.architecture, tmp_path / "base")
    loratool.merge(tmp_path / "base", case.adapter, tmp_path / "out")
    assert_same_model(tmp_path / "out", tmp_path / "wanted", case.architecture.edited, tmp_path / "base")


def test_an_adapter_of_the_text_model_alone_merges_into_the_vision_language_checkpoint(tmp_path: Path) -> None:
    def config() -> Any:
        linear_attention = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
        heads = {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        return transformers.Qwen3_5Config(
            text_config=text(**linear_attention, **heads, layer_types=["linear_attention", "full_attention"]),
            vision_config=blocks(intermediate_size=48, out_hidden_size=HIDDEN, num_position_embeddings=16),
        )

    whole = Architecture(config, "Qwen3_5ForConditionalGeneration", {}, 0)
    save_base(tmp_path, whole)
    alone = transformers.Qwen3_5ForCausalLM.from_pretrained(tmp_path / "base")
    wrapped = adapt(alone, target_modules=["in_proj_qkv", "q_proj", "down_proj"])
    wrapped.save_pretrained(tmp_path / "adapter")
    assert f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight" in read_tensors(tmp_path / "adapter")
    merged = dict(wrapped.merge_and_unload().state_dict())
    for number, base in enumerate(["base", "base-in-memory"]):
        loratool.merge(tmp_path / base, tmp_path / "adapter", tmp_path / f"out{number}")
        before, after = read_tensors(tmp_path / base), read_tensors(tmp_path / f"out{number}")
        changed = 0
        for name, tensor in before.items():
            wanted = merged.get(name.replace("model.language_model.", "model."))
            if wanted is None or same_bits(tensor, wanted):
                assert same_bits(after[name], tensor), name
            else:
                assert float((after[name] - wanted).abs().max()) <= TOLERANCE, name
                changed += 1
        assert changed == 1 + 1 + LAYERS


# -- projections that are split in the adapter and fused on disk -------------------------------------


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints whose attention projections are one tensor."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("fused") / "base"
            build(FUSED_ATTENTION[name][0]).save_pretrained(made[name])
        return made[name]

    return of


def falcon(**changes: Any) -> Architecture:
    settings = {"vocab_size": 96, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    more = {"ffn_hidden_size": 48, "alibi": False, "bias": False, "tie_word_embeddings": False}
    return Architecture(lambda: transformers.FalconConfig(**settings, **more, **changes), "FalconForCausalLM", {}, 0)


def heads_of_falcon(layer: Any, output: Tensor) -> list[Tensor]:
    """What the model itself takes for queries, keys and values, of (1, in, fused) → (in, heads · head)."""
    found = layer.self_attention._split_heads(output)
    if layer.self_attention.new_decoder_architecture:  # keys and values are repeated for every query of a group
        repeats = layer.self_attention.num_heads // layer.self_attention.num_kv_heads
        found = (found[0], *(each[:, :, ::repeats] for each in found[1:]))
    return [each.flatten(2)[0] for each in found]


def heads_of_phi3(layer: Any, output: Tensor) -> list[Tensor]:
    return list(torch.split(output[0], [HIDDEN, HIDDEN // 2, HIDDEN // 2], dim=-1))


def heads_of_neox(layer: Any, output: Tensor) -> list[Tensor]:
    by_head = output.view(1, output.shape[1], 4, 3 * HIDDEN // 4)
    return [each.flatten(2)[0] for each in by_head.chunk(3, dim=-1)]


def heads_of_bloom(layer: Any, output: Tensor) -> list[Tensor]:
    found = layer.self_attention._reshape(output)  # (1, heads, in, head)
    return [each.transpose(1, 2).flatten(2)[0] for each in found]


def heads_of_mpt(layer: Any, output: Tensor) -> list[Tensor]:
    return list(output[0].chunk(3, dim=-1))


Heads = Callable[[Any, Tensor], list[Tensor]]
# name → (architecture, module of layer n, leaf on disk, how the model itself splits the output, rows of q, k, v)
FUSED_ATTENTION: dict[str, tuple[Architecture, str, str, Heads, tuple[int, int, int]]] = {
    "phi3": (ARCHITECTURES["phi3"], "model.layers.{}.self_attn", "qkv_proj", heads_of_phi3, (32, 16, 16)),
    "falcon, groups": (
        falcon(new_decoder_architecture=True, num_kv_heads=2),
        "transformer.h.{}.self_attention",
        "query_key_value",
        heads_of_falcon,
        (32, 16, 16),
    ),
    "falcon, one key for all": (
        falcon(new_decoder_architecture=False, multi_query=True),
        "transformer.h.{}.self_attention",
        "query_key_value",
        heads_of_falcon,
        (32, 8, 8),
    ),
    "falcon, every head its own": (
        falcon(new_decoder_architecture=False, multi_query=False),
        "transformer.h.{}.self_attention",
        "query_key_value",
        heads_of_falcon,
        (32, 32, 32),
    ),
    "gpt_neox": (
        ARCHITECTURES["gpt_neox"],
        "gpt_neox.layers.{}.attention",
        "query_key_value",
        heads_of_neox,
        (32, 32, 32),
    ),
    "bloom": (
        Architecture(
            lambda: transformers.BloomConfig(
                vocab_size=96, hidden_size=HIDDEN, n_layer=LAYERS, n_head=4, tie_word_embeddings=False
            ),
            "BloomForCausalLM",
            {},
            0,
        ),
        "transformer.h.{}.self_attention",
        "query_key_value",
        heads_of_bloom,
        (32, 32, 32),
    ),
    "mpt": (
        Architecture(
            lambda: transformers.MptConfig(
                vocab_size=96, d_model=HIDDEN, n_layers=LAYERS, n_heads=4, tie_word_embeddings=False
            ),
            "MptForCausalLM",
            {},
            0,
        ),
        "transformer.blocks.{}.attn",
        "Wqkv",
        heads_of_mpt,
        (32, 32, 32),
    ),
}


@pytest.mark.parametrize("parts", ["qkv", "qv"])
@pytest.mark.parametrize("name", FUSED_ATTENTION)
def test_a_split_projection_is_added_to_the_rows_that_the_model_takes_for_it(
    fused: Callable[[str], Path], tmp_path: Path, name: str, parts: str
) -> None:
    architecture, path, leaf, heads, sizes = FUSED_ATTENTION[name]
    base = fused(name)
    factors = write_split_adapter(tmp_path / "adapter", path, dict(zip("qkv", sizes, strict=True)), parts)
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    model = load(architecture, base)
    layers = getattr(model, model.base_model_prefix)
    layers = getattr(layers, "layers", None) or getattr(layers, "h", None) or layers.blocks
    for number, layer in enumerate(layers):
        module = path.format(number)
        weight = f"{module}.{leaf}.weight"
        change = (after[weight] - before[weight]).T[None]  # the output for each unit input
        for part, found in zip("qkv", heads(layer, change), strict=True):
            if part in parts:
                a, b = (factors[f"{PREFIX}{module}.{part}_proj.lora_{side}.weight"].double() for side in "AB")
                wanted = linear(a, b, ALPHA / RANK).T
            else:
                wanted = torch.zeros_like(found).double()
            assert found.shape == wanted.shape
            assert float((found.double() - wanted).abs().max()) <= 1e-6, f"{part} of {module}"
    others = [n for n in before if not n.endswith(f".{leaf}.weight")]
    assert all(same_bits(after[n], before[n]) for n in others)


def write_split_adapter(folder: Path, path: str, sizes: dict[str, int], parts: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    factors: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for part in parts:
            module = f"{PREFIX}{path.format(layer)}.{part}_proj"
            factors[f"{module}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator) * 0.2
            factors[f"{module}.lora_B.weight"] = torch.randn(sizes[part], RANK, generator=generator) * 0.2
    names = [f"{part}_proj" for part in parts]
    save_peft(folder, factors, r=RANK, lora_alpha=ALPHA, target_modules=names)
    return factors


def test_a_split_gate_and_up_are_added_to_the_halves_of_their_fused_weight(
    fused: Callable[[str], Path], tmp_path: Path
) -> None:
    base = fused("phi3")
    modules = [f"model.layers.{n}.mlp.{part}_proj" for n in range(LAYERS) for part in ("gate", "up")]
    generator = torch.Generator().manual_seed(3)
    factors: dict[str, Tensor] = {}
    for module in modules:
        factors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator) * 0.2
        factors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(48, RANK, generator=generator) * 0.2
    save_peft(tmp_path / "adapter", factors, r=RANK, lora_alpha=ALPHA, target_modules=["gate_proj", "up_proj"])
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    wanted = {name: tensor.double() for name, tensor in before.items()}
    for layer in range(LAYERS):
        module = f"model.layers.{layer}.mlp"
        for part, rows in (("gate", slice(0, 48)), ("up", slice(48, 96))):
            a, b = (factors[f"{PREFIX}{module}.{part}_proj.lora_{side}.weight"].double() for side in "AB")
            wanted[f"{module}.gate_up_proj.weight"][rows] += linear(a, b, ALPHA / RANK)
    for name, tensor in wanted.items():
        assert float((after[name].double() - tensor).abs().max()) <= 1e-6, name
