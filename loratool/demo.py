"""A small Llama-shaped base and a rank-8 adapter from nothing, merged and checked against the formula."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from loratool.adapters.formats import OUTPUT_FILES, WRITTEN
from loratool.adapters.layers import Kind
from loratool.adapters.training import Training
from loratool.algebra.rounding import round_once
from loratool.errors import StorageError, UsageError, VerificationError, printable
from loratool.files.outputs import check_local, replaceable_files, stage_of
from loratool.lazy import Tensor, torch
from loratool.merging.merge import merge
from loratool.merging.merge_options import MergeOptions
from loratool.results.base import Cost
from loratool.results.demo import DemoResult
from loratool.results.merge import MergeReport

HIDDEN, MLP, LAYERS, VOCABULARY, HEADS = 256, 688, 6, 2048, 4
RANK, ALPHA, SHARDS = 8, 16, 3
MADE = frozenset({"base", "adapter", "merged", "again"}) | {  # folders of a demo, and of its lesson
    *("matrix", "matrix-adapter", "matrix-merged", "small", "half", "merged-half", "unmerged")
}
TARGETS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}


def demo(folder: Path | str = "loratool-demo", *, overwrite: bool = False) -> DemoResult:
    """Make `folder` with `base/`, `adapter/` and `merged/` in it.

    Raises:
        UsageError: `folder` is there already and `overwrite` is not given.
        VerificationError: the merged model is not what the formula says.
        StorageError: a disk or file-system error.
    """
    started = time.monotonic()
    home = Path(folder)
    with made_in(home, overwrite):
        base, adapter = home / "base", home / "adapter"
        for path in (base, adapter):
            path.mkdir()
        make_base(base)
        make_adapter(adapter)
        report = merge(base, [adapter], home / "merged", MergeOptions())
        checked = check(home, report)
    return replace(checked, cost=Cost.since(started, report.cost.device, report.cost.startup_seconds))


@contextmanager
def made_in(home: Path, overwrite: bool) -> Iterator[None]:
    """Make `home`, or empty it of an earlier demo; unless the block ends well, nothing of what it wrote is left."""
    check_local(home)
    there = home.exists()
    if there:
        clear(home, overwrite)
    try:
        home.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for made in (home / name for name in MADE):
            shutil.rmtree(made, ignore_errors=True)
            shutil.rmtree(stage_of(made), ignore_errors=True)
        if not there:
            with suppress(OSError):
                home.rmdir()
        if isinstance(error, OSError):
            raise StorageError(f"{printable(error.filename or home)}: {error.strerror}") from error
        raise


def clear(home: Path, overwrite: bool) -> None:
    """Remove what an earlier demo left; raises `UsageError` where anything else is there, and removes nothing then."""
    if not overwrite:
        raise UsageError(
            f"{printable(home)} already exists; pass --overwrite to replace it, or choose another folder",
            hint="--overwrite",
        )
    unfinished = {
        stage_of(home / name).name for name in MADE
    }  # of a demo that was killed: the next merge goes on there
    if not home.is_dir() or not {entry.name for entry in home.iterdir()} <= MADE | unfinished:
        raise UsageError(f"{printable(home)}: contains files that no demo wrote; choose another folder")
    made = [path for path in home.iterdir() if path.name in MADE]
    for path in made:
        if path.is_symlink() or not path.is_dir():
            raise UsageError(f"{printable(path)}: was not made by a demo; choose another folder")
        replaceable_files(path, printable(path), OUTPUT_FILES)
    for path in made:
        shutil.rmtree(path)


def make_base(folder: Path) -> None:
    """A bfloat16 Llama with random weights, in three shards with an index."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    tensors = {"model.embed_tokens.weight": weight(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in TARGETS.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = weight(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
    tensors |= {"model.norm.weight": torch.ones(HIDDEN).bfloat16(), "lm_head.weight": weight(VOCABULARY, HIDDEN)}
    names = list(tensors)
    step = -(-len(names) // SHARDS)
    weight_map: dict[str, str] = {}
    for number in range(SHARDS):
        part = names[number * step : (number + 1) * step]
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        write_tensors({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", newline="\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", newline="\n")


def make_adapter(folder: Path) -> None:
    """A rank-8 adapter in PEFT's layout, as if training had moved B away from zero."""
    generator = torch.Generator().manual_seed(1)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in range(LAYERS):
        for name, (out, into) in TARGETS.items():
            down = torch.randn(RANK, into, generator=generator) / into**0.5
            up = torch.randn(out, RANK, generator=generator) * 0.005
            factors[f"model.layers.{layer}.{name}.weight"] = down, up
    write_lora(folder, factors, ALPHA, Training(task="CAUSAL_LM"))


def write_lora(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], alpha: float, training: Training) -> None:
    """An adapter in PEFT's layout: weight → A (r, in) and B (out, r)."""
    names = WRITTEN.spelling(dict.fromkeys(factors, Kind.LINEAR))
    tensors = {name: f for weight, pair in factors.items() for name, f in zip(names.factors(weight), pair, strict=True)}
    ranks = {weight.removesuffix(".weight"): (len(down), alpha) for weight, (down, _) in factors.items()}
    write_tensors(tensors, folder / WRITTEN.weights_name)
    config = WRITTEN.plain_config(training, ranks)
    (folder / WRITTEN.config_name).write_text(json.dumps(config, indent=2) + "\n", newline="\n")


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A file of the safetensors package's, with the system's own errors."""
    from safetensors.torch import save

    path.write_bytes(save(dict(tensors), {"format": "pt"}))


def check(home: Path, report: MergeReport) -> DemoResult:
    """Compare the merged model with the formula, read by the safetensors package and computed in float64."""
    base, merged = tensors_of(home / "base"), tensors_of(home / "merged")
    adapter = tensors_of(home / "adapter")
    elements = equal = one_step = copied = 0
    for name, before in base.items():
        after = merged[name]
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in adapter:
            if not torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
                raise VerificationError(f"{name}: should be an exact copy but differs")
            copied += 1
            continue
        down, up = adapter[f"{key}.lora_A.weight"].double(), adapter[f"{key}.lora_B.weight"].double()
        wanted = round_once(before.double() + ALPHA / RANK * (up @ down), before.dtype)
        steps = (ordered(after) - ordered(wanted)).abs()
        if int(steps.max()) > 1:
            raise VerificationError(f"{name}: differs from the formula by more than the last bit")
        elements += steps.numel()
        equal += int((steps == 0).sum())
        one_step += int((steps == 1).sum())
    return DemoResult(home, report, elements, equal, one_step, copied)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by the safetensors package."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def ordered(values: Tensor) -> Tensor:
    """bfloat16 values as integers in the order of their size, so that neighbours differ by 1."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -32768 - bits, bits)
