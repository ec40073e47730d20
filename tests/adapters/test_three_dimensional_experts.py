"""LoRA on experts with one tensor for all: (experts, r, in) with (experts, out, r), either side shared by all as (1, …).

The oracle is α/r · B[e] @ A[e] in float64, put where each kind of checkpoint keeps the layers of its experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import save_model
from expert_routers import build
from oracle import read_tensors
from peft import PeftModel
from peft_files import save_peft
from torch import Tensor

import loratool

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
LAYERS, EXPERTS, HIDDEN, MIDDLE, RANK, SCALE = 2, 3, 6, 5, 2, 1.5
Tensors = dict[str, Tensor]
NAMES = {
    "fused": ("gate_up_proj", "down_proj"),
    "by layer": ("gate_proj", "up_proj", "down_proj"),
    "numbered": ("w1", "w3", "w2"),
}
SHARED = {"each": (False, False), "the outer sides": (True, True), "the first A": (True, False)}


def draw(*sizes: int, seed: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)) * 0.3


def factors(names: str, shared: str, hidden: int = HIDDEN, middle: int = MIDDLE, experts: int = EXPERTS) -> Tensors:
    """By `<layer>.<name>.<side>`; of a pair that is shared the outer side: A of what reads hidden states, B of down."""
    first, last = SHARED[shared]
    found: Tensors = {}
    for layer in range(LAYERS):
        for number, name in enumerate(NAMES[names]):
            down = number == len(NAMES[names]) - 1
            rows = hidden if down else 2 * middle if names == "fused" else middle
            columns = middle if down else hidden
            seed = 10 * layer + number
            found[f"{layer}.{name}.A"] = draw(1 if first and not down else experts, RANK, columns, seed=seed)
            found[f"{layer}.{name}.B"] = draw(1 if last and down else experts, rows, RANK, seed=seed + 100)
    return found


def write(folder: Path, stored: Tensors, container: str = "mlp.experts", rank: int = RANK) -> Path:
    start = "base_model.model.model.layers."
    tensors: Tensors = {}
    for key, tensor in stored.items():
        layer, name, side = key.split(".")
        tensors[f"{start}{layer}.{container}.{name.replace('/', '.')}.lora_{side}.weight"] = tensor.contiguous()
    return save_peft(folder, tensors, r=rank, lora_alpha=SCALE * rank, target_modules="all-linear")


def changes(stored: Tensors, names: str, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """ΔW of gate, up and down of every expert of a layer, (experts, out, in) each, in float64."""
    deltas = []
    for name in NAMES[names]:
        a, b = (stored[f"{layer}.{name}.{side}"].double() for side in "AB")
        count = max(a.shape[0], b.shape[0])
        deltas.append(SCALE * torch.stack([b[e % b.shape[0]] @ a[e % a.shape[0]] for e in range(count)]))
    if names == "fused":
        half = deltas[0].shape[1] // 2
        return deltas[0][:, :half], deltas[0][:, half:], deltas[1]
    gate, up, down = deltas
    return gate, up, down


def split(called: tuple[str, str, str], container: str) -> Callable[..., Tensors]:
    """Where a layer's deltas go in a checkpoint with a tensor for each expert and layer."""

    def place(layer: int, *deltas: Tensor) -> Tensors:
        found: Tensors = {}
        for name, delta in zip(called, deltas, strict=True):
            for expert, each in enumerate(delta):
                found[f"model.layers.{layer}.{container}.experts.{expert}.{name}.weight"] = each
        return found

    return place


def fused(layer: int, gate: Tensor, up: Tensor, down: Tensor) -> Tensors:
    start = f"model.layers.{layer}.mlp.experts."
    return {f"{start}gate_up_proj": torch.cat([gate, up], dim=1), f"{start}down_proj": down}


def interleaved(layer: int, gate: Tensor, up: Tensor, down: Tensor) -> Tensors:
    """As gpt-oss has it: stored (in, out), gate and up taking turns."""
    both = torch.stack([gate, up], dim=2).flatten(1, 2)
    start = f"model.layers.{layer}.mlp.experts."
    return {f"{start}gate_up_proj": both.transpose(1, 2), f"{start}down_proj": down.transpose(1, 2)}


# kind of checkpoint → (model_type, where deltas go)
BASES: dict[str, tuple[str, Callable[..., Tensors]]] = {
    "a tensor an expert": ("qwen3_moe", split(("gate_proj", "up_proj", "down_proj"), "mlp")),
    "a tensor an expert, numbered": ("mixtral", split(("w1", "w3", "w2"), "block_sparse_moe")),
    "one for all": ("qwen3_5_moe", fused),
    "one for all, in turns": ("gpt_oss", interleaved),
}


def write_base(folder: Path, kind: str, **sizes: int) -> tuple[Path, Tensors]:
    model_type, place = BASES[kind]
    like = factors("by layer", "each", **sizes)
    shapes = {n: t for layer in range(LAYERS) for n, t in place(layer, *changes(like, "by layer", layer)).items()}
    weights = {name: draw(*tensor.shape, seed=7 + at) for at, (name, tensor) in enumerate(shapes.items())}
    save_model(
        folder,
        weights,
        {"model_type": model_type, "num_local_experts": EXPERTS},
    )
    return folder, weights


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", BASES)
def test_stacked_factors_are_merged_into_every_kind_of_checkpoint(
    tmp_path: Path, kind: str, names: str, shared: str
) -> None:
    """A fused parameter of gpt-oss is in turns in the adapter as well; layers by name are found there all the same."""
    base, weights = write_base(tmp_path / "base", kind)
    stored = factors(names, shared)
    place = BASES[kind][1]
    wanted = {name: tensor.double() for name, tensor in weights.items()}
    for layer in range(LAYERS):
        gate, up, down = changes(stored, names, layer)
        if kind == "one for all, in turns" and names == "fused":
            both = torch.cat([gate, up], dim=1)
            gate, up = both[:, 0::2], both[:, 1::2]
        for name, delta in place(layer, gate, up, down).items():
            wanted[name] = wanted[name] + delta
    loratool.merge(base, [write(tmp_path / "adapter", stored)], tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert float((found[name].double() - tensor).abs().max()) <= 1e-6, name


def numbered_apart(stored: Tensors) -> Tensors:
    """Sides of each expert as matrices with its number in their names; those that all share stay as they are."""
    found: Tensors = {}
    for key, tensor in stored.items():
        layer, name, side = key.split(".")
        each = {f"{layer}.{number}/{name}.{side}": t for number, t in enumerate(tensor)}
        found |= {key: tensor} if tensor.shape[0] == 1 else each
    return found


@pytest.mark.parametrize("kind", BASES)
def test_a_side_that_all_experts_share_goes_with_those_that_have_a_number(tmp_path: Path, kind: str) -> None:
    """As Megatron-Bridge writes them for SGLang: `experts.up_proj.lora_A` (1, r, in) and `experts.3.up_proj.lora_B`."""
    base, weights = write_base(tmp_path / "base", kind)
    stored = factors("by layer", "the outer sides")
    adapter = write(tmp_path / "adapter", numbered_apart(stored))
    loratool.merge(base, [adapter], tmp_path / "out")
    loratool.rescale(adapter, tmp_path / "plain", scale=1.0)
    loratool.merge(base, [tmp_path / "plain"], tmp_path / "second")
    for found in map(read_tensors, (tmp_path / "out", tmp_path / "second")):
        for layer in range(LAYERS):
            for name, delta in BASES[kind][1](layer, *changes(stored, "by layer", layer)).items():
                assert float((found[name].double() - weights[name].double() - delta).abs().max()) <= 1e-6, name


@pytest.mark.parametrize("number", ["", "999999999", "9" * 5000, "²"])
def test_an_expert_without_its_side_is_named(tmp_path: Path, number: str) -> None:
    """Also where another one has a number that nobody can count to, or none."""
    base, _ = write_base(tmp_path / "base", "one for all")
    stored = numbered_apart(factors("by layer", "the outer sides"))
    lost = stored.pop("0.1/up_proj.B")
    if number:
        stored[f"0.{number}/up_proj.B"] = lost
    with pytest.raises(loratool.InputError, match=r"layers\.0\.mlp\.experts\.up_proj: expert 1 has no factors"):
        loratool.merge(base, [write(tmp_path / "adapter", stored)], tmp_path / "out")


@pytest.mark.parametrize("kind", ["one for all", "one for all, in turns"])
def test_square_experts_go_by_the_class_of_the_model(tmp_path: Path, kind: str) -> None:
    """Where a down projection is square no shape tells how it is stored; A acts on inputs, and the class says where."""
    base, weights = write_base(tmp_path / "base", kind, middle=HIDDEN)
    stored = {k: t for k, t in factors("fused", "each", middle=HIDDEN).items() if "down_proj" in k}
    loratool.merge(base, [write(tmp_path / "adapter", stored)], tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    for layer in range(LAYERS):
        a, b = (stored[f"{layer}.down_proj.{side}"].double() for side in "AB")
        delta = SCALE * b @ a
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        wanted = weights[name].double() + (delta if kind == "one for all" else delta.transpose(1, 2))
        assert float((found[name].double() - wanted).abs().max()) <= 1e-6


REWORKED: dict[str, tuple[Callable[[Path, Path], object], float]] = {
    "rescale": (lambda source, out: loratool.rescale(source, out, scale=0.5), 0.5),
    "resize": (lambda source, out: loratool.resize(source, out, rank=6), 1.0),
    "combine": (lambda source, out: loratool.combine([source, source], out, weights=[1.0, 0.5]), 1.5),
}


@pytest.mark.parametrize("names", ["fused", "numbered"])
@pytest.mark.parametrize("name", REWORKED)
def test_outputs_are_in_peft_own_layout(tmp_path: Path, name: str, names: str) -> None:
    """PEFT loads each output key for key, and its merge is W + k · ΔW."""
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    stored = factors(names, "the outer sides", hidden=16, middle=12, experts=4)
    rework, strength = REWORKED[name]
    rework(write(tmp_path / "adapter", stored), tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    result = loaded.load_adapter(tmp_path / "out", "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key and ".again" in key]
    found = loaded.merge_and_unload(adapter_names=["default"]).state_dict()
    before = model.state_dict()
    for layer in range(LAYERS):
        for target, delta in fused(layer, *changes(stored, names, layer)).items():
            wanted = before[target].double() + strength * delta
            assert float((found[target].double() - wanted).abs().max()) <= 2e-6, target


def test_every_element_is_counted_once(tmp_path: Path) -> None:
    """A side that all experts share is one tensor, whatever number of layers it is of."""
    stored = factors("numbered", "the outer sides")
    facts = loratool.inspect(write(tmp_path / "adapter", stored))
    assert isinstance(facts, loratool.AdapterFacts)
    assert sum(target.parameters for target in facts.targets) == sum(tensor.numel() for tensor in stored.values())


def test_values_that_are_not_finite_are_named_with_their_expert(tmp_path: Path) -> None:
    base, _ = write_base(tmp_path / "base", "a tensor an expert")
    stored = factors("numbered", "each")
    stored["1.w3.B"][2, 0, 0] = float("nan")
    with pytest.raises(loratool.InputError, match=r"layers\.1\.mlp\.experts\.w3\.lora_B\.weight\[2\] contains NaN"):
        loratool.merge(base, [write(tmp_path / "adapter", stored)], tmp_path / "out")


def test_layers_whose_sides_are_all_shared_are_refused(tmp_path: Path) -> None:
    """Nothing in the file tells how many experts there are."""
    base, _ = write_base(tmp_path / "base", "a tensor an expert")
    stored = {key: tensor[:1] for key, tensor in factors("numbered", "each").items()}
    with pytest.raises(loratool.InputError, match="the number of experts is not recorded"):
        loratool.merge(base, [write(tmp_path / "adapter", stored)], tmp_path / "out")


def test_a_fused_parameter_whose_sides_are_both_shared_changes_every_expert_alike(tmp_path: Path) -> None:
    base, weights = write_base(tmp_path / "base", "one for all")
    stored = {key: tensor[:1] for key, tensor in factors("fused", "each").items()}
    loratool.merge(base, [write(tmp_path / "adapter", stored)], tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    for layer in range(LAYERS):
        for name, delta in fused(layer, *changes(stored, "fused", layer)).items():
            assert float((found[name].double() - weights[name].double() - delta).abs().max()) <= 1e-6


def test_a_number_of_experts_that_the_base_has_not_does_not_fit(tmp_path: Path) -> None:
    base, _ = write_base(tmp_path / "base", "one for all")
    with pytest.raises(loratool.FitError, match="gate_up_proj"):
        loratool.merge(base, [write(tmp_path / "a", factors("fused", "each", experts=2))], tmp_path / "out")


def test_a_rank_that_the_config_denies_is_refused(tmp_path: Path) -> None:
    base, _ = write_base(tmp_path / "base", "one for all")
    with pytest.raises(loratool.InputError, match="says r = 5, but the tensors have rank 2"):
        loratool.merge(base, [write(tmp_path / "a", factors("fused", "each"), rank=5)], tmp_path / "out")
