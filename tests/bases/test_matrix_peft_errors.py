"""Where PEFT's own merge is wrong, loses tensors or fails: what is right is what the unmerged adapter computes.

Each test is named for the behaviour that PEFT 0.21 lacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_model
from layout_facts import linear
from matrix_models import ALPHA, ARCHITECTURES, EXPERTS, RANK, Architecture, adapt, build, load, train
from oracle import PREFIX, Exact, assert_single_rounding, read_tensors, same_bits
from peft import LoraConfig
from peft_files import edit_config, save_peft
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, build_base
from torch import Tensor, nn

import loratool

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# -- modules of torch itself -------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return result


def save_module(folder: Path, module: nn.Module) -> Path:
    return save_model(folder, module.state_dict(), {})


def output(module: nn.Module, given: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(given)
    return result.clone()


def adapted(folder: Path, module: nn.Module, given: Tensor, **settings: Any) -> Tensor:
    """Save `module` as a base and an adapter on it; what the unmerged adapter says to `given`."""
    torch.manual_seed(4)
    save_module(folder / "base", module)
    plain = output(module, given)
    wrapped = adapt(module, **settings)
    wrapped.save_pretrained(folder / "adapter")
    said = output(wrapped, given)
    assert float((said - plain).abs().max()) > 0.01, "the adapter says nothing"
    return said


def merged_output(folder: Path, module: nn.Module, given: Tensor) -> Tensor:
    loratool.merge(folder / "base", folder / "adapter", folder / "out")
    module.load_state_dict(load_file(folder / "out" / "model.safetensors"))
    return output(module, given)


def test_the_output_projection_of_multihead_attention_gets_the_change_that_training_saw(tmp_path: Path) -> None:
    torch.manual_seed(1)
    given = torch.randn(2, 5, 16)
    said = adapted(tmp_path, Attention(), given, target_modules=["attn"])
    assert float((merged_output(tmp_path, Attention(), given) - said).abs().max()) <= 1e-5
    report = loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "again")
    assert any("out_proj" in note and "twice" in note.lower() for note in map(str, report.notes)), report.notes


@pytest.mark.parametrize(("version", "factor"), [("0.21.2", 2), ("0.22.0", 1), (None, 2)])
def test_a_release_that_is_not_known_to_double_that_change_is_not_taken_to(
    tmp_path: Path, version: str | None, factor: int
) -> None:
    torch.manual_seed(1)
    adapted(tmp_path, Attention(), torch.randn(2, 5, 16), target_modules=["attn"])
    edit_config(tmp_path / "adapter", peft_version=version)
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before, after = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "out")
    saved = read_tensors(tmp_path / "adapter")
    for module, weight, times in (
        ("attn", "attn.in_proj_weight", 1),
        ("attn.base_layer.out_proj", "attn.out_proj.weight", factor),
    ):
        a, b = (saved[f"{PREFIX}{module}.lora_{side}.weight"].double() for side in "AB")
        wanted = before[weight].double() + linear(a, b, times * ALPHA / RANK)
        assert float((after[weight].double() - wanted).abs().max()) <= 1e-6, weight


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv1d(2, 3, 3), (1, 2, 7)),
        (lambda: nn.Conv2d(2, 3, (3, 2), stride=2, padding=1), (1, 2, 7, 7)),
        (lambda: nn.Conv2d(2, 3, 1), (1, 2, 5, 5)),
        (lambda: nn.Conv3d(2, 3, (2, 3, 2)), (1, 2, 5, 5, 5)),
        (lambda: nn.Conv3d(2, 3, (1, 1, 3)), (1, 2, 5, 5, 5)),
        (lambda: nn.Conv3d(2, 3, 1), (1, 2, 4, 4, 4)),
    ],
    ids=["1-d", "2-d", "2-d, a point", "3-d", "3-d, a line", "3-d, a point"],
)
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
def test_a_convolution_of_every_rank_and_kernel_merges(
    tmp_path: Path, layer: Callable[[], nn.Module], shape: tuple[int, ...], dora: bool
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = layer()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.conv(x)
            return result

    torch.manual_seed(2)
    given = torch.randn(shape)
    said = adapted(tmp_path, Model(), given, target_modules=["conv"], use_dora=dora)
    assert float((merged_output(tmp_path, Model(), given) - said).abs().max()) <= 1e-5


def test_a_row_of_zeros_stays_zero_under_dora(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 6)

    torch.manual_seed(3)
    module = Model()
    with torch.no_grad():
        module.linear.weight[2] = 0
    save_module(tmp_path / "base", module)
    wrapped = adapt(module, target_modules=["linear"], use_dora=True)
    with torch.no_grad():
        wrapped.base_model.model.linear.lora_B["default"].weight[2] = 0
    wrapped.save_pretrained(tmp_path / "adapter")
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    weight, saved = read_tensors(tmp_path / "base")["linear.weight"].double(), read_tensors(tmp_path / "adapter")
    a, b = (saved[f"{PREFIX}linear.lora_{side}.weight"].double() for side in "AB")
    moved = weight + linear(a, b, ALPHA / RANK)
    norms = moved.norm(dim=1, keepdim=True)
    assert bool((norms[2] == 0).all())
    magnitude = saved[f"{PREFIX}linear.lora_magnitude_vector"].double()[:, None]
    wanted = torch.where(norms == 0, 0.0, magnitude * moved / norms.clamp_min(1e-30))
    found = read_tensors(tmp_path / "out")["linear.weight"]
    assert float((found.double() - wanted).abs().max()) <= 1e-6


# -- adapters of an older release on the newest one --------------------------------------------------

# name → (architecture, what transformers 4 called the targets: a pattern of tensors on disk)
OLD: Mapping[str, tuple[Architecture, str]] = {
    "the routed experts of qwen2-moe": (ARCHITECTURES["qwen2_moe"], r"mlp\.experts\.\d+\.(gate|up|down)_proj"),
    "shared experts of deepseek-v3": (ARCHITECTURES["deepseek_v3"], r"mlp\.shared_experts\.(gate|up|down)_proj"),
    "the dense layers of deepseek-v3": (ARCHITECTURES["deepseek_v3"], r"0\.mlp\.(gate|up|down)_proj"),
    "the dense layers of qwen3-moe": (ARCHITECTURES["qwen3_moe"], r"0\.mlp\.(gate|up|down)_proj"),
    "all of deepseek-v3": (ARCHITECTURES["deepseek_v3"], r"(mlp\..*|self_attn\.\w+)_proj"),
    "all of qwen3-moe": (ARCHITECTURES["qwen3_moe"], r"(gate|up|down|q|k|v|o)_proj"),
    "one of the two projections of mixtral": (ARCHITECTURES["mixtral"], r"experts\.\d+\.w1"),
    "the experts and the router of mixtral": (
        ARCHITECTURES["mixtral"],
        r"block_sparse_moe\.(experts\.\d+\.w[123]|gate)",
    ),
    "one expert of mixtral": (ARCHITECTURES["mixtral"], r"experts\.2\.w[12]"),
    "only the experts of qwen3-moe": (ARCHITECTURES["qwen3_moe"], r"1\.mlp\.experts\.\d+\.(gate|up|down)_proj"),
    "vit": (ARCHITECTURES["vit"], r"(query|attention\.output\.dense|intermediate\.dense)"),
    "a module of dinov2 whose name contains weight": (ARCHITECTURES["dinov2"], r"(weights_in|weights_out|query)"),
    "llava with its projector": (ARCHITECTURES["llava"], r"(q_proj|linear_1|fc1)"),
    "qwen2-vl": (ARCHITECTURES["qwen2_vl"], r"(q_proj|attn\.qkv)"),
}


def old_adapter(folder: Path, base: Mapping[str, Tensor], pattern: str, **settings: Any) -> dict[str, Tensor]:
    """An adapter as the release of transformers trained it that had in memory what is on disk; tensor → its change."""
    generator = torch.Generator().manual_seed(6)
    factors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    scale = ALPHA / (RANK**0.5 if settings.get("use_rslora") else RANK)
    for name, tensor in base.items():
        if re.search(rf"(^|\.){pattern}\.weight$", name):
            module = name.removesuffix(".weight")
            a = torch.randn(RANK, tensor.shape[1], generator=generator) * 0.2
            b = torch.randn(tensor.shape[0], RANK, generator=generator) * 0.2
            factors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
            changes[name] = linear(a.double(), b.double(), scale)
    assert changes
    save_peft(folder, factors, **{"r": RANK, "lora_alpha": ALPHA, "target_modules": ["all"], **settings})
    return changes


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Architecture], Path]:
    """A folder with `base` and `base-in-memory` of an architecture."""
    made: dict[str, Path] = {}

    def of(architecture: Architecture) -> Path:
        if architecture.model not in made:
            made[architecture.model] = tmp_path_factory.mktemp("old")
            model = build(architecture)
            model.save_pretrained(made[architecture.model] / "base")
            model.save_pretrained(made[architecture.model] / "base-in-memory", save_original_format=False)
        return made[architecture.model]

    return of


def check_old(folder: Path, architecture: Architecture, pattern: str, scratch: Path, **settings: Any) -> None:
    """On the checkpoint the formula holds; in the layout of memory, what transformers makes of that checkpoint."""
    base = read_tensors(folder / "base")
    changes = old_adapter(scratch / "adapter", base, pattern, **settings)
    loratool.merge(folder / "base", scratch / "adapter", scratch / "out")
    merged = read_tensors(scratch / "out")
    for name, tensor in base.items():
        if name in changes:
            assert float((merged[name].double() - tensor.double() - changes[name]).abs().max()) <= 1e-6, name
        else:
            assert same_bits(merged[name], tensor), name
    load(architecture, scratch / "out").save_pretrained(scratch / "wanted", save_original_format=False)
    loratool.merge(folder / "base-in-memory", scratch / "adapter", scratch / "out-in-memory")
    found, wanted = read_tensors(scratch / "out-in-memory"), read_tensors(scratch / "wanted")
    before = read_tensors(folder / "base-in-memory")
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).abs().max()) <= 1e-6, name
        assert same_bits(found[name], before[name]) == same_bits(tensor, before[name]), name


@pytest.mark.parametrize("name", OLD)
def test_nothing_of_an_adapter_of_transformers_4_is_lost_on_a_model_of_transformers_5(
    bases: Callable[[Architecture], Path], tmp_path: Path, name: str
) -> None:
    architecture, pattern = OLD[name]
    check_old(bases(architecture), architecture, pattern, tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_split_experts_keep_their_own_rslora_scale_where_they_are_fused(
    bases: Callable[[Architecture], Path], tmp_path: Path, name: str
) -> None:
    architecture = ARCHITECTURES[name]
    pattern = r"experts\.\d+\.(w[123]|gate_proj|up_proj|down_proj)"
    check_old(bases(architecture), architecture, pattern, tmp_path, use_rslora=True)


# -- files that mislead ------------------------------------------------------------------------------


def test_patterns_whose_order_the_file_has_lost_are_reported_with_every_value(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", FAMILIES["llama"])
    order = {"q_proj": 2, "layers.0.self_attn.q_proj": 3}
    wrapped = adapt(load_llama(base), target_modules=["q_proj"], alpha_pattern=order)
    wrapped.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["alpha_pattern"]
    assert list(saved) == list(reversed(order)), "PEFT sorts what it saves"
    report = loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    (note,) = [note for note in map(str, report.notes) if "alpha" in note]
    assert "layers.0.self_attn.q_proj" in note
    assert {"2", "3"} <= set(re.findall(r"\b\d\b", note))


def load_llama(base: Path) -> Any:
    return FAMILIES["llama"].cls.from_pretrained(base)


def test_modules_that_peft_dropped_while_saving_are_reported(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", FAMILIES["llama"])
    wrapped = adapt(load_llama(base), target_modules=["q_proj", "v_proj"])
    wrapped.add_adapter("v_proj", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    wrapped.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    assert not any("v_proj" in key for key in read_tensors(tmp_path / "adapter" / "adapter_model.safetensors"))
    report = loratool.merge(base, tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "out")
    assert any("v_proj" in note for note in map(str, report.notes)), report.notes


# -- precision ---------------------------------------------------------------------------------------


def test_experts_and_embeddings_in_half_precision_are_rounded_once(tmp_path: Path) -> None:
    mixtral = ARCHITECTURES["mixtral"]
    settings: dict[str, Any] = {
        "target_modules": ["embed_tokens"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    case = train(tmp_path, mixtral, **settings)
    tensors = {name: tensor.bfloat16() for name, tensor in read_tensors(case.base).items()}
    save_file(tensors, case.base / "model.safetensors", {"format": "pt"})
    loratool.merge(case.base, case.adapter, tmp_path / "out")
    after, saved = read_tensors(tmp_path / "out"), read_tensors(case.adapter)
    a, b = (saved[f"{PREFIX}model.embed_tokens.lora_embedding_{side}"].double() for side in "AB")
    exact = {"model.embed_tokens.weight": (b @ a).T * ALPHA / RANK}
    terms = {"model.embed_tokens.weight": (b.abs() @ a.abs()).T * ALPHA / RANK}
    for layer in range(2):
        module = f"{PREFIX}model.layers.{layer}.mlp.experts"
        for prefix, parts in (("base_layer.", ("w1", "w3")), ("", ("w2",))):
            a, b = (saved[f"{module}.{prefix}lora_{side}.weight"].double() for side in "AB")
            for expert in range(EXPERTS):
                up, down = b[:, expert::EXPERTS], a[expert * RANK : (expert + 1) * RANK]
                halves = (up @ down).chunk(len(parts)), (up.abs() @ down.abs()).chunk(len(parts))
                for part, change, term in zip(parts, *halves, strict=True):
                    name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
                    exact[name], terms[name] = change * ALPHA / RANK, term * ALPHA / RANK
    assert len(exact) == 1 + 2 * 3 * EXPERTS
    for name, change in exact.items():
        before = tensors[name].double()
        wanted = Exact(before + change, before.abs() + terms[name])
        assert_single_rounding(after[name], wanted, name)
