"""litgpt's layout: `transformer.h.0.attn.qkv.lora_A` and `….lora_B`, with `hyperparameters.yaml` in the same folder.

Queries, keys and values are one layer, of which some may be adapted: A is (enabled · rank, in), one A below the other,
and B (rows of those that are enabled, rank), queries first. Which are enabled, rank and α stand in the settings, and
scaling is α / rank. Keys and values have as many rows as there are query groups, so that it may take the number of
heads to tell whose rows are whose: `model_config.yaml` in the folder has them, or the base. Releases that call the layer
`attn.attn` interleave its rows, those of B by other rules in each; they are not read. Facts: litgpt 0.5.13, `lora.py` and
`scripts/convert_lit_checkpoint.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import StoredTensor
from loratool.adapters.formats.format import Config
from loratool.adapters.formats.found import Found, modules_with
from loratool.adapters.formats.known import LitgptFiles
from loratool.adapters.formats.rows import part_of
from loratool.adapters.formats.trainer import TrainerFormat, text_in, whole_in
from loratool.adapters.formats.yaml_lines import read_settings
from loratool.adapters.model_settings import attention_heads
from loratool.adapters.training import Training
from loratool.adapters.unsettled import WAY_OUT, Unsettled
from loratool.algebra.updates.additive import LowRank
from loratool.algebra.updates.base import Update
from loratool.errors import InputError, printable
from loratool.files.heads import HasNames

A, B = ".lora_A", ".lora_B"
SETTINGS, (MODEL,) = LitgptFiles.config_name, LitgptFiles.models
LAYER = re.compile(r"transformer\.h\.(?P<layer>\d+)\.(?P<leaf>attn\.(?:qkv|attn|proj)|mlp\.(?:\w+|experts\.\d+\.\w+))")
FUSED, INTERLEAVED = "attn.qkv", "attn.attn"
OLD = "which ordered the rows of queries, keys and values differently; merge it with that release's merge_lora.py"
QKV = ("q_proj", "k_proj", "v_proj")
ENABLED = ("lora_query", "lora_key", "lora_value")
NAMES = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
    "mlp.gate": "block_sparse_moe.gate",
}
UNGATED = {"mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"}  # of models without a gate, which have an fc
EXPERT = re.compile(r"mlp\.experts\.(?P<expert>\d+)\.(?P<leaf>fc_1|fc_2|proj)")
EXPERT_NAMES = {"fc_1": "w1", "fc_2": "w3", "proj": "w2"}


@dataclass(frozen=True)
class Divided:
    """The parts of queries, keys and values that are adapted, each with its rows."""

    start: str  # of their targets, to which the name of the part is added
    a: StoredTensor
    b: StoredTensor
    parts: tuple[int, ...]  # numbers of those of `QKV` that are enabled
    scale: float

    def __call__(self, config: Mapping[str, Any]) -> Mapping[str, Update]:
        rank, at = self.b.shape[1], 0
        found: dict[str, Update] = {}
        for number, (part, count) in enumerate(zip(self.parts, self.sizes(config), strict=True)):
            up, down = part_of(self.b, at, count), part_of(self.a, number * rank, rank)
            found[f"{self.start}.{QKV[part]}.weight"] = LowRank(up, down, self.scale, turnable=True)
            at += count
        return found

    def sizes(self, config: Mapping[str, Any]) -> Sequence[int]:
        """The rows of each part; raises `ValueError` where the config does not tell them."""
        total, alike = self.b.shape[0], 0 not in self.parts or len(self.parts) == 1
        heads = attention_heads(config)
        if not alike and heads is None:
            raise ValueError(
                f"litgpt has the rows of its parts in one matrix, so the number of heads is needed; {WAY_OUT}"
            )
        shares = [1 if alike or heads is None else heads.queries if part == 0 else heads.keys for part in self.parts]
        if total % sum(shares):
            raise ValueError(f"its {total} rows cannot be those of {' + '.join(map(str, shares))} heads")
        return [total // sum(shares) * share for share in shares]


class Litgpt(LitgptFiles, TrainerFormat):
    """Adapters as litgpt's finetune_lora saves them, in safetensors."""

    title = "litgpt"
    alpha_paths = (("lora_alpha",),)

    def claims(self, file: HasNames) -> frozenset[str]:
        modules = [module for module in modules_with(file, (A, B)) if is_own(module)]
        if not any(LAYER.fullmatch(module) for module in modules):
            return frozenset()
        return frozenset(name for module in modules for end in (A, B) if (name := module + end) in file.tensors)

    def model_at(self, folder: Path, config: Config) -> Mapping[str, Any]:
        path = folder / MODEL
        return read_settings(path) if path.is_file() else super().model_at(folder, config)

    def training_of(self, config: Config) -> Training:
        return Training(
            base=text_in(config, "checkpoint_dir"),
            task="CAUSAL_LM",
            rank=whole_in(config, "lora_r"),
            zero_alpha=config.get("lora_alpha") == 0,
            in_out=False,
        )

    def take(self, found: Found, config: Config) -> None:
        alpha = found.alpha(config.get("lora_alpha"), f"lora_alpha in {SETTINGS}")
        modules = [module for module in modules_with(found.file, (A, B)) if is_own(module)]
        gated = not any(module.endswith(".mlp.fc") for module in modules)
        for module in modules:
            if (pair := found.pair(module, A, B)) is None:
                continue
            (a, b), match = pair, LAYER.fullmatch(module)
            if match is not None and match["leaf"] == INTERLEAVED:
                found.unsupported.append(f"{printable(module)}: a release of litgpt before 0.5.4 trained it, {OLD}")
            elif match is not None and match["leaf"] == FUSED:
                self.divide(found, module, alpha / b.shape[1], config)
            elif a.shape[0] != b.shape[1]:
                found.refuse(module, f"lora_A has {a.shape[0]} rows and lora_B {b.shape[1]} columns; both are the rank")
            elif (target := target_of(module, gated)) is None:
                found.unsupported.append(f"litgpt's module {printable(module)} has no known name in transformers")
            else:
                update = LowRank(b, a, alpha / b.shape[1], turnable=True)  # type: ignore[arg-type]  # loaded later
                found.add(target, update, (module + A, module + B))

    def divide(self, found: Found, module: str, scale: float, config: Config) -> None:
        """Take up the factors of queries, keys and values."""
        a, b = found.stored(module + A), found.stored(module + B)
        parts, count = enabled_in(config), a.shape[0] // b.shape[1]
        if parts is None and count == len(QKV):
            parts = (0, 1, 2)
        if parts is None:
            found.refuse(module, f"it adapts {count} of query, key and value; {SETTINGS}, which says which, is missing")
        elif len(parts) != count:
            names = ", ".join(ENABLED[part] for part in parts)
            found.refuse(
                module, f"lora_A has {count} times the rank of lora_B, but {SETTINGS} enables {names or 'none'}"
            )
        else:
            start = f"model.layers.{module.split('.')[2]}.self_attn"
            found.add(
                f"{start}.qkv_proj.weight",
                Unsettled(b, a, scale, Divided(start, a, b, parts, scale)),
                (module + A, module + B),
            )


def is_own(module: str) -> bool:
    return module == "lm_head" or LAYER.fullmatch(module) is not None


def enabled_in(config: Config) -> tuple[int, ...] | None:
    """Which of query, key and value are adapted; None where the settings do not say it. Raises `InputError`."""
    said = [config.get(name) for name in ENABLED]
    if all(value is None for value in said):
        return None
    if bad := [name for name, value in zip(ENABLED, said, strict=True) if not isinstance(value, bool)]:
        raise InputError(f"{SETTINGS}: {', '.join(bad)} must be true or false")
    return tuple(number for number, value in enumerate(said) if value)


def target_of(module: str, gated: bool) -> str | None:
    """The name that transformers gives the weight of a module; None where it is not known."""
    match = LAYER.fullmatch(module)
    if match is None:
        return "lm_head.weight"
    start, leaf = f"model.layers.{match['layer']}", match["leaf"]
    if expert := EXPERT.fullmatch(leaf):
        return f"{start}.block_sparse_moe.experts.{expert['expert']}.{EXPERT_NAMES[expert['leaf']]}.weight"
    name = (NAMES if gated else NAMES | UNGATED).get(leaf)
    return f"{start}.{name}.weight" if name else None


LITGPT = Litgpt()
