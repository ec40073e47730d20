"""Adapters of mlx-lm: read as their formula says, and written so that they mean what they meant.

`a` is (in, rank) and `b` (rank, out): W' = W + scale · (a @ b)ᵀ, of an embedding W + scale · a @ b, and with DoRA's
lengths `m` each row of W' has the length that m says.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoints import save_model
from hub_client import Client
from hub_server import HubServer
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapters.formats import WRITTEN
from loratool.adapters.formats.format import Parts
from loratool.adapters.formats.mlx import MLX
from loratool.adapters.layers import Form, contents_of
from loratool.adapters.writer import Carried, FactorOptions, adapter_output, carried_over
from loratool.algebra.lowrank.products import padded

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

QUERY, OUTPUT, TABLE = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "model.embed_tokens"
SHAPES = {QUERY: (6, 4), OUTPUT: (4, 6), TABLE: (9, 4)}
SCALE, RANK = 20.0, 2


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / 4


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tensors = {f"{module}.weight": numbers(*shape, seed=1) for module, shape in SHAPES.items()}
    return save_model(
        folder, tensors, {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    )


def factors(*modules: str) -> dict[str, Tensor]:
    tensors = {}
    for module in modules:
        rows, columns = SHAPES[module]
        first, last = (rows, columns) if module == TABLE else (columns, rows)
        tensors[f"{module}.lora_a"] = numbers(first, RANK, seed=2)
        tensors[f"{module}.lora_b"] = numbers(RANK, last, seed=3)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    table = {"fine_tune_type": "lora", "model": "org/base", "lora_parameters": {"rank": RANK, "scale": SCALE}}
    (folder / "adapter_config.json").write_text(json.dumps(table | config))
    return folder


def delta(tensors: dict[str, Tensor], module: str, scale: float = SCALE) -> Tensor:
    """ΔW in float64, by the formula."""
    product = tensors[f"{module}.lora_a"].double() @ tensors[f"{module}.lora_b"].double()
    return scale * (product if module == TABLE else product.T)


def merged(base: Path, adapter: Path, out: Path) -> dict[str, Tensor]:
    loratool.merge(base, adapter, out, device="cpu")
    return load_file(out / "model.safetensors")


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Each weight is the float64 one, rounded once."""
    assert found.keys() == {f"{module}.weight" for module in SHAPES}
    for module, exact in wanted.items():
        torch.testing.assert_close(found[f"{module}.weight"], exact.float(), rtol=2e-7, atol=1e-7)


def weight(base: Path, module: str) -> Tensor:
    return load_file(base / "model.safetensors")[f"{module}.weight"].double()


def test_a_merge_is_what_the_formula_says(base: Path, tmp_path: Path) -> None:
    """Of layers in both directions and of an embedding; `scale` is no α, and the rank does not divide it."""
    tensors = factors(*SHAPES)
    found = merged(base, write(tmp_path / "adapter", tensors), tmp_path / "out")
    check(found, {module: weight(base, module) + delta(tensors, module) for module in SHAPES})


def test_dora_gives_each_row_its_length(base: Path, tmp_path: Path) -> None:
    tensors = factors(QUERY) | {f"{QUERY}.m": numbers(6, seed=4).abs()}
    found = merged(base, write(tmp_path / "adapter", tensors, fine_tune_type="dora"), tmp_path / "out")
    whole = weight(base, QUERY) + delta(tensors, QUERY)
    lengths = tensors[f"{QUERY}.m"].double()[:, None]
    check(found, {QUERY: whole * lengths / whole.norm(dim=1, keepdim=True)})


@pytest.mark.parametrize(("recent", "scale"), [(True, 10.0), (False, 10.0 * 16 / RANK)])
def test_an_alpha_counts_in_configs_of_early_releases_only(
    base: Path, tmp_path: Path, recent: bool, scale: float
) -> None:
    """They have no fine_tune_type; either way it is said."""
    tensors = factors(QUERY)
    folder = write(tmp_path / "adapter", tensors)
    parameters = {"rank": RANK, "alpha": 16, "scale": 10.0}
    (folder / "adapter_config.json").write_text(
        json.dumps({"lora_parameters": parameters} | ({"fine_tune_type": "lora"} if recent else {}))
    )
    assert ["alpha" in note.code for note in loratool.read_adapter(folder).notes] == [True]
    found = merged(base, folder, tmp_path / "out")
    check(found, {QUERY: weight(base, QUERY) + delta(tensors, QUERY, scale)})


def test_a_file_is_read_by_its_own_name_and_inspect_tells_its_format(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", factors(QUERY))
    facts = loratool.inspect(folder / "adapters.safetensors")
    assert isinstance(facts, loratool.AdapterFacts)
    assert (facts.format, facts.base, facts.scalings, facts.ranks) == ("mlx", "org/base", {"20": 1}, {"2": 1})


def test_an_adapter_on_the_hub_is_inspected_by_its_head_and_merged(base: Path, tmp_path: Path) -> None:
    """The format is told from a repository's names and heads as it is from a folder."""
    tensors = factors(*SHAPES)
    with HubServer() as server:
        server.add("org/mlx", write(tmp_path / "adapter", tensors))
        client = Client(server, tmp_path / "home")
        assert "mlx, LORA" in client.works("inspect", "org/mlx").out
        assert not server.asked("GET", "^/cdn/")  # where whole files come from
        client.works("merge", base, "org/mlx", "-o", tmp_path / "out", "--device", "cpu")
    found = load_file(tmp_path / "out" / "model.safetensors")
    check(found, {module: weight(base, module) + delta(tensors, module) for module in SHAPES})


def test_a_check_tells_that_servers_read_another_layout_and_how_to_write_it(tmp_path: Path) -> None:
    """It does not judge layers that no server would find."""
    folder = write(tmp_path / "adapter", factors(QUERY))
    facts = loratool.inspect(folder, check=True)
    assert isinstance(facts, loratool.AdapterFacts)
    assert facts.findings is not None
    assert [finding.code for finding in facts.findings] == ["format"]
    assert facts.findings[0].repair == f"loratool rescale {folder} -o OUT --bake"


def test_tensors_decide_whose_adapter_a_file_is(tmp_path: Path) -> None:
    """PEFT's factors under mlx-lm's file name are PEFT's, and a tensor that nobody claims is told."""
    folder = write(tmp_path / "adapter", {})
    name = f"base_model.model.{QUERY}"
    both = {f"{name}.lora_A.weight": numbers(2, 4), f"{name}.lora_B.weight": numbers(6, 2)}
    save_file(both, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    assert loratool.read_adapter(folder).format == "peft"
    other = write(tmp_path / "other", factors(QUERY) | {"odd.thing": numbers(2)})
    found = loratool.read_adapter(other)
    assert (found.format, found.unused) == ("mlx", ("odd.thing",))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({f"{QUERY}.lora_b": None}, "lora_b is missing"),
        ({f"{QUERY}.lora_b": numbers(3, 6)}, r"expected \(in, rank\) and \(rank, out\)"),
        ({f"{QUERY}.m": numbers(5)}, "expected 6 values"),
        ({f"{QUERY}.m": numbers(6).int()}, "expected 6 values that are floats"),
        ({f"{QUERY}.m": numbers(6)}, "fine_tune_type is lora, for which mlx-lm ignores it"),
        ({"a.mlp.up_proj.lora_a": numbers(3, 2, 4), "a.mlp.up_proj.lora_b": numbers(3, 6, 2)}, "not known to have any"),
        (
            {"a.switch_mlp.up_proj.lora_a": numbers(3, 2, 4), "a.switch_mlp.up_proj.lora_b": numbers(2, 6, 2)},
            r"expected \(experts, rank, in\)",
        ),
        (
            {"a.switch_mlp.up_proj.lora_a": numbers(3, 2, 4), "a.switch_mlp.up_proj.lora_b": numbers(3, 6, 2)}
            | {"a.switch_mlp.up_proj.m": numbers(3, 6)},
            "DoRA on experts",
        ),
        (
            {"a.switch_mlp.up_proj.lora_a": numbers(3, 2, 4), "a.switch_mlp.up_proj.lora_b": numbers(3, 6, 2)}
            | {"a.experts.up_proj.lora_a": numbers(3, 2, 4), "a.experts.up_proj.lora_b": numbers(3, 6, 2)},
            r"a\.experts\.0\.up_proj\.weight has a second update",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_name(
    base: Path, tmp_path: Path, change: dict[str, Tensor | None], told: str
) -> None:
    tensors = {name: tensor for name, tensor in (factors(QUERY) | change).items() if tensor is not None}
    folder = write(tmp_path / "adapter", tensors)
    with pytest.raises(loratool.InputError, match=told):
        loratool.merge(base, folder, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["dora", None])
def test_dora_without_the_lengths_of_a_layer_is_refused_by_its_name(tmp_path: Path, kind: str | None) -> None:
    """mlx-lm would take those of the base's rows; without them the layer would be read as LoRA."""
    first, second = list(SHAPES)[:2]
    tensors = factors(first, second) | {f"{first}.m": numbers(SHAPES[first][0])}
    folder = write(tmp_path / "adapter", tensors, fine_tune_type=kind)
    with pytest.raises(loratool.InputError, match=rf"{re.escape(second)}\.m is missing, although"):
        loratool.read_adapter(folder)


@pytest.mark.parametrize("parameters", [None, {}, {"scale": "ten"}, {"scale": 1.0, "alpha": True}])
def test_a_config_without_a_scale_is_refused(tmp_path: Path, parameters: object) -> None:
    folder = write(tmp_path / "adapter", factors(QUERY), lora_parameters=parameters)
    with pytest.raises(loratool.InputError, match=r"lora_parameters"):
        loratool.read_adapter(folder)


EXPERTS, WIDE_EXPERT, NARROW = 3, 6, 4  # gate and up are (6, 4) each, down is (4, 6)
SWITCH = {"gate_proj": (WIDE_EXPERT, NARROW), "up_proj": (WIDE_EXPERT, NARROW), "down_proj": (NARROW, WIDE_EXPERT)}


def expert_factors(container: str) -> dict[str, Tensor]:
    tensors = {}
    for at, (leaf, (rows, columns)) in enumerate(SWITCH.items()):
        tensors[f"{container}.{leaf}.lora_a"] = numbers(EXPERTS, RANK, columns, seed=at)
        tensors[f"{container}.{leaf}.lora_b"] = numbers(EXPERTS, rows, RANK, seed=at + 9)
    return tensors


def expert_weight(leaf: str, expert: int) -> Tensor:
    return numbers(*SWITCH[leaf], seed=10 * expert + len(leaf))


def write_experts(folder: Path, kind: str) -> Path:
    """A base with the experts of one layer: each a tensor, all in one as transformers 5 or as MLX has them, or Mixtral's."""
    start, old = "model.layers.0.mlp", "model.layers.0.block_sparse_moe.experts"
    every = {leaf: [expert_weight(leaf, e) for e in range(EXPERTS)] for leaf in SWITCH}
    tensors = {
        "split": {f"{start}.experts.{e}.{leaf}.weight": every[leaf][e] for leaf in SWITCH for e in range(EXPERTS)},
        "mixtral": {
            f"{old}.{e}.{new}.weight": every[leaf][e]
            for leaf, new in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
            for e in range(EXPERTS)
        },
        "fused": {
            f"{start}.experts.gate_up_proj": torch.stack(
                [torch.cat(pair) for pair in zip(every["gate_proj"], every["up_proj"], strict=True)]
            ),
            f"{start}.experts.down_proj": torch.stack(every["down_proj"]),
        },
        "mlx": {f"{start}.switch_mlp.{leaf}.weight": torch.stack(every[leaf]) for leaf in SWITCH},
    }[kind]
    model = "mixtral" if kind == "mixtral" else "qwen3_moe"
    return save_model(folder, tensors, {"model_type": model, "num_experts": EXPERTS})


def weight_of_expert(tensors: dict[str, Tensor], kind: str, leaf: str, expert: int) -> Tensor:
    start, old = "model.layers.0.mlp", "model.layers.0.block_sparse_moe.experts"
    match kind:
        case "split":
            return tensors[f"{start}.experts.{expert}.{leaf}.weight"]
        case "mixtral":
            return tensors[f"{old}.{expert}.{ {'gate_proj': 'w1', 'up_proj': 'w3', 'down_proj': 'w2'}[leaf] }.weight"]
        case "mlx":
            return tensors[f"{start}.switch_mlp.{leaf}.weight"][expert]
    if leaf == "down_proj":
        return tensors[f"{start}.experts.down_proj"][expert]
    rows = slice(0, WIDE_EXPERT) if leaf == "gate_proj" else slice(WIDE_EXPERT, None)
    return tensors[f"{start}.experts.gate_up_proj"][expert][rows]


@pytest.mark.parametrize("kind", ["split", "fused", "mlx", "mixtral"])
def test_factors_of_all_experts_are_merged_into_each_expert(tmp_path: Path, kind: str) -> None:
    """However the base has them: ΔW of each is scale · b @ a, which are not transposed."""
    base = write_experts(tmp_path / "base", kind)
    container = f"model.layers.0.{'block_sparse_moe' if kind == 'mixtral' else 'mlp'}.switch_mlp"
    tensors = expert_factors(container)
    found = merged(base, write(tmp_path / "adapter", tensors), tmp_path / "out")
    for leaf in SWITCH:
        for expert in range(EXPERTS):
            a, b = (tensors[f"{container}.{leaf}.lora_{side}"][expert].double() for side in "ab")
            wanted = (expert_weight(leaf, expert).double() + SCALE * (b @ a)).float()
            assert torch.equal(weight_of_expert(found, kind, leaf, expert), wanted), (leaf, expert)


def test_experts_are_not_written_for_mlx_one_by_one(tmp_path: Path) -> None:
    """mlx-lm has one tensor for all of them, so that it would not find these."""
    adapter = loratool.read_adapter(write(tmp_path / "adapter", expert_factors("model.layers.0.mlp.switch_mlp")))
    with pytest.raises(loratool.FitError, match="cannot adapt"):
        MLX.spelling({target: layer.kind for target, layer in contents_of(adapter, "rewrite").layers.items()})


@pytest.mark.parametrize("kind", ["split", "mlx"])
def test_whole_weights_take_the_place_of_the_bases(tmp_path: Path, kind: str) -> None:
    """`fine_tune_type` full: layers, norms and experts are saved as they became."""
    base = write_experts(tmp_path / "base", kind)
    stacked = numbers(EXPERTS, WIDE_EXPERT, NARROW, seed=77)
    name = "model.layers.0.mlp.switch_mlp.up_proj.weight"
    folder = write(tmp_path / "adapter", {name: stacked}, fine_tune_type="full", lora_parameters=None)
    found = merged(base, folder, tmp_path / "out")
    for expert in range(EXPERTS):
        assert torch.equal(weight_of_expert(found, kind, "up_proj", expert), stacked[expert])
        assert torch.equal(weight_of_expert(found, kind, "down_proj", expert), expert_weight("down_proj", expert))


def test_a_layer_trained_whole_is_the_bases_weight_afterwards(base: Path, tmp_path: Path) -> None:
    whole = numbers(*SHAPES[QUERY], seed=78)
    folder = write(tmp_path / "adapter", {f"{QUERY}.weight": whole}, fine_tune_type="full")
    check(merged(base, folder, tmp_path / "out"), {QUERY: whole.double()})
    with pytest.raises(loratool.InputError, match="no update whose strength"):
        loratool.rescale(folder, tmp_path / "half", scale=0.5)


def test_the_only_checkpoint_of_a_run_is_read_and_of_several_one_is_to_be_named(base: Path, tmp_path: Path) -> None:
    tensors = factors(QUERY)
    folder = write(tmp_path / "adapter", tensors)
    (folder / "adapters.safetensors").rename(folder / "0000100_adapters.safetensors")
    report = loratool.merge(base, folder, tmp_path / "out", device="cpu")
    assert "other-name" in [note.code for note in report.notes]
    wanted = {QUERY: weight(base, QUERY) + delta(tensors, QUERY)}
    check(load_file(tmp_path / "out" / "model.safetensors"), wanted)
    save_file(factors(OUTPUT), folder / "0000200_adapters.safetensors")
    with pytest.raises(loratool.InputError, match=r"0000100_adapters\.safetensors, 0000200_adapters\.safetensors"):
        loratool.read_adapter(folder)
    check(merged(base, folder / "0000100_adapters.safetensors", tmp_path / "second"), wanted)


def test_factors_without_a_config_take_an_alpha(base: Path, tmp_path: Path) -> None:
    """As they are after the early arrays of numpy were converted; alpha is divided by the rank."""
    tensors = factors(QUERY, TABLE)
    folder = write(tmp_path / "adapter", tensors)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(loratool.InputError, match="--input-alpha"):
        loratool.read_adapter(folder)
    loratool.merge(base, folder, tmp_path / "out", device="cpu", input_alpha=SCALE * RANK)
    wanted = {module: weight(base, module) + delta(tensors, module) for module in (QUERY, TABLE)}
    check(load_file(tmp_path / "out" / "model.safetensors"), wanted)


def test_rescaling_keeps_the_tensors_and_baking_writes_them_with_the_scale_in_them(base: Path, tmp_path: Path) -> None:
    """Either way the merge is half of what it was, and mlx-lm reads the output."""
    tensors = factors(*SHAPES)
    folder = write(tmp_path / "adapter", tensors)
    kept = loratool.rescale(folder, tmp_path / "half", scale=0.5)
    assert (tmp_path / "half" / "adapters.safetensors").read_bytes() == (folder / "adapters.safetensors").read_bytes()
    baked = loratool.rescale(folder, tmp_path / "baked", scale=0.5, bake=True)
    assert [[note.code for note in report.notes] for report in (kept, baked)] == [[], []]
    config = json.loads((tmp_path / "baked" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == 1
    wanted = {module: weight(base, module) + delta(tensors, module, SCALE / 2) for module in SHAPES}
    for name in ("half", "baked"):
        found = merged(base, tmp_path / name, tmp_path / f"{name}-merged")
        for module, exact in wanted.items():
            torch.testing.assert_close(found[f"{module}.weight"], exact.float(), rtol=1e-5, atol=1e-6)


def write_as_mlx(source: Path, out: Path) -> None:
    """An adapter, written in mlx-lm's layout through the format's door alone."""
    contents = contents_of(loratool.read_adapter(source), "rewrite")
    names = MLX.spelling({target: layer.kind for target, layer in contents.layers.items()})
    rank = max(layer.rank for layer in contents.layers.values())
    forms = {target: Form.of(layer, rank) for target, layer in contents.layers.items()}
    carried = carried_over(contents, names) if contents.dora else Carried()
    with adapter_output(out, forms, carried, "float32", names, FactorOptions()) as output:
        for target in contents.layers:
            product = contents.load(target, torch.device("cpu"), torch.float64)
            output.add(output.rounded(target, padded(product, rank)))
        output.carry(carried)
        parts = Parts(dict.fromkeys(contents.layers, rank), dora=contents.dora)
        config = names.describe([contents.adapter], parts)
        output.complete(config)
        output.finish(config, {"made_by": "loratool test"}, {}, [])


def peft_adapter(folder: Path, **config: Any) -> Path:
    """LoRA of two layers and of the embedding, as PEFT saves it."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for module, (rows, columns) in SHAPES.items():
        name = f"base_model.model.{module}"
        a, b = (".lora_embedding_A", ".lora_embedding_B") if module == TABLE else (".lora_A.weight", ".lora_B.weight")
        first, last = (rows, columns) if module == TABLE else (columns, rows)
        tensors |= {name + a: numbers(RANK, first, seed=5), name + b: numbers(last, RANK, seed=6)}
    if config.get("use_dora"):
        tensors[f"base_model.model.{QUERY}.lora_magnitude_vector"] = numbers(6, seed=7).abs()
        tensors = {name: t for name, t in tensors.items() if QUERY in name}
    save_file(tensors, folder / WRITTEN.weights_name)
    table = {"peft_type": "LORA", "r": RANK, "lora_alpha": 7, "base_model_name_or_path": "org/base", **config}
    (folder / WRITTEN.config_name).write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["LoRA", "rsLoRA", "DoRA"])
def test_an_adapter_of_peft_means_the_same_in_mlx_layout(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    """It merges into the same weights, and its factors lie as mlx-lm has them."""
    source = peft_adapter(tmp_path / "peft", **config)
    write_as_mlx(source, tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert tensors[f"{QUERY}.lora_a"].shape == (4, RANK)
    assert tensors[f"{QUERY}.lora_b"].shape == (RANK, 6)
    table = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert (table["lora_parameters"]["scale"], table["lora_parameters"]["rank"], table["model"]) == (1.0, 2, "org/base")
    assert (table["fine_tune_type"] == "dora") == bool(config.get("use_dora"))
    before, after = (merged(base, tmp_path / name, tmp_path / f"{name}-out") for name in ("peft", "mlx"))
    for name, found in after.items():
        torch.testing.assert_close(found, before[name], rtol=1e-5, atol=1e-6)


def test_what_mlx_has_no_place_for_is_told_before_anything_is_written(tmp_path: Path) -> None:
    source = peft_adapter(tmp_path / "peft", modules_to_save=["lm_head"])
    tensors = load_file(source / WRITTEN.weights_name) | {"base_model.model.lm_head.weight": numbers(9, 4)}
    save_file(tensors, source / WRITTEN.weights_name)
    adapter = loratool.read_adapter(source)
    assert [note.code for note in MLX.losses(adapter)] == ["not-in-mlx"]
    assert "lm_head.weight" in MLX.losses(adapter)[0].text
    assert MLX.losses(loratool.read_adapter(write(tmp_path / "mlx", factors(QUERY)))) == ()


HIDDEN, WIDE, TOKENS = 8, 12, 10


def llama(folder: Path) -> dict[str, Tensor]:
    """A Llama of two layers that mlx-lm can load."""
    shapes = {"model.embed_tokens": (TOKENS, HIDDEN), "lm_head": (TOKENS, HIDDEN)}
    for layer in range(2):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{start}.mlp.{name}_proj": (WIDE, HIDDEN) for name in ("gate", "up")}
        shapes[f"{start}.mlp.down_proj"] = (HIDDEN, WIDE)
    tensors = {f"{module}.weight": numbers(*shape, seed=at) for at, (module, shape) in enumerate(shapes.items())}
    norms = [f"model.layers.{n}.{part}_layernorm" for n in range(2) for part in ("input", "post_attention")]
    tensors |= {f"{name}.weight": torch.ones(HIDDEN) for name in (*norms, "model.norm")}
    save_model(
        folder,
        tensors,
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 2,
            "hidden_size": HIDDEN,
            "intermediate_size": WIDE,
            "num_attention_heads": 2,
            "vocab_size": TOKENS,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
    )
    return tensors


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_mlx_lm_loads_what_is_written_and_fuses_it_into_the_same_weights(tmp_path: Path, dora: bool) -> None:
    """Of layers of two ranks, which are filled up to one, and of the embedding."""
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    tensors = llama(tmp_path / "base")
    ranks = {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.down_proj": 3}
    saved: dict[str, Tensor] = {}
    for at, (module, rank) in enumerate(ranks.items()):
        rows, columns = tensors[f"{module}.weight"].shape
        name = f"base_model.model.{module}"
        saved |= {f"{name}.lora_A.weight": numbers(rank, columns, seed=at)}
        saved |= {f"{name}.lora_B.weight": numbers(rows, rank, seed=at + 9)}
        if dora:
            saved[f"{name}.lora_magnitude_vector"] = numbers(rows, seed=at).abs()
    if not dora:
        name = "base_model.model.model.embed_tokens"
        saved |= {f"{name}.lora_embedding_A": numbers(2, TOKENS), f"{name}.lora_embedding_B": numbers(HIDDEN, 2)}
    source = tmp_path / "peft"
    source.mkdir()
    save_file(saved, source / WRITTEN.weights_name)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "rank_pattern": {"down_proj": 3}, "use_dora": dora}
    (source / WRITTEN.config_name).write_text(json.dumps(config))
    write_as_mlx(source, tmp_path / "mlx")
    wanted = merged(tmp_path / "base", source, tmp_path / "out")

    model, _ = utils.load_model(tmp_path / "base")
    model = utils.load_adapters(model, str(tmp_path / "mlx"))
    fused = {name: module.fuse() for name, module in model.named_modules() if hasattr(module, "fuse")}
    assert fused.keys() >= {*ranks, *([] if dora else ["model.embed_tokens"])}
    for name, module in fused.items():
        found = torch.tensor(memoryview(module.weight.astype(mx.float32)).tolist())
        torch.testing.assert_close(found, wanted[f"{name}.weight"], rtol=1e-5, atol=1e-5)
