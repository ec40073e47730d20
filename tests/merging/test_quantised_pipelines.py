"""Merges into pipelines with quantised components: each is read by its own config, and what is written is told there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from oracle import nearest
from packed_bnb import FourBit
from quantised_models import fp8
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.results.facts import CheckpointFacts

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 64
TO_Q, TO_K = (f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k"))
PROJ = "proj_out"  # at the top of the model, and the last part of the name of another one
INNER = "single_transformer_blocks.0.proj_out"
TEXT = "encoder.block.0.layer.0.SelfAttention"
DENOISER, ENCODER = "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": None}


def write_json(path: Path, table: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table))


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    """What the packed weights of the pipeline are, by name in it."""
    return {}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Tensor]) -> Path:
    """A transformer in nf4, as diffusers saves it, and a text encoder in FP8, as transformers does."""
    root: Path = tmp_path_factory.mktemp("pipeline")
    tensors: dict[str, Tensor] = {f"{TO_Q}.bias": torch.ones(SIZE).half()}
    for seed, name in enumerate((TO_Q, TO_K, PROJ, INNER)):
        packed = FourBit((SIZE, SIZE), "nf4", 64, 0, seed)
        tensors |= {n: torch.from_numpy(v.copy()) for n, v in packed.tensors(f"{name}.weight").items()}
        values[f"transformer.{name}.weight"] = torch.from_numpy(packed.values(f"{name}.weight"))
    numbers = torch.Generator().manual_seed(9)
    weights = {f"{TEXT}.{name}.weight": torch.randn(SIZE, SIZE, generator=numbers) for name in "qo"}
    made = fp8(weights, (32, 32))
    values |= {f"text_encoder.{name}": value for name, value in made.values.items()}
    transformer = {"_class_name": "FluxTransformer2DModel", "quantization_config": NF4}
    write_json(root / "transformer" / "config.json", transformer)
    encoder = {"model_type": "t5", "torch_dtype": "bfloat16", "quantization_config": made.config}
    write_json(root / "text_encoder" / "config.json", encoder)
    save_file(tensors, root / DENOISER, {"format": "pt"})
    save_file(made.tensors, root / ENCODER)
    index = {"transformer": ["diffusers", "FluxTransformer2DModel"], "text_encoder": ["transformers", "T5EncoderModel"]}
    write_json(root / "model_index.json", {"_class_name": "FluxPipeline", **index})
    return root


def save_adapter(path: Path, *modules: str) -> dict[str, Tensor]:
    """LoRA of rank 2 in diffusers' names, and its changes in float64, by name in the pipeline."""
    factors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for seed, name in enumerate(modules):
        numbers = torch.Generator().manual_seed(seed)
        down, up = (torch.randn(size, generator=numbers) for size in ((2, SIZE), (SIZE, 2)))
        factors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        changes[f"{name}.weight"] = up.double() @ down.double()
    save_file(factors, path)
    return changes


def merged(pipeline: Path, folder: Path, *modules: str, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """The changes of an adapter, and the report of a merge of it into `folder`/out."""
    changes = save_adapter(folder / "lora.safetensors", *modules)
    return changes, loratool.merge(pipeline, folder / "lora.safetensors", folder / "out", device="cpu", **options)


def config_in(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return table


def test_edited_weights_become_plain_in_the_dtype_of_the_rest(
    pipeline: Path, values: dict[str, Tensor], tmp_path: Path
) -> None:
    """No config of diffusers names a dtype, so it is that of what is not packed."""
    target = f"transformer.{TO_Q}"
    changes, _ = merged(pipeline, tmp_path, target)
    before, after = load_file(pipeline / DENOISER), load_file(tmp_path / "out" / DENOISER)
    wanted = nearest(values[f"{target}.weight"].double() + changes[f"{target}.weight"], torch.float16)
    assert torch.equal(after.pop(f"{TO_Q}.weight"), wanted)
    rest = {name: value for name, value in before.items() if not name.startswith(f"{TO_Q}.weight")}
    assert after.keys() == rest.keys()
    assert all(torch.equal(after[name], rest[name]) for name in rest)
    assert config_in(tmp_path / "out" / "transformer") == {
        "_class_name": "FluxTransformer2DModel",
        "quantization_config": {**NF4, "llm_int8_skip_modules": [TO_Q]},
    }
    for name in ("text_encoder/config.json", ENCODER, "model_index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (pipeline / name).read_bytes()
    assert loratool.verify(tmp_path / "out", pipeline, tmp_path / "lora.safetensors", device="cpu").exit_code == 0


def test_components_of_several_kinds_are_edited_together(
    pipeline: Path, values: dict[str, Tensor], tmp_path: Path
) -> None:
    """The list of a text encoder is matched by transformers, which wants its head there as well."""
    targets = f"transformer.{TO_Q}", f"text_encoder.{TEXT}.o"
    changes, report = merged(pipeline, tmp_path, *targets)
    found = load_file(tmp_path / "out" / ENCODER)
    name = f"{targets[1]}.weight"
    assert torch.equal(found[f"{TEXT}.o.weight"], nearest(values[name].double() + changes[name], torch.bfloat16))
    assert f"{TEXT}.o.weight_scale_inv" not in found
    listed = config_in(tmp_path / "out" / "text_encoder")["quantization_config"]["modules_to_not_convert"]
    assert listed == ["lm_head", f"{TEXT}.o"]
    assert report.edited == 2


def test_what_diffusers_takes_for_plain_by_the_last_part_of_its_name_is_plain(
    pipeline: Path, values: dict[str, Tensor], tmp_path: Path
) -> None:
    _, report = merged(pipeline, tmp_path, f"transformer.{PROJ}")
    found = load_file(tmp_path / "out" / DENOISER)[f"{INNER}.weight"]
    assert torch.equal(found, values[f"transformer.{INNER}.weight"].half())
    skipped = config_in(tmp_path / "out" / "transformer")["quantization_config"]["llm_int8_skip_modules"]
    assert skipped == [PROJ, INNER]
    (note,) = (note for note in report.notes if note.code == "siblings-plain")
    assert INNER in str(note)


def test_a_pipeline_is_dequantised(pipeline: Path, values: dict[str, Tensor], tmp_path: Path) -> None:
    loratool.merge(pipeline, [], tmp_path / "out", dequantize=True, device="cpu")
    for component, file in (("transformer", DENOISER), ("text_encoder", ENCODER)):
        dtype = torch.float16 if component == "transformer" else torch.bfloat16
        wanted = {n: v.to(dtype) for n, v in values.items() if n.startswith(f"{component}.")}
        found = {f"{component}.{n}": v for n, v in load_file(tmp_path / "out" / file).items() if n.endswith("weight")}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        config = {k: v for k, v in config_in(pipeline / component).items() if k != "quantization_config"}
        assert config_in(tmp_path / "out" / component) == config


def test_edited_weights_are_packed_anew(pipeline: Path, values: dict[str, Tensor], tmp_path: Path) -> None:
    """Each value is within half a step of the coarsest part of e4m3 of what it should be."""
    name = f"text_encoder.{TEXT}.q"
    changes, report = merged(pipeline, tmp_path, name, requantize=True)
    before, after = load_file(pipeline / ENCODER), load_file(tmp_path / "out" / ENCODER)
    assert {n: (v.dtype, v.shape) for n, v in after.items()} == {n: (v.dtype, v.shape) for n, v in before.items()}
    scales = after[f"{TEXT}.q.weight_scale_inv"].repeat_interleave(32, 0).repeat_interleave(32, 1)
    found = after[f"{TEXT}.q.weight"].float() * scales
    wanted = values[f"{name}.weight"].double() + changes[f"{name}.weight"]
    assert torch.all((found - wanted).abs() <= wanted.abs() / 16 * 1.001 + scales * 2.0**-10)
    assert 0.9 < report.gain < 1.1
    assert (tmp_path / "out" / DENOISER).read_bytes() == (pipeline / DENOISER).read_bytes()


def test_inspect_tells_how_components_are_packed(pipeline: Path) -> None:
    facts = loratool.inspect(pipeline)
    assert isinstance(facts, CheckpointFacts)
    assert facts.packing is not None
    assert facts.packing.family == "bitsandbytes and fp8"
    assert [(each.scheme, each.weights) for each in facts.packing.schemes] == [
        ("nf4, blocks of 64", 4),
        ("FP8, blocks of 32 x 32", 2),
    ]
