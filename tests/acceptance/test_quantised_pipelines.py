"""Pipelines with quantised components: diffusers writes them, and loads what a merge makes of them.

Needs what `make acceptance` installs. diffusers asks for a GPU before it quantises; the libraries compute on a CPU too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import loratool

if TYPE_CHECKING:
    from pathlib import Path

diffusers = pytest.importorskip("diffusers")

# The last one is at the top of the model, and blocks have layers of the same name.
TARGETS = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp", "proj_out")
MODULES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "quanto": "optimum.quanto", "torchao": "torchao.quantization"}


def how(kind: str) -> Any:
    """The config with which diffusers quantises a model."""
    library = pytest.importorskip(MODULES[kind])
    if kind == "nf4":
        return diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    if kind == "int8":
        return diffusers.BitsAndBytesConfig(load_in_8bit=True)
    if kind == "quanto":
        return diffusers.QuantoConfig(weights_dtype="int8")
    return diffusers.TorchAoConfig(library.Int8WeightOnlyConfig(version=2))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizers = pytest.importorskip("diffusers.quantizers.auto").AUTO_QUANTIZER_MAPPING
    for kind in ("bitsandbytes_4bit", "bitsandbytes_8bit", "quanto"):
        quantizer = quantizers[kind]
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda _, given: given or {"": "cpu"})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flux of two blocks of each kind, in bfloat16, of widths that kernels of 4 bits for CPUs take."""
    folder: Path = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(4, 4, 8),
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def opened(folder: Path, **more: object) -> Any:
    return diffusers.FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16, **more).eval()


def output_of(model: Any) -> Tensor:
    torch.manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 6, 64),
        "encoder_hidden_states": torch.randn(1, 4, 64),
        "pooled_projections": torch.randn(1, 64),
    }
    with torch.no_grad():
        found: Tensor = model(
            **{name: value.bfloat16() for name, value in inputs.items()},
            timestep=torch.tensor([0.5]).bfloat16(),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(4, 3),
        ).sample
    return found.float()


@pytest.mark.parametrize("kind", MODULES)
def test_diffusers_loads_a_pipeline_whose_edited_weights_are_plain(kind: str, plain: Path, tmp_path: Path) -> None:
    """It computes what the base does with the adapter, and all that was not edited is quantised still."""
    config = how(kind)
    pipeline = tmp_path / "pipeline"
    opened(plain, quantization_config=config).save_pretrained(pipeline / "transformer")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    base = opened(pipeline / "transformer")
    factors: dict[str, Tensor] = {}
    for name in TARGETS:
        layer = base.get_submodule(name)
        down, up = torch.randn(4, layer.in_features) * 0.3, torch.randn(layer.out_features, 4) * 0.3
        factors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    save_file(factors, tmp_path / "lora.safetensors")
    loratool.merge(pipeline, tmp_path / "lora.safetensors", tmp_path / "out", device="cpu")
    merged = opened(tmp_path / "out" / "transformer")

    before = output_of(base)
    for name in TARGETS:
        down, up = (factors[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        product = (up @ down).T

        def add(_: nn.Module, inputs: tuple[Tensor, ...], found: Tensor, product: Tensor = product) -> Tensor:
            return found + (inputs[0].float() @ product).to(found.dtype)

        base.get_submodule(name).register_forward_hook(add)
    wanted = output_of(base)
    error = torch.linalg.vector_norm(output_of(merged) - wanted) / torch.linalg.vector_norm(wanted - before)
    assert error < 0.05
    quantised = type(merged.get_submodule("transformer_blocks.1.attn.to_k").weight)
    assert quantised is type(base.get_submodule("transformer_blocks.1.attn.to_k").weight) is not nn.Parameter
    for name in TARGETS:
        assert type(merged.get_submodule(name).weight) is nn.Parameter
        assert merged.get_submodule(name).weight.dtype == torch.bfloat16
    assert (
        loratool.verify(tmp_path / "out", base=pipeline, adapters=tmp_path / "lora.safetensors", device="cpu").exit_code
        == 0
    )
