"""Adapters that people published, merged into bases of the shapes and the names that they were trained on.

The files are in `../shared/real-adapters` (see its INDEX.md) and are no part of the project, so the
tests are skipped where the folder is not there. Every result is held to the float64 formula.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    FACTOR,
    PREFIX,
    assert_single_rounding,
    exact_merge,
    never,
    read_tensors,
    same_bits,
    weight_of,
)
from paths import REAL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool.cli import run

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"the published adapters are not here: {REAL} is missing")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def headless(module: str) -> str:
    """GPT-2 and BLOOM on the Hub were saved without their head: no `transformer.` before the names."""
    return f"{module.removeprefix('transformer.')}.weight"


def some_layers(tensor: str) -> bool:
    """Whether `tensor` is in one of some layers, all of a large model being too many to compare in a test."""
    return not re.search(r"(^|\.)(h|layers?|block|up_blocks)\.(?!(0|11)\.)\d+\.", tensor)


def few_layers(tensor: str) -> bool:
    """Fewer still, of the widest models."""
    return not re.search(r"(^|\.)(layers|(up|down)_blocks)\.(?!11\.|1\.attentions\.0\.)\d+\.", tensor)


def conv1d(module: str) -> bool:
    return ".h." in module


@dataclass(frozen=True)
class Base:
    """The model an adapter was trained on, as far as its files tell: names, layout, dtype."""

    adapters: tuple[str, ...]
    dtype: torch.dtype
    config: Mapping[str, Any]
    on_disk: Callable[[str], str] = weight_of
    in_out: Callable[[str], bool] = never
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # tensors that no adapter touches
    weights: tuple[float, ...] = (1.0,)
    shards: int = 1
    checked: Callable[[str], bool] = some_layers  # tensors held to the formula; all others to be there
    file: str = "model.safetensors"


def gpt2(adapter: str, dtype: torch.dtype, **more: Any) -> Base:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    settings: dict[str, Any] = {
        "on_disk": headless,
        "in_out": conv1d,
        "others": {"wte.weight": (300, 768), "h.0.attn.bias": (1, 1, 64, 64), "h.0.attn.c_attn.bias": (2304,)},
    }
    return Base((adapter,), dtype, config, **{**settings, **more})


BASES = {
    "distilbert": Base(
        ("distilbert-emotion",),
        FP32,
        {"model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"]},
        others={"distilbert.embeddings.word_embeddings.weight": (300, 768)},
    ),
    "distilbert of a task that PEFT does not know": Base(
        ("seqcls-unknown-task-type",),
        FP32,
        {"model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"]},
        others={"distilbert.embeddings.word_embeddings.weight": (300, 768)},
    ),
    "a transformer for signals, with a head of one row": Base(
        ("eeg-one-row-head",), FP16, {"model_type": "signals"}, others={"patch_embed.weight": (200, 1, 1, 15)}
    ),
    "bert with a head saved twice over": Base(
        ("bert-turkish-dupmts",),
        FP16,
        {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
        others={"bert.embeddings.word_embeddings.weight": (300, 768), "bert.pooler.dense.weight": (768, 768)},
        shards=3,
    ),
    "roberta under AdaLoRA": Base(
        ("roberta-adalora",),
        FP16,
        {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]},
        others={"roberta.embeddings.word_embeddings.weight": (300, 768)},
    ),
    "gpt2 classifier whose score no config mentions": Base(
        ("gpt2-seqcls-score",),
        FP32,
        {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]},
        in_out=conv1d,
        others={"transformer.wte.weight": (300, 768)},
    ),
    "gpt2, three modules, one of them square": gpt2("gpt2-tigrinya", BF16, shards=2),
    "gpt2 trained by TRL": gpt2("gpt2-kto-trl", FP32),
    "distilgpt2 with the wrong fan_in_fan_out": gpt2(
        "distilgpt2-sanaear-fifofalse", FP16, on_disk=weight_of, others={}
    ),
    "gpt2 of two dimensions, under rank 4": gpt2(
        "ih-tinygpt2-rank-gt-dim", FP32, on_disk=weight_of, others={"transformer.wte.weight": (300, 2)}
    ),
    "bloom, two adapters": Base(
        ("ih-bloom560m-r4a1", "ih-bloom560m-r8a1"),
        BF16,
        {"model_type": "bloom", "architectures": ["BloomForCausalLM"]},
        on_disk=headless,
        others={"word_embeddings.weight": (300, 1024)},
        weights=(0.75, -0.5),
    ),
    "open-calm, rank 1, float16, scale 32": Base(
        ("opencalm1b-rank1-f16",),
        FP16,
        {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "tie_word_embeddings": False},
        others={"embed_out.weight": (300, 2048)},
        shards=2,
        checked=few_layers,
    ),
    "gemma 3, two seeds averaged": Base(
        ("gemma3-270m-svg-seed42", "gemma3-270m-svg-seed123"),
        BF16,
        {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": True},
        others={"model.embed_tokens.weight": (300, 640), "model.layers.0.self_attn.q_norm.weight": (256,)},
        weights=(0.5, 0.5),
        checked=few_layers,
    ),
    "flan-t5": Base(
        ("flan-t5-base-medqa",),
        FP32,
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        others={"shared.weight": (300, 768), "encoder.block.0.layer.0.SelfAttention.v.weight": (768, 768)},
        shards=2,
    ),
    "whisper, half of it untrained": Base(
        ("whisper-small-enczeroB",),
        FP16,
        {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]},
        others={"model.encoder.conv1.weight": (768, 80, 3), "model.decoder.embed_tokens.weight": (300, 768)},
        checked=few_layers,
    ),
    "the UNet of Stable Diffusion": Base(
        ("sd-peft-unet-anime",),
        FP16,
        {"_class_name": "UNet2DConditionModel"},
        others={"conv_in.weight": (320, 4, 3, 3), "time_embedding.linear_1.weight": (1280, 320)},
        file="diffusion_pytorch_model.safetensors",
        checked=few_layers,
    ),
}


def noise(count: int, dtype: torch.dtype, pool: dict[torch.dtype, Tensor]) -> Tensor:
    """`count` values like those of a trained weight; the same ones again and again, for drawing them takes time."""
    if dtype not in pool:
        pool[dtype] = (torch.randn(5_000_011, generator=torch.Generator().manual_seed(3)) * 0.03).to(dtype)
    size = pool[dtype].numel()
    return torch.cat([pool[dtype][: count - at] for at in range(0, count, size)])


def shapes_of(base: Base) -> dict[str, tuple[int, ...]]:
    """Tensor of the base → shape, from the adapters' own shapes."""
    shapes: dict[str, tuple[int, ...]] = dict(base.others)
    for name in base.adapters:
        with safe_open(REAL / name / "adapter_model.safetensors", "pt") as file:
            sizes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        for key, size in sizes.items():
            module = key.removeprefix(PREFIX)
            if match := FACTOR.fullmatch(module):
                pair = (sizes[key.replace("lora_A", "lora_B")][0], size[1])
                shapes[base.on_disk(match["module"])] = pair[::-1] if base.in_out(match["module"]) else pair
            elif "lora_" not in module:
                shapes[module] = size
    return shapes


def write_base(folder: Path, base: Base, pool: dict[torch.dtype, Tensor]) -> Path:
    folder.mkdir()
    shapes = shapes_of(base)
    names = sorted(shapes)
    weight_map: dict[str, str] = {}
    step = -(-len(names) // base.shards)
    for number in range(base.shards):
        tensors: dict[str, Tensor] = {}
        for name in names[number * step : (number + 1) * step]:
            count = torch.Size(shapes[name]).numel()
            tensors[name] = noise(count, base.dtype, pool).reshape(shapes[name])
        file = base.file if base.shards == 1 else f"model-{number + 1:05d}-of-{base.shards:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if base.shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(base.config))
    return folder


@pytest.fixture(scope="module")
def pool() -> dict[torch.dtype, Tensor]:
    return {}


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that is cleared at once: models here come to gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", BASES)
def test_a_published_adapter_merges_to_the_float64_formula(
    scratch: Path, pool: dict[torch.dtype, Tensor], name: str
) -> None:
    base = BASES[name]
    paths = [REAL / adapter for adapter in base.adapters]
    folder = write_base(scratch / "base", base, pool)
    report = loratool.merge(folder, paths, scratch / "out", weights=base.weights)
    before, after = read_tensors(folder, base.checked), read_tensors(scratch / "out", base.checked)
    assert set(after) == set(before)
    exact = exact_merge(before, *zip(paths, base.weights, strict=True), name=base.on_disk, in_out=base.in_out)
    assert exact
    assert report.edited == len(shapes_of(base)) - len(base.others)
    changed = 0
    for tensor, weight in before.items():
        if tensor in exact:
            assert after[tensor].dtype == base.dtype
            assert_single_rounding(after[tensor], exact[tensor], tensor)
            changed += not same_bits(after[tensor], weight)
        else:
            assert same_bits(after[tensor], weight), f"{tensor} was to be copied"
    assert changed >= len(exact) / 2, "the adapter is to have an effect"


def test_the_file_of_one_adapter_can_be_named_itself(scratch: Path, pool: dict[torch.dtype, Tensor]) -> None:
    base = BASES["distilgpt2 with the wrong fan_in_fan_out"]
    folder = write_base(scratch / "base", base, pool)
    path = REAL / base.adapters[0]
    loratool.merge(folder, path, scratch / "by-folder")
    loratool.merge(folder / base.file, path / "adapter_model.safetensors", scratch / "by-file")
    found = (scratch / "by-file" / base.file).read_bytes()
    assert found == (scratch / "by-folder" / base.file).read_bytes()


GPT2 = [name for name, base in BASES.items() if base.in_out is conv1d]


@pytest.mark.parametrize("name", GPT2)
def test_a_wrong_fan_in_fan_out_flag_changes_nothing_and_is_told(
    scratch: Path, pool: dict[torch.dtype, Tensor], name: str
) -> None:
    base = BASES[name]
    folder = write_base(scratch / "base", base, pool)
    (original,) = base.adapters
    results = []
    for flag in (False, True):
        adapter = scratch / f"adapter-{flag}"
        adapter.mkdir()
        shutil.copy(REAL / original / "adapter_model.safetensors", adapter)
        config = json.loads((REAL / original / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": flag}))
        report = loratool.merge(folder, [adapter], scratch / f"out-{flag}")
        results.append(report.digests)
        told = [note for note in map(str, report.notes) if "config says that weights are stored (out, in)" in note]
        assert bool(told) == (not flag), report.notes
    assert results[0] == results[1]


# Of image models, which test_dialects.py reads
ELSEWHERE = {"flux-aitoolkit-transformer", "sd-diffusers-old-processor-pokemon", "sd-lycoris-lokr-4"}


def test_no_published_adapter_is_left_out() -> None:
    merged = {adapter for base in BASES.values() for adapter in base.adapters} | ELSEWHERE
    refused = {name.partition("/")[0] for name in REFUSED}
    assert merged | refused == {path.name for path in REAL.iterdir() if path.is_dir()}
    assert not merged & refused


@pytest.mark.parametrize("name", ["bloom, two adapters", "gpt2 of two dimensions, under rank 4"])
def test_biases_that_the_config_promises_and_the_file_has_not_are_told(
    scratch: Path, pool: dict[torch.dtype, Tensor], name: str
) -> None:
    folder = write_base(scratch / "base", BASES[name], pool)
    report = loratool.merge(folder, REAL / BASES[name].adapters[0], scratch / "out")
    assert any("lora_only" in note for note in map(str, report.notes)), report.notes


def test_a_target_that_the_config_names_and_the_file_has_not_is_told(
    scratch: Path, pool: dict[torch.dtype, Tensor]
) -> None:
    folder = write_base(scratch / "base", BASES["flan-t5"], pool)
    report = loratool.merge(folder, REAL / BASES["flan-t5"].adapters[0], scratch / "out")
    assert any(re.search(r"\bV\b", note) for note in map(str, report.notes)), report.notes


def test_an_adapter_with_a_head_is_refused_by_a_base_that_has_none(
    scratch: Path, pool: dict[torch.dtype, Tensor]
) -> None:
    base = BASES["bert with a head saved twice over"]
    folder = write_base(scratch / "base", base, pool)
    last = folder / "model-00003-of-00003.safetensors"
    tensors = {k: v for k, v in read_tensors(last).items() if not k.startswith("classifier.")}
    (folder / "model.safetensors.index.json").unlink()
    for shard in sorted(folder.glob("*.safetensors"))[:2]:
        assert not any(k.startswith("classifier.") for k in read_tensors(shard)), "the head is in the last shard"
    save_file(tensors, last)
    with pytest.raises(loratool.FitError, match=r"classifier\.weight.*no such weight"):
        loratool.merge(folder, [REAL / base.adapters[0]], scratch / "out")
    assert not (scratch / "out").exists()


# path below `real-adapters` → (exit code, what the message must name)
REFUSED: dict[str, tuple[int, str]] = {
    "mlx-qwen0.5b": (4, r"q_proj\.weight: the base has no such weight"),
    "mlx-qwen0.5b/adapters.safetensors": (4, r"q_proj\.weight: the base has no such weight"),
    "neg-lfs-pointer-gliner": (3, "Git LFS pointer"),
    "vit-lora-wa-only": (3, r"numbered factors"),
    "vit-lora-wa-only/lora.safetensors": (3, r"numbered factors"),
    "mlx-npz": (3, r"adapters\.npz|neither adapter_config\.json"),
    "mlx-medqa": (4, r"q_proj\.weight: the base has no such weight"),
    "sam-lora-index-names": (3, r"numbered factors"),
    "seqcls-lora-on-saved-head": (3, "LoRA on classifier, which is also saved whole"),
    "ih-bloomz560m-zeroB": (4, "zero"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_with_its_reason_and_nothing_is_written(
    scratch: Path, pool: dict[torch.dtype, Tensor], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    wanted, reason = REFUSED[name]
    folder, _, file = name.partition("/")
    shutil.copytree(REAL / folder, scratch / "adapter")  # a name that gives nothing away
    family = BASES["bloom, two adapters"]
    base = write_base(scratch / "base", family, pool) if "bloom" in name else plain_base(scratch / "base")
    code = run(["merge", str(base), str(scratch / "adapter" / file), "-o", str(scratch / "out")])
    said = capsys.readouterr()
    assert code == wanted, said.err
    assert re.search(reason, said.err), said.err
    assert said.out == ""
    assert sorted(p.name for p in scratch.iterdir()) == ["adapter", "base"]


def plain_base(folder: Path) -> Path:
    """Something to merge into; what is refused for its own sake never looks at it."""
    folder.mkdir()
    save_file({"roberta.encoder.layer.0.attention.self.query.weight": torch.ones(8, 8)}, folder / "model.safetensors")
    return folder
