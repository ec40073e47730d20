"""The `adapter_config.json` of an adapter that is made here: plain LoRA whose α is its rank, so that its scale is 1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from loratool.adapters.formats.format import Parts
from loratool.adapters.formats.peft import keys
from loratool.adapters.formats.peft.experts import stacked_by_peft
from loratool.adapters.layers import Kind, adapted_module
from loratool.adapters.training import Training

# Fields that are carried over where all sources agree; of those that disagree the first source's counts.
CARRIED = (
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "fan_in_fan_out"),
    *("ensure_weight_tying", "megatron_config", "megatron_core"),
)
ALL_LINEAR = "all-linear"  # which PEFT replaces by names before it saves; others do not
LIMITS = ("layers_to_transform", "layers_pattern", "exclude_modules")  # of what `target_modules` names


def config_of(training: Training) -> dict[str, Any]:
    """The fields that say how an adapter was trained that has no config of PEFT's."""
    return {
        **({"peft_version": training.release} if training.release else {}),
        "base_model_name_or_path": training.base or None,
        "revision": training.revision or None,
        "task_type": training.task or None,
        "fan_in_fan_out": training.in_out is True,
        "bias": training.bias,
        "modules_to_save": list(training.saved_modules) or None,
        "target_modules": list(training.targets.modules) or None if training.targets else None,
    }


def describe(
    kinds: Mapping[str, Kind], inside: Collection[str], configs: Sequence[Mapping[str, Any]], parts: Parts
) -> dict[str, Any]:
    """The config of an adapter made of those with `configs`; targets `inside` an nn.MultiheadAttention go with it."""
    ranks, whole_names = parts.ranks, parts.whole_names
    config: dict[str, Any] = {"peft_type": "LORA"}
    for name in CARRIED:
        if (value := next((c[name] for c in configs if c.get(name) is not None), None)) is not None:
            config[name] = value
    own = {target: adapted_module(target, kind) for target, kind in kinds.items() if target not in inside}
    stacked = stacked_by_peft(ranks)  # whose rank and α PEFT takes from `r` and `lora_alpha`, not from patterns
    strengths = {own[t]: (rank, alpha_at(rank, parts.scales.get(t, 1.0))) for t, rank in ranks.items() if t in own}
    config.update(scaling_fields(strengths, strengths[own[stacked[0]]] if stacked else None))
    layers = [module for target, module in own.items() if kinds[target] is not Kind.PARAMETER]
    config.update({"target_modules": sorted(layers) or None} if whole_names else target_fields(configs, layers))
    gone = {tail for target in parts.dropped for tail in keys.tails(target.removesuffix(".weight"))}
    if not gone.isdisjoint(layers):  # PEFT would adapt them again
        config["target_modules"] = "|".join(re.escape(layer) for layer in sorted(layers))
    if parameters := sorted(target for target, kind in kinds.items() if kind is Kind.PARAMETER):
        config["target_parameters"] = parameters if whole_names else parameters_of(configs, parameters)
    biases = {c.get("bias") or "none" for c in configs}
    config["bias"] = next((word for word in ("all", "lora_only") if word in biases), "none")
    modules = [name for c in configs for name in texts(c.get("modules_to_save"))]
    config["modules_to_save"] = list(dict.fromkeys((*modules, *parts.saved))) or None
    config["trainable_token_indices"] = {
        target.rpartition(".")[0]: list(rows) for target, rows in parts.tokens.items()
    } or None
    config |= {
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": parts.lora_bias,
        "lora_dropout": 0.0,
        "use_dora": parts.dora,
        "use_rslora": False,
    }
    return dict(sorted(config.items()))


def texts(value: str | Sequence[str] | None) -> Sequence[str]:
    """The entries of a field that is a list of texts, or one text."""
    return [value] if isinstance(value, str) else value or []


def alpha_at(rank: int, scale: float) -> float | int:
    """α with which a rank has a scale: a whole number where it is one."""
    alpha = rank * scale
    return round(alpha) if abs(alpha - round(alpha)) <= 1e-12 * abs(alpha) else alpha


def scaling_fields(
    strengths: Mapping[str, tuple[int, float]], usual: tuple[int, float] | None = None
) -> dict[str, Any]:
    """Rank and α by module: the usual or most frequent ones, and patterns for the others."""
    rank, alpha = usual or (Counter(strengths.values()).most_common(1)[0][0] if strengths else (1, 1))
    pattern_of = patterns_for(strengths)
    ranks = {pattern_of(module): r for module, (r, _) in sorted(strengths.items()) if r != rank}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": {pattern_of(module): a for module, (_, a) in sorted(strengths.items()) if a != alpha},
    }


def patterns_for(modules: Iterable[str]) -> Callable[[str], str]:
    """A pattern that matches one of some modules and none of the others: its path, from the start where it is a tail too."""
    tails = {tail for module in modules for tail in keys.tails(module) if tail != module}
    return lambda module: f"^{module}" if module in tails else module


def target_fields(configs: Sequence[Mapping[str, Any]], modules: Collection[str]) -> dict[str, Any]:
    """What is adapted: in the sources' own words where these mean just these modules, else by whole names."""
    words = [config.get("target_modules") for config in configs]
    if any(isinstance(word, str) and word.lower() == ALL_LINEAR for word in words):
        return {"target_modules": sorted(modules) or None}
    limited = any(config.get(limit) not in (None, [], "") for config in configs for limit in LIMITS)
    first = configs[0]
    if all(config_fields(config) == config_fields(first) for config in configs) and (
        isinstance(words[0], str) or covers(words[0], modules)
    ):
        return {"target_modules": words[0], **{limit: first.get(limit) for limit in LIMITS}}
    entries = list(dict.fromkeys(entry for word in words if isinstance(word, list) for entry in word))
    if not limited and all(isinstance(word, list) for word in words) and covers(entries, modules):
        return {"target_modules": entries}
    return {"target_modules": sorted(modules) or None}


def config_fields(config: Mapping[str, Any]) -> list[object]:
    """What the config says of its modules, so that lists in another order are equal."""
    words = config.get("target_modules")
    return [
        sorted(words, key=str) if isinstance(words, list) else words,
        *(config.get(limit) or None for limit in LIMITS),
    ]


def covers(entries: object, modules: Collection[str]) -> bool:
    """Whether a list names every module, by its path or by a dotted tail of it."""
    named = {entry for entry in entries if isinstance(entry, str)} if isinstance(entries, list) else set()
    return all(not named.isdisjoint(keys.tails(module)) for module in modules)


def parameters_of(configs: Sequence[Mapping[str, Any]], parameters: Collection[str]) -> list[str]:
    """`target_parameters`: the sources' own entries where they name every one, else whole names."""
    listed = [c.get("target_parameters") for c in configs]
    entries = list(dict.fromkeys(str(entry) for entry in listed[0] or [])) if isinstance(listed[0], list) else []
    same = all(sorted(map(str, each or [])) == sorted(entries) for each in listed if isinstance(each, list))
    return entries if same and covers(entries, parameters) else list(parameters)


def plain_config(
    training: Training, layers: Mapping[str, tuple[int, float]], *, whole_paths: bool = False
) -> dict[str, Any]:
    """The config, with (rank, α) of each layer by its path.

    With `whole_paths` other layers of the model end as one of these does: PEFT takes a name for the end of a path.
    """
    exact = {path: f"^{re.escape(path)}" for path in layers}
    rank, alpha = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        **({"task_type": training.task} if training.task else {}),
        "base_model_name_or_path": training.base or None,
        "target_modules": "|".join(exact.values()) if whole_paths else list(layers),
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": training.rslora,
        "lora_dropout": training.dropout,
        "rank_pattern": {exact[path]: own for path, (own, _) in layers.items() if own != rank},
        "alpha_pattern": {exact[path]: own for path, (_, own) in layers.items() if own != alpha},
        "inference_mode": True,
    }
