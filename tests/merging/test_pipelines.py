"""A pipeline of diffusers becomes a pipeline: each component's files keep their names, and the rest is copied."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from diffusion_models import WIDTH, clip, conv, linear, t5, values
from malformed import write_json
from named_updates import Targets, save_targets
from oracle import files_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapters import formats
from loratool.errors import FitError, InputError, UsageError
from loratool.results.facts import CheckpointFacts

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

H = WIDTH
BLOCK = "transformer_blocks.0.attn"
SINGLE = "single_transformer_blocks.0"
TRANSFORMER = {
    **{f"{BLOCK}.{name}.weight": (H, H) for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")},
    **{f"{SINGLE}.attn.{name}.weight": (H, H) for name in ("to_q", "to_k", "to_v")},
    f"{SINGLE}.proj_mlp.weight": (4 * H, H),
    **linear("x_embedder", H, H),
}
SHARDS = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
INDEX = "diffusion_pytorch_model.safetensors.index.json"
CONFIGS = {
    "transformer": {"_class_name": "FluxTransformer2DModel"},
    "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
    "text_encoder_2": {"architectures": ["T5EncoderModel"], "model_type": "t5"},
    "vae": {"_class_name": "AutoencoderKL"},
}


@pytest.fixture(autouse=True)
def targets_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Targets()))


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """Flux as diffusers saves it: a transformer of two shards, CLIP as a variant, T5 and a VAE."""
    root = tmp_path / "pipeline"
    for name, config in CONFIGS.items():
        (root / name).mkdir(parents=True)
        write_json(root / name / "config.json", config)
    tensors = values(TRANSFORMER)
    halves = [list(tensors)[:6], list(tensors)[6:]]
    for file, names in zip(SHARDS, halves, strict=True):
        save_file({name: tensors[name] for name in names}, root / "transformer" / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in zip(SHARDS, halves, strict=True) for name in names}
    write_json(root / "transformer" / INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    save_file(values(clip()), root / "text_encoder" / "model.fp16.safetensors")
    save_file(values(t5(), 2), root / "text_encoder_2" / "model.safetensors")
    save_file(values(conv("decoder.conv_in")), root / "vae" / "diffusion_pytorch_model.safetensors")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "merges.txt").write_text("a b")
    (root / "flux1-dev.safetensors").write_bytes((root / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    index = {name: ["diffusers", "X"] for name in CONFIGS} | {"_class_name": "FluxPipeline", "scheduler": [None, None]}
    write_json(root / "model_index.json", index | {"tokenizer": ["transformers", "CLIPTokenizer"]})
    return root


MODULES = {
    "transformer.transformer_blocks.0.attn.to_q": (H, H),
    "unet_single_blocks_0_linear1": (7 * H, H),
    "te1_text_model_encoder_layers_0_mlp_fc1": (4 * H, H),
    "te3_encoder_block_0_layer_0_SelfAttention_v": (H, H),
    "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo": (H, 2 * H),
}


def changes_of(base: Path, out: Path) -> dict[str, Tensor]:
    """What a merge added to each tensor that it changed, by file and name."""
    found: dict[str, Tensor] = {}
    for path in base.rglob("*/*.safetensors"):
        name = path.relative_to(base).as_posix()
        before, after = load_file(path), load_file(out / name)
        assert before.keys() == after.keys()
        found |= {f"{name.partition('/')[0]}.{key}": after[key].double() - before[key].double() for key in before}
    return {key: change for key, change in found.items() if change.any()}


def test_a_pipeline_becomes_a_pipeline_with_the_same_files(pipeline: Path, tmp_path: Path) -> None:
    changes = save_targets(tmp_path / "adapter", MODULES)
    report = loratool.merge(pipeline, tmp_path / "adapter", tmp_path / "out", device="cpu")
    to_q, linear1, fc1, v, wo = changes.values()
    wanted = {
        f"transformer.{BLOCK}.to_q.weight": to_q,
        **{f"transformer.{SINGLE}.attn.to_{n}.weight": linear1[at * H : (at + 1) * H] for at, n in enumerate("qkv")},
        f"transformer.{SINGLE}.proj_mlp.weight": linear1[3 * H :],
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight": fc1,
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.v.weight": v,
        "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo.weight": wo,
    }
    found = changes_of(pipeline, tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], change) for name, change in wanted.items())
    before, after = files_of(pipeline), files_of(tmp_path / "out")
    assert after.keys() - before.keys() == {"README.md", "loratool.json"}
    assert before.keys() - after.keys() == {"flux1-dev.safetensors"}
    same = {name for name in after if before.get(name) == after[name]}
    assert same >= {"vae/diffusion_pytorch_model.safetensors", "model_index.json", "tokenizer/merges.txt"}
    assert same >= {f"{name}/config.json" for name in CONFIGS}
    index = json.loads(after[f"transformer/{INDEX}"])
    assert index["weight_map"] == json.loads(before[f"transformer/{INDEX}"])["weight_map"]
    with safe_open(tmp_path / "out" / "transformer" / SHARDS[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert any(note.code == "variant-used" for note in report.notes)
    record = json.loads(after["loratool.json"])
    assert record["files"].keys() == after.keys() - {"loratool.json"}
    assert f"transformer/{SHARDS[0]}" in record["base"]["files"]


def test_verify_proves_a_merged_pipeline(pipeline: Path, tmp_path: Path) -> None:
    save_targets(tmp_path / "adapter", MODULES)
    loratool.merge(pipeline, tmp_path / "adapter", tmp_path / "out", device="cpu", verify=True)
    assert loratool.verify(tmp_path / "out").passes
    assert loratool.verify(tmp_path / "out", base=pipeline, adapters=tmp_path / "adapter").verdict == "proven"
    path = tmp_path / "out" / "text_encoder" / "model.fp16.safetensors"
    spoilt = bytearray(path.read_bytes())
    spoilt[-1] ^= 1
    path.write_bytes(spoilt)
    assert "text_encoder/model.fp16.safetensors" in str(loratool.verify(tmp_path / "out"))


def test_of_several_variants_the_default_is_taken(pipeline: Path, tmp_path: Path) -> None:
    """Others would be stale. Where there are only others, nothing is guessed."""
    vae = pipeline / "vae"
    (vae / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"never read")
    save_targets(tmp_path / "adapter", MODULES)
    report = loratool.merge(pipeline, tmp_path / "adapter", tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "vae" / "diffusion_pytorch_model.fp16.safetensors").exists()
    assert "vae/diffusion_pytorch_model.fp16.safetensors (another variant of the same weights)" in report.left_out
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(InputError, match="holds the variants ema, fp16"):
        loratool.merge(pipeline, tmp_path / "adapter", tmp_path / "out2", device="cpu")


def test_only_some_components_are_merged_and_the_rest_is_told(pipeline: Path, tmp_path: Path) -> None:
    changes = save_targets(tmp_path / "adapter", MODULES)
    report = loratool.merge(pipeline, tmp_path / "adapter", tmp_path / "out", only=["te1", "vae"], device="cpu")
    found = changes_of(pipeline, tmp_path / "out")
    fc1 = "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight"
    assert found.keys() == {fc1}
    assert torch.equal(found[fc1], changes["te1_text_model_encoder_layers_0_mlp_fc1"])
    (note,) = [note for note in report.notes if note.code == "component-left-out"]
    assert "4 updates outside of text_encoder, vae are left out" in str(note)
    with pytest.raises(UsageError, match="only transformer, text_encoder, text_encoder_2, vae"):
        loratool.merge(pipeline, tmp_path / "adapter", tmp_path / "o", only="text_encoder_3", device="cpu")
    with pytest.raises(FitError, match="--only vae leaves nothing of adapter"):
        loratool.merge(pipeline, tmp_path / "adapter", tmp_path / "o", only="vae", device="cpu")


def test_a_component_absent_from_the_base_is_left_out_by_only(pipeline: Path, tmp_path: Path) -> None:
    save_targets(tmp_path / "adapter", MODULES)
    alone = pipeline / "transformer"
    with pytest.raises(FitError, match="the base has no component te1"):
        loratool.merge(alone, tmp_path / "adapter", tmp_path / "out", device="cpu")
    loratool.merge(alone, tmp_path / "adapter", tmp_path / "out", only="transformer", device="cpu")
    assert (tmp_path / "out" / SHARDS[0]).is_file()


def test_each_component_has_a_weight_of_its_own(pipeline: Path, tmp_path: Path) -> None:
    changes = save_targets(tmp_path / "adapter", MODULES)
    weights = {"unet": 0.5, "clip_l": -2}
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    loratool.merge(pipeline, adapter, out, weights=2, component_weights=weights, device="cpu")
    found = changes_of(pipeline, tmp_path / "out")
    to_q, _, fc1, v, _ = changes.values()
    assert torch.equal(found[f"transformer.{BLOCK}.to_q.weight"], to_q)
    assert torch.equal(found["text_encoder.text_model.encoder.layers.0.mlp.fc1.weight"], -4 * fc1)
    assert torch.equal(found["text_encoder_2.encoder.block.0.layer.0.SelfAttention.v.weight"], 2 * v)
    command = json.loads((tmp_path / "out" / "loratool.json").read_text())["command"]
    assert "--component-weight unet=0.5 --component-weight clip_l=-2" in command
    with pytest.raises(UsageError, match="twice"):
        loratool.merge(
            pipeline, tmp_path / "adapter", tmp_path / "o", component_weights=["unet=1", "transformer=2"], device="cpu"
        )


def test_inspect_tells_the_components_of_a_pipeline(pipeline: Path) -> None:
    facts = loratool.inspect(pipeline)
    assert isinstance(facts, CheckpointFacts)
    assert facts.architecture == "FluxPipeline"
    assert [(part.name, part.architecture, part.tensors) for part in facts.components] == [
        ("transformer", "FluxTransformer2DModel", len(TRANSFORMER)),
        ("text_encoder", "CLIPTextModel", len(clip())),
        ("text_encoder_2", "T5EncoderModel", len(t5())),
        ("vae", "AutoencoderKL", 2),
    ]
    assert facts.components[3].parameters == H * H * 9 + H
    assert f"transformer/{SHARDS[1]}" in facts.files


def test_another_dtype_is_told_in_the_configs_of_components(pipeline: Path, tmp_path: Path) -> None:
    config = pipeline / "text_encoder" / "config.json"
    write_json(config, {**json.loads(config.read_text()), "torch_dtype": "float32"})
    save_targets(tmp_path / "adapter", MODULES)
    loratool.merge(pipeline, tmp_path / "adapter", tmp_path / "out", dtype="float16", device="cpu")
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    written = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert written == {**json.loads(config.read_text()), "torch_dtype": "float16"}
    for name in ("transformer", "vae", "text_encoder_2"):
        assert json.loads((tmp_path / "out" / name / "config.json").read_text()) == CONFIGS[name]
    assert '\nlibrary_name: "diffusers"\n' in (tmp_path / "out" / "README.md").read_text()


def test_what_is_extracted_from_a_merged_pipeline_merges_to_it_again(pipeline: Path, tmp_path: Path) -> None:
    """Its weights have the names of components, which are found in the base again."""
    changes = save_targets(tmp_path / "adapter", MODULES)
    loratool.merge(pipeline, tmp_path / "adapter", tmp_path / "out", device="cpu")
    loratool.extract(pipeline, tmp_path / "out", tmp_path / "extracted", rank=2, device="cpu")
    loratool.merge(pipeline, tmp_path / "extracted", tmp_path / "again", device="cpu")
    first, second = (changes_of(pipeline, tmp_path / name) for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert len(first) == len(changes) + 3  # a fused one is four
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_shards_of_another_size_are_those_of_each_component(pipeline: Path, tmp_path: Path) -> None:
    """A variant stays in the names, as diffusers and transformers spell them: its index has it before `.json`."""
    changes = save_targets(tmp_path / "adapter", MODULES)
    out = tmp_path / "out"
    size = 4 * H * H * 4  # bytes of the largest weight
    loratool.merge(pipeline, tmp_path / "adapter", out, shard_size=size, device="cpu")
    loratool.merge(pipeline, tmp_path / "adapter", tmp_path / "whole", shard_size="1GB", device="cpu")
    for folder, stem, end in (
        ("transformer", "diffusion_pytorch_model", "json"),
        ("text_encoder", "model", "fp16.json"),
        ("text_encoder_2", "model", "json"),
    ):
        table = json.loads((out / folder / f"{stem}.safetensors.index.{end}").read_text())
        shards = {path.name: load_file(path) for path in (out / folder).glob("*.safetensors")}
        assert table["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
        count, variant = len(shards), "fp16-" if end.startswith("fp16") else "-"
        stem += "." * (variant != "-") + variant
        assert count > 1
        assert set(shards) == {f"{stem}{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
        assert all(sum(t.nbytes for t in tensors.values()) <= size or len(tensors) == 1 for tensors in shards.values())
        (one,) = (tmp_path / "whole" / folder).glob("*.safetensors")
        assert not list((tmp_path / "whole" / folder).glob("*.index*.json"))
        before = {n: t for path in (pipeline / folder).glob("*.safetensors") for n, t in load_file(path).items()}
        every = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
        assert every.keys() == load_file(one).keys() == before.keys()
        assert all(torch.equal(every[name], tensor) for name, tensor in load_file(one).items())
        changed = sum(not torch.equal(every[name], before[name]) for name in before)
        assert changed > 0
    assert len(changes) == len(MODULES)
