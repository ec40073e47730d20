"""Experts that are apart on disk and one parameter in memory: PEFT stacks their factors, which takes one rank."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from checkpoints import seeded
from matrix_models import ARCHITECTURES
from oracle import read_tensors
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool

if TYPE_CHECKING:
    from loratool.notes import Note

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
MODELS = ["mixtral", "qwen3_moe"]


def is_expert(name: str) -> bool:
    return ".experts." in name


def build(folder: Path, name: str, changed: Callable[[str], int]) -> tuple[Path, Path]:
    """A tiny model on disk, and a copy in which each tensor has a difference of the rank that `changed` says."""
    made = ARCHITECTURES[name]
    config = made.config()
    config.mlp_only_layers = []  # its dense layers are looked at apart
    torch.manual_seed(3)
    base, tuned = folder / "base", folder / "tuned"
    made.cls(config).save_pretrained(base)
    shutil.copytree(base, tuned)
    tensors = read_tensors(base)
    for at, (key, tensor) in enumerate(tensors.items()):
        if rank := changed(key):
            up, down = (torch.randn(size, generator=seeded(2 * at + one), dtype=torch.float64)
                        for one, size in enumerate(((tensor.shape[0], rank), (rank, tensor.shape[1]))))  # fmt: skip
            tensors[key] = (tensor.double() + 0.02 * up @ down).float()
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    return base, tuned


def uneven(key: str) -> int:
    """Ranks 1 to 3 for most experts, none for expert 2, and more for another layer."""
    if key.endswith("q_proj.weight"):
        return 5
    return 1 + sum(key.encode()) % 3 if is_expert(key) and ".experts.2." not in key else 0


def load(name: str, folder: Path) -> Any:
    return ARCHITECTURES[name].cls.from_pretrained(folder).eval()


def merged_by_peft(name: str, base: Path, adapter: Path) -> dict[str, Tensor]:
    """The model with an adapter merged by PEFT, which finds a tensor for every factor that it makes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        wrapped = PeftModel.from_pretrained(load(name, base), adapter)
    found: dict[str, Tensor] = wrapped.merge_and_unload().state_dict()
    return found


def assert_peft_makes(name: str, base: Path, adapter: Path, wanted: dict[str, Tensor]) -> None:
    found = merged_by_peft(name, base, adapter)
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-6, msg=key)


def expert_ranks(adapter: Path) -> set[int]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {tensor.shape[0] for key, tensor in tensors.items() if is_expert(key) and "lora_A" in key}


def told(report: Any, code: str) -> list[Note]:
    return [note for note in report.notes if note.code == code]


@pytest.mark.parametrize("rule", [{"rank": 5}, {"energy": 0.99999999}, {"rank": "auto", "max_rank": 12}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_extracted_experts_have_one_rank_and_peft_makes_the_tuned_model_of_them(
    name: str, rule: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever each expert's own rank, all of them get the largest, zeros where one differs less or not at all; the
    note says how many, and PEFT makes the tuned model out of the base with the adapter.
    """
    base, tuned = build(tmp_path, name, uneven)
    report = loratool.extract(base, tuned, tmp_path / "out", exact=True, **rule)
    (rank,) = expert_ranks(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert not [pattern for pattern in config["rank_pattern"] if "experts" in pattern]
    assert rank == max(layer.rank for target, layer in report.modules.items() if is_expert(target))
    (note,) = told(report, "experts-one-rank")
    assert f"rank {rank}" in note.text
    assert_peft_makes(name, base, tmp_path / "out", load(name, tuned).state_dict())


def test_experts_that_are_excluded_get_zeros_beside_those_that_are_not(tmp_path: Path) -> None:
    """`--exclude` of one expert leaves its weights as the base has them, and the others as they were tuned."""
    base, tuned = build(tmp_path, "mixtral", lambda key: 2 if is_expert(key) else 0)
    loratool.extract(base, tuned, tmp_path / "out", rank=2, exact=True, exclude=[r"experts\.1\."])
    tensors = read_tensors(tuned) | {k: t for k, t in read_tensors(base).items() if ".experts.1." in k}
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    assert_peft_makes("mixtral", base, tmp_path / "out", load("mixtral", tuned).state_dict())


def test_experts_that_differ_by_rounding_only_are_left_out(tmp_path: Path) -> None:
    """Where no expert differs by more than its dtype rounds, no expert has factors."""
    base, tuned = build(tmp_path, "mixtral", lambda key: 4 if key.endswith("q_proj.weight") else 0)
    tensors = read_tensors(tuned)
    for at, key in enumerate(filter(is_expert, list(tensors))):
        some = torch.rand(tensors[key].shape, generator=seeded(at)) < 0.01
        tensors[key] = torch.where(some, torch.nextafter(tensors[key], -tensors[key]), tensors[key])
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    report = loratool.extract(base, tuned, tmp_path / "out")
    assert not expert_ranks(tmp_path / "out")
    assert set(filter(is_expert, tensors)) <= set(report.noise)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and an adapter of rank 5 of its experts one by one, whose singular values fall unevenly."""
    folder = tmp_path_factory.mktemp("split")
    base, tuned = build(folder, "mixtral", lambda key: 5 if is_expert(key) or "q_proj" in key else 0)
    loratool.extract(base, tuned, folder / "adapter", rank=5, exact=True)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    for at, key in enumerate(sorted(k for k in tensors if "lora_A" in k)):
        falling = (0.2 + 0.15 * (at % 5)) ** torch.arange(5)
        tensors[key] = tensors[key] * falling[:, None]
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    return base, folder / "adapter"


COMMANDS: dict[str, tuple[Callable[[Path, Path], Any], bool]] = {  # and whether ranks were made one
    "resize by rank": (lambda given, out: loratool.resize(given, out, rank=3), False),
    "resize by energy": (lambda given, out: loratool.resize(given, out, energy=0.995), True),
    "resize by error": (lambda given, out: loratool.resize(given, out, error=0.1), True),
    "resize by ratio": (lambda given, out: loratool.resize(given, out, ratio=20), True),
    "resize by budget": (lambda given, out: loratool.resize(given, out, budget=9000), False),
    "combine": (lambda given, out: loratool.combine([given, given], out, weights=[0.75, 0.25]), False),
    "combine on knots": (
        lambda given, out: loratool.combine([given, given], out, method="ties", space="knots", density=0.9), False,
    ),
    "rescale": (lambda given, out: loratool.rescale(given, out, scale=0.5), False),
    "rescale, baked": (lambda given, out: loratool.rescale(given, out, scale=0.5, bake=True), False),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_experts_of_every_output_have_one_rank_and_peft_adds_what_a_merge_adds(
    split: tuple[Path, Path], command: str, tmp_path: Path
) -> None:
    """Whichever rule gives ranks, those of the experts are one, PEFT loads the output, and the merged model that it
    makes is the one that the factors of the file make in float64.
    """
    base, adapter = split
    run, evened = COMMANDS[command]
    report = run(adapter, tmp_path / "out")
    assert len(expert_ranks(tmp_path / "out")) == 1
    assert bool(told(report, "experts-one-rank")) == evened
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors, wanted = load_file(tmp_path / "out" / "adapter_model.safetensors"), read_tensors(base)
    for key in (k for k in tensors if k.endswith("lora_A.weight")):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = config["rank_pattern"].get(module, config["r"])
        assert rank == tensors[key].shape[0]
        scale = config["alpha_pattern"].get(module, config["lora_alpha"]) / rank
        change = tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        wanted[f"{module}.weight"] = (wanted[f"{module}.weight"].double() + scale * change).float()
    merged = tmp_path / "merged"
    shutil.copytree(base, merged)
    save_file(wanted, merged / "model.safetensors", {"format": "pt"})
    assert_peft_makes("mixtral", base, tmp_path / "out", load("mixtral", merged).state_dict())


def test_experts_of_two_ranks_are_combined_at_one(split: tuple[Path, Path], tmp_path: Path) -> None:
    """An adapter of all layers and one of the experts of one layer only, whose ranks add up unevenly."""
    base, adapter = split
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if "layers.0" in k}, other / "adapter_model.safetensors")
    report = loratool.combine([adapter, other], tmp_path / "out")
    assert expert_ranks(tmp_path / "out") == {10}
    (note,) = told(report, "experts-one-rank")
    assert "rank 10" in note.text
    merged_by_peft("mixtral", base, tmp_path / "out")


def test_alphas_that_differ_between_experts_are_baked(split: tuple[Path, Path], tmp_path: Path) -> None:
    """PEFT gives all experts one α; a factor for some of them is refused, with `--bake` as a way out that works."""
    base, adapter = split
    with pytest.raises(loratool.InputError, match="--bake"):
        loratool.rescale(adapter, tmp_path / "out", match={r"experts\.1\.": 0.5})
    loratool.rescale(adapter, tmp_path / "out", match={r"experts\.1\.": 0.5}, bake=True)
    found, before = (merged_by_peft("mixtral", base, a) for a in (tmp_path / "out", adapter))
    plain = load("mixtral", base).state_dict()
    name = "model.layers.1.mlp.experts.down_proj"
    torch.testing.assert_close(
        found[name][1] - plain[name][1], (before[name][1] - plain[name][1]) / 2, rtol=0, atol=2e-7
    )
    torch.testing.assert_close(found[name][2], before[name][2], rtol=0, atol=2e-7)


def test_one_alpha_for_all_experts_is_the_config_s(split: tuple[Path, Path], tmp_path: Path) -> None:
    """A factor for all experts ends in `lora_alpha`, which PEFT takes for them, and others get patterns."""
    base, adapter = split
    loratool.rescale(adapter, tmp_path / "out", match={r"experts\.": 0.5})
    found, before = (merged_by_peft("mixtral", base, a) for a in (tmp_path / "out", adapter))
    plain = load("mixtral", base).state_dict()
    for name, factor in (("mlp.experts.gate_up_proj", 0.5), ("self_attn.q_proj.weight", 1.0)):
        key = f"model.layers.0.{name}"
        torch.testing.assert_close(found[key] - plain[key], factor * (before[key] - plain[key]), rtol=0, atol=2e-7)


def test_dense_layers_that_peft_loses_beside_experts_are_a_warning(tmp_path: Path) -> None:
    """PEFT takes `mlp.gate_proj` of a dense layer for an expert's and passes over its factors; the note says so, and
    that `loratool merge` applies them is true.
    """
    made = ARCHITECTURES["qwen3_moe"]
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    torch.manual_seed(3)
    made.cls(made.config()).save_pretrained(base)
    shutil.copytree(base, tuned)
    tensors = read_tensors(base)
    for at, key in enumerate(k for k in tensors if "mlp" in k and "proj" in k):
        up, down = (torch.randn(size, 2, generator=seeded(at)) for size in tensors[key].shape)
        tensors[key] = tensors[key] + 0.02 * up @ down.T
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    report = loratool.extract(base, tuned, tmp_path / "out", rank=2, exact=True)
    (note,) = told(report, "peft-loses-layers")
    assert note.is_warning
    assert "model.layers.0.mlp.down_proj.weight" in note.text
    key = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(merged_by_peft("qwen3_moe", base, tmp_path / "out")[key], read_tensors(base)[key])
    loratool.merge(base, [tmp_path / "out"], tmp_path / "merged")
    torch.testing.assert_close(read_tensors(tmp_path / "merged")[key], tensors[key], rtol=0, atol=2e-6)
    assert transformers.__version__.split(".")[0] == "5", "whose models hold experts in one parameter"
