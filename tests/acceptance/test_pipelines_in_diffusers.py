"""Tiny pipelines of diffusers with random weights: a merge is what `load_lora_weights` and `fuse_lora` make of them.

The adapters are those that diffusers saves, with α in the header, and what loratool converts them into.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool

diffusers: Any = pytest.importorskip("diffusers")
transformers: Any = pytest.importorskip("transformers")
peft: Any = pytest.importorskip("peft")

WIDTH = 16
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def clip(kind: str = "CLIPTextModel") -> Any:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "projection_dim": WIDTH, "vocab_size": 40}
    config = transformers.CLIPTextConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1
    )
    return getattr(transformers, kind)(config)


def unet(depths: tuple[int, ...], text: int, **added: Any) -> Any:
    blocks = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    return diffusers.UNet2DConditionModel(
        block_out_channels=(WIDTH,) * len(depths),
        norm_num_groups=4,
        layers_per_block=2,
        down_block_types=blocks,
        up_block_types=[block.replace("Down", "Up") for block in blocks[::-1]],
        transformer_layers_per_block=[max(depth, 1) for depth in depths],
        attention_head_dim=4,
        cross_attention_dim=text,
        **added,
    )


def pipeline(kind: str, **parts: Any) -> Any:
    """A pipeline without what no adapter changes."""
    own = getattr(diffusers, kind)
    wanted = inspect.signature(own.__init__).parameters
    others = {name: None for name in wanted if name not in ("self", "requires_safety_checker", *parts)}
    known = {name: p.default for name, p in wanted.items() if p.default is not inspect.Parameter.empty}
    return own(**{**others, **known, **parts, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()})


def of_transformer(kind: str, model: str, **sizes: Any) -> Any:
    return pipeline(kind, transformer=getattr(diffusers, model)(**sizes))


HEADS = {"num_attention_heads": 2, "num_layers": 2}
PIPELINES: Mapping[str, Callable[[], Any]] = {
    "sd15": lambda: pipeline(
        "StableDiffusionPipeline",
        text_encoder=clip(),
        unet=unet((1, 1, 1, 0), WIDTH),
        requires_safety_checker=False,
    ),
    "sdxl": lambda: pipeline(
        "StableDiffusionXLPipeline",
        text_encoder=clip(),
        text_encoder_2=clip("CLIPTextModelWithProjection"),
        unet=unet(
            (0, 1, 2),
            2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        ),
    ),
    "sd3": lambda: of_transformer(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        **HEADS,
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
    ),
    "flux": lambda: of_transformer(
        "FluxPipeline",
        "FluxTransformer2DModel",
        **HEADS,
        in_channels=4,
        num_single_layers=2,
        attention_head_dim=8,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    ),
    "lumina2": lambda: of_transformer(
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        **HEADS,
        sample_size=4,
        in_channels=4,
        hidden_size=WIDTH,
        num_refiner_layers=1,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(8, 8, 8),
        cap_feat_dim=8,
    ),
    "wan-1.3b": lambda: of_transformer(
        "WanPipeline",
        "WanTransformer3DModel",
        **HEADS,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=WIDTH,
        ffn_dim=32,
        rope_max_seq_len=16,
    ),
    "hunyuan-video": lambda: of_transformer(
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        **HEADS,
        in_channels=4,
        out_channels=4,
        attention_head_dim=10,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ),
    "qwen-image": lambda: of_transformer(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        **HEADS,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        attention_head_dim=16,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    ),
}


def parts_of(pipe: Any) -> Iterator[tuple[str, Any]]:
    yield from ((name, part) for name in COMPONENTS if (part := getattr(pipe, name, None)) is not None)


def trained(pipe: Any, folder: Path) -> None:
    """What diffusers saves of LoRA on all linear layers of every component, on a copy of it; α / r is a half."""
    layers: dict[str, Any] = {}
    for name, part in parts_of(pipe):
        model = copy.deepcopy(part)
        kinds = (torch.nn.Linear, torch.nn.Conv2d) if name == "unet" else (torch.nn.Linear,)
        modules = [path for path, module in model.named_modules() if isinstance(module, kinds)]
        if name.startswith("text_encoder"):
            modules = [path for path in modules if ".layers." in path]
        config = peft.LoraConfig(r=2, lora_alpha=1, init_lora_weights=False, target_modules=modules)
        model.add_adapter(config)
        layers[f"{name}_lora_layers"] = peft.utils.get_peft_model_state_dict(model)
        layers[f"{name}_lora_adapter_metadata"] = {**config.to_dict(), "target_modules": sorted(modules)}
    pipe.save_lora_weights(folder, **layers)


def fused(pipe: Any, path: Path) -> dict[str, Tensor]:
    """Every weight of a copy of a pipeline as diffusers makes it of an adapter."""
    own = copy.deepcopy(pipe)
    own.load_lora_weights(path)
    own.fuse_lora(components=[name for name, _ in parts_of(own)])
    return {
        f"{name}.{key.replace('.base_layer', '')}": tensor
        for name, part in parts_of(own)
        for key, tensor in part.state_dict().items()
        if ".lora_" not in key
    }


def merged(folder: Path, variant: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob(f"*/*{variant}.safetensors"):
        found |= {f"{file.parent.name}.{name}": tensor for name, tensor in load_file(file).items()}
    return found


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], changed: int, before: Mapping[str, Tensor]) -> None:
    """Names are those of transformers 5, or of releases before."""
    here = {name.replace(".text_model.", "."): tensor for name, tensor in found.items()}
    for name, tensor in wanted.items():
        if name.endswith("position_ids"):
            continue
        torch.testing.assert_close(here[name.replace(".text_model.", ".")], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in found.items()) >= changed


# The dialects whose converters in diffusers know more than the widths of the released model.
BY_DIFFUSERS = {"sd15": ("kohya",), "sdxl": ("kohya",), "qwen-image": ("comfy", "kohya")}


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_merged_pipeline_has_the_weights_that_diffusers_fuses(kind: str, tmp_path: Path) -> None:
    """Also of what the adapter is converted into, where diffusers reads that; loratool merges all of it alike."""
    torch.manual_seed(0)
    pipe = PIPELINES[kind]()
    pipe.save_pretrained(tmp_path / "base")
    trained(pipe, tmp_path / "lora")
    loratool.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", device="cpu")
    found, before = merged(tmp_path / "out"), merged(tmp_path / "base")
    same(found, fused(pipe, tmp_path / "lora"), 20, before)
    for dialect in ("diffusers", "comfy", "kohya"):
        path = tmp_path / f"{dialect}.safetensors"
        loratool.convert(tmp_path / "lora", path, to=dialect, architecture=kind)
        if dialect == "diffusers" or dialect in BY_DIFFUSERS.get(kind, ()):
            same(found, fused(pipe, path), 20, before)
        loratool.merge(tmp_path / "base", path, tmp_path / f"out-{dialect}", device="cpu")
        again = merged(tmp_path / f"out-{dialect}")
        assert all(torch.allclose(again[name], tensor, rtol=1e-6, atol=1e-7) for name, tensor in found.items())


def test_diffusers_loads_a_merged_variant_by_its_name(tmp_path: Path) -> None:
    """With a strength for each component, as `set_adapters` has them, and rounded once to float16."""
    torch.manual_seed(0)
    pipe = PIPELINES["sdxl"]()
    pipe.to(torch.float16).save_pretrained(tmp_path / "base", variant="fp16")
    pipe.to(torch.float32)
    trained(pipe, tmp_path / "lora")
    weights = {"unet": 0.5, "text_encoder_2": 2.0}
    loratool.merge(
        tmp_path / "base",
        tmp_path / "lora",
        tmp_path / "out",
        device="cpu",
        component_weights=weights,
        only=["unet", "text_encoder_2"],
    )
    found = merged(tmp_path / "out", ".fp16")
    assert found.keys() == merged(tmp_path / "base", ".fp16").keys()
    before = {f"{name}.{key}": t.clone() for name, part in parts_of(pipe) for key, t in part.state_dict().items()}
    whole = fused(pipe, tmp_path / "lora")
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet", variant="fp16")
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, found[f"unet.{key}"].to(tensor.dtype))
    here = {name.replace(".text_model.", "."): tensor for name, tensor in found.items()}
    for name, tensor in before.items():
        weight = weights.get(name.partition(".")[0], 0.0)
        wanted = tensor + weight * (whole[name] - tensor)
        if not name.endswith("position_ids"):
            torch.testing.assert_close(here[name.replace(".text_model.", ".")].float(), wanted, rtol=2e-3, atol=2e-3)


def test_diffusers_loads_a_control_adapter_that_was_converted(tmp_path: Path) -> None:
    """It widens the input layer, replaces norms and adds biases: a merge of the adapter as it was gives the same weights."""
    torch.manual_seed(0)
    pipe = PIPELINES["flux"]()
    pipe.save_pretrained(tmp_path / "base")
    shapes = {"img_in": (WIDTH, 8), "double_blocks.0.img_attn.proj": (WIDTH, WIDTH)}
    tensors = {f"{module}.lora_A.weight": torch.randn(2, columns) for module, (_, columns) in shapes.items()}
    tensors |= {f"{module}.lora_B.weight": torch.randn(rows, 2) for module, (rows, _) in shapes.items()}
    tensors |= {f"{module}.lora_B.bias": torch.randn(rows) for module, (rows, _) in shapes.items()}
    tensors |= {"double_blocks.1.txt_attn.norm.key_norm.scale": torch.rand(8)}
    tensors |= {"single_blocks.0.norm.query_norm.scale": torch.rand(8)}
    save_file(tensors, tmp_path / "control.safetensors")
    loratool.convert(tmp_path / "control.safetensors", tmp_path / "lora", server="diffusers")
    loratool.merge(tmp_path / "base", tmp_path / "control.safetensors", tmp_path / "out", device="cpu")
    found, before = merged(tmp_path / "out"), merged(tmp_path / "base")
    same(found, fused(pipe, tmp_path / "lora"), 6, before)


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_diffusers_runs_the_code_of_a_card(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny pipeline in place of the base, up to the image itself, which takes components that it has not."""
    torch.manual_seed(0)
    pipe = PIPELINES[kind]()
    trained(pipe, tmp_path / "style")
    loratool.rescale(tmp_path / "style", tmp_path / "weaker", scale=0.5)
    card = (tmp_path / "weaker" / "README.md").read_text()
    code = card.split("```python\n")[1].split("pipeline.to(")[0]
    monkeypatch.chdir(tmp_path / "weaker")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda base, **options: pipe)
    exec(compile(code, "card", "exec"), {})
    assert pipe.get_list_adapters()
