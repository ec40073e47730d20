"""Adapters of LLM trainers are merged to what the trainers' own code makes of them.

loralib is imported. torchtune and litgpt come with much that is not needed here, so of each the one file that counts is run
by itself, with names in the place of what it imports; `pip install --no-deps torchtune litgpt` suffices.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import save_model
from peft_files import save_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trainer_layouts import HEADS, HIDDEN, KEY_HEADS, RANK, WIDTH, numbers, shapes, weights, write_base

import loratool

ALPHA = 3
SCALE = ALPHA / RANK
LAYER = "model.layers.0"


class Anything(ModuleType):
    """A module that has every name, each a module of torch without contents."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or type(name, (nn.Module,), {})


def code_of(package: str, path: str, monkeypatch: pytest.MonkeyPatch, *imported: str) -> dict[str, Any]:
    """The names that one file of a package defines; the test is skipped where the package is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    for name in imported:
        monkeypatch.setitem(sys.modules, name, Anything(name))
    return runpy.run_path(str(Path(spec.submodule_search_locations[0], path)))


def merged(base: Path, adapter: Path, out: Path) -> dict[str, Tensor]:
    loratool.merge(base, adapter, out, device="cpu")
    return weights(out)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_torchtune_converts_what_it_merged_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dora: bool
) -> None:
    """The base goes to torchtune's layout, its update is added there, and the sum comes back."""
    code = code_of("torchtune", "models/convert_weights.py", monkeypatch)
    base = write_base(tmp_path / "base")
    heads = {"num_heads": HEADS, "num_kv_heads": KEY_HEADS, "dim": HIDDEN, "head_dim": WIDTH}
    # what it reshapes by the model's width are queries and keys, whose inputs are as wide
    theirs = code["hf_to_tune"]({f"{name}.weight": weight for name, weight in weights(base).items()}, **heads)
    tensors: dict[str, Tensor] = {}
    for at, name in enumerate(sorted(name for name in theirs if name.startswith("layers.0.attn"))):
        weight, module = theirs[name], name.removesuffix(".weight")
        a, b = numbers(RANK, weight.shape[1], seed=at), numbers(weight.shape[0], RANK, seed=at + 9)
        tensors |= {f"{module}.lora_a.weight": a, f"{module}.lora_b.weight": b}
        moved = weight + SCALE * (b.double() @ a.double())
        if dora:
            tensors[f"{module}.magnitude"] = lengths = numbers(weight.shape[0], seed=at).abs() + 1
            moved *= lengths.double()[:, None] / moved.norm(dim=1, keepdim=True)
        theirs[name] = moved
    adapter = tmp_path / "adapter"
    save_peft(adapter, tensors, r=RANK, lora_alpha=ALPHA)
    wanted = code["tune_to_hf"](theirs, **heads)
    found = merged(base, adapter, tmp_path / "out")
    assert {f"{name}.weight" for name in found} == wanted.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[f"{name}.weight"], rtol=3e-7, atol=1e-7)


def test_torchtune_exports_the_same_factors_to_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own export is read as PEFT's, and merges to the same bytes."""
    code = code_of("torchtune", "models/convert_weights.py", monkeypatch)
    base = write_base(tmp_path / "base")
    tensors: dict[str, Tensor] = {}
    for at, (leaf, ours) in enumerate({"q_proj": "q_proj", "k_proj": "k_proj", "output_proj": "o_proj"}.items()):
        rows, columns = shapes()[f"{LAYER}.self_attn.{ours}"]
        tensors[f"layers.0.attn.{leaf}.lora_a.weight"] = numbers(RANK, columns, seed=at)
        tensors[f"layers.0.attn.{leaf}.lora_b.weight"] = numbers(rows, RANK, seed=at + 9)
    exported = code["tune_to_peft_adapter_weights"](tensors, HEADS, KEY_HEADS, HIDDEN, WIDTH)
    config = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"}
    for name, stored in (("native", tensors), ("peft", exported)):
        save_peft(tmp_path / name, stored, **config)
        loratool.merge(base, tmp_path / name, tmp_path / f"{name}-out", device="cpu")
    one, other = (tmp_path / f"{name}-out" / "model.safetensors" for name in ("native", "peft"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("parts", [(True, True, True), (True, False, True), (False, True, True), (True, True, False)])
def test_litgpt_merges_its_fused_layer_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[bool, bool, bool]
) -> None:
    """`LoRAQKVLinear` on the rows of queries, keys and values one below the other, with fewer heads of keys."""
    names = ("litgpt", "litgpt.config", "litgpt.model", "litgpt.scripts", "litgpt.scripts.convert_hf_checkpoint")
    code = code_of("litgpt", "lora.py", monkeypatch, *names, "litgpt.utils")
    base = write_base(tmp_path / "base")
    modules = [f"{LAYER}.self_attn.{part}_proj" for part in "qkv"]
    stacked = torch.cat([weights(base)[module] for module in modules])
    layer = code["LoRAQKVLinear"](
        HIDDEN, stacked.shape[0], WIDTH, HEADS, KEY_HEADS, r=RANK, lora_alpha=ALPHA, enable_lora=parts, bias=False
    )
    layer.linear.weight.data = stacked
    layer.lora_A.data, layer.lora_B.data = (
        numbers(*t.shape, seed=n) for n, t in enumerate((layer.lora_A, layer.lora_B))
    )
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stored = {f"transformer.h.0.attn.qkv.lora_{side}": getattr(layer, f"lora_{side}").data for side in "AB"}
    save_file(stored, adapter / "lit_model.lora.safetensors")
    told = zip(("lora_query", "lora_key", "lora_value"), parts, strict=True)
    lines = [f"lora_r: {RANK}", f"lora_alpha: {ALPHA}", *(f"{name}: {str(on).lower()}" for name, on in told)]
    (adapter / "hyperparameters.yaml").write_text("\n".join(lines))
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.double(), layer.lora_B.data.double()
    layer.merge()
    found = merged(base, adapter, tmp_path / "out")
    torch.testing.assert_close(
        torch.cat([found[module] for module in modules]), layer.linear.weight.data, rtol=3e-7, atol=1e-7
    )


@pytest.mark.parametrize("turned", [False, True], ids=["(out, in)", "(in, out)"])
def test_loralib_merges_its_layers_to_the_same_weights(tmp_path: Path, turned: bool) -> None:
    """Linear layers and one of parts, in either orientation, an embedding, and a convolution."""
    lora = pytest.importorskip("loralib")
    strength: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA}
    model = nn.ModuleDict(
        {
            "plain": lora.Linear(4, 6, fan_in_fan_out=turned, **strength),
            "embed_tokens": lora.Embedding(10, 4, **strength),
            "conv": lora.Conv2d(4, 6, 3, **strength),
            "parts": lora.MergedLinear(4, 12, enable_lora=[True, False, True], fan_in_fan_out=turned, **strength),
        }
    ).double()
    for at, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data = numbers(*parameter.shape, seed=at).double()
    base = tmp_path / "base"
    own = {name: t.clone().contiguous() for name, t in model.state_dict().items() if "lora_" not in name}
    save_model(base, own, {"model_type": "thing"})
    header = {"lora_alpha": str(ALPHA), "enable_lora": "true,false,true"}
    factors = {name.replace("conv.lora", "conv.conv.lora"): t for name, t in lora.lora_state_dict(model).items()}
    save_file(factors, tmp_path / "lora.safetensors", header)
    loratool.merge(base, tmp_path / "lora.safetensors", tmp_path / "out", device="cpu")
    model.eval()  # which merges
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in own.items():
        wanted = model.state_dict()[name]
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-12)
        assert name.endswith("bias") or not torch.equal(wanted, weight)
